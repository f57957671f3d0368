"""A head over a vision encoder whose last blocks were trained for its labels.

Shapes: N records, V views of each, F features, C labels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from plait.classifiers.mixture import cross_entropy, softened, temperature
from plait.core.interruption import pause_point
from plait.hf.encoder_features import BATCH, LabelledRecords, MediaEncoder, Variant
from plait.hf.last_blocks import LastBlocks, Progress, States, features_of, train_last
from plait.hf.linear_head import FEW, Examples, Head, nearness

STATES_BYTES = 1 << 30  # of what an encoder's first blocks give, which are kept while its last ones are trained


class TrainedBlocks:
    """The last blocks of a vision encoder, trained for labels beside the head over the frozen one."""

    def __init__(self, encoder: MediaEncoder, last: LastBlocks, states: dict[str, States]) -> None:
        self.encoder, self.last, self.states = encoder, last, states
        self.count = len(last.blocks) - last.first

    @classmethod
    def of(
        cls,
        encoder: MediaEncoder,
        train: LabelledRecords,
        val: LabelledRecords,
        progress: Progress,
    ) -> TrainedBlocks | None:
        """What the first blocks give of all records. None where the encoder cannot be cut in two, its states would
        take too much memory, or there are too few records to say what is better."""
        if min(len(train), len(val)) < FEW:
            return None
        sample = encoder.pixels(next(train.batches(1)), Variant())
        try:
            last = LastBlocks(encoder.network, sample)
        except ValueError:
            return None
        one = last.before(sample)[0].half()
        if one.nbytes * len(encoder.variants) * (len(train) + len(val)) > STATES_BYTES:
            return None
        states: dict[str, States] = {}
        for split, records in (("val", val), ("train", train)):
            views = one.new_empty(len(encoder.variants), len(records), *one.shape)
            done = 0
            for values in records.batches(BATCH):
                pause_point()
                for view, variant in zip(views, encoder.variants, strict=True):
                    view[done : done + len(values)] = last.before(encoder.pixels(values, variant))
                done += len(values)
                progress(f"first blocks of {split}", done, len(records))
            states[split] = States(views, records.classes)
        return cls(encoder, last, states)

    @property
    def examples(self) -> tuple[Examples, Examples]:
        """Features of train and val as the blocks are now."""
        train, val = (
            Examples(features_of(self.last, self.encoder.pool_image, list(one.views)), one.classes)
            for one in (self.states["train"], self.states["val"])
        )
        return train, val

    def train(
        self, labels: list[str], seed: int, seconds_left: Callable[[], float], progress: Progress
    ) -> tuple[Head, dict[str, float]]:
        """A head over the trained blocks, and how right it is on val."""
        self.encoder.means_only = True
        weights, bias = train_last(
            self.last, self.encoder.pool_image, self.states["train"], len(labels), seed, seconds_left, progress
        )
        train, val = self.examples
        width = len(weights)
        flat = train.features.reshape(-1, width)
        mean, scale = flat.mean(0), flat.std(0) + 1e-3
        matrix = weights.cpu().numpy()
        head = Head(
            labels, matrix * scale[:, None], bias.cpu().numpy() + mean @ matrix, mean, scale, 1.0, np.zeros((0, 0)),
            np.zeros(0),
        )  # fmt: skip
        rows, val_rows = (head.standard(part.features) for part in (train, val))
        scores, targets = head.scores(val_rows), softened(val.classes, len(labels))
        head.heat = temperature(scores, targets)
        one_hot = np.eye(len(labels), dtype=np.float32)[train.classes]
        head.centres = (one_hot.T @ rows[:, 0]) / np.maximum(one_hot.sum(0), 1)[:, None]
        head.familiar = np.sort(nearness(val_rows[:, 0], head.centres))
        figures = {
            "accuracy": float((scores.argmax(1) == val.classes).mean()),
            "nats": cross_entropy(scores * head.heat, targets),
        }
        return head, figures

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters, by their names in the network."""
        return {name: value.detach().cpu().contiguous() for name, value in self.last.trained.items()}
