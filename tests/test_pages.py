"""The how-to pages: each command and each block of Python runs, in a folder that holds the files they name.

What they name is made small, `plait train` and `plait tune` stop after a few steps, and servers are stopped as soon as
they answer. What needs a network, a cluster or a program that is not here is listed in OUTSIDE.
"""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import EN, RECIPE, ZH, make_image, tone, write_world
from server import write_imports
from test_docs import ROOT, blocks
from test_pretrained import folders  # noqa: F401  a fixture

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="the blocks are for a POSIX shell")]

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
OUTSIDE = re.compile(
    r"^(pip|docker|kubectl|sbatch|vllm|torchrun|python -m venv|make|\.) |s3://|postgresql://"
    r"|python (bench|docs)/|runs/transfer/"
)
PYTHON_OUTSIDE = re.compile(r"OpenAI\(|MLflow|ai_edge_litert")  # a server that runs, packages that are not here

# `plait` for the pages: training is short, and what serves is stopped once it says where.
SHIM = """
import re, shutil, signal, subprocess, sys
words = sys.argv[1:]
if words[0] in ("train", "tune") and "--estimate" not in words:
    for option in ("--minutes", "--steps", "--trials"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    words += ["--steps", "3"] + (["--trials", "2"] if words[0] == "tune" else [])
if words[0] in ("train", "export") and "-o" in words:  # a page shows several ways, each into the same folder
    shutil.rmtree(words[words.index("-o") + 1], ignore_errors=True)
if words[0] == "transfer" and "--steps" in words:
    words[words.index("--steps") + 1] = "3"
command = [sys.executable, "-m", "plait", *words]
if words[0] in ("serve", "studio") or (words[0] == "mcp" and "--http" in words):
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = ""
    for line in process.stdout:
        said += line
        if re.search("https?://[^ ]+:[0-9]+", line):
            process.send_signal(signal.SIGINT)
            said += process.communicate()[0]
            sys.exit(0 if "Traceback" not in said else print(said) or 1)
    print(said)
    sys.exit(process.wait() or 1)
sys.exit(subprocess.run(command, stdin=None if words[0] in ("reply", "chat") else subprocess.DEVNULL).returncode)
"""

# What the blocks of Python name without having made it.
PRELUDE = """
from datetime import datetime
from pathlib import Path
import datasets, numpy as np, pandas, plait
from PIL import Image
image = pil_image = Image.open("photo.png")
array, wave = np.asarray(image), np.zeros(8000, np.float32)
files = sorted(Path("photos").glob("*/*.png"))
rows = [{"image": str(file), "label": file.parent.name} for file in files]
frame, others = pandas.DataFrame(rows), rows[::7]
images, labels = [str(file) for file in files], [file.parent.name for file in files]
model = plait.load("runs/demo")
"""


def call(folder: Path, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "plait", *words],
        cwd=folder,
        env=around(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"


def around(folder: Path) -> dict[str, str]:
    """An environment in which `plait` is the shim, and nothing is fetched."""
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": path,
        "HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Path:  # noqa: F811
    """Everything that the pages name."""
    here = tmp_path_factory.mktemp("pages")
    (here / "bin").mkdir()
    (here / "shim.py").write_text(SHIM, encoding="utf-8")
    for name, line in (
        ("plait", f'"{sys.executable}" "{here / "shim.py"}" "$@"'),
        ("python", f'"{sys.executable}" "$@"'),
    ):
        (here / "bin" / name).write_text(f"#!/bin/sh\nexec {line}\n", encoding="utf-8")
        (here / "bin" / name).chmod(0o755)
    write_media(here)
    write_tables(here)
    write_models(here, folders)
    return here


def write_media(here: Path) -> None:
    rng = np.random.default_rng(0)
    for folder, count in (("photos", 12), ("more", 3), ("holiday", 1)):
        for kind, label in enumerate(("sea", "lake", "cat", "dog")):
            (here / folder / label).mkdir(parents=True)
            for number in range(count):
                make_image(kind, rng).save(here / folder / label / f"{label}-{number}.png")
    some = here / "photos" / "cat" / "cat-0.png"
    for name in ("photo.png", "new.jpg", "boat.jpg", "cat.jpg"):
        Image.open(some).save(here / name)
    for folder, count in (("voices", 24), ("talks", 2)):
        (here / folder).mkdir()
        rows = [(f"{number}.wav", ("calm", "glad")[number % 2]) for number in range(count)]
        for number, (name, _) in enumerate(rows):
            (here / folder / name).write_bytes(tone(number % 2, rng))
        if folder == "voices":
            write_csv(here / folder / "metadata.csv", ["file_name", "emotion"], rows)
    (here / "clip.wav").write_bytes(tone(1, rng))


def write_csv(path: Path, head: list[str], rows: list[tuple]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def write_tables(here: Path) -> None:
    call(here, "example", "replies", "-o", "replies")
    call(here, "example", "chats", "-o", "chats")
    shutil.copy(next((here / "replies").glob("*.csv")), here / "pairs.csv")
    shutil.copy(next((here / "chats").glob("*.jsonl")), here / "talks.jsonl")
    (here / "messages.txt").write_text("when are you open?\nis there life on Mars?\n", encoding="utf-8")
    rows = [(f"please play {thing} number {n}", "music") for n in range(12) for thing in ("jazz", "rock")]
    rows += [(f"will it {thing} on day {n}", "weather") for n in range(12) for thing in ("rain", "snow")]
    write_csv(here / "intents.csv", ["said", "intent"], rows)
    write_films(here / "ml-100k.zip")
    call(here, "key", "keys.txt")
    write_csv(here / "new.csv", ["item_id", "title", "genres"], [("9001", "New One (1998)", "Comedy")])


def write_films(path: Path) -> None:
    """A file in the form of MovieLens 100K."""
    draw = random.Random(0)
    names = ["Toy Story (1995)", "Heat (1995)", *(f"Film {number} (199{number % 9})" for number in range(40))]
    flags = "|".join(["0"] * 5 + ["1"] + ["0"] * 13)
    items = "\n".join(f"{n + 1}|{name}|01-Jan-1995|||{flags}" for n, name in enumerate(names))
    seen = [(user, item) for user in range(1, 41) for item in draw.sample(range(1, len(names) + 1), 12)]
    ratings = "\n".join(f"{user}\t{item}\t{draw.randint(1, 5)}\t{880000000 + n}" for n, (user, item) in enumerate(seen))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ml-100k/u.data", ratings)
        archive.writestr("ml-100k/u.item", items)


def write_models(here: Path, models: dict[str, Path]) -> None:
    """Runs that the pages take for granted, and tiny models in folders of the names of well-known ones."""
    metadata = write_world(here / "digits", 32) / "metadata.jsonl"
    text = metadata.read_text(encoding="utf-8")
    for name, digit in zip([*EN, *ZH], ["three", "one", "seven", "two", "三", "一", "七", "二"], strict=True):
        text = text.replace(name, digit)
    metadata.write_text(text, encoding="utf-8")
    short = (
        RECIPE.replace("steps: 160", "steps: 8")
        .replace("codec_steps: 60", "codec_steps: 4")
        .replace("context: 96", "context: 160")
    )
    (here / "short.yaml").write_text(short, encoding="utf-8")
    call(here, "train", "digits", "-o", "runs/demo", "--recipe", "short.yaml")
    call(here, "prepare", "photos", "-o", "data/photos")
    call(here, "train", "data/photos", "-o", "runs/photos", "--recipe", "short.yaml")
    call(here, "index", "add", "demo.index", "photos", "--model", "runs/demo")
    call(here, "train", "talks.jsonl", "-o", "runs/base", "--recipe", "chat", "--steps", "3")
    for name, like in (("fashion", "photos"), ("old", "photos"), ("flickr", "demo")):
        shutil.copytree(here / "runs" / like, here / "runs" / name, symlinks=True)
    for name in ("mnist", "old"):
        shutil.copytree(here / "data" / "photos", here / "data" / name)
    shutil.copytree(here / "photos", here / "NEW")
    shutil.copytree(write_imports(here / "imports")["bytes"], here / "gpt2")
    shutil.copytree(here / "gpt2", here / "BASE")
    shutil.copytree(here / "gpt2", here / "models" / "qwen2.5-0.5b")
    for name, like in (("whisper-tiny", "whisper"), ("clip-vit-base-patch32", "clip")):
        shutil.copytree(models[like], here / "openai" / name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_runs(page: Path, made: Path) -> None:
    """Each command line and each block, in order; all that fail are told at once."""
    failed, count = [], 0
    for language, text in blocks(page, "sh", "python"):
        if language == "python":
            pieces = [] if PYTHON_OUTSIDE.search(text) else [PRELUDE + re.sub(r"minutes=\d+", "minutes=0.05", text)]
        else:
            lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
            pieces = [line for line in lines if line and not line.startswith("#") and not OUTSIDE.search(line)]
        for piece in pieces:
            command = ["sh", "-euc", piece] if language == "sh" else [sys.executable, "-c", piece]
            done = subprocess.run(
                command, cwd=made, env=around(made), capture_output=True, text=True, check=False,
                stdin=subprocess.DEVNULL, timeout=600,
            )  # fmt: skip
            count += 1
            refused = "# cannot" in piece  # a command that is shown for what it says
            if (done.returncode != 0) != refused or "Traceback" in done.stderr:
                failed.append(f"{piece.removeprefix(PRELUDE)}\n{(done.stdout + done.stderr)[-1500:]}")
    assert not failed, f"{len(failed)} of {count}:\n\n" + "\n\n".join(failed)
