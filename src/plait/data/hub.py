"""Data sets of the Hugging Face hub, by name: fetched with the `datasets` library, read from its files here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.core.files import cache_folder


def download(name: str) -> Path:
    """A folder of Arrow files, one folder a split, of the data set `NAME` or `NAME:CONFIG`; fetched once.

    Raises PlaitError where `datasets` is not installed, or the data set cannot be had.
    """
    datasets = import_extra(
        "datasets", "hub", f"hf:{name} is read by the library datasets. Files that are here already "
        "(Parquet, JSONL, a folder of save_to_disk) need no library: plait prepare FOLDER -o OUT. Reading from the hub",
    )  # fmt: skip
    path, _, config = name.partition(":")
    cache = cache_folder("hub")
    folder = cache / name.replace("/", "--").replace(":", "--")
    if (folder / "dataset_dict.json").is_file():
        return folder
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(path, config or None)
    except Exception as error:  # the library raises its own classes, those of requests, and built-in ones
        why = " ".join(str(error).split())[:300]
        raise PlaitError(
            f"hf:{name} cannot be had: {why} Check the name and the network. Offline, take the data set to this "
            "machine as a folder (save_to_disk, or its Parquet files): plait prepare FOLDER -o OUT"
        ) from error
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    # save_to_disk writes media as they are: nothing is decoded.
    loaded.save_to_disk(str(temporary))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder
