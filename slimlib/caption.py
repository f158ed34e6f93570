"""Captions: words for a picture, and the few bytes that carry them.

`Captioner` looks at the RoI crop and says what it is. `CaptionPrior` is the fixed expectation, shared by encoder and
decoder, of which word follows which; with it a caption such as "a red fox" costs one or two bytes, where a
general-purpose compressor would make it longer. All of its numbers are integers, so both sides agree exactly.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration

from slimlib.entropy import RangeDecoder, RangeEncoder
from slimlib.images import check_finite
from slimlib.scales import load_plain, load_pretrained, reading
from slimlib.stream import StreamError
from slimlib.utils import Device, pick_device, quiet_libraries, write_file

CAPTION_PRIOR = "caption_prior.json"
"""Name of the caption prior's file in the compressor's folder."""
MAX_CHARACTERS = 200
"""Longest caption, after `normalise`. Decoding stops there too, whatever damaged data claim."""


class Captioner:
    """A frozen BLIP captioning model (arXiv 2201.12086), decoded greedily: same picture, same words.

    `floor`, which its config may name as "caption_floor", is the least probability of a caption that a codec sends.
    """

    def __init__(self, model: BlipForConditionalGeneration, processor: Any, device: Device = None):
        self.device = pick_device(device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.processor, self.floor = processor, float(getattr(model.config, "caption_floor", 0.0))

    @classmethod
    def from_pretrained(cls, name: str | Path, device: Device = None) -> Captioner:
        """Load from a folder or from a model hub ("owner/name@revision"); raises as `scales.load_pretrained` does."""
        quiet_libraries()
        model = load_pretrained(BlipForConditionalGeneration, name, dtype=torch.float32)
        for weights in model.parameters():  # else it would say one word of every picture
            check_finite(weights, f"the captioner {name}")
        return cls(model, load_plain(AutoProcessor, name), device)

    def caption(self, images: Sequence[Image.Image], max_tokens: int = 20) -> list[str]:
        """One caption for each picture, normalised; at most `max_tokens` long, or what the model has places for."""
        return [text for text, _ in self.describe(images, max_tokens)]

    @torch.no_grad()
    def describe(self, images: Sequence[Image.Image], max_tokens: int = 20) -> list[tuple[str, float]]:
        """Captions as `caption` has them, each with the probability that the model gives it."""
        if not images:
            return []
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        places = self.model.config.text_config.max_position_embeddings - 1  # the first is the start token's
        how = {"max_new_tokens": min(max_tokens, places), "num_beams": 1, "do_sample": False}
        how |= {"output_logits": True, "return_dict_in_generate": True}
        found = self.model.generate(pixel_values=pixels.to(self.device), **how)
        words = found.sequences[:, -len(found.logits) :]
        chances = torch.stack(found.logits, 1).log_softmax(-1).gather(2, words[..., None])[..., 0]
        chances = chances.masked_fill(words == self.model.config.text_config.pad_token_id, 0).sum(1).exp()
        texts = self.processor.batch_decode(found.sequences, skip_special_tokens=True)
        return [(normalise(text), chance) for text, chance in zip(texts, chances.tolist(), strict=True)]


def normalise(text: str) -> str:
    """The form in which a caption travels: lower case, composed letters (NFC), single spaces; or ValueError."""
    text = " ".join(unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower()).split())
    if not text.isprintable():
        odd = next(letter for letter in text if not letter.isprintable())
        raise ValueError(f"a caption may hold printable characters only, not {odd!r}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the caption has {len(text)} characters; the limit is {MAX_CHARACTERS}: say it shorter")
    return text


@dataclass(eq=False, repr=False)
class CaptionPrior:
    """How likely each word is after the one before: a bigram model that backs off to single words, then letters.

    Frequencies are integers out of about `UNIT`. After a known word, all but `BACK_OFF` of the mass goes to the words
    that were seen to follow it; the rest goes to all words by how common they are, and so does everything after an
    unknown word. Symbol `END` closes a caption; symbol `OTHER` announces a word that is not in the list and that
    follows as UTF-8 bytes.
    """

    words: list[str]  # the known words, sorted
    unigram: np.ndarray  # how common END, OTHER and each word are: positive integers
    bigram: dict[str, dict[str, int]]  # counts of what follows what; "" is the start (as key) and the end (as follower)
    letters: np.ndarray  # how many words hold each of the 256 byte values, and all that end: positive integers

    END, OTHER, FIRST = 0, 1, 2  # symbols; word i of the list is symbol i + FIRST
    UNIT = 1 << 20
    BACK_OFF = UNIT >> 5
    WORD_END = 256  # closes a spelled word; symbols below are byte values

    def __post_init__(self) -> None:
        self.index = {word: i + self.FIRST for i, word in enumerate(self.words)} | {"": self.END}
        sound = len(self.unigram) == len(self.words) + self.FIRST and len(self.letters) == 257
        sound = sound and all(row and row.keys() <= self.index.keys() for row in self.bigram.values())
        counts = chain(self.unigram, self.letters, *(row.values() for row in self.bigram.values()))
        if not sound or min(counts) < 1:
            raise ValueError("the caption prior is damaged: its tables do not fit each other, or hold a zero")
        self.unigram, self.letters = np.asarray(self.unigram, np.int64), np.asarray(self.letters, np.int64)
        # What each symbol gets by how common it is: of the whole mass, and of what the words seen to follow leave.
        self._alone, self._rest = (1 + m * self.unigram // self.unigram.sum() for m in (self.UNIT, self.BACK_OFF))

    @classmethod
    def fit(cls, captions: Iterable[str]) -> CaptionPrior:
        """Count words in captions: what the captioner says of training pictures, repeated as often as it says it."""
        sentences = [normalise(caption).split() for caption in captions]
        counts = Counter(word for sentence in sentences for word in sentence)
        bigram: dict[str, dict[str, int]] = defaultdict(Counter)
        for sentence in sentences:
            for before, after in pairwise(["", *sentence, ""]):
                bigram[before][after] += 1
        words = sorted(counts)
        unigram = [len(sentences) + 1, counts.total() // 8 + 1] + [counts[word] + 1 for word in words]
        letters = Counter(letter for word in words for letter in {*word.encode(), cls.WORD_END})
        return cls(words, np.array(unigram), dict(bigram), np.array([letters[i] + 1 for i in range(257)]))

    @classmethod
    def load(cls, path: str | Path) -> CaptionPrior:
        """Read what `save` wrote; FileNotFoundError if there is nothing, ValueError if the file is damaged."""
        with reading(path, "a caption prior"):
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def save(self, path: str | Path) -> None:
        """Write as a JSON file."""
        write_file(path, self._json())

    def fingerprint(self) -> bytes:
        """A hash of all tables."""
        return hashlib.sha256(self._json()).digest()

    def encode(self, coder: RangeEncoder, text: str) -> None:
        """Append a caption to the coder, normalised."""
        for symbol, table in self._symbols(text):
            coder.encode_categorical(symbol, table)

    def decode(self, coder: RangeDecoder) -> str:
        """Read a caption; StreamError if the data are damaged, and it is none that `encode` could have written."""
        words: list[str] = []
        while len(" ".join(words)) <= MAX_CHARACTERS:  # so that damaged data cannot keep us here
            symbol = coder.decode_categorical(self.frequencies(words[-1] if words else ""))
            if symbol == self.END:
                break
            words.append(self._spelled(coder) if symbol == self.OTHER else self.words[symbol - self.FIRST])
        with contextlib.suppress(ValueError):
            if (text := " ".join(words)) == normalise(text):
                return text
        raise StreamError("the stream is damaged: its caption does not decode to text")

    def bits(self, text: str) -> float:
        """What a caption costs in bits, before the coder rounds up to bytes."""
        return sum(float(np.log2(table.sum() / table[symbol])) for symbol, table in self._symbols(text))

    def frequencies(self, before: str) -> np.ndarray:
        """Integer frequency of each symbol after the word `before` ("" at the start), all at least 1."""
        follows = self.bigram.get(before)
        if not follows:
            return self._alone
        table, counts = self._rest.copy(), np.array([*follows.values()], np.int64)
        table[[self.index[word] for word in follows]] += (self.UNIT - self.BACK_OFF) * counts // counts.sum()
        return table

    def _symbols(self, text: str) -> Iterator[tuple[int, np.ndarray]]:
        """The symbols that say a caption, each with the frequencies that hold in its place."""
        for before, word in pairwise(["", *normalise(text).split(), ""]):
            symbol = self.index.get(word, self.OTHER)
            yield symbol, self.frequencies(before)
            if symbol == self.OTHER:
                for letter in [*word.encode(), self.WORD_END]:
                    yield letter, self.letters

    def _spelled(self, coder: RangeDecoder) -> str:
        data = bytearray()
        while (symbol := coder.decode_categorical(self.letters)) != self.WORD_END:
            data.append(symbol)
            if len(data) > 4 * MAX_CHARACTERS:
                raise StreamError("the stream is damaged: a word of its caption does not end")
        return data.decode(errors="surrogateescape")  # what is not UTF-8 becomes no text, which `decode` refuses

    def _json(self) -> bytes:
        """All tables as text with sorted keys: the same characters for the same counts."""
        tables = {field.name: getattr(self, field.name) for field in fields(self)}
        text = json.dumps(tables, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=np.ndarray.tolist)
        return f"{text}\n".encode()
