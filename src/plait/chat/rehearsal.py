"""What a base replies to general questions, learnt again beside a user's conversations: low-rank updates of a chat
model soon answer everything as the new conversations do, and what the base knew would go.

No data are needed: the questions are below, and the base itself answers them, greedily, before training begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from plait.core.config import Recipe
from plait.core.files import write_atomic
from plait.data.dataset import Dataset
from plait.inference.model import load
from plait.inference.prompts import Chat, Turn
from plait.inference.sampling import Options
from plait.training.tasks import with_sections

FOLDER, FILE = "rehearsal", "rehearsal.jsonl"  # in the run's folder
REPLY_TOKENS = 48  # of a reply; a longer one is left out
VALIDATED = 8  # every so many-th question is validated on

QUESTIONS = (
    "What is the capital of Japan?",
    "Who painted the Starry Night?",
    "How many minutes are there in an hour?",
    "What is the largest ocean?",
    "What do bees make?",
    "Which planet is known for its rings?",
    "What is 9 minus 4?",
    "What is the opposite of hot?",
    "Name three fruits.",
    "In which country is the city of Rome?",
    "Who discovered gravity?",
    "What is the chemical symbol of gold?",
    "How many legs does a spider have?",
    "What language is spoken in Brazil?",
    "What is the tallest mountain in the world?",
    "Who wrote the novel Don Quixote?",
    "What colour do you get when you mix blue and yellow?",
    "Which season comes after winter?",
    "What is frozen water called?",
    "What is the first letter of the alphabet?",
    "Which animal is called man's best friend?",
    "What do plants need to grow?",
    "On which continent is Egypt?",
    "What is 3 times 6?",
    "Who was the first person to walk on the Moon?",
    "Which star is nearest to us?",
    "Translate good morning into French.",
    "Write a sentence about the sea.",
    "Write a Python function that adds two numbers.",
    "Explain in one sentence what a computer is.",
    "Give me a tip for sleeping well.",
    "What does a doctor do?",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Who are you?",
    "Tell me a short joke.",
    "What is the currency of the United States?",
    "How many wheels does a bicycle have?",
    "Which month is the first of the year?",
    "What is a triangle?",
)


def with_rehearsal(dataset: Dataset, folder: Path, recipe: Recipe, device: str, tell: Callable[[str], None]) -> Recipe:
    """The recipe of a run in `folder`, with the base's own replies beside the conversations of each batch: where
    low-rank updates of an imported chat model are trained on conversations, and nothing else is replayed."""
    settings = recipe.training
    if (
        settings.lora is None or not settings.lora.rehearsal or settings.task != "chat" or settings.replay
        or not dataset.manifest.chats or recipe.model.init_from is None or settings.batch_size is None
    ):  # fmt: skip
        return recipe
    place = folder / FOLDER
    if not (place / "manifest.json").is_file():
        replies = _replies(recipe.model.init_from, device)
        if replies is None:
            return recipe
        _prepare(replies, dataset.manifest.chats[0], folder / FILE, place)
        tell(
            f"Beside your conversations {len(replies)} general questions are learnt, with what the base replies "
            "itself, so that it keeps what it knows (training.lora.rehearsal: 0 leaves them out)."
        )
    added = max(round(settings.batch_size * settings.lora.rehearsal), 1)
    batch = settings.batch_size + added
    return with_sections(recipe, training={"batch_size": batch, "replay": {str(place): added / batch}})


def _replies(name: str, device: str) -> list[tuple[str, str]] | None:
    """Questions and what a model replies; None of a model of ours, or one without a chat template."""
    model = load(name, device).plait_model
    if model is None or "imported from" not in model.checkpoint.training:
        return None
    chat = Chat(model)
    if chat.template is None:
        return None
    prompts = [chat.prompt([Turn("user", [question])]) for question in QUESTIONS]
    options: Options = {"stop": list(prompts[0].stop), "temperature": 0.0, "max_new_tokens": REPLY_TOKENS}
    results = model.engine.run([model.request(prompt.context, "text", **options) for prompt in prompts])
    replies = []
    for question, result in zip(QUESTIONS, results, strict=True):
        sample = result.samples[0]
        if sample.text and sample.text.strip() and sample.finish != "length":  # a cut one would teach to break off
            replies.append((question, sample.text.strip()))
    return replies or None


def _prepare(replies: list[tuple[str, str]], column: str, file: Path, place: Path) -> None:
    from plait.data.prepare import prepare

    rows = [
        {
            column: [{"role": "user", "content": question}, {"role": "assistant", "content": reply}],
            "split": "val" if number % VALIDATED == VALIDATED - 1 else "train",
        }
        for number, (question, reply) in enumerate(replies)
    ]
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    prepare(file, place)
