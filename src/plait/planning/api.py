"""`plait.plan`: what a model weighs, where it fits, and what training it costs, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.core.errors import PlaitError
from plait.core.frames import html_table

if TYPE_CHECKING:
    from plait.planning.estimate import Sheet


class TrainingPlan:
    """A plan.

    Attributes:
        facts: everything that is foreseen; sizes in bytes, times as named.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts

    @property
    def warnings(self) -> list[str]:
        """What to know about the figures."""
        return list(self.facts["warnings"])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return self.facts

    def sheets(self) -> list[Sheet]:
        """The tables of the plan, for people."""
        from plait.planning.estimate import sheets

        return sheets(self.facts)

    def __repr__(self) -> str:
        return f"TrainingPlan({self.facts['network']}: {self.facts['parameters']:,} parameters)"

    def _repr_html_(self) -> str:
        return "".join(html_table(sheet.heads, sheet.rows, sheet.title) for sheet in self.sheets())


def plan(
    source: str | Path | None = None,
    *,
    preset: str | None = None,
    gpu: str | None = None,
    gpus: int = 1,
    price: float | None = None,
    data_tokens: float | None = None,
    utilisation: float | None = None,
    tflops: float | None = None,
    batch: int | None = None,
    length: int | None = None,
    layout: str | None = None,
    activation_checkpointing: str = "none",
    lora: int | None = None,
    budget: str | None = None,
    failures: bool = False,
    mtbf: float | None = None,
    machines: int | None = None,
    interruptions: float | None = None,
    in_days: float | None = None,
    save_seconds: float = 30.0,
    restart_minutes: float = 10.0,
    every: float | None = None,
    seed: int = 0,
) -> TrainingPlan:
    """Foresee what a model weighs, where it fits, and what training it costs.

    Args:
        source: a recipe, a run, a folder with a config.json, or a GGUF file. Of a pretrained model it is foreseen what
            its use takes of this machine too.
        preset: instead, a network known by name: tiny, gpt3-175b, llama3-405b, ...
        gpu: `here`, or a row of the table in docs/how-to/plan.md; here if left out, for presets h100.
        gpus: so many of them.
        price: of a device and hour.
        data_tokens: tokens to train on.
        utilisation: model FLOPs, as a share of the peak; .4 if left out.
        tflops: instead, TFLOP/s that a device reaches, recomputation counted.
        batch: sequences a device holds at a time.
        length: tokens a sequence; the context if left out.
        layout: only this one: one, ddp, fsdp, tensor, sequence, sequence+fsdp.
        activation_checkpointing: none, selective (attention scores) or full.
        lora: train low-rank updates of this rank alone.
        budget: for the best size: FLOPs ("1e22"), days ("10d"), money ("$50000").
        failures: simulate the run on machines that fail.
        mtbf: hours between the failures of one machine.
        machines: machines; one for 8 devices if left out.
        interruptions: instead of mtbf: of the whole system, in `in_days` days.
        in_days: days in which so many interruptions came.
        save_seconds: that a checkpoint stops the work.
        restart_minutes: from a failure until work goes on.
        every: minutes between checkpoints; the best if left out.
        seed: of the simulation.

    Raises PlaitError for arguments that contradict each other, an unknown machine and a layout that cannot fit.
    """
    from plait.planning import networks
    from plait.planning.estimate import Options, make_plan
    from plait.planning.use import encoder_plan

    if (source is None) == (preset is None):
        raise PlaitError("Say what to plan: a recipe, or --preset NAME. Example: plait plan --preset gpt3-175b")
    if source is not None and gpu is None and (facts := encoder_plan(str(source))) is not None:
        return TrainingPlan(facts)
    network = networks.preset(preset) if preset is not None else networks.network(str(source))
    options = Options(
        gpu=gpu, gpus=gpus, price=price, tokens=data_tokens, utilisation=utilisation, tflops=tflops, batch=batch,
        length=length, layout=layout, activation_checkpointing=activation_checkpointing, budget=budget,
        fails=failures, between=mtbf, machines=machines, interruptions=interruptions, days=in_days,
        save=save_seconds, restart=restart_minutes, every=every, seed=seed, lora=lora,
    )  # fmt: skip
    return TrainingPlan(make_plan(network, options))
