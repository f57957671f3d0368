"""The page in a real Chromium: every tab does its job, offline, without an error, behind the same doors as the API."""

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

pytest.importorskip("gradio")
pytest.importorskip("lancedb")
playwright = pytest.importorskip("playwright.sync_api")
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
        self.page.wait_for_selector("[role=tab]")

    def tab(self, name: str) -> None:
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():  # on a phone they are behind a button
            self.page.locator(".overflow-menu > button").click()
            tab = self.page.locator(".overflow-dropdown button", has_text=name)
        tab.click()


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


def test_every_tab_does_its_job_and_keys_hold(
    trained: Path, plait: Callable[..., int], browser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plait("index", "add", tmp_path / "index", trained.parent / "data", "--model", trained) == 0
    capsys.readouterr()
    assert plait("key", tmp_path / "keys", "--name", "me") == 0
    key = capsys.readouterr().out.strip()
    options = ("--ui", "--index", tmp_path / "index", "--api-key-file", tmp_path / "keys")
    shop = write_shop(tmp_path / "shop", plait)
    with Server.start(tmp_path / "log", f"m={trained}", shop, *options, key=key) as server:
        for path in ("/", "/page.js", "/theme.css", "/gradio_api/queue/data?session_hash=x", "/report/m"):
            status, headers, body = server.ask("GET", path, key="wrong")
            assert status == 401 and is_error(status, body), path
            assert headers["www-authenticate"].startswith("Basic") == (path == "/")
        for path in ("/gradio_api/upload", "/gradio_api/file=/etc/passwd", "/gradio_api/proxy=http://x", "/config",
                     "/report/../../etc/passwd", "/gradio_api/run/chat", "/gradio_api/info"):  # fmt: skip
            for method in ("GET", "POST"):
                status, _, body = server.ask(method, path)
                assert status in (404, 405) or body == b"There is no report.", path
        fetched = {"path": "http://127.0.0.1:9/x.png", "meta": {"_type": "gradio.FileData"}}
        join = {"data": ["m", fetched, "", "", "", False, ""], "fn_index": 0, "session_hash": "x"}
        status, _, body = server.ask("POST", "/gradio_api/queue/join", join)
        assert is_error(status, body) and b"texts and numbers" in body
        status, headers, body = server.ask("GET", "/")
        policy = headers["content-security-policy"]
        assert status == 200 and "'unsafe-eval'" not in policy and "default-src 'none'" in policy
        assert "script-src 'self' 'nonce-" in policy and body.count(b"<script") == body.count(b"<script nonce=")

        visit = Visit(browser, server, key)
        page, see = visit.page, playwright.expect
        see.set_options(timeout=60_000)
        page.fill("#chat-text textarea", EN[0])
        page.click("#chat-go")
        page.wait_for_selector("#chat-talk .reply img")  # a model of records answers words with an image
        page.fill("#chat-text textarea", "<b>*x*</b> [y](z) '&amp;\"")
        page.click("#chat-go")
        see(page.locator("#chat-talk .reply img")).to_have_count(2)
        assert "<b>*x*</b> [y](z) '&amp;\"" in page.inner_text("#chat-talk")

        visit.tab("Recognise")
        page.set_input_files(".plait-media[data-to=recognise-medium] input", trained.parent / "files/media/5.png")
        page.wait_for_selector(".plait-media[data-to=recognise-medium] .shown img")
        page.click("#recognise-go")
        first = page.locator("#recognise-out .plait-bar b").first
        see(first).to_have_text(re.compile("|".join(EN)))
        page.set_input_files(".plait-media[data-to=recognise-medium] input", trained.parent / "files/media/6.wav")
        page.wait_for_selector(".plait-media[data-to=recognise-medium] .shown audio")
        page.fill("#recognise-labels textarea", ", ".join(ZH))
        page.click("#recognise-go")
        see(first).to_have_text(re.compile("|".join(ZH)))
        page.click(".plait-media[data-to=recognise-medium] >> text=Draw")
        box = page.locator(".plait-media[data-to=recognise-medium] canvas").bounding_box()
        page.mouse.move(box["x"] + 40, box["y"] + 60)
        page.mouse.down()
        page.mouse.move(box["x"] + 160, box["y"] + 90, steps=4)
        page.mouse.up()
        page.fill("#recognise-labels textarea", "")
        page.click("#recognise-go")
        see(first).to_have_text(re.compile("|".join(EN)))

        visit.tab("Draw")
        page.get_by_role("button", name=EN[3]).locator("visible=true").click()  # an example
        see(page.locator("#draw-text textarea")).to_have_value(EN[3])
        page.click("#draw-go")
        see(page.locator("#draw-out img")).to_have_count(4)
        visit.tab("Speak")
        page.fill("#speak-text textarea", EN[2])
        page.click("#speak-go")
        page.wait_for_selector("#speak-out audio")
        assert (
            page.evaluate(
                "new Promise(done => { const a = document.querySelector('#speak-out audio'); "
                "if (a.duration) done(a.duration); a.onloadedmetadata = () => done(a.duration); })"
            )
            > 0
        )
        visit.tab("Find")
        page.locator(".plait-example[data-to=find-medium]").first.click()
        page.click("#find-go")
        page.wait_for_selector("#find-out figure img")
        visit.tab("Explain")
        page.set_input_files(".plait-media[data-to=explain-medium] input", trained.parent / "files/media/5.png")
        page.wait_for_selector(".plait-media[data-to=explain-medium] .shown img")
        page.click("#explain-go")
        page.wait_for_selector("#explain-out img.plait-overlay")
        see(page.locator("#explain-out")).to_contain_text("random ones")
        page.click(".plait-media[data-to=explain-medium] >> text=Clear")
        page.fill("#explain-text textarea", f"{EN[0]} {EN[1]}")
        page.click("#explain-go")
        see(page.locator("#explain-out .plait-marked span")).to_have_count(len(f"{EN[0]} {EN[1]}".split()))
        visit.tab("Recommend")
        page.fill("#recommend-text textarea", "gold")
        page.click("#recommend-look")
        see(page.locator("#recommend-found button")).to_have_count(1)
        page.click("#recommend-found button")  # begins a history
        cards = page.locator("#recommend-out .plait-item")
        see(cards).to_have_count(7)
        assert page.locator("#recommend-out img").count() == 3 and page.locator("#recommend-out .tile").count() == 4
        first = cards.first.locator("button").first
        title = first.get_attribute("data-title")
        first.click()  # a click on what was found goes on with it
        see(page.locator("#recommend-chosen button")).to_have_count(2)
        see(cards).to_have_count(6)
        assert title in page.inner_text("#recommend-chosen") and "<b>" in title
        see(page.locator("#recommend-out")).to_contain_text("because of")
        cards.first.get_by_text("like it").click()
        see(page.locator("#recommend-out")).to_contain_text("Like A *")
        see(cards).to_have_count(7)
        page.fill("#recommend-where textarea", "colour = 'red'")
        page.click("#recommend-go")
        see(page.locator("#recommend-out .plait-wrong")).to_contain_text("no such column: colour")
        visit.tab("Report")
        assert "run" in page.frame_locator("iframe.plait-report").first.locator("h1").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone
        page.context.close()
        assert visit.errors == [] and visit.elsewhere == []
        assert key not in server.log.read_text() and "zeppelin" not in server.log.read_text()
