"""What people have: layouts of public corpora, exports of applications, and formats that are not read."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from plait.core.errors import PlaitError
from plait.data.conversations import is_chat, messages_of, turns
from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.data.readers import _listed_texts
from plait.modalities.audio_files import encode_wav


def put_image(place: Path, seed: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(place)


def put_audio(place: Path, seed: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(encode_wav(np.random.default_rng(seed).normal(0, 0.1, 800).astype(np.float32), 8000))


def put(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text)


def prepared(folder: Path) -> tuple[Dataset, dict[str, str]]:
    """The dataset of a folder's `in`, and file -> reason of what was rejected."""
    prepare(folder / "in", folder / "out", workers=0)
    lines = (folder / "out/rejects.jsonl").read_text().splitlines()
    return Dataset.open(folder / "out"), {row["file"]: row["reason"] for row in map(json.loads, lines)}


def test_a_text_beside_media_is_read_no_further_than_it_may_list_them() -> None:
    stems = {f"a/clip_{n}" for n in range(8)}
    lines = [f"clip_{n} Words {n}\n" for n in range(8)]
    heard = {f"a/clip_{n}": f"Words {n}" for n in range(8)}
    assert _listed_texts(io.StringIO("About these\n\nclips\n" + "".join(lines)), "a", stems) == heard
    assert _listed_texts(io.StringIO("".join(lines) + "One\n" * 3), "a", stems) == {}
    long = io.StringIO("Another line\n" * 100)
    assert _listed_texts(long, "a", stems) == {} and len(long.read().splitlines()) == 97


def test_a_table_names_images_without_their_ending_and_folder(tmp_path: Path) -> None:
    for n in range(20):
        put_image(tmp_path / f"in/train_images/{n}.png", n)
        put_image(tmp_path / f"in/test_images/{n}.png", 100 + n)  # the same names, of other images
    rows = "".join(f"{n},{n % 2}\n" for n in range(20))
    put(tmp_path / "in/train.csv", f"image_id,label\n{rows}")
    put(tmp_path / "in/sample_submission.csv", f"image_id,label\n{rows}")
    dataset, rejects = prepared(tmp_path)
    assert dataset.columns == {"image": "image", "label": "text"} and len(dataset) == 20
    for record in dataset.iterate():
        line = int(record.source.partition(":")[2]) - 2
        assert record.parts["image"] == (tmp_path / f"in/train_images/{line}.png").read_bytes()
        assert record.parts["label"] == str(line % 2)
    assert rejects["sample_submission.csv"] == "a form for answers to a competition, not data"
    assert rejects["test_images/3.png"] == "no table names it"


@pytest.mark.parametrize("table", ["train.csv", "train_labels.csv"])
def test_a_missing_image_is_not_taken_from_another_split(tmp_path: Path, table: str) -> None:
    for n in range(20):
        put_image(tmp_path / f"in/test_images/{n}.png", 100 + n)
        if n != 5:
            put_image(tmp_path / f"in/train_images/{n}.png", n)
    put_image(tmp_path / "in/train_images/more/3.png", 200)
    put(tmp_path / "in" / table, "image_id,label\n" + "".join(f"{n},{n % 2}\n" for n in range(20)))
    dataset, rejects = prepared(tmp_path)
    assert {record.source.partition(":")[2] for record in dataset.iterate(columns=["label"])} == {
        str(n + 2) for n in range(20) if n not in (3, 5)
    }
    rows = (tmp_path / "out/rejects.jsonl").read_text()
    assert "the file '5' does not exist" in rows and "the file '3' is there 2 times" in rows
    assert rejects["test_images/5.png"] == "no table names it"


def test_a_missing_image_is_not_taken_from_another_archive(tmp_path: Path) -> None:
    for name, left_out in (("train", 5), ("test", 20)):
        for n in range(20):
            if n != left_out:
                put_image(tmp_path / f"{name}/{n}.png", n + 100 * (name == "test"))
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.make_archive(str(tmp_path / "in" / name), "zip", tmp_path / name)
    put(tmp_path / "in/train.csv", "image,label\n" + "".join(f"{n}.png,{n % 2}\n" for n in range(20)))
    dataset, _ = prepared(tmp_path)
    assert len(dataset) == 19
    for record in dataset.iterate():
        line = int(record.source.partition(":")[2]) - 2
        assert record.parts["image"] == (tmp_path / f"train/{line}.png").read_bytes()
    assert "the file '5.png' does not exist" in (tmp_path / "out/rejects.jsonl").read_text()


def test_tables_of_splits_name_clips_in_a_folder_below(tmp_path: Path) -> None:
    for n in range(12):
        put_audio(tmp_path / f"in/en/clips/clip_{n}.wav", n)
    for split, numbers in {"train": range(6), "dev": range(6, 9), "test": range(9, 12), "validated": range(12)}.items():
        put(
            tmp_path / f"in/en/{split}.tsv",
            "path\tsentence\n" + "".join(f"clip_{n}.wav\tNumber {n}.\n" for n in numbers),
        )
    dataset, rejects = prepared(tmp_path)
    assert dataset.columns == {"audio": "audio", "sentence": "text"}
    assert dataset.manifest.counts == {"train": 6, "val": 3, "test": 3}
    assert "stands beside tables of test, train, val" in rejects["en/validated.tsv"]


def test_lists_of_transcripts_belong_to_the_clips_beside_them(tmp_path: Path) -> None:
    for speaker in ("19", "26"):
        folder = tmp_path / f"in/dev-clean/{speaker}/198"
        for n in range(6):
            put_audio(folder / f"{speaker}-198-{n:04d}.wav", int(speaker) + n)
        put(
            folder / f"{speaker}-198.trans.txt",
            "".join(f"{speaker}-198-{n:04d} WORDS {speaker} {n}\n" for n in range(6)),
        )
    dataset, rejects = prepared(tmp_path)
    assert dataset.columns == {"audio": "audio", "text": "text"} and not rejects
    for record in dataset.iterate(columns=["text"]):
        speaker, _, number = Path(record.source).stem.split("-")
        assert record.parts["text"] == f"WORDS {speaker} {int(number)}"


def test_subtitles_are_the_text_of_the_clip_beside_them(tmp_path: Path) -> None:
    for n in range(12):
        put_audio(tmp_path / f"in/{n}.wav", n)
        cue = f"00:00:00,000 --> 00:00:01,500\n<i>Talk {n}</i>\nbegins.\n\n"
        last = "00:00:02,000 --> 00:00:03,000\n- The end.\n"
        put(tmp_path / f"in/{n}.srt", f"1\n{cue}2\n{last}") if n % 2 else put(
            tmp_path / f"in/{n}.vtt", f"WEBVTT\nKind: captions\n\n{cue}{last}".replace(",", ".")
        )
    dataset, rejects = prepared(tmp_path)
    assert dataset.columns == {"audio": "audio", "text": "text"} and not rejects
    assert {record.source.partition(".")[0]: record.parts["text"] for record in dataset.iterate(columns=["text"])} == {
        str(n): f"Talk {n} begins. - The end." for n in range(12)
    }


def test_an_export_of_chats_is_conversations(tmp_path: Path) -> None:
    def node(parent: str | None, children: list[str], role: str, text: str) -> dict[str, object]:
        content = {"content_type": "text", "parts": [text]}
        return {"parent": parent, "children": children, "message": {"author": {"role": role}, "content": content}}

    chats = []
    for n in range(12):
        nodes = {
            "root": {"parent": None, "children": ["ask"], "message": None},
            "ask": node("root", ["worse", "better"], "user", f"Ask {n}"),
            "worse": node("ask", [], "assistant", "Not this one"),
            "better": node("ask", [], "assistant", f"Answer {n}"),
        }
        if n % 2:  # the user went back to the first answer
            nodes["ask"]["children"] = ["better", "worse"]
        chats.append({"title": f"Chat {n}", "mapping": nodes, "current_node": "better" if n % 2 else None})
    put(tmp_path / "in/conversations.json", json.dumps(chats))
    dataset, _ = prepared(tmp_path)
    assert dataset.manifest.chats == ["mapping"]
    for record in dataset.iterate(columns=["title", "mapping"]):
        number = str(record.parts["title"]).removeprefix("Chat ")
        said = [(turn.role, turn.parts) for turn in turns(str(record.parts["mapping"]))]
        assert said == [("user", [("text", f"Ask {number}")]), ("assistant", [("text", f"Answer {number}")])]


@pytest.mark.parametrize(
    "wrong",
    [{"message": "hello"}, {"message": {"content": "hello"}}, {"message": {"author": "user"}}, {"parent": ["a"]},
     {"children": {"a": 1}}, {"children": [["a"]]}, {"message": {"content": {"parts": "hello"}}}],
)  # fmt: skip
def test_a_tree_that_is_none_of_chatgpts_comes_back_as_it_is(wrong: dict[str, object]) -> None:
    tree = {"a": {"parent": None, "children": [], "message": None} | wrong}
    assert messages_of(tree) is tree and not is_chat(tree)


def test_nested_values_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"text": [f"row {n}" for n in range(20)], "vector": [[0.1 * n, 0.2] for n in range(20)]})
    pq.write_table(table, tmp_path / "in/t.parquet")
    dataset, _ = prepared(tmp_path)
    assert any("'vector' holds lists or objects, read as texts of JSON" in note for note in dataset.manifest.warnings)


def test_annotations_of_things_in_images_are_told_of(tmp_path: Path) -> None:
    for n in range(10):
        put_image(tmp_path / f"in/images/{n}.png", n)
    facts = {"images": [{"id": 0, "file_name": "0.png"}], "annotations": [{"image_id": 0}], "categories": [{"id": 1}]}
    put(tmp_path / "in/instances.json", json.dumps(facts))
    dataset, rejects = prepared(tmp_path)
    assert dataset.columns == {"image": "image"} and "COCO" in rejects["instances.json"]


@pytest.mark.parametrize(
    ("ending", "advice"), [("pdf", "as .txt"), ("xlsx", "as .csv"), ("db", "export the table"), ("eml", "the mails")]
)
def test_what_is_not_read_is_told_with_a_way_out(tmp_path: Path, ending: str, advice: str) -> None:
    put(tmp_path / f"in/a.{ending}", "anything")
    with pytest.raises(PlaitError, match=rf"\.{ending} is no kind of file that is read: .*{advice}"):
        prepare(tmp_path / "in", tmp_path / "out", workers=0)
    put(tmp_path / "in/text.txt", "A text of its own.\n" * 100)
    _, rejects = prepared(tmp_path)
    assert advice in rejects[f"a.{ending}"]
