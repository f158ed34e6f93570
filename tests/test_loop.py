"""The training loop, on a linear model: every setting does what it says, and nothing is lost when it is stopped."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import DistributedType
from torch import Tensor, nn

from slimlib import loop
from slimlib.loop import FitConfig, fit

CONFIG = FitConfig(steps=6, batch=4, lr=0.1, warmup=2, save_every=2, log_every=1, probe_every=2)


class Net(nn.Module):
    """Batch normalisation brings buffers, which a checkpoint and an average must hold, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)
        self.unused = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) + 0 * self.unused


def net() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"net": Net()}


def error_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :2].exp()).square().mean()


def loss_of(networks: dict[str, nn.Module]) -> loop.Losses:
    x = torch.randn(CONFIG.batch, 3)
    return error_of(networks["net"], x), {"first": x[0, 0]}


def run(folder: Path, modules: dict | None = None, loss: Callable = loss_of, **settings: Any) -> dict[str, nn.Module]:
    options = {k: settings.pop(k) for k in ("resume", "probe", "max_seconds", "settings", "groups") if k in settings}
    return fit(replace(CONFIG, **settings), modules or net(), loss, folder, progress=False, device="cpu", **options)


def equal(one: dict[str, nn.Module], other: dict[str, nn.Module]) -> bool:
    return all(map(torch.equal, one["net"].state_dict().values(), other["net"].state_dict().values()))


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize(("accumulate", "ema", "grouped"), [(1, 0.0, False), (3, 0.8, True)])
def test_it_is_this_loop(tmp_path: Path, accumulate: int, ema: float, grouped: bool) -> None:
    """Written out in plain PyTorch on the batches that were drawn; the loss of one of them is not finite."""
    config = replace(CONFIG, steps=12, warmup=4, accumulate=accumulate, ema=ema, clip=3.0, weight_decay=0.3, beta2=0.9)
    batches: list[Tensor] = []

    def loss(networks: dict) -> loop.Losses:
        batches.append(torch.randn(4, 3))
        error = error_of(networks["net"], batches[-1]) * (np.nan if len(batches) == 8 else 1)
        return error, {"mean": batches[-1].mean()}

    ours, theirs = net(), Net()
    theirs.load_state_dict(ours["net"].state_dict())

    def groups(model: nn.Module) -> list[dict]:
        linear, rest = [model.linear.weight], [*model.norm.parameters(), model.unused]
        kinds = [(linear, 5.0, 0.0), (rest, 1.0, 0.5)] if grouped else [([*linear, *rest], 1.0, 0.3)]
        return [{"params": params, "speed": speed, "weight_decay": decay} for params, speed, decay in kinds]

    given = {"groups": groups(ours["net"])} if grouped else {}
    result = fit(config, ours, loss, tmp_path, progress=False, device="cpu", **given)["net"]
    optimizer, average, rows = torch.optim.AdamW(groups(theirs), betas=(0.9, 0.9)), None, []
    for step in range(12):
        rate = 0.1 * (step + 1) / 4 if step < 4 else 0.1 * (0.01 + 0.99 * (1 + np.cos(np.pi * (step - 4) / 8)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["speed"]
        optimizer.zero_grad()
        drawn = batches[step * accumulate :][:accumulate]
        total = sum(error_of(theirs, x) * (np.nan if x is batches[7] else 1) for x in drawn) / accumulate
        total.backward()
        if nn.utils.clip_grad_norm_(theirs.parameters(), 3.0).isfinite():
            optimizer.step()
            now = torch.cat([p.detach().flatten() for p in theirs.parameters()])
            average = now if average is None or not ema else ema * average + (1 - ema) * now
        rows.append([total.item(), torch.stack(drawn).mean().item(), rate])
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in result.parameters()]), average)
    torch.testing.assert_close([*result.buffers()], [*theirs.buffers()])
    assert not result.training and result.frozen == 1
    log = pd.read_csv(tmp_path / "log.csv")
    np.testing.assert_allclose(log[["loss", "mean", "rate"]], rows, rtol=1e-4)
    again: list[Tensor] = []
    for seed in (0, 1):
        keep = lambda n: again.append(torch.randn(4, 3)) or loss_of(n)  # noqa: E731
        run(tmp_path / str(seed), loss=keep, seed=seed, accumulate=accumulate)
    drawn = {float(x.sum()) for x in batches[:6] + again[6 * accumulate :]}
    assert torch.equal(again[0], batches[0]) and len(drawn) == 6 + 6 * accumulate, "each batch has its own draw"


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "ema": 0.7}])
def test_resumed_in_halves_equals_one_go(tmp_path: Path, settings: dict) -> None:
    probe = lambda modules: {"weight": float(modules["net"].linear.weight[0, 0]), "unknown": np.nan}  # noqa: E731
    options = {"probe": probe, "log_every": 4, **settings}
    whole = run(tmp_path / "whole", **options)
    for done in (1, 2, 3):
        run(tmp_path / "parts", max_seconds=0.0, **options)  # stops after one step
        assert checkpoint(tmp_path / "parts")["step"] == done
        torch.manual_seed(123)  # what happens in between does not matter
    torch.save({**checkpoint(tmp_path / "parts"), "seconds": 1000.0}, tmp_path / "parts/checkpoint.pt")
    for _ in range(2):  # what is done is done
        assert equal(whole, run(tmp_path / "parts", **options))
    for name, steps in (("log.csv", [4, 6]), ("curve.csv", [2, 4, 6])):
        one, other = (pd.read_csv(tmp_path / run / name) for run in ("whole", "parts"))
        pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"))
        assert list(one["step"]) == steps and other["seconds"].iloc[-1] >= 1000, "the clock goes on"


def test_a_crash_loses_the_steps_since_the_checkpoint_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts, turns = run(tmp_path / "whole"), tmp_path / "parts", []
    options = {"probe": lambda _modules: {"turn, or batch": len(turns)}, "probe_every": 1}

    def loss(networks: dict) -> loop.Losses:
        turns.append(1)
        return loss_of(networks) if len(turns) < 6 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        run(parts, loss=loss, **options)
    assert checkpoint(parts)["step"] == 4 and len(pd.read_csv(parts / "log.csv")) == 5
    for name in ("log.csv", "curve.csv"):
        with (parts / name).open("a") as file:
            file.write("\n\x00\x00\n5,0.1\n1")  # damaged lines, and one that was being written, of step 1000

    def full_disk(_state: dict, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(torch, "save", full_disk)
        run(parts, **options)
    assert checkpoint(parts)["step"] == 4
    for resume in (True, False):
        assert equal(whole, run(parts, resume=resume, **options))
        for name in ("log.csv", "curve.csv"):
            assert list(pd.read_csv(parts / name)["step"]) == [1, 2, 3, 4, 5, 6]


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("exploded"),)


def test_other_settings_and_damaged_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    usual = {"steps": 2, "settings": {"data": "a"}}
    run(tmp_path, **usual)
    for other, reason in (({"lr": 0.2}, "lr: 0.1 there, 0.2 asked"), ({"settings": {"data": "b"}}, "data: a there, b")):
        with pytest.raises(ValueError, match=reason):
            run(tmp_path, **{**usual, **other})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for data in (b"not a checkpoint", whole[: len(whole) // 2], pickle.dumps({"settings": Bomb()}, 2), b""):
        (tmp_path / "checkpoint.pt").write_bytes(data)
        with pytest.raises(ValueError, match="damaged"):
            run(tmp_path, **usual)
    assert not Path("exploded").exists(), "nothing of a checkpoint is run"
    state = torch.load(io.BytesIO(whole))
    for other in ({"modules": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"step": None, "modules": 7}):
        torch.save({**state, **other}, tmp_path / "checkpoint.pt")  # such as of a model without adapters
        with pytest.raises(ValueError, match=r"checkpoint\.pt does not hold a checkpoint of this training"):
            run(tmp_path, **usual)
    torch.save({**state, "settings": {"lr": 0.1}}, tmp_path / "checkpoint.pt")
    run(tmp_path, **usual)  # of an older version, which knew fewer settings
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        monkeypatch.setattr(loop.Accelerator, "distributed_type", kind, raising=False)
        with pytest.raises(ValueError, match=rf"{kind.value}.*MULTI_GPU"):
            run(tmp_path)


@pytest.mark.parametrize(("steps", "lost"), [(60, 20), (3, 3)])
def test_what_is_never_finite_does_not_train_to_the_end(tmp_path: Path, steps: int, lost: int) -> None:
    """Damaged weights or data: no step would change anything, and the result would be what one began with."""
    turns: list[int] = []

    def loss(networks: dict) -> loop.Losses:
        turns.append(1)
        value, parts = loss_of(networks)
        return value * (1 if len(turns) % 10 == 0 and len(turns) < 40 else np.nan), parts

    with pytest.raises(FloatingPointError, match=f"in {lost} steps on end"):
        run(tmp_path, loss=loss, steps=steps, save_every=99)
    assert len(turns) == (50 if steps == 60 else 3) and not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_probes_measure_and_change_nothing(tmp_path: Path, ema: float) -> None:
    seen: list[Tensor] = []

    def probe(modules: dict[str, nn.Module]) -> dict[str, float]:
        assert not modules["net"].training and not torch.is_grad_enabled()
        modules["net"](torch.rand(2, 3))  # neither its draws nor its statistics count
        seen.append(modules["net"].linear.weight.clone())
        return {"norm": float(seen[-1].norm())}

    trained = run(tmp_path / "one", probe=probe, steps=5, ema=ema)
    curve = pd.read_csv(tmp_path / "one/curve.csv")
    assert list(curve["step"]) == [2, 4, 5]
    np.testing.assert_allclose(curve["norm"], [float(w.norm()) for w in seen], 1e-4)
    assert torch.equal(seen[-1], trained["net"].linear.weight), "of the average, if that is the result"
    assert equal(trained, run(tmp_path / "other", steps=5, ema=ema)) and not (tmp_path / "other/curve.csv").exists()


def test_processes_that_know_nothing_of_each_other_do_not_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a batch system may start them on GPUs: each would train alone, and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(loop, "pick_device", lambda device: torch.device("cuda"))  # on a CPU accelerate waits for all
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, and 1 would train: launch with torchrun"):
        run(tmp_path)
    assert not [*tmp_path.iterdir()]


TWO = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_loop import run
trained = run(Path(sys.argv[2]), ema=0.7, accumulate=2, max_seconds=100.0)
weights = sum(float(p.double().abs().sum()) for p in trained["net"].parameters())
Path(f"sum{os.environ['RANK']}").write_text(repr(weights))  # what two print may come out mixed
try:  # a disk that one of them does not see
    run(Path(sys.argv[2] + os.environ["RANK"].strip("0")), ema=0.7, accumulate=2)
except ValueError as error:
    Path(f"said{os.environ['RANK']}").write_text(str(error))
"""


def test_two_processes_train_as_one_that_accumulates_more(tmp_path: Path) -> None:
    """Each draws its own batches; gradients and figures are averaged, so that both end with the same weights."""
    (tmp_path / "two.py").write_text(TWO)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "two.py"]
    command += [str(Path(__file__).parent), "two"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    sums = [float(path.read_text()) for path in tmp_path.glob("sum?")]
    with pytest.raises(ValueError, match=r"accumulate \* processes: 4 there, 2 asked for"):
        run(tmp_path / "two", ema=0.7, accumulate=2)  # alone, half the batch
    run(tmp_path / "two", ema=0.7, accumulate=4)
    run(tmp_path / "one", ema=0.7, accumulate=4)
    assert len(sums) == 2 and sums[0] == sums[1]
    assert all("1 of 2 processes see" in (tmp_path / f"said{rank}").read_text() for rank in (0, 1)), "nobody waits"
    one, two = (checkpoint(tmp_path / name)["modules"] for name in ("one", "two"))
    torch.testing.assert_close(two["net"]["linear.weight"], one["net"]["linear.weight"])
    two, one = (modules["average of net"]["module.linear.weight"] for modules in (two, one))
    torch.testing.assert_close(two, one)
    logs = [pd.read_csv(tmp_path / name / "log.csv").drop(columns="seconds") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*logs, rtol=1e-4)
