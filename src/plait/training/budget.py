"""How many steps a time budget or a cap holds, how many tokens memory holds, and whether compiling pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from plait.core.device import compiler
from plait.core.errors import PlaitError
from plait.kernels import training as training_kernels
from plait.model.multimodal import Multimodal
from plait.model.transformer import Transformer
from plait.training.parts import Budget
from plait.training.run import Progress, Run

CALIBRATION_STEPS = 8  # by which a step's time is measured
FEWEST_STEPS = 20  # of a schedule, however short the time
VALIDATION_SHARE = 0.07  # of the time, which validations take
ACTIVATION_BYTES = 512 << 20  # what a step on a processor keeps of its tokens until they were passed backwards
CONTRAST_BYTES = 2 << 30  # the same of a model that media and texts agree in
COMPILE_SECONDS = 600  # of training, from which compiling pays
WORTH_TELLING = 1 / 3  # share by which a schedule is longer or shorter than was told last
REVISED_AT = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)  # shares of the schedule after which it is planned anew


def calibrate(model: Multimodal, optimizer: torch.optim.Optimizer, step: Callable[[int], Any], seconds: float) -> int:
    """How many steps fit in the time left, by throw-away steps with a learning rate of 0; leaves the weights as they
    were."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    frozen |= {name for name in model.state_dict() if name.endswith(".text_rows")}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in frozen}
    state = torch.get_rng_state()
    for options in optimizer.param_groups:
        options["lr"] = 0.0
    begun = time.perf_counter()
    step(0)
    clock = [time.perf_counter()]
    for number in range(CALIBRATION_STEPS):
        step(number)
        clock.append(time.perf_counter())
    model.load_state_dict(weights, strict=False)
    torch.set_rng_state(state)
    left = seconds - (clock[-1] - begun)  # compiling may have taken long
    return max(int(left * (1 - VALIDATION_SHARE) / np.median(np.diff(clock))), FEWEST_STEPS)


def activation_bytes(backbone: Transformer, dtype: torch.dtype) -> int:
    """What the blocks keep of a token for the backward pass: of each the sums and norms before attention and gate,
    queries, keys, values and what they mix, gate, what is gated, and their product; of low-rank updates in bf16."""
    config = backbone.config
    floats = 8 * config.width + 3 * config.hidden
    kept = torch.bfloat16 if backbone.halves_saved else dtype
    return config.layers * floats * torch.finfo(kept).bits // 8


def tokens_at_a_time(run: Run, model: Multimodal) -> int | None:
    """How many tokens a processor computes at a time, so that a step fits into memory whatever its batch is; None for
    all. A run that goes on does as it began."""
    if run.device.kind != "cpu" or run.settings.activation_checkpointing:
        return None
    if "max_tokens" not in run.metadata:
        each = activation_bytes(model.backbone, run.device.dtype)
        # A step with a contrast that is cut takes a forward pass more, so it is cut later.
        held = CONTRAST_BYTES if model.config.embed_dim else ACTIVATION_BYTES
        run.record(max_tokens=max(held // each, 1))
    return int(run.metadata["max_tokens"])


def is_timed(budget: Budget) -> bool:
    """Whether the clock has a say in the length of the schedule: steps that nothing caps are taken all."""
    return budget.steps is None or budget.max_minutes is not None


def within(run: Run, possible: int) -> int:
    """The step at which a schedule ends that has the time to come to the step `possible`: that asked for, where it
    fits."""
    requested = run.budget.steps
    return possible if requested is None else min(run.first_step + requested, possible)


def tell_cap(run: Run, steps: int, possible: int, seconds: float) -> None:
    """Where steps were asked for and their time is capped, what to expect: so many `steps` of those that are `possible`
    in the `seconds` left."""
    requested = run.budget.steps
    if requested is None:
        return
    planned, left = steps - run.first_step, max(seconds, 0.0) / 60
    expected = left * planned / max(possible - run.first_step, 1)
    note = f"{planned} steps, some {expected:.1f} minutes as busy as it is here; they end after {left:.1f} at most"
    if planned < requested:
        note += f", which do not hold the {requested} asked for"
    run.report(Progress("note", 1, 1, note=note))


def revise(run: Run, step: int, seconds: float, used: float) -> None:
    """Plan anew where the steps so far, which `used` so many of the `seconds`, show that the machine is slower or
    faster than it was measured: what else ran beside may have begun or ended."""
    done, planned = step - run.first_step, run.steps_from(step) - run.first_step
    if not done or done not in [int(planned * share) for share in REVISED_AT]:
        return
    used = run.group.broadcast(used)
    possible = max(step + int(max(seconds - used, 0) / (used / done)), step + 1)
    steps = max(within(run, possible), step + 1)
    if not 0.9 * planned < steps - run.first_step < 1.1 * planned:
        earlier = run.metadata.get("revisions", [])
        notes = revision_notes(earlier, run.metadata["steps"] - run.first_step, steps - run.first_step)
        revision: dict[str, Any] = {"at": step, "steps": steps}
        if notes:
            revision |= {"told": list(notes), "fit": steps - run.first_step}
        run.record(revisions=[*earlier, revision])
        for note in notes.values():
            run.report(Progress("note", 1, 1, note=note))


def revision_notes(earlier: list[dict[str, Any]], planned: int, fit: int) -> dict[str, str]:
    """What to say of a schedule that is planned anew: each of "faster", "slower" and "few" once a run.

    Args:
        earlier: The revisions before; "told" holds what was said at one, "fit" how many steps that was of.
        planned: How many steps the run was first planned to have.
        fit: How many steps it is to have now.

    Returns:
        What is said, and the words of it.
    """
    told = {name for revision in earlier for name in revision.get("told", ())}
    before = next((revision["fit"] for revision in reversed(earlier) if "fit" in revision), planned)
    notes = {}
    pace = "faster" if fit > before else "slower"
    if pace not in told and abs(fit - before) >= WORTH_TELLING * before:
        notes[pace] = (
            f"steps are {pace} than they were when that was planned: {fit:,} fit in the time, not {before:,}; the "
            "schedule is stretched to that"
        )
    if fit < FEWEST_STEPS and "few" not in told:
        notes["few"] = f"{fit} step{'s' * (fit != 1)} teach hardly anything: give it more time (--minutes)"
    return notes


def compiles(run: Run, model: Multimodal, seconds: float) -> bool:
    """Whether to compile the backbone. Media vary in length, which costs compiled code its exact resuming.

    Raises PlaitError where the recipe asks for it and it is not possible here.
    """
    setting, alone = run.settings.compile, run.group.size == 1
    possible = alone and (run.device.name.startswith("cuda") or compiler() is not None)
    if setting == "on" and not possible:
        raise PlaitError("training.compile: on needs a C++ compiler (g++ or clang++), and works in a single process.")
    if setting != "auto":
        return setting == "on"
    long = run.settings.steps is None and seconds >= COMPILE_SECONDS
    kernels_suffice = training_kernels.beats_compile(run.device, model.config.backbone)
    return possible and long and not model.media and not kernels_suffice
