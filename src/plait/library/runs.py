"""`plait.Run`: a training run, what it knows, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.core.config import Recipe, parse_recipe
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.core.frames import data_frame, html_table
from plait.core.objective import loss_column, losses_of_row
from plait.data.dataset import Dataset
from plait.data.stores import read_place
from plait.training.callbacks import Callback

if TYPE_CHECKING:
    from plait.inference.base import Model
    from plait.library.evaluations import Evaluation


PROMPTS_TRIED, PROMPT_WORDS, PROMPT_LENGTH = 50, 6, 60  # records, and the words and characters of a prompt


class History(Sequence[dict[str, Any]]):
    """What a run wrote down while it trained: a row for each ten steps and for each validation.

    A row has `step`, `split` ("train", "val", ...), `time` (Unix seconds) and `loss/OBJECTIVE` in nats; of train also
    `tokens_per_second`, `learning_rate` and `waited`, the share of time spent waiting for data.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.rows[place]

    @property
    def objectives(self) -> list[str]:
        """The objectives that have losses, as `text`, `image`, `contrastive:image-text`."""
        return list(dict.fromkeys(name for row in self.rows for name in losses_of_row(row)))

    def losses(self, objective: str, split: str = "train") -> tuple[list[int], list[float]]:
        """Steps, and an objective's losses at them. Raises PlaitError for an objective that has none."""
        if objective not in self.objectives:
            raise PlaitError(f"There is no loss '{objective}'. There are {', '.join(self.objectives) or 'none'}.")
        column = loss_column(objective)
        rows = [row for row in self.rows if row["split"] == split and column in row]
        return [row["step"] for row in rows], [row[column] for row in rows]

    def to_pandas(self) -> Any:
        """All rows as a pandas DataFrame. Raises PlaitError where pandas is not installed."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        return data_frame({name: [row.get(name) for row in self.rows] for name in names})


class Run:
    """The folder of a training run.

    Args:
        folder: a folder that `plait.train` made.

    Raises PlaitError where it is none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if not (self.folder / "run.json").is_file():
            raise PlaitError(f"{folder} is not a run (it has no run.json). Train one: plait train DATA -o {folder}")

    @property
    def metadata(self) -> dict[str, Any]:
        """What was decided once: the recipe, sizes, steps, seed, device; see run.json."""
        metadata: dict[str, Any] = read_json(self.folder / "run.json")
        return metadata

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run trains by."""
        return parse_recipe(self.metadata["recipe"], str(self.folder / "run.json"))

    @property
    def dataset(self) -> Dataset:
        """The dataset that it was trained on. Raises PlaitError where that is not there any more."""
        return Dataset.open(self.dataset_path)

    @property
    def dataset_path(self) -> str:
        """Where the dataset lies that it was trained on."""
        facts = self.metadata
        if "dataset" not in facts:
            raise PlaitError(f"{self.folder / 'run.json'} does not say which dataset it is of.")
        return str(read_place(facts["dataset"], self.folder))

    @property
    def finished(self) -> bool:
        """Whether it trained to the end of its schedule."""
        return "finished" in self.metadata

    @property
    def history(self) -> History:
        """Losses by step; empty before the first ten steps."""
        path = self.folder / "log.jsonl"
        if not path.is_file():
            return History([])
        rows: dict[tuple[int, str], dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a line that a kill cut
                continue
            rows[row["step"], row["split"]] = row
        return History(sorted(rows.values(), key=lambda row: int(row["step"])))

    @property
    def best(self) -> Path:
        """The folder of the checkpoint that was best on val. Raises PlaitError where nothing was saved yet."""
        return self._checkpoint("best")

    @property
    def last(self) -> Path:
        """The folder of the newest checkpoint. Raises PlaitError where nothing was saved yet."""
        return self._checkpoint("last")

    def _checkpoint(self, name: str) -> Path:
        path = self.folder / "checkpoints" / name
        if not path.exists():
            raise PlaitError(f"{self.folder} has no checkpoint yet. Go on with it: plait.Run(...).resume()")
        return path.resolve()

    def checkpoints(self) -> list[dict[str, Any]]:
        """The checkpoints, the newest first, each compared with its sha256.

        Returns:
            For each `step`, `names` (best, last), `bytes`, `validation` losses, and `wrong`: what is damaged in it.
        """
        from plait.training.checkpointing import describe

        return describe(self.folder)

    @property
    def report(self) -> Path:
        """The page with curves and, once evaluated, figures. Raises PlaitError where there is none yet."""
        path = self.folder / "report.html"
        if not path.is_file():
            raise PlaitError(f"{path} does not exist yet: training writes it at its end.")
        return path

    def describe(self) -> str:
        """What was decided, and how large the model is, in a few lines of text."""
        from plait.hf import dual_encoder
        from plait.hf.contrastive import describe_pairs
        from plait.hf.heads import TYPE, describe_head, head_config
        from plait.hf.speech_training import describe_speech
        from plait.training.run import describe

        config = read_json(self.best / "config.json")
        if config["model_type"] == dual_encoder.TYPE:
            return dual_encoder.describe_dual_encoder(config)
        if self.metadata.get("size") == "pairs":
            return describe_pairs(config)
        if self.metadata.get("size") == "speech":
            return describe_speech(config)
        return describe_head(head_config(self.best)) if config["model_type"] == TYPE else describe(self.folder)

    def first_words(self) -> str | None:
        """How a text of val begins, or of train where val has none: a prompt to try the run with. None where there
        is no text."""
        dataset = self.dataset
        columns = [column for column, kind in dataset.columns.items() if kind == "text"]
        texts = (
            text
            for split in ("val", "train")
            for column in columns
            for cells in dataset.cells(column, dataset.indices(split)[:PROMPTS_TRIED])
            for text in filter(None, cells.to_pylist())
        )
        return next(filter(None, map(_beginning, texts)), None)

    def model(self, device: str = "auto", precision: str = "auto") -> Model:
        """The model of its best checkpoint, ready to use."""
        from plait.inference.model import load

        return load(self.folder, device, precision)

    def evaluate(self, **options: Any) -> Evaluation:
        """Measure it; see `plait.evaluate`."""
        from plait.library.evaluations import evaluate

        return evaluate(self, **options)

    def resume(
        self,
        *,
        device: str = "auto",
        callbacks: Sequence[Callback] = (),
        progress: bool | None = None,
    ) -> Run:
        """Go on where training stopped, by the same recipe on the same data; at once where it had ended.

        Args:
            device: auto, cpu, cuda or mps.
            callbacks: what is called while it trains.
            progress: as in `plait.train`.

        Raises PlaitError where the data are not there any more or have changed.
        """
        from plait.library.training import train

        return train(
            self.dataset, self.folder, recipe=self.recipe, device=device, callbacks=callbacks, progress=progress
        )

    def more(
        self,
        minutes: float,
        *,
        device: str = "auto",
        callbacks: Sequence[Callback] = (),
        progress: bool | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Run:
        """Train a finished run for longer, on the same data and by the same recipe, with a schedule of its own: the
        learning rate rises once more and falls to zero. Where it was stopped in such a part, that part goes on.

        Args:
            minutes: how much longer.
            device: auto, cpu, cuda or mps.
            callbacks: what is called while it trains.
            progress: as in `plait.train`.
            tell: as in `plait.train`.

        Raises PlaitError where the run has not ended, or its data are not there any more or have changed.
        """
        if not minutes > 0:
            raise PlaitError(f"A run is trained for more than no minutes, not for {minutes:g} more.")
        from plait.library.training import train_more

        train_more(self, minutes, device=device, callbacks=callbacks, progress=progress, tell=tell)
        return Run(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {'finished' if self.finished else 'not finished'})"

    def _repr_html_(self) -> str:
        facts, history = self.metadata, self.history
        rows = [["state", "finished" if self.finished else "not finished"], ["dataset", facts.get("dataset", "")]]
        rows += [[name, facts[name]] for name in ("size", "steps", "seed", "device") if name in facts]
        for name in history.objectives:
            for split in ("train", "val"):
                steps, values = history.losses(name, split)
                if steps:
                    rows.append([f"{split} loss, {name}", f"{values[-1]:.4f} at step {steps[-1]}"])
        return html_table(["", ""], rows, str(self.folder))


def _beginning(text: str) -> str:
    """The first words of a text."""
    return " ".join(text[: 4 * PROMPT_LENGTH].split()[:PROMPT_WORDS])[:PROMPT_LENGTH].strip()
