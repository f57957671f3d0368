"""Log probabilities in OpenAI's two shapes, each beside the characters and bytes that its token stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.inference.engine import IncrementalDetokenizer
from plait.inference.requests import TopIds
from plait.modalities.text import Text

LOWEST = -9999.0  # JSON knows no infinity


@dataclass(frozen=True)
class Token:
    """One token of a text: the characters that it completes (none, where it is a part of one), where they begin, its
    own bytes, its log probability (None where nothing comes before it), and the likeliest in its place."""

    text: str
    offset: int
    spelt: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass
class Aligner:
    """Tokens of one text as they come. Their texts, one behind the other, are the text."""

    text: Text
    before: list[int] = field(default_factory=list)  # ids that come first: some words are spelt by their left side
    offset: int = 0  # of the next character

    def __post_init__(self) -> None:
        self._detokenizer = IncrementalDetokenizer(self.text, self.before[-8:])

    def add(
        self,
        ids: Sequence[int],
        logprobs: Iterable[float | None],
        top: Sequence[TopIds | None] | None = None,
        last: bool = False,
    ) -> list[Token]:
        """The next tokens; `last` where no more come, so that a part of a character is shown as such."""
        spellings = self.text.token_bytes

        def spelt(token: int) -> bytes:
            return spellings[token] if token < len(spellings) else b""  # the end of a text of ours has no spelling

        tokens = []
        for i, (id_, logprob) in enumerate(zip(ids, logprobs, strict=False)):
            piece = ""
            if id_ < len(spellings):
                piece = self._detokenizer.add([id_], last=last and i == len(ids) - 1)
            likeliest = top[i] if top else None
            pairs = zip(likeliest.ids, likeliest.logprobs, strict=True) if likeliest is not None else ()
            tops = tuple((spelt(other), max(chance, LOWEST)) for other, chance in pairs)
            value = None if logprob is None else max(logprob, LOWEST)
            tokens.append(Token(piece, self.offset, spelt(id_), value, tops))
            self.offset += len(piece)
        return tokens


def of_chat(tokens: Iterable[Token]) -> dict[str, Any]:
    """As chat completions have them."""

    def entry(text: str, spelling: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(spelling)}

    content = [
        {
            **entry(token.text, token.spelt, token.logprob),
            "top_logprobs": [entry(_shown(spelling), spelling, chance) for spelling, chance in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def of_text(tokens: Iterable[Token], count: int) -> dict[str, Any]:
    """As completions have them; `count` likeliest ones a place were asked for."""
    tokens = list(tokens)
    top: list[dict[str, float] | None] | None = None
    if count:
        top = []
        for token in tokens:
            names: dict[str, float] = {}
            for spelling, chance in token.top:
                names.setdefault(_shown(spelling), chance)
            if token.logprob is not None:
                names.setdefault(_shown(token.spelt), token.logprob)
            top.append(names if token.logprob is not None else None)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": top,
        "text_offset": [token.offset for token in tokens],
    }


def _shown(spelling: bytes) -> str:
    """The bytes of a token alone; those of a part of a character in OpenAI's way."""
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
