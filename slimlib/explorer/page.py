"""The page: widgets around `engine.Explorer`, and nothing that could be tested without them.

Controls post what is wanted to a worker thread and return at once; answers come back on the kernel's own loop, stage by
stage. viewer.js and live.js draw them, look.css says how they look.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any
from urllib.parse import parse_qsl, urlencode

import anywidget
import ipywidgets as widgets
import torch
import traitlets
from PIL import Image

from slimlib.explorer.engine import RIVALS, Explorer, Rival, Settings, Source, View, data_url, first_of, roi_picture
from slimlib.measure.methods import CLASSIC_NAMES

THUMBNAILS = (43, 14, 86, 92, 138, 52, 15, 79, 45, 29, 35, 84)  # test scenes in the strip
SIZES = (24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024)  # bytes on the main slider
PHOTO = "These models know {} things, and take whatever they see for one of them. A link does not hold a photograph."
PHOTO_MACHINE = " Machine T is an ImageNet network of 1,000 classes, which has seen no picture of this project."
OPENED = """Decoded from the file alone: there is no original. The controls show how it was made, and cannot be moved.
Move the size, or choose a picture, and they are about the scene again. A link does not hold the file."""
MADE = ("caption", "words", "weights", "steps", "t0", "auto", "seed")  # controls that an opened file holds
OBJECT = "object and crop"
OVER = {"nothing": "", "where the bits went": "bits", "error": "error"}  # what may lie over it, in `View.pictures`
HERE = Path(__file__).parent
_url = functools.partial(data_url, lossless=True, quality=0, method=0)  # small: a server limits what a kernel may send


class Viewer(anywidget.AnyWidget):
    """One of the three parts that JavaScript draws; what `shown` holds for each is said in live.js."""

    _esm = f"{(HERE / 'viewer.js').read_text()}{(HERE / 'live.js').read_text()}export default {{ render }};"
    _css = (HERE / "look.css").read_text()
    part = traitlets.Unicode().tag(sync=True)  # "scenes", "picture", "facts"
    shown = traitlets.Dict().tag(sync=True)
    known = traitlets.Dict().tag(sync=True)  # Explorer.constants
    doing = traitlets.Unicode().tag(sync=True)  # what the worker is busy with, if it is
    said = traitlets.Unicode().tag(sync=True)  # a message
    query = traitlets.Unicode().tag(sync=True)  # the settings as a link


class Page:
    """The whole page; show `page.box`.

    Attributes:
        box: what to display.
        controls: by name, so that code can move them as a hand would.
        view: the answer on the page, or its first stage while the rest is worked on.
        answered: seconds from the last move to the first picture ("before") and to the finished one ("after").
    """

    def __init__(self, explorer: Explorer | None = None, **wanted: Any) -> None:
        """Build the page with a first answer in it; what the rivals make of it follows.

        Without an explorer it loads the models that are shipped; `wanted` are values for some of the controls.
        """
        self.photo: Source | None = None
        self._upload: tuple[bytes, str] | None = None  # a photograph that is not decoded yet: no move loses it
        self.view: View | None = None
        self.answered: dict[str, float] = {}
        # Who sees what at how many bytes, and the picture: of the original, of SLIM, of its rivals. "", None: not there
        self.rows: dict[str, tuple[int | str, Any, Image.Image | None]] = {}
        self._asked = 0.0  # when
        self._quiet = False
        self._loop: asyncio.AbstractEventLoop | None = None
        # Everything is computed in the worker's thread: each thread that computes keeps helpers of its own, and once
        # there are more of them than the processor has cores, all of them take longer.
        self._worker = Newest(self._post)
        self.explorer: Explorer = explorer or self._worker.apart(Explorer)
        self.rivals = {n: CLASSIC_NAMES.get(n, n) for n in (*RIVALS, *self.explorer.pixel_codecs)}  # with their names
        self._build()
        self._defaults = {name: control.value for name, control in self.controls.items()}
        self._move(wanted)
        self._submit(functools.partial(self.explorer.look, self.settings), "compressing")
        self._worker.wait()
        self._address()
        for control in self.controls.values():
            control.observe(self._changed, "value")
        for upload in (self.camera, self.opener):
            upload.observe(self._uploaded, "value")
        with contextlib.suppress(RuntimeError):  # no kernel around: a script or a test
            self._loop = asyncio.get_running_loop()
        asked = self.explorer.scene(self.settings.scene), self.settings.size, self.rivals
        self._submit(functools.partial(self.explorer.rivals, *asked), "")

    @property
    def settings(self) -> Settings:
        """What the controls say."""
        values = {name: control.value for name, control in self.controls.items()}
        words = {"automatic": "auto", "none": ""}.get(values["caption"], values["words"])
        walk = {} if values["auto"] else {name: values[name] for name in ("t0", "steps")}
        same = {name: values[name] for name in ("scene", "weights", "seed", "size")}
        return Settings(**same, **walk, caption=words)

    def wait(self, timeout: float = 60) -> bool:
        """Until what was asked is answered, the other codecs too; for scripts. False if that takes longer."""
        return self._worker.wait(timeout)

    def follow(self, query: str) -> None:
        """Show what a link says, and the usual where it says nothing, or nothing that can be."""
        self.photo, self._upload, self.picture.said = None, None, ""
        for values in (self._defaults, dict(parse_qsl(query))):
            self._move(values)
        self._ask()

    # ---- asking

    def _move(self, values: dict[str, Any]) -> None:
        """Move some controls by their names, and ask for nothing. Values may be strings; what cannot be is left out."""
        before, self._quiet = self._quiet, True
        for name in values.keys() & self.controls.keys():
            control, value = self.controls[name], values[name]
            with contextlib.suppress(ValueError, KeyError, traitlets.TraitError):
                is_flag = isinstance(control.value, bool)
                read = {"True": True, "False": False}[str(value)] if is_flag else type(control.value)(value)
                if getattr(control, "min", read) <= read <= getattr(control, "max", read):
                    control.value = read
        self._quiet = before
        opened = bool(self.view and not self.view.source)
        for name in MADE:
            self.controls[name].disabled = opened or (name in ("t0", "steps") and self.controls["auto"].value)

    def _changed(self, change: Any) -> None:
        """A hand moved a control."""
        if self._quiet:
            return
        moved = next(name for name, control in self.controls.items() if control is change["owner"])
        if moved == "scene":
            self.photo = self._upload = None
        self._move({"caption": "typed"} if moved == "words" else {})
        if moved in ("left", "over"):
            self._address()
            self._draw()
        else:
            self.picture.said = ""
            self._ask()

    def _ask(self, upload: tuple[bytes, str] | None = None) -> None:
        self._address()
        self._upload = upload or self._upload
        self._submit(functools.partial(self._answer, self.settings, self.photo, self._upload), "compressing")

    def _address(self) -> None:
        """The link to what is shown; there is none to a photograph."""
        values = {name: control.value for name, control in self.controls.items()}
        usual = {"t0": values["auto"], "steps": values["auto"], "words": values["caption"] != "typed"}
        if not self.photo:
            self.picture.query = urlencode({name: value for name, value in values.items() if not usual.get(name)})

    def _answer(self, settings: Settings, photo: Source | None, upload: tuple[bytes, str] | None) -> Iterator[Any]:
        """The worker's job: a photograph that came in, the views, and what others make of as many bytes."""
        if upload:
            photo = self.explorer.photo(*upload)
            yield photo
        yield from self.explorer.look(settings, photo)
        yield from self.explorer.rivals(photo or self.explorer.scene(settings.scene), settings.size, self.rivals)

    def _submit(self, job: Callable[[], Iterator[Any]], doing: str) -> None:
        self._asked, self.picture.doing = perf_counter(), doing
        self._worker.submit(job)

    def _uploaded(self, change: Any) -> None:
        """A photograph, or a .slim file, came in."""
        for file in change["new"]:
            data, name = bytes(file["content"]), str(file["name"])
            change["owner"].value = ()  # so that the same file can come again
            self.picture.said = ""
            if change["owner"] is self.camera:
                self._ask((data, name))
            else:
                self._submit(functools.partial(self.explorer.open_stream, data, name), "decompressing")

    def _said(self, widget: Any, message: dict[str, Any], buffers: Any) -> None:
        """What live.js says: a sign of life is wanted, a thumbnail was pressed, or the address is another."""
        if "scene" in message:  # also the way back from a photograph or an opened file
            self._move(message)
            self._changed({"owner": self.controls["scene"]})
        elif "query" in message:
            self.follow(message["query"])
            widget.send({"query": self.picture.query})
        elif "hello" in message:  # what came while the page was loading may be lost
            widget.send_state("shown")
        else:
            widget.send({})

    def _pin(self, _: Any) -> None:
        """What stands right of the line may stand left from now on."""
        self.rows["pinned"], left = self.rows["SLIM"], self.controls["left"]
        left.options = tuple(dict.fromkeys([*left.options, "pinned"]))
        left.value = "pinned"
        self._draw()

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
            self._show(result, newest)
        elif not newest:
            return
        elif isinstance(result, Rival):
            needs = result.size if result.fits else f"needs {result.size}"
            self.rows[result.name] = needs, result.guesses, result.image
            self._draw()
        elif isinstance(result, Source):
            self.photo, self._upload = result, None
        else:
            moved = self._upload and self.view and self.view.source and self.view.settings != self.settings
            self._upload = None
            known = isinstance(result, (ValueError, IndexError))
            self.picture.said = str(result) if known else f"That failed: {type(result).__name__}: {result}"
            self.picture.doing = ""
            if moved:  # since a photograph came that is none
                self._ask()

    def _show(self, view: View, newest: bool) -> None:
        """Put a stage of an answer on the page; `newest` if there was no other move meanwhile."""
        report, source = view.report, view.source
        if view.step and not view.done:
            self.picture.doing = f"UNet, step {view.step} of {report.steps}"
            return
        before, self.view = self.view, view
        same = before and before.source is source and before.pictures["before"].size == view.pictures["before"].size
        pinned = self.rows.get("pinned") if same else None  # of the same picture
        if newest:
            self.answered["after" if view.done else "before"] = perf_counter() - self._asked
            self.picture.doing = "" if view.done else "UNet"
        self.rows = {"before the UNet": (report.size, view.guesses["before"], view.pictures["before"])}
        self.rows["SLIM"] = report.size, view.guesses.get("after"), view.pictures.get("after", view.pictures["before"])
        if source:
            known = {"original": ("", source.guesses, source.image), OBJECT: ("", {}, source.image)}
            self.rows = known | self.rows | dict.fromkeys(self.rivals.values(), ("", None, None))
        elif newest:  # the controls show what an opened file says
            size = next((size for size in SIZES if size >= report.size), SIZES[-1])
            told = {name: getattr(report, name) for name in ("steps", "t0", "seed")} | {"words": report.caption or ""}
            told |= {"caption": "typed" if report.caption else "none", "weights": view.settings.weights}
            self.controls["steps"].max = max(self.controls["steps"].max, report.steps)
            self._move({**told, "size": size, "auto": False})
        left = self.controls["left"]
        if pinned:
            self.rows["pinned"] = pinned if pinned[1] else self.rows["SLIM"]  # it was not finished
        elif "pinned" in left.options:  # it cannot be chosen any more, nor linked to
            chosen, self._quiet = left.value, True
            left.options, self._quiet = left.options[:-1], False  # which chooses the first
            self._move({"left": chosen})
            self.picture.query = self.picture.query.replace("left=pinned", "left=original")
        self._move({"t0": report.t0, "steps": report.steps} if self.controls["auto"].value else {})
        if self.controls["caption"].value != "typed":
            self._move({"words": report.caption or ""})
        self._draw()

    def _draw(self) -> None:
        """Hand what is known to the JavaScript."""
        assert self.view
        view, report, source = self.view, self.view.report, self.view.source
        rows = {n: {"name": n, "bytes": b, "seen": seen and first_of(seen)} for n, (b, seen, _) in self.rows.items()}
        scene = source if source and source.truth else None

        def side(name: str) -> dict[str, Any] | None:
            image = self.rows.get(name, (0, None, None))[2]
            if source and view.box and name == OBJECT:  # drawn when it is shown alone
                image = roi_picture(source.image, view.box, source.matte)
            return {**rows[name], "url": _url(image)} if image else None

        left, lies = (self.controls[name].value for name in ("left", "over"))
        over = {"name": lies, "url": _url(image)} if (image := view.pictures.get(OVER[lies])) else None
        self.picture.shown = {"left": side(left), "right": side("SLIM"), "over": over}
        said = f"{report.size} bytes, {report.bpp:.3f} bits per pixel, "
        said += f"“{report.caption}”, " if report.caption else "no caption, "
        said += f"t0 = {report.t0}, K = {report.steps}. " if report.t0 and report.steps else "no UNet. "
        if not source:
            said += OPENED
        elif not scene:
            said += f"{source.note}. {PHOTO.format(len(self.explorer.machines['A'].classes))}"
            said += PHOTO_MACHINE if "T" in self.explorer.photo_machines else ""
        settings = replace(view.settings, quality=round(report.quality, 4))
        name = f"scene{settings.scene}" if scene else source.name if source else "opened"
        self.facts.shown = {
            "title": scene.name.partition(": ")[2] if scene else source.name if source else view.name,
            "truth": scene and scene.truth,
            "summary": said,
            "parts": {part: round(bits / 8, 1) for part, bits in report.bits.items()},
            "bpp": report.bpp if scene else None,
            "rows": [row for name, row in rows.items() if name != OBJECT],
            "file": f"{name}_{report.size}.slim",
            "stream": base64.b64encode(view.stream).decode(),
            "code": self.explorer.code(settings, None if scene else source) if source else "",
        }
        self.scenes.shown = self.scenes.shown | {"on": settings.scene if scene else None}

    # ---- widgets

    def _build(self) -> None:
        """All controls and places, and how they stand together."""
        scenes, size = [(index, self.explorer.scenes[index]) for index in THUMBNAILS], (64, 64)
        pictures = [(i, s.noun, _url(s.image.resize(size, Image.Resampling.LANCZOS))) for i, s in scenes]
        self.scenes = Viewer(part="scenes", shown={"pictures": pictures, "on": None})
        self.picture, self.facts = Viewer(part="picture"), Viewer(part="facts", known=self.explorer.constants())
        for viewer in (self.scenes, self.picture, self.facts):
            viewer.on_msg(self._said)
        sizes = [(f"{size} bytes", size) for size in SIZES]
        self.controls: dict[str, Any] = {
            "size": widgets.SelectionSlider(options=sizes, value=64, description="Size of the file, at most"),
            "left": _choice("Left of the line", "original", OBJECT, "before the UNet", *self.rivals.values()),
            "over": _choice("Over the picture", *OVER),
            "caption": _choice("Caption that is sent", "automatic", "none", "typed"),
            "words": widgets.Text(placeholder="type a caption, even a wrong one", description="words"),
            "weights": _choice("Weights", *self.explorer.weights),
            "steps": widgets.IntSlider(max=20, description="steps K"),
            "t0": widgets.IntSlider(max=999, description="t0"),
            "auto": widgets.Checkbox(True, description="t0 and K follow the quality", indent=False),
            "seed": widgets.BoundedIntText(max=2**32 - 1, description="seed"),
            "scene": widgets.BoundedIntText(43, max=len(self.explorer.scenes) - 1, description="scene"),
        }
        kinds, upload = "image/*,.jxl,.avif,.heic", functools.partial(widgets.FileUpload, icon="")
        self.camera = upload(accept=kinds, description="a photograph …", _dom_classes=["photo"])
        self.opener = upload(accept=".slim", description="open .slim …", _dom_classes=["stream"])
        said = "SLIM compresses a picture for a classifier. Slide the size of its file; drag the line in the picture."
        pin, reset = widgets.Button(description="pin this"), widgets.Button(description="reset")
        pin.on_click(self._pin)
        reset.on_click(lambda _: self.follow(""))
        head = widgets.HTML(f"<h1>What does the machine still see?</h1> {said}")
        size, left, over, caption, words, weights, steps, t0, auto, seed, scene = self.controls.values()
        stage = _box("stage", _box("rate", size), self.picture)
        compared = left, over, caption, _box("row", words, pin, reset), weights
        repair = _box("row number", steps, t0, auto, seed)
        files = _box("row number", scene, self.camera, self.opener)
        side = _box("side", *compared, repair, files, self.facts)
        self.box = _box("slim", head, self.scenes, _box("main", stage, side))


def _box(kinds: str, *children: widgets.Widget) -> widgets.VBox:
    """Widgets in a box that the style sheet knows by its kinds."""
    return widgets.VBox(children, _dom_classes=kinds.split())


def _choice(title: str, *options: str) -> widgets.RadioButtons:
    return widgets.RadioButtons(options=options, description=title, orientation="horizontal")


class Newest:
    """Runs jobs in one thread of its own, always the newest; an older one is dropped at its next result.

    A job is a function that returns an iterator. Its first result is delivered even if a newer job waits (something
    moves while a slider is dragged), the others only as long as it is the newest. Results arrive in the order of the
    jobs, so an old one never replaces a new one; but where the newest fails at once, what it interrupted goes on.
    """

    def __init__(self, deliver: Callable[[int, Any], None]) -> None:
        """`deliver` gets a job's number and a result, or the exception that ended it, in the worker's thread."""
        self._deliver, self.newest = deliver, 0
        self._undone: Iterator[Any] = iter(())  # of the job before
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
        return not wait([last := self._last], timeout).not_done and (last is self._last or self.wait(timeout))

    def apart(self, work: Callable[[], Any]) -> Any:
        """The result of some work, done in the worker's thread while the caller waits."""
        return self._thread.submit(work).result()

    def _run(self, number: int, job: Callable[[], Iterator[Any]]) -> None:
        undone, self._undone = self._undone, job()
        if number != self.newest:
            return
        try:
            for i, result in enumerate(self._undone):
                if i == 0 or number == self.newest:
                    undone = iter(())
                    self._deliver(number, result)
                else:
                    self._undone = chain([result], self._undone)
                if number != self.newest:
                    return
        except Exception as error:  # a page must tell what went wrong, and go on with what was asked before
            self._deliver(number, error)
            self._run(number, lambda: undone)
