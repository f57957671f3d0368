"""Networks as LiteRT (TensorFlow Lite) graphs: the text-and-codes backbone here, whole classifiers in
`export_classifier`.

litert-torch brings its own versions of much that we use, so it lives in an environment of its own, made at the first
export. This process traces a network and hands over the program in a file; `tflite_worker.py`, run there, converts
it and runs what came out, and this process compares the outputs. Nothing of LiteRT is imported here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plait.core.device import exact_products
from plait.core.errors import PlaitError
from plait.core.files import cache_folder, only_writer, publish_folder, write_atomic, write_json
from plait.hf.export import Logits, card, exported_size, extended_tokenizer, must_be_free
from plait.model.checkpoint import Checkpoint

TOLERANCE = 1e-4
LITERT = "litert-torch>=0.10,<0.11"  # it is before its version 1; what the worker calls was tried with these
LONGEST = 512  # positions of a graph, where nobody says otherwise
CASES = 3  # inputs that are compared
ROOM = 4e9, 12e9  # bytes that the environment takes at most, without CUDA and with it


def export_tflite(
    checkpoint: Checkpoint, folder: Path, length: int | None = None, tell: Callable[[str], None] = lambda line: None
) -> float:
    """Write `model.tflite` (`input_ids` (1, length) int32 -> `logits` (1, length, V) fp32) and `tokenizer.json`.

    Lengths are fixed in such a graph: `length`, or the model's own up to 512. Attention is causal, so shorter texts are
    filled up on the right. Returns the largest difference of a logit between LiteRT's interpreter and ours; `tell`
    hears what takes long. Raises PlaitError where the environment cannot be made or is broken, the conversion fails,
    the difference is above 1e-4, or the folder cannot be written.
    """
    must_be_free(folder)
    longest = checkpoint.model.config.backbone.max_length
    length = min(longest, LONGEST) if length is None else length
    if not 1 <= length <= longest:
        raise PlaitError(f"The graph cannot have {length} positions: this model reads 1 to {longest}.")
    place = environment(tell)
    with tempfile.TemporaryDirectory(prefix="plait-tflite-") as scratch:
        work = Path(scratch)
        expected = hand_over(checkpoint, length, work)
        tell("Converting.")
        logits = convert(place, work)["logits"]
        worst = float(np.abs(logits - expected).max()) if logits.shape == expected.shape else float("inf")
        if not worst <= TOLERANCE:
            raise PlaitError(f"The TFLite model's logits differ by {worst:.2g} from ours; nothing was written.")
        with publish_folder(folder) as temporary:
            shutil.copyfile(work / "model.tflite", temporary / "model.tflite")
            write_atomic(temporary / "tokenizer.json", extended_tokenizer(checkpoint)[0])
            what = (
                f"a LiteRT graph, `input_ids` (1, {length}) int32 to `logits` (1, {length}, ids), padded on the right"
            )
            write_atomic(temporary / "README.md", card(checkpoint, what).replace("transformers", "litert", 1))
    return worst


def hand_over(checkpoint: Checkpoint, length: int, work: Path) -> np.ndarray:
    """Write what the worker reads: the traced backbone with whole rows, and ids of a few cases.

    Returns our logits (cases, 1, length, V) for those.
    """
    model = checkpoint.model
    size = exported_size(model.vocabulary)
    place, training = next(model.parameters()).device, model.training
    ids = torch.randint(size, (CASES, length), generator=torch.Generator().manual_seed(0))
    try:
        backbone = Logits(model, size).cpu().eval()
        return hand_over_graph(backbone, {"input_ids": ids[:, None]}, ["logits"], work)["logits"]
    finally:
        model.to(place).train(training)


def hand_over_graph(
    network: torch.nn.Module, cases: dict[str, Tensor], outputs: list[str], work: Path
) -> dict[str, np.ndarray]:
    """Write what the worker reads of a network: its program, and inputs by name, (cases, ...) each.

    Returns our outputs by name, (cases, ...) each. Raises PlaitError where torch cannot trace it.
    """
    rows = list(zip(*cases.values(), strict=True))
    with torch.no_grad(), exact_products(torch.device("cpu")):
        try:
            program = torch.export.export(network, rows[0], strict=False)
        except (RuntimeError, TypeError, ValueError) as error:
            raise PlaitError(f"torch {torch.__version__} cannot trace this network: {error}") from error
        torch.export.save(program, work / "program.pt2")
        results = [network(*row) for row in rows]
    np.savez(work / "cases.npz", **{name: values.numpy() for name, values in cases.items()})  # type: ignore[arg-type]
    write_json(work / "graph.json", {"inputs": list(cases), "outputs": outputs})
    columns = zip(*(one if isinstance(one, tuple) else (one,) for one in results), strict=True)
    return {name: torch.stack(column).numpy() for name, column in zip(outputs, columns, strict=True)}


# --- the environment --------------------------------------------------------------------------------------------


def environment_folder() -> Path:
    """Where the environment of this Python and torch lies: in the user's cache folder."""
    return cache_folder(f"tflite-py{sys.version_info[0]}.{sys.version_info[1]}-torch{_torch()}")


def _torch() -> str:
    """Our torch's version, as a requirement names it; the other one has to read what ours saves."""
    return torch.__version__.split("+")[0]


def environment(tell: Callable[[str], None] = lambda line: None) -> Path:
    """The environment's folder, made where there is none; what made it lies in `environment.json`, written last.

    Raises PlaitError where there is no room, no registry answers, or another process is making it.
    """
    place = environment_folder()
    tell(f"Environment: {place}")
    if (place / "environment.json").is_file():
        return place
    with only_writer(place):
        if (place / "environment.json").is_file():
            return place
        tell("It is made now, this once: torch and litert-torch, some 2 GB.")
        room = ROOM[torch.version.cuda is not None]
        if (free := shutil.disk_usage(place).free) < room:
            raise PlaitError(
                f"The environment may take {room / 1e9:.0f} GB, and {place} has {free / 1e9:.1f} GB. Free some, or set "
                "XDG_CACHE_HOME to a folder with more room."
            )
        _run([sys.executable, "-m", "venv", "--clear", str(place / "venv")])
        packages = [f"torch=={_torch()}", LITERT]
        _run([_python(place), "-m", "pip", "install", "--prefer-binary", "--retries", "2", *packages])
        write_json(place / "environment.json", {"python": sys.version.split()[0], "installed": packages})
    return place


def _python(place: Path) -> str:
    return str(place / "venv" / "bin" / "python")


def _run(command: list[str]) -> None:
    """Run a command that makes the environment. Raises PlaitError with what its words mean."""
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise PlaitError(why(process.stdout + process.stderr))


def why(output: str) -> str:
    """What pip's (or venv's) output means, and what to do about it."""
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "nothing was said")
    if "No space left on device" in output:
        return (
            "The disk ran full while the environment was made. Free some 4 GB, or set XDG_CACHE_HOME to another disk."
        )
    unheard = ("NewConnectionError", "NameResolutionError", "ConnectTimeout", "ProxyError", "ReadTimeout", "SSLError")
    if any(name in output for name in unheard):
        return (
            "No package registry answered. Exporting to tflite installs litert-torch once, over the network: go "
            "online, or point pip at a mirror (PIP_INDEX_URL, PIP_FIND_LINKS), and run the command again."
        )
    if "No matching distribution" in output or "ResolutionImpossible" in output:
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return (
            f"pip found no {LITERT} for Python {python} and torch {_torch()} on this machine ({last}). It has builds "
            "for Linux and macOS; another version of Python may have one."
        )
    return f"The environment could not be made: {last}"


def convert(place: Path, work: Path) -> dict[str, np.ndarray]:
    """Run the worker there on what `hand_over_graph` wrote; it adds `model.tflite`. Returns the outputs of LiteRT's
    interpreter by name, (cases, ...) each.

    Raises PlaitError where the environment is broken (and how to remake it) or litert-torch refuses the program.
    """
    worker = Path(__file__).with_name("tflite_worker.py")
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "HF_HUB_OFFLINE": "1"}
    remake = f"Remake it: rm -r '{place}', and run the command again."
    try:
        process = subprocess.run(
            [_python(place), "-I", str(worker), str(work)], capture_output=True, text=True, check=False, env=quiet
        )
    except OSError as error:
        raise PlaitError(f"The environment {place} is broken: {error.strerror}. {remake}") from error
    outcome = work / "outcome.json"
    outcome_record = json.loads(outcome.read_text()) if outcome.is_file() else {}
    if "missing" in outcome_record:
        raise PlaitError(f"The environment {place} is broken: {outcome_record['missing']}. {remake}")
    if "refused" in outcome_record:
        raise PlaitError(f"litert-torch cannot convert this model: {outcome_record['refused']}")
    if process.returncode:
        last = next(
            (line.strip() for line in reversed(process.stderr.splitlines()) if line.strip()), "nothing was said"
        )
        raise PlaitError(f"The environment {place} failed (exit code {process.returncode}): {last} {remake}")
    with np.load(work / "results.npz") as results:
        return dict(results)
