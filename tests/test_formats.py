"""WebDataset shards, Arrow and Parquet folders, conversations and object stores -> records."""

from __future__ import annotations

import base64
import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import PlaitError
from plait.data import hub
from plait.data.conversations import ROLES, flatten, turns
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.modalities.audio_files import encode_wav
from plait.modalities.image_files import encode_png


def make_image(n: int) -> bytes:
    return encode_png(np.random.default_rng(n).integers(0, 256, (6, 8, 3), np.uint8))


def make_audio(n: int) -> bytes:
    return encode_wav(np.random.default_rng(n).uniform(-0.5, 0.5, 400), 8000)


def made(source: Path | str, out: Path, **options: Any) -> tuple[Dataset, dict[str, str]]:
    prepare(source, out, workers=0, **options)
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    return Dataset.open(out, verify=True), {row["file"]: row["reason"] for row in rejects}


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as packed:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard, split in enumerate(("train", "train", "test")):
        members = []
        for n in range(6):
            key = f"{shard}{n:03d}"
            members += [(f"{key}.png", make_image(10 * shard + n)), (f"{key}.cls", str(n % 2).encode())]
            members += [(f"{key}.json", json.dumps({"caption": f"a {n}", "width": 8, "none": None}).encode())]
            members += [(f"{key}.mask.png", make_image(500 + 10 * shard + n))] if n % 2 else []  # parts may lack
        members += [(f"{shard}007.npy", b"\x93NUMPY"), (f"{shard}008.png", b"bad")]
        write_shard(tmp_path / f"in/{split}-{shard:05d}.tar{'.gz' if shard else ''}", members)
    dataset, rejects = made(tmp_path / "in", tmp_path / "out", labels={"label": ["cat", "dog"]})
    assert dataset.columns == {"image": "image", "mask": "image", "label": "text", "caption": "text", "width": "text"}
    assert len(dataset) == 18 and len(dataset.indices("test")) == 6
    by_id = {record.id: record for record in dataset.iterate()}
    assert by_id["train-00001.tar.gz/1003"].parts == {
        "image": make_image(13), "mask": make_image(513), "label": "dog", "caption": "a 3", "width": "8"}  # fmt: skip
    assert "mask" not in by_id["train-00000.tar/0002"].parts
    assert set(rejects) == {f"{name}/{n}00{end}" for n, name in enumerate(
        ("train-00000.tar", "train-00001.tar.gz", "test-00002.tar.gz")) for end in ("7.npy", "8.png")}  # fmt: skip
    whole = (tmp_path / "in/train-00000.tar").read_bytes()
    (tmp_path / "in/train-00000.tar").write_bytes(whole[: len(whole) // 2 + 100])
    dataset, rejects = made(tmp_path / "in", tmp_path / "out")
    assert "damaged" in rejects["train-00000.tar"] and 12 < len(dataset) < 18


def test_a_folder_of_save_to_disk_and_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["cat", "dog"]),
        clip={"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        words=datasets.List(datasets.Value("string")),
    )  # fmt: skip
    rows = [
        {"image": {"bytes": make_image(n), "path": None}, "label": n % 2,
         "clip": {"bytes": make_audio(n), "path": None} if n % 3 else None, "words": ["a", str(n)]}
        for n in range(9)
    ]  # fmt: skip
    splits = {"train": rows[:6], "validation": rows[6:8], "test": rows[8:]}
    found = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part, features=features) for name, part in splits.items()}
    )
    found.save_to_disk(str(tmp_path / "in"))
    dataset, rejects = made(tmp_path / "in", tmp_path / "out")
    assert not rejects and dataset.manifest.counts == {"train": 6, "val": 2, "test": 1}
    record = dataset.record(int(dataset.indices("val")[1]))
    assert record.parts == {"image": make_image(7), "clip": make_audio(7), "label": "dog", "words": "a\n7"}
    # The library takes a folder for a name too: the way of a hub name without a network.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pq.write_table(
        pa.table({"text": [f"text {n}" for n in range(5)]}),
        (tmp_path / "files").mkdir() or tmp_path / "files/train.parquet",
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset, _ = made(f"hf:{tmp_path / 'files'}", tmp_path / "hub")
    assert sorted(map(str, dataset.texts("text"))) == [f"text {n}" for n in range(5)]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PlaitError, match=r"hf:nobody/nothing cannot be had.*Offline, take"):
        hub.download("nobody/nothing")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PlaitError, match=r'pip install "plait-ml\[hub\]"'):
        hub.download("nobody/nothing")
    with pytest.raises(PlaitError, match="write hf:nobody/nothing"):
        prepare("nobody/nothing", tmp_path / "x")


def test_many_parquet_files_with_a_split_column(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for part in range(3):
        table = pa.table({"image": [make_image(100 * part + n) for n in range(50)],
                          "split": ["train", "train", "train", "val", "test"] * 10})  # fmt: skip
        pq.write_table(table, tmp_path / f"in/{part:03d}.parquet", row_group_size=20)
    dataset, rejects = made(tmp_path / "in", tmp_path / "out")
    assert not rejects and dataset.manifest.counts == {"train": 90, "val": 30, "test": 30}


def test_conversations_keep_their_turns_and_media(tmp_path: Path) -> None:
    def url(data: bytes, kind: str = "image/png") -> str:
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"

    def ask(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"role": "user", "content": list(parts)}

    speech = {"type": "input_audio", "input_audio": {"data": base64.b64encode(make_audio(1)).decode(), "format": "wav"}}
    (tmp_path / "two.png").write_bytes(make_image(2))
    good = [
        {"role": "system", "content": "Be brief."},
        ask({"type": "text", "text": "And?"}, {"type": "image_url", "image_url": {"url": url(make_image(1))}}, speech,
            {"type": "image_url", "image_url": {"url": "two.png"}}),
        {"role": "assistant", "content": "Two.", "name": "p"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ]  # fmt: skip
    bad = [
        [ask({"type": "image_url", "image_url": {"url": "https://example.org/x.png"}})],
        [ask({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}})],
        [ask({"type": "file", "file": {}})], [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 3}],
        [ask({"type": "image_url", "image_url": {"url": url(b"not an image")}})],
    ]  # fmt: skip
    rows = [
        good,
        *bad,
        *([{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}] for n in range(9)),
    ]
    text = "".join(json.dumps({"messages": row, "topic": "t"}) + "\n" for row in rows)
    (tmp_path / "chat.jsonl").write_text(text)
    prepare(tmp_path / "chat.jsonl", tmp_path / "out", workers=0)
    dataset = Dataset.open(tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [2, 3, 4, 5, 6, 7]
    assert dataset.manifest.chats == ["messages"] and dataset.columns == {
        "messages": "text", "topic": "text", "image": "image", "image_2": "image", "audio": "audio"}  # fmt: skip
    record = next(record for record in dataset.iterate() if record.id == "chat.jsonl:1")
    assert (record.parts["image"], record.parts["image_2"], record.parts["audio"]) == (
        make_image(1),
        make_image(2),
        make_audio(1),
    )
    got = turns(str(record.parts["messages"]))
    assert [turn.role for turn in got] == ["system", "user", "assistant", "assistant"]
    assert got[1].parts == [("text", "And?"), ("image", "image"), ("audio", "audio"), ("image", "image_2")]
    assert got[2].parts == [("text", "Two.")] and got[2].message["name"] == "p" and got[3].parts == []
    assert "user: And?" in (tmp_path / "out/report.html").read_text()


_CONTENT = st.one_of(
    st.text(),
    st.lists(
        st.one_of(
            st.builds(lambda text: {"type": "text", "text": text}, st.text()),
            st.builds(
                lambda data: {
                    "type": "image_url",
                    "image_url": f"data:image/png;base64,{base64.b64encode(data).decode()}",
                },
                st.binary(max_size=9),
            ),
        ),
        max_size=4,
    ),
)


@given(st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": _CONTENT}), min_size=1, max_size=5))
def test_every_conversation_comes_back(messages: list[dict[str, Any]]) -> None:
    text, media = flatten(messages, ["image"], lambda kind, data: data)
    assert "image" not in media
    back = []
    for turn in turns(text):
        parts = [(kind, value if kind == "text" else media[value]) for kind, value in turn.parts]
        back.append((turn.role, parts))

    def plain(content: Any) -> list[tuple[str, Any]]:
        if isinstance(content, str):
            return [("text", content)] if content else []
        return [
            ("text", p["text"]) if p["type"] == "text" else ("image", base64.b64decode(p["image_url"][22:]))
            for p in content
        ]

    assert back == [(m["role"], plain(m["content"])) for m in messages]


def test_object_stores_are_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's file:// store: the same way as s3://, in other processes too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for n in range(8):
        (tmp_path / f"in/{'ab'[n % 2]}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"in/{'ab'[n % 2]}/{n}.png").write_bytes(make_image(n))
    (tmp_path / "in/a/bad.png").write_bytes(b"bad")
    with tarfile.open(tmp_path / "in/more.tar", "w") as packed:
        for n in range(8, 10):
            info = tarfile.TarInfo(f"b/{n}.png")
            info.size = len(make_image(n))
            packed.addfile(info, io.BytesIO(make_image(n)))
    here, there = f"file://{tmp_path}/in", f"file://{tmp_path}/bucket/data"
    for _ in range(2):  # the second time a dataset is replaced
        prepare(here, there, workers=1)
    dataset = Dataset.open(there, verify=True)
    prepare(tmp_path / "in", tmp_path / "local", workers=0)
    local = Dataset.open(tmp_path / "local")
    there_, here_ = ({r.id: (r.parts, r.split) for r in found.iterate()} for found in (dataset, local))
    assert there_ == here_ and len(dataset) == 10 and dataset.manifest.rejected == 1
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "t.parquet")
    assert sum(prepare(f"file://{tmp_path}/t.parquet", tmp_path / "one", workers=0).counts.values()) == 2
    (tmp_path / "bucket/data/manifest.json").unlink()
    for source, message in ((there, "is not a dataset"), ("nosuch://x/y", "nosuch")):
        with pytest.raises(PlaitError, match=message):
            Dataset.open(source)
    with pytest.raises(PlaitError, match="is empty"):
        prepare("memory://nothing-here", tmp_path / "x")


def test_tables_that_are_not_what_their_names_or_first_lines_say(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    rows = "".join(f'"a, b {n}", "x, {n % 2}"\n' for n in range(20))
    (source / "spaced.csv").write_text(f"text, label\n{rows}")
    with zipfile.ZipFile(source / "book.csv", "w") as book:
        book.writestr("xl/workbook.xml", "<workbook/>")
    (source / "page.csv").write_text("<!DOCTYPE html><html>404</html>\n")
    (source / "latin.csv").write_bytes("Größe,label\n1,a\n".encode("cp1252"))
    dataset, rejects = made(source, tmp_path / "out")
    assert dataset.columns == {"text": "text", "label": "text"}
    assert {row.parts["text"]: row.parts["label"] for row in dataset.iterate()} == {
        f"a, b {n}": f"x, {n % 2}" for n in range(20)
    }
    assert rejects == {
        "book.csv": "this is an Excel workbook or a zip archive, whatever its name says: save it as CSV in UTF-8",
        "page.csv": "this is a web page, whatever its name says: save it as CSV in UTF-8",
        "latin.csv": "the heading is not UTF-8 (byte 0xf6): save it as UTF-8",
    }


@pytest.mark.parametrize(
    ("first", "told"),
    [("it was bad,0", "but '0' stands among the values"), ("text,label", None), ("0,1", None)],
)
def test_a_first_line_that_is_a_record_is_told(tmp_path: Path, first: str, told: str | None) -> None:
    (tmp_path / "a.csv").write_text(first + "\n" + "".join(f"film {n},{n % 2}\n" for n in range(20)))
    dataset, _ = made(tmp_path / "a.csv", tmp_path / "out")
    warnings = [line for line in dataset.manifest.warnings if "the first line is read" in line]
    assert len(warnings) == (told is not None) and all(told in line for line in warnings)


def test_columns_that_hold_media_or_turns_in_another_way(tmp_path: Path) -> None:
    urls = [f"data:image/png;base64,{base64.b64encode(make_image(n)).decode()}" for n in range(12)]
    rows = [{"image": url, "label": str(n % 2)} for n, url in enumerate(urls)]
    rows[5]["image"] = "data:image/png;base64,@@"
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset, rejects = made(tmp_path / "a.jsonl", tmp_path / "out")
    assert dataset.columns == {"image": "image", "label": "text"}
    assert {row.parts["image"] for row in dataset.iterate()} == {make_image(n) for n in range(12) if n != 5}
    assert "not valid base64" in rejects["a.jsonl"]
    turns_of = [{"role": ["user", "assistant"], "content": [f"ask {n}", f"say {n}"]} for n in range(12)]
    pq.write_table(pa.table({"messages": turns_of}), tmp_path / "b.parquet")
    dataset, _ = made(tmp_path / "b.parquet", tmp_path / "out2")
    assert dataset.manifest.chats == ["messages"]
    said = {tuple(turn.parts[0][1] for turn in turns(str(row.parts["messages"]))) for row in dataset.iterate()}
    assert said == {(f"ask {n}", f"say {n}") for n in range(12)}


def test_what_may_not_be_meant_is_told(tmp_path: Path) -> None:
    """Addresses of the web, splits and labels of other spellings, and folders of one name: each a warning."""
    rows = [f"https://x.org/{n}.jpg,{['Spam', 'spam ', 'ham'][n % 3]},{['train', 'kept'][n % 2]}\n" for n in range(30)]
    (tmp_path / "a.csv").write_text("photo,label,split\n" + "".join(rows))
    warnings = " ".join(made(tmp_path / "a.csv", tmp_path / "out")[0].manifest.warnings)
    assert "'photo' holds addresses of the web" in warnings and "no split ('kept')" in warnings
    assert "'Spam', 'spam ' differ in case or spaces alone, and are 2 classes" in warnings
    for n in range(12):
        file = tmp_path / "in" / ["train/b/c", "test/b/c", "train/d/c", "train/e"][n % 4] / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(make_image(n))
    warnings = " ".join(made(tmp_path / "in", tmp_path / "out2")[0].manifest.warnings)
    assert "The folders 'b/c', 'd/c' give one class, 'c'" in warnings
