"""The grammar of a span: which ids are possible next, when it may end and when it is full.

What is possible is always one range of ids, of which the end may be taken out: so a whole batch is held to the
grammar by a slice of the head and one masked column.
"""

from __future__ import annotations

from dataclasses import dataclass

from plait.model.multimodal import Multimodal


@dataclass(frozen=True)
class Span:
    """What may be written into a span of one space after its opener."""

    token_type: str
    start: int  # the first id that is possible
    stop: int  # one past the last
    end: int | None  # the id in that range that ends the span; None where only its length does
    unit: int = 1  # codes come in groups of so many
    least: int = 0  # ids before the span may end
    limit: int | None = None  # ids after which it is full
    more_ends: tuple[int, ...] = ()  # further ids that end the span, of imported models

    def ends(self, token: int | None) -> bool:
        """Whether an id ends the span."""
        return token is not None and (token == self.end or token in self.more_ends)

    def may_end(self, count: int) -> bool:
        """Whether the end is possible after `count` ids."""
        return self.end is not None and count >= self.least and count % self.unit == 0

    def allows(self, count: int, token: int) -> bool:
        """Whether `token` is possible after `count` ids."""
        if self.limit is not None and count >= self.limit:
            return False
        return self.start <= token < self.stop and (not self.ends(token) or self.may_end(count))

    def done(self, count: int, last: int | None) -> bool:
        """Whether the span is closed after `count` ids (the end not counted) of which `last` came last."""
        return self.ends(last) or count == self.limit


def spans(model: Multimodal) -> dict[str, Span]:
    """Space -> the grammar of a span in it."""
    vocabulary = model.vocabulary
    # An end of our own is the first special token, right behind the text's ids; an imported one lies among them. A
    # model without columns never learnt ours.
    own_columns = vocabulary.end_id is None and bool(vocabulary.columns)
    end = vocabulary.end if own_columns or vocabulary.end_id is not None else None
    more = tuple(vocabulary.more_ends or ())
    by_type = {"text": Span("text", 0, vocabulary.text + own_columns, end, more_ends=more)}
    for name, modality in model.media.items():
        if name not in vocabulary.id_ranges:
            continue
        start, stop = vocabulary.id_ranges[name]
        settings = modality.settings
        limit = modality.code_count(getattr(settings, "frames", 1))
        unit = getattr(settings, "codes_per_patch", 1) if modality.variable_length else 1
        end = vocabulary.closer(name) if name in vocabulary.closers else None
        by_type[name] = Span(name, start, stop, end, unit, unit if end is not None else limit, limit)
    return by_type
