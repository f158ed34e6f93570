"""`slim train`: both stages on a cache, what is stored, what is refused, and who writes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import baselines
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny_codec import make_world
from torch.distributed.run import get_args_parser

from slimlib.__main__ import main
from slimlib.caption import CAPTION_PRIOR, CaptionPrior
from slimlib.compressor import LatentCompressor
from slimlib.data import cache, train
from slimlib.data.cache import Cache, fill
from slimlib.data.scenes import PocketScenes
from slimlib.ldm import LatentDiffusion
from slimlib.measure import evaluation
from slimlib.utils import digest

N = 6


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, a cache of six scenes, and a compressor that was trained with weights of its own."""
    world = make_world(tiny_world, tmp_path_factory.mktemp("train") / "world")
    training = {"w_bg": 0.3, "lambda_min": 0.02, "lambda_max": 2.0, "steps": 77}
    (world / "compressor/card.json").write_text(json.dumps({"training": training}))
    source = PocketScenes("train", 64)
    scenes = [replace(source[i], label=i) for i in range(N)]
    ldm = LatentDiffusion.from_pretrained(world / "ldm", device="cpu")
    about = {"data": "six scenes", "vae": digest(ldm.vae).hex()[:8]}
    fill(scenes, world / "cache", about=about, ldm=ldm, keep_images=True, progress=False)
    return world


def slim_train(world: Path, out: Path, words: str = "") -> int:
    options = f"--cache {world / 'cache'} --scale {world} --out {out} --steps 2 --batch 2 --device cpu --quiet {words}"
    return main(["train", *options.split()])


def test_stage_1_from_random_weights(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "one"
    assert slim_train(world, out, "--w-bg 0.5 --accumulate 2") == 0
    card = json.loads((out / "card.json").read_text())["training"]
    asked = {"start": "random weights", "steps": 2, "batch": 2, "w_bg": 0.5, "accumulate": 2, "lambda_max": 4.5}
    assert card.items() >= asked.items() and card["processes"] == 1 and "six scenes" in card["data"]
    config = LatentCompressor.from_pretrained(out, device="cpu").config
    assert (config.latent_channels, config.factor) == (4, 4), "what the cache holds"
    CaptionPrior.fit(Cache.open(world / "cache").captions).save(tmp_path / "prior.json")
    assert (out / CAPTION_PRIOR).read_bytes() == (tmp_path / "prior.json").read_bytes()
    assert (out / "README.md").exists() and not (out / "checkpoint.pt").exists()
    assert (tmp_path / "one.training/checkpoint.pt").exists() and (tmp_path / "one.training/log.csv").exists()

    assert slim_train(world, out, "--w-bg 0.5 --accumulate 2") == 1, "nothing is begun anew over a checkpoint"
    assert capsys.readouterr().err.startswith(f"slim train: {out}.training holds a checkpoint: go on from it with --re")
    assert slim_train(world, out, "--w-bg 0.4 --accumulate 2 --resume") == 1
    assert "w_bg: 0.5 there, 0.4 asked for" in capsys.readouterr().err
    shutil.copytree(world / "cache", tmp_path / "others")
    about = json.loads((tmp_path / "others/about.json").read_text())
    (tmp_path / "others/about.json").write_text(json.dumps(about | {"data": "other scenes"}))
    assert slim_train(world, out, f"--w-bg 0.5 --accumulate 2 --resume --cache {tmp_path / 'others'}") == 1
    assert "data: six scenes there, other scenes asked for" in capsys.readouterr().err


def test_what_is_no_earlier_result_is_not_replaced(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A home, the cache itself, a file: refused before hours are spent."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").touch()
    for out in (tmp_path / "home", tmp_path / "home/thesis.tex", world / "cache"):
        assert slim_train(world, out) == 1 and "no earlier result of training" in capsys.readouterr().err
    assert (tmp_path / "home/thesis.tex").exists() and (world / "cache/whole").exists()


def test_stage_2_goes_on_from_its_start(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, start = tmp_path / "two", world / "compressor"
    words = f"--stage 2 --start {start} --task features --lambda-max 3"
    assert slim_train(world, out, f"{words} --max-seconds 0") == 0
    assert capsys.readouterr().out == "stopped after 1 of 2 steps; the same command with --resume goes on\n"
    assert not out.exists(), "nothing is published before the last step"
    assert slim_train(world, out, f"{words} --resume") == 0
    card = json.loads((out / "card.json").read_text())["training"]
    assert (card["w_bg"], card["lambda_min"]) == (0.3, 0.02), "as its start was trained"
    assert (card["lambda_max"], card["steps"], card["task"]) == (3.0, 2, "features"), "as asked for"
    assert card["start"] == str(start) and card["checkpointing"] is False
    assert (out / CAPTION_PRIOR).read_bytes() == (start / CAPTION_PRIOR).read_bytes()
    before, after = (load_file(folder / "model.safetensors") for folder in (start, out))
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)


def test_a_warm_start_of_stage_1_keeps_its_architecture_but_not_its_settings(world: Path, tmp_path: Path) -> None:
    assert slim_train(world, tmp_path / "warm", f"--start {world / 'compressor'}") == 0
    start, warm = (LatentCompressor.from_pretrained(f, device="cpu") for f in (world / "compressor", tmp_path / "warm"))
    assert warm.config == start.config
    assert slim_train(world, tmp_path / "turbo", f"--start {tmp_path / 'warm'} --walks 0 999 4 1 0.5 249 1 1") == 0
    turbo = LatentCompressor.from_pretrained(tmp_path / "turbo", device="cpu").config
    assert turbo == replace(start.config, walks=[[0, 999, 4, 1], [0.5, 249, 1, 1]]) and turbo.walk(0.6) == (249, 1, 1)
    assert json.loads((tmp_path / "warm/card.json").read_text())["training"]["w_bg"] == 0.05


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--task ce --a 1", "stage 1 has no --a, --task"),
        ("--walks 0 999 4 1 0.5 249 1", "walks must be rows"),
        ("--walks 0 1000 4 1", "t0 < 1000"),
        ("--walks 0 999 101 1", "K <= 100"),
        ("--walks 0 999 -1 1", "walks must be rows"),
        ("--walks 0 499.5 4 1", "walks must be rows"),
        ("--lambda-min 5", "lambda_min, 5, is above lambda_max, 4.5: swap them"),
        ("--stage 2 --start START --lambda-max 0.01", "lambda_min, 0.02, is above lambda_max, 0.01"),
        ("--stage 2 --start CUT", "card.json (of a card (delete it, and say --w-bg,"),
        ("--start BARE", "caption_prior.json"),
        ("--stage 2 --start START --cache LABELS", "has labels up to 900, and a teacher of world knows 6 classes"),
        ("--cache NAN", "no finite gradient in 2 steps on end: are the weights and the data finite?"),
        ("--stage 2", "stage 2 needs --start"),
        ("--stage 2 --start nowhere", "nowhere"),
        ("--stage 2 --start START --task nonsense", "nonsense"),
        ("--stage 2 --start START --scale OTHER", "another VAE"),
        ("--start COARSE", "works on other latents"),
        ("--cache nowhere", "nowhere holds no cache"),
    ],
)
def test_refusals(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, reason: str) -> None:
    coarse = LatentCompressor.from_pretrained(world / "compressor", device="cpu")
    coarse.config.factor = 8
    coarse.save_pretrained(tmp_path / "coarse")
    other = make_world(world, tmp_path / "other")
    ldm = LatentDiffusion.from_pretrained(other / "ldm", device="cpu")
    ldm.vae.decoder.conv_out.weight.data += 1
    ldm.vae.save_pretrained(other / "ldm/vae", variant="fp16")
    names = {"START": world / "compressor", "COARSE": tmp_path / "coarse", "OTHER": other}
    for name, damage in {
        "CUT": lambda folder: (folder / "card.json").write_text('{"training": {'),
        "BARE": lambda folder: (folder / CAPTION_PRIOR).unlink(),
        "LABELS": lambda folder: np.save(folder / "whole/labels.npy", np.full(N, 900)),
        "NAN": lambda folder: np.save(folder / "whole/latents.npy", np.full((N, 4, 16, 16), np.nan, np.float16)),
    }.items():
        if name in words:
            shutil.copytree(
                world / ("compressor" if "start" in words.split(name)[0][-9:] else "cache"), tmp_path / name
            )
            damage(tmp_path / name)
            names[name] = tmp_path / name
    for name, path in names.items():
        words = words.replace(name, str(path))
    assert slim_train(world, tmp_path / "x", words) == 1
    said = capsys.readouterr().err
    assert reason in said and said.count("\n") == 1
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.training/checkpoint.pt").exists()


def test_a_cache_without_latents_or_pictures(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, start = Cache.open(world / "cache"), world / "compressor"
    monkeypatch.setattr(train.Cache, "open", lambda _: replace(whole, latents=None))
    assert slim_train(world, tmp_path / "x") == 1
    assert "holds no latents" in capsys.readouterr().err
    monkeypatch.setattr(train.Cache, "open", lambda _: replace(whole, labels=np.full(N, 900)))
    assert slim_train(world, tmp_path / "z", f"--stage 2 --start {start} --task features") == 0, "no label is used"
    monkeypatch.setattr(train.Cache, "open", lambda _: replace(whole, images=None))
    assert slim_train(world, tmp_path / "x", f"--stage 2 --start {start} --task features") == 1
    assert 'take task "ce"' in capsys.readouterr().err
    assert slim_train(world, tmp_path / "y", f"--stage 2 --start {start}") == 0, "that needs no pictures"


@pytest.mark.parametrize("module", [train, cache, evaluation, baselines])
def test_torchrun_takes_no_option_of_ours_for_its_own(module: Any) -> None:
    """As the examples have it; --start would be short for its --start-method, and --n for many."""
    example = re.search(r"torchrun (--nproc_per_node 8.*?) *(\.\.\.|$)", module.__doc__.replace("--\n", "-- "), re.M)
    assert example
    options = ["--start", "x", "--n", "5"]
    found = get_args_parser().parse_args([*shlex.split(example[1]), *options])
    assert found.training_script in ("slimlib", "assets/paper/baselines.py")
    assert found.training_script_args[-4:] == options and found.nproc_per_node == "8"


def test_frozen_networks_in_half_precision(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, work = [], train.train_stage2
    monkeypatch.setattr(train, "train_stage2", lambda *args, **how: kinds.append(args[5].dtype) or work(*args, **how))
    losses = []
    for more in ("", "--bf16"):
        out = tmp_path / f"out{more}"
        assert slim_train(world, out, f"--stage 2 --start {world / 'compressor'} --task ce {more}") == 0
        losses.append(pd.read_csv(f"{out}.training/log.csv").loss)
    assert kinds == [torch.float32, torch.bfloat16]
    assert losses[0].iloc[0] == pytest.approx(losses[1].iloc[0], rel=0.03) and not losses[0].equals(losses[1])


def test_of_several_processes_the_main_one_writes(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "rank_and_world", lambda: (1, 2))
    assert slim_train(world, tmp_path / "x") == 0
    assert not (tmp_path / "x").exists() and (tmp_path / "x.training").exists()
    monkeypatch.setattr(train, "rank_and_world", lambda: (0, 2))
    assert slim_train(world, tmp_path / "x", "--resume") == 0
    assert json.loads((tmp_path / "x/card.json").read_text())["training"]["processes"] == 2
