"""The studio in a real browser, as somebody new would use it: five tasks from files to answers, recordings, pastes,
uploads that break off, and every page at two widths, in two languages and two lights.

PLAIT_STUDIO_SHOTS=FOLDER keeps a screenshot of every page, to be looked at.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.data.examples import write_example
from plait.modalities.audio_files import encode_wav
from test_studio import png, zip_of

pytestmark = pytest.mark.slow
SHOTS = os.environ.get("PLAIT_STUDIO_SHOTS")
MINUTES = os.environ.get("PLAIT_STUDIO_MINUTES", "0.3")
CLIPS = int(os.environ.get("PLAIT_STUDIO_CLIPS", "30"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]  # fmt: skip


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "plait", "studio", str(tmp_path / "studio"), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    line = next(line for line in process.stdout if "http://" in line)
    yield re.search(r"http://\S+", line)[0]  # type: ignore[index]
    process.terminate()
    process.wait(20)


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        opened = browser.new_page(viewport={"width": 1280, "height": 900})
        opened.set_default_timeout(120_000)
        opened.faults = []
        opened.on("console", lambda message: opened.faults.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: opened.faults.append(str(error)))
        opened.goto(address)
        yield opened
        browser.close()


# --- five tasks -------------------------------------------------------------------------------------------------


def clip(label: int, seed: int, ending: str) -> bytes:
    """A second of a tone of one of six pitches, in noise, as a WAV, MP3 or M4A file."""
    import av

    rng = np.random.default_rng([label, seed])
    times = np.arange(16_000) / 16_000
    wave = 0.4 * np.sin(2 * np.pi * 220 * 1.4**label * times * rng.uniform(0.97, 1.03)) + rng.normal(0, 0.02, 16_000)
    wave = wave.astype(np.float32)
    if ending == "wav":
        return encode_wav(wave, 16_000)
    buffer = io.BytesIO()
    form, codec = {"mp3": ("mp3", "mp3"), "m4a": ("ipod", "aac")}[ending]
    with av.open(buffer, "w", format=form) as file:
        stream = file.add_stream(codec, rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    return buffer.getvalue()


def write_photos(folder: Path) -> list[Path]:
    files = {f"photos/{name}/{n}.png": png(kind, n) for kind, name in enumerate(("apple", "boat", "cat"))
             for n in range(100)}  # fmt: skip
    (folder / "photos.zip").write_bytes(zip_of(files))
    return [folder / "photos.zip"]


def write_clips(folder: Path) -> list[Path]:
    names = ("yes", "no", "left", "right", "stop", "go")
    endings = ("wav", "mp3", "m4a")
    files = {f"{name}/{n}.{endings[n % 3]}": clip(label, n, endings[n % 3]) for label, name in enumerate(names)
             for n in range(CLIPS)}  # fmt: skip
    (folder / "clips.zip").write_bytes(zip_of(files))
    return [folder / "clips.zip"]


def write_questions(folder: Path) -> list[Path]:
    write_example("replies", folder / "example")
    return [(folder / "example" / "pairs.csv").rename(folder / "faq.csv")]


def write_films(folder: Path) -> list[Path]:
    write_example("histories", folder / "example")
    return sorted((folder / "example").glob("*.csv"))


def write_chats(folder: Path) -> list[Path]:
    choose = random.Random(0)
    lines = []
    for n in range(200):
        colour, thing = choose.choice(("red", "blue", "green")), choose.choice(("hat", "cup", "ball"))
        turns = [("user", f"I have a {colour} {thing}."), ("assistant", f"A {thing} in {colour}, how nice!"),
                 ("user", "What colour is it?"), ("assistant", f"It is {colour}.")]  # fmt: skip
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns], "n": n}))
    (folder / "talks.jsonl").write_text("\n".join(lines) + "\n")
    return [folder / "talks.jsonl"]


def ask_photo(page: Any, folder: Path) -> None:
    (folder / "new.png").write_bytes(png(1, 777))
    page.set_input_files("#ask-file", str(folder / "new.png"))
    page.wait_for_selector("#answer .big")


def ask_clip(page: Any, folder: Path) -> None:
    (folder / "new.m4a").write_bytes(clip(3, 777, "m4a"))
    page.set_input_files("#ask-file", str(folder / "new.m4a"))
    page.wait_for_selector("#answer .big")


def ask_question(page: Any, folder: Path) -> None:
    page.fill("#ask-text input", "Hello! How is it with returns?")
    page.click("#ask-text button.primary")
    page.wait_for_selector("#answer .big")


def ask_film(page: Any, folder: Path) -> None:
    with (folder / "items.csv").open(encoding="utf-8") as file:
        titles = [row["title"] for row in csv.DictReader(file)][:3]
    page.fill(".lines textarea", "\n".join(titles))
    page.click(".lines button.primary")
    page.wait_for_selector(".lines ol li")


def ask_chat(page: Any, folder: Path) -> None:
    page.fill("#chat textarea", "I have a red hat.")
    page.click("#chat button.primary")
    page.wait_for_selector("#chat .assistant:not(.busy)")
    assert page.inner_text("#chat .assistant").strip()


TASKS = {
    "photos": (write_photos, ask_photo), "clips": (write_clips, ask_clip), "faq": (write_questions, ask_question),
    "films": (write_films, ask_film), "chat": (write_chats, ask_chat),
}  # fmt: skip


def shoot(page: Any, name: str) -> None:
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(300)
        page.screenshot(path=f"{SHOTS}/{name}.png", full_page=True)


@pytest.mark.parametrize("task", TASKS)
def test_from_files_to_answers(page: Any, tmp_path: Path, task: str) -> None:
    """At most eight clicks from an empty workspace to an answer, and no error in the console."""
    write, ask = TASKS[task]
    clicks = 0

    def click(selector: str) -> None:
        nonlocal clicks
        clicks += 1
        page.click(selector)

    page.fill("input[name=name]", task)
    click("text=New project")
    page.wait_for_url(f"**/p/{task}/data")
    with page.expect_navigation():
        page.set_input_files("#files", [str(path) for path in write(tmp_path)])  # two clicks: the button, and a file
    clicks += 2
    page.wait_for_selector(".tile, .excerpt")
    shoot(page, f"{task}-1-data")
    click("text=Train →")
    shoot(page, f"{task}-2-train")
    page.fill("input[name=minutes]", MINUTES)
    click("text=Start training")
    page.wait_for_selector(".watched, .tag.done, .tag.failed", timeout=500_000)
    shoot(page, f"{task}-3-run")
    page.wait_for_selector(".tag.done, .tag.failed", timeout=500_000)
    assert page.locator(".tag.done").count(), page.inner_text("#live")
    shoot(page, f"{task}-4-done")
    click("#live >> text=Result")
    page.wait_for_selector(".verdict .big")
    shoot(page, f"{task}-5-result")
    click(".verdict >> text=Use →")
    page.wait_for_selector("#use .panel")
    ask(page, tmp_path)
    clicks += 2
    shoot(page, f"{task}-6-use")
    page.goto(page.url.rsplit("/", 1)[0] + "/hand-over")
    page.wait_for_selector("#exports")
    shoot(page, f"{task}-7-hand-over")
    assert clicks <= 8 and page.faults == []


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_and_speak_chinese(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.click("form[action='/examples/questions'] button")
    page.wait_for_url("**/p/questions/train")
    base = page.url.rsplit("/", 1)[0]
    for part in ("data", "train", "result", "use", "hand-over"):
        page.goto(f"{base}/{part}")
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), part
    page.click("text=中文")
    page.wait_for_selector("text=项目")
    assert page.faults == []
