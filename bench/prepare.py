"""`plait prepare` on many small media: its time beside that of decoding alone, its memory, and a kill in the middle.

    python bench/prepare.py --records 20000
    python bench/prepare.py                 # 100,000
    python bench/prepare.py --photos --records 20000      # JPEG of 640 x 480 alone
    python bench/prepare.py --tokenise 30                 # MB of text with a vocabulary of 4,096, on one core

Three in four records are JPEG images of 192 x 144, one in four is a second of 16 kHz FLAC. Decoding alone: as many
processes as `prepare` has, each reading its share of the files and decoding them, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # read where tokenizers are imported: one core is measured

_DECODE = """
import sys
from pathlib import Path
from plait.modalities.audio_files import decode_audio
from plait.modalities.image_files import decode_image
source, share, shares = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for n, path in enumerate(sorted(source.rglob("*.*"))):
    if n % shares == share:
        (decode_image if path.suffix == ".jpg" else decode_audio)(path)
"""


def write_photos(source: Path, records: int) -> None:
    """JPEG of 640 x 480 with large shapes, edges and grain, each another."""
    rng = np.random.default_rng(0)
    grain = [rng.normal(0, 6, (480, 640, 3)).astype(np.float32) for _ in range(8)]
    for n in range(records):
        folder = source / f"{n // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        edges = Image.fromarray(rng.integers(0, 2, (30, 40, 1), np.uint8).repeat(3, 2) * 40)
        pixels = np.asarray(small.resize((640, 480), Image.Resampling.BICUBIC), np.float32) * 0.8
        pixels = pixels + np.asarray(edges.resize((640, 480), Image.Resampling.NEAREST)) + grain[n % 8]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{n:06d}.jpg", quality=85)


def write(source: Path, records: int) -> None:
    """Each file has content of its own: what does not change from one to the next is not made again."""
    rng = np.random.default_rng(0)
    at = np.arange(16000) / 16000
    for n in range(records):
        folder = source / f"{n // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        out = io.BytesIO()
        if n % 4 == 3:
            wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 900, 3)[:, None] * at).sum(0) * np.hanning(16000)
            soundfile.write(out, wave.astype(np.float32) + rng.normal(0, 0.01, 16000), 16000, format="FLAC")
        else:
            small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
            small.resize((192, 144), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
        (folder / f"{n:06d}.{'flac' if n % 4 == 3 else 'jpg'}").write_bytes(out.getvalue())


def decode(source: Path, shares: int) -> float:
    """Seconds that decoding alone takes."""
    begun = time.perf_counter()
    processes = [
        subprocess.Popen([sys.executable, "-c", _DECODE, str(source), str(n), str(shares)]) for n in range(shares)
    ]
    if sum(process.wait() for process in processes):
        raise SystemExit("decoding failed")
    return time.perf_counter() - begun


def prepare(source: Path, out: Path, workers: int, kill: float = 0.0) -> tuple[float, float, float]:
    """Seconds, and the most resident memory in MiB of the process that leads and of those that decode, largest one.
    `kill` ends it after so many seconds."""
    code = (
        "import resource, sys; from plait.data.prepare import prepare\n"
        "prepare(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]))\n"
        "for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN): print(resource.getrusage(who).ru_maxrss)"
    )
    begun = time.perf_counter()
    command = [sys.executable, "-c", code, str(source), str(out), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if kill:
            time.sleep(kill)
            process.send_signal(signal.SIGKILL)
        said = process.communicate()[0]
    seconds = time.perf_counter() - begun
    own, theirs = map(int, said.split()) if said else (0, 0)
    return seconds, own / 1024, theirs / 1024


def spent() -> float:
    """Processor seconds of all processes that were waited for: what a busy machine does not change."""
    times = os.times()
    return times.children_user + times.children_system


def tokenise(folder: Path, megabytes: int, rounds: int) -> None:
    """Tokenise text of the files of this machine on one core, as training does; the tokenizer is learnt from 20 MB."""
    import pyarrow as pa
    from scale import paragraphs

    from plait.data.tokens import write_tokens
    from plait.modalities.text import Text

    pool = paragraphs()
    draw = random.Random(0)
    texts = [b"".join(draw.choices(pool, k=10)).decode() for _ in range(megabytes * 10**6 // 5000)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    text = Text.train(texts[: 20 * 10**6 // 5000], 4096)
    cells = [pa.array(texts[start : start + 1000], pa.large_string()) for start in range(0, len(texts), 1000)]
    rates = []
    for _ in range(rounds):
        begun = time.process_time()
        tokens = write_tokens(folder / "tokens", iter(cells), text.encode_batch, text.size)
        rates.append(size / (time.process_time() - begun))
        count = int(tokens.lengths.sum())
    print(f"tokenising {size:.0f} MB: {max(rates):.2f} MB a second of processor time (best of {rounds}; least "
          f"{min(rates):.2f}), {1e6 * size / count:.2f} bytes a token; load {os.getloadavg()[0]:.1f}")  # fmt: skip


def digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--photos", action="store_true", help="images of 640 x 480 alone")
    parser.add_argument("--tokenise", type=int, metavar="MB", help="tokenise so much text instead")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="plait-prepare-"))
    try:
        if options.tokenise:
            tokenise(folder, options.tokenise, options.rounds)
            return
        (write_photos if options.photos else write)(folder / "in", options.records)
        ratios, memory, seconds = [], (0.0, 0.0), 0.0
        for turn in range(options.rounds):
            start = spent()
            alone = decode(folder / "in", options.workers)
            between = spent()
            shutil.rmtree(folder / "out", ignore_errors=True)
            seconds, *rest = prepare(folder / "in", folder / "out", options.workers)
            memory = (rest[0], rest[1])
            ratios.append(seconds / alone)
            of_decoding, of_all = between - start, spent() - between
            print(f"round {turn}: decoding alone {alone:.1f} s, prepare {seconds:.1f} s, {ratios[-1]:.2f} times; "
                  f"processor time {of_decoding:.1f} s and {of_all:.1f} s, {of_all / of_decoding:.2f} times; "
                  f"load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
        print(f"memory: {memory[0]:.0f} MiB in the leading process, {memory[1]:.0f} MiB in the largest other")
        first = digest(folder / "out")
        shutil.rmtree(folder / "out")
        prepare(folder / "in", folder / "out", options.workers, kill=seconds / 2)
        print(f"killed after {seconds / 2:.1f} s, {len(list(folder.glob('.out.partial/chunks/*.arrow')))} chunks kept")
        again = prepare(folder / "in", folder / "out", options.workers)[0]
        print(f"resumed: {again:.1f} s, same bytes: {digest(folder / 'out') == first}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
