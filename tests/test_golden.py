"""Streams of each edition of the shipped weights, which stay decodable: by these weights, or by those of their commit.

`python tests/test_golden.py EDITION` writes a few streams into tests/golden/EDITION, and what they hold into
golden.json beside it: done once for each new set of weights, which the README's section on editions then names.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimlib import SlimCodec
from slimlib.data.scenes import PocketScenes
from slimlib.stream import StreamError, unpack

FOLDER = Path(__file__).resolve().parent / "golden"
EDITIONS = json.loads((FOLDER / "golden.json").read_text()) if FOLDER.exists() else {}
WISHES: dict[str, dict[str, Any]] = {
    "smallest": {"quality": 0.0},
    "middle": {"quality": 0.5, "seed": 7, "t0": 60, "steps": 3},
    "largest-without-words": {"quality": 1.0, "caption": None},
    "typed-words": {"quality": 0.3, "caption": "an okapi behind a wall"},
    "odd-sides": {"quality": 0.4},
}


def integers(codec: SlimCodec, stream: bytes) -> str:
    """sha256 of all integers that a stream decodes to: values of y in sixteenths, indices of scales, fineness."""
    hashed, synthesise = hashlib.sha256(), codec.compressor.synthesise

    def listen(*coded: Tensor) -> Tensor:
        for tensor, unit in zip(coded, (16, 1, 1, 1), strict=True):
            hashed.update((tensor.double() * unit).to(torch.int32).cpu().numpy().tobytes())
        return synthesise(*coded)

    codec.compressor.synthesise = listen  # type: ignore[method-assign]
    try:
        report = codec.inspect(stream)
    finally:
        del codec.compressor.synthesise
    return hashlib.sha256(hashed.digest() + repr((report.caption, report.t0, report.steps)).encode()).hexdigest()


@pytest.fixture(scope="module")
def codec() -> SlimCodec:
    return SlimCodec.from_pretrained("pocket", "cpu")


@pytest.mark.parametrize("edition", EDITIONS)
def test_streams_stay_decodable(codec: SlimCodec, edition: str) -> None:
    told = EDITIONS[edition]
    assert {path.stem for path in (FOLDER / edition).glob("*.slim")} == told["streams"].keys() == WISHES.keys()
    for name, held in told["streams"].items():
        stream = (FOLDER / edition / f"{name}.slim").read_bytes()
        assert unpack(stream)[0].fingerprint == told["weights"]
        if told["weights"] == codec.fingerprint:
            assert integers(codec, stream) == held
        else:
            with pytest.raises(StreamError, match="other weights"):
                codec.read(stream)


def test_the_shipped_weights_have_an_edition(codec: SlimCodec) -> None:
    assert [told["weights"] for told in EDITIONS.values()][-1] == codec.fingerprint


def main(edition: str) -> None:
    codec, image = SlimCodec.from_pretrained("pocket", "cpu"), PocketScenes("test")[3].image
    held = {}
    (FOLDER / edition).mkdir(parents=True, exist_ok=True)
    for name, wishes in WISHES.items():
        stream = codec.compress(image.crop((5, 0, 104, 93)) if name == "odd-sides" else image, **wishes)
        (FOLDER / edition / f"{name}.slim").write_bytes(stream)
        held[name] = integers(codec, stream)
    EDITIONS[edition] = {"weights": codec.fingerprint, "streams": held}
    (FOLDER / "golden.json").write_text(json.dumps(EDITIONS, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
