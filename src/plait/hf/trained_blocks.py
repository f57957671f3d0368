"""A head over a vision encoder whose last blocks were trained for its labels.

Shapes: N records, V views of each, F features, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait.classifiers.mixture import cross_entropy, softened, temperature
from plait.core.interruption import pause_point
from plait.hf.encoder_features import BATCH, MediaEncoder, Variant
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
        read: Callable[[str], Iterator[tuple[Any, int]]],
        progress: Progress,
    ) -> TrainedBlocks | None:
        """What the first blocks give of all records. None where the encoder cannot be cut in two, its states would
        take too much memory, or val has too few records to say what is better."""
        try:
            last = LastBlocks(encoder.network, encoder.pixels([next(read("train"))[0]], Variant()))
        except ValueError:
            return None
        states: dict[str, States] = {}
        left = STATES_BYTES
        for split in ("val", "train"):
            made, classes = list[list[Tensor]](), list[int]()
            records = read(split)
            while part := list(islice(records, BATCH)):
                pause_point()
                values = [value for value, _ in part]
                made.append([last.before(encoder.pixels(values, one)).half() for one in encoder.variants])
                classes += [label for _, label in part]
                left -= sum(view.nbytes for view in made[-1])
                progress(f"first blocks of {split}", len(classes), len(classes) + (BATCH if len(part) == BATCH else 0))
                if left < 0:
                    return None
            if len(classes) < FEW:
                return None
            views = torch.stack([torch.cat(view) for view in zip(*made, strict=True)])
            states[split] = States(views, np.array(classes, np.int64))
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
