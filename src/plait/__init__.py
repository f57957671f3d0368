"""Plait: one model that reads and writes text, images and audio from your own files.

    import plait

    dataset = plait.prepare("photos/", "data/photos")
    run = plait.train(dataset, "runs/photos", minutes=10)
    result = plait.evaluate(run)
    model = plait.load("runs/photos")
    model.classify("new.jpg")

What is listed in `__all__` is imported when it is first asked for, so that `import plait` starts no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from plait.core import dist
from plait.core import isa as _isa  # noqa: F401 (PLAIT_ISA must reach the environment before torch loads)

if TYPE_CHECKING:
    from plait.chat.replies import open_replies
    from plait.core.errors import PlaitError
    from plait.data.dataset import Dataset
    from plait.hf.catalogue import models
    from plait.inference.base import Model
    from plait.inference.model import load
    from plait.inference.results import Prediction, Predictions
    from plait.library.datasets import estimate, prepare
    from plait.library.demo import demo
    from plait.library.evaluations import Evaluation, evaluate, label_review
    from plait.library.exports import export
    from plait.library.runs import Run
    from plait.library.tables import tabulate
    from plait.library.training import train
    from plait.planning.api import plan
    from plait.search.index import Index
    from plait.training.callbacks import Callback
    from plait.transfer_learning.api import transfer
    from plait.tuning.api import tune

__version__ = dist.VERSION

__all__ = [
    "Callback",
    "Dataset",
    "Evaluation",
    "Index",
    "Model",
    "PlaitError",
    "Prediction",
    "Predictions",
    "Run",
    "__version__",
    "demo",
    "estimate",
    "evaluate",
    "export",
    "label_review",
    "load",
    "models",
    "open_replies",
    "plan",
    "prepare",
    "tabulate",
    "train",
    "transfer",
    "tune",
]

# Name -> the module that has it.
_MODULES = {
    "Callback": "plait.training.callbacks",
    "Dataset": "plait.data.dataset",
    "Evaluation": "plait.library.evaluations",
    "Index": "plait.search.index",
    "Model": "plait.inference.base",
    "PlaitError": "plait.core.errors",
    "Prediction": "plait.inference.results",
    "Predictions": "plait.inference.results",
    "Run": "plait.library.runs",
    "demo": "plait.library.demo",
    "estimate": "plait.library.datasets",
    "evaluate": "plait.library.evaluations",
    "export": "plait.library.exports",
    "label_review": "plait.library.evaluations",
    "load": "plait.inference.model",
    "models": "plait.hf.catalogue",
    "open_replies": "plait.chat.replies",
    "plan": "plait.planning.api",
    "prepare": "plait.library.datasets",
    "tabulate": "plait.library.tables",
    "train": "plait.library.training",
    "transfer": "plait.transfer_learning.api",
    "tune": "plait.tuning.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'plait' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
