"""The static explorer in a real browser: its numbers and pictures are the codec's, on a screen and on a phone."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_browser import CHROMIUM, FLAGS, walk

from slimlib.explorer import static
from slimlib.explorer.engine import Explorer, Settings, first_of
from slimlib.explorer.static import build
from slimlib.scales import ASSETS

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]
QUALITIES = (0.2, 0.8)


@pytest.fixture(scope="module")
def explorer() -> Explorer:
    return Explorer()


@pytest.fixture(scope="module")
def page(explorer: Explorer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("static") / "explorer.html"
    rule = build(path, explorer, count=2, qualities=QUALITIES)
    assert "2 pictures" in rule and path.stat().st_size < 300_000
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        tab = browser.new_page(viewport={"width": 1280, "height": 720})
        tab.complaints = []
        tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file", "data", "blob")) else tab.complaints.append(request.url)
            ),
        )
        tab.address = path.as_uri()
        yield tab
        assert not tab.complaints, "errors, or something fetched from elsewhere"
        browser.close()


def opened(page: Any, **settings: Any) -> Any:
    page.goto("about:blank")  # a change of the part behind # alone would load nothing
    page.goto(f"{page.address}#{'&'.join(f'{name}={value}' for name, value in settings.items())}")
    page.wait_for_function("document.querySelector('#size').textContent && !document.querySelector('canvas').hidden")
    return page


def shown(page: Any, place: int) -> np.ndarray:
    """What stands left (0) or right (1) of the line."""
    url = page.evaluate(f"document.querySelectorAll('#view canvas')[{place}].toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"), float)


def psnr(one: Any, other: Any) -> float:
    return float(-10 * np.log10(np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2) / 255**2))


def index_of(explorer: Explorer, noun: str) -> int:
    """The first scene of a noun, in the order in which the page chooses its scenes."""
    order = np.random.default_rng(0).permutation(len(explorer.scenes)).tolist()
    return next(i for i in order if explorer.scenes[i].noun == noun)


@pytest.mark.parametrize("step", (0, 1))
@pytest.mark.parametrize("caption", ("right", "wrong", "none"))
def test_bytes_words_and_pictures_are_the_codecs(page: Any, explorer: Explorer, step: int, caption: str) -> None:
    opened(page, step=step, caption=caption)
    name = page.inner_text("#told .summary b")
    index = index_of(explorer, name)
    words = re.search("“(.*)”", page.inner_text("#told .summary"))
    codec = explorer.codec(explorer.weights[0])
    stream = codec.compress(explorer.scene(index).image, QUALITIES[step], words and words[1])
    assert page.inner_text("#size").startswith(f"{len(stream)} bytes, {8 * len(stream) / 128**2:.3f} bits")
    assert (words is None) == (caption == "none") and (caption != "right" or words[1] == explorer.scene(index).caption)
    picture = codec.decompress(stream)
    assert psnr(shown(page, 1), picture) > 27 and psnr(shown(page, 0), explorer.scene(index).image) > 27
    row = page.locator("#told tr", has_text="SLIM").inner_text()
    assert all(guess[0][0] in row for guess in explorer.guess(picture).values())


def test_the_committed_page_is_of_these_sources_and_weights(explorer: Explorer) -> None:
    """What `slim explore --static assets/explorer.html` would write: styles and scripts, curves, files and answers."""
    page = (ASSETS / "explorer.html").read_text(encoding="utf-8")
    sources = [Path(static.__file__).with_name(name).read_text() for name in ("look.css", "viewer.js", "static.js")]
    assert all(source in page for source in sources), "write it anew"
    known = json.JSONDecoder().raw_decode(page, page.index("const DATA = ") + len("const DATA = "))[0]
    assert known["curves"] == explorer.constants()["curves"] and known["lines"] == explorer.constants()["lines"]
    assert len(known["scenes"]) == 12 and known["qualities"] == list(static.QUALITIES)
    for scene in known["scenes"][:2]:
        index = index_of(explorer, scene["name"])
        for quality, step in zip(known["qualities"], scene["steps"], strict=True):
            if quality in (0.0, 0.4, 1.0):
                settings = Settings(index, quality, weights=explorer.weights[0], caption=scene["words"]["right"])
                *_, view = explorer.look(settings)
                assert view.report.size == step["right"]["bytes"] and view.report.caption == scene["words"]["right"]
                assert first_of(view.guesses["after"])["B"][0] == step["right"]["seen"]["B"][0]


def test_choices_change_what_is_seen_and_the_address_and_back_undoes_them(page: Any) -> None:
    opened(page)
    before = shown(page, 0)
    page.get_by_label("before the UNet").check()
    page.wait_for_function("location.hash.includes('left=before')")
    assert psnr(shown(page, 0), before) < 27
    page.locator("#step").press("ArrowLeft")
    assert "step=" in page.url and page.locator("#step").get_attribute("aria-valuetext") == page.inner_text("#size")
    page.get_by_text("pin as 1").click()
    page.get_by_label("a wrong one").check()
    assert "pinned 1" in page.locator("#view .tag").first.inner_text()
    page.go_back()
    page.wait_for_function("!location.hash.includes('caption=wrong')")
    assert page.get_by_label("the right one").is_checked()
    opened(page, scene=99, step="x", left="nonsense", odd=1)
    assert page.get_by_label("original", exact=True).is_checked(), "what is unknown counts for nothing"
    for pin in ("", "9 right", "0 odd"):
        opened(page, left="pin1", pin1=pin)
        assert page.get_by_label("original", exact=True).is_checked() and "left" not in page.url, (
            "a pin that is not there"
        )
    opened(page, left="pin2", pin2="1 wrong")
    assert page.get_by_label("pin 2").is_checked() and "pinned 2" in page.locator("#view .tag").first.inner_text()


SLOW = """() => { // two pictures are chosen at once, and the first takes longer to load
  const { set } = Object.getOwnPropertyDescriptor(HTMLElement.prototype, "onload");
  let wait = 400;
  Object.defineProperty(HTMLImageElement.prototype, "onload", { configurable: true, set(done) {
    const ms = wait;
    wait = 0;
    set.call(this, () => setTimeout(done, ms));
  } });
  sprites.fill(null);
  change({ scene: 0 });
  change({ scene: 1 });
}"""


def test_two_pictures_chosen_quickly_are_not_mixed(page: Any) -> None:
    opened(page)
    page.evaluate(SLOW)
    page.wait_for_timeout(900)
    assert page.get_by_label("picture 2").get_attribute("aria-pressed") == "true"
    assert page.evaluate("DATA.scenes[1].name") in page.inner_text("#told .summary"), "of the second, as the picture"


def test_a_copied_link_brings_the_same_back(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened(page)
    page.locator("#step").press("ArrowLeft")
    page.get_by_label("none", exact=True).check()
    page.get_by_label("WebP", exact=True).check()
    told, left, right = page.inner_text("#told"), shown(page, 0), shown(page, 1)
    page.get_by_role("button", name="copy link").click()
    page.get_by_role("button", name="copied").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    opened(page)
    assert page.inner_text("#told") != told
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_function("document.querySelector('#view .tag').textContent.startsWith('WebP')")
    assert page.inner_text("#told") == told and (shown(page, 0) == left).all() and (shown(page, 1) == right).all()


def test_tabs_go_from_the_slider_on_and_the_focus_is_seen(page: Any) -> None:
    opened(page)
    assert page.evaluate("document.activeElement.id") == "step", "it has the focus at first"
    stops = "Size of the file|Handle between the two pictures, in percent|original|the right one|nothing|pin as 1|"
    names = [name.partition(":")[0] for name in walk(page, "#step", "guess first")]
    assert names == (stops + "pin as 2|copy link|guess first").split("|")
    lines = page.locator("#told svg text").all_text_contents()
    assert {"label only", "caption read", "caption only"} <= {*lines}


def test_the_handle_moves_by_mouse_and_keys_and_the_wheel_zooms(page: Any) -> None:
    opened(page)
    box = page.locator("#view").bounding_box()
    page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.5 * box["height"])
    handle = page.locator("#view input")
    assert abs(float(handle.input_value()) - 250) < 20
    handle.press("ArrowRight")
    assert float(handle.input_value()) > 250 and "% original" in handle.get_attribute("aria-valuetext")
    page.mouse.wheel(0, -300)
    assert "scale(1.25)" in page.locator("#view .stack").get_attribute("style")


def test_guess_first_hides_what_the_machines_say(page: Any) -> None:
    opened(page, hide=1)
    assert not page.locator("#told").is_visible()
    page.get_by_text("What do the machines say?").click()
    assert page.locator("#told").is_visible()


@pytest.mark.parametrize("width", (390, 1280, 1920))
def test_nothing_is_cut_and_every_control_has_a_name(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844 if width == 390 else 720})
    opened(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    bottom = page.locator("#step").bounding_box()
    assert bottom["y"] + bottom["height"] <= page.viewport_size["height"], "the slider is in sight"
    tree = page.locator("body").aria_snapshot()
    assert "slider" in tree and not re.search(r"- (button|slider|radio|checkbox)$", tree, re.M), "each has a name"
    small = page.evaluate(
        "[...document.querySelectorAll('button, input[type=range], label')].filter(e => e.checkVisibility() && "
        "getComputedStyle(e).opacity > 0 && Math.min(e.offsetWidth, e.offsetHeight) < 24).length"
    )
    assert not small
    Path("runs/explorer").mkdir(parents=True, exist_ok=True)
    page.screenshot(path=f"runs/explorer/static-{width}.png")
