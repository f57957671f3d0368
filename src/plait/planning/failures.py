"""A long run on machines that fail: how often to save, how much of the time is work, and how much of that is chance.

Failures come as a Poisson process: independent, at a constant rate. Whatever was done since the last checkpoint is
lost, and a restart, which a failure may hit too, takes its time before work goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from plait.core.errors import PlaitError

RUNS = 400  # simulated, of each interval
DRAWS = 4_000_000  # times between failures that are drawn at most


@dataclass(frozen=True)
class FailureRates:
    """What a run meets, in seconds."""

    between: float  # mean time between failures of the whole system
    save: float  # that a checkpoint stops the work
    restart: float  # from a failure until work goes on


def young(rates: FailureRates) -> float:
    """Seconds of work between checkpoints: Young, "A first order approximation to the optimum checkpoint interval",
    1974."""
    return math.sqrt(2 * rates.save * rates.between)


def daly(rates: FailureRates) -> float:
    """Seconds of work between checkpoints: Daly, "A higher order estimate of the optimum checkpoint interval for
    restart dumps", 2006."""
    ratio = rates.save / (2 * rates.between)
    if ratio >= 1:
        return rates.between
    return young(rates) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - rates.save


def expected_goodput(rates: FailureRates, interval: float) -> float:
    """The share of a long run's time that is work kept, with a checkpoint after each `interval` seconds of work."""
    m, cycle = rates.between, interval + rates.save
    if (cycle + rates.restart) / m > 500:
        return 0.0
    return interval / (m * math.exp(rates.restart / m) * math.expm1(cycle / m))


def simulate(work: float, interval: float, rates: FailureRates, seed: int = 0, runs: int = RUNS) -> np.ndarray:
    """Seconds that each of `runs` simulated runs takes for `work` seconds of work, with a checkpoint after each
    `interval` of it. The same seed draws the same failures whatever the interval.

    Raises PlaitError where next to nothing would ever be kept.
    """
    cycles = math.ceil(work / interval)
    cycle = interval + rates.save
    goodput = expected_goodput(rates, interval)
    lives = int(1.1 * work / goodput / rates.between) + 20 if goodput > 1e-3 else 0  # failures to draw at a time
    if not lives or runs * lives > DRAWS:
        raise PlaitError(
            f"With a failure every {rates.between:,.0f} s, a checkpoint every {interval:,.0f} s, "
            f"{rates.save:,.0f} s to save and "
            f"{rates.restart:,.0f} s to restart, {goodput:.2%} of the time "
            f"would be work: such a run does not end. Save more often, restart faster, or use fewer machines."
        )
    random = np.random.default_rng(seed)
    done, elapsed = np.zeros(runs), np.zeros(runs)
    finished = np.zeros(runs, bool)
    first = True
    while not finished.all():
        life = random.exponential(rates.between, (runs, lives))
        idle = np.full((runs, lives), rates.restart)
        if first:
            idle[:, 0], first = 0.0, False
        kept = np.floor(np.maximum(life - idle, 0) / cycle)  # cycles saved before each failure
        total = done[:, None] + kept.cumsum(1)
        spent = elapsed[:, None] + life.cumsum(1)
        enough = total >= cycles
        last = enough.argmax(1)  # the life in which the work ends
        ending = enough.any(1) & ~finished
        rows = np.flatnonzero(ending)
        at = last[rows]
        left = cycles - (total[rows, at] - kept[rows, at])
        elapsed[rows] = spent[rows, at] - life[rows, at] + idle[rows, at] + left * cycle
        finished |= ending
        done[~finished], elapsed[~finished] = total[~finished, -1], spent[~finished, -1]
    return elapsed - (cycles * interval - work)  # the last cycle is not a whole one


def best_interval(work: float, rates: FailureRates, seed: int = 0) -> float:
    """Seconds of work between checkpoints with the greatest mean goodput, of 25 intervals from a quarter of Young's to
    four times it, each simulated against the same failures."""
    tried: list[tuple[float, float]] = []
    for interval in young(rates) * np.geomspace(0.25, 4, 25):
        if expected_goodput(rates, float(interval)) > 1e-2:
            tried.append((float(simulate(work, float(interval), rates, seed).mean()), float(interval)))
    return min(tried)[1] if tried else daly(rates)


def forecast(
    days: float, rates: FailureRates, interval: float | None = None, seed: int = 0
) -> dict[str, float | list[float]]:
    """What a run that would take `days` without a failure takes with them; [5 %, 95 %] says how far chance goes.

    `interval` is in seconds of work; None is the best.
    """
    work = days * 86_400
    best = best_interval(work, rates, seed)
    chosen = best if interval is None else interval
    elapsed = simulate(work, chosen, rates, seed + 1)  # not the failures that the interval was chosen by
    low, high = (float(x) for x in np.quantile(elapsed, [0.05, 0.95]))
    return {
        "seconds between failures": rates.between,
        "seconds to save": rates.save,
        "seconds to restart": rates.restart,
        "best interval, seconds": best,
        "Young's interval, seconds": young(rates),
        "Daly's interval, seconds": daly(rates),
        "interval, seconds": chosen,
        "failures": float(elapsed.mean()) / rates.between,
        "goodput": work / float(elapsed.mean()),
        "goodput, 5 to 95 %": [work / high, work / low],
        "goodput expected": expected_goodput(rates, chosen),
        "days": float(elapsed.mean()) / 86_400,
        "days, 5 to 95 %": [low / 86_400, high / 86_400],
    }
