"""What the figures of recommending are called in a report."""

from __future__ import annotations

from plait.reports.metric_labels import MetricLabels

_MEANING: dict[str, tuple[str, str, str]] = {}
_RANKED = {"hr": ("HR", "the item that came is among {}"), "ndcg": ("NDCG", "the same, more for a better place"),
           "mrr": ("MRR", "the same, one over its place")}  # fmt: skip
_MEANING |= {
    f"{name}_at_{depth}{suffix}": (f"{label}@{depth}{more}", "share", text.format(depth))
    for suffix, more in (("", ""), ("_unmasked", ", with what was seen"))
    for depth in (1, 5, 10, 20)
    for name, (label, text) in _RANKED.items()
}
_METHODS = {
    "network": ("the network alone", "without what followed what"),
    "cooccurrence": ("directed co-occurrence", "what followed what, and how soon: the baseline of all figures here"),
    "popularity": ("popularity", "the same for everybody"),
    "recent_popularity": ("recent popularity", "of the last tenth of the interactions, the same for everybody"),
    "item_knn": ("item-kNN", "items that the same people chose"),
    "ease": ("EASE", "a linear model of which items go together"),
}
for _name, _label in (("hr", "HR@10"), ("ndcg", "NDCG@10"), ("coverage", "coverage@10")):
    _MEANING |= {f"{_name}_at_10_{key}": (f"{_label}: {word}", "share", text) for key, (word, text) in _METHODS.items()}
_MEANING |= {
    "hr_at_10_lead": ("lead in HR@10", "share", "model less directed co-occurrence, paired by user"),
    "ndcg_at_10_lead": ("lead in NDCG@10", "share", "model less directed co-occurrence, paired by user"),
    "cold_hr_at_10_lead": ("lead in HR@10, new items", "share", "model less nearest content, paired by user"),
    "coverage_at_10": ("coverage@10", "share", "of all items, those in somebody's first 10"),
    "novelty_at_10": ("novelty@10, bits", "number", "of surprise in popularity, mean over the first 10"),
    "hr_at_10_head": ("HR@10, popular items", "share", "those with the first third of all interactions"),
    "hr_at_10_middle": ("HR@10, items in the middle", "share", "the second third"),
    "hr_at_10_tail": ("HR@10, rare items", "share", "the last third"),
}
_NEW = {
    "": ("", "in no training history, ranked among all; baseline: popular in their categories"),
    "_genre": (": popular in the categories", "of the history"),
    "_nearest": (": nearest content", "to the last ten of the history"),
}
for _name, _label in (("hr_at_10", "HR@10"), ("ndcg_at_10", "NDCG@10"), ("hr_at_20", "HR@20")):
    _MEANING |= {f"cold_{_name}{k}": (f"{_label}, new items{word}", "share", text) for k, (word, text) in _NEW.items()}

LABELS = MetricLabels(
    tasks={"recommendation": "Recommendation: the next item, ranked among all"},
    meaning=_MEANING,
    headlines=("hr_at_10", "ndcg_at_10"),
)
