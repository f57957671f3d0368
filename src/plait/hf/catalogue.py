"""The pretrained models that lie on this machine: in the Hugging Face cache and in folders that are named. Nothing is
downloaded, and no weight is read: sizes come from files, shapes from headers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.hf import huggingface
from plait.hf.hub import parameters_of

CONTRASTIVE = {"clip", "siglip", "siglip2"}
WAVE = "conv_stride"  # in the configuration of an encoder that reads a waveform
DESCRIBES = {"vision-encoder-decoder", "blip", "blip-2", "llava", "smolvlm", "git"}
HEAD = "train --init-from"


@dataclass(frozen=True)
class LocalModel:
    """A model on the disk."""

    name: str
    folder: Path
    model_type: str
    bytes: int  # of its weights' files
    parameters: int  # 0 where they are not known without a reader
    licence: str  # as its card says; empty where it says nothing
    verbs: tuple[str, ...]
    encodes: str | None  # the modality that it reads as the encoder below a head: text, image or audio; None for none
    writes: bool  # whether it is a language model of our engine

    def memory(self, bits: float) -> int:
        """Bytes that the weights take at so many bits each."""
        return round(self.parameters * bits / 8) or self.bytes


def models(folders: Sequence[str | Path] = (), cache: bool = True) -> list[LocalModel]:
    """The pretrained models on this machine, the smallest first. Nothing is downloaded.

    Args:
        folders: each a model, or a folder of models.
        cache: look in the Hugging Face cache too.

    Raises PlaitError where a folder does not exist.
    """
    places: dict[Path, str] = {}
    for folder in folders:
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise PlaitError(f"--models {folder}: there is no such folder.")
        for place in (folder, *sorted(folder.iterdir())):
            places.setdefault(place, str(place))
    if cache:
        places |= _cached()
    local_models = [one for place, name in places.items() if (one := _model(place, name)) is not None]
    return sorted(local_models, key=lambda one: (one.bytes, one.name))


def _cached() -> dict[Path, str]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return {}
    newest = {}
    for repo in repos:
        if repo.repo_type == "model" and repo.revisions:
            revision = max(repo.revisions, key=lambda one: one.last_modified)
            newest[Path(revision.snapshot_path)] = repo.repo_id
    return newest


def _model(place: Path, name: str) -> LocalModel | None:
    """The model of a folder or GGUF file; None where it is none that can be used."""
    if place.suffix == ".gguf" and place.is_file():
        return LocalModel(name, place, "gguf", place.stat().st_size, 0, "", ("generate", "serve"), None, False)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    if not files or not (place / "config.json").is_file():
        return None
    try:
        config = read_json(place / "config.json")
    except PlaitError:
        return None
    if not isinstance(config, dict) or config.get("model_type") in (None, "plait", "plait-head", "plait-dual-encoder"):
        return None
    writes = huggingface.runs(place)
    encodes = None if writes else _encodes(place, config)
    return LocalModel(
        name=name,
        folder=place,
        model_type=str(config["model_type"]),
        bytes=sum(file.stat().st_size for file in files),
        parameters=parameters_of(place),
        licence=licence_of(place),
        verbs=_verbs(place, config, writes, encodes),
        encodes=encodes,
        writes=writes,
    )


def _encodes(place: Path, config: dict[str, Any]) -> str | None:
    if config["model_type"] in DESCRIBES:
        return None
    if config["model_type"] == "whisper" or WAVE in config:
        return "audio"
    if (place / "preprocessor_config.json").is_file():
        return "image"
    if (place / "tokenizer.json").is_file() or (place / "vocab.txt").is_file():
        return "text"
    return None


def _verbs(place: Path, config: dict[str, Any], writes: bool, encodes: str | None) -> tuple[str, ...]:
    kind = config["model_type"]
    if writes:
        chats = (place / "chat_template.jinja").is_file() or "chat_template" in _text(place / "tokenizer_config.json")
        return ("generate", *(("chat",) if chats else ()), "decide", "serve", f"{HEAD} --lora")
    if kind in DESCRIBES:
        return ("describe",)
    first = {
        "text": ("classify --labels", "embed", "reply"),
        "image": ("classify --labels", "embed", "index") if kind in CONTRASTIVE else (),
        "audio": ("transcribe",) if kind == "whisper" else (),
    }
    return () if encodes is None else (*first[encodes], HEAD)


def licence_of(place: Path) -> str:
    """The licence that the card in a model's folder names, "" where there is none."""
    match = re.search(r"^license:\s*(\S+)", _text(place / "README.md").partition("\n---")[0], re.MULTILINE)
    return match[1] if match else ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
