"""A whole plan: one dictionary for programs, and the tables of it for people."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import torch

from plait.core.config import SIZES
from plait.core.device import choose_device, threads
from plait.core.errors import PlaitError
from plait.planning import failures
from plait.planning.machines import OVERHEAD, USABLE, Machine, machine, peak_memory, probed_seconds, this_machine
from plait.planning.memory import (
    ACTIVATION_CHECKPOINTING,
    Layout,
    Load,
    check_fits,
    largest_batch,
    layouts,
    memory,
    smallest_change,
    total,
)
from plait.planning.networks import PRESETS, Network, compute_optimal, expected_loss, preset
from plait.planning.use import use_here

UTILISATION = 0.4  # of the peak, where none is stated: well-kept runs reach .3 to .55
DAY = 86_400.0
FINETUNED = 512  # tokens a sequence of a pretrained model's training, where none are said


@dataclass(frozen=True)
class Options:
    """What is asked of a plan; None is for the network to say."""

    gpu: str | None = None
    gpus: int = 1
    price: float | None = None  # of a device and hour
    tokens: float | None = None
    utilisation: float | None = None  # model FLOPs, of the peak
    tflops: float | None = None  # of one device as achieved, recomputation counted
    batch: int | None = None  # sequences a device
    length: int | None = None
    layout: str | None = None
    activation_checkpointing: str = "none"
    budget: str | None = None
    fails: bool = False
    between: float | None = None  # hours between the failures of one machine
    machines: int | None = None
    interruptions: float | None = None  # of the whole system, in `days`
    days: float | None = None
    save: float = 30.0  # seconds
    restart: float = 10.0  # minutes
    every: float | None = None  # minutes between checkpoints
    lora: int | None = None  # rank; else the recipe's
    seed: int = 0


def make_plan(network: Network, options: Options) -> dict[str, Any]:
    """Everything that can be said beforehand; sizes in bytes, times as named.

    Raises PlaitError for options that contradict each other, a machine that is not known, a layout that cannot fit
    and a run that failures would keep from ending.
    """
    if options.activation_checkpointing not in ACTIVATION_CHECKPOINTING:
        raise PlaitError(
            f"There is no activation checkpointing '{options.activation_checkpointing}'. "
            f"Use {', '.join(ACTIVATION_CHECKPOINTING)}."
        )
    torch.set_num_threads(threads())
    if options.lora is not None:
        network = replace(network, lora=options.lora)
    context = network.config.backbone.max_length
    length = options.length or context
    if length > context:
        raise PlaitError(f"{network.name} has a context of {context} tokens; --length {length} is more.")
    of_plait = network.recipe is not None
    local = this_machine()
    gpu = options.gpu or ("here" if of_plait or network.pretrained else "h100")
    chosen = local if gpu == "here" else machine(gpu)
    if gpu == "here" and options.gpus > 1:
        raise PlaitError("This machine is one device. Say which others with --gpu, as in --gpus 8 --gpu h100.")
    usual = SIZES[network.recipe.model.size].batch_size if network.recipe else 1
    if network.recipe is not None:
        usual = network.recipe.training.batch_size or usual
    if network.pretrained and options.length is None:
        length = min(length, FINETUNED)
    load = Load(options.batch or usual, length, options.activation_checkpointing, "autocast" if of_plait else "mixed")
    tokens = options.tokens or network.tokens
    plan: dict[str, Any] = {
        "network": network.name,
        "warnings": list(network.warnings),
        "parameters": network.parameters,
        "parts": network.parts,
        "low-rank updates": network.updates,
        "length": length,
        "batch": load.batch,
        "machine": {"name": chosen.name, "count": options.gpus, "flops": chosen.flops, "memory": chosen.memory},
        "states": load.states,
        "activation_checkpointing": load.activation_checkpointing,
        "KV cache": {"a token": network.cache_a_token(), f"{length} tokens": network.cache_a_token() * length},
    }
    if network.pretrained:
        plan["use"] = use_here(network)
    plan["layouts"] = _layouts(network, options, load, chosen)
    if not any(row["fits"] for row in plan["layouts"]):
        change = smallest_change(network, layouts(network, options.gpus)[-1], load, chosen)
        nearest = f"the smallest change that fits: {change}" if change else "no change of layout makes it fit"
        plan["warnings"].append(f"{network.name} fits in no layout of {options.gpus} x {chosen.name}; {nearest}.")
    plan["run"] = _run(network, options, length, tokens, chosen)
    if gpu == "here" and (of_plait or options.gpu is not None):
        plan["here"] = _here(network, load, chosen, plan)
    plan["compute-optimal"] = _optimal(options, plan["run"], chosen)
    if options.fails:
        plan["failures"] = _failures(options, plan["run"])
    plan["this machine"] = _room(local, of_plait)
    return plan


def _layouts(network: Network, options: Options, load: Load, chosen: Machine) -> list[dict[str, Any]]:
    """Each layout with what lies on one device, by kind and by how much is computed again."""
    possible = layouts(network, options.gpus)
    names = [layout.name for layout in possible]
    if options.layout is not None:
        if options.layout not in names:
            raise PlaitError(
                f"{options.gpus} devices allow the layouts {', '.join(names)}, not '{options.layout}' "
                f"({network.config.backbone.heads} heads must be cut evenly)."
            )
        possible = [possible[names.index(options.layout)]]
        check_fits(network, possible[0], load, chosen)
    rows = []
    for layout in possible:
        loads = {way: replace(load, activation_checkpointing=way) for way in ACTIVATION_CHECKPOINTING}
        rows.append(
            {
                "name": layout.name,
                "layout": f"{layout.tensor} x {layout.replicas}",
                "memory": memory(network, layout, load),
                "total": {way: total(network, layout, one) for way, one in loads.items()},
                "activations": {way: memory(network, layout, one)["activations"] for way, one in loads.items()},
                "largest batch": {way: largest_batch(network, layout, one, chosen) for way, one in loads.items()},
                "fits": total(network, layout, load) <= chosen.memory * USABLE,
            }
        )
    return rows


def _run(network: Network, options: Options, length: int, tokens: float | None, chosen: Machine) -> dict[str, Any]:
    """FLOPs of the run, and its time, energy and cost at the stated utilisation."""
    if options.utilisation is not None and options.tflops is not None:
        raise PlaitError("State the utilisation once: --utilisation or --tflops.")
    by_rule, with_attention = (network.flops_a_token(length, attention) for attention in (False, True))
    each = 6 if network.lora is None else 4
    rule = f"{each} N"
    run: dict[str, Any] = {
        "tokens": tokens,
        f"FLOPs a token, {rule}": by_rule,
        "FLOPs a token, with attention": with_attention,
    }
    again = 1 + 2 / each if options.activation_checkpointing == "full" else 1.0
    if options.tflops is not None:
        rate = options.tflops * 1e12 / again
        run["utilisation"] = rate / chosen.flops
    else:
        run["utilisation"] = UTILISATION if options.utilisation is None else options.utilisation
        rate = run["utilisation"] * chosen.flops
    if not 0 < run["utilisation"] <= 1:
        raise PlaitError(
            f"{rate / 1e12:,.1f} TFLOP/s is {run['utilisation']:.0%} of what {chosen.name} can do "
            f"({chosen.flops / 1e12:,.0f})."
        )
    run["FLOP/s"] = rate * options.gpus
    if tokens is None:
        return run
    hours = by_rule * tokens / (rate * options.gpus) / 3600
    run |= {
        f"FLOPs, {rule} D": by_rule * tokens,
        "FLOPs, with attention": with_attention * tokens,
        "expected loss": expected_loss(network.parameters, tokens),
        "days": hours / 24,
        "days, with attention": hours / 24 * with_attention / by_rule,
        "device hours": hours * options.gpus,
    }
    if network.lora is not None:  # the law is of training from nothing
        del run["expected loss"]
    if network.batch_tokens:
        run["steps"] = tokens / network.batch_tokens
    if chosen.watts:
        run["MWh"] = hours * options.gpus * chosen.watts * OVERHEAD / 1e6
    if options.price is not None:
        run["cost"] = hours * options.gpus * options.price
    return run


def _here(network: Network, load: Load, local: Machine, plan: dict[str, Any]) -> dict[str, Any]:
    """What `plait train` would take of this machine: traced and probed, not by formula."""
    device = choose_device(training=True)
    activation_checkpointing = load.activation_checkpointing == "full"
    states = 16 * network.parameters if network.lora is None else 4 * network.parameters + 16 * network.updates
    if states > local.memory * USABLE:
        return {"fits": False, "states": states, "room": local.memory * USABLE}
    one, two = (
        peak_memory(network.config, n, load.length, device, activation_checkpointing, network.lora) for n in (2, 4)
    )
    each = max((two - one) / 2, 1.0)
    peak = one + each * (load.batch - 2)
    largest = int((local.memory * USABLE - one) / each + 2)
    facts: dict[str, Any] = {
        "fits": peak <= local.memory * USABLE, "peak": peak, "largest batch": max(largest, 0),
        "room": local.memory * USABLE,
    }  # fmt: skip
    if not facts["fits"]:
        return facts
    seconds = probed_seconds(network.config, load.batch, load.length, device, activation_checkpointing, network.lora)
    facts |= {"step seconds": seconds, "tokens/s": load.batch * load.length / seconds}
    rate = network.flops_a_token(load.length, attention=False) * facts["tokens/s"]
    facts["utilisation"] = rate / local.flops
    plan["run"]["utilisation"], plan["run"]["FLOP/s"] = facts["utilisation"], rate
    recipe = network.recipe
    if plan["run"]["tokens"] is not None:
        plan["run"]["days"] = plan["run"]["tokens"] / facts["tokens/s"] / DAY
        plan["run"].pop("days, with attention")
        plan["run"]["device hours"] = plan["run"]["days"] * 24
    elif recipe is not None:
        minutes = recipe.training.minutes or SIZES[recipe.model.size].minutes
        facts |= {"minutes": minutes, "steps in that time": int(minutes * 60 / seconds)}
    return facts


def _optimal(options: Options, run: dict[str, Any], chosen: Machine) -> dict[str, Any] | None:
    """The best size and data for a budget: FLOPs, days or money; else for as many FLOPs as the run has."""
    flops = run.get("FLOPs, 6 N D")
    if options.budget is not None:
        match = re.fullmatch(r"(\$?)(\d+(?:\.\d+)?(?:e\+?\d+)?)(d|days?)?", options.budget.strip().lower())
        if not match or (match[1] and match[3]):
            raise PlaitError(
                f"--budget {options.budget} is not understood. Write FLOPs (1e22), days (10d) or money ($50000)."
            )
        amount = float(match[2])
        if match[1] and not options.price:
            raise PlaitError("A budget in money needs --price, of a device and hour.")
        if match[1]:
            flops = amount / float(options.price or 1) * 3600 * run["FLOP/s"] / options.gpus
        else:
            flops = amount * DAY * run["FLOP/s"] if match[3] else amount
    if not flops:
        return None
    parameters, tokens = compute_optimal(flops)
    return {
        "FLOPs": flops, "parameters": parameters, "tokens": tokens, "expected loss": expected_loss(parameters, tokens),
        "days": flops / run["FLOP/s"] / DAY,
    }  # fmt: skip


def _failures(options: Options, run: dict[str, Any]) -> dict[str, Any]:
    """The run with failures: of the whole system as counted, or of so many machines."""
    if "days" not in run:
        raise PlaitError("How long the run is depends on its tokens: say --data-tokens.")
    if options.interruptions:
        if not options.days:
            raise PlaitError("Interruptions need the days that they were counted in: --interruptions 466 --in-days 54.")
        between = options.days * DAY / options.interruptions
    elif options.between:
        between = options.between * 3600 / (options.machines or max(round(options.gpus / 8), 1))
    else:
        raise PlaitError(
            "--failures needs how often machines fail: --mtbf HOURS of one machine (and --machines, else one "
            "for 8 devices), or --interruptions N --in-days D of the whole system."
        )
    trouble = failures.FailureRates(between, options.save, options.restart * 60)
    return dict(failures.forecast(run["days"], trouble, options.every * 60 if options.every else None, options.seed))


def _room(local: Machine, of_plait: bool) -> dict[str, Any]:
    """Which networks known by name this machine can train, with one sequence of 256 tokens at a time, and use."""
    room = local.memory * USABLE
    trains, runs = [], []
    for name in PRESETS:
        other = preset(name)
        context = min(other.config.backbone.max_length, 256)
        if total(other, Layout("one"), Load(1, context, "none", "autocast")) <= room:
            trains.append(name)
        if 2 * other.parameters + other.cache_a_token() * other.config.backbone.max_length <= room:
            runs.append(name)
    return {"name": local.name, "memory": local.memory, "FLOP/s": local.flops, "trains": trains, "runs in bf16": runs}


# --- for people -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """A table: its title, the heads of its columns, its rows."""

    title: str
    heads: list[str]
    rows: list[list[str]]


class Unit(Enum):
    """What a figure of a plan counts."""

    NUMBER = auto()
    BYTES = auto()
    SHARE = auto()
    MONEY = auto()
    TIME = auto()


UNITS = {
    "peak": Unit.BYTES,
    "memory": Unit.BYTES,
    "room": Unit.BYTES,
    "states": Unit.BYTES,
    "utilisation": Unit.SHARE,
    "goodput": Unit.SHARE,
    "goodput, 5 to 95 %": Unit.SHARE,
    "goodput expected": Unit.SHARE,
    "cost": Unit.MONEY,
    "days": Unit.TIME,
    "days, 5 to 95 %": Unit.TIME,
    "step seconds": Unit.TIME,
    "seconds between failures": Unit.TIME,
    "seconds to save": Unit.TIME,
    "seconds to restart": Unit.TIME,
    "best interval, seconds": Unit.TIME,
    "Young's interval, seconds": Unit.TIME,
    "Daly's interval, seconds": Unit.TIME,
    "interval, seconds": Unit.TIME,
}


def big(value: float) -> str:
    """A number in the three figures that a plan deserves: 1.23M, 175B, 3.14e+23."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1e15:
            return f"{value / size:.3g}{letter}" if value / size < 999.5 else f"{value / size:.0f}{letter}"
    return f"{value:.3g}" if abs(value) < 1e15 else f"{value:.2e}"


def gigabytes(value: float) -> str:
    """Bytes as gigabytes, for people."""
    return f"{value / 1e9:,.3g}" if value < 999.5e9 else f"{value / 1e9:,.0f}"


def sheets(plan: dict[str, Any]) -> list[Sheet]:
    """The tables of a plan."""
    if "parts" not in plan:  # no language model of our engine
        return [
            _use_sheet(plan),
            Sheet("", [], [[key, _shown(Unit.NUMBER, value)] for key, value in plan["what for"].items()]),
        ]
    count = plan["parameters"]
    parts = [[name, f"{n:,}", f"{n / count:.1%}"] for name, n in plan["parts"].items()]
    if plan["low-rank updates"]:
        parts.append(["low-rank updates, trained alone", f"{plan['low-rank updates']:,}", ""])
    tables = [Sheet(f"{plan['network']}: {count:,} parameters", ["part", "parameters", "share"], parts)]
    if "use" in plan:
        tables.append(_use_sheet(plan))
    layouts_ = plan["layouts"]
    kinds = list(dict.fromkeys(kind for row in layouts_ for kind in row["memory"]))
    rows = [["tensor x data", *(row["layout"] for row in layouts_)]]
    for kind in kinds:
        rows.append([kind, *(gigabytes(row["memory"][kind]) if kind in row["memory"] else "" for row in layouts_)])
    for way, words in zip(
        ACTIVATION_CHECKPOINTING, ("total", "total, scores recomputed", "total, blocks recomputed"), strict=True
    ):
        rows.append([words, *(gigabytes(row["total"][way]) for row in layouts_)])
    rows.append(["fits", *("yes" if row["fits"] else "no" for row in layouts_)])
    rows.append(["largest batch", *(" / ".join(map(str, row["largest batch"].values())) for row in layouts_)])
    where = plan["machine"]
    title = (
        f"GB to train on one device: {plan['batch']} x {plan['length']} tokens, {plan['states']} states, "
        f"activation checkpointing {plan['activation_checkpointing']}; "
        f"{where['count']} x {where['name']}, {gigabytes(where['memory'])} GB"
    )
    tables.append(Sheet(title, ["", *(row["name"] for row in layouts_)], rows))
    titles = {"run": "The run", "here": "On this machine, as plait train does it", "failures": "With failures",
              "compute-optimal": "Compute-optimal for these FLOPs", "KV cache": "KV cache in bf16",
              "this machine": "What fits on this machine"}  # fmt: skip
    for name, title in titles.items():
        if plan.get(name):
            known = {key: value for key, value in plan[name].items() if value is not None}
            units = dict.fromkeys(known, Unit.BYTES) if name == "KV cache" else UNITS
            rows = [[key, _shown(units.get(key, Unit.NUMBER), value)] for key, value in known.items()]
            tables.append(Sheet(title, [], rows))
    return tables


def _use_sheet(plan: dict[str, Any]) -> Sheet:
    rows = plan["use"]
    heads = ["--precision", "weights, GB", "in use, GB", "fits", "tokens/s", "of a prompt"][: len(rows[0])]
    cells = [
        [
            row["precision"], gigabytes(row["weights"]), gigabytes(row["in use"]), "yes" if row["fits"] else "no",
            *(big(row[name]) for name in ("tokens/s", "prompt tokens/s") if name in row),
        ]
        for row in rows
    ]  # fmt: skip
    return Sheet(f"Used on this machine: {plan['network']}, {plan['parameters']:,} parameters", heads, cells)


def _shown(unit: Unit, value: Any) -> str:
    """A value of a plan, for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(v if isinstance(v, str) else _shown(unit, v) for v in value) or "none"
    if not isinstance(value, int | float):
        return str(value)
    if unit is Unit.BYTES:
        return f"{value / 1e9:,.3g} GB" if value >= 1e8 else f"{value / 1e6:,.3g} MB"
    if unit is Unit.SHARE:
        return f"{value:.1%}"
    if unit is Unit.MONEY:
        return f"{value:,.0f}"
    if unit is Unit.TIME:
        return f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
    return big(value)
