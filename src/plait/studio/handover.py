"""Handing a model over: files to take away, and a server that answers with a key."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Literal

import psutil

from plait.chat.replies import FILE as REPLIES
from plait.core.errors import PlaitError
from plait.core.files import json_text, read_json, remove_folder, write_json
from plait.data.stores import read_place
from plait.studio.workspace import Project

Form = Literal["page", "slim", "pairs", "onnx", "network", "transformers"]
FORMS: tuple[Form, ...] = ("page", "slim", "pairs", "onnx", "network", "transformers")
TO = {"page": "html", "onnx": "onnx", "network": "onnx", "transformers": "transformers"}  # as `plait export` calls them
TRAINING_STATE = "training_state"  # of a checkpoint: what training needs to go on, and use does not


def offered(model: Any, run: Path) -> list[Form]:
    """The forms that a run's model can be written in: "onnx" is a whole classifier, "network" what writes texts and
    codes, "pairs" a run that answers by past replies, with these."""
    from plait.chat.page_part import quotes
    from plait.hf.export_classifier import exportable
    from plait.reports.offline import page_classifier

    if quotes(run):
        return ["pairs"]
    plait_model = model.plait_model
    classifier = exportable(plait_model) if plait_model is not None else None
    page: list[Form] = ["page"] if plait_model is not None and page_classifier(plait_model) is not None else []
    generates = plait_model is not None and classifier is None and "generate" in model.verbs
    transformers: list[Form] = ["transformers"] if generates else []
    graph: list[Form] = ["onnx"] if classifier is not None else ["network"] if transformers else []
    return [*page, "slim", *graph, *transformers]


def export(project: Project, run: Path, form: str) -> Path:
    """Make a file to take away of a run's model, in `exports/RUN`; returns it. Raises PlaitError where the model cannot
    be written in that form."""
    if form not in FORMS:
        raise PlaitError(f"There is no form '{form}'. There are {', '.join(FORMS)}.")
    folder = project.folder / "exports" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    if form == "slim":
        return _zip(_best(run), folder / f"{project.name}-{run.name}.zip")
    if form == "pairs":
        return _zip_pairs(run, folder / f"{project.name}-{run.name}-pairs.zip")
    import plait

    target = folder / form
    remove_folder(target)
    exported = plait.export(run, target, to=TO[form])
    if form == "page":
        return exported.folder
    return _zip(exported.folder, folder / f"{project.name}-{run.name}-{form}.zip")


def exported_file(project: Project, run: str, form: str) -> Path:
    """A file that was made. Raises PlaitError where there is none."""
    folder = project.folder / "exports" / run
    names = {"page": folder / "page" / "classifier.html", "slim": folder / f"{project.name}-{run}.zip"}
    path = names.get(form, folder / f"{project.name}-{run}-{form}.zip")
    if form not in FORMS or not path.is_file():
        raise PlaitError("That was not made yet.")
    return path


def _best(run: Path) -> Path:
    best = run / "checkpoints" / "best"
    if not best.exists():
        raise PlaitError("No run has learnt anything yet. Start a training first.")
    return best.resolve()


def _zip(folder: Path, target: Path) -> Path:
    """A folder as a zip, without what only training needs. Weights hardly shrink, so nothing is compressed."""
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if (
                path.is_file()
                and not inside.parts[0].startswith((TRAINING_STATE, "."))
                and inside.name != "manifest.json"
            ):
                file.write(path, Path(target.stem) / inside)
        if (folder / "manifest.json").is_file():
            file.writestr(f"{target.stem}/manifest.json", _manifest(folder))
    temporary.replace(target)
    return target


def _zip_pairs(run: Path, target: Path) -> Path:
    """A run that answers by past replies, with its data, as a zip: a folder for `plait.open_replies` and
    `plait serve`."""
    facts = read_json(run / "run.json")
    data = read_place(facts["dataset"], run)
    temporary, inside = target.with_suffix(f".{os.getpid()}.tmp"), Path(target.stem)
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
        file.writestr(str(inside / "run.json"), json_text({**facts, "dataset": "data"}))
        if (run / REPLIES).is_file():
            file.write(run / REPLIES, inside / REPLIES)
        for place, folder in (("data", Path(str(data))), ("checkpoints/best", _best(run))):
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    file.write(path, inside / place / path.relative_to(folder))
    temporary.replace(target)
    return target


def _manifest(folder: Path) -> str:
    """The checkpoint's manifest without what is left out."""
    from plait.core.files import read_sealed, sealed

    manifest = read_sealed(folder / "manifest.json")
    digests = {name: digest for name, digest in manifest["sha256"].items() if not name.startswith(TRAINING_STATE)}
    return json_text(sealed({"version": manifest["version"], "sha256": digests}))


# --- a server -------------------------------------------------------------------------------------------------


def server_of(project: Project) -> dict[str, Any] | None:
    """The server of a project that runs: its run, address and process; None where none does."""
    try:
        server: dict[str, Any] = json.loads((project.folder / "server.json").read_text(encoding="utf-8"))
        process = psutil.Process(int(server["process"]))
        same_process = abs(process.create_time() - server["started"]) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, KeyError, psutil.Error):
        return None
    return server if same_process else None


def start_server(project: Project, run: Path) -> tuple[dict[str, Any], str]:
    """Serve a run's model on this machine; returns what is known of the server, and the key, which is shown once."""
    from plait.server.limits import new_key

    _best(run)
    stop_server(project)
    keys = project.folder / "server.keys"
    keys.unlink(missing_ok=True)
    key = new_key(keys, project.name.replace(" ", "-"), None).strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "plait", "serve", str(run), "--port", str(port), "--api-key-file", str(keys)]
    with (project.folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    server = {"run": run.name, "address": f"http://127.0.0.1:{port}", "process": process.pid,
             "started": psutil.Process(process.pid).create_time()}  # fmt: skip
    write_json(project.folder / "server.json", server)
    return server, key


def stop_server(project: Project) -> None:
    """Stop the server of a project, if one runs."""
    server = server_of(project)
    if server is None:
        return
    process = psutil.Process(int(server["process"]))
    process.terminate()
    try:
        process.wait(12)
    except psutil.TimeoutExpired:
        process.kill()
    (project.folder / "server.json").unlink(missing_ok=True)
