"""The explorer without a browser: settings, pictures, answers in stages, the worker, and the widgets moved by code."""

from __future__ import annotations

import datetime
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_codec import make_world, picture

from slimlib import explorer
from slimlib.evaluation import Row
from slimlib.explorer import Explorer, Newest, Page, Settings, open_photo
from slimlib.explorer.engine import LONG_SIDE, Curves, bits_picture, error_picture, largest_within
from slimlib.stream import StreamError


@pytest.fixture(scope="module")
def world(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tiny_world, tmp_path_factory.mktemp("explorer") / "world")


@pytest.fixture(scope="module")
def models(world: Path) -> Explorer:
    return Explorer(world)


@pytest.fixture(scope="module")
def page(models: Explorer) -> Page:
    page = Page(models, query="")
    assert page.wait()
    return page


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


# ---- settings, links, code


def test_a_link_carries_all_settings() -> None:
    settings = Settings(7, 0.25, 3, 120, "uniform", "a réd fox & <b>", 4_000_000_000)
    assert Settings(**Settings.named(settings.query())) == settings
    assert Settings(**Settings.named(Settings(caption=None).query())) == Settings(caption=None)
    assert Settings.named("quality=0.1") == {"quality": 0.1}


@pytest.mark.parametrize("query", ["quality=2", "quality=nan", "seed=-1", "steps=x", "colour=red", "scene=1e3"])
def test_a_wrong_link_is_refused(query: str) -> None:
    with pytest.raises(ValueError, match="the link"):
        Settings.named(query)


@pytest.mark.parametrize("settings", [Settings(quality=0.3), Settings(3, 0.8, 2, 77, caption="A Tulip", seed=5)])
def test_the_lines_of_code_make_the_very_same_file(models: Explorer, settings: Settings) -> None:
    names: dict[str, Any] = {}
    exec(models.code(settings), names)
    assert names["stream"] == models.compress(settings)


def test_the_lines_of_code_for_a_photograph(models: Explorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = png(picture(300, 200), "JPEG")
    (tmp_path / "it's mine.jpg").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    photo, names = models.photo(data, "it's mine.jpg"), {}
    exec(models.code(Settings(), photo), names)
    assert names["stream"] == models.compress(Settings(), photo)


# ---- answers


def test_an_answer_comes_in_stages_and_ends_as_the_codec_decodes(models: Explorer) -> None:
    settings = Settings(scene=3, quality=0.4, steps=3, t0=200, seed=9)
    views = list(models.look(settings))
    codec, stream = models.codec("stage 1"), views[0].stream
    assert [view.step for view in views] == [0, 1, 2, 3, 3] and [view.done for view in views] == [False] * 4 + [True]
    assert stream == codec.compress(models.scene(3).image, 0.4, "auto", steps=3, t0=200, seed=9)
    for name, decoded in (("before", codec.decompress(stream, steps=0)), ("after", codec.decompress(stream))):
        shown = np.asarray(views[-1].pictures[name], int)
        assert np.abs(shown - np.asarray(decoded, int)).max() <= 1  # floats: batches of two, and threads
    assert set(views[-1].pictures) == {"original", "bits", "before", "after", "error"}
    assert set(views[-1].guesses["after"]) == {"A", "B"} and len(views[-1].guesses["after"]["B"]) == 5


@pytest.mark.parametrize("off", [{"t0": 0}, {"steps": 0}])
def test_without_repair_both_pictures_are_one(models: Explorer, off: dict) -> None:
    views = list(models.look(Settings(**off)))
    assert len(views) == 2 and views[-1].pictures["after"] is views[-1].pictures["before"]


def test_a_stream_from_a_file(models: Explorer) -> None:
    view = list(models.look(Settings()))[-1]
    opened = list(models.open_stream(view.stream))[-1]
    assert opened.source is None and "original" not in opened.pictures
    assert opened.pictures["after"].tobytes() == view.pictures["after"].tobytes()
    for damaged in (b"", b"abc", view.stream[:-2], view.stream[:9] + b"x" + view.stream[10:]):
        with pytest.raises(StreamError):
            list(models.open_stream(damaged))


def test_within_a_budget(models: Explorer) -> None:
    found = {each.name: each for each in models.budget(Settings(), 700)}
    assert list(found) == ["SLIM, stage 1", "JPEG", "WebP", "AVIF", "JPEG XL", "JPEG 2000"]
    assert all(each.size <= 700 and each.fits for each in found.values())
    tight = {each.name: each for each in models.budget(Settings(), 60)}
    assert not tight["JPEG"].fits and tight["JPEG"].size > 60, "a JPEG cannot be that small, and that is said"


def test_bisection_finds_the_largest_that_fits() -> None:
    for size in range(12):
        data = largest_within(lambda step: bytes(2 + step // 3), 20, size)
        assert len(data) == max(2, min(size, 8))


# ---- pictures


def test_pictures_of_bits_and_errors() -> None:
    image = picture(40, 24)
    bits = np.zeros((2, 4))
    bits[0, 1] = 9
    shown = np.asarray(bits_picture(image, bits, 16), int).sum(2)
    assert shown.shape == (24, 40) and shown[:16, 16:32].min() > shown[16:].max() - 255 * 3 * 0.45
    assert np.asarray(error_picture(image, image)).max() == 0
    assert np.asarray(error_picture(Image.new("RGB", (4, 4), "black"), Image.new("RGB", (4, 4), "white"))).min() == 255


def test_the_outline_leaves_the_rest_alone(models: Explorer) -> None:
    source = models.scene(14)
    drawn = np.asarray(list(models.look(Settings(14)))[0].pictures["original"], int)
    plain = np.asarray(source.image.resize((256, 256), Image.Resampling.BICUBIC), int)
    changed = (drawn != plain).any(2).mean()
    assert drawn.shape == (256, 256, 3) and 0.005 < changed < 0.2


def test_a_file_has_its_place_on_the_curves() -> None:
    numbers = dict.fromkeys(Row.__dataclass_fields__, 0.0)
    rows = [
        Row(**{**numbers, "method": method, "variant": "", "quality": q, "scenes": 1, "bpp": bpp, "top1_b": top})
        for method in ("SLIM", "JPEG")
        for q, bpp, top in ((0, 0.01, 20.0), (1, 0.1, 90.0))
    ]
    curves = Curves(rows)
    assert Image.open(io.BytesIO(curves.png)).size == (744, 472)
    left, low, high = (curves.place("SLIM", bpp) for bpp in (0.001, 0.01, 0.05))
    assert left[0] <= low[0] < high[0] < 1 and low[2] == 20 and high[1] < low[1]
    assert curves.place("SLIM, LoRA", 0.1) is None


# ---- photographs


def test_photographs_are_bounded_and_upright(models: Explorer, tmp_path: Path) -> None:
    image = picture(600, 400)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_photo(tmp_path / "a.jpg").size == (round(LONG_SIDE * 2 / 3), LONG_SIDE)
    photo = models.photo(png(image), "a.png")
    assert photo.image.size == (LONG_SIDE, 171) and photo.note == "600 x 400 pixels, explored at 256 x 171"
    for odd in (Image.new("RGBA", (9, 300), (255, 0, 0, 9)), Image.new("I;16", (3, 2)), Image.new("1", (5, 5))):
        assert models.photo(png(odd), "odd.png").image.mode == "RGB"


def test_one_pixel_is_a_photograph_too(models: Explorer) -> None:
    photo = models.photo(png(Image.new("RGB", (1, 1), "red")), "dot.png")
    view = list(models.look(Settings(), photo))[-1]
    assert view.pictures["after"].size == (1, 1) and (view.report.width, view.report.height) == (1, 1)
    assert len(list(models.rivals(photo, view.report.size))) == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"just words\n", "not a picture"),
        (b"", "not a picture"),
        (png(picture())[:200], "truncated"),
        (b"P5 20000 20000 255\n", "400 million pixels|more pixels"),
    ],
)
def test_what_is_no_photograph_is_refused_in_words(models: Explorer, data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        models.photo(data, "words.png")


# ---- the worker


def test_the_newest_job_wins_and_nothing_old_follows() -> None:
    seen: list[tuple[int, Any]] = []
    started, go = threading.Event(), threading.Event()
    worker = Newest(lambda number, result: seen.append((number, result)))

    def slow() -> Iterator[str]:
        yield "first"
        started.set()
        go.wait(10)
        yield "late"

    worker.submit(slow)
    assert started.wait(10)
    worker.submit(lambda: iter(["never begun"]))
    worker.submit(lambda: iter(["a", "b"]))
    assert not worker.wait(0.01)
    go.set()
    assert worker.wait(10)
    assert seen == [(1, "first"), (3, "a"), (3, "b")]


def test_a_job_that_fails_tells_and_the_next_one_runs() -> None:
    seen: list[Any] = []
    worker = Newest(lambda number, result: seen.append(result))

    def bad() -> Iterator[int]:
        yield 1
        raise ValueError("no")

    worker.submit(bad)
    assert worker.wait(10)
    worker.submit(lambda: iter([2]))
    assert worker.wait(10)
    assert seen[0] == 1 and isinstance(seen[1], ValueError) and seen[2] == 2


# ---- the widgets, moved by code


def shown(page: Page, name: str = "after") -> bytes:
    return page.figures[name].image.value


def test_every_control_changes_the_page(page: Page) -> None:
    page.quality.value = 0.2
    assert page.wait()
    before, summary = shown(page), page.summary.value
    for name, value in {"quality": 0.9, "steps": 2, "seed": 3, "caption": "none", "scene": 14}.items():
        getattr(page, name).value = value
        assert page.wait() and (shown(page), page.summary.value) != (before, summary), name
        before, summary = shown(page), page.summary.value
    assert f"{page.view.report.size} bytes" in summary and set(page.answered) == {"before", "after"}
    assert not any("slim-old" in figure._dom_classes for figure in (*page.figures.values(), *page.rivals.values()))
    page.auto_t0.value = False
    page.t0.value = 300
    assert page.wait() and page.view.report.t0 == 300 and not page.t0.disabled


def test_words_typed_by_hand_are_sent_and_shown_as_text(page: Page) -> None:
    page.words.value = "a <b>banana</b>"
    assert page.wait() and page.caption.value == "typed" and page.view.report.caption == "a <b>banana</b>"
    everything = page.summary.value + page.share.value + page.top5.value
    assert "<b>banana" not in everything and "&lt;b&gt;banana" in everything
    page.words.value = "x" * 300
    assert page.wait() and "200" in page.message.value
    page.caption.value = "automatic"
    assert page.wait() and page.words.value == page.view.report.caption and "200" not in page.message.value


def upload(control: Any, name: str, data: bytes) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    file = {"name": name, "type": "", "size": len(data), "content": memoryview(data), "last_modified": now}
    control.value = (file,)


def test_uploads_good_and_bad(page: Page) -> None:
    upload(page.camera, "mine.png", png(picture(100, 60)))
    assert page.wait() and "100 x 60" in page.message.value and page.view.report.width == 100
    upload(page.camera, "<i>words</i>.png", b"words")
    assert page.wait() and "&lt;i&gt;words&lt;/i&gt;.png is not a picture" in page.message.value
    assert page.view.report.width == 100 and page.camera.value == ()
    page.quality.value = 0.33
    assert page.wait() and page.view.source is page.photo
    page.thumbs[0].click()
    assert page.wait() and page.view.report.width == 128 and page.photo is None


def test_save_and_open_again(page: Page) -> None:
    stream, picture_shown = page.view.stream, shown(page)
    upload(page.opener, "saved.slim", stream)
    assert page.wait() and page.view.source is None and shown(page) == picture_shown
    upload(page.opener, "cut.slim", stream[:-1])
    assert page.wait() and "check sum" in page.message.value
    page.thumbs[1].click()
    assert page.wait() and page.view.source is not None


def test_the_budget_tab(page: Page) -> None:
    page.tab.value = page.tab.options[1]
    page.size.value = 900
    assert page.wait() and "bytes" in page.budgeted["JPEG"]._note.value and page.quality.disabled
    assert page._explore.layout.display == "none" and "A:" in page.original._note.value
    page.tab.value = page.tab.options[0]
    assert page.wait() and page._explore.layout.display != "none"


def test_the_first_page_is_complete_at_once(models: Explorer) -> None:
    page = Page(models, query="scene=5")
    shown = {**page.figures, **page.rivals}
    assert all(len(figure.image.value) > 200 for figure in shown.values()), "no picture is missing"
    assert all("bytes" in figure._note.value for figure in page.rivals.values())
    assert not any("slim-old" in figure._dom_classes for figure in shown.values())
    assert f"same {page.view.report.size} bytes" in page.within.value


def test_reset_and_links(page: Page, models: Explorer) -> None:
    page.quality.value, page.seed.value = 0.77, 12
    page._reset()
    assert page.wait() and page.settings.quality == Settings().quality and page.settings.seed == 0
    other = Page(models, query="quality=0.25&steps=1&t0=100&caption=a+lion&scene=9")
    assert other.settings == Settings(9, 0.25, 1, 100, "stage 1", "a lion", 0)
    wrong = Page(models, query="weights=stage+9")
    assert "not here" in wrong.message.value and wrong.view.done


def test_import_is_lazy() -> None:
    with pytest.raises(AttributeError, match="no attribute"):
        explorer.Explorers  # noqa: B018
