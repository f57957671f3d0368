"""An object store that fails: runs of prepare, train and index over it, each with other faults, beside one without.

    python bench/faulty_store.py --runs 20

The store is moto's on this machine, behind a proxy that refuses a share of the requests, answers them 403 or 503, or
cuts their bodies. A run is right where it gives the bytes, losses and rows that it gives without faults, or ends with a
reason and gives them when it is run again. Needs the extras s3 and search, and moto.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import plait
from object_store import Faulty, object_store
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.modalities.image_files import encode_png

IMAGES = 60


@dataclass
class Found:
    """What came out of prepare, train and index; how often a command ended with a reason and was run again."""

    shards: list[str] = field(default_factory=list)
    rejected: int = 0
    losses: list[dict[str, Any]] = field(default_factory=list)
    rows: list[tuple[str, bytes]] = field(default_factory=list)
    again: list[str] = field(default_factory=list)

    def same(self, other: Found) -> bool:
        """Whether all but the ends are the same."""
        return all(getattr(self, name) == getattr(other, name) for name in ("shards", "rejected", "losses", "rows"))


def insist(found: Found, command: Any, *arguments: Any, **options: Any) -> Any:
    """Run a command until it succeeds, five times at most; note the reasons."""
    for _ in range(5):
        try:
            return command(*arguments, **options)
        except PlaitError as error:
            found.again.append(str(error)[:120])
    raise SystemExit(f"five times in vain: {found.again}")


def one_run(name: str, folder: Path) -> Found:
    """Prepare the bucket's files into the bucket, train on them from there, and index them."""
    found, url = Found(), f"s3://bucket/{name}"
    insist(found, plait.prepare, "s3://bucket/raw", url, workers=2, progress=False)
    dataset = insist(found, Dataset.open, url)
    found.shards = [shard.sha256 for shard in dataset.manifest.shards]
    found.rejected = dataset.manifest.rejected
    recipe = {"training": {"codec_steps": 2, "steps": 3, "log_records": True}}
    insist(found, plait.train, url, folder / name, recipe=recipe, task="draw", progress=False)
    rows = [json.loads(line) for line in (folder / name / "records.jsonl").read_text().splitlines()]
    found.losses = [{"loss": row["loss"], "records": row["records"]} for row in rows]
    index = plait.Index(folder / f"{name}.index", folder / "clean")
    insist(found, index.add, "s3://bucket/raw")
    table = index.table.to_arrow().sort_by("id")
    found.rows = list(zip(table["id"].to_pylist(), table["_content"].to_pylist(), strict=True))
    shutil.rmtree(folder / f"{name}.index")
    return found


def compare(store: Faulty, folder: Path, runs: int, share: float) -> None:
    """All runs, beside one without faults."""
    import s3fs

    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    for n in range(IMAGES):
        pixels = np.random.default_rng(n).integers(0, 256, (24, 32, 3), np.uint8)
        system.pipe_file(f"bucket/raw/{'cat' if n % 2 else 'dog'}/{n}.png", encode_png(pixels))
    wanted = one_run("clean", folder)
    print(f"without faults: {len(wanted.shards)} shards, {wanted.rejected} rejected, {len(wanted.rows)} in the index")
    store.share, wrong = share, 0
    for run in range(runs):
        store.draw, before = random.Random(run), store.faults
        found = one_run(f"run{run}", folder)
        shutil.rmtree(folder / f"run{run}")
        wrong += not found.same(wanted)
        ends = "".join(f"; ended: {reason}" for reason in found.again)
        print(f"run {run}: {store.faults - before} faults, {found.rejected} rejected, "
              f"{'the same' if found.same(wanted) else 'ANOTHER RESULT'}{ends}", flush=True)  # fmt: skip
    print(f"{wrong} of {runs} runs gave another result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.3, help="of the requests that fail")
    options = parser.parse_args()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto tells of every request
    with pytest.MonkeyPatch.context() as environment, tempfile.TemporaryDirectory() as folder:
        stores = object_store(environment, Path(folder))
        compare(next(stores), Path(folder), options.runs, options.share)
        next(stores, None)


if __name__ == "__main__":
    main()
