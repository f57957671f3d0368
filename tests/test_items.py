"""Histories of items: read from what people have, learnt, ranked and recommended; and what is said of bad input."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.device import choose_device
from plait.core.errors import PlaitError
from plait.data.dataset import Dataset
from plait.data.tokens import Ids
from plait.modalities.base import Vocabulary
from plait.modalities.item import ItemCodesSettings, fit_codes, sizes_of
from plait.model import cross_entropy
from plait.model.layers import dropout
from plait.model.multimodal import IGNORE, ModelConfig, Multimodal
from plait.model.objectives import SampledSoftmax
from plait.model.transformer import TransformerConfig
from plait.recommend.baselines import DECAY, WINDOW, Follows, Interactions
from plait.recommend.catalogue import Catalogue, Item
from plait.recommend.commands import show_recommendations
from plait.recommend.mixture import Followed, fit_followed
from plait.recommend.model import Recommendation
from plait.recommend.next_item import NextItem
from plait.recommend.ranking import Ranks, Targets, rank, targets_of
from plait.recommend.sampler import HistorySampler, HistorySplit
from plait.recommend.trie import NextCodes, Trie
from plait.recommend.write_histories import HIDDEN, TEST, TRAIN, VAL, read_catalogue, read_histories
from server import Server

Command = Callable[..., int]
KINDS = ["Comedy", "War", "Western"]
RECIPE = """
data:
  items: {cold: 0.1}
model:
  backbone: {width: 32, layers: 1, heads: 2, context: 24, dropout: 0.1}
training: {steps: 150, batch_size: 32, learning_rate: 1.0e-2, save_every: 75}
"""


def write_shop(folder: Path, users: int = 240, items: int = 60) -> Path:
    """Ratings with times, and films; somebody who likes a genre goes through its films in order, from anywhere."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = ["userId,movieId,rating,timestamp"]
    for user in range(users):
        kind, start = int(rng.integers(3)), int(rng.integers(items // 3))
        for step in range(int(rng.integers(6, 12))):
            film = kind + 3 * ((start + step) % (items // 3))
            rows.append(f"{user},{film},{rng.integers(1, 6)},{1000 + 10 * step + user}")
    order = rng.permutation(len(rows) - 1) + 1
    (folder / "ratings.csv").write_text("\n".join([rows[0], *(rows[i] for i in order)]) + "\n")
    films = [f'{i},"Film {i // 3}, {KINDS[i % 3]} ({1950 + i})",{KINDS[i % 3]}|Drama' for i in range(items)]
    films.append(films[7])
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "\n".join(films) + "\n")
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, plait: Command) -> Path:
    """A run on the ratings, through the real commands, evaluated."""
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder / "files")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert plait("prepare", folder / "files", "-o", folder / "data", "--recipe", folder / "recipe.yaml") == 0
    assert plait("train", folder / "data", "-o", folder / "run", "--recipe", folder / "recipe.yaml") == 0
    assert plait("evaluate", folder / "run") == 0
    return folder


def test_from_files_to_figures(shop: Path) -> None:
    dataset = Dataset.open(shop / "data", verify=True)
    catalogue, histories = read_catalogue(dataset), read_histories(dataset)
    assert len(catalogue) == 60 and 45 < catalogue.known < 60
    trained = set(histories.items[histories.parts == TRAIN].tolist())
    assert trained == set(range(catalogue.known))  # known ones first; cold ones in no training history
    assert ((histories.parts == HIDDEN) <= (histories.items >= catalogue.known)).all()
    for user in range(len(histories)):
        mine = slice(histories.starts[user], histories.starts[user + 1])
        assert (np.diff(histories.times[mine]) >= 0).all()
        assert histories.parts[mine][-2:].tolist() == [VAL, TEST]
    assert "stands there twice" in (shop / "data" / "rejects.jsonl").read_text()
    assert any("are not weighed" in warning for warning in Dataset.open(shop / "data").manifest.warnings)
    assert "Dataset: files" in (shop / "data" / "report.html").read_text()
    found = json.loads((shop / "run" / "metrics.json").read_text())
    figure = found["recommendation/item-item/hr_at_10"]
    assert figure["value"] > max(0.75, 3 * figure["chance"]) and figure["n"] == 240 and figure["stderr"] < 0.05
    assert found["recommendation/item-item/hr_at_10_unmasked"]["value"] <= figure["value"]
    cold = found["recommendation/item-item/cold_hr_at_10"]
    assert cold["n"] >= 20 and cold["value"] > 1.5 * cold["chance"]
    nearest, lead = (found[f"recommendation/item-item/cold_hr_at_10_{name}"]["value"] for name in ("nearest", "lead"))
    assert lead == pytest.approx(cold["value"] - nearest)
    assert "Recommended" in (shop / "run" / "report.html").read_text()


def test_recommend(shop: Path, plait: Command, capsys: pytest.CaptureFixture[str]) -> None:
    import plait as package

    model = package.load(shop / "run")
    # Titles have commas of their own; ids and other spellings serve as well.
    names = ["Film 3, Comedy (1959)", "film 4, comedy (1962)", "15"]
    history = model.history(",".join(names))
    assert history.tolist() == model.history(names).tolist() == [model.catalogue.find(i) for i in ("9", "12", "15")]
    found = model.recommend(history=names, k=5, why=True)
    following = [str(18 + 3 * i) for i in range(5)]
    assert any(one.id in following[:2] for one in found[:2])
    assert "Comedy" in found[0].categories and not {one.id for one in found} & {"9", "12", "15"}
    assert found[0].why and all(lost > 0 for _, lost in found[0].why)
    assert {one.id for one in model.recommend(history=names, k=60, exclude_seen=False)} >= {"9", "12", "15"}
    some = model.recommend(history=names, k=60, where="categories like '%War%' and year < 2000")
    assert some and all("War" in one.categories for one in some)
    plain = model.recommend(history=names, k=8)
    mixed = model.recommend(history=names, k=8, diversity=0.9)
    assert len({tuple(o.categories) for o in mixed}) >= len({tuple(o.categories) for o in plain})
    alike = model.similar("Film 3, Comedy (1959)", k=4)
    assert len(alike) == 4 and alike[0].probability >= alike[-1].probability and "9" not in {one.id for one in alike}
    assert plait("recommend", shop / "run", "--user", 17, "-k", 3, "--json") == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)) == 3 and "How good: of 240 users" in said.err


def test_what_followed_what_answers_with_the_network(shop: Path, tmp_path: Path) -> None:
    """Each chance against both, counted apart; and the file holds all of it."""
    import plait as package

    model = package.load(shop / "run")
    followed, alone = model.checkpoint.fitted["recommend"], NextItem(model.checkpoint.model, model.device)
    assert followed.records > 200 and f"{followed.records} held-out items" in followed.describe()
    followed.share = 0.3
    history = np.array([3, 9, 4])
    network = np.exp(alone.log_chances([history])[0].astype(float))
    table = followed.follows.scores(history)
    expected = 0.7 * network + 0.3 * table / table.sum()
    np.testing.assert_allclose(np.exp(model.next.log_chances([history])[0]), expected, rtol=1e-4, atol=1e-7)
    followed.write(tmp_path / "again")
    again = Followed.read(tmp_path / "again")
    assert (again.describe(), again.share) == (followed.describe(), 0.3)
    np.testing.assert_allclose(again.follows.scores(history), table, rtol=1e-6)
    (tmp_path / "cut").write_bytes((tmp_path / "again").read_bytes()[:-8])
    with pytest.raises(PlaitError, match="damaged"):
        Followed.read(tmp_path / "cut")


@pytest.mark.parametrize(("right", "share"), [(0.0, 0.9), (0.5, None), (1.0, 0.0)])
def test_the_share_of_what_followed_what_is_chosen_by_val(right: float, share: float | None) -> None:
    """A network that is right for some of the users, and otherwise says nothing or something wrong."""
    rng = np.random.default_rng(0)
    items, users = 40, 200
    histories = [np.arange(start, start + 5) % items for start in rng.integers(0, items, users)]
    train = Interactions(np.concatenate(histories), np.arange(users + 1) * 5, items)
    follows = np.array([(history[-1] + 1) % items for history in histories])
    by_network = np.arange(users) < right * users  # of whom what comes next is what the network says, no follower
    wanted = np.where(by_network, (follows + 20) % items, follows)
    said = {tuple(history): (history[-1] + 21) % items for history in histories}

    def network(asked: list[np.ndarray]) -> np.ndarray:
        chances = np.full((len(asked), items), 1e-3)
        for row, history in zip(chances, asked, strict=True):
            row[said[tuple(history)]] = 1.0
        return np.log(chances / chances.sum(1, keepdims=True))

    found = fit_followed(network, train, Targets(np.arange(users), wanted, histories), 0)
    assert found.records == users and found.measured["both"] >= max(found.measured.values()) - 1e-9
    assert found.share == share if share is not None else 0 < found.share < 1
    few = fit_followed(network, train, Targets(np.arange(9), wanted[:9], histories[:9]), 0)
    assert few.share == 0.5 and "too few" in few.describe()


def test_ids_are_shown_once_where_no_titles_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    for title, heads in (("7", "id probability"), ("Heat (1995)", "id title probability")):
        show_recommendations([Recommendation("7", title, 0.5)], "probability", as_json=False)
        assert " ".join(capsys.readouterr().out.split()).startswith(heads)


def test_new_items_join_by_what_they_are(shop: Path, plait: Command, capsys: pytest.CaptureFixture[str]) -> None:
    table = shop / "new.csv"
    table.write_text(
        "id,title,genres\nn1,Film 6 Western (1968),Western|Drama\nn2,Film 6 War (1969),War|Drama\n9,Old,War\n"
    )
    arguments = ["recommend", shop / "run", "--add-items", table, "-k", 1, "--where", "id in ('n1', 'n2')", "--json"]
    assert plait(*arguments, "--history", "Film 4, Western (1964),Film 5, Western (1967)") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["id"] == "n1"
    assert "2 items joined" in err and "'9' is known already" in err
    assert plait("recommend", shop / "run", "--add-items", table, "--history", "n1,n2", "-k", 2) == 0
    assert "All items of this history are new" in capsys.readouterr().err

    # Kept, they are there for every verb; what is evaluated is still the run's data, among all items.
    grown, more = shop / "grown", shop / "more.csv"
    assert plait("recommend", shop / "run", "--add-items", table, "--save", grown) == 0
    capsys.readouterr()
    asked = ["--history", "Film 4, Western (1964),n1", "-k", 3, "--json"]
    assert plait("recommend", grown, *asked) == 0
    kept = json.loads(capsys.readouterr().out)
    assert plait("recommend", shop / "run", "--add-items", table, *asked) == 0
    assert json.loads(capsys.readouterr().out) == kept
    assert plait("similar", grown, "n1", "-k", 2) == plait("recommend", grown, "--user", 17) == 0
    more.write_text("id,title,genres\nn2,Again,War\nn3,Film 5 War (1970),War\n")
    assert plait("recommend", grown, "--add-items", more, "--save", shop / "again") == 0
    assert "'n2' is known already" in capsys.readouterr().err
    assert plait("recommend", grown, "--add-items", more, "--save", grown) == 1
    assert plait("recommend", grown, "--save", shop / "third", "--history", "n1") == 1
    assert plait("evaluate", shop / "again") == plait("doctor", shop / "again") == 0
    before, after = (json.loads((shop / name / "metrics.json").read_text()) for name in ("run", "again"))
    name = "recommendation/item-item/hr_at_20"
    assert abs(after[name]["value"] - before[name]["value"]) < 0.1 and after[name]["chance"] < before[name]["chance"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--history", "Film 3, Comedi (1959)"], "Did you mean 'Film 3, Comedy (1959)'"),
        (["--history", " , "], "The history is empty"),
        (["--user", "9999"], "There is no user '9999'"),
        ([], "one of the two"),
        (["--history", "9", "--where", "yeer > 3"], "no such column: yeer"),
        (["--history", "9", "--where", "1; drop table items"], "cannot be used"),
        (["--history", "9", "--where", "1=1) UNION SELECT 'abc' WHERE (1=1"], "without SELECT"),
        (["--history", "9", "--where", "year in (select 1960)"], "without SELECT"),
        (["--history", "9", "--where", "length(randomblob(900000000)) > 1"], "function randomblob is not allowed"),
        (["--history", "9", "--where", "hex(zeroblob(9)) = title"], "is not allowed"),
        (["--history", "9", "--where", "year > 3000"], "the condition holds for none"),
    ],
)
def test_bad_questions(
    shop: Path, plait: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert plait("recommend", shop / "run", *arguments) == 1
    assert told in capsys.readouterr().err.replace("\n", " ")


def test_a_model_of_histories_writes_nothing(shop: Path, plait: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert plait("generate", shop / "run", "Hello") == 1
    assert "recommend and similar" in capsys.readouterr().err
    assert plait("export", shop / "run", "-o", shop / "exported") == 1
    assert "which no other program can" in capsys.readouterr().err


def test_over_http(shop: Path) -> None:
    with Server.start(shop / "log", f"films={shop / 'run'}") as server:
        asked = {"model": "films", "history": ["Film 3, Comedy (1959)", "12", "15"], "k": 2, "why": True}
        status, found = server.post("/v1/plait/recommend", asked)
        assert status == 200 and len(found["data"]) == 2 and found["data"][0]["why"]
        status, found = server.post("/v1/plait/similar", {"model": "films", "item": "12", "where": "year > 1990"})
        assert status == 200 and found["data"]
        status, found = server.post("/v1/plait/recommend", {**asked, "history": ["nothing"]})
        assert status == 400 and "There is no item 'nothing'" in found["error"]["message"]
        status, found = server.post("/v1/plait/recommend", {**asked, "where": "(select count(*) from sqlite_master"})
        assert status == 400
        for wrong in ("1=1) UNION SELECT 'abc' WHERE (1=1", "length(randomblob(900000)) > 1", "load_extension('x')"):
            status, found = server.post("/v1/plait/similar", {"model": "films", "item": "12", "where": wrong})
            assert status == 400 and "cannot be used" in found["error"]["message"]
        status, found = server.post("/v1/completions", {"model": "films", "prompt": "Hello"})
        assert status == 400 and "recommend" in found["error"]["message"]
        assert server.stop() == 0


# --- semantic codes ---------------------------------------------------------------------------------------------


def test_semantic_codes_through_the_commands(
    tmp_path: Path, plait: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same commands, with several codes an item: what is learnt, ranked, recommended, added and kept."""
    write_shop(tmp_path / "files", users=160)
    recipe = RECIPE.replace("context: 24", "context: 64").replace("steps: 150", "steps: 90")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("training:", "  item: {codes: semantic}\ntraining:"))
    run = tmp_path / "run"
    assert plait("train", tmp_path / "files", "-o", run, "--recipe", tmp_path / "recipe.yaml") == 0
    assert plait("evaluate", run) == 0
    figure = json.loads((run / "metrics.json").read_text())["recommendation/item-item/hr_at_10"]
    assert figure["value"] > max(0.6, 3 * figure["chance"])
    table = tmp_path / "new.csv"
    table.write_text("id,title,genres\nn1,Film 6 Western (1968),Western|Drama\nn2,Film 6 War (1969),War|Drama\n")
    history = ["--history", "Film 3, Western (1961),Film 4, Western (1964)", "--json"]
    capsys.readouterr()
    assert plait("recommend", run, *history, "-k", 3, "--why", "--add-items", table, "--save", tmp_path / "grown") == 0
    found = json.loads(capsys.readouterr().out)
    assert all("Western" in one["categories"] for one in found) and any(one["why"] for one in found)
    assert plait("recommend", tmp_path / "grown", *history, "-k", 1, "--where", "id in ('n1', 'n2')") == 0
    assert json.loads(capsys.readouterr().out)[0]["id"] == "n1"  # a new item has codes by what it is
    assert plait("similar", run, "Film 3, Western (1961)", "-k", 3, "--json") == 0
    alike = json.loads(capsys.readouterr().out)
    assert all("Film 3, " in one["title"] or "Western" in one["categories"] for one in alike)
    (tmp_path / "files" / "movies.csv").unlink()
    assert plait("train", tmp_path / "files", "-o", tmp_path / "none", "--recipe", tmp_path / "recipe.yaml") == 1
    assert "nothing is known" in capsys.readouterr().err.replace("\n", " ")


@settings(deadline=None, max_examples=60)
@given(
    st.sets(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=60),
    st.randoms(use_true_random=False),
)
def test_a_trie_leads_to_all_items_and_to_nothing_else(rows: set[tuple[int, ...]], random: Any) -> None:
    table = np.array(random.sample(sorted(rows), len(rows)))
    allowed = np.array([random.random() < 0.5 for _ in rows])
    trie, alive = Trie(table), [nodes[0] for nodes in Trie(table).alive(allowed[None])]

    def walk(depth: int, node: int, codes: tuple[int, ...], only: bool) -> Iterator[tuple[int, tuple[int, ...]]]:
        if depth == trie.depth:
            yield int(trie.order[node]), codes
            return
        owner, children = trie.children(depth, np.array([node]))
        assert (owner == 0).all()
        for child in children:
            if alive[depth + 1][child] or not only:
                yield from walk(depth + 1, int(child), (*codes, int(trie.codes[depth + 1][child])), only)

    assert dict(walk(0, 0, (), False)) == {item: tuple(row) for item, row in enumerate(table.tolist())}
    assert {item for item, _ in walk(0, 0, (), True)} == set(np.flatnonzero(allowed).tolist())
    path = trie.path(np.arange(len(table)))
    assert all((trie.codes[d + 1][path[d]] == table[:, d]).all() for d in range(3))


def test_chances_over_a_trie_are_those_of_its_paths() -> None:
    """Against a plain pass over each item's codes; and all items together have the chance of one."""
    torch.manual_seed(0)
    content = torch.randn(90, 12).numpy().repeat(2, 0)  # in pairs that only the last code tells apart
    codes = fit_codes(len(content), lambda numbers: content[numbers], 0)
    known = ItemCodesSettings(items=len(content), content=12, reduced=12, sizes=sizes_of(codes))
    vocabulary = Vocabulary(text=256, columns={"item": "item"}, levels=known.code_levels, closers=[])
    backbone = TransformerConfig(width=32, layers=2, heads=2, kv_heads=2, head_width=16, hidden=64, max_length=40)
    model = Multimodal(ModelConfig(backbone=backbone, vocabulary=vocabulary, embed_dim=0, tied=True,
                                   modalities={"item_codes": known.model_dump()})).eval()  # fmt: skip
    codes_of_items = model.modalities["item_codes"]
    with torch.no_grad():
        for name, buffer in codes.items():
            getattr(codes_of_items, name).copy_(buffer)
        for parameter in model.token_embedding.parameters():
            parameter.mul_(30)
    table = codes["table"].long().numpy()
    assert len(np.unique(table, axis=0)) == len(table) and (table[::2, :-1] == table[1::2, :-1]).all()
    following = NextCodes(model, choose_device("cpu", "fp32"))
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, len(content), n) for n in (1, 4, 30)]
    everything = np.arange(len(content))
    chances = following.of(histories, everything)
    np.testing.assert_allclose(np.exp(chances).sum(1), 1, rtol=1e-4)
    first = [vocabulary.id_ranges[token_type][0] for token_type in vocabulary.levels]
    for row, history in zip(chances, histories, strict=True):
        for item in (0, 77):
            read = [vocabulary.opener("item"), *(table[history[-9:]] + first).ravel().tolist()]
            total = 0.0
            for step, code in enumerate(table[item]):
                ids = torch.tensor([read + [int(c) + first[d] for d, c in enumerate(table[item][:step])]])
                hidden = model.backbone(F.embedding(ids, model.reading()))[0, -1]
                there = sorted({int(r[step]) for r in table if (r[:step] == table[item][:step]).all()})
                logits = model.output_embedding.of_type(f"item:{step + 1}")[there] @ hidden
                total += float(logits.detach().log_softmax(0)[there.index(int(code))])
            assert abs(total - row[item]) < 1e-3
        allowed = rng.random(len(content)) < 0.3
        items, found = following.best(history, 7, allowed)
        wanted = np.flatnonzero(allowed)[np.argsort(-row[allowed])][:7]
        assert items.tolist() == wanted.tolist()
        np.testing.assert_allclose(found, row[wanted], atol=1e-4)
    few = following.log_chances(histories)
    for row, some, history in zip(chances, few, histories, strict=True):
        lacks = np.setdiff1d(everything, history)
        wanted = {*np.argsort(-row)[:20], *lacks[np.argsort(-row[lacks])][:20]}
        assert set(np.flatnonzero(np.isfinite(some)).tolist()) == wanted
    codes_of_items.grow(content[:3])
    grown = codes_of_items.table.numpy()
    assert (grown[-3:, :-1] == table[:3, :-1]).all() and len(np.unique(grown, axis=0)) == len(content) + 3


# --- reading ----------------------------------------------------------------------------------------------------

WANTED = {"1": ["10", "30", "20"], "2": ["20", "10", "30"]}
TIMED = [("1", "10", 5, 100), ("2", "20", 3, 50), ("1", "20", 4, 300), ("2", "10", 4, 60), ("1", "30", 1, 200),
         ("2", "30", 2, 70)]  # fmt: skip


def _lines(mark: str, head: str = "") -> str:
    return head + "".join(mark.join(map(str, row)) + "\n" for row in TIMED)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("u.data", _lines("\t")),
        ("ratings.dat", _lines("::")),
        ("ratings.csv", _lines(",", "userId,movieId,rating,timestamp\n")),
        (
            "log.csv",
            "when,customer,asin\n" + "".join(f"2026-01-01T00:0{t // 60}:{t % 60:02},{u},{i}\n" for u, i, _, t in TIMED),
        ),
        (
            "events.jsonl",
            "".join(json.dumps(dict(zip(("user", "item", "stars", "ts"), r, strict=True))) + "\n" for r in TIMED),
        ),
        ("pairs.txt", "".join(f"{u} {i}\n" for u, items in WANTED.items() for i in items)),
        ("lists.txt", "1 10 30 20\n2 20 10 30\n3 10\n"),
    ],
)
def test_tables_of_interactions(tmp_path: Path, plait: Command, name: str, text: str) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / name).write_text(text)
    (tmp_path / "recipe.yaml").write_text("data: {items: {}}")
    assert plait("prepare", tmp_path / "files", "-o", tmp_path / "data", "--recipe", tmp_path / "recipe.yaml") == 0
    dataset = Dataset.open(tmp_path / "data")
    histories, catalogue = read_histories(dataset), read_catalogue(dataset)
    found = {
        user: [catalogue.items[i].id for i in histories.items[histories.starts[n] : histories.starts[n + 1]]]
        for n, user in enumerate(histories.users)
    }
    assert {user: found[user] for user in WANTED} == WANTED
    assert histories.parts[:3].tolist() == [TRAIN, VAL, TEST]


ORDERS = [(f"C{n % 12}", f"thing {n * 7 % 9}", f"2026-03-{n // 4 + 1:02} 10:00") for n in range(60)]


@pytest.mark.parametrize(
    ("heading", "more", "kind"),
    [
        ("customer,product,time", "", "recommend"),
        ("customer,product,time,price", ",9.90", "recommend"),
        ("customer,product,time,remark", ",it came late and the box was open", "records"),
        ("customer,product,time,label", ",fraud", "records"),
        ("customer,product", None, "recommend"),
        ("klant,artikel,datum", "", "recommend"),
        ("用户ID,商品ID,时间", "", "recommend"),
        ("customer,town", None, "records"),
    ],
)
def test_a_table_of_any_name_is_known_by_what_it_holds(
    tmp_path: Path, plait: Command, heading: str, more: str | None, kind: str
) -> None:
    rows = [f"{user},{item}" + ("" if more is None else f",{time}{more}") for user, item, time in ORDERS]
    (tmp_path / "orders.csv").write_text("\n".join([heading, *rows]) + "\n")
    assert plait("prepare", tmp_path / "orders.csv", "-o", tmp_path / "data", "--workers", 0) == 0
    assert Dataset.open(tmp_path / "data").manifest.kind == kind


@pytest.mark.parametrize(
    ("form", "refused"),
    [("%d-%m-%Y", 0), ("%m/%d/%Y %H:%M", 0), ("%Y/%m/%d", 0), ("%d.%m.%Y", 0), ("%d. of %B", 40)],
)
def test_dates_as_people_write_them(tmp_path: Path, plait: Command, form: str, refused: int) -> None:
    """The day of a column is told by a number above 12, or by points between."""
    when = [datetime(2026, 3, 1, tzinfo=UTC) + timedelta(days=n) for n in range(40)]
    rows = [f"C{n % 4},thing {n % 5},{moment.strftime(form)}" for n, moment in enumerate(when)]
    (tmp_path / "orders.csv").write_text("\n".join(["customer,product,date", *rows]) + "\n")
    status = plait("prepare", tmp_path / "orders.csv", "-o", tmp_path / "data", "--workers", 0)
    if refused:
        assert status == 1
        return
    histories = read_histories(Dataset.open(tmp_path / "data"))
    assert histories.times.tolist() == [
        int(datetime(moment.year, moment.month, moment.day, tzinfo=UTC).timestamp())
        for n in range(4)
        for moment in when[n::4]
    ]


def test_a_day_that_may_be_a_month_is_refused(
    tmp_path: Path, plait: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"C{n % 4},thing {n % 5},{n % 9 + 1:02}/03/2026" for n in range(40)]
    (tmp_path / "orders.csv").write_text("\n".join(["customer,product,date", *rows]) + "\n")
    assert plait("prepare", tmp_path / "orders.csv", "-o", tmp_path / "data", "--workers", 0) == 1
    assert "is no time that is clear" in " ".join(capsys.readouterr().err.split())


def test_a_table_of_ids_is_no_table_of_questions(
    tmp_path: Path, plait: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"K{n},A-{n * 7},{n}-x" for n in range(60)]
    (tmp_path / "export.csv").write_text("\n".join(["wer,was,beleg", *rows]) + "\n")
    assert plait("train", tmp_path / "export.csv", "-o", tmp_path / "run", "--steps", 1) == 1
    assert "--task recommend" in " ".join(capsys.readouterr().err.split())
    assert plait("train", tmp_path / "export.csv", "-o", tmp_path / "other", "--task", "recommend", "--steps", 1) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "export.csv: wer, was, beleg" in said and "columns: {user: NAME" in said


@pytest.mark.parametrize(("question", "answer"), [("question", "answer"), ("a", "b")])
def test_sums_and_chinese_questions_are_pairs(tmp_path: Path, plait: Command, question: str, answer: str) -> None:
    """Cells with digits and without white space, by the names of their columns or by their words."""
    sums = question == "question"
    pairs = [(f"{n}+21=", str(n + 21)) if sums else (f"第{n}次会议在哪里", f"在{n}号楼") for n in range(40)]
    (tmp_path / "pairs.csv").write_text("\n".join([f"{question},{answer}", *(f"{q},{a}" for q, a in pairs)]) + "\n")
    assert plait("train", tmp_path / "pairs.csv", "-o", tmp_path / "run", "--steps", 1) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["training"]["task"] == "reply"


def test_lines_of_numbers_are_histories_where_items_come_again(tmp_path: Path, plait: Command) -> None:
    """As SASRec and S3-Rec publish theirs; other numbers stay texts."""
    histories = {user: [user * step % 31 for step in range(1, 6 + user % 3)] for user in range(1, 41)}
    orders = [(user, item) for user, items in histories.items() for item in items]
    pairs = [f"{user} {item}" for user, item in orders]
    lists = [" ".join(map(str, (user, *items))) for user, items in histories.items()]
    files = {
        "Beauty.txt": (pairs, "recommend"),
        "orders": ([f"{user}\t{item}\t3\t{881250000 + item}" for user, item in orders], "recommend"),
        "sequences.txt": (lists, "recommend"),
        "numbers.txt": ([f"{n * 7919} {n * n}" for n in range(200)], "records"),
        "matrix.txt": ([f"{n % 2} {n % 3} {n % 5}" for n in range(200)], "records"),
        "verses.txt": ([f"{n % 3} lines of {n % 5}" for n in range(200)], "records"),
    }
    for name, (lines, kind) in files.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        assert plait("prepare", tmp_path / name, "-o", tmp_path / f"{name}-data", "--workers", 0) == 0
        assert Dataset.open(tmp_path / f"{name}-data").manifest.kind == kind, name
    assert len(read_histories(Dataset.open(tmp_path / "sequences.txt-data")).items) == len(orders)


def test_a_task_that_the_data_cannot_serve_is_refused_before_training(
    tmp_path: Path, plait: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mails.csv").write_text("text,label\n" + "".join(f"mail {n},{n % 2}\n" for n in range(40)))
    for task, said in (("recommend", "no table of interactions"), ("chat", "that takes conversations")):
        assert plait("train", tmp_path / "mails.csv", "-o", tmp_path / task, "--task", task, "--steps", 1) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / task / "checkpoints").exists()


def test_split_by_time(shop: Path, tmp_path: Path, plait: Command) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {items: {split: time, least_weight: 2}}")
    assert plait("prepare", shop / "files", "-o", tmp_path / "data", "--recipe", tmp_path / "recipe.yaml") == 0
    histories = read_histories(Dataset.open(tmp_path / "data"))
    train, val, test = (histories.times[histories.parts == part] for part in (TRAIN, VAL, TEST))
    assert train.max() <= val.min() and val.max() <= test.min() and len(train) > 7 * len(test) > 0
    targets = targets_of(histories, (TEST,))
    assert len(set(targets.users.tolist())) < len(targets)  # several of one user, each after all before it
    for user, item, history in zip(targets.users, targets.items, targets.histories, strict=True):
        mine = histories.items[histories.starts[user] : histories.starts[user + 1]].tolist()
        assert mine[: len(history) + 1] == [*history, item]


def test_movielens_100k_as_published(tmp_path: Path, plait: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as file:
        file.writestr("ml-100k/u.data", _lines("\t"))
        genres = "|".join("1" if i in (1, 5) else "0" for i in range(19))
        rows = "".join(f"{i}|Café {i} (199{i // 10})|01-Jan-1995||http://x|{genres}\n" for i in (10, 20, 30))
        file.writestr("ml-100k/u.item", rows.encode("latin-1"))
    assert plait("prepare", tmp_path / "ml.zip", "-o", tmp_path / "data") == 0  # seen by its names, without a recipe
    item = read_catalogue(Dataset.open(tmp_path / "data")).items[0]
    assert (item.title, item.categories, item.more) == ("Café 10 (1991)", ["Action", "Comedy"], {"year": 1991})
    assert "2 of 2 users had lines out of order" not in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("files", "items", "told"),
    [
        ({"a.csv": "user,item\n1,2\n", "items.csv": "id,title\nx,X\n"}, "{}", "do not match"),
        ({"a.csv": "user,thing\n1,2\n"}, "{interactions: a.csv}", "no column of items"),
        ({"a.csv": "user,item\n1,2\n"}, "{interactions: b.csv}", "has no file 'b.csv'"),
        ({"a.csv": "user,item\n1,2\n"}, "{split: time}", "needs a time"),
        ({"a.csv": "user,item,time\n1,2,noon\n"}, "{}", "is no time"),
        ({"a.txt": "A sentence is no history.\n"}, "{}", "no table of interactions"),
        ({"a.csv": "user,item\n1,2\n", "items.csv": "id,title\n"}, "{items: items.csv}", "items.csv has no rows"),
        ({"a.csv": "user,item\n1,2\n"}, "{columns: {usr: user}}", "'usr' is nothing that a column holds"),
        ({"a.csv": "user,item,weight\n1,2,1\n"}, "{least_weight: 3}", "weighs less than 3"),
    ],
)
def test_tables_that_cannot_be_used(
    tmp_path: Path, plait: Command, capsys: pytest.CaptureFixture[str], files: dict[str, str], items: str, told: str
) -> None:
    (tmp_path / "files").mkdir()
    for name, text in files.items():
        (tmp_path / "files" / name).write_text(text)
    (tmp_path / "recipe.yaml").write_text(f"data: {{items: {items}}}")
    assert plait("prepare", tmp_path / "files", "-o", tmp_path / "data", "--recipe", tmp_path / "recipe.yaml") == 1
    assert told in capsys.readouterr().err.replace("\n", " ")


# --- pieces against oracles -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.integers(3, 16), st.integers(0, 5))
def test_an_epoch_predicts_every_item_once_from_the_one_before(lengths: list[int], context: int, epoch: int) -> None:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    ids = Ids([pa.array(list(map(str, range(len(lengths)))), pa.string())])
    split = HistorySplit(ids, {}, {}, {}, items=np.arange(starts[-1]), starts=starts,
                         first=np.zeros(len(lengths), np.int64))  # fmt: skip
    vocabulary = Vocabulary(text=256, columns={"item": "item"}, levels={}, closers=[])
    sampler = HistorySampler(split, vocabulary, {}, 1000, context, 0, 0.0, False)
    found = []
    items = sampler.items[np.arange(len(sampler.items))]
    for batch in sampler.build(np.full(len(items), epoch), items).batches:
        assert batch.tokens.shape[1] <= context
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            for token, target in zip(tokens, targets, strict=True):
                if target != IGNORE:
                    item = target - vocabulary.size
                    found.append(item)
                    assert token == (vocabulary.opener("item") if item in starts else target - 1)
    assert sorted(found) == list(range(starts[-1]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_without_a_maximum_is_the_loss(smoothing: float) -> None:
    torch.manual_seed(0)
    hidden, rows = torch.randn(300, 16), torch.randn(1500, 16)
    targets = torch.randint(0, 1500, (300,))
    found = cross_entropy._bounded(hidden, rows, targets, smoothing)
    leaves = hidden.double().requires_grad_(), rows.double().requires_grad_()
    loss = F.cross_entropy(leaves[0] @ leaves[1].t(), targets, reduction="none", label_smoothing=smoothing)
    loss.sum().backward()
    for mine, true in zip(found, (loss[:, None], leaves[0].grad, leaves[1].grad), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)


def test_the_sampled_softmax_estimates_the_whole_one() -> None:
    torch.manual_seed(0)
    hidden, rows, counts = torch.randn(4, 8), torch.randn(500, 8) * 0.5, torch.arange(500.0)
    targets = torch.tensor([0, 3, 200, 499])
    true = (hidden @ rows.t()).logsumexp(1) - (hidden * rows[targets]).sum(1)
    with torch.no_grad():
        draws = [
            torch.stack(
                [SampledSoftmax(counts, 400)(h[None], rows, t[None]) for h, t in zip(hidden, targets, strict=True)]
            )
            for _ in range(60)
        ]
    assert torch.stack(draws).mean(0) == pytest.approx(true, abs=0.05)  # small, as is the bias of a logarithm


def test_masks_from_a_pool() -> None:
    torch.manual_seed(0)
    x = torch.ones(300, 70, requires_grad=True)
    y = dropout(x, 0.25, True)
    assert sorted(y.unique().tolist()) == [0.0, pytest.approx(4 / 3)]
    assert float(y.detach().mean()) == pytest.approx(1, abs=0.02)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(300, 70), 0.25, True), y)
    large = torch.ones(3 * 2**21 + 5)
    assert float(dropout(large, 0.5, True).mean()) == pytest.approx(1, abs=0.01)


def test_directed_cooccurrence_against_the_formula() -> None:
    rng = np.random.default_rng(0)
    lengths = [5, 30, 1, 14]
    items, starts = rng.integers(0, 12, sum(lengths)), np.concatenate(([0], np.cumsum(lengths)))
    method = Follows.counted(Interactions(items, starts, 12))
    table = np.zeros((12, 12))
    for a, b in pairwise(starts.tolist()):
        for i in range(a, b):
            for j in range(i + 1, min(i + WINDOW + 1, b)):
                table[items[i], items[j]] += np.exp(-(j - i) / DECAY)
    table /= table.sum(1, keepdims=True).clip(1e-12)
    history = rng.integers(0, 12, 15)
    wanted = sum(np.exp(-gap / DECAY) * table[item] for gap, item in enumerate(history[::-1][:WINDOW], 1))
    np.testing.assert_allclose(method.scores(history), wanted)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_ranks_against_sorting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, (9, 12)).astype(float)  # with many ties
    targets = Targets(np.arange(9), rng.integers(0, 12, 9), [rng.integers(0, 12, rng.integers(1, 5)) for _ in range(9)])
    found: Ranks = rank(targets, lambda histories: scores[[_place(targets, h) for h in histories]].copy(), seed)
    for i in range(9):
        mine, item = scores[i], targets.items[i]
        low, high = (mine > mine[item]).sum(), (mine >= mine[item]).sum() - 1
        assert low <= found.whole[i] <= high
        rest = np.setdiff1d(np.arange(12), np.setdiff1d(targets.histories[i], [item]))
        assert (mine[rest] > mine[item]).sum() <= found.masked[i] <= (mine[rest] >= mine[item]).sum() - 1
        assert not set(found.lists[i]) & set(targets.histories[i].tolist()) - {item} or len(rest) < 10


def _place(targets: Targets, history: np.ndarray) -> int:
    return next(i for i, other in enumerate(targets.histories) if other is history)


def test_a_film_is_found_in_any_case_and_without_its_year_where_that_is_clear() -> None:
    titles = ["Heat (1995)", "Heat (1986)", "Toy Story (1995)", "2001: A Space Odyssey"]
    catalogue = Catalogue([Item(str(number), title=title) for number, title in enumerate(titles)], known=4)
    assert [catalogue.find(name) for name in ("TOY  story", "heat (1986)", "2001: a space odyssey")] == [2, 1, 3]
    assert catalogue.find("heat") is None  # there are two


def test_recent_popularity_counts_the_last_tenth_in_time() -> None:
    items, starts = np.array([0, 0, 0, 1, 2, 2, 1, 0, 0, 2]), np.array([0, 5, 10])
    assert Interactions(items, starts, 3, np.arange(10)).recent_popularity().tolist() == [0, 0, 1]  # type: ignore[union-attr]
    assert Interactions(items, starts, 3).recent_popularity() is None
