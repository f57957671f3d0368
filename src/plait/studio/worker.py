"""The process of a job: prepare, train, evaluate, then predict what the result page shows.

Run as `python -m plait.studio.worker PROJECT RUN`. Each step is a command that goes on where it was when it is called
again, so a job may be killed at any moment and started anew.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from plait.core.errors import PlaitError
from plait.core.files import write_atomic, write_json
from plait.modalities.media import MEDIA
from plait.studio.findings import write_review
from plait.studio.jobs import Job, read_job
from plait.studio.labels import LabelEdits
from plait.studio.listing import EXCERPT, labelled_rows, list_project, write_labels
from plait.studio.workspace import Project

REVIEWED = 60  # labels that are likely wrong, and records to label next, at most
PREDICTIONS = 400  # records of test that are shown
RESERVE = 64 << 10  # bytes that are let go to write down why a job failed when the disk is full
WAIT_SECONDS = 30.0  # for the studio to write the job down
KILLED = ("The system ended it, most likely because the memory was used up. Close other programs or choose a smaller "
          "size under Options, then go on.")  # fmt: skip


class StoppedError(Exception):
    """The job was asked to stop."""


class CommandError(Exception):
    """A command failed; the message is its last line for people."""


def main() -> None:
    """Do the job that the command line names."""
    project = Project(Path(sys.argv[1]))
    job = _await_job(project, sys.argv[2])
    signal.signal(signal.SIGTERM, _stop)
    reserve = job.folder / "reserve"
    try:
        reserve.write_bytes(bytes(RESERVE))
        job = _work(project, job)
    except (StoppedError, KeyboardInterrupt):
        job.at("stopped")
    except (CommandError, PlaitError, OSError) as error:
        reserve.unlink(missing_ok=True)
        job.at("failed", str(error))
    except Exception as error:
        traceback.print_exc()
        reserve.unlink(missing_ok=True)
        job.at("failed", f"Plait met something that it did not foresee: {type(error).__name__}: {error}. The log below "
               "says where. Go on tries it again.")  # fmt: skip
    else:
        job.at("done")
    finally:
        reserve.unlink(missing_ok=True)


def _work(project: Project, job: Job) -> Job:
    prepare, train, _ = job.commands()
    job = job.at("preparing")
    if not is_prepared(project):
        prepare_data(project, prepare)
        write_atomic(project.folder / "prepared.json", json.dumps({"state": _state(project)}))
    job = job.at("training")
    _run(train)
    job = job.at("evaluating")
    _evaluate(job)
    job = job.at("predicting")
    write_predictions(project, job)
    _review(job)
    return job


def prepare_data(project: Project, command: list[str]) -> None:
    """Make the dataset; where labels of a linked folder were edited, from rows in memory: nothing is written there."""
    write_labels(project)
    if project.linked is None or not LabelEdits(project.folder / "labels.jsonl").edits:
        _run(command)
        return
    import plait

    columns = {files.file_column: kind for kind, files in MEDIA.items()}
    rows = [
        {columns.get(name, name): project.source / value if name in columns else value for name, value in row.items()}
        for row in labelled_rows(project)
    ]
    plait.prepare(rows, project.data)


def _state(project: Project) -> dict[str, float | str]:
    """What the dataset was made of: it is made again where this changes."""
    listing = list_project(project)
    edits = project.folder / "labels.jsonl"
    newest = max((_mtime(project, item.path) for item in listing.items), default=0.0)
    return {"source": str(project.source), "files": len(listing.items), "newest": newest,
            "edits": edits.stat().st_mtime if edits.exists() else 0.0}  # fmt: skip


def _mtime(project: Project, path: str) -> float:
    place = project.source if project.source.is_file() else project.source / path
    return place.stat().st_mtime


def is_prepared(project: Project) -> bool:
    """Whether the dataset is of the files and labels as they are now."""
    try:
        prepared_state = json.loads((project.folder / "prepared.json").read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError):
        return False
    return (project.data / "manifest.json").is_file() and prepared_state == _state(project)


def _run(command: list[str]) -> None:
    """Run a command of Plait. Raises CommandError with what it said, StoppedError where it was told to stop."""
    sys.stdout.write("$ " + shlex.join(command) + "\n")
    sys.stdout.flush()
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    last_lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            if line.startswith("plait:"):
                last_lines = []
            last_lines = [*last_lines[-5:], line.strip()]
        code = process.wait()
    except StoppedError:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    if code in (130, 143, -signal.SIGTERM):
        raise StoppedError
    if code == -signal.SIGKILL:
        raise CommandError(KILLED)
    if code:
        words = " ".join(filter(None, last_lines)).removeprefix("plait:").strip()
        raise CommandError(words or f"{command[1]} ended with code {code}.")


def _evaluate(job: Job) -> None:
    """As `plait evaluate`, with the verdict and the main figures kept for the result page."""
    import plait

    evaluation = plait.evaluate(job.run_folder, progress=True)
    verdict = evaluation.verdict
    verdict_record: dict[str, Any] = {
        "sentence": verdict.sentence if verdict else "",
        "next_step": verdict.next_step if verdict else "",
        "learnt": verdict.learnt if verdict else None,
        "figures": evaluation.headlines(),
    }
    first = next(iter(evaluation.findings.outcomes), None)
    if first is not None:
        verdict_record["outcome"] = {**asdict(first), "better": first.better}
    write_json(job.folder / "verdict.json", verdict_record)


def write_predictions(project: Project, job: Job) -> None:
    """Write `predictions.jsonl` into the job's folder: what the model says of records of test, of val where there is no
    test. Nothing is written for a model that cannot name anything."""
    from plait.data.dataset import Dataset
    from plait.inference.model import load

    target = job.folder / "predictions.jsonl"
    if not (job.run_folder / "checkpoints").exists():
        return
    model, dataset = load(job.run_folder), Dataset.open(project.data)
    labels = getattr(model, "labels", {})
    column = next((name for name in labels if labels[name] and name in dataset.columns), None)
    media = next((name for name, kind in dataset.columns.items() if kind != "text"), None)
    source = media or next((name for name in dataset.columns if name != column), None)
    if column is None or source is None or "classify" not in model.verbs:
        return
    split = "test" if dataset.manifest.counts.get("test") else "val"
    rows = []
    # In an order of its own, so that the first ones shown are of all labels.
    for index in np.random.default_rng(0).permutation(dataset.indices(split))[:PREDICTIONS]:
        record = dataset.record(int(index))
        if record.parts.get(column) is None or record.parts.get(source) is None:
            continue
        answers = model.classify_inputs([(source, record.parts[source])], column=column, top=3)[0]
        simple = _simple_answer(model, source, column, record.parts[source])
        rows.append({
            "id": record.id, "source": record.source, "kind": dataset.columns[source], "truth": record.parts[column],
            "answers": [[str(label), round(float(chance), 4)] for label, chance in answers],
            "column": source, "simple": simple, "none": answers.none_of_these,
            "text": record.parts[source][:EXCERPT] if isinstance(record.parts[source], str) else "",
        })  # fmt: skip
    write_atomic(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _review(job: Job) -> None:
    """Which labels are likely wrong and what to label next, where the run decides about labels."""
    import plait

    try:
        review = plait.label_review(job.run_folder, most=REVIEWED)
    except PlaitError as error:
        sys.stdout.write(f"No labels were looked at: {error}\n")
        return
    write_review(review, job.folder / "review.json")


def _simple_answer(model: Any, source: str, column: str, part: Any) -> str:
    """What the linear model on simple features says of a record, "" where the run has none."""
    classifiers = model.checkpoint.classifiers
    classifier = next((one for one in classifiers if (one.source, one.target) == (source, column)), None)
    if classifier is None:
        return ""
    value = part if isinstance(part, str) else model.modality(source).windows(part)[0]
    return str(classifier.labels[int(classifier.linear_scores([value])[0].argmax())])


def _await_job(project: Project, run: str) -> Job:
    """The job, once the studio has written this process's number into it."""
    go = project.folder / "jobs" / run / "go"
    end = time.monotonic() + WAIT_SECONDS
    while not go.exists() and time.monotonic() < end:
        time.sleep(0.05)
    go.unlink(missing_ok=True)
    job = read_job(project, run)
    if job is None:
        sys.exit(f"{project.folder} has no job {run}.")
    return job


def _stop(number: int, frame: object) -> None:
    raise StoppedError


if __name__ == "__main__":
    main()
