"""What a base replies to general questions, kept while low-rank updates are trained on something else.

Updates that learn some hundred sentences change the chances of everything a little, and what the base knew by a narrow
margin goes first. So beside each step a few of the base's own replies are read, and the divergence of the trained
model's chances of their tokens from the base's, the mean of KL(base || trained), is part of what is minimised (Hinton,
Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015). The base is the model itself with its updates
switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from plait.core.device import Device
from plait.core.errors import PlaitError
from plait.core.files import read_json, write_atomic
from plait.model import lora
from plait.model.multimodal import Multimodal
from plait.training.run import Progress, Run

FILE = "general.json"  # in the run's folder
TOP = 64  # of the base's chances of a token that are kept one by one; the others count together
EACH = 2  # replies beside a step
ROWS = 2**14  # of the table that are widened at a time
KEY = 23  # of the generator that chooses them
SEVERAL = "Several processes train: what the base knows is not kept."


@dataclass(frozen=True)
class Reply:
    """The ids of a prompt and of what the base replied; `start` is where the reply begins."""

    ids: list[int]
    start: int


class BaseReplies(BaseModel):
    """What a base replied, and which base it was."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str  # as the recipe names it
    sha256: dict[str, str]  # its files of weights -> their content
    seconds: float  # that asking took; part of the time that the run is given
    replies: list[Reply]

    def write(self, folder: Path) -> None:
        """Keep them in a run's folder."""
        write_atomic(folder / FILE, self.model_dump_json())

    @classmethod
    def read(cls, folder: Path) -> BaseReplies | None:
        """Those in a run's folder; None where there are none. Raises PlaitError where the file is damaged."""
        if not (folder / FILE).is_file():
            return None
        try:
            return cls.model_validate(read_json(folder / FILE))
        except ValidationError as error:
            raise PlaitError(f"{folder / FILE} is damaged: {error.errors()[0]['msg']}.") from error


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
    def of_run(cls, run: Run, model: Multimodal) -> KeptReplies | None:
        """What a run keeps; None where it keeps nothing, or several processes train: DistributedDataParallel would take
        the second backward pass for a fault."""
        settings = run.settings
        weight = settings.lora.keep if settings.lora is not None else 0.0
        found = BaseReplies.read(run.folder) if weight else None
        if found is None:
            return None
        if run.group.size > 1:
            run.report(Progress("note", 1, 1, note=SEVERAL))
            return None
        return cls(found.replies, model, run.device, weight, settings.seed)

    def backward(self, step: int) -> float:
        """Add the gradient of a step's replies to those of the parameters. Returns their divergence, nats a token.

        Of each of the N tokens of the replies the base's TOP likeliest are compared one by one, all others together.
        """
        generator = np.random.default_rng([self.seed, step, KEY])
        chosen = generator.choice(len(self.replies), min(EACH, len(self.replies)), replace=False)
        likeliest = torch.cat([self.base[number].indices for number in chosen])  # (N, TOP) ids
        base_log = torch.cat([self.base[number].values for number in chosen])  # (N, TOP) log-chances
        trained_log = self._log_chances([self.replies[number] for number in chosen]).gather(1, likeliest)  # (N, TOP)
        base_rest, trained_rest = (  # (N,) chances of all others
            (1 - log.exp().sum(-1)).clamp(min=1e-6) for log in (base_log, trained_log)
        )
        divergences = (base_log.exp() * (base_log - trained_log)).sum(-1)  # (N,)
        divergences = divergences + base_rest * (base_rest.log() - trained_rest.log())
        divergence = divergences.mean()
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
