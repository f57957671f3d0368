"""Two threads that each compute half of a step: its sequences are cut in two, and each thread reads its half forward
and backward by itself, with half of the processor's threads. They wait for each other twice a step, not at each
operator.

The halves are a function of the step, and a gradient is the sum of two, the same in either order: so a step is the same
to the bit whoever comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from plait.core.device import Device
from plait.modalities.hf_encoder import HFEncoder
from plait.model.multimodal import Multimodal
from plait.training.batches import Step

T = TypeVar("T")

ENCODING = 2.0  # how much longer an operation takes in encoders, whose convolutions are small, than in the backbone


class Streams:
    """Computes what each half of a step gives; `count` threads, 1 for none but the caller's."""

    def __init__(self, count: int = 1) -> None:
        self.pool: ThreadPoolExecutor | None = None
        if count > 1:
            each = max(torch.get_num_threads() // count, 1)  # also settles the caller's own number
            self.pool = ThreadPoolExecutor(count, "streams", torch.set_num_threads, (each,))

    def halves(self, step: Step) -> list[Step]:
        """What is computed at the same time."""
        return [step] if self.pool is None else step.halves()

    def map(self, work: Callable[[int], T], count: int) -> list[T]:
        """`work` of 0 .. count - 1, in that order; with gradients where the caller has them."""
        if self.pool is None or count == 1:
            return [work(number) for number in range(count)]
        learning = torch.is_grad_enabled()

        def there(number: int) -> T:
            with torch.set_grad_enabled(learning):
                return work(number)

        return list(self.pool.map(there, range(count)))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown()


def can_be_cut(model: Multimodal, device: Device) -> bool:
    """Whether halves of a step give what the whole gives, and sooner: nothing in it draws random numbers, which come in
    one order, or is told what the other half holds; in bf16 halves take longer (docs/benchmarks/speed.md)."""
    draws = model.config.backbone.dropout > 0 or model.row_modality is not None
    foreign = any(isinstance(part, HFEncoder) for part in model.modules())
    return device.kind == "cpu" and device.dtype == torch.float32 and not draws and not foreign


def media_work(model: Multimodal) -> dict[str, float]:
    """What encoding takes a row of a sample of each medium (a row of pixels, a frame), in tokens of the backbone, by
    floating point operations; convolutions are slower ones."""
    token = 2 * sum(p.numel() for p in model.backbone.parameters())
    work = {}
    for name, modality in model.media.items():
        values, lengths = modality.batch([modality.blank()])
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            modality.encoder(values.to(next(model.parameters()).device), lengths)
        work[name] = ENCODING * counted.get_total_flops() / token / values.shape[1]
    return work
