"""Bytes on one device in training, by kind and by parallel layout, and the smallest change that makes one fit.

Sources: states a parameter, Rajbhandari et al., "ZeRO", 2020; activations and what tensor and sequence parallelism
leave of them, Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, whose
sbh (34 + 5 a s / h) a layer is here counted part by part, so that gated layers and grouped heads are counted too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from plait.core.errors import PlaitError
from plait.model.transformer import TransformerConfig
from plait.planning.machines import MACHINES, USABLE, Machine
from plait.planning.networks import Network

# Bytes a parameter: weights, gradients, optimizer. "mixed": bf16 weights and gradients, an fp32 copy and two moments.
# "autocast", as `plait train` does: fp32 weights and gradients, two moments.
STATES = {"mixed": (2, 2, 12), "autocast": (4, 4, 8)}
ACTIVATION_CHECKPOINTING = (
    "none",
    "selective",
    "full",
)  # nothing; the attention's scores, as fused kernels do by themselves; blocks
LOGIT = 6  # bytes: bf16 logits, and the fp32 log-probabilities that the backward pass needs


@dataclass(frozen=True)
class Layout:
    """How `devices` share the work: each block's products cut over `tensor` of them, the rest of the way data parallel.
    `sequence` cuts what lies between the products too; `sharded` shares all states out (FSDP, ZeRO-3)."""

    name: str
    devices: int = 1
    tensor: int = 1
    sequence: bool = False
    sharded: bool = False

    @property
    def replicas(self) -> int:
        """How many hold the same part of the model."""
        return self.devices // self.tensor

    def __str__(self) -> str:
        ways = [f"tensor{' and sequence' if self.sequence else ''} {self.tensor}"] if self.tensor > 1 else []
        if self.replicas > 1:
            ways.append(f"{'FSDP' if self.sharded else 'DDP'} {self.replicas}")
        return " x ".join(ways) or "one device"


@dataclass(frozen=True)
class Load:
    """What lies on one device at once: `batch` sequences of `length` tokens."""

    batch: int
    length: int
    activation_checkpointing: str = "none"
    states: str = "mixed"


def layouts(network: Network, devices: int, tensor: int = 8) -> list[Layout]:
    """The layouts that so many devices allow; `tensor` is the most that products are cut over, a machine's devices."""
    possible = [Layout("one")]
    if devices > 1:
        possible += [Layout("ddp", devices), Layout("fsdp", devices, sharded=True)]
    heads = network.config.backbone.heads
    cut = max(n for n in range(1, min(tensor, devices) + 1) if heads % n == 0 and devices % n == 0)
    if cut > 1:
        possible += [Layout("tensor", devices, cut), Layout("sequence", devices, cut, sequence=True)]
        if devices > cut:
            possible.append(Layout("sequence+fsdp", devices, cut, sequence=True, sharded=True))
    return possible


def layer_activations(config: TransformerConfig, load: Load, tensor: int = 1, sequence: bool = False) -> float:
    """Bytes that a layer keeps for its backward pass, at two bytes a number and one a dropout mask."""
    d, tokens, dropout = config.width, load.batch * load.length, config.dropout > 0
    if load.activation_checkpointing == "full":
        return 2.0 * d * tokens
    q, k = config.heads * config.head_width, config.kv_heads * config.head_width
    between = 8 * d + 2 * d * dropout  # the norms' inputs and outputs, and two masks
    gated = config.gated  # up, gate, its silu and their product, instead of one and its gelu
    within = 4 * q + 4 * k + (8 if gated else 4) * config.hidden
    scores = (5 if dropout else 2) * config.heads * load.length if load.activation_checkpointing == "none" else 0
    return tokens * (between / (tensor if sequence else 1) + (within + scores) / tensor)


def memory(network: Network, layout: Layout, load: Load) -> dict[str, float]:
    """Kind -> bytes on one device. Encoders' activations are not in it."""
    c, tokens = network.config.backbone, load.batch * load.length
    replicated = network.parts.get("positions", 0) + network.parts["norms"]  # which tensor parallelism does not cut
    own_parameters = (network.parameters - replicated) / layout.tensor + replicated
    shards = layout.replicas if layout.sharded else 1
    updates = network.updates / layout.tensor
    trained = own_parameters if network.lora is None else updates
    of_weights, *others = STATES[load.states]
    weights = of_weights * (own_parameters + updates) / shards
    gradients, optimizer = (size * trained / shards for size in others)
    kinds = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    if shards > 1:
        kinds["gathered block"] = 2.0 * network.block / layout.tensor
    layer = layer_activations(c, load, layout.tensor, layout.sequence)
    cut = layout.tensor if layout.sequence else 1
    ends = tokens * c.width * (4 + (1 if c.dropout > 0 else 0)) / cut  # the final norm's input and output, a mask
    kinds["activations"] = c.layers * layer + ends
    if load.activation_checkpointing == "full":  # one layer at work
        kinds["activations"] += layer_activations(
            c, replace(load, activation_checkpointing="none"), layout.tensor, layout.sequence
        )
    kinds["logits"] = float(LOGIT) * tokens * network.config.vocabulary.size / layout.tensor
    return kinds


def total(network: Network, layout: Layout, load: Load) -> float:
    """Bytes on one device, of all kinds that `memory` lists."""
    return sum(memory(network, layout, load).values())


def largest_batch(network: Network, layout: Layout, load: Load, machine: Machine) -> int:
    """How many sequences a device holds at once; 0 where not even one fits."""
    one, two = (total(network, layout, replace(load, batch=n)) for n in (1, 2))
    return max(math.floor((machine.memory * USABLE - one) / (two - one)) + 1, 0)


def fits(network: Network, layout: Layout, load: Load, machine: Machine) -> bool:
    """Whether a load fits the memory of one device of the machine."""
    return total(network, layout, load) <= machine.memory * USABLE


def _changes(
    network: Network, layout: Layout, load: Load, machine: Machine
) -> Iterator[tuple[str, Layout, Load, Machine]]:
    """Ways out, the smallest change first: of the load, then of the layout, then of the machines."""
    loads = [("", load)]
    for way in ACTIVATION_CHECKPOINTING[ACTIVATION_CHECKPOINTING.index(load.activation_checkpointing) + 1 :]:
        loads.append((f"--activation-checkpointing {way}", replace(load, activation_checkpointing=way)))
    for words, other in list(loads):
        batch = min(largest_batch(network, layout, other, machine), load.batch)
        if 0 < batch < load.batch:
            loads.append((f"{words} --batch {batch}".strip(), replace(other, batch=batch)))
    if load.batch > 1:
        loads.append(
            ("--activation-checkpointing full --batch 1", replace(load, activation_checkpointing="full", batch=1))
        )
    for words, other in loads[1:]:
        yield words, layout, other, machine
    least = [loads[0], loads[-1]]
    others = [one for one in layouts(network, layout.devices) if one.name != layout.name]
    for other_layout in sorted(others, key=lambda one: (not one.sharded, one.tensor)):
        for words, other in least:
            yield f"--layout {other_layout.name} {words}".strip(), other_layout, other, machine
    count = layout.devices
    while count < 2**16 and machine in MACHINES.values():  # this machine is one device
        count *= 2
        for other_layout in layouts(network, count):
            if other_layout.name == layout.name or other_layout.sharded:
                for words, other in least:
                    text = f"--gpus {count} --layout {other_layout.name} {words}".strip()
                    yield text, other_layout, other, machine
    for name, other_machine in MACHINES.items():
        if other_machine.memory > machine.memory:
            for words, other in least:
                yield f"--gpu {name} {words}".strip(), layout, other, other_machine


def smallest_change(network: Network, layout: Layout, load: Load, machine: Machine) -> str | None:
    """Options that make what does not fit fit, the nearest to what was asked; None where nothing does."""
    for words, other, its_load, its_machine in _changes(network, layout, load, machine):
        if fits(network, other, its_load, its_machine):
            return words
    return None


def check_fits(network: Network, layout: Layout, load: Load, machine: Machine) -> None:
    """Raise PlaitError where a layout cannot fit: which part is too large, and the smallest change that fits."""
    if fits(network, layout, load, machine):
        return
    kinds = memory(network, layout, load)
    room = machine.memory * USABLE
    worst = max(kinds, key=lambda kind: kinds[kind])
    sizes = ", ".join(f"{kind} {size / 1e9:,.1f}" for kind, size in kinds.items())
    alone = " by itself" if kinds[worst] > room else ""
    change = smallest_change(network, layout, load, machine)
    raise PlaitError(
        f"{network.name} does not fit: {layout} needs {sum(kinds.values()) / 1e9:,.1f} GB on each device of "
        f"{machine.name}, which has room for {room / 1e9:,.1f}. The largest part is "
        f"{worst} with {kinds[worst] / 1e9:,.1f} GB"
        f"{', too large' + alone if alone else ''} ({sizes}). "
        + (
            f"The smallest change that fits: {change}."
            if change
            else "No change of layout fits; take a smaller network."
        )
    )
