"""Text of any amount: what `plait prepare` and the first steps of `plait train` take of memory and processor time.

    python bench/scale.py --megabytes 200 2000
    python bench/scale.py --megabytes 200 --form jsonl --no-near-duplicates
    python bench/scale.py --records 1000000            # short labelled texts: a start on data that were read before
    python bench/scale.py --images 1000000             # small labelled images: the same, and the sampler's memory

The text is made of paragraphs from the files of this machine (sources and documents of Python and the system), drawn
at random, so that no two records are alike. Memory is what the processes together hold beside files that are mapped,
whose pages the system takes back: RssAnon and RssShmem of /proc/PID/status, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

POOL_BYTES = 150 << 20  # of text that paragraphs are drawn from
PARAGRAPH, FILE = 400, 20 << 20  # bytes, about
SIDE, IMAGES_A_FILE = 16, 50_000
IMPORTS = "import plait.cli.train, plait.training.trainer"  # what training needs before any data


@dataclass
class Cost:
    """What a command took."""

    seconds: float
    processor: float  # seconds, user and system, of all its processes
    memory: float  # MiB, the most at one time


def paragraphs() -> list[bytes]:
    """Pieces of the text files of this machine, of some PARAGRAPH bytes, cut at line ends."""
    found: list[bytes] = []
    size = 0
    roots = [sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/share"]
    for path in (p for root in roots for p in sorted(Path(root).rglob("*"))):
        if path.suffix not in (".py", ".txt", ".md", ".rst") or not path.is_file():
            continue
        try:
            text = path.read_bytes()
            text.decode()
        except (OSError, UnicodeDecodeError):
            continue
        if b"\0" in text:
            continue
        start = 0
        while start < len(text):
            stop = text.find(b"\n", start + PARAGRAPH) + 1 or len(text)
            if stop - start < 4 * PARAGRAPH:
                found.append(text[start:stop])
                size += stop - start
            start = stop
        if size > POOL_BYTES:
            break
    return found


def write(folder: Path, megabytes: int, form: str, pool: list[bytes]) -> int:
    """Files of text; returns their bytes of text."""
    draw, written = random.Random(megabytes), 0
    folder.mkdir(parents=True)
    for number in range(-(-megabytes * 10**6 // FILE)):
        with (folder / f"{number:05d}.{form}").open("wb") as file:
            size = 0
            while size < min(FILE, megabytes * 10**6 - written):
                if form == "txt":
                    block = b"".join(draw.choices(pool, k=20))
                    file.write(block)
                else:
                    block = b"".join(draw.choices(pool, k=draw.randint(1, 12)))
                    file.write(json.dumps({"text": block.decode()}, ensure_ascii=False).encode() + b"\n")
                size += len(block)
            written += size
    return written


def _held(process: psutil.Process) -> int:
    """Bytes of a process that no file stands for."""
    try:
        with Path(f"/proc/{process.pid}/status").open() as file:
            facts = dict(line.split(":", 1) for line in file)
    except OSError:
        return 0
    return sum(int(facts.get(name, "0 kB").split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def run(command: list[str]) -> Cost:
    """Run a command and watch it and its children. Raises SystemExit where it fails."""
    before, begun = os.times(), time.perf_counter()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the command
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    watched, most = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            most = max(most, sum(_held(one) for one in [watched, *watched.children(recursive=True)]))
        except psutil.Error:
            continue
        time.sleep(0.1)
    if process.returncode:
        log.seek(0)
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read().decode(errors='replace')[-2000:]}")
    after = os.times()
    spent = sum(b - a for a, b in zip(before[2:4], after[2:4], strict=True))
    return Cost(time.perf_counter() - begun, spent, most / (1 << 20))


def measure(folder: Path, megabytes: int, options: argparse.Namespace, pool: list[bytes]) -> None:
    """Make the text, prepare it, train on it, and print a line for each."""
    python = [sys.executable, "-m", "plait"]
    size = write(folder / "in", megabytes, options.form, pool) / 1e6
    print(f"{size:,.0f} MB of text ({options.form}):", flush=True)
    near = [] if options.near_duplicates else ["--no-near-duplicates"]
    workers = ["--workers", str(options.workers)] if options.workers is not None else []
    cost = run([*python, "prepare", str(folder / "in"), "-o", str(folder / "data"), *near, *workers])
    print(f"  prepare: {size / cost.processor:.1f} MB a second of processor time ({cost.processor:.1f} s; "
          f"{cost.seconds:.1f} s by the clock), {cost.memory:,.0f} MiB", flush=True)  # fmt: skip
    if options.steps:
        shutil.rmtree(folder / "in")
        alone = run([sys.executable, "-c", IMPORTS])
        cost = run([sys.executable, __file__, "--first-step", str(folder / "data"), "--folder", str(folder / "begun")])
        print(f"  from the start to the end of a first step: {cost.processor:.1f} s of processor time, "
              f"{cost.seconds:.1f} s by the clock", flush=True)  # fmt: skip
        train = [*python, "train", str(folder / "data"), "-o", str(folder / "run"), "--size", options.size]
        cost = run([*train, "--steps", str(options.steps)])
        print(f"  {options.steps} steps of {options.size}: {cost.memory:,.0f} MiB, libraries {alone.memory:,.0f}; "
              f"{cost.processor:.1f} s of processor time, {cost.seconds:.1f} s by the clock", flush=True)  # fmt: skip
    shutil.rmtree(folder)


def records(folder: Path, count: int) -> None:
    """Prepare so many labelled texts, train a step, and start once more: what was read before is only mapped."""
    python = [sys.executable, "-m", "plait"]
    folder.mkdir(parents=True)
    with (folder / "in.csv").open("w") as file:
        file.write("text,label\n")
        for number in range(count):
            file.write(f"request {number} of {number * 7919 % count},intent {number % 50}\n")
    cost = run([*python, "prepare", str(folder / "in.csv"), "-o", str(folder / "data"), "--no-near-duplicates"])
    print(f"{count:,} records: prepare {cost.processor:.1f} s of processor time, {cost.memory:,.0f} MiB", flush=True)
    alone = run([sys.executable, "-c", IMPORTS])
    train = [*python, "train", str(folder / "data"), "-o", str(folder / "run"), "--size", "tiny", "--task", "language"]
    for steps in (1, 2):
        cost = run([*train, "--steps", str(steps), "--allow-changes"])
        memory = cost.memory - alone.memory
        print(f"  start {steps}, to the end of its first step: {cost.processor:.1f} s of processor time, "
              f"{cost.seconds:.1f} s by the clock, {memory:,.0f} MiB beside libraries", flush=True)  # fmt: skip
    shutil.rmtree(folder)


def write_images(folder: Path, count: int) -> None:
    """Grey images of SIDE x SIDE in Parquet files, each of its own: a bright bar for its label, and noise."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for start in range(0, count, IMAGES_A_FILE):
        labels = np.arange(start, min(start + IMAGES_A_FILE, count)) % SIDE
        pixels = rng.integers(0, 64, (len(labels), SIDE, SIDE), np.uint8)
        pixels[np.arange(len(labels)), labels] += 150
        images = []
        for one in pixels:
            file = io.BytesIO()
            Image.fromarray(one).save(file, "PNG", compress_level=1)
            images.append({"bytes": file.getvalue(), "path": None})
        columns = {"image": images, "label": [f"bar {label}" for label in labels]}
        pq.write_table(pa.table(columns), folder / f"{start // IMAGES_A_FILE:04d}.parquet")


def images(folder: Path, count: int) -> None:
    """Prepare so many labelled images, start on them twice as far as the first step, and weigh the sampler."""
    python = [sys.executable, "-m", "plait"]
    write_images(folder / "in", count)
    cost = run([*python, "prepare", str(folder / "in"), "-o", str(folder / "data"), "--no-near-duplicates"])
    print(f"{count:,} images: prepare {cost.processor:.1f} s of processor time, {cost.memory:,.0f} MiB", flush=True)
    shutil.rmtree(folder / "in")
    measure_starts(folder / "data", folder / "run")
    shutil.rmtree(folder)


def measure_starts(data: Path, run_folder: Path) -> None:
    """A start that reads the data, one that finds them read, and what the sampler takes."""
    alone = run([sys.executable, "-c", IMPORTS])
    for start in (1, 2):
        cost = run([sys.executable, __file__, "--first-step", str(data), "--folder", str(run_folder)])
        print(f"  start {start}, to the end of its first step: {cost.processor:.1f} s of processor time, "
              f"{cost.seconds:.1f} s by the clock, {cost.memory - alone.memory:,.0f} MiB beside libraries",
              flush=True)  # fmt: skip
    subprocess.run([sys.executable, __file__, "--sampler", str(data), "--folder", str(run_folder)], check=True)


def first_step(data: Path, run_folder: Path) -> None:
    """Train until the first step is done, and end there."""
    import plait
    from plait.training.callbacks import Callback, StepEvent

    class Stop(Callback):
        def on_step(self, event: StepEvent) -> None:
            raise SystemExit(0)

    texts_alone = set(plait.Dataset.open(data).columns.values()) == {"text"}
    task = "language" if texts_alone else "describe"
    plait.train(data, run_folder, task=task, size="tiny", steps=1000, callbacks=[Stop()])


def weigh_sampler(data: Path, run_folder: Path) -> None:
    """What the sampler of a run that was begun and the split that it samples from take, at the end of a step and at
    most."""
    from plait.core.config import parse_recipe
    from plait.core.device import choose_device
    from plait.data.dataset import Dataset
    from plait.training.batches import Sampler
    from plait.training.preparation import prepare_run
    from plait.training.run import Run
    from plait.training.split import add_codes

    recipe = parse_recipe(json.loads((run_folder / "run.json").read_text())["recipe"], "run.json")
    begun = Run(run_folder, Dataset.open(data), recipe, lambda progress: None, choose_device("cpu", training=True))
    begun.open()
    prepared = prepare_run(begun, None)
    model, columns = prepared.model, begun.dataset.columns
    arrow = pa.default_memory_pool()
    before = arrow.bytes_allocated()
    tracemalloc.start()
    split = prepared.source.split("train", prepared.text, model)
    add_codes(split, columns, model.media, run_folder / "cache", "train", anew=False)
    context = model.config.backbone.max_length
    sampler = Sampler(split, model.vocabulary, model.media, begun.batch_size, context, 0, 0.1, augment=True)
    sampler.step(0)
    now, most = (value / 1e6 for value in tracemalloc.get_traced_memory())
    strings = (arrow.bytes_allocated() - before) / 1e6
    print(f"  sampler and split of {len(split):,} records: {now + strings:.1f} MB after a step, at most "
          f"{most + strings:.1f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200])
    parser.add_argument("--form", choices=["txt", "jsonl"], default="txt")
    parser.add_argument("--near-duplicates", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--steps", type=int, default=20, help="of training; 0 for none")
    parser.add_argument("--size", default="small", help="of the model")
    parser.add_argument("--folder", type=Path, help="where the files lie meanwhile")
    parser.add_argument("--records", type=int, help="short labelled texts instead of files of text")
    parser.add_argument("--images", type=int, help="small labelled images instead of files of text")
    parser.add_argument("--first-step", type=Path, help="begin to train on these data; the run is --folder")
    parser.add_argument("--sampler", type=Path, help="weigh the sampler of these data; the run is --folder")
    options = parser.parse_args()
    if options.sampler:
        weigh_sampler(options.sampler, options.folder)
        return
    if options.first_step:
        first_step(options.first_step, options.folder)
        return
    if options.images:
        images(Path(tempfile.mkdtemp(prefix="plait-scale-", dir=options.folder)) / "here", options.images)
        return
    if options.records:
        records(Path(tempfile.mkdtemp(prefix="plait-scale-", dir=options.folder)) / "here", options.records)
        return
    pool = paragraphs()
    for megabytes in options.megabytes:
        measure(Path(tempfile.mkdtemp(prefix="plait-scale-", dir=options.folder)) / "here", megabytes, options, pool)


if __name__ == "__main__":
    main()
