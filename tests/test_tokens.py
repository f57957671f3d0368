"""The token store against encoding one text after another, and the sampler's items against counting them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from plait.data.dataset import Dataset
from plait.data.prepare import prepare
from plait.data.samples import Samples, SampleWriter
from plait.data.tokens import Ids, Tokens, open_tokens, write_tokens
from plait.modalities.base import Vocabulary
from plait.modalities.text import Text
from plait.model.chat_template import TURNS
from plait.training.batches import Sampler
from plait.training.conversations import EncodedTurn
from plait.training.split import Split, load_split


def dataset_of(folder: Path, count: int) -> Dataset:
    rows = [{"id": f"r{n}", "a": f"text number {n} " * (1 + n % 5), **({"b": f"über {n}"} if n % 3 else {})}
            for n in range(count)]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "t.jsonl", folder / "data", workers=0, near_duplicates=False)
    return Dataset.open(folder / "data")


def test_a_split_is_tokenised_once_and_again_for_another_tokenizer(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, 60)
    first, second = (Text.train(words * 20, 300) for words in (["text number"], ["über mber"]))
    made: list[int] = []
    for text in (first, first, second):
        split = load_split(dataset, "train", text, {}, tmp_path / "cache", 64)
        for record, row in enumerate(dataset.iterate(dataset.indices("train"))):
            assert split.ids[record] == row.id
            for column in ("a", "b"):
                value = row.parts.get(column)
                wanted = text.encode(str(value)) if value is not None else None
                assert split.texts[column][record] == wanted
                assert split.has(column, record) == (wanted is not None)
                assert split.texts[column].lengths[record] == len(wanted or [])
        made.append((tmp_path / "cache/train-a-tokens.raw").stat().st_mtime_ns)
    assert made[0] == made[1] < made[2]
    assert list(split.ids) == [row.id for row in dataset.iterate(dataset.indices("train"))]


def test_conversations_are_tokenised_once_and_again_for_another_context(tmp_path: Path) -> None:
    rows = [
        [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"say {n} " * (1 + n % 40)}]
        for n in range(40)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    prepare(tmp_path / "t.jsonl", tmp_path / "data", workers=0, near_duplicates=False)
    dataset = Dataset.open(tmp_path / "data")
    (column,) = dataset.manifest.chats
    text = Text.train(["ask say"] * 20, 300)
    words = Vocabulary(text=text.size, columns={column: "text"}, levels={}, closers=[], turns=list(TURNS))
    made: list[int] = []
    for context in (128, 128, 64):
        split = load_split(dataset, "train", text, {}, tmp_path / "cache", context, vocabulary=words)
        shortened = 0
        for record, row in enumerate(dataset.iterate(dataset.indices("train"))):
            said = [part["content"] for part in json.loads(str(row.parts[column]))]
            ids = [text.encode(one) for one in said]
            kept = [one[: context // 2 - 8] for one in ids]
            fits = sum(2 + len(one) for one in kept) <= context
            wanted = list(zip(("user", "assistant"), ([one] for one in kept), (False, True), strict=True))
            turns = split.chats[column][record]
            assert turns == ([EncodedTurn(*one) for one in wanted] if fits else None)
            assert split.has(column, record) == fits == bool(split.present(column)[record])
            shortened += kept != ids
        assert f"{shortened} of {len(split)} conversations do not fit" in " ".join(split.notes)
        made.append((tmp_path / f"cache/train-{column}-turns.raw").stat().st_mtime_ns)
    assert made[0] == made[1] < made[2]


def test_tokenising_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    texts = [pa.array([f"text {n} of {block}" if n % 5 else None for n in range(9)]) for block in range(12)]
    done: list[str] = []

    def encode(values: list[str], most: int = 10**9) -> list[list[int]]:
        if len(done) > most:
            raise KeyboardInterrupt
        done.extend(values)
        return [list(value.encode()) for value in values]

    def run(key: str, most: int = 10**9) -> Tokens:
        done.clear()
        return write_tokens(tmp_path / "x", texts, lambda values: encode(values, most), 256, key, part=200)

    wanted = [None if value is None else list(value.encode()) for array in texts for value in array.to_pylist()]
    for first, second in (("a", "a"), ("b", "c")):
        with pytest.raises(KeyboardInterrupt):
            run(first, most=60)
        with (tmp_path / "x.raw").open("ab") as file:  # what was written after the last part, and not whole
            file.write(b"cut")
        tokens = run(second)
        assert [tokens[n] for n in range(len(tokens))] == wanted
        assert (len(done) < 50) == (first == second)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.offsets.npy", "x.raw", "x.rows.npy"]
    assert len(done) == sum(value is not None for value in wanted)


def test_tokens_grow_and_come_back(tmp_path: Path) -> None:
    texts = [pa.array(["b", None]), pa.array([], pa.string()), pa.array(["cc", ""])]
    tokens = write_tokens(tmp_path / "x", texts, lambda values: [list(value.encode()) for value in values], 70_000)
    assert tokens.samples.flat.dtype == np.uint32
    again = open_tokens(tmp_path / "x")
    again.extend([None, [7, 8]])
    assert [again[n] for n in range(len(again))] == [[98], None, [99, 99], [], None, [7, 8]]
    assert again.lengths.tolist() == [1, 0, 2, 0, 0, 2] and again.present.tolist() == [1, 0, 1, 1, 0, 1]
    ids = Ids([pa.array(["a"]), pa.array(["b", "c"])])
    ids.extend(["d"])
    assert [ids[n] for n in range(len(ids))] == list(ids) == ["a", "b", "c", "d"]


def test_the_sampler_takes_a_few_bytes_a_record() -> None:
    count = 200_000
    lengths = np.where(np.arange(count) % 4 == 0, 130, 9)
    flat = np.zeros(int(lengths.sum()), np.uint16)
    tokens = Tokens(Samples(flat, np.concatenate(([0], np.cumsum(lengths)))), np.arange(count))
    ids = Ids([pa.array([str(n) for n in range(count)], pa.string())])
    words = Vocabulary(text=300, columns={"t": "text"}, levels={}, closers=[])
    tracemalloc.start()
    sampler = Sampler(Split(ids, {"t": tokens}, {}, {}), words, {}, 16, 64, 0, 0.0, False)
    sampler.members(5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    wanted = [(n, window) for n in range(count) for window in range(max(int(lengths[n]) // 64, 1))]
    assert sampler.items[np.arange(len(wanted))].tolist() == [list(item) for item in wanted]
    assert peak < 60 * len(wanted)


def test_what_another_key_kept_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    """Settings A, stopped; B, stopped before it keeps anything; A again begins anew."""
    for key, value in (("A", 1), ("B", 2)):
        with SampleWriter(tmp_path / "ids", (), np.dtype(np.uint16), key) as writer:
            for _ in range(4):
                writer.add(np.full(5, value, np.uint16))
            if key == "A":
                writer.keep()
    with SampleWriter(tmp_path / "ids", (), np.dtype(np.uint16), "A") as writer:
        assert len(writer) == 0
