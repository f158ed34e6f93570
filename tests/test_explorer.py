"""The explorer without a browser: settings, pictures, answers in stages, the worker, and the widgets moved by code."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pandas
import psutil
import pytest
import time_explorer
import torch
from PIL import Image
from tiny_codec import TINY, make_world, picture

from slimlib.__main__ import main
from slimlib.compressor import LatentCompressor
from slimlib.explorer import engine, serve
from slimlib.explorer.engine import Explorer, Settings, bits_picture, curves_of, roi_picture
from slimlib.explorer.page import PHOTO, Newest, Page
from slimlib.measure.baselines import CODECS, encode_classic, largest_within
from slimlib.measure.evaluation import RESULTS, read_table
from slimlib.measure.plots import error_picture
from slimlib.roi import object_box
from slimlib.stream import StreamError


@pytest.fixture(scope="module")
def models(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    """Of a world with two sets of weights, "stage 1" and "uniform"."""
    world = make_world(tiny_world, tmp_path_factory.mktemp("explorer") / "world")
    for name, copied in (("compressor", "compressor_uniform"), ("machine_b", "machine_c")):
        shutil.copytree(world / name, world / copied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LatentCompressor(replace(TINY, gain_max=8.0)).save_pretrained(world / "compressor_uniform")
    return Explorer(world)


@pytest.fixture(scope="module")
def page(models: Explorer) -> Page:
    page = Page(models)
    assert page.wait()
    return page


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


# ---- code


@pytest.mark.parametrize("photo", [False, True])
@pytest.mark.parametrize("settings", [Settings(quality=0.3), Settings(3, 0.8, 2, 77, "uniform", "A Tulip", 5)])
def test_the_lines_of_code_make_the_very_same_file(
    models: Explorer, settings: Settings, photo: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, names = file_of(picture(300, 200), "JPEG"), {}
    Path("it's mine.jpg").write_bytes(data)
    source = models.photo(data, "it's mine.jpg") if photo else None
    exec(models.code(settings, source), names)
    assert names["stream"] == models.compress(settings, source)


# ---- answers


def test_an_answer_comes_in_stages_and_ends_as_the_codec_decodes(models: Explorer) -> None:
    views = list(models.look(Settings(scene=3, quality=0.4, steps=3, t0=200, seed=9)))
    codec, stream, last = models.codec("stage 1"), views[0].stream, views[-1]
    assert [view.step for view in views] == [0, 1, 2, 3, 3] and [view.done for view in views] == [False] * 4 + [True]
    assert stream == codec.compress(models.scene(3).image, 0.4, "auto", steps=3, t0=200, seed=9)
    assert set(views[0].pictures) == {"original", "bits", "before"}
    assert set(last.pictures) == {"original", "bits", "before", "after", "error"}
    for name, steps in (("before", 0), ("after", None)):
        exact = codec.decompress(stream, steps=steps)
        assert np.abs(levels(last.pictures[name]) - levels(exact)).max() <= 1  # floats: batches of two, and threads
        for machine, top in models.guess(last.pictures[name]).items():
            assert last.guesses[name][machine] == top and len(top) == 5
    assert last.pictures["error"] == error_picture(models.scene(3).image, last.pictures["after"])
    image = models.scene(3).image
    assert views[0].box == object_box(codec.look(image, codec.encode(image), last.report.quality)[0]), "of this quality"


@pytest.mark.parametrize("off", [{"t0": 0}, {"steps": 0}])
def test_without_repair_both_pictures_are_one(models: Explorer, off: dict) -> None:
    views = list(models.look(Settings(**off)))
    assert len(views) == 2 and views[-1].pictures["after"] is views[-1].pictures["before"]


@pytest.mark.parametrize("weights", ["stage 1", "uniform"])
def test_a_stream_from_a_file_is_decoded_by_its_own_weights(models: Explorer, weights: str) -> None:
    view = list(models.look(Settings(weights=weights)))[-1]
    opened = list(models.open_stream(view.stream))[-1]
    assert opened.source is None and opened.settings.weights == weights and "original" not in opened.pictures
    assert opened.pictures["after"].tobytes() == view.pictures["after"].tobytes()
    for damaged in (b"", b"abc", view.stream[:-2], view.stream[:9] + b"x" + view.stream[10:]):
        with pytest.raises(StreamError):
            list(models.open_stream(damaged))


def test_weights_share_one_diffusion_model_and_a_picture_is_encoded_once(
    models: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ldm, calls = models.codec("stage 1").ldm, []
    assert models.codec("uniform").ldm is ldm and models.codec("stage 1").exact
    encode = ldm.vae.encode
    monkeypatch.setattr(ldm.vae, "encode", lambda x: calls.append(1) or encode(x))
    files = [models.compress(Settings(scene, quality)) for scene, quality in ((8, 0.2), (8, 0.6), (9, 0.2), (8, 0.2))]
    assert len(calls) == 3 and files[0] == files[3] != files[2]


def test_within_so_many_bytes(models: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = SimpleNamespace(decompress=lambda data: Image.new("RGB", (9, len(data))))
    toy.compress = lambda image, quality: bytes(round(255 * quality) * 5)
    monkeypatch.setattr(models, "pixel_codecs", {"hyperprior": toy})
    photo = models.photo(file_of(picture(48, 32)), "small.png")
    found = {each.name: each for each in models.rivals(photo, 701, ("hyperprior", *CODECS))}
    assert list(found) == ["hyperprior", "JPEG", "WebP", "AVIF", "JPEG XL", "JPEG 2000"]
    assert all(each.size <= 701 and each.fits for each in found.values())
    assert found["hyperprior"].image.size == (9, 700)
    tight = next(models.rivals(photo, 60))
    assert not tight.fits and tight.size > 60, "a JPEG cannot be that small, and that is said"
    sizes = [next(models.rivals(models.scene(5), size, ["webp"])) for size in (100, 400)]  # shrunk, and as it is
    errors = [np.square(levels(each.image) - levels(models.scene(5).image)).mean() for each in sizes]
    assert errors[1] < errors[0] and all(each.fits for each in sizes)
    smallest, largest = (len(models.compress(Settings(quality=quality))) for quality in (0, 1))
    size = (smallest + largest) // 2
    stream = models.compress(Settings(size=size))
    quality = models.codec("stage 1").inspect(stream).quality
    assert len(stream) <= size < len(models.compress(Settings(quality=quality + 1 / 255)))
    assert len(models.compress(Settings(size=1))) == smallest


@pytest.mark.parametrize("codec", CODECS)
def test_classic_codecs_are_given_bare_pixels(models: Explorer, codec: str) -> None:
    """What else an uploaded file says (a colour profile, a comment, where it was taken) would be written along."""
    image, exif = picture(64, 48), Image.Exif()
    exif[0x010E] = "a comment " * 300
    burdened = file_of(image, "PNG", icc_profile=b"profile" * 700, exif=exif)
    assert len(burdened) > 7000
    bare, photo = models.photo(file_of(image), "a.png"), models.photo(burdened, "b.png")
    assert encode_classic(photo.image, codec, 50) == encode_classic(bare.image, codec, 50)
    assert encode_classic(Image.open(io.BytesIO(burdened)), codec, 50) == encode_classic(image, codec, 50)


def test_bisection_finds_the_largest_that_fits() -> None:
    for size in range(12):
        data = largest_within(lambda step: bytes(2 + step // 3), 20, size)
        assert len(data) == max(2, min(size, 8))


# ---- pictures


def test_where_the_bits_went() -> None:
    image, bits = picture(40, 24), np.zeros((2, 4))
    bits[0, 1] = 9
    shown = levels(bits_picture(image, bits, 16)).sum(2)
    assert shown.shape == (24, 40)
    grey = levels(image.convert("L"))
    assert np.abs(shown[16:] - 3 * 0.45 * grey[16:]).max() <= 6, "no bits: the picture, darker"
    assert (shown[:16, 16:32] - 3 * 0.45 * grey[:16, 16:32]).min() > 200, "the most bits: bright"


def test_the_error_is_black_where_there_is_none_and_white_from_a_quarter_on() -> None:
    pixels = Image.fromarray(np.array([[[100] * 3, [100] * 3, [100] * 3]], np.uint8))
    other = Image.fromarray(np.array([[[100] * 3, [132, 100, 100], [20] * 3]], np.uint8))
    assert levels(error_picture(pixels, other))[0, :, 0].tolist() == [0, round(255 * 32 / 3 / 255 / 0.25), 255]


def test_box_and_outline_leave_the_rest_alone() -> None:
    image, matte = picture(64, 64), np.zeros((64, 64))
    matte[20:40, 20:40] = 1
    plain = levels(image.resize((128, 128), Image.Resampling.BICUBIC))
    boxed, drawn = (levels(roi_picture(image, (10, 5, 60, 50), m)) for m in (None, matte))
    assert (drawn[10, 20:120] == (230, 159, 0)).all() and (drawn[10:100, 119] == (230, 159, 0)).all()
    outline = (drawn != boxed).any(2)
    assert (drawn[60, 80:90] == [[255] * 3] + [[0] * 3] * 2 + plain[60, 83:90].tolist()).all()
    assert outline[34:86, 34:86].any() and not outline[42:78, 42:78].any() and not outline[90:].any()
    assert (boxed[14:90, 24:110] == plain[14:90, 24:110]).all()


def test_curves_are_those_of_the_plain_methods_by_rate() -> None:
    points = [("SLIM", "", 0.1, 90), ("SLIM", "", 0.01, 20), ("SLIM", "no caption", 1, 50), ("SLIM, joint", "", 1, 50)]
    curves = curves_of(pandas.DataFrame(points, columns=["method", "variant", "bpp", "top1_b"]))
    assert list(curves) == ["SLIM"] and curves["SLIM"].bpp.tolist() == [0.01, 0.1]


def test_curves_and_lines_are_the_evaluations(models: Explorer) -> None:
    known, table = models.constants(), read_table(RESULTS / "evaluation.csv")
    assert {"SLIM", "SLIM, stage 1", "hyperprior", "JPEG", "WebP", "AVIF"} <= known["curves"].keys()
    assert list(known["lines"]) == ["label only", "caption read", "caption only"]
    row = table[(table.method == "SLIM") & (table.variant == "caption only")].iloc[0]
    assert known["lines"]["caption only"] == pytest.approx((row.top1_b + row.top1_c) / 2)


# ---- photographs


def test_photographs_are_bounded_and_upright(models: Explorer) -> None:
    image, exif = picture(600, 400), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned = models.photo(file_of(image, "JPEG", exif=exif), "a.jpg").image
    assert turned.size == (171, 256)
    assert np.abs(levels(turned) - levels(image.transpose(Image.Transpose.ROTATE_270).resize(turned.size))).mean() < 4
    photo = models.photo(file_of(image), "a.png")
    assert photo.image.size == (256, 171) and photo.note == "explored at 256 x 171 pixels"
    for odd in (Image.new("RGBA", (9, 300), (255, 0, 0, 9)), Image.new("I;16", (3, 2)), Image.new("1", (1, 1))):
        photo = models.photo(file_of(odd), "odd.png")
        view = list(models.look(Settings(), photo))[-1]
        assert photo.image.mode == "RGB" and view.pictures["after"].size == photo.image.size
    assert photo.note == "explored at 1 x 1 pixels" and len(list(models.rivals(photo, view.report.size))) == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"just words\n", "words.png cannot be opened: it is not a picture"),
        (b"", "not a picture"),
        (file_of(picture())[:200], "truncated"),
        (b"P5 20000 20000 255\n", "exceeds limit"),
        (b"P5 11000 11000 255\n", "more than the limit of 100000000"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_photograph_is_refused_in_words(models: Explorer, data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        models.photo(data, "words.png")


# ---- the worker


@pytest.mark.parametrize("already", [[], ["first"]])
def test_the_newest_job_wins_and_of_an_old_one_only_its_first_result_is_shown(already: list[str]) -> None:
    seen: list[tuple[int, Any]] = []
    started, go = threading.Event(), threading.Event()
    worker = Newest(lambda number, result: seen.append((number, result)))

    def slow() -> Iterator[str]:
        yield from already
        started.set()
        go.wait(10)
        yield "first" if not already else "late"
        yield "later"

    worker.submit(slow)
    assert started.wait(10)
    worker.submit(lambda: iter(["never begun"]))
    assert worker.submit(lambda: iter(["a", "b"])) == worker.newest == 3
    assert not worker.wait(0.01)
    go.set()
    assert worker.wait(10)
    assert seen == [(1, "first"), (3, "a"), (3, "b")]
    assert worker.apart(threading.get_ident) == worker.apart(threading.get_ident) != threading.get_ident()


def test_a_job_that_fails_tells_and_the_next_one_runs() -> None:
    seen: list[Any] = []
    worker = Newest(lambda number, result: seen.append(result))

    def bad() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    for job in (bad, lambda: iter([2])):
        worker.submit(job)
        assert worker.wait(10)
    assert seen[0] == 1 and isinstance(seen[1], ValueError) and seen[2] == 2


def test_what_a_job_interrupted_goes_on_where_it_fails_at_once() -> None:
    """To the end, and nothing of it is lost, also if it had not begun; but not if the newer one said something."""
    seen: list[tuple[int, Any]] = []
    started, go = threading.Event(), threading.Event()
    worker = Newest(lambda number, result: seen.append((number, result)))

    def slow() -> Iterator[int]:
        yield 1
        started.set()
        go.wait(10)
        yield from (2, 3)

    def bad(said: int = 0) -> Iterator[int]:
        yield from range(said)
        raise ValueError("no")

    worker.submit(slow)
    assert started.wait(10)
    worker.submit(bad)
    go.set()
    assert worker.wait(10)
    assert [str(result) for _, result in seen] == ["1", "no", "2", "3"] and {number for number, _ in seen[1:]} == {2}
    for said, expected in ((0, ["no", "7"]), (1, ["0", "no"])):
        seen.clear(), go.clear()
        worker.submit(lambda: iter([go.wait(10)] * 0))
        worker.submit(lambda: iter([7]))
        worker.submit(lambda said=said: bad(said))
        go.set()
        assert worker.wait(10) and [str(result) for _, result in seen] == expected


# ---- the widgets, moved by code


def upload(control: Any, name: str, data: bytes) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    file = {"name": name, "type": "", "size": len(data), "content": memoryview(data), "last_modified": now}
    control.value = (file,)


def table(page: Page) -> dict[str, Any]:
    return {row["name"]: row for row in page.facts.shown["rows"]}


def move(page: Page, **values: Any) -> None:
    """As a hand would; and wait for the answer."""
    for name, value in values.items():
        page.controls[name].value = value
    assert page.wait()


def test_the_first_page_is_complete_at_once(page: Page) -> None:
    rows = table(page)
    assert list(rows) == ["original", "before the UNet", "SLIM", "JPEG", "WebP", "AVIF"]
    assert all(set(row["seen"]) == {"A", "B", "C"} for row in rows.values()) and not page.picture.doing
    assert rows["SLIM"]["bytes"] == page.view.report.size and set(page.answered) == {"before", "after"}
    for name, guesses in (("original", page.view.source.guesses), ("SLIM", page.view.guesses["after"])):
        assert all(rows[name]["seen"][m][0] == top[0][0] for m, top in guesses.items())
    assert page.facts.shown["title"] == "a red fox" and page.facts.shown["truth"] == "fox"
    assert page.scenes.shown["on"] == 43 and len(page.scenes.shown["pictures"]) == 12
    assert page.picture.shown["left"]["name"] == "original" and page.picture.shown["right"]["name"] == "SLIM"
    assert sum(page.facts.shown["parts"].values()) == pytest.approx(page.view.report.size, abs=0.3)


def test_every_control_changes_the_page(page: Page) -> None:
    moves = [("size", 1024), ("seed", 3), ("caption", "none"), ("scene", 14), ("weights", "uniform")]
    for name, value in moves:
        before, address = page.picture.shown["right"], page.picture.query
        move(page, **{name: value})
        assert page.picture.shown["right"] != before and page.picture.query != address, name
    assert page.settings == Settings(14, 0.2, None, None, "uniform", "", 3, 1024) == page.view.settings
    assert f"{page.view.report.size} bytes" in page.facts.shown["summary"] and not page.picture.doing
    walk = {name: page.controls[name] for name in ("t0", "steps")}
    for name, control in walk.items():  # they follow the quality
        assert control.disabled and control.value == getattr(page.view.report, name) and name not in page.picture.query
    move(page, auto=False, t0=300, steps=2)
    assert (page.view.report.t0, page.view.report.steps) == (300, 2) and "&t0=300" in page.picture.query
    assert not any(control.disabled for control in walk.values()) and "steps=2" in page.picture.query


def test_what_stands_left_and_over_the_picture(page: Page) -> None:
    seen, names = set(), page.controls["left"].options
    for name in names:
        move(page, left=name)
        assert page.picture.shown["left"]["name"] == name
        seen.add(page.picture.shown["left"]["url"])
    assert len(seen) == len(names) == 6 and "left=AVIF" in page.picture.query
    move(page, over="error")
    assert page.picture.shown["over"]["url"] and page.picture.shown["left"]["name"] == "AVIF"
    page._pin(None)
    held = page.picture.shown["right"]
    move(page, size=24)
    assert page.picture.shown["left"] == held | {"name": "pinned"} != page.picture.shown["right"]
    assert table(page)["pinned"]["bytes"] == held["bytes"]
    move(page, scene=9)
    assert "pinned" not in table(page) and page.picture.shown["left"]["name"] == "original", "it was another picture"
    assert "left=original" in page.picture.query


def test_words_typed_by_hand_are_sent(page: Page) -> None:
    move(page, words="a <b>banana</b>")
    assert page.settings.caption == page.view.report.caption == "a <b>banana</b>"
    move(page, words="x" * 300)
    assert "200" in page.picture.said and not page.picture.doing, "the last answer stays"
    move(page, caption="automatic")
    assert page.controls["words"].value == page.view.report.caption and not page.picture.said


def test_uploads_good_and_bad(page: Page) -> None:
    address = page.picture.query
    upload(page.camera, "mine.png", file_of(picture(100, 60)))
    assert page.wait() and "100 x 60" in page.facts.shown["summary"] and page.view.report.width == 100
    assert PHOTO.format(6) in page.facts.shown["summary"] and page.facts.shown["bpp"] is None
    assert page.facts.shown["file"].startswith("mine.png_") and page.picture.query == address
    upload(page.camera, "words.png", b"words")
    assert page.wait() and "words.png cannot be opened" in page.picture.said
    assert page.view.report.width == 100 and page.camera.value == ()
    move(page, size=96)
    assert page.view.source is page.photo
    page._said(page.scenes, {"scene": 43}, [])
    assert page.wait() and page.view.report.width == 128 and page.photo is None and page.settings.scene == 43


@contextlib.contextmanager
def hurried(page: Page) -> Iterator[None]:
    """Several moves at once: the worker is busy meanwhile, and then answers."""
    go = threading.Event()
    page._worker.submit(lambda: iter([go.wait(10)] * 0))
    yield
    go.set()
    assert page.wait()


def test_a_photograph_is_not_lost_by_a_quick_move(page: Page) -> None:
    for name, value in (("size", 128), ("caption", "none")):
        page.follow("")
        with hurried(page):
            upload(page.camera, f"{name}.png", file_of(picture(60, 40, seed=len(name))))
            page.controls[name].value = value
        assert page.facts.shown["title"] == f"{name}.png" and page.view.settings == page.settings, "and the move counts"
        assert getattr(page.settings, name) == (value if name != "caption" else "")
    for leave in (lambda: page._said(page.scenes, {"scene": 43}, []), lambda: page.follow("scene=43")):
        with hurried(page):  # but who chooses a scene has changed their mind
            upload(page.camera, "late.png", file_of(picture(60, 40)))
            leave()
        assert page.facts.shown["title"] == "a red fox" and page.photo is None
        move(page, size=256)
        assert page.facts.shown["title"] == "a red fox"


BAD = {"camera": ("bad.png", b"words", "bad.png cannot be opened"), "opener": ("bad.slim", b"Sx", "stream is cut")}


@pytest.mark.parametrize("control", BAD)
def test_a_bad_upload_leaves_nothing_unfinished(page: Page, control: str) -> None:
    """What was asked just before is answered all the same, and the message stays."""
    name, data, said = BAD[control]
    page.follow("scene=9")
    assert page.wait()
    with hurried(page):
        upload(page.camera, "good.png", file_of(picture(60, 40)))
        upload(getattr(page, control), name, data)
    assert page.facts.shown["title"] == "good.png" and said in page.picture.said and not page.picture.doing
    page.follow("scene=9")
    with hurried(page):
        page.controls["size"].value = 128
        upload(getattr(page, control), name, data)
    assert page.view.settings.size == 128 and said in page.picture.said
    assert page.view.done and all(row["seen"] for row in page.facts.shown["rows"]), "no row waits for ever"
    with hurried(page):
        upload(getattr(page, control), name, data)
        page.controls["size"].value = 192
    assert page.view.settings == page.settings and page.settings.size == 192 and page.view.done
    move(page, over="error", left="WebP")
    assert control == "opener" or said in page.picture.said, "until there is another answer"


@pytest.mark.parametrize("chosen", ["pinned", "before the UNet"])
@pytest.mark.parametrize("other", ["photograph", "scene", "file"])
def test_a_pin_goes_with_its_picture(page: Page, other: str, chosen: str) -> None:
    """Controls, table, picture and address agree: it is no choice any more, nor in a link to what came after."""
    page.follow("")
    assert page.wait()
    codec = page.explorer.codec("stage 1")
    if other == "file":  # a pin of one file is none of another, of another size
        upload(page.opener, "a.slim", codec.compress(picture(40, 30), caption=None))
        assert page.wait()
    page._pin(None)
    page.controls["left"].value = chosen
    assert (page.settings.scene, f"left={chosen.split()[0]}" in page.picture.query) == (43, True)
    if other == "scene":
        page._said(page.scenes, {"scene": 9}, [])
    elif other == "file":
        upload(page.opener, "b.slim", codec.compress(picture(90, 30), caption=None))
    else:
        upload(page.camera, "a.png", file_of(picture(60, 40)))
    assert page.wait() and "pinned" not in page.controls["left"].options and "pinned" not in table(page)
    kept = "before the UNet" if chosen != "pinned" else "original"
    left = page.picture.shown["left"]
    assert page.controls["left"].value == kept and (left["name"] == kept if left else other == "file")
    assert "pinned" not in page.picture.query
    page.follow("left=pinned")
    assert "left=original" in page.picture.query


def test_a_pin_of_what_is_not_finished_is_finished_later(page: Page) -> None:
    page.follow("")
    assert page.wait()
    started, deliver = threading.Event(), page._deliver

    def pins(number: int, result: Any) -> None:
        deliver(number, result)
        if isinstance(result, engine.View) and not result.done and not started.is_set():
            started.set()
            page._pin(None)

    page._worker._deliver = pins
    try:
        move(page, size=512)
    finally:
        page._worker._deliver = page._post
    row, slim = table(page)["pinned"], table(page)["SLIM"]
    assert started.is_set() and row["seen"] and row == slim | {"name": "pinned"}


def test_an_imagenet_network_looks_at_photographs_alone(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = page.explorer.machines
    monkeypatch.setattr(page.explorer, "photo_machines", machines | {"T": machines["A"]})
    upload(page.camera, "mine.png", file_of(picture(90, 60)))
    assert page.wait() and "Machine T is an ImageNet network" in page.facts.shown["summary"]
    assert all(row["seen"].keys() == {*machines, "T"} for row in page.facts.shown["rows"])
    page._said(page.scenes, {"scene": 43}, [])
    assert page.wait() and all(row["seen"].keys() == {*machines} for row in page.facts.shown["rows"])
    assert page.explorer.constants()["machines"] == [*machines, "T"]


def test_the_imagenet_network_is_loaded_when_the_first_photograph_comes(
    models: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: "lite1" in name)
    monkeypatch.setattr(engine, "photo_machine", lambda device: loaded.append(device) or models.machines["A"])
    fresh = Explorer(models.folder)
    assert fresh.scene(43).guesses.keys() == {*"ABC"} and fresh.constants()["machines"] == [*"ABCT"] and not loaded
    for name in ("one.png", "two.png"):
        assert fresh.photo(file_of(picture()), name).guesses["T"] == models.machines["A"].top5(picture())
    assert len(loaded) == 1


def test_two_hundred_uploads_take_bounded_memory(models: Explorer) -> None:
    process, alive, used = psutil.Process(), weakref.WeakSet(), []
    for i in range(200):
        photo = models.photo(file_of(picture(16, 16, seed=i)), f"{i}.png")
        alive.add(photo)
        assert next(models.rivals(photo, 400, ["jpeg"])).fits and (i % 10 or models._trial(Settings(caption=""), photo))
        used.append(process.memory_info().rss / 2**20)
        assert len(alive) <= 2, "photographs that nobody looks at any more"
    assert used[-1] - used[99] < 20, f"MiB after 100 and 200 uploads: {used[99]:.0f}, {used[-1]:.0f}"


def test_save_and_open_again(page: Page) -> None:
    page.follow("scene=9&size=192&t0=77&auto=False&seed=5&caption=typed&words=a+lion&weights=uniform")
    assert page.wait()
    stream, after, report = page.view.stream, page.view.pictures["after"], page.view.report
    page.follow("scene=14")
    assert page.wait()
    upload(page.opener, "saved.slim", stream)
    assert page.wait() and page.view.source is None and page.view.pictures["after"].tobytes() == after.tobytes()
    shown = page.facts.shown
    assert (shown["title"], shown["code"], list(table(page))[:2]) == ("saved.slim", "", ["before the UNet", "SLIM"])
    read = page.settings
    assert (read.t0, read.seed, read.caption, read.weights) == (77, 5, "a lion", "uniform") and read.scene == 14
    free = [name for name, control in page.controls.items() if not control.disabled]
    assert free == ["size", "left", "over", "scene"], "how the file was made is read only"
    assert "A link does not hold the file" in shown["summary"] and read.size >= min(report.size, 1024)
    upload(page.opener, "cut.slim", stream[:-1])
    assert page.wait() and "check sum" in page.picture.said
    page.controls["over"].value = "where the bits went"
    assert page.facts.shown["title"] == "saved.slim", "what is still shown"
    move(page, seed=6)
    assert page.view.source is not None and page.view.report.t0 == report.t0, "about the scene again"
    assert not any(control.disabled for control in page.controls.values())


def test_files_of_any_length_and_any_number_of_steps(page: Page) -> None:
    codec = page.explorer.codec("stage 1")
    long = codec.compress(picture(40, 30), 0.5, None, steps=50, t0=300)
    upload(page.opener, "fifty.slim", long)
    assert page.wait() and page.settings.steps == page.view.report.steps == 50, "the control shows what the file says"
    upload(page.opener, "short.slim", codec.compress(picture(40, 30), 0.5, None, steps=2))
    assert page.wait() and page.settings.steps == 2 and page.view.source is None and not page.picture.doing
    for side, kind in ((1 << 14, "png"), ((1 << 14) - 1, "webp")):  # which holds 16383 pixels a side
        assert engine.data_url(Image.new("RGB", (side, 1))).startswith(f"data:image/{kind};base64,")


def test_links(page: Page, models: Explorer) -> None:
    page.follow("")
    assert page.wait() and page.settings == Settings(size=64)
    move(page, size=256, auto=False, steps=1, t0=100, words="a réd lion & <b>", scene=9, left="WebP", over="error")
    linked = Page(models, **dict(parse_qsl(page.picture.query)))
    assert linked.wait()
    assert linked.settings == page.settings == linked.view.settings and linked.picture.shown == page.picture.shown
    linked.follow("size=100&odd=1&left=odd&weights=stage+9&scene=x&caption=none")
    assert linked.wait() and linked.settings == Settings(size=64, caption="")
    for odd in ("auto=odd", "scene=99999", "scene=-1", "seed=-5", "seed=4294967296", "steps=1000&t0=-3", "t0=5000"):
        linked.follow(odd)
        assert linked.settings == Settings(size=64) and odd not in linked.picture.query, "what cannot be is left out"
    sent: list[Any] = []
    widget = SimpleNamespace(send=sent.append)
    page._said(widget, {"query": "scene=14"}, [])
    page._said(widget, {"beat": 1}, [])
    assert page.wait() and page.view.settings.scene == 14 and sent == [{"query": page.picture.query}, {}]


# ---- the server


def test_the_server_needs_no_torch() -> None:
    code = "import os, sys, slimlib.explorer.serve; assert 'torch' not in sys.modules and os.environ['OMP_WAIT_POLICY']"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_command(models: Explorer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    calls = []
    monkeypatch.setattr(serve, "serve", lambda *given: calls.append((given, os.environ.get("OMP_WAIT_POLICY"))))
    assert serve.command(serve.Options(port=1234, browser=False)) == 0
    assert calls[0][0] == (1234, False) and calls[0][1].lower() == "passive"
    time_explorer.main(2, Page(models))
    said = capsys.readouterr().out
    assert said.startswith("2 moves") and "finished picture: median" in said


def test_a_folder_is_refused_before_the_static_page_takes_its_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("slimlib.explorer.static.Explorer", None)
    assert main(["explore", "--static", str(tmp_path)]) == 1
    assert f"{tmp_path} is a folder; name the file to write" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--port 99999", "--port 0"])
def test_a_wrong_option_is_said_in_one_line(words: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main(["explore", *words.split()]))
    said = capsys.readouterr().err.strip()
    assert stopped.value.code and "is not a number from 1 to" in said.splitlines()[-1] and "Traceback" not in said
