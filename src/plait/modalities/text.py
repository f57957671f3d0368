"""Text: byte-level BPE ids, the same on the way in and on the way out."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from plait.core.errors import PlaitError
from plait.core.files import read_json, write_atomic

log = logging.getLogger(__name__)

# What is kept of an imported tokenizer's `tokenizer_config.json`.
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how SentencePiece spells a byte that is no character
_ALONE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # characters that are words: kana, Han


def _byte_letters() -> dict[str, int]:
    """The letter by which byte-level BPE spells each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_LETTERS = _byte_letters()


class Text:
    """Strings <-> ids. User text never becomes a special token: they have no spelling here."""

    name = "text"

    def __init__(self, tokenizer: Tokenizer, settings: dict[str, Any] | None = None) -> None:
        """`settings` are those of an imported tokenizer: its chat template and the names of its special tokens."""
        self.tokenizer = tokenizer
        self.settings = settings or {}
        # An imported tokenizer knows spellings of its special tokens; in user text they are plain characters.
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Text:
        """Fit a byte-level BPE of at most `vocabulary` ids (at least the 256 bytes) on these texts."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()  # an import has its own, or none
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
    def load(cls, path: Path, rows: int | None = None) -> Text:
        """The tokenizer of a file, with what the files beside it say of chat and special tokens.

        `rows` are those of the model's embedding: tokens that were added to the vocabulary beyond them can never be
        read, and are left out with a note. Raises PlaitError where the file cannot be read.
        """
        try:
            tokenizer = Tokenizer.from_file(str(path))
            size = tokenizer.get_vocab_size(with_added_tokens=True)
            if rows is not None and size > rows >= tokenizer.get_vocab_size(with_added_tokens=False):
                log.warning("%s knows %d tokens, the model %d: the last are left out.", path, size, rows)
                tokenizer = _with_fewer_tokens(path, rows)
        except Exception as error:  # the library raises bare Exception
            raise PlaitError(f"{path} is not a tokenizer that can be read: {error}.") from error
        return cls(tokenizer, _settings(path.parent))

    def save(self, path: Path) -> None:
        write_atomic(path, self.tokenizer.to_str(pretty=True))

    @property
    def size(self) -> int:
        """How many ids the tokenizer has."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template by which an imported model wants conversations written; None where it has none."""
        return self.settings.get("chat_template")

    @cached_property
    def start(self) -> list[int]:
        """What an imported tokenizer puts in front of every text, as Llama's beginning of text; else nothing."""
        if self.tokenizer.post_processor is None:
            return []
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        encoded = self.tokenizer.encode("a").ids
        return next((encoded[:at] for at in range(len(encoded)) if encoded[at : at + len(plain)] == plain), [])

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]  # `tokenizer.encode` would keep other threads waiting

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Where each of a text's ids begins and ends in it, in characters."""
        return self.tokenizer.encode(text, add_special_tokens=False).offsets

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for, also those of a part of a character."""
        decoders_ = json.dumps(json.loads(self.tokenizer.to_str())["decoder"], ensure_ascii=False)
        vocabulary = self.tokenizer.get_vocab()
        by_id = [b""] * (max(vocabulary.values(), default=-1) + 1)
        added = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        for token, id_ in vocabulary.items():
            byte = _BYTE.fullmatch(token) if "ByteFallback" in decoders_ else None
            if token in added:
                by_id[id_] = token.encode()
            elif '"ByteLevel"' in decoders_ and all(letter in _LETTERS for letter in token):
                by_id[id_] = bytes(_LETTERS[letter] for letter in token)
            elif byte is not None:
                by_id[id_] = bytes([int(byte[1], 16)])
            else:
                by_id[id_] = (
                    token.replace("\u2581", " ") if "\u2581" in decoders_ or "Metaspace" in decoders_ else token
                ).encode()
        return by_id

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def _with_fewer_tokens(path: Path, rows: int) -> Tokenizer:
    """The tokenizer of a file without added tokens whose ids are `rows` or more."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values["added_tokens"] = [token for token in values["added_tokens"] if token["id"] < rows]
    return Tokenizer.from_str(json.dumps(values, ensure_ascii=False))


def words(text: str) -> list[str]:
    """The words of a text, each with the white space before it; together they are the text. A Chinese or Japanese
    character is a word of its own."""
    return re.findall(
        r"\s*(?:[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\s\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+)|\s+$", text
    )


def _settings(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` and `chat_template.jinja` of a folder say, as far as it is kept."""
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    known = read_json(file) if file.is_file() else {}
    if not isinstance(known, dict):
        raise PlaitError(f"{file} must hold an object.")
    settings: dict[str, Any] = {}
    for name in TOKENS:
        token = known.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            settings[name] = token
    chat = known.get("chat_template")
    if isinstance(chat, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in chat if isinstance(entry, dict)}
        chat = named.get("default")
    if template.is_file():
        try:
            chat = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlaitError(f"{template} cannot be read: {error}. Fetch it again.") from error
    if isinstance(chat, str):
        settings["chat_template"] = chat
    return settings
