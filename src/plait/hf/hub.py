"""Where a model's files are: a local folder, the Hugging Face cache, the hub. Nothing here knows what is in them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError
from plait.core.files import read_json

LONGEST_HEADER = 100 << 20  # bytes of a safetensors file's header that are read
PATIENCE = 3.0  # seconds that the hub has to answer
_ENDINGS = (".json", ".safetensors", ".txt", ".model", ".jinja")
MODULES = ("[0-9]_*/config.json", "[0-9]_*/model.safetensors")  # of sentence encoders
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def encoder_names(name: str) -> tuple[str, str] | None:
    """The encoders of images and of texts that `VISION,TEXT` stands for; None for the name of one model.

    Raises PlaitError where there are not two names with one comma.
    """
    if "," not in name or Path(name).expanduser().exists():
        return None
    names = [part.strip() for part in name.split(",")]
    if len(names) != 2 or not all(names):
        raise PlaitError(
            f"--init-from {name}: write VISION,TEXT, the name of an encoder of images and that of one of texts."
        )
    return names[0], names[1]


def find(name: str | Path) -> Path:
    """The folder of a model, or its GGUF file: a local one, else the Hugging Face cache, else a download from the hub.

    Raises PlaitError, within some four seconds where the hub does not answer. Only JSON, safetensors and tokenizer
    files are fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    name = str(name)
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    if folder.exists():
        raise PlaitError(f"{name} is a file. Name the folder that holds config.json and the weights.")
    if not _HUB_NAME.fullmatch(name) or ".." in name or "--" in name:
        raise PlaitError(f"There is no folder {name}, and it is not a name of the Hugging Face hub. Check the path.")
    cached = _cached(name)
    if cached is not None and not (gone := _gaps(cached)):
        return cached
    lacking = f" (the cache lacks {gone[0]})" if cached is not None else ""
    return _download(name, lacking)


def _cached(name: str) -> Path | None:
    from huggingface_hub import constants, try_to_load_from_cache

    # By one file: a look-up of the whole snapshot fails where files that we never fetch are not in it.
    config_path = try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE)
    return Path(config_path).parent if isinstance(config_path, str) else None


def _gaps(folder: Path) -> list[str]:
    """The files that a cached model lacks: it may be the rest of an interrupted download."""
    if (index := folder / "model.safetensors.index.json").is_file():
        try:
            weight_files = {str(file) for file in read_json(index)["weight_map"].values()}
        except (PlaitError, KeyError, TypeError, AttributeError):
            return [index.name]
    else:
        weight_files = {"model.safetensors"}
    return sorted(file for file in weight_files if not (folder / file).is_file())


def _download(name: str, lacking: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(HfApi().model_info(name, timeout=PATIENCE))
        except Exception as error:
            answer.append(error)

    # In a thread, because looking up the hub's address knows no time-out.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 0.5)
    info = answer[0] if answer else None
    if isinstance(info, GatedRepoError):
        raise PlaitError(f"'{name}' wants its licence accepted: do so on its page of the hub, then `hf auth login`.")
    if isinstance(info, RepositoryNotFoundError | HFValidationError):
        raise PlaitError(
            f"'{name}' is neither a local folder nor a model of the Hugging Face hub. Check the spelling; "
            "for a private model run `hf auth login` first."
        )
    if info is None or isinstance(info, Exception):
        raise PlaitError(
            f"'{name}' is not a local folder, not in the Hugging Face cache{lacking}, and the hub cannot be reached. "
            f"Check the spelling and the connection, or fetch it elsewhere (`hf download {name}`) and name the folder."
        )
    files = [file.rfilename for file in info.siblings or []]
    if not any(file.endswith(".safetensors") for file in files):
        raise PlaitError(no_safetensors(name, [file for file in files if file.endswith((".bin", ".h5", ".msgpack"))]))
    # Folders, and Mistral's "consolidated", hold the same weights in other forms; "1_Pooling" is of sentence encoders.
    top = [f for f in files if "/" not in f and f.endswith(_ENDINGS) and not f.startswith("consolidated")]
    try:
        return Path(snapshot_download(name, allow_patterns=[*top, *MODULES], etag_timeout=PATIENCE))
    except Exception as error:  # the client raises errors of several libraries
        raise PlaitError(
            f"The download of '{name}' broke off: {error}. Run it again: it goes on where it was."
        ) from error


def parameters_of(folder: Path) -> int:
    """The numbers in a folder's weights, by the headers of its safetensors files; a damaged one counts none."""
    return sum(_parameters(file) for file in sorted(folder.glob("*.safetensors")))


def _parameters(file: Path) -> int:
    """The numbers in a safetensors file, by its header; 0 where that is damaged."""
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length)) if length <= LONGEST_HEADER else {}
        return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return 0


def other_weights(folder: Path) -> list[str]:
    """The weights of a folder in formats that are not read."""
    return sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".h5", ".msgpack", ".pt", ".pth"))


def no_safetensors(where: str | Path, others: list[str]) -> str:
    """The message for a model whose weights are only in `others`, files that may be pickles, or in none."""
    if not others:
        return f"{where} has no model.safetensors. Name a folder that holds config.json and the weights."
    return (
        f"{where} has its weights only as {others[0]}, a format that can run code when it is read. Convert it on a "
        'machine you trust: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{where}').save_pretrained('converted')\", and copy the tokenizer's files along."
    )


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Errors of transformers on a folder's files, as one line."""
    try:
        yield
    except PlaitError:
        raise
    except Exception as error:  # its loaders raise nearly every class on damaged files
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise PlaitError(f"{folder} cannot be loaded: {reason}. Fetch the model again.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and bars: what matters in them becomes an error."""
    from transformers.utils import logging as theirs

    logger = logging.getLogger("transformers")
    level, bars = logger.level, theirs.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()
