"""Search: an index made by the real commands, against numpy's order, against damage, kills and mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from conftest import EN
from plait import Index, load
from plait.classifiers.space import SpaceQuality
from plait.core.errors import PlaitError
from plait.core.files import only_writer
from plait.data.dataset import Dataset
from plait.model import checkpoint as checkpoints
from server import Server, is_error

pytest.importorskip("lancedb")
Run = Callable[..., int]


@pytest.fixture(scope="module")
def index(trained: Path, plait: Run) -> Path:
    """All records of the small world."""
    folder = trained.parent / "world.index"
    assert plait("index", "add", folder, trained.parent / "data", "--model", trained) == 0
    return folder


def test_search_is_exact_and_crosses_modalities(index: Path, trained: Path, world: Path) -> None:
    found, model = Index(index), load(trained)
    records = [r for r in Dataset.open(trained.parent / "data").iterate() if r.parts.keys() & {"image", "audio"}]
    assert len(found) == len(records) == 320
    media = [r.parts.get("image") or r.parts["audio"] for r in records]
    vectors = model.embed(media)
    for query in ["red disc", "蓝条", world / "media" / "5.png", world / "media" / "6.wav"]:
        near = vectors @ model.embed([query])[0]
        hits = found.search(query, k=15, by="vector")
        np.testing.assert_allclose([hit.similarity for hit in hits], np.sort(near)[::-1][:15], atol=1e-5)
        least = np.sort(near)[::-1][14]
        names = {r.id for r, n in zip(records, near, strict=True) if n >= least - 1e-6}
        assert {hit.id.rpartition("#")[2] for hit in hits} <= names
    # Audio and image were never paired: they meet through their names.
    images = found.search(world / "media" / "1.wav", k=10, where="kind = 'image'", by="vector")
    assert sum(hit.columns["en"] == EN[1] for hit in images) >= 6
    assert {hit.kind for hit in images} == {"image"}
    assert all(hit.preview and hit.preview[:4] == b"\x89PNG" for hit in images)


def test_words_and_vectors_are_ranked_together(index: Path) -> None:
    found = Index(index)
    assert {hit.columns["zh"] for hit in found.search("红圆", k=5, by="words")} == {"红圆"}
    hybrid = found.search("blue bar", k=20)
    assert {hit.text.splitlines()[0] for hit in hybrid if hit.text} == {"blue bar"}
    equal = [hit.similarity for hit in hybrid if hit.text == hybrid[0].text]
    assert equal == sorted(equal, reverse=True)  # among equal words the vectors decide
    assert found.search("zeppelin", by="words") == []
    assert found.search('"(*) AND \\ ~', by="hybrid")  # no syntax of its own
    with pytest.raises(PlaitError, match="Only a text"):
        found.search(b"", by="words")


def test_an_approximate_index_finds_what_is_near(index: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(index, tmp_path / "copy")
    exact, large = Index(index), Index(copy)
    large.exact = 100
    large.compact()
    assert any(list(i.columns) == ["_vector"] for i in large.table.list_indices())
    for name in EN:
        wanted = {hit.id for hit in exact.search(name, k=10, by="vector")}
        assert len(wanted & {hit.id for hit in large.search(name, k=10, by="vector")}) >= 8
    only = large.search(EN[0], k=10, by="vector", where="split = 'test' AND kind = 'audio'")
    assert len(only) == 10 and all(hit.kind == "audio" for hit in only)


def test_adding_again_takes_only_what_is_new(
    trained: Path, world: Path, plait: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, folder = tmp_path / "files", tmp_path / "index"
    files.mkdir()
    for i in range(6):
        shutil.copy(world / "media" / f"{i}.png", files)
    (files / "cut.wav").write_bytes((world / "media" / "0.wav").read_bytes()[:99])
    (files / "page.png").write_text("<html>")
    assert plait("index", "add", folder, files, "--model", trained) == 0
    told = capsys.readouterr()
    assert "6 added, 0 changed, 0 as before; 6 in" in told.out
    assert "cut.wav" in told.err and "cut short" in told.err and "page.png" in told.err
    refused = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert len(refused) == 2 and all(one["reason"] for one in refused)
    before = (files / "1.png").read_bytes()
    shutil.copy(world / "media" / "3.png", files / "1.png")
    shutil.copy(world / "media" / "7.png", files)
    assert plait("index", "add", folder, files) == 0
    assert "1 added, 1 changed, 5 as before; 7 in" in capsys.readouterr().out
    assert plait("index", "add", folder, files / "2.png", files / "7.png") == 0
    assert "0 added, 0 changed, 2 as before; 7 in" in capsys.readouterr().out
    assert plait("search", folder, files / "1.png", "-k", 1, "-o", tmp_path / "found.html") == 0
    assert "1.000" in capsys.readouterr().out and before != (files / "1.png").read_bytes()
    page = (tmp_path / "found.html").read_text()
    assert "data:image/png;base64," in page and "<script" not in page
    assert plait("search", folder, "red disc", "-o", tmp_path / "found.png") == 0
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    assert plait("index", "delete", folder, "--where", "source LIKE '%/2.png'") == 0
    assert plait("index", "compact", folder) == 0
    assert plait("index", "verify", folder) == 0
    assert "1 deleted; 6 in" in (told := capsys.readouterr().out) and "6 entries, all whole" in told


def test_mistakes_are_told_and_nothing_is_lost(
    index: Path, trained: Path, plait: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(index, tmp_path / "copy")
    other = tmp_path / "other"
    weights = checkpoints.load(trained / "checkpoints" / "best")
    weights.training["seed"] = 99
    checkpoints.save(weights, other)
    (tmp_path / "text.txt").write_text("a")

    def fails(*arguments: object) -> str:
        assert plait(*arguments) == 1
        told = capsys.readouterr().err.lstrip()
        assert told.startswith("plait: ") and "Traceback" not in told
        return told

    assert "was made by the model" in fails("search", copy, "x", "--model", other)
    assert "was made by the model" in fails("index", "add", copy, world_file(trained), "--model", other)
    assert "No field named colour" in (told := fails("search", copy, "x", "--where", "colour = 'red'")) and "en" in told
    assert "Nothing was deleted" in fails("index", "delete", copy, "--where", "kind =")
    assert "no index" in fails("search", tmp_path / "none", "x")
    assert "other files" in fails("index", "add", trained, world_file(trained), "--model", trained)
    assert "is a file" in fails("search", tmp_path / "text.txt", "x")
    assert "does not exist" in fails("index", "add", copy, tmp_path / "gone")
    with only_writer(copy):
        assert f"process {os.getpid()}" in fails("index", "add", copy, world_file(trained))
        assert plait("search", copy, "red disc") == 0  # readers are never kept out
    assert len(Index(copy)) == 320
    capsys.readouterr()
    for file in sorted((copy / "entries.lance").rglob("*.*")):
        if file.suffix not in (".lance", ".manifest"):
            continue
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:9] + bytes([whole[9] ^ 64]) + whole[10:], b""):
            file.write_bytes(damaged)
            code = plait("index", "verify", copy)
            told = capsys.readouterr()
            assert code == 1 and "Traceback" not in told.err and str(file.name) in told.out + told.err, file
            assert plait("search", copy, "red disc") in (0, 1)
            assert "Traceback" not in capsys.readouterr().err
        file.write_bytes(whole)
    assert plait("index", "verify", copy) == 0


def world_file(trained: Path) -> Path:
    return trained.parent / "files" / "media" / "0.png"


ADD = """
import sys, plait
index = plait.Index(sys.argv[1], sys.argv[2])
import plait.search.adding as indexing
indexing.COMMIT = 16
import plait.search.index as search
search.BATCH = 16
index.add(sys.argv[3], progress=lambda stage, done, total: print(done, flush=True))
"""


def test_a_kill_while_adding_loses_nothing_acknowledged(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    data = trained.parent / "data"
    child = subprocess.Popen(
        [sys.executable, "-c", ADD, str(folder), str(trained), str(data)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    told = 0
    for line in child.stdout:
        told = int(line)
        if told >= 48:
            child.send_signal(signal.SIGKILL)
            break
    child.stdout.close()
    child.wait()
    index = Index(folder)
    assert told <= len(index) < 320 and index.verify() == []
    added = index.add(data)
    assert added.same >= told and len(index) == 320 and index.verify() == []


def test_what_is_not_near_enough_is_left_out(
    index: Path, plait: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Index(index)
    hits = opened.search("red disc", k=20, by="vector")
    cut = hits[5].similarity
    assert [hit.id for hit in opened.search("red disc", k=20, by="vector", least=cut)] == [
        hit.id for hit in hits if hit.similarity > cut
    ]
    opened.model.plait_model.checkpoint.space = SpaceQuality(0.9, cut, 40)
    kept = opened.search("red disc", k=20, by="vector", least="auto")
    assert [hit.id for hit in kept] == [hit.id for hit in hits if hit.similarity > cut]
    assert plait("search", index, "red disc", "--least", "1.5", "--by", "vector") == 0
    assert "Nothing was found" in capsys.readouterr().out
    assert plait("search", index, "red disc", "--least", "much") == 1


def test_search_is_served(index: Path, trained: Path, tmp_path: Path) -> None:
    with Server.start(tmp_path / "log", f"m={trained}", "--index", f"world={index}") as server:
        body = {"model": "m", "input": "red bar", "k": 6, "where": {"kind": ["image"], "split": "test"}}
        status, found = server.post("/v1/plait/search", body)
        assert status == 200 and found["index"] == "world" and len(found["data"]) == 6
        assert sum(one["columns"]["en"] == "red bar" for one in found["data"]) >= 4
        image = found["data"][0]
        assert image["preview"].startswith("data:image/png;base64,") and str(index.parent) not in json.dumps(found)
        part = {"type": "image_url", "image_url": {"url": image["preview"]}}
        status, again = server.post("/v1/plait/search", {"model": "m", "input": part, "k": 1, "preview": False})
        assert again["data"][0]["similarity"] > 0.9999 and again["data"][0]["preview"] is None
        for wrong, word in [
            ({"where": {"colour": "red"}}, "no column"), ({"index": "x"}, "world"), ({"k": 0}, "k"),
            ({"where": {"kind": "x') OR ('1' = '1"}}, ""), ({"where": "kind = 'image'"}, "where"),
        ]:  # fmt: skip
            status, _, answer = server.ask("POST", "/v1/plait/search", {**body, **wrong})
            if word:
                assert is_error(status, answer) and word in answer.decode()
            else:
                assert status == 200 and json.loads(answer)["data"] == []
