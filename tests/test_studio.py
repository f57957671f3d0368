"""The studio: a workspace of plain folders, edits that can be undone, uploads that go on, and who may not come in."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas
import psutil
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import make_image
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.studio import jobs
from plait.studio.app import Studio, make_app
from plait.studio.excerpts import read_excerpt
from plait.studio.labels import LabelEdits
from plait.studio.listing import kind_of, list_project
from plait.studio.render import FOLDER, LANGUAGES, _environment, texts
from plait.studio.security import Gate
from plait.studio.uploads import upload_name
from plait.studio.worker import prepare_data
from plait.studio.workspace import Project, Workspace, safe_name

PORT = 8123
HOST = f"http://127.0.0.1:{PORT}"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "studio")


@pytest.fixture
def gate(workspace: Workspace) -> Iterator[Gate]:
    studio = Studio(workspace)
    yield Gate(make_app(studio), PORT)
    studio.close()


@pytest.fixture
def client(gate: Gate) -> TestClient:
    """A browser that opened the address with its token."""
    browser = TestClient(gate, base_url=HOST, follow_redirects=True)
    assert browser.get(f"/?token={gate.token}").status_code == 200
    return browser


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, body in files.items():
            file.writestr(name, body)
    return buffer.getvalue()


def png(kind: int, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    make_image(kind, np.random.default_rng(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def upload(client: TestClient, project: str, name: str, body: bytes, piece: int = 1 << 20) -> dict:
    begun = client.post(f"/p/{project}/uploads", json={"name": name, "size": len(body)}).json()
    at = begun["received"]
    while at < len(body):
        address = f"/p/{project}/uploads/{begun['id']}?offset={at}"
        at = client.put(address, content=body[at : at + piece]).json()["received"]
    answer = client.post(f"/p/{project}/uploads/{begun['id']}/end", json={})
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- who may come in --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
@pytest.mark.parametrize(
    "path", ["/", "/projects", "/static/studio.js", "/p/a/data", "/p/a/file?file=x", "/examples/digits"]
)
def test_nothing_is_answered_without_the_token(gate: Gate, workspace: Workspace, method: str, path: str) -> None:
    stranger = TestClient(gate, base_url=HOST, follow_redirects=False)
    assert stranger.request(method, path).status_code == 401
    assert stranger.request(method, path, headers={"cookie": "plait_studio=wrong"}).status_code == 401
    assert not list(workspace.root.iterdir())


def test_other_names_and_other_pages_are_refused(client: TestClient, workspace: Workspace) -> None:
    for headers in (
        {"host": "evil.example"},  # a rebound name
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
    ):
        assert client.post("/examples/questions", headers=headers).status_code == 403, headers
    assert not workspace.projects()
    assert client.post("/examples/questions", headers={"origin": HOST}).status_code == 200


@pytest.mark.parametrize("name", ["../out", "a/../../b", "..", "a/.ssh/key", ".hidden", "", "/", "a\\..\\..\\b"])
def test_names_that_lead_out_are_refused(client: TestClient, workspace: Workspace, name: str) -> None:
    client.post("/projects", data={"name": "p"})
    assert client.post("/p/p/uploads", json={"name": name, "size": 3}).status_code == 400
    assert client.get("/p/p/file", params={"file": name}).status_code in (400, 404, 507)


@given(st.text(max_size=60))
def test_an_upload_name_stays_below_its_folder(name: str) -> None:
    try:
        found = upload_name(name)
    except PlaitError:
        return
    root = Path("/base/files")
    assert (root / found).resolve().is_relative_to(root) and (root / found).resolve() != root


@given(st.text(max_size=80))
def test_a_project_name_is_one_folder(name: str) -> None:
    try:
        found = safe_name(name)
    except PlaitError:
        return
    assert Path(found).name == found and found not in (".", "..")


def test_a_link_out_of_the_workspace_is_not_followed(client: TestClient, workspace: Workspace, tmp_path: Path) -> None:
    client.post("/projects", data={"name": "p"})
    (tmp_path / "secret.txt").write_text("secret")
    (workspace.root / "elsewhere").symlink_to(tmp_path)
    project = workspace.project("p")
    project.uploads.mkdir()
    (project.uploads / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert [one.name for one in workspace.projects()] == ["p"]
    assert not list_project(project).items
    assert client.get("/p/p/file", params={"file": "link.txt"}).status_code == 400
    assert client.get("/p/elsewhere/data").status_code == 400


def test_markup_in_names_is_text(client: TestClient) -> None:
    client.post("/projects", data={"name": "p"})
    upload(client, "p", "a_b/<img src=x onerror=1>.csv", b"text\n<script>alert(1)</script>\n")
    page = client.get("/p/p/data").text
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page and "<img src=x" not in page
    policy = client.get("/p/p/data").headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet", ".arrow", ".csv.gz"])
def test_a_table_of_any_form_is_shown_as_it_will_be_read(tmp_path: Path, suffix: str) -> None:
    file, frame = tmp_path / f"people{suffix}", pandas.DataFrame({"name": ["Ada", "Lin"] * 9, "age": ["36", "41"] * 9})
    {
        ".csv": lambda: frame.to_csv(file, sep=";", index=False),
        ".csv.gz": lambda: frame.to_csv(file, index=False),
        ".json": lambda: frame.to_json(file, orient="records"),
        ".jsonl": lambda: frame.to_json(file, orient="records", lines=True),
        ".parquet": lambda: frame.to_parquet(file),
        ".arrow": lambda: frame.to_feather(file, compression="uncompressed"),
    }[suffix]()
    excerpt = read_excerpt(file, f"a/people{suffix}")
    assert kind_of(excerpt.path) == "text" and excerpt.header == ["name", "age"]
    assert excerpt.rows == [["Ada", "36"], ["Lin", "41"]] * 3


def test_a_zip_becomes_labelled_files(client: TestClient, workspace: Workspace) -> None:
    client.post("/projects", data={"name": "photos"})
    files = {f"all/{'disc' if k < 2 else 'bar'}/{k}{n}.png": png(k, n) for k in range(4) for n in range(3)}
    notes = upload(client, "photos", "photos.zip", zip_of({**files, "__MACOSX/all/._x": b"x", "all/../../e.png": b"x"}))
    assert notes["left_out"] == 1 and "e.png" in notes["notes"][0]
    listing = list_project(workspace.project("photos"))
    assert listing.labels == {"disc": 6, "bar": 6}
    assert client.get("/p/photos/items", params={"label": "bar"}).text.count('class="tile"') == 6
    assert client.get("/p/photos/thumb", params={"file": "disc/00.png"}).content[:4] == b"\x89PNG"


def test_an_upload_goes_on_after_a_break(client: TestClient, workspace: Workspace) -> None:
    client.post("/projects", data={"name": "p"})
    body = bytes(range(256)) * 40
    begun = client.post("/p/p/uploads", json={"name": "text.txt", "size": len(body)}).json()
    client.put(f"/p/p/uploads/{begun['id']}?offset=0", content=body[:5000])
    assert client.post(f"/p/p/uploads/{begun['id']}/end", json={}).status_code == 400  # not whole
    again = client.post("/p/p/uploads", json={"name": "text.txt", "size": len(body)}).json()
    assert again == {"id": begun["id"], "received": 5000}
    # A piece that comes twice is not written twice.
    assert client.put(f"/p/p/uploads/{begun['id']}?offset=0", content=body[:5000]).json() == {"received": 5000}
    upload(client, "p", "text.txt", body)
    assert (workspace.project("p").uploads / "text.txt").read_bytes() == body


def test_a_bomb_is_left_alone(client: TestClient, workspace: Workspace) -> None:
    client.post("/projects", data={"name": "p"})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("zeros.txt", bytes(30 << 20))
    body = buffer.getvalue()
    begun = client.post("/p/p/uploads", json={"name": "bomb.zip", "size": len(body)}).json()
    client.put(f"/p/p/uploads/{begun['id']}?offset=0", content=body)
    answer = client.post(f"/p/p/uploads/{begun['id']}/end", json={})
    assert answer.status_code == 400 and "beyond measure" in answer.json()["error"]
    assert not workspace.project("p").uploads.exists()


def test_edits_of_labels_are_undone_and_change_no_file(client: TestClient, workspace: Workspace) -> None:
    client.post("/projects", data={"name": "p"})
    upload(client, "p", "a.zip", zip_of({f"{k}/{n}.png": png(k, n) for k in range(2) for n in range(3)}))
    project = workspace.project("p")
    before = {path: path.read_bytes() for path in project.uploads.rglob("*.png")}

    def labels() -> dict[str, int]:
        return list_project(project).labels

    assert labels() == {"0": 3, "1": 3}
    steps = [
        ({"action": "move", "files": ["0/0.png"], "label": "1"}, {"1": 4, "0": 2}),
        ({"action": "delete", "files": ["1/1.png"]}, {"1": 3, "0": 2}),
        ({"action": "rename", "old": "0", "label": "1"}, {"1": 5}),
    ]
    seen = [labels()]
    for edit, after in steps:
        assert client.post("/p/p/labels", json=edit).status_code == 200
        assert labels() == after
        seen.append(after)
    for expected in reversed(seen[:-1]):
        client.post("/p/p/labels", json={"action": "undo"})
        assert labels() == expected
    assert {path: path.read_bytes() for path in project.uploads.rglob("*.png")} == before


@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(["move", "rename", "delete", "undo"]), max_size=12))
def test_undoing_everything_gives_the_folders_labels(actions: list[str]) -> None:
    folders = {f"{label}/{n}": label for label in "ab" for n in range(3)}
    with tempfile.TemporaryDirectory() as folder:
        edits = LabelEdits(Path(folder) / "labels.jsonl")
        for action in actions:
            if action == "move":
                edits.move(["a/0", "b/1"], "c")
            elif action == "rename":
                edits.rename("a", "b")
            elif action == "delete":
                edits.delete(["a/1"])
            else:
                edits.undo()
        again = LabelEdits(edits.path)
        assert again.apply(folders) == edits.apply(folders)
        while again.undo():
            pass
        assert again.apply(folders) == folders


def test_a_linked_folder_is_only_read(client: TestClient, workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "mine" / "disc").mkdir(parents=True)
    (tmp_path / "mine" / "disc" / "a.png").write_bytes(png(0))
    client.post("/projects", data={"name": "p"})
    client.post("/p/p/source", data={"path": str(tmp_path / "mine")})
    assert list_project(workspace.project("p")).labels == {"disc": 1}
    assert client.post("/p/p/uploads", json={"name": "x.png", "size": 1}).status_code == 400
    assert client.get("/p/p/file", params={"file": "../../etc/passwd"}).status_code == 400
    assert (
        client.post("/p/p/labels", json={"action": "move", "files": ["disc/a.png"], "label": "ring"}).status_code == 200
    )
    prepare_data(workspace.project("p"), [])
    dataset = Dataset.open(workspace.project("p").data)
    assert list(dataset.texts("label")) == ["ring"] and [path.name for path in (tmp_path / "mine").iterdir()] == [
        "disc"
    ]
    client.post("/p/p/delete")
    assert (tmp_path / "mine" / "disc" / "a.png").exists() and not workspace.projects()


def noise(seed: int) -> bytes:
    """A PNG of 64 x 64 pixels that is large enough for its decoding to be kept in mind."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def prepared(workspace: Workspace) -> tuple[Project, list[str]]:
    """A project "p" whose files are prepared as a training does it, and the command for it."""
    project = workspace.project("p")
    command = jobs.Job(project.folder, "1").commands()[0] + ["--workers", "0"]
    prepare_data(project, command)
    return project, command


def test_after_an_edit_only_what_changed_is_decoded(client: TestClient, workspace: Workspace) -> None:
    """What is known of decoded media is marked, so that the statistics tell what was decoded again."""
    client.post("/projects", data={"name": "p"})
    upload(client, "p", "a.zip", zip_of({f"{k}/{n}.png": noise(10 * k + n) for k in range(2) for n in range(6)}))
    project, command = prepared(workspace)
    before = Dataset.open(project.data)
    labels = dict(zip(before.ids, before.texts("label"), strict=True))
    known = pa.ipc.open_file((project.data / "media.arrow").read_bytes()).read_all()
    marked = known.set_column(2, "first", pa.array([7000.0] * len(known)))
    with pa.ipc.new_file(str(project.data / "media.arrow"), known.schema) as writer:
        writer.write_table(marked)
    client.post("/p/p/labels", json={"action": "move", "files": ["0/0.png"], "label": "1"})
    upload(client, "p", "2/new.png", noise(99))
    prepare_data(project, command)
    after = Dataset.open(project.data)
    edited = dict(zip(after.ids, after.texts("label"), strict=True))
    assert edited == {**labels, "0/0.png": "1", "2/new.png": "2"}
    width = after.manifest.statistics["image"]
    assert (width.max, width.min) == (7000, 64)  # the new file alone was decoded
    # What an older run's page shows is asked for by id.
    assert client.get("/p/p/record", params={"id": "1/3.png", "column": "image"}).content == noise(13)
    client.post("/p/p/labels", json={"action": "undo"})
    (project.uploads / "2" / "new.png").unlink()
    prepare_data(project, command)
    assert not (project.uploads / "metadata.jsonl").exists()
    again = Dataset.open(project.data)
    assert dict(zip(again.ids, again.texts("label"), strict=True)) == labels
    gone = client.get("/p/p/record", params={"id": "2/new.png", "column": "image"})
    assert gone.status_code == 400 and "changed since" in gone.json()["error"]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_users_own_table_is_kept_and_its_labels_are_edited(
    client: TestClient, workspace: Workspace, ending: str
) -> None:
    rows = [{"file_name": f"all/{n}.png", "label": "ab"[n % 2], "text": f"caption {n}"} for n in range(8)]
    table = "".join(json.dumps(row) + "\n" for row in rows)
    if ending == "csv":
        table = "file_name,label,text\n" + "".join(",".join(row.values()) + "\n" for row in rows)
    client.post("/projects", data={"name": "p"})
    upload(client, "p", "a.zip", zip_of({f"all/{n}.png": png(n % 4, n) for n in range(8)}))
    upload(client, "p", f"metadata.{ending}", table.encode())
    project = workspace.project("p")
    assert list_project(project).labels == {"a": 4, "b": 4}
    client.post("/p/p/labels", json={"action": "move", "files": ["all/0.png"], "label": "b"})
    client.post("/p/p/labels", json={"action": "delete", "files": ["all/7.png"]})
    project, command = prepared(workspace)
    dataset = Dataset.open(project.data)
    assert sorted(dataset.texts("text")) == sorted(f"caption {n}" for n in range(7))
    assert sorted(dataset.texts("label")) == ["a"] * 3 + ["b"] * 4
    for _ in range(2):
        client.post("/p/p/labels", json={"action": "undo"})
    prepare_data(project, command)
    assert (project.uploads / f"metadata.{ending}").read_text() == table
    assert len(Dataset.open(project.data)) == 8 and list_project(project).labels == {"a": 4, "b": 4}


def test_all_texts_are_in_all_languages() -> None:
    catalogues = [texts(language) for language in LANGUAGES]
    assert all(set(one) == set(catalogues[0]) for one in catalogues)
    for name, text in catalogues[0].items():
        holes = [sorted(re.findall(r"\{\w+\}", one[name])) for one in catalogues]
        assert all(one == holes[0] for one in holes), (name, text)


def test_every_text_is_shown_somewhere() -> None:
    """A key of the catalogue that no page uses is left from something that is gone, and one that is used is there."""
    sources = [path.read_text(encoding="utf-8") for kind in ("templates/*.html", "static/*.js", "*.py")
               for path in FOLDER.glob(kind) if not path.name.startswith("htmx")]  # fmt: skip
    used = set(re.findall(r"\bt\.(\w+)|TEXTS\.(\w+)", "\n".join(sources)))
    named = {one for pair in used for one in pair if one} - {"get"}
    prefixes = set(re.findall(r'\bt(?:\[|\.get\()"(\w+_)" ~', "\n".join(sources)))
    named |= set(re.findall(r'texts\["(\w+)"\]', "\n".join(sources)))
    prefixes |= set(re.findall(r'texts\[f"(\w+_)\{', "\n".join(sources)))
    known = texts("en").keys()
    tabs = {"data", "train", "result", "use", "hand_over", "draw", "speak"}
    assert named <= known, named - known
    assert not known & set(dir(dict))  # `t.copy` would be a dictionary's method
    left = {key for key in known - named - tabs if not any(key.startswith(prefix) for prefix in prefixes)}
    assert not left, left


# --- jobs -------------------------------------------------------------------------------------------------------


def finished(project: Project, run: str, seconds: float = 240) -> jobs.Job:
    """The job of a run once its process has ended."""
    job = jobs.read_job(project, run)
    assert job is not None
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(job.process).wait(seconds)
    job = jobs.read_job(project, run)
    assert job is not None
    return job


@pytest.mark.slow
def test_a_job_is_a_process_of_its_own_and_goes_on_after_a_kill(client: TestClient, workspace: Workspace) -> None:
    client.post("/projects", data={"name": "p"})
    files = {f"{'disc' if k < 2 else 'bar'}/{k}{n}.png": png(k, n) for k in range(4) for n in range(20)}
    upload(client, "p", "a.zip", zip_of(files))
    project = workspace.project("p")
    job = jobs.start(workspace, jobs.Job(project.folder, "1", ("--minutes", "0.1")))
    with pytest.raises(PlaitError, match="being trained"):
        jobs.start(workspace, jobs.Job(project.folder, "2", ("--steps", "2")))
    assert client.get("/p/p/runs/1").status_code == 200
    for one in [*psutil.Process(job.process).children(recursive=True), psutil.Process(job.process)]:
        one.kill()
    killed = finished(project, "1")
    assert killed.current == "stopped"
    assert client.post("/p/p/runs/1/continue").status_code == 200
    done = finished(project, "1")
    assert done.current == "done", done.error + jobs.last_lines(done, 30)
    page = client.get("/p/p/result/1").text
    assert 'id="answers"' in page and 'class="big"' in page  # the verdict, and what was answered
    answer = client.post("/p/p/runs/1/ask", content=png(0, 99), headers={"content-type": "application/octet-stream"})
    assert answer.status_code == 200 and "disc" in answer.text
    refused = client.post("/p/p/runs/1/ask", content=b"nothing", headers={"content-type": "application/octet-stream"})
    assert refused.status_code == 400 and "no image" in refused.json()["error"]
    assert client.post("/p/p/runs/1/more", data={"minutes": "0.1"}).status_code == 200
    longer = finished(project, "1")
    assert longer.current == "done" and longer.options == ("--minutes", "0.2"), longer.error
    assert len(json.loads((longer.run_folder / "run.json").read_text())["parts"]) == 1
    upload(client, "p", "b.zip", zip_of({"bar/new.png": png(2, 50)}))
    assert "train anew" in client.post("/p/p/runs/1/more", data={"minutes": "0.1"}).json()["error"]


def test_a_job_that_fails_says_why(client: TestClient, workspace: Workspace) -> None:
    client.post("/projects", data={"name": "p"})
    upload(client, "p", "broken.png", b"\x89PNG\r\n\x1a\n" + b"nothing")
    project = workspace.project("p")
    jobs.start(workspace, jobs.Job(project.folder, "1", ("--steps", "2")))
    failed = finished(project, "1", 60)
    assert failed.current == "failed" and "no record can be used" in failed.error, failed.error
    assert "no record can be used" in client.get("/p/p/runs/1").text
    assert json.loads((failed.folder / "job.json").read_text())["stage"] == "failed"


def test_every_template_compiles_and_finished_runs_are_shown(client: TestClient, workspace: Workspace) -> None:
    """Pages of a run whose files were written by hand, as a training leaves them."""
    for path in (FOLDER / "templates").glob("*.html"):
        _environment().get_template(path.name)
    client.post("/projects", data={"name": "p"})
    upload(client, "p", "a.zip", zip_of({f"{k}/{n}.png": png(k, n) for k in range(2) for n in range(3)}))
    project = workspace.project("p")
    run, job = project.folder / "runs" / "1", project.folder / "jobs" / "1"
    for folder in (run / "samples", job, project.data):
        folder.mkdir(parents=True)
    (run / "metrics.json").write_text("{}")
    row = {"id": "0/0.png", "column": "image", "kind": "image", "source": "0/0.png", "truth": "0", "simple": "1"}
    rows = [{**row, "answers": [["0", 0.9]]}, {**row, "id": "0/1.png", "answers": [["1", 0.6]], "none": True}]
    (job / "predictions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = client.get("/p/p/result/1").text
    assert "50.0 %" in page and 'data-filter="0→1"' in page and page.count('<figure class="tile static') == 2
    (run / "samples" / "a.png").write_bytes(png(0))
    asked = {"kind": "text", "asked": "", "asked_file": "a.png", "answer": "0", "file": "", "wanted": "0"}
    sample = {"stage": "encoder", "name": "image", "total": 9, "share": 0.5, "samples": [{**asked, "probability": 0.7}]}
    lines = "".join(json.dumps({**sample, "step": step}) + "\n" for step in range(6))
    (run / "samples" / "samples.jsonl").write_text(lines + '{"stage": "enc')  # a line that is being written
    page = client.get("/p/p/runs/1").text
    assert page.count('class="hit"') == 4 and "samples/a.png" in page
    assert client.get("/p/p/runs/1/samples/a.png").content[:4] == b"\x89PNG"
    assert client.get("/p/p/runs/1/samples/samples.jsonl").status_code == 400
    pair = {"kind": "image", "distance": 0.05, "first": {"id": "0/0.png", "split": "train", "source": "0/0.png"},
            "second": {"id": "0/1.png", "split": "test", "source": "0/1.png"}}  # fmt: skip
    (project.data / "duplicates.jsonl").write_text(json.dumps(pair) + "\n")
    doubt = {"source": "0/0.png", "id": "0/0.png", "label": "0", "suggested": "1", "probability": 0.8}
    (job / "review.json").write_text(json.dumps({"suspects": [doubt], "candidates": []}))
    assert 'data-label="1"' in client.get("/p/p/data").text and 'class="pair spoils"' in client.get("/p/p/pairs").text
    client.post("/p/p/labels", json={"action": "move", "files": ["0/0.png"], "label": "1"})
    assert 'id="review"' not in client.get("/p/p/data").text  # what was mended is not asked again
    assert client.get("/p/p/hand-over").status_code == 200
