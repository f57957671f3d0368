"""The page in a real Chromium: every part does its job, offline, without an error, behind the same doors as the API."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import EN, ZH
from server import Server, is_error

pytest.importorskip("lancedb")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Visit:
    """A page that was opened, and what it did beside what it shows."""

    def __init__(self, browser: Any, server: Server, key: str = "", width: int = 390) -> None:
        given = {"http_credentials": {"username": "me", "password": key}} if key else {}
        self.page = browser.new_context(viewport={"width": width, "height": 800}, **given).new_page()
        self.page.set_default_timeout(60_000)
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        own = (server.url, "data:", "blob:")
        self.page.on("request", lambda r: None if r.url.startswith(own) else self.elsewhere.append(r.url))
        self.page.goto(server.url)
        self.page.wait_for_selector("[data-verb]:not([hidden])")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def write_shop(folder: Path, plait: Callable[..., int]) -> Path:
    """A run on the histories of buyers; every other product has an image."""
    (folder / "files").mkdir(parents=True)
    rows, goods = ["user,item"], []
    for i, colour in enumerate(["red", "orange", "gold", "green", "teal", "blue", "purple", "brown"]):
        image = f"{colour}.png" if i % 2 == 0 else ""
        if image:
            Image.new("RGB", (24, 24), colour).save(folder / "files" / image)
        goods.append(json.dumps({"id": f"p{i}", "title": f"A *{colour}* <b>hat</b>", "image": image}))
        rows += [f"v{i},p{(i + j) % 8}" for j in range(5)]
    (folder / "files" / "interactions.csv").write_text("\n".join(rows) + "\n")
    (folder / "files" / "items.jsonl").write_text("\n".join(goods) + "\n")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "model: {backbone: {width: 16, layers: 1, heads: 2, context: 16}}\ntraining: {steps: 20, batch_size: 8}\n"
    )
    assert plait("train", folder / "files", "-o", folder / "run", "--recipe", recipe) == 0
    return folder / "run"


def test_every_part_does_its_job_and_keys_hold(
    trained: Path, plait: Callable[..., int], browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plait("index", "add", tmp_path / "index", trained.parent / "data", "--model", trained) == 0
    capsys.readouterr()
    assert plait("key", tmp_path / "keys", "--name", "me") == 0
    key = capsys.readouterr().out.strip()
    options = ("--ui", "--index", tmp_path / "index", "--api-key-file", tmp_path / "keys")
    shop = write_shop(tmp_path / "shop", plait)
    with Server.start(tmp_path / "log", f"m={trained}", shop, *options, key=key) as server:
        for path in ("/", "/static/served.js", "/static/studio.css", "/report/m"):
            status, headers, body = server.ask("GET", path, key="wrong")
            assert status == 401 and is_error(status, body), path
            assert headers["www-authenticate"].startswith("Basic") == (path == "/")
            status, _, body = server.ask("POST", path)
            assert status == 405, path
        for path in ("/static/htmx.min.js", "/static/../app.py", "/report/../../etc/passwd", "/projects", "/p/x/data"):
            status, _, body = server.ask("GET", path)
            assert status == 404 or body == b"There is no report.", path
        status, headers, body = server.ask("GET", "/")
        policy = headers["content-security-policy"]
        assert status == 200 and "unsafe" not in policy and "default-src 'none'" in policy

        visit = Visit(browser, server, key)
        page, see = visit.page, playwright.expect
        see.set_options(timeout=60_000)
        part = '[data-verb="{}"]'.format
        page.fill(f"{part('chat')} textarea", EN[0])
        page.click(f"{part('chat')} button.primary")
        page.wait_for_selector(".talk .assistant img")  # a model of records answers words with an image
        page.fill(f"{part('chat')} textarea", "<b>*x*</b> [y](z) '&amp;\"")
        page.click(f"{part('chat')} button.primary")
        see(page.locator(".talk .assistant img")).to_have_count(2)
        assert "<b>*x*</b> [y](z) '&amp;\"" in page.inner_text(".talk")

        page.set_input_files("#ask-file", trained.parent / "files/media/5.png")
        answer = page.locator("#answer .big").first
        see(answer).to_have_text(re.compile("|".join(EN)))
        page.click("#answer >> text=Why?")
        page.wait_for_selector("#answer img.overlay")
        see(page.locator("#answer")).to_contain_text("random ones")
        page.set_input_files("#ask-file", trained.parent / "files/media/6.wav")
        page.wait_for_selector("#answer audio")
        see(answer).to_have_text(re.compile("|".join(EN + ZH)))

        page.fill(f"{part('draw')} input", EN[3])
        page.click(f"{part('draw')} button.primary")
        see(page.locator(f"{part('draw')} .made img")).to_have_count(4)
        page.fill(f"{part('speak')} input", EN[2])
        page.click(f"{part('speak')} button.primary")
        page.wait_for_selector(f"{part('speak')} .made audio")
        page.wait_for_function("document.querySelector('[data-verb=speak] .made audio').duration > 0")
        page.set_input_files("#find-file", trained.parent / "files/media/5.png")
        page.wait_for_selector("#found figure img")

        page.select_option("#model", label="run")  # the shop's
        page.fill("#items-form input", "gold")
        page.click("#items-form button")
        see(page.locator("#items .chip")).to_have_count(1)
        page.click("#items .chip")  # begins a history
        cards = page.locator("#recommended .tile")
        see(cards).to_have_count(7)
        assert page.locator("#recommended img").count() == 3
        title = cards.first.locator("b").inner_text()
        cards.first.locator("button").first.click()  # what was found joins the history
        see(page.locator("#history .chip")).to_have_count(2)
        see(cards).to_have_count(6)
        assert title in page.inner_text("#history") and "<b>" in title
        see(page.locator("#recommended")).to_contain_text("because of")
        cards.first.get_by_text("like it").click()
        see(cards).to_have_count(7)
        page.fill("#where-form input", "colour = 'red'")
        page.click("#where-form button")
        see(page.locator("#message")).to_contain_text("colour")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
        page.context.close()
        allowed = [error for error in visit.errors if "400" not in error]  # the condition that was refused
        assert allowed == [] and visit.elsewhere == []
        assert key not in server.log.read_text() and "zeppelin" not in server.log.read_text()
