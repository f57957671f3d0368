"""What a base replies to general questions, kept while low-rank updates are trained on something else.

Updates that learn some hundred sentences change the chances of everything a little, and what the base knew by a narrow
margin goes first. So beside each step a few of the base's own replies are read, and the divergence of the trained
model's chances of their tokens from the base's, the mean of KL(base || trained), is part of what is minimised (Hinton,
Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015). The base is the model itself with its updates
switched off.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plait.core.device import Device
from plait.core.files import write_atomic
from plait.model import lora
from plait.model.multimodal import Multimodal

FILE = "general.json"  # in the run's folder
TOP = 64  # of the base's chances of a token that are kept one by one; the others count together
EACH = 2  # replies beside a step
ROWS = 2**14  # of the table that are widened at a time
KEY = 23  # of the generator that chooses them


@dataclass(frozen=True)
class Reply:
    """The ids of a prompt and of what the base replied; `start` is where the reply begins."""

    ids: list[int]
    start: int


def write_replies(folder: Path, replies: Sequence[Reply]) -> None:
    """Keep them in a run's folder."""
    write_atomic(folder / FILE, json.dumps([[reply.ids, reply.start] for reply in replies]))


class KeptReplies:
    """The replies of a run, with the base's chances of their tokens."""

    def __init__(self, replies: Sequence[Reply], model: Multimodal, device: Device, weight: float, seed: int) -> None:
        """`weight` is that of the divergence beside the objective."""
        self.replies, self.model, self.device = list(replies), model, device
        self.weight, self.seed = weight, seed
        was_training = model.training
        model.eval()
        with torch.no_grad(), lora.switched_off(model):
            chances = (self._log_chances([reply]) for reply in self.replies)
            self.base = [each.topk(min(TOP, each.shape[1])) for each in chances]
        model.train(was_training)

    @classmethod
    def of_run(cls, folder: Path, model: Multimodal, device: Device, weight: float, seed: int) -> KeptReplies | None:
        """Those that `write_replies` left in a run's folder; None where there are none."""
        if not weight or not (folder / FILE).is_file():
            return None
        replies = [Reply(ids, start) for ids, start in json.loads((folder / FILE).read_text(encoding="utf-8"))]
        return cls(replies, model, device, weight, seed)

    def backward(self, step: int) -> float:
        """Add the gradient of a step's replies to those of the parameters. Returns their divergence, nats a token."""
        generator = np.random.default_rng([self.seed, step, KEY])
        chosen = generator.choice(len(self.replies), min(EACH, len(self.replies)), replace=False)
        own = self._log_chances([self.replies[number] for number in chosen])
        top = torch.cat([self.base[number].values for number in chosen])
        mine = own.gather(1, torch.cat([self.base[number].indices for number in chosen]))
        rest, my_rest = ((1 - part.exp().sum(-1)).clamp(min=1e-6) for part in (top, mine))
        apart = (top.exp() * (top - mine)).sum(-1) + rest * (rest.log() - my_rest.log())
        divergence = apart.mean()
        (self.weight * divergence).backward()
        return float(divergence.detach())

    def _log_chances(self, replies: Sequence[Reply]) -> Tensor:
        """Of the next tokens that are text, before each token of the replies: (N, V) in fp32."""
        length, device = max(len(reply.ids) for reply in replies), self.device.torch
        ids = torch.zeros(len(replies), length, dtype=torch.long)
        learned = torch.zeros(len(replies), length, dtype=torch.bool)
        for row, reply in enumerate(replies):
            ids[row, : len(reply.ids)] = torch.tensor(reply.ids)
            learned[row, reply.start - 1 : len(reply.ids) - 1] = True
        ids, learned = ids.to(device), learned.to(device)
        with self.device.autocast():
            table = self.model.token_embedding.split_table()
            hidden = self.model.backbone(table.rows(ids.flatten()).view(*ids.shape, -1))[learned]
            dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
            rows = self.model.output_embedding.split_table().frozen
            logits = [hidden.to(dtype) @ part.to(dtype).t() for part in rows.split(ROWS)]
        return torch.cat(logits, 1).float().log_softmax(-1)
