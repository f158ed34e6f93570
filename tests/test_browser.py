"""The explorer in a real browser, with the shipped models: as a web page of its own (Voila), and in JupyterLab.

Needs Debian's Chromium and Playwright's Python package. Screenshots go to runs/explorer/.
"""

from __future__ import annotations

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

from slimlib.explorer.serve import CODE

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
    yield from _serving(["slimlib", "explore", "--no-browser"], tmp_path_factory.mktemp("voila"))


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

    def picture(self) -> str:
        """What stands behind "After the UNet"."""
        return self.page.locator(".slim-fig:has-text('After the UNet') img").first.get_attribute("src")

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
        self.until(lambda: self.text(".slim-sum") != summary and self.picture() != picture, "a new answer")
        self.answered()

    def pick(self, place: int) -> None:
        self.after(lambda: self.page.locator(".slim-thumb").nth(place).click())

    def upload(self, button: str, file: Path) -> None:
        """Through the button and the browser's own dialogue."""
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(button).click()
        chooser.value.set_files(file)

    def press(self, key: str, times: int = 1) -> None:
        """On the slider of the quality."""
        self.page.locator(".widget-slider:has-text('quality') .noUi-handle").first.focus()
        self.after(lambda: [self.page.keyboard.press(key) for _ in range(times)])

    def close(self) -> None:
        failures = self.page.locator(FAILED).all_inner_texts()
        self.page.close()
        assert not self.complaints and not failures, (self.complaints, failures)


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
    tab.press("ArrowRight", 12)
    assert place.get_attribute("style") != where, "the point moves along the curves"
    dot, frame = place.bounding_box(), tab.page.locator(".slim-curve img").bounding_box()
    for start, length in (("x", "width"), ("y", "height")):
        assert frame[start] <= dot[start] and dot[start] + dot[length] <= frame[start] + frame[length], (
            "and can be seen"
        )
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
    for name in "slim-thumb, noUi-handle, typed, reset, slim-photo, slim-stream, save .slim, fixed budget".split(", "):
        assert name in " ".join(seen), f"{name} is not reached by the tab key"


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
    tab.pick(1)


def test_save_and_open_a_stream(tab: Tab, tmp_path: Path) -> None:
    tab.answered()
    with tab.page.expect_download() as waiting:
        tab.page.locator("a.save").click()
    saved = tmp_path / "saved.slim"
    waiting.value.save_as(saved)
    assert f"{saved.stat().st_size} bytes" in tab.text(".slim-sum")
    picture = tab.picture()
    tab.pick(2)
    tab.after(lambda: tab.upload(".slim-stream", saved))
    assert tab.picture() == picture
    *most, last = saved.read_bytes()
    (tmp_path / "damaged.slim").write_bytes(bytes([*most, last ^ 1]))
    tab.upload(".slim-stream", tmp_path / "damaged.slim")
    tab.until(lambda: "check sum" in tab.text(".slim-say"), "a message")
    tab.pick(0)


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
    tab.pick(3)
    tab.page.screenshot(path=SHOTS / "tiger.png")


def test_two_windows_and_a_link(tab: Tab, browser: Any, voila: str) -> None:
    other = Tab(browser, voila + "?quality=0.9&scene=43&caption=a+lion")
    other.shows_the_explorer()
    assert "“a lion”" in other.text(".slim-sum")
    theirs = other.picture()
    tab.press("ArrowLeft")
    assert tab.picture() != other.picture() == theirs, "each window has a state of its own"
    other.press("ArrowLeft")
    other.close()


# ---- JupyterLab


def test_in_jupyterlab(browser: Any, tmp_path: Path) -> None:
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(CODE)], metadata=spec), tmp_path / "explorer.ipynb")
    options = "--no-browser --allow-root --ip=127.0.0.1 --IdentityProvider.token= --ServerApp.disable_check_xsrf=True"
    for url in _serving(["jupyterlab", *options.split(), "--notebook-dir", str(tmp_path)], tmp_path):
        tab = Tab(browser, url + "doc/tree/explorer.ipynb")

        def asked(tab: Tab = tab) -> bool:
            """Lab drops in silence what it is asked to run before it has a kernel: ask until it runs."""
            tab.page.locator(".jp-Cell .cm-content").first.click()
            tab.page.keyboard.press("Control+Enter")
            tab.page.wait_for_timeout(1000)
            return tab.text(".jp-InputPrompt") != "[ ]:"

        tab.until(asked, "the first cell runs")
        tab.shows_the_explorer()
        tab.press("ArrowLeft", 9)
        tab.page.screenshot(path=SHOTS / "lab.png")
        tab.close()


# ---- servers


def _serving(command: list[str], private: Path) -> Iterator[str]:
    """Start a server on a free port, wait until it answers, and end it with everything that it started."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    foreign = ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "QUERY_STRING", "SERVER_SOFTWARE")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    homes = ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment |= {"JUPYTER_PREFER_ENV_PATH": "1"} | {name: str(private / name) for name in homes}
    command, log = [sys.executable, "-m", *command, "--port", port], private / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=sink, stderr=sink)
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
