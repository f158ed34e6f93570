"""The lesson as a site: every page opens in a real browser, complete, on a screen and on a phone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin, urlparse
from urllib.request import url2pathname

import papermill
import pytest
from test_browser import CHROMIUM, FLAGS, REPO

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]
SHOTS = REPO / "runs/book-pages"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("furo", "myst_nb", "playwright"):
        pytest.importorskip(package, reason="pip install -e .[dev]")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(REPO / "notebooks/book")]
    subprocess.run([*command, str(REPO / "notebooks"), str(out)], check=True, timeout=600)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


def watched(tab: Any, wrong: list[str]) -> Any:
    """A tab that notes errors, missing files, and what is fetched from elsewhere."""
    tab.on("pageerror", lambda error: wrong.append(f"{tab.url}: {error}"))
    tab.on("console", lambda said: wrong.append(f"{tab.url}: {said.text}") if said.type == "error" else None)
    tab.on("requestfailed", lambda request: wrong.append(f"{tab.url}: {request.url} is missing"))
    own = ("file:", "data:", "blob:")
    tab.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
    return tab


def test_every_page_is_complete(site: Path, browser: Any) -> None:
    """No error, nothing fetched from elsewhere, no link to a missing file, no page wider than a phone."""
    pages = sorted(path for path in site.rglob("*.html") if path.name not in ("explorer.html", "search.html"))
    chapters = [path.stem for path in (REPO / "notebooks").rglob("[0-9][0-9]_*.ipynb") if "runs" not in path.parts]
    assert {path.stem for path in pages} >= {"index", "README", "api", "glossary", "notation", *chapters}
    SHOTS.mkdir(parents=True, exist_ok=True)
    wrong: list[str] = []
    for width, height in ((1280, 720), (390, 844)):
        tab = watched(browser.new_page(viewport={"width": width, "height": height}), wrong)
        for page in pages:
            tab.goto(page.as_uri(), wait_until="load")
            if (wide := tab.evaluate("document.documentElement.scrollWidth")) > width:
                wrong.append(f"{page.name} is {wide} pixels wide on a screen of {width}")
            if page.stem in ("index", "05_stage1_training", "glossary"):
                tab.screenshot(path=SHOTS / f"{page.stem}-{width}.png")
            for link in tab.evaluate("[...document.querySelectorAll('a[href]')].map((a) => a.getAttribute('href'))"):
                target = urlparse(urldefrag(urljoin(page.as_uri(), link)).url)
                if target.scheme == "file" and not Path(url2pathname(target.path)).exists():
                    wrong.append(f"{page.name}: its link {link} leads nowhere")
        tab.close()
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def test_what_is_built_by_hand_can_be_fetched(site: Path) -> None:
    for chapter, file in (("02_latent_compression", "ch02.py"), ("README", "slim_by_hand.py")):
        assert f'href="{file}"' in (site / f"{chapter}.html").read_text()
        assert compile((site / file).read_text(), file, "exec")


def test_the_search_finds_a_chapter(site: Path, browser: Any) -> None:
    tab = browser.new_page()
    tab.goto(f"{(site / 'search.html').as_uri()}?q=hyperprior")
    tab.wait_for_selector("#search-results li a", timeout=60_000)
    assert tab.locator("#search-results li a").count() >= 3


def test_all_parameters_are_listed(site: Path) -> None:
    page = (site / "book/parameters.html").read_text()
    for notebook in (REPO / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        for name, told in papermill.inspect_notebook(notebook).items():
            assert told["help"] and told["inferred_type_name"] != "None", (
                f"{notebook.name}: {name} lacks type or comment"
            )
            assert f">{name}<" in page and f"{notebook.stem}.html" in page


def test_solutions_are_folded(site: Path, browser: Any) -> None:
    tab = browser.new_page()
    tab.goto((site / "solutions/02_adaptive_counts.html").as_uri())
    assert tab.locator("details.hide").count() >= 2 and not tab.locator("details.hide[open]").count()
