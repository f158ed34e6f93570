"""The paper scale without its weights: stand-ins in the published layout through every loader, command and lesson."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import baselines
import numpy as np
import pandas as pd
import papermill
import pytest
import stand_in
import torch
import trial
from paper_world import make_imagenet, open_world
from PIL import Image
from run import NOTEBOOKS, run_notebook
from safetensors.torch import load_file

from slimlib.__main__ import main
from slimlib.caption import CAPTION_PRIOR, Captioner, CaptionPrior
from slimlib.codec import SlimCodec
from slimlib.compressor import CompressorConfig
from slimlib.data.cache import ClipSeg
from slimlib.ldm import LatentDiffusion, last
from slimlib.machines import load_machine
from slimlib.measure import costs
from slimlib.measure.baselines import PixelCodec
from slimlib.scales import PAPER, Scale


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Scale:
    return open_world(tmp_path_factory)


@pytest.mark.parametrize("name", [PAPER.machine_a, PAPER.machine_b + "@main"])
def test_machines_without_a_network(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is in the cache. What is no machine goes through `load_pretrained`."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(OSError, match=r"no connection to the hub.*--local-dir"):
        load_machine(name)


V = {"prediction": "v_prediction", "variant": "fp16"}


@pytest.mark.parametrize(("family", "options"), [("sd21", {}), ("sd21", V), ("sd15", {}), ("sd15", {"shard": "1MB"})])
def test_every_variation_of_the_diffusion_model_loads(family: str, options: dict, tmp_path: Path) -> None:
    scale = stand_in.write(tmp_path, tiny=True, family=family, **options)
    if family == "sd15":  # which is published with a safety checker: neither read nor loaded
        path = tmp_path / "ldm/model_index.json"
        checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | checker))
    files = sorted(path.relative_to(scale.ldm).as_posix() for path in Path(scale.ldm).rglob("*.safetensors*"))
    assert all((".fp16." in file) == ("variant" in options) for file in files)
    assert ("unet/diffusion_pytorch_model.safetensors.index.json" in files) == ("shard" in options)
    if "shard" not in options:
        names = load_file(Path(scale.ldm) / files[0]).keys() | load_file(Path(scale.ldm) / files[-1]).keys()
        old = {"text_model.embeddings.position_ids", "decoder.mid_block.attentions.0.proj_attn.weight"}
        assert old < names, "as in the published files"
    ldm = LatentDiffusion.from_pretrained(scale.ldm, scale.variant, "cpu")
    assert ldm.factor == 8 and ldm.latent_channels == 4 and ldm.dtype == torch.float32
    assert ldm.scheduler.config.prediction_type == options.get("prediction", "epsilon")
    assert ldm.vae.config.scaling_factor == 0.18215 and not ldm.scheduler.config.clip_sample
    z = ldm.encode(torch.rand(1, 3, 64, 64))
    assert ldm.decode(last(ldm.enhance(z, ["a dog"], 300, 2), z)).shape == (1, 3, 64, 64)
    text, nothing = ldm.text(["a dog on a sofa", ""])
    assert text.shape[0] == 77 and not torch.equal(text, nothing)
    ids = ldm.tokenizer("a dog").input_ids
    assert (ids[0], ids[-1]) == (49406, 49407) and len(ids) < 10
    assert ldm.tokenizer.pad_token == {"sd21": "!", "sd15": "<|endoftext|>"}[family]


def test_old_names_hold_the_same_weights_as_new_ones(world: Scale, tmp_path: Path) -> None:
    new = stand_in.write(tmp_path, tiny=True, old_names=False)
    one, other = (LatentDiffusion.from_pretrained(scale.ldm, device="cpu") for scale in (new, world))
    assert one.fingerprint() == other.fingerprint()
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(one.encode(x), other.encode(x))
    picture = Image.fromarray((x[0] * 255).byte().permute(1, 2, 0).numpy())
    captions = [Captioner.from_pretrained(scale.captioner, device="cpu").caption([picture]) for scale in (new, world)]
    assert captions[0] == captions[1] and captions[0][0]


def test_codec_and_machines(world: Scale) -> None:
    codec, image = SlimCodec.from_pretrained(world, device="cpu"), Image.effect_noise((128, 64), 90)
    stream = codec.compress(image, 0.5, steps=2)
    assert codec.decompress(stream).size == image.size and codec.inspect(stream).caption
    for name in (world.machine_a, world.machine_b):
        machine = load_machine(name, "cpu")
        assert len(machine.classes) == 1000 and machine.classes[:2] == ["tench", "goldfish"]


def test_clipseg(world: Scale) -> None:
    segment = ClipSeg(Path(world.ldm).parent / "clipseg", "cpu")
    x = torch.rand(2, 3, 48, 80)
    maps = segment(x, ["a dog", "a photo of a cat"])
    assert maps.shape == (2, 1, 48, 80) and 0 <= maps.min() and maps.max() <= 1
    torch.testing.assert_close(segment(x[:1], ["a dog"]), maps[:1], atol=1e-4, rtol=1e-4)
    assert not torch.equal(segment(x[:1], ["a cat"]), maps[:1])


def test_the_compressor_is_the_pockets_for_another_latent() -> None:
    """Its configuration is the one that stage 1 starts from where nothing else is said."""
    there = CompressorConfig(**costs.published("compressor"))
    assert there == CompressorConfig(latent_channels=4, factor=8, walks=there.walks)


@pytest.fixture(scope="session")  # the lessons run long after the other tests of this file
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/: stand-ins, their latents of about unit variance; imagenet/: noise with train/ and val/."""
    root = tmp_path_factory.mktemp("experiment")
    scale = stand_in.write(root / "models", tiny=True)
    path = Path(scale.ldm) / "vae/config.json"
    config = json.loads(path.read_text())
    spread = float(LatentDiffusion.from_pretrained(scale.ldm, device="cpu").encode(torch.rand(2, 3, 128, 128)).std())
    path.write_text(json.dumps(config | {"scaling_factor": config["scaling_factor"] / spread}))
    for split, count in (("train", 32), ("val", 28)):
        make_imagenet(root / "imagenet" / split, count)
    return root


@pytest.fixture(scope="session")
def experiment(place: Path) -> dict[str, str]:
    """The same as parameters of the lessons, with tables of the evaluation."""
    data, models, tables = (str(place / name) for name in ("imagenet", "models", "tables/crop-128"))
    words = f"evaluate --data {data} --scenes 4 --scale {models} --work {place}/work --out {tables} --batch 4 --quiet"
    assert main([*words.split(), *"--variants all --qualities 0.4 0.8 --device cpu".split()]) == 0
    return {"scale": models, "data": data, "results": tables}


def test_from_pictures_to_files(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Preprocess, both stages, the codec: by the commands that notebook 12 names."""
    models, work = place / "models", tmp_path / "work"
    common = f"--scale {models},size=64 --device cpu --quiet"
    make = f"preprocess --data {place}/imagenet --n 9 --roi clipseg --clipseg {models}/clipseg"
    few, two = f"--cache {work}/cache --steps 2 --batch 2 --ema 0.5", f"--accumulate 2 --start {work}/compressor"
    for words in (
        f"{make} --out {work}/cache",
        f"train --stage 1 {few} --start {models}/compressor --out {work}/compressor",
        f"train --stage 2 {few} {two} --out {work}/compressor_stage2",
    ):
        assert main([*words.split(), *common.split()]) == 0, capsys.readouterr().err
    assert np.load(work / "cache/whole/masks.npy").std() > 0
    changed = [
        load_file(folder / "model.safetensors") for folder in (models / "compressor", work / "compressor_stage2")
    ]
    assert any(not torch.equal(changed[0][name], changed[1][name]) for name in changed[0])
    assert CaptionPrior.load(work / "compressor_stage2" / CAPTION_PRIOR).words
    scale = replace(Scale.from_name(models), compressor=str(work / "compressor_stage2"))
    codec, image = SlimCodec.from_pretrained(scale, device="cpu"), Image.new("RGB", (64, 64), "green")
    assert codec.decompress(codec.compress(image)).size == (64, 64)


def test_the_baseline_on_pixels(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain and tuned, from a cache with pictures to what the evaluation measures; by the commands in its help."""
    common = f"--scale {place}/models,size=64 --device cpu --quiet"
    assert main(f"preprocess --data {place}/imagenet --n 6 --keep-images --out {tmp_path}/cache {common}".split()) == 0
    words = f"--cache {tmp_path}/cache --batch 2 --steps 2 {common.replace(',size=64', '')}"
    assert baselines.main(f"{words} --out {tmp_path}/baseline_mse --max_seconds 0".split()) == 0
    assert "the same command goes on" in capsys.readouterr().out and not (tmp_path / "baseline_mse").exists()
    assert baselines.main(f"{words} --out {tmp_path}/baseline_mse".split()) == 0
    assert baselines.main(f"{words} --start {tmp_path}/baseline_mse --out {tmp_path}/baseline_task".split()) == 0
    (tmp_path / "file").touch()
    for out in ("cache", "file"):
        with pytest.raises(ValueError, match="no earlier result"):
            baselines.main(f"{words} --out {tmp_path}/{out}".split())
    tune = f"{words} --start {tmp_path}/baseline_mse --out {tmp_path}/another".split()
    np.save(tmp_path / "cache/whole/labels.npy", np.full(6, 1000))
    with pytest.raises(ValueError, match="labels up to 1000, and a teacher knows 1000 classes"):
        baselines.main(tune)
    about = json.loads((tmp_path / "cache/about.json").read_text())
    (tmp_path / "cache/about.json").write_text(json.dumps(about | {"data": "others"}))
    with pytest.raises(ValueError, match="data: .* there, others asked for"):
        baselines.main(f"{words} --out {tmp_path}/baseline_mse".split())
    plain, tuned = (PixelCodec.from_pretrained(tmp_path / f"baseline_{kind}") for kind in ("mse", "task"))
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    assert plain.encode(image, 0.5)[0] != tuned.encode(image, 0.5)[0]
    assert tuned.decompress(tuned.encode(image, 0.5)[0]).size == (64, 64)


def test_the_evaluation_of_imagenet(experiment: dict[str, str]) -> None:
    folder = Path(experiment["results"])
    table = pd.read_csv(folder / "evaluation.csv")
    slim = table[(table.method == "SLIM, stage 1") & table.variant.isna()]
    assert {0.4, 0.8} == set(slim.quality) and set(table.scenes) == {4}
    assert {"WebP", "JPEG", "AVIF"} < set(table.method) and slim.bpp.gt(0).all()
    about = json.loads((folder / "evaluation.json").read_text())
    assert experiment["scale"] in about["scale"]


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("name", "small"),
    {
        "02_latent_compression": {"n_scenes": 6, "n_fit": 16, "n_sweep": 5, "qualities": [0.5, 1.0]},
        "04_diffusion_enhancement": {"n_scenes": 4, "noise_levels": [100, 600], "steps_tried": [1, 4]},
        "05_stage1_training": {"n_train": 16, "n_scenes": 24, "scene_index": 3, "train_steps": 24, "batch": 4},
        "06_stage2_training": {"n_train": 8, "n_scenes": 6, "train_steps": 2, "lora_steps": 1, "batch": 4, "n_views": 2}
        | {"scene_index": 3, "qualities": [0.4, 0.8]},
        "07_evaluation": {"n_scenes": 4, "n_gallery": 1, "draws": 20, "coverage_trials": 100, "time_scenes": 1},
    }.items(),
)
def test_the_lessons_run_at_this_scale(name: str, small: dict, experiment: dict[str, str], tmp_path: Path) -> None:
    """The same notebooks, by papermill, with the parameters that name other models and other pictures."""
    path = NOTEBOOKS / f"{name}.ipynb"
    known = papermill.inspect_notebook(str(path))
    parameters = small | {key: value for key, value in experiment.items() if key in known}
    assert set(parameters) <= set(known) and {"scale", "data"} <= set(known)
    result = run_notebook(path, tmp_path, parameters, 600)
    assert not result.problem, result.problem


def test_the_check_of_memory_runs_and_refuses(
    world: Scale, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(trial, "free_memory", lambda: 65.0)
    peak = trial.check(world, memory=64, size=64)
    said = capsys.readouterr().out
    assert 0 < peak < 64 and said.count("\n") == 5 and f"the peak was {peak:.2f} GB" in said and "64 GB are" in said
    command = ["check", str(Path(world.ldm).parent), "--size", "64", "--memory"]
    assert trial.main([*command, "0.1"]) == 1
    assert "the peak was" in (said := capsys.readouterr()).err and "compress" in said.out
    assert trial.main([*command, "66"]) == 1
    assert "65.0 GB are free, up to 66 GB may be needed" in (said := capsys.readouterr()).err and not said.out
    monkeypatch.setattr(trial.shutil, "disk_usage", lambda path: type("usage", (), {"free": 6 * 10**9})())
    assert trial.main(["check"]) == 1
    assert "6.0 GB are free" in (said := capsys.readouterr()).err and not said.out, "said before it begins"


def test_measuring(world: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(trial, "TRAINED", (2, 1))
    out = tmp_path / "measured.csv"
    words = f"measure {Path(world.ldm).parent} --sizes 64 --batch 2 --device cpu --out {out}"
    assert trial.main(words.split()) == 0
    table, said = pd.read_csv(out), capsys.readouterr()
    coded = ["preprocessing", "encode", "decode, K = 1", "decode, K = 4", "decode, K = 20"]
    assert table.what.tolist() == [*coded, "stage 1", "stage 2", *coded]
    assert table.precision.tolist() == ["fp32"] * 5 + ["as trained"] * 2 + ["bf16"] * 5
    assert table.batch.tolist() == [2, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1] and set(table["size [px]"]) == {64}
    assert table["ms a picture"].gt(0).all() and table["memory [GB]"].gt(0).all() and table["TFLOP/s"].isna().all()
    np.testing.assert_allclose(table["pictures a second"] * table["ms a picture"], 1000, rtol=1e-4)
    assert "Measured on CPU" in said.out and said.err.count("\n") == len(table)


def test_what_does_not_fit_has_no_time() -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError

    seconds, memory = trial._clock(torch.device("cpu"), too_large, 3)
    assert math.isnan(seconds) and memory > 0


@pytest.mark.parametrize("family", ["sd21", "sd15"])
def test_rates_are_known_for_published_sizes(family: Any) -> None:
    with torch.device("meta"):
        unet = costs.build(costs.published(f"unet_{family}"))
    codec = type("Codec", (), {"ldm": type("Diffusion", (), {"unet": unet})()})()
    plan = costs.Plan(256, family, qualities=1)
    known, work = trial.operations(codec, 256, (1, 4)), costs.operations(plan).sum(axis=1)
    assert known["decode, K = 4"] == costs.operations(plan).bf16["decoding"] > known["decode, K = 1"]
    assert known["encode"] == work["files"]
    assert {known[what] == work[what] for what in ("preprocessing", "stage 1", "stage 2")} == {True}
