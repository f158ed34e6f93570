"""The page: widgets around `engine.Explorer`, and nothing that could be tested without them.

Controls post what is wanted to a worker thread and return at once; answers come back on the kernel's own loop, stage by
stage. Every picture has a box of fixed size, so that nothing moves while the content changes.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import escape
from typing import Any, TypeVar

import ipywidgets as widgets
import torch
from PIL import Image

from slimlib.baselines import CODECS
from slimlib.codec import StreamReport
from slimlib.evaluation import CLASSIC_NAMES
from slimlib.explorer.engine import (
    CURVES_SIZE,
    MAX_SEED,
    MAX_STEPS,
    RIVALS,
    WEIGHTS,
    Budgeted,
    Explorer,
    Guesses,
    Newest,
    Settings,
    Source,
    View,
    shipped_curves,
)
from slimlib.plots import PART_COLOURS

T = TypeVar("T")

THUMBNAILS = (43, 14, 86, 92, 138, 52, 15, 79, 45, 29, 35, 84)
"""Test scenes in the strip."""
SIDE = "var(--side)"
"""Side of a picture's box on the page: the style sheet says how long it is, by the room that there is."""
CURVES = f"calc(2 * {SIDE} + 20px)"
"""Width of the curves: as two pictures."""
EXPLORE = "Explore"
PATIENCE = 0.5
"""Seconds after which progress is shown."""
REST = 0.4
"""Seconds that the controls must rest before the classic codecs are asked: they take long, and share the processor."""

TITLES = {
    "original": ("Original", "white: object; orange: what the captioner sees"),
    "bits": ("Where the bits went", "yellow: most, black: none"),
    "before": ("Before the UNet", ""),
    "after": ("After the UNet", ""),
    "error": ("Error", "white: off by a quarter of the range or more"),
}

NOTHING = Image.new("RGB", (1, 1), "#ededed")
"""In the place of a picture that is not there."""

STYLE = """<style>
.slim{container-type:inline-size;color:#1a1a1a;background:#fff}
.slim>*{--side:176px;--u:1px;--f:14px;--s:12px;max-width:1240px;
font:var(--f)/1.4 system-ui,-apple-system,"Segoe UI",sans-serif}
@container (min-width:1640px){.slim>*{--side:240px;--u:1.2px;--f:17px;--s:15px;max-width:1640px;
--jp-widgets-font-size:15.5px}}
.slim *{box-sizing:border-box}
.slim h1{display:inline;font-size:calc(var(--f) + 8px);margin:0 14px 0 0;line-height:1.3}
.slim p{margin:0}
.slim .widget-html,.slim .widget-html-content{line-height:1.35;font-size:calc(var(--f) - 1px);overflow:visible}
.slim .slim-fig{flex:0 0 auto;overflow:hidden}
.slim img{margin:0}
.slim .slim-fig img{object-fit:contain;background:#ededed;border:1px solid #c4c4c4;transition:opacity .15s}
.slim .slim-old img,.slim .slim-old .slim-note{opacity:.3;transition:opacity .2s .35s}
.slim .slim-fig b,.slim .slim-head{display:block;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.slim .slim-fig b{font-size:calc(var(--s) + .5px)}
.slim .slim-head{font-size:calc(var(--f) - .5px)}
.slim .slim-note{font-size:var(--s);line-height:1.3;color:#404040;height:4em;overflow:hidden}
.slim .ok{color:#00558c;font-weight:600}.slim .no{color:#b34700;font-weight:600}
.slim .slim-say{height:32px;padding:0 8px;border-left:4px solid transparent;line-height:1.2;display:flex;
align-items:center;overflow:hidden}
.slim .slim-say.bad{border-color:#d55e00;background:#fdeee4}
.slim .slim-say.good{border-color:#0072b2;background:#e8f2f9}
.slim .slim-sum{font-size:calc(var(--f) + 2px);height:1.6em;white-space:nowrap;overflow:hidden;text-overflow:ellipsis}
.slim .slim-sum progress{width:110px;vertical-align:middle}
.slim .bar{display:flex;height:16px;width:100%;background:#ededed}.slim .bar i{display:block;height:16px}
.slim .key{font-size:var(--s);height:1.7em;overflow:hidden;white-space:nowrap}
.slim .key i{display:inline-block;width:10px;height:10px;margin:0 4px 0 10px}
.slim table.top5{border-collapse:collapse;width:100%;table-layout:fixed;font-size:var(--s)}
.slim .top5 th{text-align:left;font-weight:600;padding:2px 6px 2px 0;vertical-align:bottom}
.slim .top5 td{padding:1px 10px 1px 0;white-space:nowrap;overflow:hidden}
.slim .top5 td div{display:flex;justify-content:space-between;padding:0 4px;overflow:hidden}
.slim .slim-curve{position:relative;overflow:hidden}
.slim .slim-curve .widget-html,.slim .slim-curve .widget-html-content{position:absolute;inset:0;margin:0;height:100%}
.slim .slim-curve .dot{position:absolute;width:16px;height:16px;margin:-8px;border-radius:50%;background:#fff;
border:4px solid #1a1a1a;box-shadow:0 0 0 2px #fff}
.slim .slim-curve .line{position:absolute;top:4%;bottom:17%;border-left:1.5px dashed #1a1a1a}
.slim pre.code{margin:2px 0;padding:6px 8px;background:#f4f4f4;border:1px solid #c4c4c4;font:12px/1.35 ui-monospace,
"Liberation Mono",Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;user-select:all}
.slim a{color:#00558c;text-decoration:underline}
.slim a.save{display:inline-block;padding:3px 10px;background:#0072b2;color:#fff;text-decoration:none;border-radius:2px;
line-height:22px}
.slim a:focus-visible,.slim button:focus-visible,.slim input:focus-visible,.slim .noUi-handle:focus,.slim pre:focus,
.slim summary:focus-visible{outline:3px solid #1a1a1a;outline-offset:2px}
.slim .slim-thumb{width:calc(66*var(--u));height:calc(66*var(--u));padding:0;margin:0 4px 0 0;background-size:cover;
border:2px solid #fff;display:flex;align-items:flex-end;overflow:hidden;font-size:calc(var(--s) - 1.5px);
line-height:16px;font-weight:600;color:#fff;text-shadow:0 0 2px #000,0 0 3px #000,0 0 5px #000}
.slim .slim-thumb::before{display:none}
.slim .slim-thumb.slim-on{border:4px solid #0072b2}
.slim .slim-file{font-size:0}.slim .slim-file::after{font-size:var(--jp-widgets-font-size)}
.slim .slim-photo::after{content:"a photograph …"}
.slim .slim-stream::after{content:"open .slim …"}
.slim .widget-toggle-button{min-width:0}.slim .widget-toggle-button.mod-active{background:#0072b2;color:#fff}
.slim .widget-label{color:#1a1a1a}
</style>"""


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
        self.explorer = explorer or _apart(Explorer)
        self.defaults = Settings(weights=self.explorer.weights[0])
        self.photo: Source | None = None
        self.view: View | None = None
        self.answered: dict[str, float] = {}
        self._started = (0, 0.0)  # number of the newest job, and when it was asked for
        self._answered = 0  # number of the last job that gave any result
        self._quiet = False
        self._curves = shipped_curves()
        try:
            self._loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:  # no kernel around: a script or a test
            self._loop = None
        self._worker, self._beside = Newest(self._post(self._deliver)), Newest(self._post(self._deliver_rival))
        self._build()
        settings = self._from_link(os.environ.get("QUERY_STRING", "") if query is None else query)
        start = time.perf_counter()
        views = _apart(lambda: [(view, time.perf_counter() - start) for view in self.explorer.look(settings)])
        source, size = self.explorer.scene(settings.scene), views[0][0].report.size
        rivals = _apart(lambda: list(self.explorer.rivals(source, size)))  # what comes while a page loads may be lost
        self._set(settings)
        for view, seconds in views:
            self._show(view, seconds)
        for rival in rivals:
            self._show_budgeted(self.rivals[rival.name], rival, source)
        slim = (self.quality, self.steps, self.t0, self.auto_t0, self.weights, self.caption, self.words, self.seed)
        for control in (*slim, self.scene, self.size, self.tab):
            control.observe(self._changed, "value")
        for upload in (self.camera, self.opener):
            upload.observe(self._uploaded, "value")

    @property
    def settings(self) -> Settings:
        """What the controls say."""
        return Settings(
            scene=self.scene.value,
            quality=round(self.quality.value, 4),
            steps=self.steps.value,
            t0=None if self.auto_t0.value else self.t0.value,
            weights=self.weights.value,
            caption={"automatic": "auto", "none": None}.get(self.caption.value, self.words.value),
            seed=self.seed.value,
        )

    def wait(self, timeout: float = 60, rivals: bool = True) -> bool:
        """Until what was asked is answered, the classic codecs too; for scripts. False if that takes longer."""
        return self._worker.wait(timeout) and (not rivals or self._beside.wait(timeout))

    # ---- asking

    def _from_link(self, query: str) -> Settings:
        """The settings of a link; the defaults, and a message, where they are none."""
        try:
            settings = replace(self.defaults, **Settings.named(query))
            if settings.weights not in self.explorer.weights:
                raise ValueError(f"the weights of {settings.weights} are not here")
            _apart(lambda: self.explorer.scene(settings.scene))
            return settings
        except (ValueError, IndexError) as error:
            self._say(str(error), "bad")
            return self.defaults

    def _set(self, settings: Settings) -> None:
        """Move all controls at once, without asking for an answer."""
        self._quiet = True
        self.scene.value, self.quality.value, self.seed.value = settings.scene, settings.quality, settings.seed
        self.weights.value = settings.weights
        usual = self.explorer.codec(settings.weights).compressor.config
        self.steps.value = usual.steps if settings.steps is None else settings.steps
        self.auto_t0.value, self.t0.disabled = settings.t0 is None, settings.t0 is None
        self.t0.value = usual.t0(settings.quality) if settings.t0 is None else settings.t0
        typed = settings.caption not in ("auto", None)
        self.caption.value = "typed" if typed else "automatic" if settings.caption else "none"
        if typed:
            self.words.value = settings.caption or ""
        self._quiet = False

    def _changed(self, change: Any) -> None:
        if self._quiet:
            return
        self._quiet = True
        if change["owner"] is self.words:
            self.caption.value = "typed"
        if change["owner"] is self.scene:
            self.photo = None
        budget = self.tab.value != EXPLORE
        self.t0.disabled, self.quality.disabled = self.auto_t0.value, budget
        self._explore.layout.display, self._budget.layout.display = ("none", "") if budget else ("", "none")
        self.share.layout.visibility = "hidden" if budget else "visible"
        self._quiet = False
        self._say("")
        self._submit(self._job(self.settings, self.photo))

    def _job(self, settings: Settings, photo: Source | None) -> Callable[[], Iterator[Any]]:
        """What the tab in front asks of the explorer."""
        if self.tab.value == EXPLORE:
            return lambda: self.explorer.look(settings, photo)
        size = self.size.value
        return lambda: self.explorer.budget(settings, size, photo)

    def _submit(self, job: Callable[[], Iterator[Any]]) -> None:
        started = time.perf_counter()
        self._fade(True)
        self._beside.submit(lambda: iter(()))  # nobody waits for the last answer's rivals any more
        self._started = (self._worker.submit(job), started)
        if self._loop:
            self._loop.call_later(PATIENCE, self._still_waiting, self._started[0])

    def _ask_rivals(self) -> None:
        view = self.view
        if view is None or view.source is None:
            return
        source, size = view.source, view.report.size
        for figure in self.rivals.values():
            figure.add_class("slim-old")

        def job() -> Iterator[Any]:
            yield None
            time.sleep(REST)
            yield None  # a chance to be dropped before the work begins
            rivals = self.explorer.rivals(source, size)
            while rival := _apart(lambda: next(rivals, None)):
                yield view, rival

        self._beside.submit(job)

    def _uploaded(self, change: Any) -> None:
        """A photograph, or a .slim file, came in."""
        if self._quiet or not change["new"]:
            return
        file = change["new"][0]
        data, name = bytes(file["content"]), str(file["name"])
        self._quiet = True
        change["owner"].value = ()  # so that the same file can come again
        self._quiet = False
        if change["owner"] is self.opener:
            self.tab.value = EXPLORE
            self._say(f"{name}: decoded from the file alone; there is no original to compare it with.", "good")
            self._submit(lambda: self.explorer.open_stream(data))
            return
        self._say(f"opening {name} ...")
        settings = self.settings

        def job() -> Iterator[Any]:
            photo = self.explorer.photo(data, name)
            yield photo
            yield from self._job(settings, photo)()

        self._submit(job)

    def _pick(self, index: int) -> None:
        """A thumbnail was pressed: also the way back from a photograph or an opened file."""
        if self.scene.value != index:
            self.scene.value = index
        else:
            self.photo = None
            self._changed({"owner": self.scene})

    def _reset(self, _: Any = None) -> None:
        self.photo = None
        self._set(self.defaults)
        self._changed({"owner": None})

    # ---- answers

    def _post(self, show: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
        """The same function, called on the kernel's loop: one thread alone touches widgets."""

        def post(number: int, result: Any) -> None:
            if self._loop is None:
                show(number, result)
            elif not self._loop.is_closed():
                self._loop.call_soon_threadsafe(show, number, result)

        return post

    def _deliver(self, number: int, result: Any) -> None:
        newest, started = self._started
        self._answered = number
        seconds = time.perf_counter() - started if number == newest else None
        if isinstance(result, View):
            self._show(result, seconds)
            if result.done and number == newest:
                self._ask_rivals()
        elif number != newest:
            return
        elif isinstance(result, Budgeted):
            source = self.photo or self.explorer.scene(self.scene.value)
            figure = self.budgeted.get(result.name) or self.budgeted["SLIM"]  # one place for all its weights
            if figure is self.budgeted["SLIM"]:
                self.original.set("Original", source.image, _marks(source.guesses, source))
            self._show_budgeted(figure, result, source)
        elif isinstance(result, Source):
            self.photo = result
            self._say(f"{result.name}: {result.note}", "good")
        else:
            known = isinstance(result, (ValueError, IndexError))
            self._say(str(result) if known else f"That failed: {type(result).__name__}: {result}", "bad")
            self._fade(False)
            if self.view:
                self.summary.value = _summary(self.view.report, "")

    def _fade(self, on: bool) -> None:
        """Mark what is shown as that of the last answer, or as what stays."""
        shown = self.budgeted if self.tab.value != EXPLORE else self.figures | self.rivals
        for figure in shown.values():
            (figure.add_class if on else figure.remove_class)("slim-old")

    def _still_waiting(self, number: int) -> None:
        """Nothing has come for a while: say that something will."""
        if self._started[0] == number > self._answered:
            self.summary.value = '<div class="slim-sum"><progress></progress> working …</div>'

    def _show(self, view: View, seconds: float | None) -> None:
        """Put a stage of an answer on the page; seconds since the move, None if there was another move meanwhile."""
        report = view.report
        if view.step and not view.done:
            if seconds and seconds > PATIENCE:
                bar = f'<progress max="{report.steps}" value="{view.step}"></progress>'
                self.summary.value = _summary(report, f"UNet, step {view.step} of {report.steps} {bar}")
            return
        self.view = view
        for name, figure in self.figures.items():
            title, note = TITLES[name]
            if name == "original" and view.source:
                title = view.source.name
                note = note if view.source.matte is not None else "orange: what the captioner sees"
            if name in view.guesses:
                note = _marks(view.guesses[name], view.source)
            if name in view.pictures:
                figure.set(title, view.pictures[name], note)
            elif view.done:
                figure.blank()
        self.summary.value = _summary(report, f"answered in {seconds:.2f} s" if seconds and view.done else "")
        self.top5.value = _top5(view)
        if seconds:
            self.answered["after" if view.done else "before"] = seconds
        if not view.done:
            self._show_rest(view)

    def _show_rest(self, view: View) -> None:
        """All that is known once there is a file."""
        report = view.report
        self.bytes.value = _byte_bar(report)
        place = self._curves and self._curves.place(WEIGHTS[view.weights], report.bpp)
        if place:
            across, down, accuracy = place
            self.point.value = (
                f'<i class="line" style="left:{100 * across:.2f}%"></i><i class="dot" style="left:{100 * across:.2f}%;'
                f'top:{100 * down:.2f}%"></i>'
            )
            self.place.value = _head(f"At this rate B knows {accuracy:.0f}&nbsp;% of the test scenes")
        self.within.value = _head(f"Classic codecs within the same {report.size} bytes") if view.source else ""
        if not view.source:
            for figure in self.rivals.values():
                figure.blank()
        self._quiet = True
        if view.source and self.auto_t0.value:
            self.t0.value = report.t0
        if view.source and self.caption.value != "typed":
            self.words.value = report.caption or ""
        self._quiet = False
        on = view.settings.scene if view.settings and not _photo(view) else None
        for index, thumb in zip(THUMBNAILS, self.thumbs, strict=True):
            (thumb.add_class if index == on else thumb.remove_class)("slim-on")
        self.share.value = self._share(view)

    def _share(self, view: View) -> str:
        """Save the file, the link, the lines of code."""
        settings, photo = view.settings, _photo(view)
        name = photo.name if photo else f"scene{settings.scene}" if settings else "opened"
        name += f"_q{view.report.quality:.2f}.slim"
        data = base64.b64encode(view.stream).decode()
        save = f'<a class="save" download="{escape(name)}" href="data:application/octet-stream;base64,{data}">'
        html = f"{save}save .slim ({view.report.size} bytes)</a> "
        if settings is None:
            return html
        if photo is None and os.environ.get("SERVER_SOFTWARE", "").startswith("voila"):
            html += f'<p><a href="?{escape(settings.query())}">link to these settings</a></p>'
        copy = "navigator.clipboard.writeText(this.nextElementSibling.innerText)"
        code = escape(self.explorer.code(settings, photo))
        html += f'<details><summary>code that makes this very file</summary><button onclick="{copy}">copy</button>'
        return html + f'<pre class="code" tabindex="0">{code}</pre></details>'

    def _deliver_rival(self, number: int, result: Any) -> None:
        if isinstance(result, Exception):
            self._say(f"A classic codec failed: {result}", "bad")
        elif result is not None and self.view is not None and result[0].stream is self.view.stream:
            self._show_budgeted(self.rivals[result[1].name], result[1], self.view.source)

    def _show_budgeted(self, figure: _Figure, result: Budgeted, source: Source | None) -> None:
        size = f"{result.size} bytes" if result.fits else f'<span class="no">needs {result.size} bytes</span>'
        figure.set(result.name, result.image, f"{size}<br>{_marks(result.guesses, source)}")

    def _say(self, text: str, kind: str = "") -> None:
        self.message.value = f'<div class="slim-say {kind}" role="status">{escape(text)}</div>'

    # ---- widgets

    def _build(self) -> None:
        """All controls and places, and how they stand together."""
        self.message, self.summary, self.bytes = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.top5, self.share, self.point = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.within, self.place = widgets.HTML(_head("Classic codecs")), widgets.HTML(_head(""))
        self.tab = widgets.ToggleButtons(options=[EXPLORE, "At a fixed budget"])
        self.figures = {name: _Figure(title) for name, (title, _) in TITLES.items()}
        self.rivals = {CLASSIC_NAMES[codec]: _Figure(CLASSIC_NAMES[codec]) for codec in RIVALS}
        names = ["SLIM", *self.explorer.pixel_codecs, *(CLASSIC_NAMES[codec] for codec in CODECS)]
        self.budgeted = {name: _Figure(name) for name in names}
        self.original = _Figure("Original")

        if self._curves:
            full = {"width": "100%", "height": "100%"}
            curve = widgets.Image(value=self._curves.png, layout=full)
        else:
            curve = widgets.HTML("<p>No rate-accuracy curves: assets/results is not there yet (make reproduce).</p>")
        size = {"width": CURVES, "height": f"calc({CURVES} * {CURVES_SIZE[1] / CURVES_SIZE[0]:.4f})"}
        curves = widgets.Box([curve, self.point], layout={**size, "flex": "0 0 auto"})
        curves.add_class("slim-curve")
        classic = widgets.VBox([self.within, _row(self.rivals.values())])
        below = _row([classic, widgets.VBox([self.place, curves])])
        self._explore = widgets.VBox(
            [self.summary, self.bytes, _row(self.figures.values()), below, self.top5], layout={"flex": "1 1 560px"}
        )
        self.size = widgets.BoundedIntText(
            value=150, min=10, max=100_000, description="bytes", layout={"width": _length(150)}
        )
        self.size.style.description_width = _length(40)
        text = "Each codec does its best within so many bytes. The classic ones may also shrink the picture first."
        asked = widgets.HBox([self.size, widgets.HTML(text)], layout={"align_items": "center"})
        self._budget = widgets.VBox(
            [asked, _row([self.original, *self.budgeted.values()])], layout={"flex": "1 1 560px", "display": "none"}
        )
        front = widgets.Box(
            [self._controls(), self._explore, self._budget], layout={"flex_flow": "row wrap", "width": "100%"}
        )
        title = (
            "<h1>What does the machine still see?</h1> SLIM keeps what a classifier needs, in a few bytes. Slide the "
            "quality; pick a scene, or bring a photograph."
        )
        self.message.layout.flex = "1 1 400px"
        bar = widgets.HBox([self.tab, self.message])
        parts = [widgets.HTML(STYLE, layout={"display": "none"}), widgets.HTML(title), self._strip(), bar, front]
        self._say("")
        self.box = widgets.VBox(parts)
        self.box.add_class("slim")

    def _strip(self) -> widgets.Widget:
        """Thumbnails, any scene by its number, a photograph, a stream."""
        self.thumbs, rules = [], []
        for index in THUMBNAILS:
            scene = self.explorer.scenes[index]
            thumb = widgets.Button(tooltip=scene.noun, description=scene.noun.split()[-1])
            thumb.add_class("slim-thumb")
            thumb.add_class(f"slim-scene{index}")
            thumb.on_click(lambda _, index=index: self._pick(index))
            data = base64.b64encode(_encoded(scene.image.resize((64, 64), Image.Resampling.LANCZOS))).decode()
            rules.append(f".slim .slim-scene{index}{{background-image:url(data:image/webp;base64,{data})}}")
            self.thumbs.append(thumb)
        last = len(self.explorer.scenes) - 1
        self.scene = widgets.BoundedIntText(min=0, max=last, description="scene", layout={"width": _length(115)})
        self.scene.style.description_width = _length(40)
        self.camera = widgets.FileUpload(accept="image/*,.jxl,.avif", description="a photograph", icon="")
        self.opener = widgets.FileUpload(accept=".slim", description="open .slim", icon="")
        for upload, kind in ((self.camera, "slim-photo"), (self.opener, "slim-stream")):
            upload.layout = {"width": _length(126)}
            upload.add_class("slim-file")  # the widget's own label counts files
            upload.add_class(kind)
        style = widgets.HTML(f"<style>{''.join(rules)}</style>", layout={"display": "none"})
        files = widgets.HBox([self.scene, self.camera, self.opener])
        return widgets.Box([*self.thumbs, files, style], layout={"flex_flow": "row wrap", "align_items": "center"})

    def _controls(self) -> widgets.Widget:
        wide: dict[str, Any] = {"layout": {"width": _length(276)}, "style": {"description_width": _length(54)}}
        self.quality = widgets.FloatSlider(min=0, max=1, step=0.01, description="quality", readout_format=".2f", **wide)
        self.quality.tooltip = "0: the smallest file; 1: the best picture"
        self.steps = widgets.IntSlider(min=0, max=MAX_STEPS, description="steps K", **wide)
        self.steps.tooltip = "denoising steps of the UNet; 0 leaves it out"
        last = self.explorer.codec(self.explorer.weights[0]).ldm.scheduler.config.num_train_timesteps - 1
        self.t0 = widgets.IntSlider(min=0, max=last, description="t0", **wide)
        self.t0.tooltip = "the noise level from which the UNet starts; 0 leaves it out"
        self.auto_t0 = widgets.Checkbox(description="t0 follows the quality", indent=False)
        self.auto_t0.layout = {"width": _length(216), "margin": f"0 0 0 {_length(60)}"}
        self.weights = widgets.ToggleButtons(options=self.explorer.weights)
        self.caption = widgets.ToggleButtons(options=["automatic", "none", "typed"])
        for choice in (self.weights, self.caption):
            choice.style.button_width = _length(86)
        self.words = widgets.Text(placeholder="type a caption, even a wrong one", layout={"width": _length(276)})
        self.seed = widgets.BoundedIntText(min=0, max=MAX_SEED, description="seed", **wide)
        reset = widgets.Button(description="reset", layout={"width": _length(86)})
        reset.on_click(self._reset)
        rate = [widgets.HTML("<b>Rate</b>"), self.quality]
        repair = [widgets.HTML("<b>Repair by the UNet</b>"), self.steps, self.t0, self.auto_t0, self.seed]
        words = [widgets.HTML("<b>Caption</b>"), self.caption, self.words]
        missing = [name for name in WEIGHTS if name not in self.explorer.weights]
        absent = f" (not here: {', '.join(missing)})" if missing else ""
        weights = [widgets.HTML(f"<b>Weights</b>{absent}"), self.weights]
        parts = [*rate, *words, *repair, *weights, reset, self.share]
        return widgets.VBox(parts, layout={"width": _length(290), "flex": "0 0 auto", "margin": "0 14px 0 0"})


def _apart(work: Callable[[], T]) -> T:
    """The result of some work with the models, done in a thread that ends.

    A thread that computes in parallel keeps helpers. Once all threads and helpers are more than the processor's cores,
    OpenMP (libgomp) lets helpers sleep between two loops, and waking them makes an answer half as slow again. So the
    page's worker shall be the only thread that has any.
    """
    threads = torch.get_num_threads()

    def task() -> T:
        torch.set_num_threads(threads)  # a new thread begins with the number that any other one has set last
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(task).result()


class _Figure(widgets.VBox):
    """A picture in a box of fixed size, with a title above and words below."""

    def __init__(self, title: str) -> None:
        self._title, self._note = widgets.HTML(), widgets.HTML()
        self.image = widgets.Image(format="webp", layout={"width": SIDE, "height": SIDE})
        super().__init__([self._title, self.image, self._note])
        self.layout = {"width": SIDE, "margin": "0 10px 0 0"}
        self.add_class("slim-fig")
        self._name = title
        self._shown: Image.Image | None = None
        self.blank()

    def set(self, title: str, image: Image.Image, note: str) -> None:
        """Show a picture; the note is HTML, the title plain."""
        self._title.value = f'<b title="{escape(title)}">{escape(title)}</b>'
        if image is not self._shown:  # the original stays under a moving slider
            self._shown, self.image.value = image, _encoded(image)
        self._note.value = f'<div class="slim-note">{note}</div>'
        self.remove_class("slim-old")

    def blank(self) -> None:
        """There is nothing to show here."""
        self.set(self._name, NOTHING, "")


def _photo(view: View) -> Source | None:
    """The photograph that was compressed; None for a scene, whose outline is known, or an opened stream."""
    return view.source if view.source and view.source.matte is None else None


def _length(units: int) -> str:
    """In CSS: so many pixels on a laptop's screen, more where there is room."""
    return f"calc({units} * var(--u))"


def _head(text: str) -> str:
    """What stands above a part of the page; the text is HTML."""
    return f'<span class="slim-head">{text}</span>'


def _row(children: Any) -> widgets.Box:
    return widgets.Box(list(children), layout={"flex_flow": "row wrap"})


def _encoded(image: Image.Image) -> bytes:
    """Lossless, and small enough for a stream of them (the server limits what a kernel may send)."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True, quality=0, method=0)
    return file.getvalue()


def _percent(share: float) -> str:
    return f"{100 * share:.0f}&nbsp;%"


def _guess(name: str, truth: str | None, first: bool) -> str:
    """A class, marked right or wrong where the truth is known: by sign, weight and colour."""
    if truth is None:
        return escape(name)
    if name == truth:
        return f'<span class="ok">✓ {escape(name)}</span>'
    return f'<span class="no">✗ {escape(name)}</span>' if first else escape(name)


def _marks(guesses: dict[str, Guesses], source: Source | None) -> str:
    """Under a picture: the first guess of each machine."""
    truth = source.truth if source else None
    first = {machine: top[0] for machine, top in guesses.items()}
    return "<br>".join(f"{m}: {_guess(name, truth, True)} {_percent(p)}" for m, (name, p) in first.items())


def _top5(view: View) -> str:
    """Both machines on the original, before and after the UNet, five guesses each."""
    columns: list[tuple[str, Guesses]] = []
    for machine in ("A", "B"):
        pictures = {"original": view.source.guesses if view.source else None, **view.guesses}
        for name in ("original", "before", "after"):
            of = pictures.get(name)
            label = name if name == "original" else f"{name} the UNet"
            columns.append((f"{machine}: {label}", of[machine] if of else []))
    truth = view.source.truth if view.source else None
    rows = "".join(f"<th>{title}</th>" for title, _ in columns)
    for place in range(5):
        rows += "</tr><tr>"
        for _, top in columns:
            name, share = top[place] if place < len(top) else ("", 0.0)
            fill = f"background:linear-gradient(to right,#cfe3f1 {100 * share:.0f}%,#f4f4f4 0)"
            text = f"<span>{_guess(name, truth, place == 0)}</span><span>{_percent(share)}</span>" if name else "–"
            rows += f'<td><div style="{fill}">{text}</div></td>'
    return f'<table class="top5"><tr>{rows}</tr></table>'


def _summary(report: StreamReport, extra: str) -> str:
    caption = f"“{escape(report.caption)}”" if report.caption else "no caption"
    repair = f"t0 = {report.t0}, K = {report.steps}" if report.t0 and report.steps else "no UNet"
    return (
        f'<div class="slim-sum"><b>{report.size} bytes</b> = {report.bpp:.3f} bits per pixel · {caption} · {repair}'
        f"{' · ' if extra else ''}<small>{extra}</small></div>"
    )


def _byte_bar(report: StreamReport) -> str:
    """Who spent what."""
    sizes = {part: round(bits / 8, 1) + 0.0 for part, bits in report.bits.items()}  # no "-0.0"
    total = sum(max(size, 0) for size in sizes.values())
    bar = "".join(
        f'<i style="width:{100 * max(size, 0) / total:.2f}%;background:{PART_COLOURS[part]}"></i>'
        for part, size in sizes.items()
    )
    key = "".join(f'<i style="background:{PART_COLOURS[part]}"></i>{part} {size:.1f}' for part, size in sizes.items())
    return f'<div class="bar">{bar}</div><div class="key">bytes:{key}</div>'
