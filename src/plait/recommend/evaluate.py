"""How well the next item is foretold: every item is ranked, always, with what a user has seen among them and without.

Beside the model stand popularity, neighbours, EASE and directed co-occurrence, which is the baseline of every figure,
and its network alone where co-occurrence answers with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np

from plait.core.errors import PlaitError
from plait.core.rng import uniform
from plait.data.dataset import Dataset
from plait.evaluation import metrics
from plait.evaluation.context import Progress
from plait.evaluation.findings import Findings, Gallery, ReportItem
from plait.evaluation.keys import Direction, MetricKey, Metrics
from plait.evaluation.outcome import Outcome
from plait.evaluation.verdict import make_verdict
from plait.inference.model import PlaitModel
from plait.modalities.item import item_rows
from plait.recommend.baselines import MOST, Follows, Neighbours
from plait.recommend.catalogue import Catalogue
from plait.recommend.checkpoint_part import catalogue_of
from plait.recommend.model import RecommendationModel
from plait.recommend.next_item import NextItem
from plait.recommend.ranking import (
    CHUNK,
    HR_10,
    HR_20,
    NDCG_10,
    Measured,
    RankMetric,
    Ranks,
    Scores,
    Targets,
    rank,
    targets_of,
    training_histories,
)
from plait.recommend.write_histories import TEST, VAL, Histories, read_catalogue, read_histories

TASK, DIRECTION = "recommendation", Direction("item", "item")
DRAWS = 10_000  # resamples of the paired bootstrap
QUERIES = 30_000  # targets, at most
CELLS = 2**25  # scores that exist at a time
EASE = 500.0  # ridge of EASE
ORDER = 211  # key of `uniform`


OUTCOMES = {
    HR_10: ("HR@10, all items ranked", "of the next items are among the ten recommended"),
    NDCG_10: ("NDCG@10, all items ranked", "of what an order has in which the next item always is the first"),
}


def _mean(values: np.ndarray, users: np.ndarray, seed: int) -> tuple[float, float]:
    """Mean and standard error; the targets of one user are drawn together."""
    _, group = np.unique(users, return_inverse=True)
    if len(group) and group.max() + 1 == len(group):
        return metrics.mean_with_error(values, seed=seed)
    return metrics.ratio_with_error(np.bincount(group, values), np.bincount(group), seed=seed)


def evaluate_histories(
    model: PlaitModel, dataset: Dataset, split: str, *, seed: int, limit: int | None, progress: Progress
) -> tuple[Metrics, Findings]:
    """The figures of recommending on the held-out items of a dataset of histories, under
    "recommendation/item-item/METRIC", and what the report shows beside them.

    Raises PlaitError where there is nothing to ask, or the model is of another catalogue.
    """
    histories = read_histories(dataset)
    catalogue_of(model.checkpoint)  # which says what to do where it is no model of histories
    recommending = cast(RecommendationModel, model)
    catalogue = _fit(recommending, read_catalogue(dataset), dataset, histories)
    if split not in ("val", "test"):
        raise PlaitError(f"Histories are evaluated on what is held out of them: --split test or val, not {split}.")
    part = TEST if split == "test" else VAL
    targets = targets_of(histories, (part,))
    if not len(targets):
        raise PlaitError(f"{dataset.path} has no items held out for {split}: no user has three interactions or more.")
    findings = Findings()
    findings.notes += [f"{note[0].upper()}{note[1:]}." for note in dataset.manifest.split_notes]
    if first := int((histories.parts == part).sum()) - len(targets):
        findings.notes.append(f"{first:,} held-out items are the first of their users: with no history, not asked for.")
    most = min(QUERIES, limit or QUERIES)
    targets = _subset(targets, most, "held-out items", seed, findings)
    work = _Work(recommending, histories, catalogue, seed, progress, findings)
    work.measure(targets)
    cold = targets_of(histories, (VAL, TEST))
    cold = _subset(cold.only(cold.items >= catalogue.known), most, "held-out new items", seed, findings)
    if len(cold) >= 20:
        work.measure_cold(cold)
    work.show(targets)
    findings.verdict = make_verdict(findings.outcomes)
    return work.metrics, findings


def _subset(targets: Targets, most: int, what: str, seed: int, findings: Findings) -> Targets:
    """At most so many of the targets, drawn by the seed."""
    if len(targets) <= most:
        return targets
    findings.notes.append(f"{most:,} of {len(targets):,} {what} were asked for, drawn by the seed.")
    chosen = np.argsort(uniform(seed, np.arange(len(targets)), ORDER), kind="stable")[:most]
    return targets.only(np.sort(chosen))


def _fit(model: RecommendationModel, catalogue: Catalogue, dataset: Dataset, histories: Histories) -> Catalogue:
    """Give the model the items of the dataset that it has not met, and the histories the model's numbers; returns its
    catalogue, which may have more items than the dataset's."""
    own = model.catalogue
    if [item.id for item in own.items[: own.known]] != [item.id for item in catalogue.items[: catalogue.known]]:
        raise PlaitError(f"The model's items are not those of {dataset.path}. Evaluate it on the data of its run.")
    known = {item.id for item in own.items}
    model.add_items([item for item in catalogue.items if item.id not in known])
    grown = model.catalogue
    numbers = {item.id: number for number, item in enumerate(grown.items)}
    histories.items = np.array([numbers[item.id] for item in catalogue.items], np.int64)[histories.items]
    return grown


@dataclass
class _Work:
    model: RecommendationModel
    histories: Histories
    catalogue: Catalogue
    seed: int
    progress: Progress
    findings: Findings
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.next = self.model.next
        self.train = training_histories(self.histories, len(self.catalogue))
        self.popularity = self.train.popularity()

    def keep(self, name: str, value: float, **more: float | None) -> None:
        self.metrics.keep(MetricKey(TASK, DIRECTION, name), value, **more)  # type: ignore[arg-type]

    def ranks(self, name: str, targets: Targets, scores: Scores) -> Ranks:
        chunk = min(CHUNK, max(CELLS // len(self.catalogue), 16))
        return rank(targets, scores, self.seed, lambda done: self.progress(name, done, len(targets)), chunk)

    def methods(self) -> dict[str, Scores]:
        """Name -> scores, the baselines that this catalogue is not too large for."""

        def each(method: Follows | Neighbours) -> Scores:
            return lambda histories: np.stack([method.scores(history) for history in histories])

        by_name: dict[str, Scores] = {
            "cooccurrence": each(Follows.counted(self.train)),
            "popularity": lambda histories: np.tile(self.popularity, (len(histories), 1)),
        }
        if isinstance(self.next, NextItem) and self.next.followed is not None:
            by_name["network"] = NextItem(self.model.checkpoint.model, self.model.device).log_chances
        if (recent := self.train.recent_popularity()) is not None:
            by_name["recent_popularity"] = lambda histories: np.tile(recent, (len(histories), 1))
        if self.train.count <= MOST:
            by_name["item_knn"] = each(Neighbours(self.train))
            by_name["ease"] = each(Neighbours(self.train, EASE))
        else:
            self.findings.notes.append(f"Item-kNN and EASE were left out: more than {MOST:,} items.")
        return by_name

    def measure(self, targets: Targets) -> None:
        """Every method on the same targets; the model's lead over co-occurrence by resampling users."""
        own = Measured.of(self.ranks("model", targets, self.next.log_chances))
        others = {name: Measured.of(self.ranks(name, targets, s)) for name, s in self.methods().items()}
        first, n = others["cooccurrence"], len(targets)
        unseen = len(self.catalogue) - np.array([len(np.unique(h)) for h in targets.histories])
        for metric, values in own.values.items():
            value, error = _mean(values, targets.users, self.seed)
            among = np.full(n, len(self.catalogue)) if metric.unmasked else unseen
            chance = metric.chance(among)
            base = float(first.values[metric].mean())
            self.keep(str(metric), value, stderr=error, chance=chance, baseline=base, n=n)
        hit, place = (self._outcome(metric, own, first, targets, unseen) for metric in OUTCOMES)
        # Of few items ten hold nearly all: then where the next one stands among the ten tells more.
        self.findings.outcomes.append(place if hit.better is None and place.better is not None else hit)
        for metric in (HR_10, NDCG_10):
            lead = own.values[metric] - first.values[metric]
            self._lead(str(metric), metric.shown, lead, targets, "directed co-occurrence")
            for other, measured in others.items():
                mean, error = _mean(measured.values[metric], targets.users, self.seed)
                self.keep(f"{metric}_{other}", mean, stderr=error, n=n)
        covered = {name: len(np.unique(m.lists)) / len(self.catalogue) for name, m in {"": own, **others}.items()}
        for name, share in covered.items():
            beside = None if name else covered["cooccurrence"]
            self.keep(f"coverage_at_10{name and '_'}{name}", share, baseline=beside, n=n)
        rare = -np.log2((self.popularity + 1) / (self.popularity + 1).sum())
        value, error = _mean(rare[own.lists].mean(1), targets.users, self.seed)
        base = float(rare[first.lists].mean())
        self.keep("novelty_at_10", value, stderr=error, baseline=base, n=n)
        self._by_popularity(targets, own, first)

    def _outcome(
        self, metric: RankMetric, own: Measured, first: Measured, targets: Targets, unseen: np.ndarray
    ) -> Outcome:
        """The model beside directed co-occurrence by a metric, paired by target."""
        model_values, baseline_values = own.values[metric], first.values[metric]
        value, error = _mean(model_values, targets.users, self.seed)
        _, lead_error = _mean(model_values - baseline_values, targets.users, self.seed)
        subject, figure = OUTCOMES[metric]
        return Outcome(
            TASK, subject, figure, value, error, len(targets), metric.chance(unseen), "directed co-occurrence",
            float(baseline_values.mean()), lead_error,
        )  # fmt: skip

    def _lead(self, name: str, shown: str, lead: np.ndarray, targets: Targets, over: str) -> None:
        """The mean of a difference of the model to a baseline, paired by target, and how sure it is that it leads;
        `shown` is what the figure is called for people."""
        value, error = _mean(lead, targets.users, self.seed)
        self.keep(f"{name}_lead", value, stderr=error, n=len(targets))
        above = _above(lead, targets.users, self.seed)
        self.findings.notes.append(
            f"{shown}, the model's lead over {over}: {value:+.4f} ± {error:.4f}, above zero in {above:.2%} of "
            f"{DRAWS:,} paired resamples of users."
        )

    def _by_popularity(self, targets: Targets, own: Measured, first: Measured) -> None:
        """Thirds of the training interactions: those of the most popular items, the middle, the rest."""
        order = np.argsort(-self.popularity, kind="stable")
        third = np.empty(len(order), int)
        share = np.cumsum(self.popularity[order]) / self.popularity.sum()
        third[order] = np.minimum((share * 3 - 1e-9).astype(int), 2)
        for number, name in enumerate(("head", "middle", "tail")):
            in_third = third[targets.items] == number
            if in_third.any():
                value, error = _mean(own.values[HR_10][in_third], targets.users[in_third], self.seed)
                base = float(first.values[HR_10][in_third].mean())
                chance = 10 / len(self.catalogue)
                self.keep(f"hr_at_10_{name}", value, stderr=error, chance=chance, baseline=base, n=int(in_third.sum()))

    def measure_cold(self, targets: Targets) -> None:
        """Items that no training history has, ranked among all; beside the most popular of the genres that a user
        likes, and the items whose content is nearest to the last ones."""
        own = Measured.of(self.ranks("cold items", targets, self.next.log_chances))
        methods = {"genre": self._genres(), "nearest": self._nearest()}
        others = {name: Measured.of(self.ranks(name, targets, s)) for name, s in methods.items() if s is not None}
        n = len(targets)
        for metric in (HR_10, NDCG_10, HR_20):
            value, error = _mean(own.values[metric], targets.users, self.seed)
            chance = metric.expected / len(self.catalogue)
            base = float(others["genre"].values[metric].mean()) if "genre" in others else None
            self.keep(f"cold_{metric}", value, stderr=error, chance=chance, baseline=base, n=n)
            for other, measured in others.items():
                mean, error = _mean(measured.values[metric], targets.users, self.seed)
                self.keep(f"cold_{metric}_{other}", mean, stderr=error, n=n)
        if "nearest" in others:
            lead = own.values[HR_10] - others["nearest"].values[HR_10]
            self._lead("cold_hr_at_10", "HR@10 of new items", lead, targets, "nearest content")

    def _genres(self) -> Scores | None:
        """What is popular in the genres that a history has; a new item counts as an average one of its genres."""
        names = sorted({genre for item in self.catalogue.items for genre in item.categories})
        if not names:
            return None
        place = {name: i for i, name in enumerate(names)}
        member = np.zeros((len(self.catalogue), len(names)))
        for row, item in zip(member, self.catalogue.items, strict=True):
            row[[place[genre] for genre in item.categories]] = 1 / max(len(item.categories), 1)
        known = self.popularity > 0
        typical = (member[known] * self.popularity[known, None]).sum(0) / member[known].sum(0).clip(1e-9)
        popular = np.where(known, self.popularity, member @ typical)

        def scores(histories: list[np.ndarray]) -> np.ndarray:
            taste = np.stack([member[history].mean(0) for history in histories])
            return (taste @ member.T) * popular

        return scores

    def _nearest(self) -> Scores | None:
        """Items whose content is nearest to that of the last ten."""
        items = item_rows(self.model.checkpoint.model.modalities)
        if items is None:  # codes say less than the content that they came from
            return None
        content = items.content.float().cpu().numpy()
        if not content.shape[1]:
            return None
        content = content / np.linalg.norm(content, axis=1, keepdims=True).clip(1e-9)

        def scores(histories: list[np.ndarray]) -> np.ndarray:
            return np.stack([content[history[-10:]].mean(0) for history in histories]) @ content.T

        return scores

    def show(self, targets: Targets) -> None:
        """Some users for the report: the end of a history, what is recommended, and what came."""
        rows = []
        for i in np.argsort(uniform(self.seed, np.arange(len(targets)), ORDER), kind="stable")[:8]:
            history, item = targets.histories[i], int(targets.items[i])
            scores = self.next.log_chances([history])[0]
            scores[np.setdiff1d(history, [item])] = -np.inf
            best = np.argsort(-scores, kind="stable")[:6]
            head = ReportItem("… then came", text=" · ".join(self.catalogue.name(int(h)) for h in history[-5:]),
                           beside=ReportItem("chosen next", text=self.catalogue.name(item)))  # fmt: skip
            shown = [
                ReportItem(
                    f"{np.exp(scores[b]):.1%}", text=self.catalogue.name(int(b)), right=True if b == item else None
                )
                for b in best
            ]
            rows.append((head, shown))
        note = "Users drawn by the seed: the last of a history, what came next, and the six likeliest items."
        self.findings.galleries.append(Gallery("Recommended", note, rows))


def _above(lead: np.ndarray, users: np.ndarray, seed: int) -> float:
    """The share of resamples of users in which a paired difference is above zero."""
    _, group = np.unique(users, return_inverse=True)
    sums = np.bincount(group, lead)
    random = np.random.default_rng(seed)
    above = 0
    for start in range(0, DRAWS, 500):
        count = min(500, DRAWS - start)
        above += int((sums[random.integers(0, len(sums), (count, len(sums)))].sum(1) > 0).sum())
    return above / DRAWS
