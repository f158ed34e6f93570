"""The page: widgets around `engine.Explorer`, and nothing that could be tested without them.

Controls post what is wanted to a worker thread and return at once; answers come back on the kernel's own loop, stage by
stage. What the page says stands in page.html, how it looks and where its boxes stand in page.css.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import jinja2
import pandas
import torch
from PIL import Image

from slimlib.explorer.engine import LIMITS, RIVALS, WEIGHTS, Budgeted, Curves, Explorer, Settings, Source, View
from slimlib.measure.baselines import CODECS
from slimlib.measure.evaluation import RESULTS
from slimlib.measure.methods import CLASSIC_NAMES
from slimlib.measure.plots import PART_COLOURS

THUMBNAILS = (43, 14, 86, 92, 138, 52, 15, 79, 45, 29, 35, 84)
"""Test scenes in the strip."""
EXPLORE, BUDGET = "Explore", "At a fixed budget"
PATIENCE = 0.5
"""Seconds after which the UNet's steps are shown."""
TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
HTML: Any = TEMPLATES.get_template("page.html").module
"""The macros of page.html; they escape what they are given."""


class Page:
    """The whole page; show `page.box`. Controls are attributes, so that code can move them as a hand would.

    Attributes:
        box: what to display.
        view: the answer on the page, or its first stage while the rest is worked on.
        answered: seconds from the last move to the first picture ("before") and to the finished one ("after").
    """

    def __init__(self, explorer: Explorer | None = None, query: str | None = None) -> None:
        """Build the page with a finished first answer in it.

        Args:
            explorer: the models; those that are shipped if None.
            query: settings from a link (see `Settings.query`); None takes that of the page's address under Voila.
        """
        self.photo: Source | None = None
        self.view: View | None = None
        self.answered: dict[str, float] = {}
        self._asked = 0.0  # when
        self._quiet = False
        self._loop: asyncio.AbstractEventLoop | None = None
        # Everything is computed in the worker's thread: each thread that computes keeps helpers of its own, and once
        # there are more of them than the processor has cores, all of them take longer.
        self._worker = Newest(self._post)
        self.explorer: Explorer = explorer or self._worker.apart(Explorer)
        self.defaults = Settings(weights=self.explorer.weights[0])
        self._build()
        self._set(self._from_link(os.environ.get("QUERY_STRING", "") if query is None else query))
        self._ask()
        self._worker.wait()  # what comes while a page loads may be lost
        for control in self._asking:
            control.observe(self._changed, "value")
        for upload in (self.camera, self.opener):
            upload.observe(self._uploaded, "value")
        with contextlib.suppress(RuntimeError):  # no kernel around: a script or a test
            self._loop = asyncio.get_running_loop()

    @property
    def settings(self) -> Settings:
        """What the controls say."""
        return Settings(
            scene=self.scene.value,
            quality=round(self.quality.value, 4),
            steps=self.steps.value,
            t0=None if self.auto_t0.value else self.t0.value,
            weights=self.weights.value,
            caption={"automatic": "auto", "none": ""}.get(self.caption.value, self.words.value),
            seed=self.seed.value,
        )

    def wait(self, timeout: float = 60) -> bool:
        """Until what was asked is answered, the classic codecs too; for scripts. False if that takes longer."""
        return self._worker.wait(timeout)

    # ---- asking

    def _from_link(self, query: str) -> Settings:
        """The settings of a link; the defaults, and a message, where they are none."""
        try:
            settings = replace(self.defaults, **Settings.named(query))
            if settings.weights not in self.explorer.weights:
                raise ValueError(f"the weights of {settings.weights} are not here")
            self._worker.apart(lambda: self.explorer.scene(settings.scene))
            return settings
        except (ValueError, IndexError) as error:
            self._say(str(error), "bad")
            return self.defaults

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        """Controls that move meanwhile ask for nothing."""
        before, self._quiet = self._quiet, True
        yield
        self._quiet = before

    def _set(self, settings: Settings) -> None:
        """Move all controls at once."""
        usual = self.explorer.codec(settings.weights).compressor.config
        typed = settings.caption not in ("auto", "", None)
        with self._quietly():
            self.scene.value, self.quality.value, self.seed.value = settings.scene, settings.quality, settings.seed
            self.weights.value = settings.weights
            self.steps.value = usual.steps if settings.steps is None else settings.steps
            self.auto_t0.value = self.t0.disabled = settings.t0 is None
            self.t0.value = usual.t0(settings.quality) if settings.t0 is None else settings.t0
            self.caption.value = "typed" if typed else "automatic" if settings.caption else "none"
            self.words.value = settings.caption if typed else ""

    def _changed(self, change: Any) -> None:
        if self._quiet:
            return
        with self._quietly():
            if change["owner"] is self.words:
                self.caption.value = "typed"
            if change["owner"] is self.scene:
                self.photo = None
        budget = self.tab.value == BUDGET
        self.t0.disabled, self.quality.disabled = self.auto_t0.value, budget
        for box, on in ((self._explore, not budget), (self.share, not budget), (self._budget, budget)):
            box.layout.display = "" if on else "none"
        self._say("")
        self._ask()

    def _ask(self, upload: tuple[bytes, str] | None = None) -> None:
        """Ask what the tab in front shows."""
        size = self.size.value if self.tab.value == BUDGET else None
        self._submit(functools.partial(self._answer, self.settings, size, self.photo, upload))

    def _answer(
        self, settings: Settings, size: int | None, photo: Source | None, upload: tuple[bytes, str] | None
    ) -> Iterator[Source | View | Budgeted]:
        """The worker's job: the answer within a size, or a view and then what classic codecs make of as many bytes."""
        if upload:
            photo = self.explorer.photo(*upload)
            yield photo
        if size:
            yield from self.explorer.budget(settings, size, photo)
            return
        for view in self.explorer.look(settings, photo):
            yield view
        if view.source:
            yield from self.explorer.rivals(view.source, view.report.size)

    def _submit(self, job: Callable[[], Iterator[Any]]) -> None:
        self._asked = time.perf_counter()
        for figure in self._front().values():  # what they show is the last answer
            figure.add_class("slim-old")
        self._worker.submit(job)

    def _uploaded(self, change: Any) -> None:
        """A photograph, or a .slim file, came in."""
        if not change["new"]:
            return
        file = change["new"][0]
        data, name = bytes(file["content"]), str(file["name"])
        change["owner"].value = ()  # so that the same file can come again
        if change["owner"] is self.camera:
            self._say(f"opening {name} ...")
            self._ask((data, name))
        else:
            self.tab.value = EXPLORE
            self._say(f"{name}: decoded from the file alone; there is no original to compare it with.", "good")
            self._submit(lambda: self.explorer.open_stream(data))

    def _pick(self, index: int) -> None:
        """A thumbnail was pressed: also the way back from a photograph or an opened file."""
        with self._quietly():
            self.scene.value = index
        self._changed({"owner": self.scene})

    def _reset(self, _: Any = None) -> None:
        self._set(self.defaults)
        self._changed({"owner": self.scene})

    # ---- answers

    def _post(self, number: int, result: Any) -> None:
        """Have `_deliver` called on the kernel's loop: one thread alone touches widgets."""
        if self._loop is None:
            self._deliver(number, result)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, number, result)

    def _deliver(self, number: int, result: Any) -> None:
        newest = number == self._worker.newest
        if isinstance(result, View):
            self._show(result, time.perf_counter() - self._asked if newest else None)
        elif not newest:
            return
        elif isinstance(result, Budgeted):
            source, figures = self.photo or self.explorer.scene(self.scene.value), self._front()
            figure = figures.get(result.name) or figures["SLIM"]  # one place for all its weights
            _fill(figure, HTML.budgeted(result, source, _url(result.image)))
            note = HTML.marks(source.guesses, source)
            _fill(self.budgeted["Original"], HTML.figure("Original", _url(source.image), note))
        elif isinstance(result, Source):
            self.photo = result
            self._say(f"{result.name}: {result.note}", "good")
        else:
            known = isinstance(result, (ValueError, IndexError))
            self._say(str(result) if known else f"That failed: {type(result).__name__}: {result}", "bad")
            for figure in self._front().values():  # what they show stays
                figure.remove_class("slim-old")
            if self.view:
                self.summary.value = HTML.summary(self.view.report, 0, None, PART_COLOURS)

    def _front(self) -> dict[str, widgets.HTML]:
        """The figures of the tab in front."""
        return self.budgeted if self.tab.value == BUDGET else self.figures | self.rivals

    def _show(self, view: View, seconds: float | None) -> None:
        """Put a stage of an answer on the page; seconds since the move, None if there was another move meanwhile."""
        report, source, settings = view.report, view.source, view.settings
        if view.step and not view.done:
            if seconds and seconds > PATIENCE:
                self.summary.value = HTML.summary(report, view.step, None, PART_COLOURS)
            return
        self.view = view
        if seconds:
            self.answered["after" if view.done else "before"] = seconds
        self.summary.value = HTML.summary(report, 0, seconds if view.done else None, PART_COLOURS)
        self.top5.value = HTML.top5(view)
        for name, figure in self.figures.items():
            if name in view.pictures or view.done:
                _fill(figure, HTML.picture(name, _url(view.pictures.get(name)), view))
        self.within.value = f"Classic codecs within the same {report.size} bytes" if source else ""
        for name, figure in ({} if source else self.rivals).items():
            _fill(figure, HTML.figure(name))
        place = self._curves and self._curves.place(WEIGHTS[settings.weights], report.bpp)
        self.place.value = HTML.place(*place) if place else ""
        for index, thumb in zip(THUMBNAILS, self.thumbs, strict=True):
            on = source and source.truth and index == settings.scene
            (thumb.add_class if on else thumb.remove_class)("slim-on")
        code = self.explorer.code(settings, None if source.truth else source) if source else ""
        linked = os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
        self.share.value = HTML.share(view, base64.b64encode(view.stream).decode(), code, linked)
        with self._quietly():
            if source and self.auto_t0.value:
                self.t0.value = report.t0
            if source and self.caption.value != "typed":
                self.words.value = report.caption or ""

    def _say(self, text: str, kind: str = "") -> None:
        self.message.value = HTML.say(text, kind)

    # ---- widgets

    def _build(self) -> None:
        """All controls and places, and how they stand together."""
        names = {codec: CLASSIC_NAMES[codec] for codec in CODECS}
        compared = ("Original", "SLIM", *self.explorer.pixel_codecs, *names.values())
        pictures = ("original", "bits", "before", "after", "error")
        self.figures = {name: _html("fig", HTML.picture(name)) for name in pictures}
        self.rivals = {names[codec]: _html("fig", HTML.figure(names[codec])) for codec in RIVALS}
        self.budgeted = {name: _html("fig", HTML.figure(name)) for name in compared}
        self.message, self.summary, self.top5 = _html("message", HTML.say("")), _html("summary"), _html("guesses")
        self.within, self.place, self.share = _html("head"), _html("place"), _html("share")
        table = RESULTS / "evaluation.csv"
        self._curves = Curves(pandas.read_csv(table)) if table.is_file() else None
        curve = _html("", "<p>No rate-accuracy curves: assets/results is not there yet (make reproduce).</p>")
        if self._curves:
            curve = widgets.Image(value=self._curves.png)
        compare = _box("column", self.within, _box("wrap", *self.rivals.values()))
        below = _box("wrap", compare, _box("curve", curve, self.place))
        self._explore = _box("answer", self.summary, _box("wrap", *self.figures.values()), below, self.top5)
        self.size = widgets.BoundedIntText(value=150, min=10, max=100_000, description="bytes")
        text = "Each codec does its best within so many bytes. The classic ones may also shrink the picture first."
        asked = _box("strip", _box("number", self.size), widgets.HTML(text))
        self._budget = _box("answer", asked, _box("wrap", *self.budgeted.values()))
        self._budget.layout.display = "none"
        self.tab = widgets.ToggleButtons(options=[EXPLORE, BUDGET])
        strip, thumbnails = self._strip()
        front = _box("wrap", self._controls(), self._explore, self._budget)
        head = widgets.HTML(HTML.head(thumbnails))
        self.box = widgets.VBox([head, strip, _box("bar", self.tab, self.message), front])
        self.box.add_class("slim")
        self._asking = [self.scene, self.quality, self.steps, self.t0, self.auto_t0, self.weights, self.caption]
        self._asking += [self.words, self.seed, self.size, self.tab]

    def _strip(self) -> tuple[widgets.Box, dict[int, str]]:
        """Thumbnails, any scene by its number, a photograph, a stream; and the thumbnails' pictures."""
        self.thumbs, urls = [], {}
        for index in THUMBNAILS:
            scene = self.explorer.scenes[index]
            urls[index] = _url(scene.image.resize((64, 64), Image.Resampling.LANCZOS))
            thumb = widgets.Button(tooltip=scene.noun, description=scene.noun.split()[-1])
            thumb.add_class("slim-thumb").add_class(f"slim-scene{index}")
            thumb.on_click(lambda _, index=index: self._pick(index))
            self.thumbs.append(thumb)
        self.scene = widgets.BoundedIntText(max=len(self.explorer.scenes) - 1, description="scene")
        self.camera = widgets.FileUpload(accept="image/*,.jxl,.avif", description="a photograph", icon="")
        self.opener = widgets.FileUpload(accept=".slim", description="open .slim", icon="")
        self.camera.add_class("slim-file").add_class("slim-photo")
        self.opener.add_class("slim-file").add_class("slim-stream")
        files = _box("number", self.scene, self.camera, self.opener)
        return _box("strip", *self.thumbs, files), urls

    def _controls(self) -> widgets.Box:
        self.quality = widgets.FloatSlider(max=1, step=0.01, description="quality")
        self.quality.tooltip = "0: the smallest file; 1: the best picture"
        self.steps = widgets.IntSlider(max=LIMITS["steps"], description="steps K")
        self.steps.tooltip = "denoising steps of the UNet; 0 leaves it out"
        self.t0 = widgets.IntSlider(max=LIMITS["t0"], description="t0")
        self.t0.tooltip = "the noise level from which the UNet starts; 0 leaves it out"
        self.auto_t0 = widgets.Checkbox(description="t0 follows the quality", indent=False)
        self.weights = widgets.ToggleButtons(options=self.explorer.weights)
        self.caption = widgets.ToggleButtons(options=["automatic", "none", "typed"])
        self.words = widgets.Text(placeholder="type a caption, even a wrong one")
        self.seed = widgets.BoundedIntText(max=LIMITS["seed"], description="seed")
        reset = widgets.Button(description="reset")
        reset.on_click(self._reset)
        heads = ("Rate", "Caption", "Repair by the UNet", "Weights")
        rate, caption, repair, weights = (widgets.HTML(f"<b>{head}</b>") for head in heads)
        parts = [rate, self.quality, caption, self.caption, self.words]
        parts += [repair, self.steps, self.t0, self.auto_t0, self.seed, weights, self.weights, reset, self.share]
        return _box("controls", *parts)


def _box(kind: str, *children: widgets.Widget) -> widgets.Box:
    """Widgets in a box that the style sheet knows by its kind."""
    return widgets.Box(children).add_class(f"slim-{kind}")


def _html(kind: str, text: str = "") -> widgets.HTML:
    return widgets.HTML(text).add_class(f"slim-{kind}")


def _fill(figure: widgets.HTML, text: str) -> None:
    """Show what belongs to the newest answer."""
    figure.value = text
    figure.remove_class("slim-old")


def _url(image: Image.Image | None) -> str:
    """A picture in place of its address: lossless, and small (a server limits what a kernel may send in a second)."""
    if image is None:
        return ""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, quality=0, method=0)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


# ------------------------------------------------------------------------------------------- the newest job only


class Newest:
    """Runs jobs in one thread of its own, always the newest; an older one is dropped at its next result.

    A job is a function that returns an iterator. Its first result is delivered even if a newer job waits (something
    moves while a slider is dragged), the others only as long as it is the newest. Results arrive in the order of the
    jobs, so an old one never replaces a new one.
    """

    def __init__(self, deliver: Callable[[int, Any], None]) -> None:
        """Args: `deliver` gets a job's number and a result, or the exception that ended it, in the worker's thread."""
        self._deliver, self.newest = deliver, 0
        # A new thread computes with as many threads as any other one has asked for last.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),))
        self._last: Future[Any] = self._thread.submit(int)

    def submit(self, job: Callable[[], Iterator[Any]]) -> int:
        """Put a job in the place of whatever waits; returns its number at once."""
        self.newest += 1
        self._last = self._thread.submit(self._run, self.newest, job)
        return self.newest

    def wait(self, timeout: float | None = None) -> bool:
        """Until nothing runs or waits; False if that takes longer."""
        return not wait([self._last], timeout).not_done

    def apart(self, work: Callable[[], Any]) -> Any:
        """The result of some work, done in the worker's thread while the caller waits."""
        return self._thread.submit(work).result()

    def _run(self, number: int, job: Callable[[], Iterator[Any]]) -> None:
        try:
            for i, result in enumerate(job() if number == self.newest else ()):
                if i == 0 or number == self.newest:
                    self._deliver(number, result)
                if number != self.newest:
                    return
        except Exception as error:  # a page must tell what went wrong, and go on
            self._deliver(number, error)
