"""`plait prepare --engine ray` with two workers, one of which is killed: the same bytes as on one machine."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from conftest import make_image
from object_store import Faulty, object_store
from plait import Index
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.prepare import prepare

store = pytest.fixture(object_store)


def shards(folder: Path) -> tuple[list[str], int]:
    dataset = Dataset.open(folder)
    return [shard.sha256 for shard in dataset.manifest.shards], dataset.manifest.rejected


@pytest.mark.slow
def test_two_workers_of_ray_one_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    rng, source = np.random.default_rng(0), tmp_path / "in"
    for n in range(1200):  # three chunks
        place = source / f"kind {n % 4}"
        place.mkdir(parents=True, exist_ok=True)
        make_image(n % 4, rng).save(place / f"{n}.png")
    (source / "kind 0" / "bad.png").write_bytes(b"\x89PNG nothing")
    prepare(source, tmp_path / "alone", workers=1)
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error", include_dashboard=False)
    killed: list[int] = []

    def kill() -> None:
        """End the first worker of Ray that has a chunk."""
        while not killed:
            for process in psutil.process_iter(["cmdline"]):
                if any("ray::checked" in word for word in process.info["cmdline"] or []):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
            time.sleep(0.01)

    threading.Thread(target=kill, daemon=True).start()
    try:
        prepare(source, tmp_path / "ray", engine="ray", workers=2)
    finally:
        ray.shutdown()
    assert killed
    assert shards(tmp_path / "ray") == shards(tmp_path / "alone") and shards(tmp_path / "alone")[1] == 1


def test_an_engine_that_is_not_known(tmp_path: Path) -> None:
    make_image(0, np.random.default_rng(0)).save(tmp_path / "a.png")
    with pytest.raises(PlaitError, match="no engine 'spark'"):
        prepare(tmp_path, tmp_path / "out", engine="spark")


@pytest.mark.slow
def test_an_index_by_ray_over_an_object_store(store: Faulty, tmp_path: Path, trained: Path) -> None:
    """Two workers, one of which is killed, embed the images of a bucket: the rows are those of one machine."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("lancedb")
    import s3fs

    system, rng = s3fs.S3FileSystem(), np.random.default_rng(0)
    system.mkdir("bucket")
    for n in range(300):
        data = io.BytesIO()
        make_image(n % 4, rng).save(data, "PNG")
        system.pipe_file(f"bucket/raw/{n}.png", data.getvalue())
    system.pipe_file("bucket/raw/bad.png", b"\x89PNG nothing")
    alone = Index(tmp_path / "alone", trained)
    assert len(alone.add("s3://bucket/raw").rejected) == 1
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for process in psutil.process_iter(["cmdline"]):
                if any("ray::Worker.embed" in word for word in process.info["cmdline"] or []):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)
                    return
            time.sleep(0.01)

    threading.Thread(target=kill, daemon=True).start()
    store.share = 0.05
    by_ray = Index(tmp_path / "ray", trained)
    try:
        added = by_ray.add("s3://bucket/raw", engine="ray", workers=2)
    finally:
        ray.shutdown()
    assert killed and added.new == 300 and len(added.rejected) == 1
    first, second = (one.table.to_arrow().sort_by("id") for one in (alone, by_ray))
    assert first.equals(second) and len(first) == 300
    assert by_ray.verify() == []
