"""What followed what, beside the network: directed co-occurrence that answers with it, weighed on held-out items.

A network of histories and a table of what followed what are wrong in different places, and together better than
either. The share of each is chosen once training has ended, on val, and kept with the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from plait.core.errors import PlaitError
from plait.core.rng import uniform
from plait.model.checkpoint import PartFile
from plait.recommend.baselines import Follows, Interactions
from plait.recommend.ranking import NDCG_10, Measured, Scores, Targets, rank

SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # of the table; it has no chance for what never followed, so never all
MEASURED = ("both", "the network alone", "what followed alone")
UNSURE = 0.5  # where too few items are held out to choose
FEWEST, MOST = 50, 4000  # held-out items that the share is chosen on
FOLLOWERS = 300  # of an item that are kept, the most frequent
ORDER = 213  # key of `uniform`


@dataclass
class Followed:
    """A table of what followed what, the share that it has of each answer, and what val showed.

    Attributes:
        follows: Directed co-occurrence in the training histories.
        share: Of the probability of an item, that of the table; the rest is the network's.
        measured: NDCG@10 on val of the network, the table and both.
        records: Held-out items that were asked for.
    """

    follows: Follows
    share: float
    measured: dict[str, float]
    records: int

    def describe(self) -> str:
        """What answers, and how right it is, in a sentence."""
        start = f"Answers by the network ({1 - self.share:.0%}) and by what followed what ({self.share:.0%})"
        if not self.records:
            return f"{start}: too few items are held out to choose by them."
        shown = ", ".join(f"{name} {value:.3f}" for name, value in self.measured.items())
        return f"{start}. NDCG@10 on {self.records:,} held-out items of val: {shown}."

    def chances(self, histories: list[np.ndarray]) -> np.ndarray:
        """P(item | history) by the table alone, (N, items of training); rows of zeros where nothing ever followed."""
        count = self.follows.count
        scores = np.stack([self.follows.scores(history[history < count]) for history in histories])
        return scores / scores.sum(1, keepdims=True).clip(1e-300)

    # --- files ------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: Path) -> Followed:
        """Raises PlaitError where the file is damaged."""
        try:
            with safe_open(path, framework="numpy") as file:
                facts = file.metadata()
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            follows = Follows(arrays["starts"], arrays["after"], arrays["weight"])
            measured = {name: float(facts[f"measured:{name}"]) for name in MEASURED if f"measured:{name}" in facts}
            return cls(follows, float(facts["share"]), measured, int(facts["records"]))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise PlaitError(f"{path} is damaged: {error}. Copy it again, or train again.") from error

    def write(self, path: Path) -> None:
        """A safetensors file, with the share and what was measured as its metadata."""
        arrays: dict[str, np.ndarray] = {
            "starts": self.follows.starts.astype(np.int64),
            "after": self.follows.after.astype(np.int32),
            "weight": self.follows.weight.astype(np.float32),
        }
        facts = {"share": str(self.share), "records": str(self.records)}
        save_file(arrays, path, {**facts, **{f"measured:{name}": str(value) for name, value in self.measured.items()}})


FOLLOWED_FILE = PartFile("followed.safetensors", Followed.read, lambda followed, path: followed.write(path))


def mixed(log_chances: np.ndarray, histories: list[np.ndarray], followed: Followed, share: float) -> np.ndarray:
    """log of the weighted mean of the network's chances, given as logs (N, items), and the table's.

    The table shares out anew what the network gives to the items that it knows; those that joined later keep what the
    network gives them. The network alone answers after a history that nothing ever followed.
    """
    if not share:
        return log_chances
    table = followed.chances(histories)
    there, known = table.any(1), table.shape[1]
    network = np.exp(log_chances[there, :known].astype(np.float64))
    answer = log_chances.copy()
    with np.errstate(divide="ignore"):
        answer[there, :known] = np.log((1 - share) * network + share * network.sum(1, keepdims=True) * table[there])
    return answer


def fit_followed(network: Scores, train: Interactions, held_out: Targets, seed: int) -> Followed:
    """The table of training histories, and the share that ranks held-out items best by NDCG@10.

    Args:
        network: log P of each item after histories.
        train: The training histories.
        held_out: Of val, what is asked.
        seed: Of the choice among too many, and of the order of ties.
    """
    followed = Followed(Follows.counted(train, FOLLOWERS), UNSURE, {}, 0)
    if len(held_out) < FEWEST:
        return followed
    if len(held_out) > MOST:
        chosen = np.argsort(uniform(seed, np.arange(len(held_out)), ORDER), kind="stable")[:MOST]
        held_out = held_out.only(np.sort(chosen))

    def gain(scores: Scores) -> float:
        return float(Measured.of(rank(held_out, scores, seed)).values[NDCG_10].mean())

    def by(share: float) -> Scores:
        return lambda histories: mixed(network(histories), histories, followed, share)

    gains = {share: gain(by(share)) for share in SHARES}
    followed.share = max(SHARES, key=lambda share: gains[share])
    figures = gains[followed.share], gains[0.0], gain(followed.chances)
    followed.measured = dict(zip(MEASURED, figures, strict=True))
    followed.records = len(held_out)
    return followed
