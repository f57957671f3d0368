"""A review of labels as a page of images and as a CSV table."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields

from plait.core.pages import render
from plait.data.dataset import Dataset
from plait.evaluation.findings import ReportItem
from plait.evaluation.label_review import LabelCandidate, LabelReview, LabelSuspect
from plait.inference.model import PlaitModel

MOST_SHOWN = 120  # entries of each list on the page; the table has them all


def review_page(review: LabelReview, model: PlaitModel, dataset: Dataset) -> str:
    """The page, without scripts and without a network."""
    suspects = [
        _item(model, dataset, review.input, one.record,
              f"{one.label} ({one.probability:.0%}) → {one.suggested} ({one.suggested_probability:.0%}) · {one.source}",
              False if one.likely else None)
        for one in review.suspects[:MOST_SHOWN]
    ]  # fmt: skip
    candidates = [
        _item(model, dataset, review.input, one.record, f"{one.guess}? ({one.probability:.0%}) · {one.source}", None)
        for one in review.candidates[:MOST_SHOWN]
    ]
    summary = (
        f"{review.likely:,} of {review.labelled:,} labels in the column {review.column} are likely wrong; "
        f"{review.unlabelled:,} records have no label."
    )
    return render(
        "reports/labels.html", title=f"Labels: {review.column}", summary=summary, notes=review.notes,
        suspects=suspects, candidates=candidates,
    )  # fmt: skip


def _item(
    model: PlaitModel, dataset: Dataset, column: str, record: int, caption: str, right: bool | None
) -> ReportItem:
    value = dataset.record(record, [column]).parts[column]
    if isinstance(value, str):
        return ReportItem(caption, text=value, right=right)
    modality = model.modality(column)
    shown = modality.preview_sample(modality.windows(value)[0])
    return ReportItem(caption, image=shown.image, audio=shown.audio, right=right)


def review_table(review: LabelReview) -> str:
    """All entries as CSV: first the suspects, then the candidates, by `list`."""
    names = list(
        dict.fromkeys(["list", *(field.name for kind in (LabelSuspect, LabelCandidate) for field in fields(kind))])
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({"list": "suspect", **asdict(one)} for one in review.suspects)
    writer.writerows({"list": "candidate", **asdict(one)} for one in review.candidates)
    return text.getvalue()
