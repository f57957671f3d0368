"""Why something of a user's data cannot be used: a kind, by which reasons are counted, and the words for people."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class RejectKind(StrEnum):
    """What is wrong with a file, a row or a medium. `rejects.jsonl` holds the value; people read `label`."""

    # of files
    HIDDEN = "hidden"
    EMPTY = "empty"
    LINK = "link"
    OUTSIDE = "outside"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    LOCKED = "locked"
    BAD_NAME = "bad_name"
    PREPARED = "prepared"
    UNUSED = "unused"
    UNKNOWN_FORMAT = "unknown_format"
    NOT_A_TABLE = "not_a_table"
    PATTERN = "pattern"
    # of what they hold
    DAMAGED = "damaged"
    CUT_SHORT = "cut_short"
    TOO_LARGE = "too_large"
    NO_MEMORY = "no_memory"
    TOO_SLOW = "too_slow"
    CRASHED = "crashed"
    NEEDS_EXTRA = "needs_extra"
    # of rows and cells
    BAD_ROW = "bad_row"
    BAD_VALUE = "bad_value"
    BAD_TEXT = "bad_text"
    NO_VALUE = "no_value"
    UNKNOWN_LABEL = "unknown_label"
    UNKNOWN_SPLIT = "unknown_split"
    EMPTY_RECORD = "empty_record"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    # of models
    NOT_TAKEN = "not_taken"
    OTHER = "other"

    @property
    def label(self) -> str:
        """The kind in words."""
        return _LABELS[self]


_LABELS = {
    RejectKind.HIDDEN: "hidden",
    RejectKind.EMPTY: "empty",
    RejectKind.LINK: "a link",
    RejectKind.OUTSIDE: "a path that leads out of the source",
    RejectKind.MISSING: "a file that does not exist",
    RejectKind.UNREADABLE: "cannot be read",
    RejectKind.LOCKED: "locked with a password",
    RejectKind.BAD_NAME: "a name that is not valid",
    RejectKind.PREPARED: "a dataset that Plait prepared",
    RejectKind.UNUSED: "belongs to no record",
    RejectKind.UNKNOWN_FORMAT: "not a format that is read here",
    RejectKind.NOT_A_TABLE: "not a table",
    RejectKind.PATTERN: "its name does not match the pattern",
    RejectKind.DAMAGED: "damaged",
    RejectKind.CUT_SHORT: "cut short",
    RejectKind.TOO_LARGE: "too large",
    RejectKind.NO_MEMORY: "needs too much memory",
    RejectKind.TOO_SLOW: "takes too long to decode",
    RejectKind.CRASHED: "the decoder crashed",
    RejectKind.NEEDS_EXTRA: "needs a library that is not installed",
    RejectKind.BAD_ROW: "not a valid row",
    RejectKind.BAD_VALUE: "a value that is not valid",
    RejectKind.BAD_TEXT: "not valid text",
    RejectKind.NO_VALUE: "a value is missing",
    RejectKind.UNKNOWN_LABEL: "a label without a name",
    RejectKind.UNKNOWN_SPLIT: "an unknown split",
    RejectKind.EMPTY_RECORD: "the record is empty",
    RejectKind.DUPLICATE: "there twice",
    RejectKind.NEAR_DUPLICATE: "a near-duplicate",
    RejectKind.NOT_TAKEN: "the model cannot take it",
    RejectKind.OTHER: "other",
}


class Reason(NamedTuple):
    """Why something cannot be used.

    Attributes:
        kind: What programs decide and count by.
        detail: The whole reason in words, where it says more than the kind.
    """

    kind: RejectKind
    detail: str = ""

    def __str__(self) -> str:
        return self.detail or self.kind.label

    def about(self, subject: str) -> Reason:
        """The same reason, said of a column or a part: "column 'caption': ..."."""
        return Reason(self.kind, f"{subject}: {self}")
