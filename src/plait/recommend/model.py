"""Recommending: the likeliest next items of a history, items that are alike, and new items by what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from plait.core.errors import PlaitError
from plait.core.files import publish_folder, read_json
from plait.core.rejects import Reason, RejectKind
from plait.data.dataset import Dataset
from plait.data.files import scan
from plait.data.record import Record, Rejected
from plait.data.stores import read_place, written_place
from plait.inference.model import PlaitModel, load
from plait.inference.showcase import ASKED, Shown
from plait.modalities.audio_files import decode_audio
from plait.modalities.descriptor import MediaError
from plait.modalities.image_files import decode_image
from plait.modalities.item import Item, ItemCodes, content_of, item_codes, item_rows
from plait.modalities.media import preview
from plait.model import checkpoint as checkpoints
from plait.recommend.catalogue import Catalogue, Images
from plait.recommend.catalogue import Item as Known
from plait.recommend.checkpoint_part import CATALOGUE_FILE, catalogue_of
from plait.recommend.feature import FEATURE
from plait.recommend.interactions import read_items
from plait.recommend.next_item import NextCodes, NextItem, next_item_scorer
from plait.recommend.settings import ItemsRecipe
from plait.recommend.write_histories import Histories, catalogue_file, read_catalogue, read_histories
from plait.training.checkpointing import folder_name, point

Embed = Callable[[list[Known]], np.ndarray]  # items to (N, E) float32, of unit length
POOL = 200  # of the likeliest items, among which diversity chooses
REASONS = 3  # items of a history that an explanation names


@dataclass
class Recommendation:
    """An item, and the chance that it comes next: among all items, before conditions."""

    id: str
    title: str
    probability: float
    categories: list[str] = field(default_factory=list)
    # Items of the history, and by how much log P of this item, in nats, falls when each is left out.
    why: list[tuple[str, float]] = field(default_factory=list)


class RecommendationModel(PlaitModel):
    """A model of histories at work: what comes next, what is alike. `plait.load` returns it for such a run."""

    joined: int = 0  # items that joined since it was loaded

    @property
    def verbs(self) -> list[str]:
        return ["recommend", "similar"]

    @property
    def catalogue(self) -> Catalogue:
        """The items that the model knows."""
        return catalogue_of(self.checkpoint)

    @property
    def _items(self) -> Item | ItemCodes:
        modalities = self.checkpoint.model.modalities
        items = item_rows(modalities) or item_codes(modalities)
        assert items is not None
        return items

    @cached_property
    def next(self) -> NextItem | NextCodes:
        """What foretells the next item of histories."""
        return next_item_scorer(self.checkpoint.model, self.device, self.checkpoint.fitted.get(FEATURE.name))

    # --- verbs ------------------------------------------------------------------------------------------------

    def recommend(
        self,
        history: str | Iterable[str | int] | None = None,
        *,
        user: str | int | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        where: str | None = None,
        diversity: float = 0.0,
        why: bool = False,
    ) -> list[Recommendation]:
        """The k likeliest next items after a history: titles or ids, oldest first, in a list or with commas; or after
        that of a `user` of the run's data.

        `where` is a condition of SQL on the items table. `diversity` from 0 to 1 gives up likelihood for items unlike
        those before them in the list. With `why`, each names the items of the history that moved it most.
        Raises PlaitError for an unknown item, user or column, and for an empty history.
        """
        if k < 1 or not 0 <= diversity <= 1:
            raise PlaitError("k must be 1 or more, and diversity from 0 to 1.")
        places = self.history(history, user)
        allowed = self._allowed(where)
        if exclude_seen:
            allowed[places] = False
        items, scores = self.next.best(places, max(POOL, 4 * k) if diversity else k, allowed)
        if not len(items):
            raise PlaitError("No item is left to recommend: " + _narrow(where, exclude_seen))
        chosen = self._choose(items, scores, min(k, len(items)), diversity)
        recommendations = [self._shown(int(items[i]), float(np.exp(scores[i]))) for i in chosen]
        if why:
            for one, reasons in zip(recommendations, self._reasons(places, items[chosen], scores[chosen]), strict=True):
                one.why = reasons
        return recommendations

    def showcase(self, records: list[Record]) -> list[Shown]:
        """What it recommends after each of the most popular items; no records are needed."""
        popular = [self.catalogue.name(item) for item in self.look_up("", ASKED)]
        best = [self.recommend([name], k=1)[0] for name in popular]
        return [
            Shown(name, one.title, "text", probability=one.probability) for name, one in zip(popular, best, strict=True)
        ]

    def similar(self, item: str | int, k: int = 10, where: str | None = None) -> list[Recommendation]:
        """The k items whose rows are nearest to an item's; `probability` is the cosine. Raises PlaitError for an
        unknown item."""
        place = self.catalogue.number(str(item))
        rows = torch.nn.functional.normalize(self.next.rows.float(), dim=1)
        near = (rows @ rows[place]).cpu().numpy()
        allowed = self._allowed(where) & ~self.next.unplaced.cpu().numpy()
        allowed[place] = False
        if not allowed.any():
            raise PlaitError("No item is left to compare with: " + _narrow(where, False))
        order = np.argsort(-np.where(allowed, near, -np.inf), kind="stable")[: min(k, int(allowed.sum()))]
        return [self._shown(int(other), float(near[other])) for other in order]

    def look_up(self, text: str, k: int = 10) -> list[int]:
        """The numbers of at most k items whose titles hold a text, or nearly; without one, of those that stand most
        often in training histories."""
        if text.strip():
            return self.catalogue.like(text, k)
        return torch.argsort(self._items.counts, descending=True, stable=True)[:k].tolist()

    def history(self, history: str | Iterable[str | int] | None, user: str | int | None = None) -> np.ndarray:
        """The item numbers of a history that is named, or of a user's. Raises PlaitError where it is empty."""
        if (history is None) == (user is None):
            raise PlaitError("Name a history or a user, one of the two.")
        places = self._of_user(str(user)) if history is None else np.array(self.catalogue.numbers(history), np.int64)
        if not len(places):
            raise PlaitError("The history is empty. Name items by title or id, oldest first, or a user of the data.")
        if self.next.unplaced.cpu().numpy()[places].all():
            raise PlaitError(
                "All items of this history are new, and this model knows nothing but histories. Name one that it was "
                f"trained on, such as '{self.catalogue.name(0)}'."
            )
        return places

    def all_new(self, places: np.ndarray) -> bool:
        """Whether no item of a history stands in a training history: what they are alone then counts."""
        return bool((self._items.counts[torch.from_numpy(places)] == 0).all())

    def _shown(self, item: int, probability: float) -> Recommendation:
        one = self.catalogue.items[item]
        return Recommendation(one.id, self.catalogue.name(item), probability, one.categories)

    def _allowed(self, where: str | None) -> np.ndarray:
        return np.ones(len(self.catalogue), bool) if where is None else self.catalogue.where(where)

    def _choose(self, items: np.ndarray, scores: np.ndarray, k: int, diversity: float) -> np.ndarray:
        """The places of the best k, of items in falling order of their scores; with diversity one after the other, by
        likelihood less nearness to those chosen (maximal marginal relevance: Carbonell and Goldstein, 1998)."""
        if not diversity:
            return np.arange(k)
        rows = torch.nn.functional.normalize(self.next.rows.float()[torch.from_numpy(items)], dim=1).cpu().numpy()
        likely = (scores - scores.min()) / max(np.ptp(scores), 1e-9)
        nearest, chosen = np.zeros(len(items)), list[int]()
        for _ in range(k):
            worth = (1 - diversity) * likely - diversity * nearest
            worth[chosen] = -np.inf
            best = int(worth.argmax())
            chosen.append(best)
            nearest = np.maximum(nearest, rows @ rows[best])
        return np.array(chosen)

    def _reasons(
        self, places: np.ndarray, chosen: np.ndarray, full_scores: np.ndarray
    ) -> list[list[tuple[str, float]]]:
        """For each chosen item, those of the history whose absence costs it most, each left out by itself."""
        read = places[-self.checkpoint.model.config.backbone.max_length :]
        distinct = list(dict.fromkeys(read.tolist()))
        if len(distinct) < 2:
            return [[] for _ in chosen]
        without = self.next.of([read[read != item] for item in distinct], chosen)
        lost = full_scores - without  # (distinct, chosen)
        reasons = []
        for column in lost.T:
            order = np.argsort(-column, kind="stable")[:REASONS]
            reasons.append([(self.catalogue.name(distinct[i]), float(column[i])) for i in order if column[i] > 0])
        return reasons

    @cached_property
    def _images(self) -> Images | None:
        try:
            return Images(catalogue_file(self._dataset)) if self._dataset is not None else None
        except (PlaitError, OSError, pa.ArrowException):
            return None  # images are a courtesy: the model needs no data

    def image(self, item: str) -> bytes | None:
        """A small image, encoded, of an item's id; None where nothing has one, or the run's data are gone."""
        number = self.catalogue.find(item)
        data = self.catalogue.items[number].image if number is not None else None
        if data is None and self._images is not None:
            data = self._images.get(item)
        try:
            return preview("image", data, decode_image(data)) if data is not None else None
        except MediaError:
            return None

    # --- users ------------------------------------------------------------------------------------------------

    @cached_property
    def _dataset(self) -> Dataset | None:
        """The data of the run that the model lies in; None where it lies in none."""
        run = self._run
        facts = read_json(run / "run.json") if run else {}
        return Dataset.open(read_place(facts["dataset"], run)) if run and "dataset" in facts else None

    @cached_property
    def _run(self) -> Path | None:
        """The folder of the run that the model lies in; None where it lies in none."""
        places = self.folder.resolve().parents if self.folder else []
        return next((place for place in places if (place / "run.json").is_file()), None)

    @cached_property
    def _histories(self) -> tuple[Histories, list[int], dict[str, int]]:
        """The run's data, the model's number of each of its items (-1: none), and users by id."""
        dataset = self._dataset
        if dataset is None:
            raise PlaitError("This model is not in a run's folder, so its users are not known. Name a history instead.")
        histories, catalogue = read_histories(dataset), read_catalogue(dataset)
        numbers = [self.catalogue.find(item.id) for item in catalogue.items]
        users = {user: i for i, user in enumerate(histories.users)}
        return histories, [-1 if number is None else number for number in numbers], users

    def _of_user(self, user: str) -> np.ndarray:
        histories, numbers, users = self._histories
        if user not in users:
            examples = ", ".join(histories.users[:3])
            raise PlaitError(f"There is no user '{user}' in the run's data. It has {len(users):,}, such as {examples}.")
        place = users[user]
        numbers_known = np.array(numbers)[histories.items[histories.starts[place] : histories.starts[place + 1]]]
        return numbers_known[numbers_known >= 0].astype(np.int64)

    # --- new items --------------------------------------------------------------------------------------------

    def add_items(self, items: str | Path | list[Known]) -> list[Rejected]:
        """Let new items join, of a table (with the columns of the run's) or as they are: nothing is trained, what they
        are places them. Returns the rows that could not be used; raises PlaitError where none could."""
        refused: list[Rejected] = []
        if isinstance(items, list):
            new_items = items
        else:
            new_items, refused = _read(Path(items))
        known = {item.id for item in self.catalogue.items}
        fresh: list[Known] = []
        for item in new_items:
            if item.id in known:
                refused.append(
                    Rejected(str(items), None, Reason(RejectKind.DUPLICATE, f"the item '{item.id}' is known already"))
                )
                continue
            known.add(item.id)
            fresh.append(item)
        if not fresh:
            if isinstance(items, list):
                return refused
            reasons = "; ".join(dict.fromkeys(row.reason for row in refused[:3]))
            raise PlaitError(f"{items} has no new item. {reasons or 'It is empty'}.")
        settings = self._items.settings
        seen = None
        if settings.encoder is not None:
            seen = embedder(settings.encoder, self.device.name)(fresh)
        self._items.grow(content_of(fresh, settings, seen))
        self.joined += len(fresh)
        network, catalogue = self.checkpoint.model, self.catalogue
        modalities = {**network.config.modalities, self._items.name: self._items.settings.model_dump()}
        network.config = network.config.model_copy(update={"modalities": modalities})
        self.checkpoint.parts[FEATURE.name] = Catalogue([*catalogue.items, *fresh], catalogue.known)
        for name in ("next", "_histories"):
            self.__dict__.pop(name, None)
        return refused

    def save_catalogue(self, folder: str | Path) -> None:
        """Write the model with its catalogue as it is now to a new folder, a run that every verb takes in the old
        one's place. Raises PlaitError where the folder exists, or cannot be written."""
        folder, catalogue = Path(folder), self.catalogue
        if folder.exists():
            raise PlaitError(f"{folder} exists already. Name a new folder for the grown model.")
        grown = {"from": str(self.folder), "items": self.joined}

        def more(temporary: Path) -> None:
            catalogue.write(temporary / CATALOGUE_FILE.name)  # images and audio clips of what joined are nowhere else

        checkpoint = replace(self.checkpoint, training={**self.checkpoint.training, "grown": grown})
        name = folder_name(checkpoint.training.get("step", 0))
        with publish_folder(folder) as temporary:
            checkpoints.save(checkpoint, temporary / "checkpoints" / name, more=more)
            for link in ("best", "last"):
                point(temporary / "checkpoints" / link, name)
            if self._run is not None:
                facts = read_json(self._run / "run.json")
                if "dataset" in facts:
                    facts["dataset"] = written_place(read_place(facts["dataset"], self._run), folder)
                checkpoints.write_json(temporary / "run.json", {**facts, "grown": grown})


def _narrow(where: str | None, seen: bool) -> str:
    parts = ["the condition holds for none" if where else "", "all others were seen" if seen else ""]
    return " and ".join(part for part in parts if part) + "." if any(parts) else "the catalogue has no other."


def _read(path: Path) -> tuple[list[Known], list[Rejected]]:
    """The items of a table, and its rows that cannot be used."""
    import tempfile

    if not path.is_file():
        raise PlaitError(f"{path} does not exist. Name a table of items.")
    with tempfile.TemporaryDirectory() as scratch:
        tree = scan(path, Path(scratch), Path(scratch) / "none")
        items, refused = list[Known](), list(tree.refused)
        seen: set[str] = set()
        for line, row in read_items(tree, next(iter(tree.files)), ItemsRecipe()):
            if isinstance(row, Rejected):
                refused.append(row)
            elif row.id in seen:
                refused.append(
                    Rejected(path.name, line, Reason(RejectKind.DUPLICATE, f"the item '{row.id}' stands there twice"))
                )
            else:
                seen.add(row.id)
                items.append(row)
    return items, refused


def embedder(name: str, device: str = "auto") -> Embed:
    """How a run or an imported model sees items: the mean of what it makes of the title, the image and the audio,
    as far as it reads them; (N, E), of unit length, zero where there is nothing to see."""
    model = load(name, device)
    kinds = model.modalities

    def embed(items: list[Known]) -> np.ndarray:
        total: np.ndarray | None = None
        for kind, views in (
            ("text", [item.title for item in items]),
            ("image", [decode_image(item.image) if item.image else None for item in items]),
            ("audio", [decode_audio(item.audio) if item.audio else None for item in items]),
        ):
            there = [i for i, view in enumerate(views) if view is not None]
            if kind in kinds and there:
                vectors = model.embed_inputs([views[i] for i in there])
                total = np.zeros((len(items), vectors.shape[1]), np.float32) if total is None else total
                total[there] += vectors
        if total is None:
            raise PlaitError(f"{name} reads {', '.join(sorted(kinds))}, of which the items have none.")
        return total / np.linalg.norm(total, axis=1, keepdims=True).clip(1e-12)

    return embed
