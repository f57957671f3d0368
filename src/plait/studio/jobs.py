"""A training is a process of its own, and its state is on the disk: the pages only look at it.

`NAME/jobs/N/job.json` says what runs or ran for `NAME/runs/N`. Closing the page, a second browser, or killing the
server change nothing; a job that was killed is started again and goes on where it was, as `plait train` does.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from plait.core.errors import PlaitError
from plait.core.files import write_json
from plait.studio.workspace import Project, Workspace

Stage = Literal["waiting", "preparing", "training", "evaluating", "predicting", "done", "failed", "stopped"]
RUNNING: tuple[Stage, ...] = ("waiting", "preparing", "training", "evaluating", "predicting")
STOP_SECONDS = 25.0  # until a job that was asked to stop is killed


@dataclass(frozen=True)
class Job:
    """What makes a run.

    Attributes:
        project: The project's folder.
        run: The run's name.
        options: Options of `plait train`, as on its command line.
        stage: What is being done.
        error: Why it failed, for people.
        process: The process's number, 0 where none was started.
        started: When that process began, in seconds since the epoch, so that a number used again is not mistaken.
    """

    project: Path
    run: str
    options: tuple[str, ...] = ()
    stage: Stage = "waiting"
    error: str = ""
    process: int = 0
    started: float = 0.0

    @property
    def folder(self) -> Path:
        return self.project / "jobs" / self.run

    @property
    def run_folder(self) -> Path:
        """Where the run lies."""
        return self.project / "runs" / self.run

    @property
    def log(self) -> Path:
        """The file with what its command printed."""
        return self.folder / "log.txt"

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return _process(self) is not None

    @property
    def current(self) -> Stage:
        """The stage; a job whose process is gone though it never ended counts as stopped."""
        return "stopped" if self.stage in RUNNING and not self.alive else self.stage

    def commands(self) -> list[list[str]]:
        """The commands that do the same without the studio."""
        project = Project(self.project)
        data, run = str(project.data), str(self.run_folder)
        return [
            ["plait", "prepare", str(project.source), "-o", data],
            ["plait", "train", data, "-o", run, *self.options],
            ["plait", "evaluate", run],
        ]

    def as_text(self) -> str:
        """The commands as one would type them."""
        return "\n".join(shlex.join(command) for command in self.commands())

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "job.json", {**asdict(self), "project": str(self.project)})

    def at(self, stage: Stage, error: str = "") -> Job:
        """The job at another stage, written down."""
        changed = replace(self, stage=stage, error=error)
        changed.save()
        return changed


def read_job(project: Project, run: str) -> Job | None:
    """The job of a run, None for a run that the command line made."""
    path = project.folder / "jobs" / run / "job.json"
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fields["options"] = tuple(fields.get("options", ()))
    return Job(**{**fields, "project": project.folder})  # the workspace may have moved


def running(workspace: Workspace) -> Job | None:
    """The job that runs in a workspace, None where none does: there is room for one at a time."""
    for project in workspace.projects():
        for path in (project.folder / "jobs").glob("*/job.json"):
            job = read_job(project, path.parent.name)
            if job is not None and job.stage in RUNNING and job.alive:
                return job
    return None


def start(workspace: Workspace, job: Job) -> Job:
    """Start a job, or go on with one that was stopped. Raises PlaitError where another one runs."""
    other = running(workspace)
    if other is not None:
        raise PlaitError(f"'{other.project.name}' is being trained. Stop it, or wait for its end.")
    job.folder.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "plait.studio.worker", str(job.project), job.run],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=_environment(),
        )  # fmt: skip
    began = psutil.Process(process.pid).create_time()
    started = replace(job, stage="waiting", error="", process=process.pid, started=began)
    started.save()
    (job.folder / "go").touch()  # the process waits for its number to be written down
    return started


def stop(job: Job) -> None:
    """Ask a job's processes to stop: training saves and ends; what does not end in time is killed by the next start."""
    process = _process(job)
    if process is None:
        return
    for one in [*process.children(recursive=True), process]:
        try:
            one.send_signal(signal.SIGTERM)
        except psutil.Error:
            continue


def last_lines(job: Job, count: int = 12) -> str:
    """The end of what a job printed."""
    try:
        with job.log.open("rb") as file:
            file.seek(max(job.log.stat().st_size - 8000, 0))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-count:])


def _process(job: Job) -> psutil.Process | None:
    if not job.process:
        return None
    try:
        process = psutil.Process(job.process)
        same_process = abs(process.create_time() - job.started) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return process if same_process else None


def _environment() -> dict[str, str]:
    source = str(Path(__file__).parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
