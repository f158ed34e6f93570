"""The explorer without a browser: settings, pictures, answers in stages, the worker, and the widgets moved by code."""

from __future__ import annotations

import datetime
import functools
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from tiny_codec import TINY, make_world, picture

from slimlib.compressor import LatentCompressor
from slimlib.explorer import serve
from slimlib.explorer.engine import Curves, Explorer, Settings, bits_picture, error_picture, largest_within, roi_picture
from slimlib.explorer.page import BUDGET, EXPLORE, Newest, Page
from slimlib.stream import StreamError


@pytest.fixture(scope="module")
def models(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    """Of a world with two sets of weights, "stage 1" and "uniform"."""
    world = make_world(tiny_world, tmp_path_factory.mktemp("explorer") / "world")
    shutil.copytree(world / "compressor", world / "compressor_uniform")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        LatentCompressor(replace(TINY, gain_max=8.0)).save_pretrained(world / "compressor_uniform")
    return Explorer(world)


@pytest.fixture(scope="module")
def page(models: Explorer) -> Page:
    return Page(models, query="")


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


# ---- settings, links, code


def test_a_link_carries_all_settings() -> None:
    settings = Settings(7, 0.25, 3, 120, "uniform", "a réd fox & <b>", 4_000_000_000)
    assert Settings(**Settings.named(settings.query())) == settings
    assert Settings.named(Settings(caption=None).query())["caption"] == ""
    assert Settings.named("quality=0.1") == {"quality": 0.1}


WRONG = "quality=2 quality=nan quality=-1 seed=-1 seed=4294967296 steps=21 steps=x t0=1000 colour=red scene=1e3"


@pytest.mark.parametrize("query", WRONG.split())
def test_a_wrong_link_is_refused(query: str) -> None:
    with pytest.raises(ValueError, match="the link"):
        Settings.named(query)


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


def test_within_a_budget(models: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = SimpleNamespace(decompress=lambda data: Image.new("RGB", (9, len(data))))
    toy.compress = lambda image, quality: bytes(round(255 * quality) * 5)
    monkeypatch.setattr(models, "pixel_codecs", {"hyperprior": toy})
    photo = models.photo(file_of(picture(48, 32)), "small.png")
    found = {each.name: each for each in models.budget(Settings(), 701, photo)}
    assert list(found) == ["SLIM, stage 1", "hyperprior", "JPEG", "WebP", "AVIF", "JPEG XL", "JPEG 2000"]
    assert all(each.size <= 701 and each.fits for each in found.values())
    assert found["hyperprior"].image.size == (9, 700)
    tight = next(models.rivals(photo, 60))
    assert not tight.fits and tight.size > 60, "a JPEG cannot be that small, and that is said"
    sizes = [next(models.rivals(models.scene(5), size, ["webp"])) for size in (100, 400)]  # shrunk, and as it is
    errors = [np.square(levels(each.image) - levels(models.scene(5).image)).mean() for each in sizes]
    assert errors[1] < errors[0] and all(each.fits for each in sizes)


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


def test_a_file_has_its_place_on_the_curves() -> None:
    points = [("SLIM", "", 0.1, 90), ("SLIM", "", 0.01, 20), ("SLIM", "no caption", 1, 50), ("SLIM, LoRA", "", 1, 50)]
    curves = Curves(pandas.DataFrame(points, columns=["method", "variant", "bpp", "top1_b"]))
    assert Image.open(io.BytesIO(curves.png)).size == (744, 472)
    left, low, middle, high = (curves.place("SLIM", bpp) for bpp in (0.0001, 0.01, 10**-1.5, 0.1))
    assert 0 < left[0] < low[0] < middle[0] < high[0] < 1 and high[1] < middle[1] < low[1] == left[1]
    assert [place[2] for place in (left, low, middle, high)] == pytest.approx([20, 20, 55, 90])
    assert middle[0] == pytest.approx((low[0] + high[0]) / 2), "rates are on a logarithmic axis"
    pixels = levels(Image.open(io.BytesIO(curves.png)).convert("RGB"))
    colour = pixels[round(low[1] * 472), round(low[0] * 744)]
    assert np.ptp(colour) > 30, "there the picture has a mark of the curve, not white"
    assert curves.place("SLIM, LoRA", 0.1) is None


# ---- photographs


def test_photographs_are_bounded_and_upright(models: Explorer) -> None:
    image, exif = picture(600, 400), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned = models.photo(file_of(image, "JPEG", exif=exif), "a.jpg").image
    assert turned.size == (171, 256)
    assert np.abs(levels(turned) - levels(image.transpose(Image.Transpose.ROTATE_270).resize(turned.size))).mean() < 4
    photo = models.photo(file_of(image), "a.png")
    assert photo.image.size == (256, 171) and photo.note == "600 x 400 pixels, explored at 256 x 171"
    for odd in (Image.new("RGBA", (9, 300), (255, 0, 0, 9)), Image.new("I;16", (3, 2)), Image.new("1", (1, 1))):
        photo = models.photo(file_of(odd), "odd.png")
        view = list(models.look(Settings(), photo))[-1]
        assert photo.image.mode == "RGB" and view.pictures["after"].size == photo.image.size
    assert photo.note == "1 x 1 pixels" and len(list(models.rivals(photo, view.report.size))) == 3


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


# ---- the widgets, moved by code


def upload(control: Any, name: str, data: bytes) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    file = {"name": name, "type": "", "size": len(data), "content": memoryview(data), "last_modified": now}
    control.value = (file,)


def faded(page: Page) -> bool:
    return any("slim-old" in figure._dom_classes for figure in (page.figures | page.rivals | page.budgeted).values())


def test_the_first_page_is_complete_at_once(page: Page) -> None:
    assert all(len(figure.value) > 400 for figure in (page.figures | page.rivals).values()), "no picture is missing"
    assert all("bytes" in figure.value for figure in page.rivals.values()) and not faded(page)
    assert f"same {page.view.report.size} bytes" in page.within.value and set(page.answered) == {"before", "after"}
    assert "43: a red fox" in page.figures["original"].value and "white: object" in page.figures["original"].value
    assert [("slim-on" in thumb._dom_classes) for thumb in page.thumbs] == [True] + [False] * 11
    for name, guesses in page.view.guesses.items():
        for machine, ((first, _), *_) in guesses.items():
            mark = "✓" if first == page.view.source.truth else "✗"
            assert f"{machine}: <span" in page.figures[name].value and f"{mark} {first}" in page.figures[name].value
    assert page.top5.value.count("<td>") == 30 and "%</span>" in page.top5.value and "–" not in page.top5.value


def test_every_control_changes_the_page(page: Page) -> None:
    moves = [("quality", 0.9), ("steps", 2), ("seed", 3), ("caption", "none"), ("scene", 14), ("weights", "uniform")]
    for name, value in moves:
        before = page.figures["after"].value, page.summary.value
        getattr(page, name).value = value
        assert page.wait() and (page.figures["after"].value, page.summary.value) != before, name
    assert page.settings == Settings(14, 0.9, 2, None, "uniform", "", 3) == page.view.settings
    assert f"{page.view.report.size} bytes" in page.summary.value and not faded(page)
    assert page.t0.disabled and page.t0.value == page.view.report.t0
    page.auto_t0.value = False
    page.t0.value = 300
    assert page.wait() and page.view.report.t0 == 300 and not page.t0.disabled


def test_words_typed_by_hand_are_sent_and_shown_as_text(page: Page) -> None:
    page.words.value = "a <b>banana</b>"
    assert page.wait() and page.caption.value == "typed" and page.view.report.caption == "a <b>banana</b>"
    everything = page.summary.value + page.share.value + page.top5.value
    assert "<b>banana" not in everything and "&lt;b&gt;banana" in page.summary.value
    page.words.value = "x" * 300
    assert page.wait() and "200" in page.message.value and not faded(page), "the last answer stays"
    page.caption.value = "automatic"
    assert page.wait() and page.words.value == page.view.report.caption and "200" not in page.message.value


def test_uploads_good_and_bad(page: Page) -> None:
    upload(page.camera, "mine.png", file_of(picture(100, 60)))
    assert page.wait() and "100 x 60" in page.message.value and page.view.report.width == 100
    assert "white: object" not in page.figures["original"].value and "mine.png_q" in page.share.value
    upload(page.camera, "<i>words</i>.png", b"words")
    assert page.wait() and "&lt;i&gt;words&lt;/i&gt;.png cannot be opened" in page.message.value
    assert page.view.report.width == 100 and page.camera.value == ()
    page.quality.value = 0.33
    assert page.wait() and page.view.source is page.photo
    page.thumbs[0].click()
    assert page.wait() and page.view.report.width == 128 and page.photo is None and page.scene.value == 43


def test_save_and_open_again(page: Page) -> None:
    stream, after = page.view.stream, page.view.pictures["after"]
    upload(page.opener, "saved.slim", stream)
    assert page.wait() and page.view.source is None and page.view.pictures["after"].tobytes() == after.tobytes()
    assert "opened_q" in page.share.value and "code" not in page.share.value and not faded(page)
    upload(page.opener, "cut.slim", stream[:-1])
    assert page.wait() and "check sum" in page.message.value
    page.thumbs[1].click()
    assert page.wait() and page.view.source is not None


def test_the_budget_tab(page: Page) -> None:
    page.tab.value = BUDGET
    page.size.value = 300
    assert page.wait() and all("bytes" in figure.value for name, figure in page.budgeted.items() if name != "Original")
    assert "A: " in page.budgeted["Original"].value and "needs" in page.budgeted["AVIF"].value
    assert page._explore.layout.display == "none" != page._budget.layout.display and page.quality.disabled
    page.tab.value = EXPLORE
    assert page.wait() and page._explore.layout.display != "none" and not page.quality.disabled and not faded(page)


def test_reset_and_links(page: Page, models: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    page.quality.value, page.seed.value = 0.77, 12
    page._reset()
    assert page.wait() and replace(page.settings, steps=None) == Settings() and "link to" not in page.share.value
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5")
    monkeypatch.setenv("QUERY_STRING", "quality=0.25&steps=1&t0=100&caption=a+lion&scene=9")
    linked = Page(models)
    assert linked.settings == Settings(9, 0.25, 1, 100, "stage 1", "a lion", 0) == linked.view.settings
    assert "?scene=9&amp;quality=0.25" in linked.share.value
    for query, message in (("weights=stage+9", "not here"), ("scene=999999", "scene"), ("t0=-1", "the link")):
        wrong = Page(models, query=query)
        assert message in wrong.message.value and wrong.view.done and wrong.settings.scene == 43


# ---- the server


def test_the_server_needs_no_torch() -> None:
    code = "import sys, slimlib.explorer.serve; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_command(models: Explorer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    calls = []
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is taken away again in the end
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(serve, "serve", lambda *given: calls.append((given, os.environ.get("OMP_WAIT_POLICY"))))
    assert serve.command(serve.Options(port=1234, browser=False)) == 0
    assert calls == [((1234, False), "passive")]
    monkeypatch.setattr("slimlib.explorer.page.Page", functools.partial(Page, models, ""))
    assert serve.command(serve.Options(benchmark=True, moves=2)) == 0 and len(calls) == 1
    said = capsys.readouterr().out
    assert said.startswith("2 moves") and "finished picture: median" in said
