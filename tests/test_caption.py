"""Captions: the captioner's words, and what they cost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from slimlib.caption import MAX_CHARACTERS, Captioner, CaptionPrior, normalise
from slimlib.data.scenes import CUTOUTS
from slimlib.entropy import RangeDecoder, RangeEncoder
from slimlib.stream import StreamError

NOUNS = sorted({cutout.noun for cutout in CUTOUTS})
TYPED = ["", "a", "a red fox on a bicycle", "A Red   FOX\t", "a zeppelin, painted blue; isn't it?", "Größe ÀÉÎ straße"]
TYPED += ["e\u0301 composed or not", "京都の 狐 🦊", "x" * MAX_CHARACTERS, "a " * (MAX_CHARACTERS // 2), "İSTANBUL"]
TYPED += ["🦊" * MAX_CHARACTERS, "<end> <other> [UNK] ##s", *NOUNS]


@pytest.fixture(scope="module")
def prior() -> CaptionPrior:
    return CaptionPrior.fit(NOUNS * 10)


def coded(prior: CaptionPrior, *texts: str) -> bytes:
    coder = RangeEncoder()
    for text in texts:
        prior.encode(coder, text)
    return coder.get_bytes()


def test_any_typed_caption_survives_alone_and_in_one_stream(prior: CaptionPrior) -> None:
    for text in TYPED:
        data = coded(prior, text)
        assert prior.decode(RangeDecoder(data)) == normalise(text) == normalise(normalise(text))
        assert len(data) == pytest.approx(prior.bits(text) / 8, abs=2)
    decoder = RangeDecoder(coded(prior, *TYPED))
    assert [prior.decode(decoder) for _ in TYPED] == [normalise(text) for text in TYPED]
    sizes = [len(coded(prior, noun)) for noun in NOUNS]
    assert max(sizes) <= 2 and sum(sizes) / len(sizes) < 1.5


def test_what_is_no_caption_is_refused(prior: CaptionPrior) -> None:
    for text in ("bell \a", "null \0", "\ud800", "a\u200bb", "x" * (MAX_CHARACTERS + 1)):
        with pytest.raises(ValueError, match="caption"):
            prior.encode(RangeEncoder(), text)


def test_frequencies_by_hand() -> None:
    """What followed a word gets 31/32 of the mass; the rest goes to all by how common they are."""
    prior = CaptionPrior.fit(["a moo", "A  dog", "a moo", "a"] * 3)
    assert prior.words == ["a", "dog", "moo"]
    common, unit = [13, 3, 13, 4, 7], 1 << 20  # the end, another word, and the words, each seen once more
    assert prior.frequencies("dragon").tolist() == [1 + unit * count // 40 for count in common]
    follow = [3, 0, 0, 3, 6]
    both = [1 + unit // 32 * c // 40 + (unit - unit // 32) * f // 12 for c, f in zip(common, follow, strict=True)]
    assert prior.frequencies("a").tolist() == both
    assert prior.letters[[*b"admo", 256, 0]].tolist() == [2, 2, 2, 3, 4, 1], "words that hold the letter, plus one"
    assert coded(prior, "a moo", "a dragon").hex() == "a256126fe273b8a8"


def test_damaged_data_end(prior: CaptionPrior) -> None:
    """Random bytes decode to a caption or raise; they never run on."""
    rng, captions = random.Random(0), 0
    for _ in range(300):
        try:
            text = prior.decode(RangeDecoder(rng.randbytes(rng.randrange(60))))
            assert normalise(text) == text
            captions += 1
        except StreamError as error:
            assert "caption" in str(error) or "payload" in str(error)
    assert captions  # a coder without redundancy takes most bytes for something
    for letters, reason in (([1] * 257, "not decode"), ([10**6] * 256 + [1], "not end")):
        wild = CaptionPrior(["a"], [1, 10**6, 1], {}, letters)  # hardly ever ends by itself
        with pytest.raises(StreamError, match=reason):
            wild.decode(RangeDecoder(rng.randbytes(3000)))


def test_files(prior: CaptionPrior, tmp_path: Path) -> None:
    prior.save(tmp_path / "a.json")
    CaptionPrior.fit(NOUNS[::-1] * 10).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes(), "the same counts, the same file"
    loaded = CaptionPrior.load(tmp_path / "a.json")
    assert loaded.fingerprint() == prior.fingerprint() != CaptionPrior.fit(NOUNS).fingerprint()
    assert coded(loaded, "a red fox") == coded(prior, "a red fox")
    with pytest.raises(FileNotFoundError):
        CaptionPrior.load(tmp_path / "none.json")
    good = {"words": ["fox"], "unigram": [1, 1, 1], "bigram": {"": {"fox": 1}}, "letters": [1] * 257}
    wrong = {"words": [], "unigram": [1, 0, 1], "letters": [1], "more": 1}
    bigrams = [{"bigram": {"": row}} for row in ({}, {"dog": 1}, {"fox": 0}, 3)]
    for text in ["", "[]", "{}", *(json.dumps(good | bad) for bad in [*({k: v} for k, v in wrong.items()), *bigrams])]:
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="prior"):
            CaptionPrior.load(tmp_path / "bad.json")


def test_captioner(tiny_world: Path, tmp_path: Path) -> None:
    captioner = Captioner.from_pretrained(tiny_world / "captioner", device="cpu")
    images = [Image.new("RGB", (50, 30), "red"), Image.new("L", (1, 1)), Image.new("RGB", (64, 64), "blue")]
    captions = captioner.caption(images)
    assert captions == captioner.caption(images) == [captioner.caption([image])[0] for image in images]
    assert all(normalise(text) == text and len(text.split()) <= 20 for text in captions)
    assert captioner.caption([]) == [] and captioner.floor == 0
    described = captioner.describe(images)
    assert [text for text, _ in described] == captions and all(0 < chance < 1 for _, chance in described)
    assert captioner.describe(images[:1])[0][1] == pytest.approx(described[0][1], rel=1e-3), "alone as among others"
    captioner.model.config.caption_floor = 0.3
    assert Captioner(captioner.model, captioner.processor, "cpu").floor == 0.3
    few = captioner.caption(images, max_tokens=1)
    assert few != captions and all(text.startswith(start) for text, start in zip(captions, few, strict=True))
    with pytest.raises(FileNotFoundError):
        Captioner.from_pretrained(tmp_path / "none")
