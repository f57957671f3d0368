"""What is wrong with an installation, a dataset, a run or a checkpoint: one finding a line."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

from plait.core import isa
from plait.core.device import choose_device, threads
from plait.core.dist import DISTRIBUTION, VERSION, install_command
from plait.core.errors import PlaitError
from plait.core.files import link_target, read_json, sha256_file
from plait.data.dataset import Dataset
from plait.data.demo_data import Speech
from plait.data.stores import read_place
from plait.kernels import build
from plait.kernels import generation as native
from plait.kernels import training as in_training
from plait.kernels.choice import choice_folder, known_choices
from plait.model import checkpoint
from plait.reports.report import read_run

SHOWN = 4  # measured choices that are printed
LITTLE, NOTHING = 5e9, 5e8  # bytes free on a disk that are worth a warning, and too few to train

# For what each optional part is; the parts for developers and benchmarks are left out.
EXTRAS = {
    "huggingface": "Hugging Face models that transformers runs",
    "serve": "plait serve",
    "mcp": "plait mcp",
    "studio": "plait studio, and the page of plait serve",
    "search": "plait index and plait search",
    "explain": "integrated gradients",
    "tune": "plait tune",
    "postgresql": "plait tune on many machines",
    "hub": "data sets of the Hugging Face hub",
    "media": "video, HEIC, JPEG XL, AAC",
    "s3": "s3:// as source and target",
    "az": "az:// as source and target",
    "onnx": "export to ONNX",
    "tensorboard": "TensorBoard's curves",
    "speech": "the demo's voices",
    "ray": "training under Ray Train",
}


@dataclass(frozen=True)
class Finding:
    """`level` is "ok", "warn" (it works, but less well) or "fail"; `text` says what to do where it is not ok."""

    level: Literal["ok", "warn", "fail"]
    subject: str
    text: str


def check_installation(folder: Path) -> list[Finding]:
    """Versions, optional parts, processor, GPU, and the disk that `folder` is on."""
    return [
        _python(),
        *_packages(),
        *(finding for name in ("torchvision", "torchaudio") for finding in _beside_torch(name)),
        *_processor(),
        *_gpu(),
        _disk(folder),
        _speech(),
    ]


def check_folder(path: Path) -> list[Finding]:
    """The integrity of a run, a checkpoint or a dataset. Raises PlaitError where it is none of these."""
    if (path / "run.json").is_file():
        return _run(path)
    if (path / "config.json").is_file():
        return _checkpoint(path)
    if (path / "manifest.json").is_file():
        return _dataset(path)
    raise PlaitError(f"{path} is no run (run.json), checkpoint (config.json) or dataset (manifest.json).")


# --- the installation -------------------------------------------------------------------------------------------


def _python() -> Finding:
    description = f"Plait {VERSION}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("ok", "python", description)


def _packages() -> list[Finding]:
    """What the installation needs, and its optional parts, each with whether it imports."""
    needs: dict[str, list[Requirement]] = defaultdict(list)
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        how = "the package runs from its source and is not installed: pip install -e ."
        return [Finding("warn", "packages", how)]
    for line in lines:
        need = Requirement(line)
        if need.name == DISTRIBUTION:  # an extra of an extra
            continue
        if need.marker is None:
            needs[""].append(need)
        for extra in EXTRAS:
            if need.marker is not None and need.marker.evaluate({"extra": extra}):
                needs[extra].append(need)
    broken = _broken([need.name for requirements in needs.values() for need in requirements if _version(need.name)])
    findings, absent = [], []
    for extra, requirements in needs.items():
        subject = f"extra {extra}" if extra else "packages"
        install = install_command(extra)
        missing = [need.name for need in requirements if _version(need.name) is None]
        wrong = [f"{need.name} {_version(need.name)} is not {need.specifier}" for need in requirements if _unlike(need)]
        wrong += [broken[need.name] for need in requirements if need.name in broken]
        wrong += [f"{name} is missing" for name in missing if not extra]
        if wrong:
            findings.append(Finding("fail", subject, f"{'; '.join(wrong)}. {install}"))
        elif missing:
            absent.append(extra)
        else:
            findings.append(
                Finding("ok", subject, ", ".join(f"{need.name} {_version(need.name)}" for need in requirements))
            )
    if absent:
        uses = "; ".join(f"{extra}: {EXTRAS[extra]}" for extra in absent)
        findings.append(Finding("ok", "not installed", f"{uses}. To add one: {install_command(absent[0])}"))
    return findings


def _unlike(need: Requirement) -> bool:
    """Whether another version is installed than what is needed."""
    version = _version(need.name)
    return version is not None and not need.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


_MARK = "\x1e"  # begins a line of ours: libraries print too while they are imported


def _broken(names: list[str]) -> dict[str, str]:
    """Which packages do not import, and why; tried in another process, for a broken library may take its process
    along: then they are tried one by one."""
    modules: dict[str, str] = {}
    for module, owners in metadata.packages_distributions().items():
        for owner in owners:
            name = owner.lower().replace("_", "-")
            if name == module.replace("_", "-") or (name not in modules and not module.startswith("_")):
                modules[name] = module
    code = "import importlib, json\n" + "\n".join(
        f"try: importlib.import_module({modules.get(name, name)!r})\n"
        f"except BaseException as error: print({_MARK!r} + json.dumps([{name!r}, repr(error)[:300]]))"
        for name in names
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode and len(names) > 1:
        return {name: why for one in names for name, why in _broken([one]).items()}
    if done.returncode:
        return {names[0]: f"importing {names[0]} ends the process with code {done.returncode}"}
    answers = [json.loads(line[1:]) for line in done.stdout.split("\n") if line.startswith(_MARK)]
    return {name: f"{name} does not import: {why}" for name, why in answers}


def _beside_torch(name: str) -> list[Finding]:
    """Whether torchvision or torchaudio, where installed, is the one made for this torch."""
    torch_version, version = _version("torch"), _version(name)
    if version is None or torch_version is None:
        return []
    for line in metadata.requires(name) or []:
        need = Requirement(line)
        if need.name == "torch" and not need.specifier.contains(torch_version.partition("+")[0], prereleases=True):
            text = f"{name} {version} is made for torch{need.specifier}, here is {torch_version}"
            return [Finding("fail", name, f"{text}: install the pair, or remove {name}")]
    if broken := _broken([name]):
        return [
            Finding("fail", name, f"{broken[name]}. Install the {name} made for torch {torch_version}, or remove it")
        ]
    return [Finding("ok", name, f"{version}, with torch {torch_version}")]


def _processor() -> list[Finding]:
    device = choose_device("cpu", training=True)
    precision = "bf16 units: training uses them" if device.dtype is torch.bfloat16 else "no bf16 units: fp32"
    findings = [Finding("ok", "processor", f"{os.cpu_count()} cores, {precision}")]
    used, allowed = threads(), _quota()
    source = " (OMP_NUM_THREADS)" if os.environ.get("OMP_NUM_THREADS") else ""
    if allowed is not None and used > allowed + 0.5:
        text = f"{used} threads{source}, but this container may use {allowed:g} cores: set OMP_NUM_THREADS"
        findings.append(Finding("warn", "threads", f"{text}={max(int(allowed), 1)}"))
    else:
        findings.append(Finding("ok", "threads", f"{used}{source}"))
    levels = ", ".join(level.name for level in isa.supported()) or "none that kernels are written for"
    cap = isa.cap()
    capped = f"; {isa.VARIABLE} caps them at {cap.name}" if cap else ""
    findings.append(Finding("ok", "instructions", f"{levels}{capped}"))
    findings.append(_kernel("generation", f"a step on the processor: {native.backend_name(choose_device('cpu'))}"))
    blocks = in_training.backend_name(choose_device("cpu", training=True))
    findings.append(_kernel("training", f"blocks on the processor: {blocks}"))
    findings += _measured()
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    wrong = float((a @ a - (a.double() @ a.double()).float()).abs().max())
    level: Literal["ok", "fail"] = "ok" if wrong < 1e-2 else "fail"
    findings.append(Finding(level, "arithmetic", f"the largest error of a product of matrices is {wrong:.1g}"))
    return findings


def _measured() -> list[Finding]:
    """The newest choices between kernel and PyTorch; a cache that has seen many models holds hundreds."""
    choices = known_choices()
    findings = [Finding("ok", "measured", choice.words()) for choice in choices[:SHOWN]]
    if len(choices) > SHOWN:
        findings.append(Finding("ok", "measured", f"{len(choices) - SHOWN} older choices lie in {choice_folder()}"))
    return findings


def _kernel(use: str, text: str) -> Finding:
    """Whether there is a kernel, and where there is none that could be, why."""
    kernel = build.kernel(use)
    if kernel.library is None and kernel.wanted:
        return Finding("warn", use, f"slower than it could be, for PyTorch computes: {kernel.reason}")
    return Finding("ok", use, text)


def _quota() -> float | None:
    """Cores that a Linux container may use."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _gpu() -> list[Finding]:
    if torch.cuda.is_available():
        findings = []
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            text = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {bf16}, CUDA {torch.version.cuda}"
            try:
                bool((torch.ones(8, 8, device=f"cuda:{number}") @ torch.ones(8, 8, device=f"cuda:{number}") == 8).all())
                findings.append(Finding("ok", f"gpu {number}", text))
            except RuntimeError as error:
                findings.append(Finding("fail", f"gpu {number}", f"{text}: {str(error).splitlines()[0]}"))
        return findings
    if torch.backends.mps.is_available():
        return [Finding("ok", "gpu", "Apple GPU (MPS)")]
    if Path("/dev/nvidia0").exists():
        why = "its driver does not answer" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        return [Finding("warn", "gpu", f"there is an NVIDIA GPU, but {why}: install torch for this driver's CUDA")]
    return [Finding("ok", "gpu", "none; everything runs on the processor")]


def _disk(folder: Path) -> Finding:
    place = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("fail", "disk", f"{place} cannot be written to; choose another folder")
    if free < LITTLE:
        return Finding("fail" if free < NOTHING else "warn", "disk", f"{text}: free some space before training")
    return Finding("ok", "disk", text)


def _speech() -> Finding:
    try:
        return Finding("ok", "espeak", f"{len(Speech().variants())} voices for the demo")
    except PlaitError as error:
        return Finding("warn", "espeak", f"{error} Without it the demo has no audio; all else works.")


# --- folders ----------------------------------------------------------------------------------------------------


def _dataset(path: Path) -> list[Finding]:
    """Each shard against the manifest's sha256."""
    raw = read_json(path / "manifest.json")
    findings = []
    for shard in raw.get("shards", []) if isinstance(raw, dict) else []:
        file = path / str(shard.get("file"))
        if not file.is_file():
            findings.append(Finding("fail", "shard", f"{file} is missing"))
        elif sha256_file(file) != shard.get("sha256"):
            findings.append(
                Finding("fail", "shard", f"{file} was altered or cut: its sha256 differs from the manifest's")
            )
    if findings:
        return [*findings, Finding("fail", "dataset", "Copy the dataset again, or run plait prepare again.")]
    try:
        dataset = Dataset.open(path)
    except PlaitError as error:
        return [Finding("fail", "dataset", str(error))]
    manifest = dataset.manifest
    counts = ", ".join(f"{split} {count}" for split, count in manifest.counts.items())
    findings.append(
        Finding("ok", "dataset", f"{len(manifest.shards)} shards whole; {counts}; rejected {manifest.rejected}")
    )
    findings += [Finding("warn", "dataset", warning) for warning in manifest.warnings]
    return findings


def _checkpoint(path: Path) -> list[Finding]:
    wrong = [Finding("fail", "checkpoint", line) for line in checkpoint.verify(path)]
    return wrong or [Finding("ok", "checkpoint", f"{path}: whole, {_step_and_losses(path)}")]


def _step_and_losses(path: Path) -> str:
    try:
        training: dict[str, Any] = read_json(path / "config.json").get("training", {})
        losses = ", ".join(f"{name} {value:.4g}" for name, value in training.get("validation", {}).items())
        return f"step {training.get('step')}" + (f" ({losses})" if losses else "")
    except (PlaitError, AttributeError, TypeError, ValueError):
        return "of no known step"


def _run(path: Path) -> list[Finding]:
    """Its records, every file of its checkpoints, and which whole checkpoint would be used."""
    findings = []
    try:
        facts = read_run(path).metadata
    except PlaitError as error:
        facts = {}
        findings.append(Finding("fail", "run", str(error)))
    state = "finished" if "finished" in facts else "not finished: the same command goes on from the last checkpoint"
    findings.append(Finding("ok" if "finished" in facts else "warn", "run", f"{path}: {state}"))
    for file in sorted((path / "codecs").glob("*.safetensors")):
        known = facts.get("codecs", {}).get(file.stem, {}).get("sha256")
        if known not in (None, sha256_file(file)):
            findings.append(Finding("fail", "codec", f"{file} was altered or cut: its sha256 differs from run.json's"))
        else:
            findings.append(
                Finding("ok", "codec", f"{file.stem}: {'whole' if known else 'no sha256 was written down'}")
            )
    whole_checkpoints: dict[Path, str] = {}
    links = sorted(entry for entry in (path / "checkpoints").glob("*") if not entry.name.startswith("."))
    for folder in dict.fromkeys(_led_to(entry) for entry in links):
        names = "/".join(entry.name for entry in links if _led_to(entry) == folder)
        if wrong := checkpoint.verify(folder):
            findings += [Finding("fail", f"checkpoint {names}", line) for line in wrong]
        else:
            whole_checkpoints[folder] = _step_and_losses(folder)
            findings.append(Finding("ok", f"checkpoint {names}", whole_checkpoints[folder]))
    step, wrong = checkpoint.newest_whole(path / "checkpoints")
    best = _led_to(path / "checkpoints" / "best")
    if best in whole_checkpoints:
        findings.append(Finding("ok", "used", f"{best}, {whole_checkpoints[best]}"))
    elif step:
        findings.append(
            Finding(
                "warn",
                "used",
                f"the best checkpoint is damaged, whole is {checkpoint.series(path / 'checkpoints')[step]}",
            )
        )
    else:
        findings.append(Finding("fail", "used", f"{path} has no whole checkpoint"))
    if wrong and step:
        findings.append(Finding("warn", "resume", f"training goes on from step {step}"))
    dataset = read_place(str(facts.get("dataset", "")), path)
    if "dataset" in facts and isinstance(dataset, Path) and not (dataset / "manifest.json").is_file():
        findings.append(Finding("warn", "dataset", f"{dataset} is not there any more: evaluate with --data"))
    return findings


def _led_to(entry: Path) -> Path:
    """The folder of a step: an entry among the checkpoints, or what it is a link to."""
    target = link_target(entry)
    return entry.resolve() if target is None else (entry.parent / target).resolve()
