"""The explorer in a real browser, with the shipped models: as a web page of its own (Voila), and in JupyterLab.

Needs Debian's Chromium and Playwright's Python package. Screenshots go to runs/explorer/.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import socket
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
PATIENCE = 200
"""Seconds to wait for anything: the slowest is a kernel's start where others use the processor, too."""
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
SLIDER = ".slim .rate .noUi-handle"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium (Debian, Ubuntu), then again"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright, then again")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


class Server:
    """A server on a free port, with everything that it starts."""

    def __init__(self, command: list[str], private: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command = [sys.executable, "-m", *command, "--port", str(self.port)]
        self.private, self.url, self.log = private, f"http://127.0.0.1:{self.port}/", private / "log"
        self.start()

    def start(self) -> None:
        foreign = ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH")
        environment = {name: value for name, value in os.environ.items() if name not in foreign}
        homes = ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        environment |= {"JUPYTER_PREFER_ENV_PATH": "1"} | {name: str(self.private / name) for name in homes}
        environment["PYTHONPATH"] = str(REPO)
        with self.log.open("wb") as sink:
            self.process = psutil.Popen(self.command, cwd=REPO, env=environment, stdout=sink, stderr=sink)
        until(self.answers, "the server answers")

    def answers(self) -> bool:
        assert self.process.is_running(), self.said()[-3000:]
        try:
            urllib.request.urlopen(self.url + "static/", timeout=5)
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False
        return True

    def kernels(self) -> list[psutil.Process]:
        found = []
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                found += [child] if "ipykernel_launcher" in child.cmdline() else []
        return found

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        for member in [self.process, *self.process.children(recursive=True)]:
            member.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(["slimlib", "explore", "--no-browser"], tmp_path_factory.mktemp("voila"))
    yield server
    server.kill()
    assert "Traceback" not in server.said(), server.said()[-3000:]


@pytest.fixture(scope="module")
def tab(browser: Any, server: Server) -> Iterator[Tab]:
    tab = Tab(browser, server.url)
    yield tab
    tab.close()


def until(true: Callable[[], Any], what: str, pause: Callable[[float], Any] = lambda ms: time.sleep(ms / 1000)) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"{what}: nothing of the kind"
        pause(100)


class Tab:
    """A page with the explorer in it, and what its console said."""

    def __init__(self, browser: Any, url: str, width: int = 1280, height: int = 720) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
        self.page.set_default_timeout(1000 * PATIENCE)
        self.complaints: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url, wait_until="domcontentloaded")
        self.shown()

    def shown(self) -> None:
        failed = "[data-mime-type*=error], [data-mime-type*=stderr]"
        self.page.wait_for_selector(f".slim .facts tbody tr, {failed}")
        assert not self.page.locator(failed).count(), self.text(failed)
        self.answered()

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def until(self, true: Callable[[], Any], what: str) -> None:
        until(true, f"{what} (the console says {self.complaints})", self.page.wait_for_timeout)

    def answered(self) -> None:
        """The answer is complete: nothing is faded, and every rival has said what it sees."""
        self.until(lambda: not self.page.locator(".old, .late").count() and "…" not in self.text("table"), "an answer")

    def state(self) -> tuple[str, str]:
        return self.text(".facts"), self.page.evaluate("document.querySelectorAll('canvas')[1].toDataURL()")

    def after(self, act: Callable[[], Any]) -> None:
        """Do something; until something else is seen and said, and the answer is complete."""
        facts, picture = self.state()
        act()
        self.until(lambda: self.state()[0] != facts and self.state()[1] != picture, "a new answer")
        self.answered()

    def upload(self, button: str, file: Path) -> None:
        """Through the button and the browser's own dialogue."""
        with self.page.expect_file_chooser() as chooser:
            self.page.locator(button).click()
        chooser.value.set_files(file)

    def press(self, key: str, times: int = 1) -> None:
        """On the main slider."""
        self.page.locator(SLIDER).focus()
        self.after(lambda: [self.page.keyboard.press(key) for _ in range(times)])

    def close(self) -> None:
        self.page.close(run_before_unload=True)
        assert not self.complaints


FOCUSED = """() => { // what has the focus: its name, and how well its ring stands out from a white page
  const e = document.activeElement, own = getComputedStyle(e);
  const look = +own.opacity ? own : getComputedStyle(e.parentElement); // the handle itself is not drawn
  const light = look.outlineColor.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  const contrast = 1.05 / (0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2] + 0.05);
  const [width, offset] = [look.outlineWidth, look.outlineOffset].map(parseFloat);
  const ring = look.outlineStyle !== "none" && width >= 2 && offset >= 0;
  const name = e.getAttribute("aria-label") ?? (e.labels?.[0]?.innerText || e.innerText || e.tagName);
  return [name.trim(), ring ? contrast : 0];
}"""
BRIGHT = """[...document.querySelectorAll('.slim *')] // what is not faded, but for the message
  .filter((e) => e.checkVisibility() && !e.children.length && !e.closest('.said'))
  .filter((e) => { while (e && getComputedStyle(e).opacity > 0.5) e = e.parentElement; return !e; })
  .map((e) => e.outerHTML)"""


def walk(page: Any, start: str, stop: str) -> list[str]:
    """The names of what the key Tab leads to; each shows that it has the focus."""
    assert page.locator(".slim").first.evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"
    page.locator(start).focus()
    names: list[str] = []
    while stop not in names and len(names) < 40:
        name, contrast = page.evaluate(FOCUSED)
        assert contrast >= 3, f"{name}: no ring, or one that can hardly be seen"
        names.append(name)
        page.keyboard.press("Tab")
    return names


# ---- Voila


def test_the_page_is_there_and_everything_in_it_has_a_name(tab: Tab) -> None:
    everything = tab.page.content()  # what is hidden, too
    assert "Traceback" not in everything and "import Page" not in everything
    tab.until(lambda: tab.page.evaluate("document.activeElement.matches('.rate .noUi-handle')"), "the slider is first")
    tab.page.wait_for_timeout(1100)  # names are set every second
    tree = tab.page.locator("body").aria_snapshot()
    assert not re.search(
        r"- (button|slider|radio|checkbox|textbox|spinbutton|img|radiogroup)( \[.*\])?:?$", tree, re.M
    ), tree
    for found in (
        'slider "Size of the file, at most"',
        'button "a red fox" [pressed]',
        'img "SLIM, ',
        'radiogroup "Weights"',
    ):
        assert found in tree
    assert re.search('img "original: A says [a-z ]+, B says', tree) and "- status: This is a red fox." in tree


def test_tabs_go_from_the_slider_on_and_the_focus_is_seen(tab: Tab) -> None:
    tab.page.wait_for_timeout(1100)  # names are set every second
    stops = "Size of the file, at most|64 bytes|Handle between the two pictures, in percent|original|nothing|automatic|"
    stops += "words|pin this|reset|stage 2|steps K|t0|t0 and K follow the quality|seed|scene|a photograph … (0)|"
    assert walk(tab.page, SLIDER, "copy link") == (stops + "open .slim … (0)|save .slim|copy link").split("|")
    tab.page.get_by_label("nothing").focus()
    tab.page.keyboard.press("ArrowRight")
    tab.until(lambda: "over=where" in tab.page.url, "arrows choose within a group")
    tab.page.get_by_label("nothing").check()


def test_a_copied_link_brings_the_same_back(tab: Tab, browser: Any) -> None:
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.after(lambda: tab.page.get_by_label("words").fill("a lion & <b>"))
    tab.page.get_by_label("WebP", exact=True).check()
    tab.until(lambda: "left=WebP" in tab.page.url, "the address follows")
    tab.page.get_by_role("button", name="copy link").click()
    tab.until(lambda: tab.text(".link") == "copied", "it is said")
    other = Tab(browser, tab.page.evaluate("navigator.clipboard.readText()"))
    other.until(lambda: other.state() == tab.state() and other.text(".tag") == tab.text(".tag"), "the same")
    assert "WebP" in other.text(".tag") and "“a lion & <b>”" in other.text(".summary")
    other.close()
    tab.after(lambda: tab.page.get_by_role("button", name="reset").click())


def test_slider_thumbnails_address_and_back(tab: Tab) -> None:
    assert "size=64" in tab.page.url and "64 bytes" in tab.text(".rate .widget-readout")
    tab.press("ArrowRight", 3)
    assert "size=128" in tab.page.url
    box = tab.page.locator(".rate .noUi-base").bounding_box()
    facts = [tab.page.locator(".facts > *").nth(i).bounding_box() for i in range(3)]
    tab.page.wait_for_timeout(1100)  # of a quick series of moves only the last one is kept
    tab.after(lambda: tab.page.mouse.click(box["x"] + 0.99 * box["width"], box["y"] + 10))
    assert "size=1024" in tab.page.url and re.search(r"\b[5-9]\d\d bytes", tab.text(".summary"))
    assert [tab.page.locator(".facts > *").nth(i).bounding_box() for i in range(3)] == facts, "nothing may jump"
    tab.page.wait_for_timeout(1100)
    tab.after(lambda: tab.page.get_by_role("button", name="a grey koala").click())
    assert tab.page.url.endswith("scene=14") and "This is a grey koala" in tab.text(".summary")
    for size, scene in ((1024, 43), (128, 43)):
        tab.after(tab.page.go_back)
        assert f"size={size}&" in tab.page.url and tab.page.url.endswith(f"scene={scene}")


def test_what_stands_left_and_over_the_picture(tab: Tab) -> None:
    pictures = set()
    for name in ("WebP", "hyperprior", "before the UNet", "object and crop", "original"):
        tab.page.get_by_label(name, exact=True).check()
        tab.until(lambda name=name: tab.text(".tag").startswith(name), "another picture")
        pictures.add(tab.page.evaluate("document.querySelector('canvas').toDataURL()"))
    assert len(pictures) == 5 and "left=original" in tab.page.url
    for name in ("where the bits went", "error"):
        tab.page.get_by_label(name).check()
        tab.until(lambda: not tab.page.locator("canvas").nth(2).get_attribute("hidden"), "something over it")
    tab.page.get_by_role("button", name="pin this").click()
    tab.press("ArrowLeft")
    assert tab.text(".tag").startswith("pinned") or tab.page.get_by_label("pinned").is_checked()
    tab.page.get_by_label("nothing").check()
    tab.page.get_by_label("original", exact=True).check()


def test_back_and_forward_where_the_address_names_a_pin_that_has_gone(tab: Tab) -> None:
    """What an address cannot say any more is put right in its place: "back" does not lead there again and again."""
    tab.after(lambda: tab.page.get_by_role("button", name="a grey koala").click())
    tab.page.wait_for_timeout(1100)
    tab.page.get_by_role("button", name="pin this").click()
    tab.until(lambda: "left=pinned" in tab.page.url, "a pin")
    tab.page.wait_for_timeout(1100)
    tab.after(lambda: tab.page.get_by_role("button", name="a red fox").click())
    tab.until(lambda: "pinned" not in tab.page.url and not tab.page.get_by_label("pinned").count(), "no pin")
    koala, fox = tab.state()[0], tab.state()[0]
    while koala == fox:  # on a slow machine an address of the fox, too, named the pin
        tab.after(tab.page.go_back)
        koala = tab.state()[0]
    assert tab.page.url.endswith("scene=14") and "pinned" not in tab.page.url
    tab.page.wait_for_timeout(1100)
    tab.after(tab.page.go_forward)
    assert tab.state()[0] == fox


def test_a_typed_caption_is_text(tab: Tab) -> None:
    tab.after(lambda: tab.page.get_by_label("words").fill("a banana <b>"))
    assert "“a banana <b>”" in tab.text(".summary") and tab.page.get_by_label("typed").is_checked()
    tab.after(lambda: tab.page.get_by_label("automatic").check())


def test_photographs_good_and_bad(tab: Tab, tmp_path: Path) -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 12, 3), dtype=np.uint8))
    small.resize((1200, 800), Image.Resampling.BICUBIC).save(mine := tmp_path / f"{'mine' * 50}.jpg")
    (tmp_path / "words.png").write_text("these are words")
    address = tab.page.url
    tab.after(lambda: tab.upload(".photo", mine))
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a long name is broken"
    for said in ("explored at 256 x 171", "These models know 124 things", "A link does not hold a photograph"):
        assert said in tab.text(".summary")
    assert not tab.page.locator("figure").is_visible() and tab.page.url == address
    tab.upload(".photo", tmp_path / "words.png")
    tab.until(lambda: "is not a picture" in tab.text(".said"), "a message")
    tab.after(lambda: tab.page.get_by_role("button", name="a red fox").click())
    assert "These models know" not in tab.text(".summary") and tab.page.locator("figure").is_visible()


def test_save_and_open_a_stream(tab: Tab, tmp_path: Path) -> None:
    tab.page.get_by_label("stage 1").check()
    tab.until(lambda: "weights=stage+1" in tab.page.url, "other weights")
    tab.answered()
    with tab.page.expect_download() as waiting:
        tab.page.locator("a.save").click()
    saved = tmp_path / "saved.slim"
    waiting.value.save_as(saved)
    assert f"{saved.stat().st_size} bytes" in tab.text(".summary")
    picture = tab.state()[1]
    tab.after(lambda: tab.page.get_by_role("button", name="reset").click())
    tab.after(lambda: tab.upload(".stream", saved))
    assert tab.state()[1] == picture and "saved.slim" in tab.text(".summary") and "file alone" in tab.text(".summary")
    assert tab.page.get_by_label("stage 1").is_checked() and not tab.page.get_by_label("t0 and K follow").is_checked()
    made = [tab.page.get_by_label(name, exact=True) for name in ("typed", "words", "stage 1", "seed")]
    assert all(control.is_disabled() for control in made) and "cannot be moved" in tab.text(".summary")
    *most, last = saved.read_bytes()
    (tmp_path / "damaged.slim").write_bytes(bytes([*most, last ^ 1]))
    tab.upload(".stream", tmp_path / "damaged.slim")
    tab.until(lambda: "check sum" in tab.text(".said"), "a message")
    tab.after(lambda: tab.page.get_by_role("button", name="a grey koala").click())
    assert "file alone" not in tab.text(".summary") and all(control.is_enabled() for control in made)


@pytest.mark.parametrize(("width", "height"), [(390, 844), (640, 360), (1280, 720), (1920, 1080)])
def test_nothing_is_cut_and_every_control_stands_beside_its_result(tab: Tab, width: int, height: int) -> None:
    tab.page.set_viewport_size({"width": width, "height": height})
    tab.page.locator(".slim h1").evaluate("e => e.scrollIntoView()")
    tab.page.wait_for_timeout(300)
    tab.page.screenshot(path=SHOTS / f"live-{width}.png")
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    targets = "[...document.querySelectorAll('.slim :is(button, summary, select, label:has(input), .noUi-handle)')]"
    small = f"{targets}.filter(e => e.checkVisibility() && Math.min(e.offsetWidth, e.offsetHeight) < 24)"
    assert not tab.page.evaluate(f"{small}.map(e => e.outerHTML)")
    for name in ("AVIF", "error", "words", "stage 1", "seed", "scene"):
        tab.page.get_by_label(name, exact=True).first.evaluate("e => e.scrollIntoView({block: 'nearest'})")
        tab.page.wait_for_timeout(100)
        for part in (".rate .noUi-base", ".split"):
            box = tab.page.locator(part).bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= height, f"{part} is out of sight at {name}"
        box = tab.page.get_by_label(name, exact=True).first.bounding_box()
        hit = tab.page.evaluate(
            "([x, y]) => !document.elementFromPoint(x, y)?.closest('.stage')",
            [box["x"] + 9, box["y"] + box["height"] / 2],
        )
        assert hit, f"{name} is hidden behind the picture"


def test_only_this_machine_is_served(server: Server) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    until(lambda: "Kernel started" in server.said(), "a kernel")
    kernel = re.findall(r"Kernel started: (\S+)", server.said())[-1]

    def status(method: str, path: str, **headers: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request(method, path, headers=headers)
        return connection.getresponse().status

    channels, shutdown, foreign = f"/api/kernels/{kernel}/channels", f"/voila/api/shutdown/{kernel}", "elsewhere.org"
    assert status("GET", "/", Host=foreign) == status("GET", channels, Host=foreign, **upgrade) == 403
    assert status("POST", shutdown, Host=foreign, Origin=f"http://{foreign}") == 403
    assert status("POST", shutdown, Origin=f"http://{foreign}") == 404
    assert status("GET", channels, Origin=f"http://{foreign}", **upgrade) in (403, 404)
    assert status("GET", channels, Origin=server.url[:-1], **upgrade) == 101
    assert all(line.laddr.ip == "127.0.0.1" for line in server.process.net_connections() if line.status == "LISTEN")


def test_kernels_end_with_their_pages(tab: Tab, server: Server) -> None:
    for _ in range(4):
        tab.page.reload(wait_until="domcontentloaded")
        tab.shown()
    tab.page.goto("about:blank")
    tab.until(lambda: len(server.kernels()) == 1, "the pool alone is left")


def test_a_link_two_windows_and_a_dead_kernel(browser: Any, server: Server) -> None:
    one = Tab(browser, server.url + "?size=256&scene=43&caption=typed&words=a+lion&odd=1&left=odd")
    one.until(lambda: "“a lion”" in one.text(".summary"), "what the link says")
    other = Tab(browser, server.url)
    theirs = one.state()
    other.press("ArrowLeft")
    assert one.state() == theirs, "each window has a state of its own"
    other.close()
    config = one.page.evaluate("JSON.parse(document.getElementById('jupyter-config-data').textContent).kernelId")
    for kernel in server.kernels():
        if config in " ".join(kernel.cmdline()):
            kernel.suspend()
            one.until(lambda: "No answer for" in one.text(".said"), "it is noticed")
            assert one.page.locator(".late").count() and not one.page.evaluate(BRIGHT), "everything fades"
            kernel.resume()
            one.until(lambda: not one.page.locator(".late").count(), "all is well again")
            one.press("ArrowLeft")
            kernel.kill()
            one.until(lambda: re.search("Connection lost.* reload", one.text(".said")), "it is given up")
    one.page.reload(wait_until="domcontentloaded")
    one.until(lambda: "“a lion”" in one.text(".summary"), "the settings are kept")
    one.page.close()


def test_a_dead_server_is_noticed_and_the_next_one_is_left_alone(browser: Any, server: Server) -> None:
    tab = Tab(browser, server.url)
    tab.press("ArrowRight")
    address = tab.page.url
    server.kill()
    tab.until(lambda: "No answer for" in tab.text(".said"), "it is noticed")
    assert tab.page.locator(".late").count()
    tab.until(lambda: "Connection lost" in tab.text(".said"), "it is given up")
    server.start()
    before = server.said().count("404")
    tab.page.wait_for_timeout(15_000)
    assert server.said().count("404") - before <= 1, "an old page fills a new server's log"
    tab.page.reload(wait_until="domcontentloaded")
    tab.until(lambda: tab.page.url == address and "80 bytes" in tab.text(".summary"), "the settings are kept")
    tab.page.close()


# ---- JupyterLab


def test_in_jupyterlab(browser: Any, tmp_path: Path) -> None:
    spec = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell(CODE)], metadata=spec), tmp_path / "explorer.ipynb")
    options = "--no-browser --allow-root --ip=127.0.0.1 --IdentityProvider.token= --ServerApp.disable_check_xsrf=True"
    server = Server(["jupyterlab", *options.split(), "--notebook-dir", str(tmp_path)], tmp_path)
    try:
        page = browser.new_page(viewport={"width": 1280, "height": 720})
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(server.url + "doc/tree/explorer.ipynb", wait_until="domcontentloaded")

        def asked() -> bool:
            """Lab drops in silence what it is asked to run before it has a kernel: ask until it runs."""
            page.locator(".jp-Cell .cm-content").first.click()
            page.keyboard.press("Control+Enter")
            page.wait_for_timeout(1000)
            return page.locator(".jp-InputPrompt").first.inner_text() != "[ ]:"

        until(asked, "the first cell runs", page.wait_for_timeout)
        page.wait_for_selector(".slim .facts tbody tr")
        address, facts = page.url, page.locator(".slim .facts").inner_text()
        page.locator(SLIDER).press("ArrowRight")
        until(lambda: page.locator(".slim .facts").inner_text() != facts, "an answer", page.wait_for_timeout)
        assert page.url == address, "Lab's own address is left alone"
        page.screenshot(path=SHOTS / "lab.png")
        page.close()
    finally:
        server.kill()
