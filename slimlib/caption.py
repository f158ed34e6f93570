"""Captions: words for a picture, and the few bytes that carry them.

`Captioner` looks at the RoI crop and says what it is. `CaptionPrior` is the fixed expectation, shared by
encoder and decoder, of which word follows which; with it a caption such as "a red fox" costs one or two
bytes, where a general-purpose compressor would make it longer. All of its numbers are integers, so both
sides agree exactly.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration

from slimlib.entropy import RangeDecoder, RangeEncoder
from slimlib.repro import atomic_write, pick_device, quiet_libraries
from slimlib.scales import hub_error, split_revision
from slimlib.stream import StreamError

MAX_CHARACTERS = 200
"""Longest caption, after `normalise`. Decoding stops there too, whatever damaged data claim."""


class Captioner:
    """A frozen BLIP captioning model (arXiv 2201.12086), decoded greedily: same picture, same words."""

    def __init__(self, model: BlipForConditionalGeneration, processor: Any, device: torch.device | str | None = None):
        self.device = pick_device(device)
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.processor = processor

    @classmethod
    def from_pretrained(
        cls, name: str | Path, variant: str | None = None, device: torch.device | str | None = None
    ) -> Captioner:
        """Load from a folder (never touching the network) or from a model hub ("owner/name@revision").

        Raises:
            FileNotFoundError: the folder does not exist.
            OSError: the hub does not give it; says why and what to do.
            ValueError: weights and architecture do not fit each other.
        """
        quiet_libraries()
        local = Path(name).is_dir()
        if not local and (isinstance(name, Path) or str(name).startswith((".", "/", "~"))):
            raise FileNotFoundError(f"no captioner at {name}: the folder does not exist")
        folder, revision = split_revision(name)
        where: dict[str, Any] = {"local_files_only": local, "revision": revision or "main"}
        try:
            model, info = BlipForConditionalGeneration.from_pretrained(
                folder,
                variant=variant,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **where,
            )
            processor = AutoProcessor.from_pretrained(folder, **where)
        except OSError as error:
            raise error if local else hub_error(str(name), error) from error
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(f"{name}: weights are missing or of another shape: {info}; is this a BLIP captioner?")
        return cls(model, processor, device)

    @torch.no_grad()
    def caption(self, images: Sequence[Image.Image], max_tokens: int = 20) -> list[str]:
        """One caption for each picture, normalised; at most `max_tokens` long, or what the model has places for."""
        if not images:
            return []
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        places = self.model.config.text_config.max_position_embeddings - 1  # the first is the start token's
        ids = self.model.generate(
            pixel_values=pixels.to(self.device),
            max_new_tokens=min(max_tokens, places),
            num_beams=1,
            do_sample=False,
        )
        return [normalise(text) for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


def normalise(text: str) -> str:
    """The form in which a caption travels: lower case, composed letters (NFC), single spaces.

    Raises:
        ValueError: the caption is too long, or holds characters that are not text.
    """
    words = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower()).split()
    text = " ".join(words)
    if not text.isprintable():
        odd = next(letter for letter in text if not letter.isprintable())
        raise ValueError(f"a caption may hold printable characters only, not {odd!r}")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the caption has {len(text)} characters; the limit is {MAX_CHARACTERS}: say it shorter")
    return text


class CaptionPrior:
    """How likely each word is after the one before: a bigram model that backs off to single words, then
    letters.

    Frequencies are integers out of about `UNIT`. After a known word, all but `BACK_OFF` of the mass goes to
    the words that were seen to follow it; the rest goes to all words by how common they are, and so does
    everything after an unknown word. Symbol `END` closes a caption; symbol `OTHER` announces a word that is
    not in the list and that follows as UTF-8 bytes.
    """

    END, OTHER = 0, 1  # symbols; word i of the list is symbol i + FIRST
    FIRST = 2
    UNIT = 1 << 20
    BACK_OFF = UNIT >> 5
    WORD_END = 256  # closes a spelled word; symbols below are byte values

    def __init__(
        self,
        words: Sequence[str],
        unigram: Sequence[int],
        bigram: dict[str, dict[str, int]],
        letters: Sequence[int],
    ):
        """Build from stored numbers; use `fit` or `load` instead.

        Args:
            words: the known words, sorted.
            unigram: how common END, OTHER and each word are; all positive.
            bigram: counts of what follows what; "" stands for the start (as key) and for the end (as
                follower).
            letters: how common each of the 256 byte values and the end are in spelled words; all positive.
        """
        if len(unigram) != len(words) + self.FIRST or len(letters) != 257 or min(*unigram, *letters) < 1:
            raise ValueError("the caption prior is damaged: its tables have the wrong length or hold a zero")
        self.words = list(words)
        self.index = {word: i + self.FIRST for i, word in enumerate(self.words)} | {"": self.END}
        for follows in bigram.values():
            if not follows or not set(follows) <= set(self.index) or min(follows.values()) < 1:
                raise ValueError("the caption prior is damaged: its bigram table does not fit its words")
        self.unigram = np.asarray(unigram, np.int64)
        self.bigram = bigram
        self.letters = np.asarray(letters, np.int64)

    @classmethod
    def fit(cls, captions: Iterable[str], tokenizer: Any = None) -> CaptionPrior:
        """Count words in captions.

        Args:
            captions: what the captioner says about training pictures; repeated as often as it says it.
            tokenizer: the captioner's; its whole words join the list with a count of one, so that a caption
                with words that it never used in training is still short. None: only the words seen.
        """
        sentences = [normalise(caption).split() for caption in captions]
        counts = Counter(word for sentence in sentences for word in sentence)
        known = {token for token in tokenizer.get_vocab() if _is_word(token)} if tokenizer is not None else set()
        words = sorted(known | set(counts))
        bigram: dict[str, Counter[str]] = {}
        for sentence in sentences:
            for before, after in pairwise(["", *sentence, ""]):
                bigram.setdefault(before, Counter())[after] += 1
        seen = sum(counts.values())
        unigram = [len(sentences) + 1, seen // 8 + 1] + [counts[word] + 1 for word in words]
        letters = np.ones(257, np.int64)
        for word in words:
            letters[list(word.encode())] += 1
        letters[cls.WORD_END] += len(words)
        return cls(words, unigram, {before: dict(after) for before, after in bigram.items()}, letters.tolist())

    def to_json(self) -> str:
        """All tables as text with sorted keys: the same characters for the same counts."""
        tables = {
            "bigram": self.bigram,
            "letters": self.letters.tolist(),
            "unigram": self.unigram.tolist(),
            "words": self.words,
        }
        return json.dumps(tables, sort_keys=True, ensure_ascii=False, separators=(",", ":")) + "\n"

    def save(self, path: str | Path) -> None:
        """Write as a JSON file."""
        atomic_write(path, self.to_json().encode())

    def fingerprint(self) -> bytes:
        """A hash of all tables."""
        return hashlib.sha256(self.to_json().encode()).digest()

    @classmethod
    def load(cls, path: str | Path) -> CaptionPrior:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is damaged.
        """
        try:
            tables = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(tables["words"], tables["unigram"], tables["bigram"], tables["letters"])
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a caption prior ({error})") from error

    def encode(self, coder: RangeEncoder, text: str) -> str:
        """Append a caption to the coder; returns it as it will be read back, normalised."""
        text = normalise(text)
        before = ""
        for word in [*text.split(), ""]:
            symbol = self.index.get(word, self.OTHER)
            coder.encode_categorical(symbol, self.frequencies(before))
            if symbol == self.OTHER:
                for letter in [*word.encode(), self.WORD_END]:
                    coder.encode_categorical(letter, self.letters)
            before = word
        return text

    def decode(self, coder: RangeDecoder) -> str:
        """Read a caption.

        Raises:
            StreamError: the data are damaged: what comes out is no caption that `encode` could have written.
        """
        words: list[str] = []
        while sum(map(len, words)) + len(words) - 1 <= MAX_CHARACTERS:  # so that damaged data cannot keep us here
            symbol = coder.decode_categorical(self.frequencies(words[-1] if words else ""))
            if symbol == self.END:
                text = " ".join(words)
                try:
                    if normalise(text) == text:
                        return text
                except ValueError:
                    pass
                break
            words.append(self._spelled(coder) if symbol == self.OTHER else self.words[symbol - self.FIRST])
        raise StreamError("the stream is damaged: its caption does not decode to text")

    def bits(self, text: str) -> float:
        """What a caption costs in bits, before the coder rounds up to bytes."""
        total, before = 0.0, ""
        for word in [*normalise(text).split(), ""]:
            table = self.frequencies(before)
            symbol = self.index.get(word, self.OTHER)
            total -= np.log2(table[symbol] / table.sum())
            if symbol == self.OTHER:
                spelled = self.letters[[*word.encode(), self.WORD_END]]
                total -= np.log2(spelled / self.letters.sum()).sum()
            before = word
        return float(total)

    def frequencies(self, before: str) -> np.ndarray:
        """Integer frequency of each symbol after the word `before` ("" at the start), all at least 1."""
        follows = self.bigram.get(before, {})
        share = self.BACK_OFF if follows else self.UNIT
        table = 1 + share * self.unigram // int(self.unigram.sum())
        total = sum(follows.values())
        for word, count in follows.items():
            table[self.index[word]] += (self.UNIT - share) * count // total
        return table

    def _spelled(self, coder: RangeDecoder) -> str:
        data = bytearray()
        while len(data) <= 4 * MAX_CHARACTERS:
            symbol = coder.decode_categorical(self.letters)
            if symbol == self.WORD_END:
                try:
                    return data.decode()
                except UnicodeDecodeError:
                    break
            data.append(symbol)
        raise StreamError("the stream is damaged: a word of its caption does not decode to text")


def _is_word(token: str) -> bool:
    """Whole words of a tokenizer's vocabulary: no word pieces, no special tokens."""
    return token.isalpha() and token == token.lower()
