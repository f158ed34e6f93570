"""The explorer in a real browser, with the shipped models: as a web page of its own (Voila), and in JupyterLab.

Needs Debian's Chromium and Playwright's Python package. Screenshots go to runs/explorer/.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
SHOTS = REPO / "runs/explorer"
CHROMIUM = shutil.which("chromium")
PATIENCE = 100_000
"""Milliseconds to wait for anything but the start."""
START = 200_000
"""Milliseconds until the page is there. It takes 15 seconds, and over a minute where others use the processor, too."""
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
FAILED = "[data-mime-type*=error], [data-mime-type*=stderr]"
"""What a cell says when something is wrong."""
AFTER = ".slim-fig:has-text('After the UNet') img"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium (Debian, Ubuntu), then again"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright, then again")
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def voila(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from _serving(lambda port: ["slimlib.explorer", "--no-browser", "--port", port], tmp_path_factory)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("lab")
    cell = new_code_cell("from slimlib.explorer import Page\npage = Page()\npage.box")
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[cell], metadata=spec), folder / "explorer.ipynb")

    def command(port: str) -> list[str]:
        options = ["--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
        return ["jupyterlab", "--no-browser", "--allow-root", "--port", port, "--notebook-dir", str(folder), *options]

    yield from _serving(command, tmp_path_factory)


@pytest.fixture(scope="module")
def tab(browser: Any, voila: str) -> Iterator[Tab]:
    tab = Tab(browser, voila, height=1000)
    tab.shows_the_explorer()
    yield tab
    tab.close()


class Tab:
    """A page with the explorer in it, and what its console said."""

    def __init__(self, browser: Any, url: str, width: int = 1280, height: int = 720) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
        self.page.set_default_timeout(PATIENCE)
        self.complaints: list[str] = []
        note = self.complaints.append
        self.page.on("console", lambda message: note(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: note(str(error)))
        self.page.goto(url, wait_until="domcontentloaded", timeout=START)

    def shows_the_explorer(self) -> None:
        self.page.wait_for_selector(f".slim .slim-sum b, {FAILED}", timeout=START)
        assert not self.page.locator(FAILED).count(), self.text(FAILED)

    def run_first_cell(self) -> None:
        """In JupyterLab. It drops in silence what it is asked to run before it has a kernel: ask until it runs."""

        def asked() -> bool:
            self.page.locator(".jp-Cell .cm-content").first.click()
            self.page.keyboard.press("Control+Enter")
            self.page.wait_for_timeout(1000)
            return self.text(".jp-InputPrompt") != "[ ]:"

        self.until(asked, "the first cell runs")

    def picture(self, selector: str = AFTER) -> str:
        """A hash of what an image shows now."""
        read = "async (image) => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"
        data = bytes(self.page.locator(selector).first.evaluate(read))
        return hashlib.sha256(data).hexdigest()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def until(self, changed: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE / 1000
        while not changed():
            assert time.monotonic() < deadline, f"{what}: nothing of the kind; the console says {self.complaints}"
            self.page.wait_for_timeout(50)

    def answered(self) -> None:
        """The last answer is complete: nothing is faded, and the summary says how long it took."""
        self.until(lambda: "answered" in self.text(".slim-sum"), "an answer")
        self.until(lambda: self.page.locator(".slim-old").count() == 0, "the classic codecs")

    def after(self, act: Callable[[], Any]) -> None:
        """Do something; until picture and summary are others, and the answer is complete."""
        picture, summary = self.picture(), self.text(".slim-sum")
        act()
        self.until(lambda: self.text(".slim-sum") != summary and "answered" in self.text(".slim-sum"), "a new summary")
        self.until(lambda: self.picture() != picture, "a new picture")
        self.answered()

    def upload(self, button: str, file: Path) -> None:
        """Through the button and the browser's own dialogue."""
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(button).click()
        chooser.value.set_files(file)

    def quality(self) -> Any:
        return self.page.locator(".widget-slider:has-text('quality') .noUi-handle").first

    def close(self) -> None:
        failures = self.page.locator(FAILED).all_inner_texts()
        self.page.close()
        assert not self.complaints and not failures, (self.complaints, failures)


def inside(box: dict[str, float], frame: dict[str, float]) -> bool:
    """Whether one rectangle of the page lies in another."""
    across = frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"]
    return across and frame["y"] <= box["y"] and box["y"] + box["height"] <= frame["y"] + frame["height"]


# ---- Voila


def test_the_page_is_there_and_shows_no_code(tab: Tab) -> None:
    assert "machine still see" in tab.text(".slim h1")
    everything = tab.page.content()  # what is hidden, too
    assert "Traceback" not in everything and "slimlib.explorer" not in everything
    tab.answered()
    tab.page.screenshot(path=SHOTS / "voila.png")


def test_the_slider_by_keys_and_by_mouse(tab: Tab) -> None:
    place = tab.page.locator(".slim-curve .dot")
    where = place.get_attribute("style")
    tab.quality().focus()
    tab.after(lambda: [tab.page.keyboard.press("ArrowRight") for _ in range(12)])
    assert place.get_attribute("style") != where, "the point moves along the curves"
    assert inside(place.bounding_box(), tab.page.locator(".slim-curve").bounding_box()), "and can be seen"
    boxes = [tab.page.locator(".slim-fig").nth(i).bounding_box() for i in range(8)]
    box = tab.page.locator(".widget-slider:has-text('quality') .noUi-base").first.bounding_box()
    guesses = tab.text(".top5")
    tab.after(lambda: tab.page.mouse.click(box["x"] + 0.08 * box["width"], box["y"] + box["height"] / 2))
    assert tab.text(".top5") != guesses
    assert [tab.page.locator(".slim-fig").nth(i).bounding_box() for i in range(8)] == boxes, "nothing may jump"


def test_everything_can_be_reached_with_the_keyboard(tab: Tab) -> None:
    tab.page.locator(".slim-thumb").first.focus()
    seen = set()
    for _ in range(60):
        seen.add(tab.page.evaluate("document.activeElement.innerText + '|' + document.activeElement.className"))
        tab.page.keyboard.press("Tab")
    seen_text = " ".join(seen)
    for name in (
        "slim-thumb",
        "noUi-handle",
        "typed",
        "reset",
        "photograph",
        "open .slim",
        "save .slim",
        "fixed budget",
    ):
        assert name in seen_text, f"{name} is not reached by the tab key"


def test_a_typed_caption(tab: Tab) -> None:
    words = tab.page.locator(".widget-text input[type=text]").first
    tab.after(lambda: words.fill("a banana <b>"))
    assert "“a banana <b>”" in tab.text(".slim-sum")
    tab.after(lambda: tab.page.get_by_role("button", name="automatic").click())


def test_photographs_good_and_bad(tab: Tab, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (8, 12, 3), dtype=np.uint8))
    small.resize((1200, 800), Image.Resampling.BICUBIC).save(tmp_path / "mine.jpg")
    (tmp_path / "words.png").write_text("these are words")
    tab.after(lambda: tab.upload(".slim-photo", tmp_path / "mine.jpg"))
    assert "explored at 256 x 171" in tab.text(".slim-say")
    picture = tab.picture()
    tab.upload(".slim-photo", tmp_path / "words.png")
    tab.until(lambda: "is not a picture" in tab.text(".slim-say"), "a message")
    assert tab.picture() == picture
    tab.after(lambda: tab.page.locator(".slim-thumb").nth(1).click())


def test_save_and_open_a_stream(tab: Tab, tmp_path: Path) -> None:
    tab.answered()
    with tab.page.expect_download() as waiting:
        tab.page.locator("a.save").click()
    saved = tmp_path / "saved.slim"
    waiting.value.save_as(saved)
    assert f"{saved.stat().st_size} bytes" in tab.text(".slim-sum")
    picture = tab.picture()
    tab.after(lambda: tab.page.locator(".slim-thumb").nth(2).click())
    tab.after(lambda: tab.upload(".slim-stream", saved))
    assert tab.picture() == picture
    damaged = bytearray(saved.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.slim").write_bytes(bytes(damaged))
    tab.upload(".slim-stream", tmp_path / "damaged.slim")
    tab.until(lambda: "check sum" in tab.text(".slim-say"), "a message")
    tab.after(lambda: tab.page.locator(".slim-thumb").nth(0).click())


def test_a_fixed_budget(tab: Tab) -> None:
    tab.page.get_by_role("button", name="At a fixed budget").click()
    tab.until(lambda: tab.page.locator(".slim-fig:visible").count() >= 6, "figures")
    figures = tab.page.locator(".slim-fig:visible")
    tab.until(lambda: all("A:" in text for text in figures.all_inner_texts()), "an answer of each codec")
    tab.until(lambda: tab.page.locator(".slim-fig.slim-old:visible").count() == 0, "all of them")
    tab.page.screenshot(path=SHOTS / "budget.png")
    original, slim, *others = figures.all_inner_texts()
    assert original.startswith("Original") and slim.startswith("SLIM")
    assert all("bytes" in text for text in (slim, *others))
    cut = figures.locator("b").evaluate_all("of => of.filter(b => b.scrollWidth > b.clientWidth).map(b => b.innerText)")
    assert not cut, "names that do not fit"
    tab.page.get_by_role("button", name="Explore").click()
    tab.after(lambda: tab.page.locator(".slim-thumb").nth(3).click())
    tab.page.screenshot(path=SHOTS / "tiger.png")


def test_two_windows_and_a_link(tab: Tab, browser: Any, voila: str) -> None:
    other = Tab(browser, voila + "?quality=0.9&scene=43&caption=a+lion")
    other.shows_the_explorer()
    assert "“a lion”" in other.text(".slim-sum")
    mine, theirs = tab.picture(), other.picture()
    assert mine != theirs
    tab.quality().focus()
    tab.after(lambda: tab.page.keyboard.press("ArrowLeft"))
    assert other.picture() == theirs, "each window has a state of its own"
    other.quality().focus()
    other.after(lambda: other.page.keyboard.press("ArrowLeft"))
    other.close()


# ---- JupyterLab


def test_in_jupyterlab(browser: Any, lab: str) -> None:
    tab = Tab(browser, lab + "doc/tree/explorer.ipynb")
    tab.run_first_cell()
    tab.shows_the_explorer()
    tab.quality().focus()
    tab.after(lambda: [tab.page.keyboard.press("ArrowLeft") for _ in range(9)])
    tab.page.screenshot(path=SHOTS / "lab.png")
    tab.close()


# ---- servers


def _serving(command: Callable[[str], list[str]], paths: pytest.TempPathFactory) -> Iterator[str]:
    """Start a server on a free port, wait until it answers, and end it with everything that it started."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log, private = paths.mktemp("log") / "log", paths.mktemp("private")
    foreign = ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "QUERY_STRING", "SERVER_SOFTWARE")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        environment[name] = str(private / name)
    environment["JUPYTER_PREFER_ENV_PATH"] = "1"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", *command(port)], cwd=REPO, env=environment, stdout=sink, stderr=sink
        )
    url, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE / 1000
    try:
        while True:
            try:
                urllib.request.urlopen(url + "static/", timeout=5)
                break
            except urllib.error.HTTPError:
                break  # it answers
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.3)
        yield url
        assert "Traceback" not in log.read_text(errors="replace"), log.read_text()[-3000:]
    finally:
        family = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        for member in family:
            member.kill()
        process.wait()
