"""Text: byte-level BPE ids, the same on the way in and on the way out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from plait.runtime import PlaitError, write_atomic


class Text:
    """Strings <-> ids. User text never becomes a special token: they have no spelling here."""

    name = "text"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # An imported tokenizer knows spellings of its special tokens; in user text they are plain characters.
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Text:
        """Fit a byte-level BPE of at most `vocabulary` ids (at least the 256 bytes) on these texts."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=max(vocabulary, 256),
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[],
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> Text:
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise PlaitError(f"{path} is not a tokenizer that can be read: {error}.") from error

    def save(self, path: Path) -> None:
        write_atomic(path, self.tokenizer.to_str(pretty=True))

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(unicodedata.normalize("NFC", text), add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)
