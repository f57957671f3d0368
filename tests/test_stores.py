"""Disks and stores that fail: a failure that says nothing of a file never costs the file."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from object_store import Faulty, object_store
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.data.stores import StoreError, is_passing, location, open_binary, raise_if_passing, read_bytes
from plait.modalities.image_files import encode_png

store = pytest.fixture(object_store)


def image(n: int) -> bytes:
    return encode_png(np.random.default_rng(n).integers(0, 256, (6, 8, 3), np.uint8))


def test_which_failures_are_the_files_own(tmp_path: Path) -> None:
    for number in (errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.ECONNRESET):
        assert is_passing(OSError(number, "x"))
        with pytest.raises(StoreError, match=r"a\.png cannot be read"):
            raise_if_passing(OSError(number, "x"), "a.png")
    for number in (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP):
        assert not is_passing(OSError(number, "x"))
    assert not is_passing(OSError("cannot identify image file")) and not is_passing(ValueError("x"))
    assert location("s3://bucket/data/") == "s3://bucket/data"
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


def test_files_that_run_out_end_the_run_and_no_record(tmp_path: Path) -> None:
    """With no file descriptors left, good files are not rejected: the run ends, and goes on when there are some."""
    for n in range(24):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{n}.png").write_bytes(image(n))
    code = """
import resource, sys
from plait.core.errors import PlaitError
from plait.data import work
from plait.data.prepare import prepare
original = work.read_bytes
def starved(*arguments):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        return original(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
work.read_bytes = starved
try:
    prepare(sys.argv[1], sys.argv[2], workers=0)
except PlaitError as error:
    sys.stderr.write(str(error))
    sys.exit(7)
"""
    environment = {**os.environ, "PLAIT_STORE_PATIENCE": "0.3"}
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 7 and "Too many open files" in ended.stderr, ended.stderr
    assert not (tmp_path / "out").exists()
    prepare(tmp_path / "in", tmp_path / "out", workers=0)
    assert len(Dataset.open(tmp_path / "out")) == 24


@pytest.mark.slow
def test_an_object_store_behind_a_proxy_that_fails(store: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    system = s3fs.S3FileSystem()
    system.mkdir("bucket")
    for n in range(60):
        system.pipe_file(f"bucket/raw/{'cat' if n % 2 else 'dog'}/{n}.png", image(n))
    rows = "".join(json.dumps({"text": f"text {n}", "n": n}) + "\n" for n in range(4000))
    system.pipe_file("bucket/table/rows.jsonl", rows.encode())

    def shards(url: str) -> tuple[list[str], int]:
        dataset = Dataset.open(url)
        return [shard.sha256 for shard in dataset.manifest.shards], dataset.manifest.rejected

    # A new prefix in a flat store, with and without a slash at its end.
    prepare("s3://bucket/raw", "s3://bucket/clean/", workers=2)
    prepare("s3://bucket/table", "s3://bucket/clean-table", workers=0)
    wanted = shards("s3://bucket/clean"), shards("s3://bucket/clean-table")
    store.share = 0.3
    for run in range(3):
        prepare("s3://bucket/raw/", f"s3://bucket/out{run}", workers=2)
        prepare("s3://bucket/table", f"s3://bucket/table{run}", workers=0)
        assert (shards(f"s3://bucket/out{run}"), shards(f"s3://bucket/table{run}")) == wanted
        assert [r.parts["label"] for r in Dataset.open(f"s3://bucket/out{run}").iterate(columns=["label"])].count(
            "cat"
        ) == 30
    assert store.faults > 50 and wanted[0][1] == wanted[1][1] == 0
    # Down for good: the true reason, no reject, nothing kept of what was not read; and the same bytes afterwards.
    monkeypatch.setenv("PLAIT_STORE_PATIENCE", "1")
    dataset = Dataset.open("s3://bucket/out0")
    store.down = True
    with pytest.raises(PlaitError, match="tried for"):
        prepare("s3://bucket/raw", "s3://bucket/late", workers=2)
    with pytest.raises(PlaitError, match="tried for"):
        list(dataset.iterate())
    store.down, store.share = False, 0.0
    prepare("s3://bucket/raw", "s3://bucket/late", workers=2)
    assert shards("s3://bucket/late") == wanted[0]
    with pytest.raises(PlaitError, match=r"does not exist|is empty"):
        prepare("s3://bucket/none", "s3://bucket/x", workers=0)
    with pytest.raises(FileNotFoundError), open_binary("s3://bucket/none.txt"):
        pass
