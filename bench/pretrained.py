"""What pretrained weights cost and give: LoRA's speed and memory beside transformers with PEFT, and more below.

    python bench/pretrained.py lora MODEL [--rounds 3] [--batch 4] [--length 512]

    python bench/pretrained.py head ROW ENCODER --data DATA [--seed 0]    # ENCODER may be scratch, with --minutes 1

    python bench/pretrained.py speech WHISPER --data DATA [--minutes 3]   # long form beside transformers' own

    python bench/pretrained.py speech-train WHISPER --data DATA [--steps 40]     # one speaker left out

    python bench/pretrained.py gguf FILE [--logits]    # seconds to load, memory; logits beside transformers'
    python bench/pretrained.py gguf FILE --perplexity docs/how-to/*.md src/plait/*.py    # as it is kept, and in fp32

MODEL is a folder of a causal language model. PLAIT_ISA=avx2 caps the instructions of both.
"""

from __future__ import annotations

import argparse
import importlib
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from plait.core import isa

isa.cap()  # PLAIT_ISA, before torch loads

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from plait.evaluation.metrics import edit_distance  # noqa: E402


def lora_ours(model: Path, ids: Tensor, rank: int) -> Any:
    """A step of `plait train --lora` on sequences (B, L), all of whose tokens are learned; as many of them at a time as
    training takes."""
    from plait.core.device import Device, keep_memory
    from plait.hf.huggingface import load
    from plait.model import lora
    from plait.model.cross_entropy import total_loss
    from plait.model.extend import extend_frozen
    from plait.training.budget import ACTIVATION_BYTES, activation_bytes
    from plait.training.optimizer import make_optimizer

    keep_memory()
    source = load(model, compact=True)
    network = extend_frozen(source, source.model.config).requires_grad_(False)
    lora.adapt(network.backbone, rank, 2.0 * rank)
    optimizer = make_optimizer([network], 1e-4, 0.0, (0.9, 0.98))
    device = Device("cpu", torch.float32)
    table = network.token_embedding.split_table()
    tokens = ACTIVATION_BYTES // activation_bytes(network.backbone, device.dtype)
    parts = ids.split(max(tokens // ids.shape[1], 1))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part in parts:
            with device.autocast():
                hidden = network.backbone(table.rows(part.flatten()).view(*part.shape, -1))
                loss = total_loss(hidden[:, :-1].flatten(0, 1), table, part[:, 1:].flatten()) / ids[:, 1:].numel()
                loss.backward()
            total += float(loss.detach())
        optimizer.step()
        return total

    return step


def lora_theirs(model: Path, ids: Tensor, rank: int, dtype: torch.dtype) -> Any:
    """The same step in transformers and PEFT."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    network = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = network(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def lora(arguments: argparse.Namespace) -> None:
    ids = torch.randint(1000, 50_000, (arguments.batch, arguments.length), generator=torch.Generator().manual_seed(0))
    makers = {
        "plait": lambda: lora_ours(arguments.model, ids, 8),
        "peft fp32": lambda: lora_theirs(arguments.model, ids, 8, torch.float32),
        "peft bf16": lambda: lora_theirs(arguments.model, ids, 8, torch.bfloat16),
    }
    steps = {}
    for name in arguments.who.split(","):
        steps[name] = makers[name]()
        print(f"{name}: loss {steps[name]():.4f}, peak memory {_peak():.2f} GB", flush=True)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            begun = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
            step()
            ended = time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
            rates[name].append(ids.numel() / (ended - begun))
            print(f"{name}: {rates[name][-1]:.1f} tokens/s", flush=True)
    for name in rates if arguments.rounds else ():
        ratio = median(a / b for a, b in zip(rates["plait"], rates[name], strict=True)) if "plait" in rates else 0
        print(f"{name}: {median(rates[name]):.1f} tokens/s, plait / this {ratio:.2f}")
    print(f"peak memory {_peak():.2f} GB")


# --- heads over frozen encoders ---------------------------------------------------------------------------------


Pairs = list[tuple[str, str]]  # text or file, and label


def head(arguments: argparse.Namespace) -> None:
    """`plait prepare` and `plait train --init-from ENCODER` on a public set, then its own verbs on the test set."""
    import json
    import tempfile

    from sklearn.metrics import f1_score

    import plait

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train, test = ROWS[arguments.row](arguments, folder)
        begun = time.process_time()
        table, encoder = _written(train, folder), str(arguments.encoder)
        if encoder == "scratch":
            begin: dict[str, Any] = {"start": "scratch", "minutes": arguments.minutes}
        else:
            begin = {"init_from": encoder}
        run = plait.train(table, folder / "run", seed=arguments.seed, **begin)
        trained = time.process_time() - begun
        model, inputs = run.model(), [value if arguments.row in TEXTS else Path(value) for value, _ in test]
        said = np.array([predictions[0].label for predictions in model.classify_inputs(inputs, top=1)])
        wanted = np.array([label for _, label in test])
        line = {
            "row": arguments.row, "encoder": Path(encoder).name, "seed": arguments.seed,
            "accuracy": round(float((said == wanted).mean()), 4),
            "macro_f1": round(float(f1_score(wanted, said, average="macro")), 4), "n": len(test),
            "train": len(train), "train_seconds": round(trained, 1),
            "ask_seconds": round(time.process_time() - begun - trained, 1), "peak_gb": round(_peak(), 2),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


def _written(rows: Pairs, folder: Path) -> Path:
    """A table of texts or files with their labels."""
    import csv

    table = folder / "train.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"] if not Path(rows[0][0]).is_absolute() else ["file", "label"])
        writer.writerows(rows)
    return table


def _table(arguments: argparse.Namespace, name: str, label: str, folder: str = "intents") -> tuple[Pairs, Pairs]:
    import csv

    found = []
    for split in ("train", "test"):
        with (arguments.data / folder / f"{name}_{split}.csv").open(encoding="utf-8", newline="") as file:
            found.append([(row["text"], row[label]) for row in csv.DictReader(file)])
    return found[0], found[1]


def banking(arguments: argparse.Namespace, folder: Path, examples: int | None = None) -> tuple[Pairs, Pairs]:
    train, test = _table(arguments, "banking77", "category")
    return _few(train, examples, arguments.seed), test


def clinc(arguments: argparse.Namespace, folder: Path) -> tuple[Pairs, Pairs]:
    return _table(arguments, "clinc150", "intent")


def synthetic(
    arguments: argparse.Namespace, folder: Path, name: str, examples: int | None = None
) -> tuple[Pairs, Pairs]:
    """Requests and their intents, or sentences and how people feel; see make_conversations.py."""
    import make_conversations

    rows = list(getattr(make_conversations, name)())
    text, label = (key for key in rows[0] if key != "split")
    train = [(row[text], row[label]) for row in rows if row["split"] != "test"]
    return _few(train, examples, arguments.seed), [(row[text], row[label]) for row in rows if row["split"] == "test"]


def digits(arguments: argparse.Namespace, folder: Path, speaker: str) -> tuple[Pairs, Pairs]:
    """Four speakers' digits to train on, all of the fifth's to ask about."""
    import zipfile

    train: Pairs = []
    test: Pairs = []
    with zipfile.ZipFile(arguments.data / "fsdd" / "fsdd_5speakers_wav.zip") as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".wav"):
                continue
            digit, who, _ = Path(name).stem.split("_")
            file = folder / "files" / Path(name).name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(archive.read(name))
            (test if who == speaker else train).append((str(file), f"digit {digit}"))
    return train, test


def cifar(arguments: argparse.Namespace, folder: Path) -> tuple[Pairs, Pairs]:
    """1,000 photos of nine classes to train on, 900 of the test set to ask about."""
    import tarfile

    counts: dict[tuple[str, str], int] = {}
    found: dict[str, Pairs] = {"train": [], "test": []}
    with tarfile.open(arguments.data / "cifar10" / "cifar10_jpeg.tar.gz") as archive:
        for member in archive:
            parts = Path(member.name).parts
            split = next((part for part in parts if part in found), None)
            if not member.isfile() or split is None:
                continue
            label = parts[-2]
            count = counts[split, label] = counts.get((split, label), 0) + 1
            if count > (112 if split == "train" else 100):
                continue
            if label in NINE:
                file = folder / "files" / split / f"{label}-{count}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                data = archive.extractfile(member)
                assert data is not None
                file.write_bytes(data.read())
                found[split].append((str(file), label))
    return found["train"], found["test"]


def fashion(arguments: argparse.Namespace, folder: Path) -> tuple[Pairs, Pairs]:
    """1,000 images of clothes in ten classes to train on, 1,000 of the test set to ask about."""
    import gzip

    from PIL import Image

    found = []
    for split, name in (("train", "train59k"), ("test", "t10k")):
        place = arguments.data / "fashion_mnist"
        pixels = np.frombuffer(gzip.decompress((place / f"{name}-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16)
        labels = np.frombuffer(gzip.decompress((place / f"{name}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:100] for label in range(10)]))
        rows: Pairs = []
        for number in chosen.tolist():
            file = folder / "files" / split / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.reshape(-1, 28, 28)[number]).save(file)
            rows.append((str(file), f"clothes {labels[number]}"))
        found.append(rows)
    return found[0], found[1]


NINE = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"}


def _few(rows: Pairs, examples: int | None, seed: int) -> Pairs:
    """So many of each label, drawn by the seed."""
    if examples is None:
        return rows
    import random

    by_label: dict[str, Pairs] = {}
    for row in rows:
        by_label.setdefault(row[1], []).append(row)
    choice = random.Random(seed)
    return [row for label in sorted(by_label) for row in choice.sample(by_label[label], examples)]


SPEAKERS = ("nicolas", "yweweler", "jackson", "theo", "george")
ROWS: dict[str, Callable[[argparse.Namespace, Path], tuple[Pairs, Pairs]]] = {
    "banking77": banking,
    "banking77-5": partial(banking, examples=5),
    "banking77-1": partial(banking, examples=1),
    "clinc150": clinc,
    **{
        f"{name}{'' if n is None else f'-{n}'}": partial(synthetic, name=name, examples=n)
        for name in ("intents", "feelings") for n in (None, 5, 1)
    },
    **{f"digits-{name}": partial(digits, speaker=name) for name in SPEAKERS},
    "cifar": cifar,
    "fashion": fashion,
}  # fmt: skip
TEXTS = {name for name in ROWS if not name.startswith(("digits", "cifar", "fashion"))}


# --- speech of any length ---------------------------------------------------------------------------------------


@dataclass
class Spoken:
    """A recording made of clips, and what is said in it when."""

    wave: np.ndarray
    rate: int
    words: list[tuple[float, float, str]]


def spoken_digits(data: Path, seconds: float, seed: int) -> Spoken:
    """Clips of spoken digits of all speakers with pauses of .2 to 1.5 seconds, until it is so long."""
    import io
    import zipfile

    import soundfile

    rng, at, rate = np.random.default_rng(seed), 0, 8000
    waves: list[np.ndarray] = []
    words: list[tuple[float, float, str]] = []
    with zipfile.ZipFile(data / "fsdd" / "fsdd_5speakers_wav.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".wav"))
        while at < seconds * rate:
            name = names[rng.integers(len(names))]
            wave, rate = soundfile.read(io.BytesIO(archive.read(name)), dtype="float32")
            pause = np.zeros(int(rng.uniform(0.2, 1.5) * rate), np.float32)
            start = at + len(pause)
            at = start + len(wave)
            waves += [pause, wave]
            words.append((start / rate, at / rate, Path(name).stem[0]))
    return Spoken(np.concatenate(waves), rate, words)


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits_of(text: str) -> str:
    """Digits in order, whether they are written as words or figures; other words as x."""
    import re

    found = ""
    for word in re.findall(r"[a-z]+|[0-9]", text.lower()):
        found += word if word.isdigit() else str(NUMBERS.index(word)) if word in NUMBERS else "x"
    return found


def speech(arguments: argparse.Namespace) -> None:
    import transformers

    import plait

    recording = spoken_digits(arguments.data, arguments.minutes * 60, arguments.seed)
    said = "".join(word for _, _, word in recording.words)
    print(f"{len(recording.wave) / recording.rate:.0f} s, {len(said)} digits", flush=True)
    model = plait.load(str(arguments.model), "cpu")
    begun = time.process_time()
    segments = model.segments((recording.wave, recording.rate), language="en", words=True)
    ours, seconds = digits_of(" ".join(one.text for one in segments)), time.process_time() - begun
    print(f"plait: WER {edit_distance(said, ours) / len(said):.4f}, {seconds:.0f} s of processor time", flush=True)
    words = [word for segment in segments for word in segment.words if len(digits_of(word.text)) == 1]
    off = [_off(word, recording.words) for word in words]
    off = [one for one in off if one is not None]
    near = [max(one) <= 0.3 for one in off]
    starts, ends = (np.median([one[i] for one in off]) for i in range(2))
    print(f"times: start and end within .3 s for {np.mean(near):.3f} of {len(off)} words, medians {starts:.3f} and "
          f"{ends:.3f} s", flush=True)  # fmt: skip
    silence = model.transcribe((np.zeros(20 * 16_000, np.float32), 16_000), language="en")
    print(f"silence: {silence!r}", flush=True)
    peer = transformers.pipeline("automatic-speech-recognition", model=str(arguments.model), device="cpu")
    from plait.modalities.audio_files import resample

    begun = time.process_time()
    heard = peer({"raw": resample(recording.wave, recording.rate, 16_000), "sampling_rate": 16_000},
                 return_timestamps=True,
                 generate_kwargs={"language": "en", "task": "transcribe"})["text"]  # fmt: skip
    seconds = time.process_time() - begun
    wrong = edit_distance(said, digits_of(heard)) / len(said)
    print(f"transformers' long form: WER {wrong:.4f}, {seconds:.0f} s of processor time", flush=True)


def _off(word: Any, spoken: list[tuple[float, float, str]]) -> tuple[float, float] | None:
    """How far start and end are from those of the nearest clip of this digit; None where none is within 1.5 s."""
    digit = digits_of(word.text)
    near = [(abs(word.start - a), abs(word.end - b)) for a, b, said in spoken if said == digit]
    best = min(near, key=sum, default=(9.0, 9.0))
    return best if max(best) < 1.5 else None


def speech_train(arguments: argparse.Namespace) -> None:
    """`plait train CLIPS --init-from WHISPER`: series of three to six digits, four speakers' to learn, the fifth's to
    transcribe before and after."""
    import csv
    import tempfile

    import soundfile

    import plait

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with (folder / "metadata.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "said", "split"])
            for number, (wave, said, rate) in enumerate(_series(arguments.data, "train", arguments.clips, 0)):
                soundfile.write(folder / f"{number}.wav", wave, rate)
                table.writerow([f"{number}.wav", said, "val" if number % 10 == 9 else "train"])
        asked = _series(arguments.data, "test", 20, 1)
        before = _error_rate(plait.load(str(arguments.model), "cpu"), asked)
        print(f"before: WER {before:.4f} on {len(asked)} clips of {SPEAKERS[-1]}", flush=True)
        begun = time.process_time()
        run = plait.train(
            folder, folder / "run", init_from=str(arguments.model), task="describe", steps=arguments.steps,
            seed=arguments.seed, tell=print,
        )  # fmt: skip
        seconds = time.process_time() - begun
        ours = run.model("cpu")
        print(f"after: WER {_error_rate(ours, asked):.4f}, trained in {seconds:.0f} s of processor time", flush=True)
        exported = plait.export(str(run.folder), folder / "export").folder
        _compare(exported, ours, asked[:10])


def _series(data: Path, which: str, count: int, seed: int) -> list[tuple[np.ndarray, str, int]]:
    """So many waveforms with their digits as words; of the last speaker (test), or of the others (train)."""
    import io
    import zipfile

    import soundfile

    rng = np.random.default_rng(seed)
    made = []
    with zipfile.ZipFile(data / "fsdd" / "fsdd_5speakers_wav.zip") as archive:
        by_speaker: dict[str, list[str]] = {}
        for name in sorted(name for name in archive.namelist() if name.endswith(".wav")):
            by_speaker.setdefault(Path(name).stem.split("_")[1], []).append(name)
        speakers = [SPEAKERS[-1]] if which == "test" else list(SPEAKERS[:-1])
        for number in range(count):
            names = by_speaker[speakers[number % len(speakers)]]
            waves: list[np.ndarray] = []
            words = []
            for _ in range(rng.integers(3, 7)):
                name = names[rng.integers(len(names))]
                wave, rate = soundfile.read(io.BytesIO(archive.read(name)), dtype="float32")
                waves += [np.zeros(int(rng.uniform(0.1, 0.5) * rate), np.float32), wave]
                words.append(NUMBERS[int(Path(name).stem[0])])
            made.append((np.concatenate(waves), " ".join(words), int(rate)))
    return made


def _error_rate(model: Any, asked: list[tuple[np.ndarray, str, int]]) -> float:
    """Wrong words of all, digits or words alike."""
    wrong = total = 0
    for wave, said, rate in asked:
        truth = digits_of(said)
        wrong += edit_distance(truth, digits_of(model.transcribe((wave, rate), language="en")))
        total += len(truth)
    return wrong / total


def _compare(folder: Path, ours: Any, asked: list[tuple[np.ndarray, str, int]]) -> None:
    """How often transformers' Whisper writes what ours does."""
    import transformers

    from plait.modalities.audio_files import resample

    network = transformers.WhisperForConditionalGeneration.from_pretrained(folder).eval()
    features = transformers.AutoFeatureExtractor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    same = 0
    for wave, _, rate in asked:
        heard = resample(wave, rate, features.sampling_rate)
        inputs = features(heard, sampling_rate=features.sampling_rate, return_attention_mask=True, return_tensors="pt")
        with torch.inference_mode():
            ids = network.generate(**inputs)
        same += tokenizer.decode(ids[0], skip_special_tokens=True).strip() == ours.transcribe((wave, rate))
    print(f"transformers writes the same of {same} of {len(asked)} clips", flush=True)


# --- GGUF -------------------------------------------------------------------------------------------------------


def gguf(arguments: argparse.Namespace) -> None:
    """Load a file as it is kept and write 32 tokens; or compare it with its weights in fp32, and those with
    transformers'."""
    import plait

    if arguments.perplexity:
        text = "\n".join(file.read_text(encoding="utf-8") for file in arguments.perplexity)
        for name, precision in (("as it is kept", "auto"), ("in fp32", "fp32")):
            tokens, value = perplexity(plait.load(str(arguments.file), "cpu", precision), text)
            print(f"perplexity of {tokens} tokens {name}: {value:.3f}", flush=True)
        return
    size = arguments.file.stat().st_size / 1e9
    if not arguments.logits:
        for library in ("transformers", "plait.hf.load"):  # whose memory is not counted
            importlib.import_module(library)

        before, clock, begun = _peak(), time.perf_counter(), time.process_time()
        model = plait.load(str(arguments.file), "cpu")
        seconds, processor = time.perf_counter() - clock, time.process_time() - begun
        loaded = _peak() - before
        model.generate("def add(a, b):", max_new_tokens=32)
        used = _peak() - before
        print(f"{arguments.file.name}, {size:.2f} GB: loaded in {processor:.1f} s of processor time, {seconds:.1f} s")
        print(f"above the libraries {loaded:.2f} GB to load, {used:.2f} GB to write: {used / size:.2f} of the file")
        return
    import transformers

    from plait.hf.huggingface import load

    ids = torch.randint(100, 20_000, (1, 32), generator=torch.Generator().manual_seed(0))
    network = load(arguments.file).model
    with torch.inference_mode():
        rows = torch.nn.functional.embedding(ids, network.token_embedding.table())
        ours = network.logits(network.backbone(rows))[0]
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.file.parent, gguf_file=arguments.file.name, dtype=torch.float32
    )
    with torch.inference_mode():
        theirs = peer(ids).logits[0]
    ours = ours[:, : theirs.shape[1]]
    print(f"largest difference of logits {float((ours - theirs).abs().max() / theirs.abs().max()):.2e} of the largest")


def perplexity(model: Any, text: str, length: int = 512, windows: int = 4) -> tuple[int, float]:
    """Of the first windows of a text, each read by itself."""
    network = model.checkpoint.model
    ids = torch.tensor(model.checkpoint.text.encode(text)[: windows * length])
    windows = len(ids) // length
    total = 0.0
    read, table = network.token_embedding, network.output_embedding
    with torch.inference_mode():
        for window in ids[: windows * length].view(windows, 1, length):
            rows = read.packed.rows(window[0]) if read.packed is not None else read.table()[window[0]]
            hidden = network.backbone(rows[None])
            logits = table.packed(hidden[0]) if table.packed is not None else network.logits(hidden[0])
            total += float(torch.nn.functional.cross_entropy(logits[:-1], window[0, 1:], reduction="sum"))
    scored = windows * (length - 1)
    return scored, math.exp(total / scored)


def _peak() -> float:
    """Of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("lora")
    one.add_argument("model", type=Path)
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--batch", type=int, default=4)
    one.add_argument("--length", type=int, default=512)
    one.add_argument("--who", default="plait,peft fp32", help="plait, peft fp32, peft bf16")
    one.set_defaults(run=lora)
    one = commands.add_parser("head")
    one.add_argument("row", choices=list(ROWS))
    one.add_argument("encoder", type=Path, help="a folder of a text, audio or vision encoder, or scratch")
    one.add_argument("--minutes", type=float, default=1.0, help="of training from scratch")
    one.add_argument("--data", type=Path, required=True, help="the folder with the public sets")
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=head)
    one = commands.add_parser("gguf")
    one.add_argument("file", type=Path)
    one.add_argument("--logits", action="store_true")
    one.add_argument("--perplexity", type=Path, nargs="+", help="texts to read")
    one.set_defaults(run=gguf)
    one = commands.add_parser("speech-train")
    one.add_argument("model", type=Path)
    one.add_argument("--data", type=Path, required=True, help="the folder with the public sets")
    one.add_argument("--clips", type=int, default=80)
    one.add_argument("--steps", type=int, default=40)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=speech_train)
    one = commands.add_parser("speech")
    one.add_argument("model", type=Path)
    one.add_argument("--data", type=Path, required=True, help="the folder with the public sets")
    one.add_argument("--minutes", type=float, default=3.0)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=speech)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
