"""Captions: the captioner's words, and what they cost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

from slimlib.caption import MAX_CHARACTERS, Captioner, CaptionPrior, normalise
from slimlib.entropy import RangeDecoder, RangeEncoder
from slimlib.scenes import CUTOUTS
from slimlib.stream import StreamError

NOUNS = sorted({cutout.noun for cutout in CUTOUTS})


@pytest.fixture(scope="module")
def prior() -> CaptionPrior:
    return CaptionPrior.fit(NOUNS * 10)


def coded(prior: CaptionPrior, text: str) -> bytes:
    coder = RangeEncoder()
    prior.encode(coder, text)
    return coder.get_bytes()


def test_template_captions_cost_a_byte_or_two(prior: CaptionPrior) -> None:
    sizes = [len(coded(prior, noun)) for noun in NOUNS]
    assert max(sizes) <= 2
    assert sum(sizes) / len(sizes) < 1.5
    for noun in NOUNS:
        assert prior.decode(RangeDecoder(coded(prior, noun))) == noun


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a red fox on a bicycle",
        "A Red   FOX\t",
        "a zeppelin, painted blue; isn't it?",
        "Größe ÀÉÎ straße",
        "e\u0301 composed or not",
        "京都の 狐 🦊",
        "x" * MAX_CHARACTERS,
        "a " * (MAX_CHARACTERS // 2),
        "🦊" * MAX_CHARACTERS,
        "<end> <other> [UNK] ##s",
        "İSTANBUL",
    ],
)
def test_any_typed_caption_survives(prior: CaptionPrior, text: str) -> None:
    data = coded(prior, text)
    assert prior.decode(RangeDecoder(data)) == normalise(text)
    assert len(data) == pytest.approx(prior.bits(text) / 8, abs=2)
    assert normalise(normalise(text)) == normalise(text)


@pytest.mark.parametrize("text", ["bell \a", "null \0", "\ud800", "a\u200bb", "x" * (MAX_CHARACTERS + 1)])
def test_what_is_no_caption_is_refused(prior: CaptionPrior, text: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        prior.encode(RangeEncoder(), text)


def test_captions_share_one_stream(prior: CaptionPrior) -> None:
    coder = RangeEncoder()
    texts = [*NOUNS[:20], "something unheard-of", ""]
    for text in texts:
        prior.encode(coder, text)
    decoder = RangeDecoder(coder.get_bytes())
    assert [prior.decode(decoder) for _ in texts] == texts


def test_damaged_data_end(prior: CaptionPrior) -> None:
    """Random bytes decode to a caption or raise; they never run on."""
    rng = random.Random(0)
    captions = 0
    for _ in range(300):
        try:
            text = prior.decode(RangeDecoder(rng.randbytes(rng.randrange(60))))
            captions += 1
            assert normalise(text) == text
        except StreamError as error:
            assert "caption" in str(error) or "payload" in str(error)
    assert captions  # a coder without redundancy takes most bytes for something
    wild = CaptionPrior(["a"], [1, 10**6, 1], {}, [1] * 257)  # hardly ever ends by itself
    with pytest.raises(StreamError):
        wild.decode(RangeDecoder(rng.randbytes(3000)))


def test_the_same_counts_give_the_same_file(prior: CaptionPrior, tmp_path: Path) -> None:
    prior.save(tmp_path / "a.json")
    again = CaptionPrior.fit(list(reversed(NOUNS * 10)))
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    loaded = CaptionPrior.load(tmp_path / "a.json")
    assert loaded.fingerprint() == prior.fingerprint()
    assert coded(loaded, "a red fox") == coded(prior, "a red fox")
    assert CaptionPrior.fit(NOUNS).fingerprint() != prior.fingerprint()


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CaptionPrior.load(tmp_path / "none.json")
    for text in ("", "[]", "{}", '{"words": [], "unigram": [0, 1], "bigram": {}, "letters": [1]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="prior"):
            CaptionPrior.load(tmp_path / "bad.json")
    tables = '{"words": [], "unigram": [1, 1], "bigram": {"": {"fox": 1}}, "letters": [' + "1," * 256 + "1]}"
    (tmp_path / "bad.json").write_text(tables)
    with pytest.raises(ValueError, match="prior"):
        CaptionPrior.load(tmp_path / "bad.json")


def test_captioner(tiny_world: Path) -> None:
    captioner = Captioner.from_pretrained(tiny_world / "captioner", device="cpu")
    images = [Image.new("RGB", (50, 30), "red"), Image.new("L", (1, 1)), Image.new("RGB", (64, 64), "blue")]
    captions = captioner.caption(images)
    assert captions == captioner.caption(images)
    assert captions == [captioner.caption([image])[0] for image in images]
    assert all(normalise(text) == text and len(text.split()) <= 20 for text in captions)
    assert captioner.caption([]) == []
    prior = CaptionPrior.fit(captions, captioner.processor.tokenizer)
    assert {"violin", "fox", "a"} <= set(prior.words)
    assert not any(word.startswith(("[", "##")) for word in prior.words)
    assert prior.bits("a violin") < 40


def test_captioner_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Captioner.from_pretrained(tmp_path / "none")
