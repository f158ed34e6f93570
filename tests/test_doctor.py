"""The self-check tells real weights from random ones, and what is missing from what is there."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from paper_world import make_imagenet, open_world

from slimlib.__main__ import main
from slimlib.measure import doctor
from slimlib.scales import PAPER, Scale, split_revision

MODELS = {"diffusion model", "captioner", "machine A", "machine B"}
QUALITY = {"VAE round trip", "latent", "UNet", "top-1, machine A", "top-1, machine B", "caption"}
POCKET = Scale.from_name("pocket")


def found(scale: Scale, data: str = "", handful: int = 8) -> dict[str, doctor.Check]:
    checks = {check.name: check for check in doctor.examine(scale, data, "cpu", handful, steps=(1,))}
    assert all("\n" not in str(check) for check in checks.values()), "each is one line"
    return checks


def test_shipped_models_are_well() -> None:
    checks = found(POCKET)
    assert {*checks} > MODELS | QUALITY
    assert {c.status for name, c in checks.items() if name != "device"} == {"ok"}, [*map(str, checks.values())]
    assert "over 8 pictures of 128 px" in checks["VAE round trip"].said and "K = 1" in checks["stream"].said
    assert "predicts v_prediction" in checks["diffusion model"].said and "factor 4" in checks["diffusion model"].said


def test_random_weights_are_found_out(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """On three pictures it speaks of three. A compressor that is yet to be trained is none of them."""
    world = replace(open_world(tmp_path_factory), compressor="runs/none")
    checks = found(world, str(make_imagenet(tmp_path / "val", 3).parent))
    assert checks["pictures"].said == "3 to look at" and "over 3 pictures of 64 px" in checks["VAE round trip"].said
    for name in QUALITY - {"caption"}:
        assert checks[name].status == "FAIL"
    assert checks["top-1, machine A"].said.startswith("0 of 3 right; at least 50% expected: are these its weights")
    assert checks["stream"].status == checks["diffusion model"].status == "ok"
    assert checks["compressor"].status == "note" and "train stage 1" in checks["compressor"].said
    assert "predicts epsilon" in checks["diffusion model"].said and "scaling 0.18215" in checks["diffusion model"].said
    assert "vae/config.json (0.18215)" in checks["latent"].said and "word" in checks["caption"].said


def test_machines_that_know_no_class(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the pocket's scenes those come first that a machine knows, and where it knows none it is not judged."""
    machine = doctor.load_machine(open_world(tmp_path_factory).machine_a, "cpu")
    squares = doctor._pictures(replace(PAPER, size=64), "", machine, 4)
    assert len(squares) == 4 and all(machine.classes[label] for _, label in squares) and squares[0][0].size == (64, 64)
    machine.classes[:] = ["nothing"] * 1000
    none = doctor._pictures(replace(PAPER, size=64), "", machine, 4)
    assert isinstance(doctor._accuracy(machine, none, 50), doctor.Note)


def test_what_is_missing_is_named_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"doctor --scale paper,size=64,compressor={tmp_path}/none --device cpu"
    assert main(words.split()) == 1
    out = capsys.readouterr().out
    lines = {line[6:23].strip(): line for line in out.splitlines()}
    assert "checks failed, 7 could not be made" in out
    expected = dict.fromkeys(MODELS, "FAIL") | dict.fromkeys({"stream", *QUALITY}, "skip")
    expected |= {"compressor": "note", "hub": "note", "device": "note", "versions": "ok", "pictures": "ok"}
    assert {name: lines[name].split()[0] for name in expected} == expected
    assert all("--local-dir" in lines[name] for name in MODELS)
    assert all("needs the check" in lines[name] for name in {"stream", *QUALITY})
    assert "train stage 1" in lines["compressor"] and "HF_HUB_OFFLINE" in lines["hub"], "tests are offline"
    assert main(["doctor", "--scale", str(tmp_path)]) == 1
    assert "unknown scale" in capsys.readouterr().err


def test_models_are_asked_for_before_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub answers: a commit to pin, or why not; nothing is downloaded for that."""
    asked, files = [], ["model.bin", *["model.safetensors"] * 4]

    def answer(self: HfApi, name: str, revision: str | None = None, timeout: float = 0) -> Any:
        asked.append((name, revision))
        if len(asked) > 4:
            response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
            raise HfHubHTTPError("403: access to this model is gated", response=response)
        file = type("Sibling", (), {"rfilename": "unet/" + files.pop()})()
        return type("ModelInfo", (), {"sha": "0123456789abcdef", "siblings": [file]})()

    monkeypatch.setattr(HfApi, "model_info", answer)
    said = doctor._hub(replace(PAPER, ldm=f"{PAPER.ldm}@main"))
    machines = [(f"timm/{name}", None) for name in (PAPER.machine_a, PAPER.machine_b)]
    assert asked == [(PAPER.ldm, "main"), split_revision(PAPER.captioner), *machines]
    assert f"{PAPER.ldm}@0123456789ab," in said and said.count("not pinned") == 2
    asked.clear()
    with pytest.raises(ValueError, match="no safetensors in this revision"):
        doctor._hub(PAPER)
    asked += [("", "")] * 4
    with pytest.raises(OSError, match="accept its terms"):
        doctor._hub(PAPER)
    assert doctor._hub(POCKET) == "not needed: all models are folders"


def test_short_of_memory_or_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda: 11.0)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("usage", (), {"free": 5_000_000_000})())
    with pytest.raises(ValueError, match=r"11\.0 GB free on cpu, 12 wanted: end what else runs"):
        doctor._memory(PAPER, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"5\.0 GB free.*12 wanted: set HF_HOME"):
        doctor._disk(PAPER)
    assert "11.0 GB free" in doctor._memory(POCKET, torch.device("cpu")) and "5.0 GB free" in doctor._disk(POCKET)
    assert "; 64 MiB written here in" in doctor._disk(POCKET)
    monkeypatch.setattr(doctor, "free_memory", lambda: 99.0)
    assert re.search(r"12 wanted to look; .*stage 2 \d\d,", doctor._memory(PAPER, torch.device("cpu")))


def test_free_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": "2000000000\n", "memory.current": "500000000\n"}
    monkeypatch.setattr(Path, "read_text", lambda self: files[self.name])
    assert doctor.free_memory() == 1.5
    files["memory.stat"] = "anon 300000000\ninactive_file 150000000\nactive_file 1\n"
    assert doctor.free_memory() == 1.65, "what was only read from a disk gives way"
    files["memory.max"] = "max\n"
    assert doctor.free_memory() == pytest.approx(doctor.psutil.virtual_memory().available / 1e9, rel=0.2)


def test_free_memory_is_that_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch system limits a group above that of the process; the root has no limit at all."""
    read, job = Path.read_text, "/system.slice/slurmstepd.scope/job_7"
    files = {f"/sys/fs/cgroup{job}/memory.max": "3000000000", f"/sys/fs/cgroup{job}/memory.current": "1000000000"}
    files |= {f"/sys/fs/cgroup{job}/step_0/memory.max": "max", "/proc/self/cgroup": f"1:cpu:/\n0::{job}/step_0\n"}
    monkeypatch.setattr(
        Path, "read_text", lambda self: files[str(self)] if str(self) in files else read(tmp_path / "-")
    )
    assert doctor.free_memory() == 2.0


@pytest.mark.parametrize(
    ("file", "entry", "change", "check"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", lambda _: "epsilon", doctor._unet),
        ("vae/config.json", "scaling_factor", lambda factor: 4 * factor, doctor._latent),
    ],
)
def test_wrong_settings_are_found_out(file: str, entry: str, change: Any, check: Any, tmp_path: Path) -> None:
    """On the shipped weights, which predict v: as epsilon they are far off."""
    shutil.copytree(POCKET.ldm, tmp_path / "ldm")
    path, squares = tmp_path / "ldm" / file, doctor._pictures(POCKET, "", None, 4)
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {entry: change(config[entry])}))
    ldm = doctor.LatentDiffusion.from_pretrained(tmp_path / "ldm", POCKET.variant, "cpu")
    with torch.no_grad(), pytest.raises(ValueError, match=entry):
        check(ldm, squares)


def test_classes_in_another_order_are_found_out() -> None:
    machine = doctor.load_machine(POCKET.machine_b, "cpu")
    assert "8 of 8 right" in doctor._accuracy(machine, doctor._pictures(POCKET, "", machine, 8), 25)
    machine.classes.reverse()
    with pytest.raises(ValueError, match="the order of its classes"):
        doctor._accuracy(machine, doctor._pictures(POCKET, "", machine, 8), 25)
