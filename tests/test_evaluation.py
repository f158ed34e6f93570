"""The evaluator: what each column means, what each ablation changes, and runs that are killed and shared."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from paper_world import make_imagenet, open_world
from tiny_codec import make_world, picture
from torch import Tensor, nn

from slimlib.__main__ import main
from slimlib.codec import SlimCodec
from slimlib.data.imagenet import AsPublished, ImageNetScenes, Pictures
from slimlib.data.scenes import PocketScenes, Scene
from slimlib.images import to_images, to_tensor
from slimlib.ldm import last
from slimlib.machines import load_machine
from slimlib.measure import evaluation, methods
from slimlib.measure.baselines import PixelCodec, decode_classic, downscale, encode_classic, payload_bytes
from slimlib.measure.evaluation import (
    Options,
    all_jobs,
    evaluate,
    evaluate_latents,
    judged,
    read_table,
    summarise,
    weights_key,
)
from slimlib.measure.methods import SPENT, VARIANTS, Batch, Method
from slimlib.measure.metrics import compare, interval
from slimlib.roi import object_box, roi_crop
from slimlib.scales import ASSETS, Scale
from slimlib.stream import FIXED_BYTES, unpack

TIMES = ["encode_ms", "decode_ms"]


def make_scenes(count: int) -> list[Scene]:
    """Pictures of 64 px with a bright square, which is the region; six labels in turn; every fourth was never seen."""
    matte = np.zeros((64, 64), np.float32)
    matte[16:33, 16:33] = 1
    return [Scene(picture(seed=i), matte, i % 6, f"a thing {i}", "", i % 4 > 0) for i in range(count)]


# ---- columns of the results, with a method and machines that do what is written here


class Eye(nn.Module):
    """A machine that takes a colour of the first pixel for the class."""

    def __init__(self, colour: int) -> None:
        super().__init__()
        self.colour, self.mean = colour, torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((255 * x[:, self.colour, 0, 0]).round().long(), 256).float()


def marked(count: int) -> list[Scene]:
    """Scenes whose first pixel tells the label in red and in green."""
    scenes = make_scenes(count)
    for scene in scenes:
        scene.image.putpixel((0, 0), (scene.label, scene.label, 0))
    return scenes


EYES = {"a": Eye(0), "b": Eye(1)}


class Fake:
    """A method with an error of 0.1 inside of the region, 0.2 outside; A takes odd scenes for others, B every third."""

    def __init__(self, settings: list, name: str = "fake", stop_after: int = 10**9, pause: float = 0) -> None:
        self.ran: list[tuple[list[int], str, float]] = []
        self.method, self.stop_after, self.pause = Method(name, "key", settings, self.run), stop_after, pause

    def run(self, batch: Batch, variant: str, quality: float) -> tuple[Tensor, pd.DataFrame]:
        if len(self.ran) == self.stop_after:
            raise KeyboardInterrupt
        self.ran.append((batch.indices, variant, quality))
        x = batch.x + torch.where(batch.mattes > 0, 0.1, 0.2)
        x[:, :, 0, 0] = batch.x[:, :, 0, 0]
        for i, index in enumerate(batch.indices):
            x[i, 0, 0, 0] += (index % 2) / 255
            x[i, 1, 0, 0] += (index % 3 == 0) / 255
        columns = {name: [index + 100.0 * at for index in batch.indices] for at, name in enumerate(SPENT[:6])}
        time.sleep(self.pause)
        return x, pd.DataFrame(columns | ({"encode_ms": time.perf_counter()} if self.pause else {}))


def test_columns_of_the_results() -> None:
    scenes = marked(10)
    found = evaluate(scenes, [(Fake([("", 0.5), ("other", 1)]).method, 10)], EYES, progress=False, batch=4)
    assert found.method.eq("fake").all() and found.variant.tolist() == [""] * 10 + ["other"] * 10
    assert found.quality.tolist() == [0.5] * 10 + [1.0] * 10
    one = found[found.variant == ""]
    assert one.scene.tolist() == list(range(10)) and one.label.tolist() == [s.label for s in scenes]
    assert one.seen.tolist() == [s.seen for s in scenes] and one.seen.dtype == bool
    assert one.cutout.tolist() == [f"picture {i}" for i in range(10)], "each its own"
    shared = evaluate([replace(s, cutout="a fox") for s in scenes], [(Fake([("", 1)]).method, 2)], EYES, progress=False)
    assert shared.cutout.tolist() == ["a fox"] * 2
    for at, name in enumerate(("size", "payload", "caption", "hyper", "latent", "roi_bits")):
        assert one[name].tolist() == [i + 100 * at for i in range(10)], name
    assert one[TIMES].isna().all(axis=None), "not taken"
    assert one.top1_a.tolist() == [i % 2 == 0 for i in range(10)]
    assert one.top1_b.tolist() == [i % 3 > 0 for i in range(10)]
    assert np.allclose(one.roi_error, 0.1**2) and np.allclose(one.background_error, 0.2**2, rtol=1e-3)


def test_where_the_object_is_counts_by_its_box_and_what_is_said_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found is an IoU above one half: boxes moved by 0, 5 and 6 of 17 pixels, and all of the picture."""
    moved, eyes = torch.tensor([[0, 0, 0, 0], [5, 0, 5, 0], [6, 0, 6, 0], [-16, -16, 31, 31]]), EYES | {"d": Eye(2)}
    monkeypatch.setattr(evaluation, "find", lambda machine, x: (moved + torch.tensor([16, 16, 33, 33])) / 64)
    found = evaluate(marked(4), [(Fake([("", 0.5)]).method, 4)], eyes, progress=False)
    assert found.found_d.tolist() == [True, True, False, False] and "top1_d" not in found
    says = lambda batch, *_: (batch.x, pd.DataFrame({"size": 8.0, "answer": [0, 1, -1, 0]}))  # noqa: E731
    found = evaluate(marked(4), [(Method("label only", "key", [("", 0.0)], says), 4)], eyes, progress=False)
    assert found.top1_a.tolist() == found.top1_b.tolist() == [True, True, False, False] and not found.found_d.any()
    assert found.roi_error.isna().all() and found.background_error.isna().all() and found["size"].eq(8).all()


def test_unseen_scenes_come_in_between() -> None:
    test, unseen = PocketScenes("test", 32), PocketScenes("unseen", 32)
    scenes = evaluation.with_unseen(test)
    assert len(scenes) == 13 * (len(unseen) // 3) >= Options(reproduce=True).counts()[0]
    assert [scenes[i].seen for i in range(26)] == ([True] * 10 + [False] * 3) * 2
    for i, scene in ((0, test[0]), (9, test[9]), (10, unseen[0]), (13, test[10]), (25, unseen[5])):
        assert scenes[i].image.tobytes() == scene.image.tobytes()
    assert len(evaluation.with_unseen(PocketScenes("test", 32, n=25))) == 26


def results(**columns: Any) -> pd.DataFrame:
    """Eight scenes of one setting; the objects of those with an odd number are known to training."""
    rows = pd.DataFrame({"method": "SLIM", "variant": "", "quality": 0.2, "scene": range(8), "seen": [False, True] * 4})
    rows = rows.assign(size=np.arange(60.0, 68), payload=np.arange(50.0, 58), caption=4.0, hyper=9.0)
    rows = rows.assign(latent=np.arange(30.0, 38), roi_bits=np.linspace(0.2, 0.9, 8), roi_error=0.01)
    rows = rows.assign(top1_a=[1, 1, 1, 0, 0, 0, 0, 0], top1_a2=0, top1_b=[0, 1, 1, 1, 1, 1, 0, 1])
    rows = rows.assign(top1_c=[1, 0, 0, 1, 0, 1, 0, 0], found_d=[0, 0, 0, 0, 1, 1, 0, 0])
    times = {"encode_ms": [9, 3, 9, 5, 9, 4] + [math.nan] * 2, "decode_ms": [9, 30, 9, 50, 9, 99] + [math.nan] * 2}
    return rows.assign(background_error=np.arange(1, 9) / 100, **times).assign(**columns)


def test_columns_of_the_table() -> None:
    """Scenes of unseen objects count in columns of their own, and in no other."""
    table = summarise(results(), pixels=64**2)
    (row,), known = table.to_dict("records"), slice(1, None, 2)
    expected = {"method": "SLIM", "variant": "", "quality": 0.2, "scenes": 4, "bpp": 8 * 64 / 4096}
    expected |= {"payload_bpp": 8 * 54 / 4096, "header_bytes": 10, "caption_bytes": 4, "hyper_bytes": 9}
    expected["latent_bytes"] = 34
    expected["roi_bits"] = np.average(np.linspace(0.2, 0.9, 8)[known], weights=np.arange(30, 38)[known])
    known, unseen = {"top1_a": 1, "top1_a2": 0, "top1_b": 4, "top1_c": 2, "found_d": 1}, (2, 0, 2, 1, 1)
    for name, hits in (known | {f"{name}_unseen": n for name, n in zip(known, unseen, strict=True)}).items():
        low, high = interval(np.arange(4) < hits)
        expected |= {name: 25 * hits, f"{name}_low": low, f"{name}_high": high}
    expected |= {"roi_psnr": 20, "background_psnr": -10 * math.log10(0.05), "encode_ms": 4, "decode_ms": 50}
    assert row == pytest.approx(expected)
    assert judged(table).tolist() == [75] and judged(table.drop(columns="top1_c")).tolist() == [100]


def test_the_columns_are_those_that_are_shipped() -> None:
    assert list(summarise(results())) == list(read_table(evaluation.RESULTS / "evaluation.csv"))


def test_intervals_count_cutouts_not_scenes(tmp_path: Path) -> None:
    """Tables of earlier editions do not say which cut-out a scene shows; rows of both may come together."""
    some = [results(scene=range(8 * i, 8 * i + 8), top1_b=i % 3 > 0, seen=True) for i in range(12)]
    many = pd.concat(some, ignore_index=True)
    cutouts = [f"a thing {i // 8}" for i in range(96)]
    ends = {}
    for name, table in {"scenes": many, "cut-outs": many.assign(cutout=cutouts)}.items():
        table.to_csv(tmp_path / "scenes.csv", index=False)
        (row,) = summarise(read_table(tmp_path / "scenes.csv")).to_dict("records")
        ends[name] = row["top1_b_low"], row["top1_b_high"]
    assert ends["scenes"] == interval(many.top1_b) and ends["cut-outs"] == interval(many.top1_b, cutouts)
    assert np.diff(ends["cut-outs"]) > 2 * np.diff(ends["scenes"])
    mixed = many.assign(cutout=[None] * 48 + cutouts[48:])
    low = summarise(mixed).top1_b_low[0]
    assert low == interval(many.top1_b, [str(i) for i in range(48)] + cutouts[48:])[0]


def test_what_a_method_has_not_is_empty(tmp_path: Path) -> None:
    nothing = dict.fromkeys(SPENT, math.nan)
    table = summarise(results(**nothing, seen=True, roi_error=0.0))
    empty = ["bpp", "header_bytes", "roi_bits", "encode_ms", "top1_b_unseen", "found_d_unseen_low"]
    assert table[empty].isna().all(axis=None)
    other = summarise(results(seen=False)).iloc[0]
    assert other.scenes == 8 and other.top1_b == other.top1_b_unseen == 75, "where nobody has seen any, all count"
    assert table.roi_psnr[0] == 100, "a limit, not infinity"
    text = table.to_csv(index=False, float_format="%.6g")
    (tmp_path / "table.csv").write_text(text)
    assert read_table(tmp_path / "table.csv").to_csv(index=False, float_format="%.6g") == text and ",nan" not in text


def test_ablations_come_with_the_method_on_their_scenes() -> None:
    hits = np.arange(8) < 4
    ablations = [results(variant="K = 1", top1_b=hits)[:5], results(variant="no caption")[:4]]
    others = [results(method="uncompressed", variant=variant) for variant in ("VAE", "")]
    table = summarise(pd.concat([results(top1_b=hits), *ablations, *others]))
    assert len(table) == 6 and table.iloc[-1][["method", "variant"]].tolist() == ["SLIM", evaluation.AS_IT_IS]
    assert table.iloc[-1][["scenes", "top1_b"]].tolist() == [2, 100] and table.top1_b[0] == 50


def test_all_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair that the goals speak of; each machine; a classic codec at the best of its scales, payload alone."""

    def curve(name: str, factor: float, variant: str = "", points: int = 4) -> pd.DataFrame:
        rows = pd.DataFrame({"quality": np.repeat(range(points), 100), "scene": np.tile(range(100), points)})
        right, size = rows.scene / (rows.quality + 1), factor * 2.0**rows.quality
        return rows.assign(
            method=name, variant=variant, size=size, payload=size / 2, top1_a=right < 15, top1_b=right < 20, seen=True
        )

    monkeypatch.setattr(evaluation, "compare", functools.partial(compare, draws=2))
    slim = ["SLIM", "SLIM, stage 1", "SLIM, uniform weights", "SLIM, joint"]
    parts = [curve(name, 10 * (i + 1)) for i, name in enumerate([*slim, "hyperprior", "hyperprior, machine loss"])]
    parts += [curve("SLIM", 5, "no caption"), curve("SLIM", 1, "caption only", points=1), curve("uncompressed", 1)]
    parts += [curve("JPEG", 80), curve("JPEG", 40, "1/2"), curve("WebP", 40, "1/4"), curve("label only", 1, points=1)]
    parts += [curve("SLIM", 1).assign(seen=False, scene=-1, top1_b=False)]  # unseen objects have no part in it
    found = evaluation.all_comparisons(pd.concat(parts))
    deltas = {machine: of.set_index(["anchor", "test"]).bd_rate for machine, of in found.groupby("machine", sort=False)}
    assert list(deltas) == ["b", "a"] and list(found)[:4] == ["anchor", "test", "machine", "scenes"]
    expected = {("SLIM, stage 1", "SLIM"): -50, ("SLIM, uniform weights", "SLIM"): -100 * 2 / 3}
    expected |= {("SLIM, joint", "SLIM"): -75, ("hyperprior", "SLIM"): -80}
    expected |= {("hyperprior, machine loss", "SLIM"): -100 * 5 / 6, ("JPEG", "SLIM"): -75, ("WebP", "SLIM"): -75}
    expected |= {("best classic, payload", "SLIM"): -50, ("SLIM, uniform weights", "SLIM, stage 1"): -100 / 3}
    expected |= {("hyperprior", "hyperprior, machine loss"): 20, ("SLIM", "SLIM (no caption)"): -50}
    expected |= {("hyperprior", "SLIM (no caption)"): -90, ("best classic, payload", "SLIM (no caption)"): -75}
    assert deltas["b"].to_dict() == pytest.approx(expected, abs=0.01)
    assert found.to_accuracy[found.machine == "a"].eq(60).all() and found.to_accuracy[found.machine == "b"].eq(80).all()
    assert len(evaluation.all_comparisons(curve("JPEG", 1))) == 0


# ---- methods


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tiny_world, tmp_path_factory.mktemp("evaluation") / "world")


@pytest.fixture(scope="module")
def codec(world: Path) -> SlimCodec:
    return SlimCodec.from_pretrained(world, "cpu", exact=False)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(make_scenes(5), range(5))


def says(caption: Callable) -> SimpleNamespace:
    """A captioner that is sure of its words."""
    return SimpleNamespace(caption=caption, describe=lambda crops: [(text, 1.0) for text in caption(crops)], floor=0.5)


def test_files_are_the_codecs_own(codec: SlimCodec, batch: Batch) -> None:
    x_hat, spent = methods.slim("SLIM", codec, timed=2).run(batch, "", 0.6)
    streams = [codec.compress(image, 0.6) for image in batch.images]
    reports = [codec.inspect(stream) for stream in streams]
    assert spent["size"].tolist() == [len(stream) for stream in streams]
    assert spent.payload.tolist() == [len(unpack(stream)[1]) for stream in streams]
    for part in ("caption", "hyper", "latent"):
        assert spent[part].tolist() == pytest.approx([report.bits[part] / 8 for report in reports])
    inside = [report.bit_map * scene.mask(4, 4) for report, scene in zip(reports, batch.scenes, strict=True)]
    shares = [part.sum() / report.bit_map.sum() for part, report in zip(inside, reports, strict=True)]
    assert spent.roi_bits.tolist() == pytest.approx(shares) and 0.05 < min(shares) and max(shares) < 0.6
    decoded = to_tensor([codec.decompress(stream) for stream in streams])
    assert (x_hat - decoded).abs().mean() < 1 / 255 and torch.equal(255 * x_hat, (255 * x_hat).round())


def test_what_each_ablation_changes(codec: SlimCodec, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the decoder is given, for every variant; words are told apart by the label that a fake captioner says."""
    calls: list[dict[str, Any]] = []

    def enhance(z: Tensor, captions: list[str], t0: int, steps: int, seed: Any, guidance: float) -> Any:
        calls.append({"z": z, "captions": captions, "t0": t0, "steps": steps, "seed": list(seed), "guidance": guidance})
        return iter([z])

    cams = [codec.look(image, codec.encode(image), 0.4)[0] for image in batch.images]
    words = {i.crop(object_box(m)).tobytes(): f"a {w}" for i, m, w in zip(batch.images, cams, WORDS, strict=True)}
    exact = {roi_crop(i, m).tobytes(): "the" for i, m in zip(batch.images, batch.mattes, strict=True)}
    captioner = says(lambda crops: [(words | exact)[crop.tobytes()] for crop in crops])
    monkeypatch.setitem(vars(codec), "captioner", captioner)  # as if loaded
    monkeypatch.setattr(codec.ldm, "enhance", enhance)
    methods.captions_of.cache_clear()
    methods.files_of.cache_clear()
    walk, sizes = codec.compressor.config.walk(0.4), {}
    z_hat = torch.cat([codec.read(codec.compress(image, 0.4)).z_hat for image in batch.images])
    method = methods.slim("SLIM", codec, (0.4, 0.8), VARIANTS, timed=0)
    assert method.settings == [(name, q) for name in VARIANTS for q in (0.4, 0.8)][:-2] + [("caption only", 0.0)]
    for variant in VARIANTS:
        sizes[variant] = method.run(batch, variant, 0.4)[1]["size"].tolist()
    right = [f"a {word}" for word in WORDS]
    usual = {"captions": right, "seed": [0] * 5, **walk._asdict()}
    changes: dict[str, dict] = {"no caption": {"captions": [""] * 5}, "oracle crop": {"captions": ["the"] * 5}}
    changes["wrong caption"] = {"captions": right[1:] + right[:1]}
    changes |= {"no diffusion": {"steps": 0}, "K = 1": {"steps": 1}, "K = 2": {"steps": 2}, "K = 20": {"steps": 20}}
    changes |= {f"t0 = {t0}": {"t0": t0} for t0 in (20, 50, 100, 200)}
    changes |= {f"seed = {seed}": {"seed": [seed] * 5} for seed in (1, 2)}
    changes["caption only"] = {"t0": 999, "steps": 20, "guidance": 4.0, "seed": [1, 2, 3, 4, 5]}
    changes["caption only"]["captions"] = [f"a photo of {caption}" for caption in right]
    for variant, call in zip(VARIANTS, calls, strict=True):
        z = call.pop("z")
        assert call == usual | changes.get(variant, {}), variant
        assert torch.equal(z, z_hat) if variant != "caption only" else not z.any()
        same = "caption" not in variant and variant != "oracle crop"
        assert not same or sizes[variant] == sizes[""], "the file is the same"
    assert sum(sizes["caption only"]) < sum(sizes["no caption"]) < sum(sizes[""])


WORDS = ("red fox", "banana", "violin", "lion", "tulip")


def test_a_wrong_caption_is_of_another_class(codec: SlimCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(labels: list[int]) -> list[str]:
        batch = Batch(make_scenes(len(labels)), range(len(labels)))
        batch.labels = torch.tensor(labels)
        saying = (f"{i} of {label}" for i, label in enumerate(labels))
        captioner = says(lambda crops: [next(saying) for _ in crops])
        monkeypatch.setitem(vars(codec), "captioner", captioner)  # as if loaded
        return methods.captions_of(batch, codec, "wrong", 0.4)

    assert wrong([3, 3, 1, 1, 2]) == ["2 of 1", "2 of 1", "4 of 2", "4 of 2", "0 of 3"]
    assert wrong([3, 3]) == ["", ""]
    scenes = [replace(scene, label=label) for scene, label in zip(make_scenes(4), (0, 2, 2, 1), strict=True)]
    monkeypatch.setitem(vars(codec), "captioner", says(lambda crops: ["a thing"] * len(crops)))
    seen: list = []
    for indices, other in (([1, 2], 3), ([3], 0), ([0], 1)):
        batch = Batch(scenes, indices)
        monkeypatch.setattr(methods, "Batch", lambda some, own: seen.append(own) or Batch(some, own))
        assert methods.captions_of(batch, codec, "wrong", 0.4) == ["a thing"] * len(indices) and seen.pop() == [other]


def test_the_caption_alone(codec: SlimCodec, batch: Batch) -> None:
    method = methods.slim("SLIM", codec, (0.4,), ("caption only",))
    x_hat, spent = method.run(batch, "caption only", 0.0)
    alone, _ = method.run(Batch(batch.scenes, [3]), "caption only", 0.0)
    torch.testing.assert_close(alone, x_hat[3:4], atol=2 / 255, rtol=0, msg="a scene's own seed, in any batch")
    codec.ldm.unet.register_to_config(sample_size=2 * (own := codec.ldm.unet.config.sample_size))
    larger, _ = method.run(batch, "caption only", 0.0)
    codec.ldm.unet.register_to_config(sample_size=own)
    assert larger.shape == x_hat.shape and not torch.equal(larger, x_hat), "at the model's own size, then made small"
    captions = methods.captions_of(batch, codec, "auto", 0.0)
    bits = [codec.inspect(codec.compress(*pair)).bits for pair in zip(batch.images, [0.4] * 5, captions, strict=True)]
    assert spent.caption.tolist() == pytest.approx([bit["caption"] / 8 for bit in bits])
    assert (spent["size"] - spent.payload).eq(7).all() and spent.latent.eq(0).all() and spent.hyper.eq(0).all()
    assert ((spent.payload - spent.caption) > -1).all() and ((spent.payload - spent.caption) < 5).all()


def test_words_show_nothing(codec: SlimCodec, world: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class as an index; or the class that one reads in the caption, as a whole word, or else the nearest."""
    machine = load_machine(str(world / "machine_a"), "cpu")
    saying = iter(said := ["a red fox", "a lion in a forest", "", "a redfox", "a tulip"])
    monkeypatch.setitem(vars(codec), "captioner", says(lambda crops: [next(saying) for _ in crops]))
    methods.captions_of.cache_clear()
    methods.files_of.cache_clear()
    label, caption = (methods.words(name, codec, machine).run(batch, "", 0.0) for name in evaluation.WORDS)
    assert label[1].answer.tolist() == machine(batch.x).argmax(1).tolist() and label[1].payload.eq(1).all()
    embedded = torch.nn.functional.normalize(codec.ldm.text([said[3], *machine.classes]).mean(1), dim=1)
    nearest = int((embedded[1:] @ embedded[0]).argmax())
    assert caption[1].answer.tolist() == [0, 3, -1, nearest, 4] and caption[1].latent.eq(0).all()
    assert caption[1].caption.tolist() == pytest.approx([codec.prior.bits(w) / 8 if w else 0 for w in said], abs=0.1)
    assert all((told["size"] - told.payload).eq(FIXED_BYTES).all() for _, told in (label, caption))


def test_the_codec_on_pixels(batch: Batch) -> None:
    codec = PixelCodec.from_pretrained(ASSETS / "pocket" / "baseline_mse")
    method = methods.pixels("hyperprior", codec, (0.2, 0.7))
    x_hat, spent = method.run(batch, "", 0.7)
    assert method.settings == [("", 0.2), ("", 0.7)] and list(spent) == SPENT
    for i, scene in enumerate(batch.scenes):
        data, bits = codec.encode(scene.image, 0.7)
        inside = (bits["y"].sum(0).numpy() * scene.mask(4, 4)).sum() / float(bits["y"].sum())
        expected = [len(data), len(unpack(data)[1]), 0, float(bits["h"].sum()) / 8, float(bits["y"].sum()) / 8, inside]
        assert spent.loc[i, SPENT[:6]].tolist() == pytest.approx(expected)
        assert torch.equal(x_hat[i : i + 1], to_tensor(codec.decompress(data)))
    assert (spent[TIMES] > 0).all(axis=None)


def test_classic_codecs(batch: Batch) -> None:
    method = methods.classic("webp", (20, 60))
    assert method.settings == [(v, q) for v in ("", "1/2", "1/4") for q in (20, 60)] and method.name == "WebP"
    for variant, scale in (("", 1), ("1/4", 0.25)):
        x_hat, spent = method.run(batch, variant, 60)
        files = [encode_classic(downscale(image, scale), "webp", 60) for image in batch.images]
        assert spent["size"].tolist() == [len(file) for file in files]
        assert spent.payload.tolist() == [payload_bytes(file, "webp") for file in files]
        assert not {*SPENT[2:6]} & {*spent} and (spent[TIMES] > 0).all(axis=None)
        assert torch.equal(x_hat, to_tensor([decode_classic(file, (64, 64)) for file in files]))
    some, most = methods.classic("webp", (20,), timed=2).run(batch, "", 20), method.run(batch, "", 20)
    assert torch.equal(some[0], most[0]) and some[1]["size"].equals(most[1]["size"])
    assert some[1][TIMES].notna().sum().tolist() == [2, 2]


def test_each_side_has_its_time(codec: SlimCodec, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = itertools.cycle((1.0, 2.0))

    def clocked(function: Any, *arguments: Any) -> tuple[Any, float]:
        own = getattr(function, "__self__", None)
        assert own is None or own.exact, "one picture on one thread"
        return function(*arguments), next(turns)

    monkeypatch.setattr(methods, "clocked", clocked)
    for method, taken in ((methods.slim("SLIM", codec, timed=2), 2), (methods.classic("webp"), 5)):
        times = method.run(batch, "", 0.6)[1][TIMES]
        assert times[:taken].eq([1, 2]).all(axis=None) and times[taken:].isna().all(axis=None)
    later = Batch(make_scenes(6), [4, 5])
    assert not {*TIMES} & {*methods.slim("SLIM", codec, timed=2).run(later, "", 0.6)[1]} and not codec.exact


def test_ceilings(codec: SlimCodec, batch: Batch) -> None:
    method = methods.ceiling(codec)
    (same, nothing), (vae, _) = (method.run(batch, *setting) for setting in method.settings)
    assert torch.equal(same, batch.x) and not len(nothing.columns)
    assert torch.equal(vae, to_tensor(to_images(codec.ldm.decode(codec.ldm.encode(batch.x)))))


def test_times_come_with_what_they_are_compared_to(codec: SlimCodec) -> None:
    table = methods.measure_times(codec, make_scenes(2), repeats=2)
    times = table.set_index("what")["value"]
    for side, count in (("encode", 4), ("decode", 5)):
        parts = [value for what, value in times.items() if what.startswith(f"{side}: ")]
        assert len(parts) == count + 2 and parts[-2] == pytest.approx(sum(parts[:-2])) and min(parts) > 0
        assert times[f"{side}: against these"] == pytest.approx(times[side] / parts[-2])
    assert table.unit.tolist() == ["ms"] * 11 + ["ms", "times"] * 2 + ["MB"]
    assert times["peak memory of the process"] > 100 and codec.exact is False and torch.get_num_threads() >= 1


# ---- runs


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    scenes, settings = marked(9), [("", 0.2), ("", 0.8)]

    def run(count: int, stop_after: int = 10**9, batch: int = 3, eyes: dict = EYES) -> tuple[list, pd.DataFrame]:
        fake, found = Fake(settings, stop_after=stop_after), pd.DataFrame()
        with contextlib.suppress(KeyboardInterrupt):
            found = evaluate(scenes, [(fake.method, count)], eyes, tmp_path, False, batch)
        return fake.ran, found

    ran, _ = run(6, stop_after=3)
    assert [(scenes[0], quality) for scenes, _, quality in ran] == [(0, 0.2), (0, 0.8), (3, 0.2)]
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.csv")}
    assert files == {"fake-key/000000+3.csv", "fake-key/000003+3.csv"}
    ran, found = run(6)
    assert ran == [([3, 4, 5], "", 0.8)], "only what was missing"
    whole = evaluate(scenes, [(Fake(settings).method, 6)], EYES, progress=False, batch=3)
    pd.testing.assert_frame_equal(found, whole)
    assert run(6)[0] == [] and run(4)[0] == [] and len(run(4)[1]) == 8
    old = (tmp_path / "fake-key/000000+3.csv").stat().st_mtime_ns
    assert [indices for indices, _, _ in run(8)[0]] == [[6, 7]] * 2, "a larger number goes on where the smaller ended"
    assert [indices for indices, _, _ in run(9)[0]] == [[6, 7, 8]] * 2, "a block is the work of one batch"
    assert (tmp_path / "fake-key/000000+3.csv").stat().st_mtime_ns == old
    with pytest.raises(ValueError, match="10 scenes were asked for, and there are 9"):
        run(10)
    assert len(run(9, batch=5)[0]) == 4, "what depends on the batch is not mixed"
    three = {**EYES, "c": Eye(0)}
    assert len(run(9, 1, eyes=three)[0] + run(9, eyes=three)[0]) == 6, "another machine has to look, stopped or not"
    two = [(Fake(settings).method, 6), (Fake([("other", 0.0)]).method, 3), (Fake([("", 1.0)], "Fake, 2").method, 2)]
    found = evaluate(scenes, two, EYES, tmp_path, False, 3)
    assert found.groupby(["method", "variant"], sort=False).size().tolist() == [12, 3, 2]


SCRIPT = """
import sys
from test_evaluation import EYES, evaluate, marked, shared_jobs
evaluate(marked(12), shared_jobs(0.3), EYES, sys.argv[1], False, 2)
"""


def shared_jobs(pause: float) -> list[tuple[Method, int]]:
    """Of the second of two processes: blocks 1, 3 and 5 of one method, block 1 of the other."""
    settings = [("", 0.2), ("", 0.8), ("other", 0.0)]
    return [(Fake(settings, name, pause=pause).method, count) for name, count in (("one", 12), ("two", 5))]


def test_two_processes_share_the_work_and_one_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command goes on, and what comes out is what one process finds."""
    store, run = tmp_path / "store", [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    paths = os.pathsep.join([str(Path(__file__).parent), str(ASSETS / "paper"), os.environ.get("PYTHONPATH", "")])
    for name, value in {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    both = [subprocess.Popen(run, env={**os.environ, "RANK": str(rank)}) for rank in (0, 1)]
    deadline, done = time.monotonic() + 240, []
    while not done and both[1].poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        done = [path for path in store.glob("one-key/*.csv") if int(path.name[:6]) // 2 % 2]
    both[1].send_signal(signal.SIGKILL)
    assert both[1].wait() == -signal.SIGKILL and done, "killed in the middle, with something measured"
    assert both[0].wait(timeout=240) == 0
    kept = {path: set(path.read_text().splitlines()) for path in store.rglob("*.csv")}

    def go_on(store: Path | None, rank: str) -> pd.DataFrame:
        monkeypatch.setenv("RANK", rank)
        return evaluate(marked(12), shared_jobs(0.001), EYES, store, False, 2)

    mine = go_on(store, "0")
    assert {index // 2 % 2 for index in mine.scene[mine.scene > 3]} == {0} and len(mine) < (12 + 5) * 3
    merged, alone = go_on(store, "1"), go_on(None, "1")
    for path, lines in kept.items():  # with their times, which would differ if anything had been measured again
        assert lines <= set(path.read_text().splitlines())
    assert len(alone) == (12 + 5) * 3
    pd.testing.assert_frame_equal(merged.drop(columns=TIMES), alone.drop(columns=TIMES))


def test_other_weights_have_another_key(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    key = weights_key(one)
    assert key == weights_key(two) and len(key) == 8 and key != weights_key(one, data="other pictures")
    (two / "card.json").write_text("figures")
    (two / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/config-checkpoint.json", "._config.json", "._model.safetensors"):
        (two / name).write_text("what others leave")
    assert key == weights_key(two), "a card is no weight, nor is what is hidden"
    (two / "model.safetensors").write_bytes(b"-")
    assert key != weights_key(two) and weights_key("hub/name@1") != weights_key("hub/name@2")


def test_other_sizes_and_repeated_qualities(world: Path) -> None:
    """PocketScenes exist at every size: results of one are not taken for those of another."""
    scale, keys = Scale.from_name(world), {}
    for size in (64, 96, 128):
        options = Options(only=["WebP", "SLIM, stage 1"], qualities=[0.5, 0.2, 0.5], scenes=2, device="cpu")
        jobs = all_jobs(options, replace(scale, size=size), PocketScenes("test", size), None)
        assert {tuple(m.settings) for m, _ in jobs if m.codec} == {(("", 0.5), ("", 0.2))}
        keys[size] = {method.key for method, _ in jobs}
    assert len(set.union(*keys.values())) == 6


# ---- the command, on a stand-in of the paper's scale


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    models = str(Path(open_world(tmp_path_factory).ldm).parent)
    data = make_imagenet(tmp_path_factory.mktemp("imagenet") / "val", 8, (0, 1, 2)).parent
    return SimpleNamespace(models=models, data=str(data))


def test_the_command(place: SimpleNamespace, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "compare", functools.partial(compare, draws=2))
    monkeypatch.setattr(methods, "measure_times", functools.partial(methods.measure_times, repeats=1))
    out, few = tmp_path / "out", {"qualities": [0.0, 0.3, 0.6], "only": ["SLIM, stage 1", "WebP"]}
    common = {"scale": place.models, "data": place.data, "work": tmp_path / "work", "batch": 2, "device": "cpu"}
    options = Options(**common, **few, scenes=4, variants=["no diffusion"], ablation_scenes=2, out=out, quiet=True)
    assert evaluation.command(options) == 0
    shown = capsys.readouterr().out
    assert "no diffusion" in shown and "top1_b" in shown and "uncompressed" not in shown
    tables = {name: read_table(out / f"{name}.csv") for name in ("evaluation", "comparisons", "times")}
    by_scene = read_table(out / "scenes.csv.gz")
    counts = by_scene.groupby(["method", "variant"], sort=False).scene.nunique().reset_index().to_numpy().tolist()
    assert counts[:2] == [["SLIM, stage 1", "no diffusion", 2], ["SLIM, stage 1", "", 4]]
    assert counts[2:] == [["WebP", variant, 4] for variant in ("", "1/2", "1/4")]
    again = summarise(by_scene, 128**2)
    pd.testing.assert_frame_equal(again, tables["evaluation"], rtol=1e-5, check_dtype=False)
    assert "best classic, payload" in set(tables["comparisons"].anchor) and "encode" in set(tables["times"].what)
    facts = json.loads((out / "evaluation.json").read_text())
    assert facts["protocol"] == "crop" and facts["size"] == 128 and set(facts["weights"]) == {"SLIM, stage 1", "WebP"}
    written = {path: path.read_bytes() for path in (tmp_path / "work").rglob("*.csv")}
    home = tmp_path / "work" / f"cpu-torch-{torch.__version__.partition('+')[0]}"  # another device rounds otherwise
    assert written and all(path.is_relative_to(home) for path in written)
    assert (out / "scenes.csv.gz").read_bytes()[4:8] == bytes(4), "no time: the same results make the same file"
    options.scenes, options.out = 6, None
    with monkeypatch.context() as patch:  # one process may run classic codecs, while another one has the GPU
        patch.setattr(methods, "open_codec", None)
        options.only = ["WebP"]
        evaluation.command(options)
        assert "SLIM" not in capsys.readouterr().out
    classic = {path: path.read_bytes() for path in home.glob("webp-*/*.csv")}
    options.only = few["only"]
    evaluation.command(options)
    assert len(classic) == 3 and all(path.read_bytes() == data for path, data in classic.items())
    assert all(path.read_bytes() == data for path, data in written.items()), "nothing is measured twice"
    assert " 6 " in capsys.readouterr().out


def test_an_unreadable_picture_among_many(
    place: SimpleNamespace, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    shutil.copytree(place.data, tmp_path / "data")
    monkeypatch.setattr(evaluation, "compare", functools.partial(compare, draws=2))
    bad = Pictures.open(str(tmp_path / "data"), "validation", "", 8).samples[3].path
    bad.write_bytes(bad.read_bytes()[:300])
    rest: dict = {"only": ["WebP"], "batch": 3, "device": "cpu", "quiet": True, "work": tmp_path / "work"}
    options = Options(scale=place.models, data=str(tmp_path / "data"), scenes=8, out=tmp_path / "out", **rest)
    for _ in range(2):
        assert evaluation.command(options) == 0
        assert "1 pictures cannot be read, and are left out" in capsys.readouterr().out
        assert json.loads((tmp_path / "out/evaluation.json").read_text())["unreadable"] == 1
        assert read_table(tmp_path / "out/evaluation.csv").scenes.eq(7).all()
    (listed,) = (tmp_path / "work").glob("unreadable-*.txt")
    assert listed.read_text().startswith("3 ") and bad.name in listed.read_text()


@pytest.mark.parametrize("place", ["--out FILE", "--out FILE/tables", "--work FILE", "--out CLOSED/tables"])
def test_where_nothing_can_be_written_is_said_at_once(
    place: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before models are loaded, and hours are spent."""
    monkeypatch.setattr(methods, "open_machines", None)
    (tmp_path / "FILE").write_text("mine")
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "CLOSED" and may(path, mode))
    (tmp_path / "CLOSED").mkdir()
    option, name = place.split()
    assert main(["evaluate", option, str(tmp_path / name), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path / Path(name).parts[0]} is no folder that may be written in: name another one in --out" in said
    assert (tmp_path / "FILE").read_text() == "mine"


def test_damaged_results_are_named(tmp_path: Path) -> None:
    """Written by others, or cut by a disk: no traceback, and a word on what to do."""
    jobs = [(Fake([("", 0.2)]).method, 3)]
    whole = evaluate(marked(3), jobs, EYES, tmp_path, False, 3)
    (path,) = tmp_path.rglob("*.csv")
    for damaged in (b"", b"\0" * 99, b"scene\n1\n"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000000\+3\.csv does not hold results \(delete it"):
            evaluate(marked(3), jobs, EYES, tmp_path, False, 3)
    whole.drop(columns="seen").to_csv(path, index=False)  # of an older version: it is measured again
    again = evaluate(marked(3), jobs, EYES, tmp_path, False, 3)
    pd.testing.assert_frame_equal(whole.drop(columns=TIMES), again.drop(columns=TIMES))


def test_machines_that_count_otherwise_are_refused(world: Path, tmp_path: Path) -> None:
    """The labels of one would be wrong for another, and its accuracy a matter of chance."""
    shutil.copytree(world, tmp_path / "world")
    path = tmp_path / "world/machine_b/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"label_names": config["label_names"][::-1]}))
    with pytest.raises(ValueError, match="do not count the same classes in one order: .*machine_b"):
        methods.open_machines(Scale.from_name(tmp_path / "world"), "cpu")


@pytest.mark.parametrize("side", [64, 112])
def test_bits_inside_of_a_picture_that_is_padded(codec: SlimCodec, side: int) -> None:
    """Cells are 16 pixels wide, whatever the side; those beyond it are coded, too, and show its edge."""
    matte = np.zeros((side, side), np.float32)
    matte[:, :40] = matte[-20:] = 1
    scene = Scene(picture(side, side), matte, 0, "", "", True)
    padded = np.pad(matte, (0, 128 - side), "edge")[: -(-side // 32) * 32, : -(-side // 32) * 32]
    bit_map = np.random.default_rng(0).random((len(padded) // 16,) * 2)
    share = (np.kron(bit_map, np.ones((16, 16))) * padded).sum() / 16**2 / bit_map.sum()
    assert methods._inside(bit_map, scene, codec) == pytest.approx(share, rel=1e-6)
    x_hat, spent = methods.slim("SLIM", codec, timed=0).run(Batch([scene], [0]), "", 0.5)
    stream = codec.compress(scene.image, 0.5)
    report = codec.inspect(stream)
    assert report.bit_map.shape == bit_map.shape and x_hat.shape == (1, 3, side, side)
    assert spent.roi_bits[0] == pytest.approx(methods._inside(report.bit_map, scene, codec))
    assert (x_hat - to_tensor(codec.decompress(stream))).abs().mean() < 1 / 255


def test_imagenet_is_not_for_machines_of_the_pocket(place: SimpleNamespace, tmp_path: Path, capsys: Any) -> None:
    """The scale that holds where nobody names one: its classes are others."""
    for words in ("evaluate --work", "preprocess --scale pocket --split validation --out"):
        assert main([*words.split(), str(tmp_path / "x"), "--data", place.data, "--device", "cpu"]) == 1
        assert f"machines of scale 'pocket' know PocketScenes, not {place.data}" in capsys.readouterr().err
    assert not (tmp_path / "x/about.json").exists()


def test_a_process_without_work_of_its_own_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More processes than blocks; torchrun would end all with the one that fails."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "5")
    assert len(evaluate(marked(4), [(Fake([("", 0.2)]).method, 4)], EYES, tmp_path, False, 2)) == 0


def test_a_process_that_is_not_the_last(place: SimpleNamespace, tmp_path: Path, capsys, monkeypatch) -> None:
    rest = {"only": ["WebP"], "batch": 2, "device": "cpu", "quiet": True, "work": tmp_path / "work"}
    options = Options(scale=place.models, data=place.data, scenes=4, out=tmp_path / "out", **rest)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "other processes are still at work"), ("1", "WebP")):
        monkeypatch.setenv("RANK", rank)
        evaluation.command(options)
        assert said in capsys.readouterr().out and (tmp_path / "out").exists() == (rank == "1")


def test_jobs_that_take_part(place: SimpleNamespace) -> None:
    scale = Scale.from_name(place.models)
    scenes = ImageNetScenes(Pictures.from_folder(f"{place.data}/val"), "crop", 128)

    def jobs(given: Any = scenes, **options: Any) -> list[tuple[Method, int]]:
        return all_jobs(Options(device="cpu", **options), scale, given, None)

    names = [(method.name, count, len(method.settings)) for method, count in jobs(scenes=7)]
    classic = [(name, 7, 15) for name in ("JPEG", "WebP", "AVIF", "JPEG XL", "JPEG 2000")]
    words = [("label only", 7, 1), ("caption read", 7, 1)]
    assert names == [("uncompressed", 7, 2), *words, ("SLIM, stage 1", 7, 6), *classic]
    ablations = jobs(scenes=7, ablation_scenes=3, only=["SLIM, stage 1"])
    assert [(count, len(method.settings)) for method, count in ablations] == [(3, 13 * 6 + 1), (7, 6)]
    assert [count for _, count in jobs(reproduce=True, only=["SLIM, stage 1"])] == [390, 1300]
    for another in ("compressor_seed1", "compressor_seed1.training"):
        shutil.copytree(f"{place.models}/compressor", f"{place.models}/{another}")
    assert [(m.name, n) for m, n in jobs(ablation_scenes=3, only=["SLIM, seed1"])] == [("SLIM, seed1", 3)]
    for another in ("compressor_seed1", "compressor_seed1.training"):
        shutil.rmtree(f"{place.models}/{another}")
    others = ImageNetScenes(scenes.pictures, "squash", 128)
    keys = [jobs(given, bf16=bf16)[3][0].key for given in (scenes, others, []) for bf16 in (False, True)]
    assert len(set(keys)) == 6, "other pictures, another precision"
    with pytest.raises(ValueError, match="no nonsense, nothing; of methods there are: .*JPEG.*variants: all, no"):
        jobs(only=["nonsense"], variants=["nothing"])
    for published in (False, True):  # ImageNet's preprocessing is for ImageNet alone
        machines = methods.open_machines(scale, "cpu", published)
        assert list(machines) == ["a", "b"]
        assert all(isinstance(machine, AsPublished) == published for machine in machines.values())


def test_codecs_share_their_parts(codec: SlimCodec, world: Path) -> None:
    first = methods.open_codec(world, "SLIM, stage 1", device="cpu")
    other = methods.open_codec(world, "SLIM, stage 1", first)
    assert other.ldm is first.ldm and other.captioner is first.captioner and other.compressor is not first.compressor
    assert other.fingerprint == first.fingerprint == codec.fingerprint


# ---- quick looks


class Known(nn.Module):
    """A compressor of latents (N, 2, 4, 8) with known errors, bits and map: left half, right half."""

    device, config = torch.device("cpu"), SimpleNamespace(stages=2, factor=4)

    def forward(self, z: Tensor, quality: float) -> dict[str, Any]:
        left, one = torch.arange(8) < 4, torch.ones(len(z), 1, 1, 1)
        likelihoods = {"y": one * torch.tensor([2.0**-3, 2.0**-1]), "h": one * 2.0 ** -(2 + quality)}
        logits = torch.where(torch.arange(8) < 5, 1.0, -1.0) * torch.ones(len(z), 1, 4, 1)  # a column too many
        return {"z_hat": z + torch.where(left, 1, 2), "likelihoods": likelihoods, "roi_logits": logits}


def test_latents_by_region() -> None:
    masks = np.zeros((5, 1, 4, 8), np.uint8)
    masks[..., :4] = 255
    z = np.random.default_rng(0).normal(size=(5, 2, 4, 8))
    low, high = evaluate_latents(Known(), z.astype(np.float16), masks, (0.0, 1.0), batch=2)
    expected = {"quality": 0, "bpp": (3 + 1 + 2) / (4 * 8 * 16), "roi_mse": 1, "background_mse": 4, "roi_bits": 3 / 4}
    assert low == pytest.approx(expected | {"roi_area": 0.5, "roi_iou": 4 / 5}, rel=1e-3)
    assert high["quality"] == 1 and high["bpp"] == pytest.approx((3 + 1 + 3) / (4 * 8 * 16))
    assert evaluate_latents(Known(), torch.from_numpy(z), torch.from_numpy(masks / 255), (0.0,))[0] == pytest.approx(
        low, rel=1e-3
    )


def test_pictures_of_latents_are_made_as_the_codec_makes_them(codec: SlimCodec) -> None:
    z = np.random.default_rng(0).normal(size=(5, 4, 16, 16)).astype(np.float32)
    captions, labels = [f"a {word}" for word in WORDS], np.arange(5)
    model, ldm, walk = codec.compressor, codec.ldm, codec.compressor.config.walk(1.0)
    shown: list[Tensor] = []

    def machine(x: Tensor) -> Tensor:
        shown.append(x)
        return torch.eye(6)[[0, 1, 0][: len(x)]]  # of the batches (0, 1, 2) and (3, 4): right for 0 and 1

    machines: dict[str, Callable] = {"A": machine}
    (row,) = evaluate_latents(model, z, np.ones((5, 1, 16, 16)), (1.0,), 3, (ldm, machines, captions, labels))
    assert row["A"] == pytest.approx(40) and not model.training
    with torch.no_grad():
        z_hat = model(torch.from_numpy(z), 1.0)["z_hat"]
        steps = ldm.enhance(z_hat, captions, walk.t0, walk.steps, range(5), walk.guidance)
        assert torch.allclose(torch.cat(shown), ldm.decode(last(steps, z_hat)), atol=1e-4)
