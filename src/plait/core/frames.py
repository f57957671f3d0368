"""Tables for people: pandas data frames, made where somebody asks for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from plait.core.errors import PlaitError


def data_frame(
    columns: Mapping[str, Sequence[Any]], index: Sequence[Any] | None = None, name: str | None = None
) -> Any:
    """A pandas DataFrame of columns.

    Args:
        columns: values by the column's name, all of one length.
        index: the rows' labels; numbers if left out.
        name: what the labels are.

    Raises PlaitError where pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise PlaitError(f"to_pandas needs pandas ({error}). Run: pip install pandas") from None
    labels = None if index is None else pandas.Index(list(index), name=name)
    return pandas.DataFrame(dict(columns), index=labels)


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """A plain HTML table, as notebooks show it; cells are escaped."""
    top = "".join(f'<th style="text-align:left">{escape(cell)}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{escape(str(cell))}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    title = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    return f"<table>{title}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
