"""Tuning: a study of trials over a recipe's own fields, and whether the best beats the default on fresh seeds.

A study's folder holds `study.json` (what was decided, and all figures), the trials' runs under `trials/` and those on
fresh seeds under `fresh/`, `best.yaml`, `report.html` and, unless another storage is named, Optuna's `journal.log`.
One process asks and tells; workers train. The same command goes on where a study stopped: a trial that was cut short
goes on from its own checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from plait.core.config import Recipe, parse_recipe
from plait.core.dist import install_command
from plait.core.errors import PlaitError
from plait.core.files import only_writer, read_json, write_atomic, write_json
from plait.core.objective import losses_of_row
from plait.core.progress import StudyNews
from plait.core.rng import key_of
from plait.data.dataset import Dataset
from plait.reports.report import read_run
from plait.training.run import Progress
from plait.tuning.report import uncompared, verdict, write_study_report
from plait.tuning.space import Field, check_objective, fields_of, score, with_values
from plait.tuning.workers import Job, Message, Worker, Workers

try:
    import optuna
    from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
    from optuna.storages.journal import JournalFileBackend, JournalStorage
    from optuna.trial import FrozenTrial, Trial, TrialState
    from sqlalchemy.exc import SQLAlchemyError
except ImportError as error:
    raise PlaitError(f"Tuning needs Optuna ({error}). Run: {install_command('tune')}") from error

VERSION = 1
CHECKS = 20  # times in a trial that it may be pruned, at equal shares of its schedule
WARM = 5  # of these before the first that may prune; and finished trials that a pruned one is held against
ERRORS = 3  # times that a trial may fail before it is given up
BEAT = 15  # seconds between signs of life in a storage that several machines share
SILENCE = 120  # seconds after which a machine that gave none is taken for dead


@dataclass(frozen=True)
class Plan:
    """What is asked of a study; all but the first three may change when it goes on."""

    recipe: Recipe
    over: list[str]
    objective: str = "loss"
    trials: int = 20
    seeds: int = 3
    processes: int = 1
    device: str = "auto"


def tune(
    dataset: Dataset, folder: Path, plan: Plan, tell: Callable[[StudyNews], None], storage: str | None = None
) -> dict[str, Any]:
    """Run a study, or go on with it; returns what `study.json` then holds.

    Raises PlaitError for what the user can mend: another study's folder, fields that cannot be tuned, no val split,
    a storage that cannot be reached, a trial that cannot train.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings(), only_writer(folder):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Heartbeat of storage")
        try:
            return _Study(dataset, folder, plan, tell, storage).run()
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise PlaitError(
                f"The study's storage failed: {reason}. Once it is there, the same command goes on."
            ) from None


class _Study:
    """A study on this machine; on others the same command may work on the same storage."""

    def __init__(
        self, dataset: Dataset, folder: Path, plan: Plan, tell: Callable[[StudyNews], None], storage: str | None
    ) -> None:
        check_objective(plan.objective, dataset)
        if len(dataset.indices("val")) < 2:
            raise PlaitError(f"{dataset.path} has no val split, by which trials are compared. Prepare it with one.")
        self.dataset, self.folder, self.plan, self.tell = dataset, folder, plan, tell
        self.shared = storage is not None
        self.fields = fields_of(plan.recipe, dataset, plan.over)
        self.metadata = self._open()
        self.owner: str = self.metadata["owner"]
        self.storage = _storage(storage, folder)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=WARM - 1, n_warmup_steps=WARM)
        self.search, self.fresh = (
            optuna.create_study(
                storage=self.storage, study_name=self.metadata["name"] + end, direction="minimize", load_if_exists=True,
                pruner=pruner,
            )
            for end in ("", "-fresh")
        )  # fmt: skip
        self.active: dict[Worker, Trial] = {}
        self.left: list[Trial] = []  # cut short, to be taken up first

    def _open(self) -> dict[str, Any]:
        """Begin or go on. Refuses the folder of another study."""
        shards = "".join(shard.sha256 for shard in self.dataset.manifest.shards)
        settings = {
            "data": hashlib.sha256(shards.encode()).hexdigest(),
            "recipe": self.plan.recipe.model_dump(mode="json"),
            "fields": [field.metadata() for field in self.fields],
            "objective": self.plan.objective,
        }
        name = "plait-" + hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / "study.json"
        if not path.exists():
            facts = {
                "version": VERSION, "name": name, "dataset": str(self.dataset.path), "settings": settings,
                "shared": self.shared, "owner": uuid.uuid4().hex, "source": None,
            }  # fmt: skip
            write_json(path, facts)
            return facts
        study: dict[str, Any] = read_json(path)
        if not isinstance(study, dict) or study.get("version") != VERSION or "settings" not in study:
            raise PlaitError(f"{path} is not of a study that this Plait can go on with. Choose another folder with -o.")
        # Settings that a newer Plait has beside those of the study stand at their defaults.
        old = parse_recipe(study["settings"]["recipe"], str(path)).model_dump(mode="json")
        known = {**study["settings"], "recipe": old}
        different = [key for key, value in settings.items() if known.get(key) != value]
        if study["shared"] != self.shared:
            different.append("storage")
        if different:
            raise PlaitError(
                f"{self.folder} holds a study with another {' and another '.join(different)}. "
                "Choose another folder with -o, or delete it."
            )
        return study

    def run(self) -> dict[str, Any]:
        if self._first():
            default = {field.name: field.default for field in self.fields}
            self.search.enqueue_trial(default)
            for field in self.fields:
                if field.guard:
                    other = next(choice for choice in field.choices if choice != field.default)
                    self.search.enqueue_trial({**default, field.name: other})
        workers = Workers(self.plan.processes, self.dataset.path, self.plan.device)
        try:
            self._work(workers, self.search, "trials", self._ask, self.plan.trials)
            self._enqueue_fresh()
            waiting = self.fresh.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            total = len(waiting) + len(_counted(self.fresh))
            self._work(workers, self.fresh, "fresh seeds", self._ask_fresh, total)
        finally:
            workers.close()
        return self._write(finished=True)

    # --- which trial comes next ---

    def _first(self) -> bool:
        """Whether it is for this machine to give the study the default recipe as trial 0."""
        if self.search.get_trials(deepcopy=False):
            return False
        if not self.shared:
            return True
        if "first" not in self.search.user_attrs:
            self.search.set_user_attr("first", self.owner)
            time.sleep(1)  # of two that come at once, the later mark stands
        if self.search.user_attrs["first"] == self.owner:
            return True
        deadline = time.monotonic() + BEAT
        while not self.search.get_trials(deepcopy=False):
            if time.monotonic() > deadline:
                return True  # that machine is gone
            time.sleep(0.5)
        return False

    def _ask(self) -> Trial | None:
        """The next trial, or None where as many as are wanted have been begun."""
        trials = self.search.get_trials(deepcopy=False)
        waiting = any(trial.state is TrialState.WAITING for trial in trials)
        if len(_counted(self.search)) >= self.plan.trials and not waiting:
            return None
        # What a trial draws is a function of how many there were, also in a study that was taken up again.
        key = f"{self.plan.recipe.training.seed} {len(trials)} {self.owner if self.shared else ''}"
        self.search.sampler = optuna.samplers.TPESampler(
            seed=key_of(key) % 2**32, n_startup_trials=max(self.plan.trials // 5, 4)
        )
        trial = self.search.ask()
        if sum(other.number < trial.number for other in _counted(self.search)) >= self.plan.trials:
            self.search.tell(trial, state=TrialState.FAIL)  # another machine was quicker
            return None
        trial.set_user_attr("owner", self.owner)
        return trial

    def _ask_fresh(self) -> Trial | None:
        if not self.fresh.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return None
        trial = self.fresh.ask()
        if _pair(self.fresh.get_trials(deepcopy=False)[trial.number]) == _NO_PAIR:
            self.fresh.tell(trial, state=TrialState.FAIL)  # another machine was quicker
            return None
        trial.set_user_attr("owner", self.owner)
        return trial

    def _enqueue_fresh(self) -> None:
        """Ask for the default and the best recipe on fresh seeds, unless nothing beat the default."""
        best, seed = self._best(), self.plan.recipe.training.seed
        there = {_pair(trial) for trial in self.fresh.get_trials(deepcopy=False)}
        for fresh in range(seed + 1, seed + 1 + self.plan.seeds):
            for number in (0, best.number):
                if best.number and (number, fresh) not in there:
                    self.fresh.enqueue_trial({"trial": number, "seed": fresh})

    def _best(self) -> FrozenTrial:
        done = [trial for trial in _counted(self.search) if trial.state is TrialState.COMPLETE]
        if not done:
            why = next((t.user_attrs[k] for t in _counted(self.search) for k in _WHY if k in t.user_attrs), "")
            raise PlaitError(f"No trial of {self.folder} came to its end. {why}".strip())
        return min(done, key=lambda trial: (trial.value, trial.number))

    # --- the work ---

    def _work(
        self,
        workers: Workers,
        study: optuna.Study,
        stage: str,
        ask: Callable[[], Trial | None],
        total: int,
    ) -> None:
        """Train until a study is over; what had been begun here before comes first."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        own_trials = [t for t in running if not self.shared or t.user_attrs.get("owner") == self.owner]
        self.left = [Trial(study, trial._trial_id) for trial in own_trials]
        beaten = -math.inf
        while True:
            # The first prepares what all use.
            while workers.free and not (self.active and self.metadata["source"] is None):
                trial = self.left.pop(0) if self.left else ask()
                if trial is None:
                    break
                self.active[workers.give(self._job(study, trial))] = trial
                beaten = -math.inf
            if time.monotonic() - beaten > BEAT:
                self._beat(study)
                beaten = time.monotonic()
            if not self.active:
                if len(_finished(study)) >= total:
                    return
                time.sleep(1)  # other machines still train
            for worker, message in workers.receive(1.0):
                line = self._handle_message(study, worker, message)
                if line:
                    self._write(finished=False)
                if line or message.kind == "progress":
                    self.tell(StudyNews(stage, len(_finished(study)), total, _at_work(message), line))

    def _job(self, study: optuna.Study, trial: Trial) -> Job:
        """The run of a trial, or of a trial's recipe on a fresh seed; values that it has not been given are drawn."""
        if study is self.search:
            folder, seed = self.folder / "trials" / f"{trial.number:04d}", None
            values = {field.name: _suggest(trial, field) for field in self.fields}
        else:
            number, seed = trial.suggest_int("trial", 0, 10**9), trial.suggest_int("seed", 0, 2**40)
            folder = self.folder / "fresh" / f"{number:04d}-seed-{seed}"
            values = self.search.get_trials(deepcopy=False)[number].params
        reuse = self.folder / self.metadata["source"] if self.metadata["source"] else None
        recipe = with_values(self.plan.recipe, self.fields, values, seed)
        return Job(folder, recipe, reuse if reuse != folder else None, asks=study is self.search and trial.number > 0)

    def _beat(self, study: optuna.Study) -> None:
        """A sign of life for the trials at work here; those of machines that gave none for long are begun again."""
        if isinstance(self.storage, RDBStorage):
            for trial in self.active.values():
                self.storage.record_heartbeat(trial._trial_id)
            fail_stale_trials(study)

    def _handle_message(self, study: optuna.Study, worker: Worker, message: Message) -> str:
        """Act on what a worker tells; returns a line where a trial is over."""
        trial = self.active[worker]
        if message.kind == "progress":
            if message.value.work == "model":
                self._prepared(worker.job)
            return ""
        if message.kind == "validation":
            go_on = self._note(trial, message.value)
            if worker.job is not None and worker.job.asks:
                worker.send(go_on)
            return ""
        job = self._job(study, self.active.pop(worker))
        if message.kind == "done":
            self._prepared(job)
            value = self._value(job.folder)
            if math.isfinite(value):
                return self._end(study, trial, TrialState.COMPLETE, value)
            message = Message("diverged", "The loss on val is not finite.")
        if message.kind in ("failed", "died"):
            errors = study.get_trials(deepcopy=False)[trial.number].user_attrs.get("errors", 0) + 1
            trial.set_user_attr("errors", errors)
            if errors < ERRORS and message.kind == "failed":
                raise PlaitError(f"Trial {trial.number}: {message.value} The same command then goes on.")
            if errors < ERRORS:
                self.left.append(trial)  # from its checkpoint
                return ""
            trial.set_user_attr("failed", message.value)
            return self._end(study, trial, TrialState.FAIL)
        if message.kind == "diverged":
            self._prepared(job)
            trial.set_user_attr("diverged", message.value)
        return self._end(study, trial, TrialState.PRUNED)

    def _value(self, folder: Path) -> float:
        """The objective at a run's best checkpoint."""
        trained = read_json(folder / "checkpoints" / "best" / "config.json")["training"]
        losses = trained["validation"]
        if not losses:  # it was saved by a signal, before it was validated
            rows = [row for row in read_run(folder).log if row["split"] == "val" and row["step"] == trained["step"]]
            losses = {name: value for row in rows for name, value in losses_of_row(row).items()}
        return score(losses, self.plan.objective, self.plan.recipe)

    def _prepared(self, job: Job | None) -> None:
        """The first run that has its tokenizer, codecs and cache lends them to all that follow."""
        if self.metadata["source"] is None and job is not None:
            self.metadata["source"] = str(job.folder.relative_to(self.folder))
            write_json(self.folder / "study.json", self.metadata)

    def _note(self, trial: Trial, progress: Progress) -> bool:
        """Note a validation; whether the trial may go on. Trial 0, the default, always may."""
        at = CHECKS * progress.done // progress.total
        value = score(progress.losses, self.plan.objective, self.plan.recipe)
        known = trial.study.get_trials(deepcopy=False)[trial.number]
        if known.state is not TrialState.RUNNING:
            return False  # this machine was taken for dead, and another began it again
        if at > max(known.intermediate_values, default=0):
            trial.report(value, at)
        return trial.number == 0 or progress.done >= progress.total or not trial.should_prune()

    def _end(self, study: optuna.Study, trial: Trial, state: TrialState, value: float | None = None) -> str:
        if study.get_trials(deepcopy=False)[trial.number].state is not TrialState.RUNNING:
            return f"{trial.number}: another machine trains it again"
        study.tell(trial, value, state)
        return _line(_row(study.get_trials(deepcopy=False)[trial.number]))

    # --- what is known ---

    def _write(self, finished: bool) -> dict[str, Any]:
        """Bring study.json, best.yaml and the report up to date, and clear what only the best trial's run keeps."""
        counted, plan = sorted(_counted(self.search), key=lambda trial: trial.number), self.plan
        complete = [trial for trial in counted if trial.state is TrialState.COMPLETE]
        fresh = [(_pair(trial), _row(trial)) for trial in _finished(self.fresh)]
        self.metadata |= {
            "asked": {"trials": plan.trials, "seeds": plan.seeds},
            "finished": finished,
            "counts": {s: sum(_row(t)["state"] == s for t in counted) for s in ("complete", "pruned", "failed")},
            "trials": [_row(trial) for trial in counted],
            "fresh": [
                {"trial": n, "seed": seed, "state": row["state"], "value": row["value"]} for (n, seed), row in fresh
            ],
        }
        self.metadata.pop("verdict", None)
        if complete:
            best = self._best()
            self.metadata["best"] = _row(best)
            self.metadata["importance"] = _importance(self.search, complete, self.fields)
            self._write_recipe(best)
            if finished:
                self.metadata["verdict"] = self._verdict(best)
            keep = {self.folder / "trials" / f"{best.number:04d}"}
            for trial in counted:
                folder = self.folder / "trials" / f"{trial.number:04d}"
                if trial.state.is_finished() and folder not in keep:
                    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_json(self.folder / "study.json", self.metadata)
        write_study_report(self.folder / "report.html", self.folder.resolve().name, self.metadata)
        return self.metadata

    def _verdict(self, best: FrozenTrial) -> dict[str, Any]:
        values: dict[int, list[float]] = {0: [], best.number: []}
        for trial in _finished(self.fresh):
            number, seed = _pair(trial)
            if number in values and 0 < seed - self.plan.recipe.training.seed <= self.plan.seeds:
                if trial.state is TrialState.COMPLETE and trial.value is not None:
                    values[number].append(trial.value)
                elif "diverged" in trial.user_attrs:
                    values[number].append(math.inf)
        if best.number and not self.plan.seeds:
            return uncompared(best.number)
        return verdict(values[0], values[best.number]) if best.number else verdict([], [])

    def _write_recipe(self, best: FrozenTrial) -> None:
        recipe = with_values(self.plan.recipe, self.fields, best.params)
        changed = recipe.model_dump(mode="json", exclude_defaults=True)
        head = (
            f"# Trial {best.number} of {len(_finished(self.search))}: {self.plan.objective} {best.value:.5g} on val.\n"
        )
        write_atomic(self.folder / "best.yaml", head + yaml.safe_dump(changed, sort_keys=False, allow_unicode=True))


_WHY = ("diverged", "failed")  # a trial's attributes that say why it has no value
_NO_PAIR = (-1, -1)


def _storage(url: str | None, folder: Path) -> BaseStorage:
    """The database at a URL, or the journal in the study's folder, of which this process is the one writer."""
    if url is None:
        path = folder / "journal.log"
        path.with_name(path.name + ".lock").unlink(missing_ok=True)  # of a killed process
        if path.exists() and not (known := path.read_bytes()).endswith(b"\n"):
            write_atomic(path, known[: known.rfind(b"\n") + 1])  # a line that was cut short was never acted on
        return JournalStorage(JournalFileBackend(str(path)))
    if url.startswith(("postgresql://", "postgres://")):
        url = "postgresql+psycopg://" + url.partition("://")[2]
    again = RetryHeartbeatStaleTrialCallback()
    for attempt in range(3):
        try:
            return RDBStorage(url, heartbeat_interval=BEAT, grace_period=SILENCE, heartbeat_stale_trial_callback=again)
        except ImportError as error:
            raise PlaitError(f"The driver of this storage is not installed: {error}.") from error
        except SQLAlchemyError:  # two machines made its tables at once, or it is not there
            if attempt == 2:
                raise
            time.sleep(1)
    raise AssertionError("not reached")


def _suggest(trial: Trial, field: Field) -> float | int:
    if field.choices:
        return trial.suggest_categorical(field.name, list(field.choices))
    if isinstance(field.default, int):
        return trial.suggest_int(field.name, int(field.low), int(field.high), log=field.log)
    return trial.suggest_float(field.name, field.low, field.high, log=field.log)


def _counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count: not those that wait, nor what another machine was quicker with or began again."""
    states = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state in states or (t.state is TrialState.FAIL and "failed" in t.user_attrs)]


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in _counted(study) if trial.state.is_finished()]


def _pair(trial: FrozenTrial) -> tuple[int, int]:
    """Trial and seed of a run on a fresh seed, also before it has begun."""
    values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    return values.get("trial", _NO_PAIR[0]), values.get("seed", _NO_PAIR[1])


def _row(trial: FrozenTrial) -> dict[str, Any]:
    """A trial as study.json shows it."""
    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    value = trial.value if trial.value is not None and math.isfinite(trial.value) else None
    return {
        "number": trial.number,
        "state": names.get(trial.state, "running"),
        "value": value if trial.state is TrialState.COMPLETE else None,
        "params": trial.params,
        "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else None,
        "validations": {str(at): seen for at, seen in trial.intermediate_values.items() if math.isfinite(seen)},
        "note": next((str(trial.user_attrs[key]) for key in _WHY if key in trial.user_attrs), ""),
    }


def _line(row: dict[str, Any]) -> str:
    """A trial that is over, in a line."""
    value = f" {row['value']:.4f}" if row["value"] is not None else ""
    params = ", ".join(f"{name} {number:.4g}" for name, number in row["params"].items())
    return f"{row['number']}: {row['state']}{value} ({params}){' ' + row['note'] if row['note'] else ''}"


def _at_work(message: Message) -> str:
    progress = message.value
    return f"{progress.stage} {progress.done}/{progress.total}" if isinstance(progress, Progress) else ""


def _importance(study: optuna.Study, complete: list[FrozenTrial], fields: list[Field]) -> dict[str, float]:
    """The share of each field in what separates good trials from bad; empty where too few are complete."""
    if len(complete) < 4 or len(fields) < 2:
        return {}
    with contextlib.suppress(RuntimeError, ValueError):  # values that do not vary
        importances = optuna.importance.get_param_importances(study, params=[field.name for field in fields])
        return {name: round(share, 4) for name, share in importances.items() if math.isfinite(share)}
    return {}
