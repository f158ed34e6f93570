"""Rebuild assets/scenes/ from the Debian packages named in catalogue.csv.

    python assets/scenes/build.py            downloads the packages with apt, rebuilds, compares with SHA256SUMS
    python assets/scenes/build.py --debs DIR takes packages that were downloaded before
    python assets/scenes/build.py --write    accepts the result: rewrites SHA256SUMS and CREDITS.md

Nothing is replaced unless every package is the expected one; a package or a picture that differs is named.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
CUTOUT_SIDE, BACKGROUND_SIDE = 192, 640
Image.MAX_IMAGE_PIXELS = 64_000_000  # the largest wallpaper has 15 megapixels


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(packages: list[str], folder: Path) -> None:
    """Download the packages with apt into `folder`."""
    if shutil.which("apt-get") is None:
        sys.exit("apt-get is not to be found: run this on Debian 12 or Ubuntu, or give --debs a folder of .deb files")
    subprocess.run(["apt-get", "download", "-qq", *packages], cwd=folder, check=True)


def unpack(folder: Path, package: str, into: Path) -> Path:
    """Unpack the one .deb of a package and return its path."""
    found = sorted(folder.glob(f"{package}_*.deb"))
    if len(found) != 1:
        sys.exit(f"expected one file {package}_*.deb in {folder}, found {len(found)}")
    subprocess.run(["dpkg-deb", "-x", found[0], into], check=True)
    return found[0]


def build_cutout(source: Path, target: Path) -> None:
    """Trim a stamp to its matte, shrink it (with premultiplied alpha, so no dark seam appears), store as WebP."""
    image = Image.open(source).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    if max(image.size) > CUTOUT_SIDE:
        scale = CUTOUT_SIDE / max(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    pixels = np.array(image)
    pixels[pixels[..., 3] == 0] = 0  # what nobody sees costs nothing
    Image.fromarray(pixels).save(target, lossless=True, quality=100, method=6, exact=True)


def build_background(source: Path, target: Path, box: str) -> None:
    """Cut the box (fractions: left top right bottom) out of a photograph, shrink it, store as WebP."""
    image = ImageOps.exif_transpose(Image.open(source)).convert("RGB")
    left, top, right, bottom = (float(value) for value in box.split())
    w, h = image.size
    image = image.crop((round(left * w), round(top * h), round(right * w), round(bottom * h)))
    image.thumbnail((BACKGROUND_SIDE, BACKGROUND_SIDE), Image.Resampling.LANCZOS)
    image.save(target, quality=88, method=6)


def write_credits(rows: list[dict]) -> None:
    """CREDITS.md: every picture with its author, licence and place in its Debian package."""
    lines = [
        "# Credits of the pictures",
        "",
        "Built by `build.py` from Debian packages; the copyright file of each package is the authority.",
        "Pictures keep the licence of their source; what is made from them (scenes, weights trained on them)",
        "is shared under GPL-2+ and CC-BY-SA accordingly.",
        "",
        "| file | author | licence | package | path in the package |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(f"| {row['file']} | {row['author']} | {row['licence']} | {row['package']} | {row['source']} |")
    (HERE / "CREDITS.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debs", type=Path, help="folder with the .deb files (default: download them)")
    parser.add_argument("--write", action="store_true", help="accept what was built and rewrite SHA256SUMS")
    arguments = parser.parse_args()

    rows = list(csv.DictReader((HERE / "catalogue.csv").open()))
    packages = sorted({row["package"] for row in rows})
    sums_file = HERE / "SHA256SUMS"
    known = dict(line.split("  ")[::-1] for line in sums_file.read_text().splitlines()) if sums_file.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        debs = arguments.debs
        if debs is None:
            debs = work / "debs"
            debs.mkdir()
            fetch(packages, debs)
        sums, differing = {}, []
        for package in packages:
            deb = unpack(debs, package, work / package)
            sums[f"package/{package}"] = sha256(deb)
        differing += [name for name in sums if name in known and known[name] != sums[name]]
        if differing and not arguments.write:
            sys.exit("these packages differ from those that the pictures came from: " + ", ".join(differing))

        out = work / "out"
        for row in tqdm(rows, unit="picture"):
            source, target = work / row["package"] / row["source"], out / row["file"]
            if not source.exists():
                sys.exit(f"package {row['package']} holds no {row['source']}")
            target.parent.mkdir(parents=True, exist_ok=True)
            if row["kind"] == "cutout":
                build_cutout(source, target)
            else:
                build_background(source, target, row["box"])
            sums[row["file"]] = sha256(target)
        differing = [name for name in sums if known.get(name) != sums[name]]
        if differing and not arguments.write:
            sys.exit(
                f"{len(differing)} pictures differ from SHA256SUMS (another Pillow or libwebp?): "
                + ", ".join(differing[:5])
                + "\nnothing was changed; run with --write to accept them"
            )
        for kind in ("cutouts", "backgrounds"):
            shutil.rmtree(HERE / kind, ignore_errors=True)
            shutil.copytree(out / kind, HERE / kind)
    if arguments.write:
        sums_file.write_text("".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))
        write_credits(rows)
    print(f"{len(rows)} pictures, {'accepted' if arguments.write else 'equal to the byte'}")


if __name__ == "__main__":
    main()
