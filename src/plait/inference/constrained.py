"""Text that must be something: JSON of a schema, a choice, a regular expression, a grammar.

llguidance keeps, for each sample, which ids may come next; the engine masks the others in the batch that all share. A
constraint is compiled once and used by any number of samples. Constraints may come from strangers: their size, depth
and states are bounded, and compiling one lets other threads run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.core.errors import PlaitError
from plait.modalities.text import Text

if TYPE_CHECKING:
    import llguidance

_START = "\x02"  # a character that no token holds beside others
BYTES = 65_536  # of a schema or grammar
DEPTH = 64  # levels of a schema
ANY_OBJECT = {"type": "object"}


class ConstraintError(PlaitError):
    """A schema or grammar that cannot be used."""


class Matcher:
    """What one sample has written, against its constraint."""

    def __init__(self, matcher: llguidance.LLMatcher, size: int) -> None:
        """`size` is how many ids the compiler knows."""
        self._matcher, self.size = matcher, size

    @property
    def failed(self) -> bool:
        """Whether the constraint took more states than it may, so that the text is not complete."""
        return bool(self._matcher.is_error())

    def accept(self, token: int) -> bool:
        """Take the id that was chosen; whether the text is complete and nothing can follow, or cannot be followed."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())

    def fill(self, bits: np.ndarray) -> None:
        """Set the bits (ids / 32,) int32 of the ids that may come next."""
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, self.size // 32 * 4 + 4 * (self.size % 32 > 0))


def forbidden_ids(matchers: Sequence[Matcher], size: int) -> np.ndarray:
    """Which of the first `size` ids may not come next in each sample, (B, size) bool."""
    bits = np.zeros((len(matchers), -(-max(size, *(m.size for m in matchers)) // 32)), np.int32)
    for row, matcher in zip(bits, matchers, strict=True):
        matcher.fill(row)
    np.invert(bits, out=bits)
    return np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :size].view(bool)


class TextConstraint:
    """A constraint, compiled for the ids of one model. Matchers share nothing: of copies of one, each would be held to
    the states that all have taken together."""

    def __init__(self, compile: Callable[[], llguidance.LLMatcher], size: int, first: llguidance.LLMatcher) -> None:
        """`compile` makes a matcher that has seen nothing; `first` is one that is made already."""
        self._compile, self._size = compile, size
        self._ready = [first]

    def prepare(self, count: int) -> TextConstraint:
        """Compile so many matchers now: in a thread, where that is not the event loop's."""
        self._ready += [self._compile() for _ in range(count - len(self._ready))]
        return self

    def matcher(self) -> Matcher:
        """A matcher that has seen nothing yet."""
        return Matcher(self._ready.pop() if self._ready else self._compile(), self._size)


class _Ids:
    """A model's ids as llguidance asks for them: bytes by id, special ones among them, and texts to ids."""

    def __init__(self, text: Text, size: int, ends: Sequence[int]) -> None:
        known = text.token_bytes
        self.text = text
        self.tokens = [*known, *(b"<end %d>" % id for id in range(len(known), size))]
        added = text.tokenizer.get_added_tokens_decoder()
        self.special_token_ids = sorted({id for id, token in added.items() if token.special} | set(ends))
        self.eos_token_id, self.bos_token_id = ends[0], None

    def __call__(self, text: str) -> list[int]:
        """The ids of a text in the middle of another, where no word begins."""
        before, after = self.text.encode(_START), self.text.encode(_START + text)
        return after[len(before) :] if after[: len(before)] == before else self.text.encode(text)


class ConstraintCompiler:
    """Compiles constraints for one model; made once, since it reads the whole vocabulary."""

    def __init__(self, text: Text, end: int | None, more_ends: Sequence[int] = ()) -> None:
        """`end` and `more_ends` are the ids that end a text; without one, a text ends where its constraint does.
        Raises PlaitError where llguidance is missing."""
        try:
            import llguidance
        except ModuleNotFoundError:
            raise PlaitError("Constrained text needs llguidance. Run: pip install 'plait-ml[serve]'.") from None
        self._library = llguidance
        ends = [text.size if end is None else end, *more_ends]
        self._size = max(text.size, *(id + 1 for id in ends))
        wrapper = llguidance.TokenizerWrapper(_Ids(text, self._size, ends))
        self._tokenizer = llguidance.LLTokenizer(wrapper, eos_token=ends)
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=2_000_000, step_lexer_fuel=200_000, step_max_items=50_000, max_lexer_states=50_000,
            max_grammar_size=100_000, max_items_in_row=2000, verbose_errors=False,
        )  # fmt: skip

    def schema(self, schema: Any) -> TextConstraint:
        """JSON that a schema (a dictionary, or a pydantic model) describes. Raises ConstraintError."""
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        if not isinstance(schema, dict | bool):
            raise ConstraintError("A JSON schema is an object.")
        _check_depth(schema)
        try:
            spelt = json.dumps(closed(schema))
            _check_size(spelt)
            grammar = self._library.LLMatcher.grammar_from_json_schema(
                # As people write JSON by hand: with other white space a small model could go on for ever.
                spelt,
                {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
            )
        except (TypeError, ValueError, RecursionError) as error:
            raise ConstraintError(f"The JSON schema cannot be used: {_reason(error)}.") from None
        return self._compile(grammar, "JSON schema")

    def regex(self, pattern: str) -> TextConstraint:
        """A text that a regular expression matches as a whole. Raises ConstraintError."""
        _check_size(pattern)
        return self._compile(self._library.LLMatcher.grammar_from_regex(pattern), "regular expression")

    def choice(self, choices: Sequence[str]) -> TextConstraint:
        """One of some texts. Raises ConstraintError."""
        if not choices or not all(isinstance(one, str) and one for one in choices):
            raise ConstraintError("A choice is a list of texts that are not empty.")
        _check_size("".join(choices))
        rule = "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in dict.fromkeys(choices))
        return self._compile(self._library.LLMatcher.grammar_from_lark(rule), "choice")

    def grammar(self, grammar: str) -> TextConstraint:
        """A text of a grammar in Lark's or llama.cpp's notation (GBNF). Raises ConstraintError."""
        from llguidance.gbnf_to_lark import any_to_lark

        _check_size(grammar)
        try:
            lark = any_to_lark(grammar)
        except Exception as error:  # it raises ValueError, IndexError, KeyError on what is none
            raise ConstraintError(f"The grammar cannot be read: {_reason(error)}.") from None
        return self._compile(self._library.LLMatcher.grammar_from_lark(lark), "grammar")

    def calls(self, grammar: str) -> TextConstraint:
        """A reply that calls tools, by `plait.inference.tools.tool_grammar`. Raises ConstraintError."""
        _check_size(grammar)
        return self._compile(self._library.LLMatcher.grammar_from_lark(grammar), "schema of a tool")

    def _compile(self, grammar: str, name: str) -> TextConstraint:
        def fresh() -> llguidance.LLMatcher:
            return self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)

        compiled = fresh()
        for _ in range(2):  # some faults show at the first mask, some when the states of the first are there already
            begun = compiled.deep_copy()
            if not begun.is_error():
                begun.compute_bitmask()
            if begun.is_error():
                raise ConstraintError(f"The {name} cannot be used: {_reason(begun.get_error())}.")
        return TextConstraint(fresh, self._size, compiled)


def closed(schema: Any) -> Any:
    """A schema whose objects hold the properties that it names and no others, unless it says that there may be more: a
    small model could go on with properties of its own for ever. Parts of an `allOf` are left as they are."""
    if '"allOf"' in json.dumps(schema):
        return schema

    def close(value: Any) -> Any:
        if isinstance(value, list):
            return [close(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        closed_schema = {key: inner if key in ("enum", "const", "default", "examples") else close(inner)
                 for key, inner in value.items()}  # fmt: skip
        open_ = {"additionalProperties", "unevaluatedProperties", "patternProperties", "anyOf", "oneOf", "$ref", "if"}
        named: Any = value.get("properties")
        required = value.get("required", [])
        plain = isinstance(named, dict) and value.get("type") == "object" and not open_ & set(value)
        if plain and isinstance(required, list) and all(name in named for name in required):
            closed_schema["additionalProperties"] = False
        return closed_schema

    return close(schema)


def _check_size(spelt: str) -> None:
    if len(spelt.encode()) > BYTES:
        raise ConstraintError(f"The constraint has {len(spelt.encode())} bytes; at most {BYTES} are read. Shorten it.")


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > DEPTH:
        raise ConstraintError(f"The JSON schema is nested deeper than {DEPTH} levels. Use flatter ones.")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, depth + 1)


def _reason(error: object) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
