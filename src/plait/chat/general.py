"""What a base replies to general questions, before low-rank updates are trained on a user's conversations: training
keeps it (`training/kept_replies.py`). No data are needed: the questions are below, and the base answers them itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from plait.core.config import Recipe
from plait.core.device import choose_device
from plait.core.progress import ProgressFunction
from plait.data.dataset import Dataset
from plait.hf.hub import find
from plait.inference.model import load
from plait.inference.prompts import Chat, Turn
from plait.inference.requests import Delta
from plait.inference.sampling import Options
from plait.model.adapted import weight_sums
from plait.training.kept_replies import FILE, SEVERAL, BaseReplies, Reply

REPLY_TOKENS = 40  # of a reply; a longer one is cut
REPEATED = 4  # equal tokens, and no other, that are no reply
ENOUGH = 0.5  # share of the questions that must have replies for them to be kept

QUESTIONS = (
    "What is the capital of Poland?",
    "What is the capital of Canada?",
    "What is the capital of Egypt?",
    "Which river flows through London?",
    "Which country is south of the United States?",
    "On which continent is Brazil?",
    "Which ocean lies between Europe and America?",
    "Which language is spoken in Mexico?",
    "What is the currency of the United Kingdom?",
    "What is the longest river in Africa?",
    "How many continents are there?",
    "How many seconds are there in a minute?",
    "How many days are there in a year?",
    "How many wheels does a bicycle have?",
    "How many sides does a square have?",
    "What is 7 plus 5?",
    "What is 9 minus 3?",
    "What is 5 times 6?",
    "What is 20 divided by 4?",
    "What is the square of 4?",
    "Which number comes before 10?",
    "Which month comes after January?",
    "Which day comes before Sunday?",
    "Which season comes after winter?",
    "What is the opposite of big?",
    "What is the opposite of early?",
    "What is the plural of child?",
    "What is the past tense of go?",
    "What is a synonym of happy?",
    "Who wrote The Odyssey?",
    "Who wrote Faust?",
    "Who composed the Ninth Symphony?",
    "Who painted The Starry Night?",
    "Who discovered penicillin?",
    "Who invented the telephone?",
    "Who was the first emperor of Rome?",
    "When did the First World War begin?",
    "When did Columbus reach America?",
    "What is the smallest planet of our solar system?",
    "Which planet has rings?",
    "What is the moon?",
    "At what temperature does water freeze?",
    "What is the chemical symbol of iron?",
    "What is salt made of?",
    "What do plants need to grow?",
    "What does a thermometer measure?",
    "Which organ do we think with?",
    "How many bones does an adult have?",
    "What is the fastest land animal?",
    "What do cats eat?",
    "Where do penguins live?",
    "What is bread made of?",
    "What colour is the sky?",
    "What is the primary colour mixed with blue to make green?",
    "What does WWW stand for?",
    "What is a computer program?",
    "What is the Internet?",
    "How do I print text in Python?",
    "Write a loop in Python that prints 1 to 3.",
    "What is a list in Python?",
    "What is the speed of light?",
    "Why do we have seasons?",
    "What is photosynthesis?",
    "What is democracy?",
    "Tell me a short joke.",
    'Translate "good morning" to French.',
    'Translate "thank you" to Spanish.',
    "Write a sentence about the sea.",
    "What is the meaning of the word brave?",
    "Give me three names of fruits.",
)


def ask_the_base(
    dataset: Dataset,
    folder: Path,
    recipe: Recipe,
    device: str,
    processes: int,
    progress: ProgressFunction,
    tell: Callable[[str], None],
) -> bool:
    """Keep a base's replies in the run's `folder`, where low-rank updates of an imported chat model are trained on
    conversations by one process, and training.lora.keep is not 0. Returns whether the run keeps them."""
    lora, name = recipe.training.lora, recipe.model.init_from
    if lora is None or not lora.keep or name is None or not dataset.manifest.chats:
        return False
    if (folder / "checkpoints").is_dir():  # a run that goes on keeps what it began with
        return (folder / FILE).is_file()
    known = BaseReplies.read(folder) if processes == 1 else None
    if known is not None and known.base == name and known.sha256 == weight_sums(find(name)):
        return True
    (folder / FILE).unlink(missing_ok=True)  # of another base
    if processes > 1:
        tell(SEVERAL)
        return False
    began = time.perf_counter()
    chat = _chat(name, device)
    if chat is None:
        tell("What the base knows is not kept: it is no imported model with a chat template.")
        return False
    replies = _replies(chat, progress)
    if len(replies) < ENOUGH * len(QUESTIONS):
        tell(f"What the base knows is not kept: it replies to {len(replies)} of {len(QUESTIONS)} general questions.")
        return False
    origin = chat.model.checkpoint.origin
    assert origin is not None
    folder.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter() - began
    BaseReplies(base=name, sha256=weight_sums(origin), seconds=seconds, replies=replies).write(folder)
    tell(
        f"What the base replies to {len(replies)} general questions is kept beside what your conversations teach "
        "(training.lora.keep: 0 leaves that out)."
    )
    return True


def _chat(name: str, device: str) -> Chat | None:
    """A model by its own chat template; None for a model of ours, or one without."""
    precision = "bf16" if choose_device(device).kind == "cpu" else "auto"  # a processor packs it as it is read
    model = load(name, device, precision).plait_model
    if model is None or "imported from" not in model.checkpoint.training:
        return None
    chat = Chat(model)
    return chat if chat.template is not None else None


def _replies(chat: Chat, progress: ProgressFunction) -> list[Reply]:
    """Prompts and what a model replies, without what is no reply."""
    model, done = chat.model, 0

    def count(delta: Delta) -> None:
        nonlocal done
        if delta.finish is not None:
            done += 1
            progress("base's replies", done, len(QUESTIONS), "")

    progress("base's replies", 0, len(QUESTIONS), "")
    prompts = [chat.prompt([Turn("user", [question])]) for question in QUESTIONS]
    options: Options = {"temperature": 0.0, "max_new_tokens": REPLY_TOKENS}
    requests = [model.request(prompt.context, "text", **options) for prompt in prompts]
    results = model.engine.run([replace(request, on_delta=count) for request in requests])
    replies, own_end = [], model.vocabulary.end_id
    for prompt, result in zip(prompts, results, strict=True):
        sample = result.samples[0]
        end = [own_end] if sample.finish == "end" and own_end is not None else []
        # Rows of a base beyond its tokenizer's words are not kept by what is trained.
        ids = takewhile(lambda one: one < model.checkpoint.text.size, [*sample.ids, *end])
        if _says_something(sample.ids):
            replies.append(Reply([*prompt.context.ids, *ids], len(prompt.context.ids)))
    return [reply for reply in replies if len(reply.ids) > reply.start]


def _says_something(ids: Sequence[int]) -> bool:
    """Whether ids are a reply: nothing is none, nor is one token again and again, as a model that is broken writes."""
    return len(set(ids)) > 1 or 0 < len(ids) < REPEATED
