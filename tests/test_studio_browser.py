"""The studio in a real browser: from an empty workspace to an image that is named, as somebody new would do it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from test_studio import png, zip_of

pytestmark = pytest.mark.slow
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
        opened.faults = []
        opened.on("console", lambda message: opened.faults.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: opened.faults.append(str(error)))
        opened.goto(address)
        yield opened
        browser.close()


def test_from_a_zip_to_an_image_that_is_named(page: Any, tmp_path: Path) -> None:
    files = {f"{name}/{n}.png": png(kind, n) for kind, name in enumerate(("a", "b", "c")) for n in range(60)}
    (tmp_path / "photos.zip").write_bytes(zip_of(files))
    page.fill("input[name=name]", "photos")
    page.click("text=New project")
    page.wait_for_url("**/p/photos/data")
    page.set_input_files("#files", str(tmp_path / "photos.zip"))
    page.wait_for_selector(".tile")
    assert page.locator(".chip").count() == 4
    page.click("text=Train →")
    page.fill("input[name=minutes]", "0.5")
    page.click("text=Start training")
    page.wait_for_selector(".tag.done", timeout=400_000)
    page.click(".panel >> text=Result")
    page.wait_for_selector("#answers .tile")
    page.click("text=Use →")
    (tmp_path / "new.png").write_bytes(png(1, 777))
    page.set_input_files("#ask-file", str(tmp_path / "new.png"))
    page.wait_for_selector("#answer .big", timeout=60_000)
    assert page.faults == []


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
