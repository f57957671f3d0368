"""Questions to models that run in transformers: CLIP and SigLIP about images, causal language models about texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from plait.core.errors import PlaitError
from plait.explain.parts import Grid, IntegrationPath, Question, Value, Words, log_odds
from plait.hf.hub import quiet
from plait.hf.pretrained import TEMPLATE, Pretrained, read_image
from plait.modalities.image import Image

BATCH = 64  # copies of an input in one forward pass
FINAL_NORMS = ("ln_f", "norm", "final_layer_norm", "final_layernorm", "norm_f", "final_norm")


def question(model: Pretrained, value: Any, answer: Any, labels: list[str] | None, template: str | None) -> Question:
    """What is to be explained of an image (CLIP, SigLIP) or a text (causal language models).

    Without an answer it is the likeliest label, or the likeliest next token. Raises PlaitError for what cannot be
    asked of the model.
    """
    if answer is not None and (not isinstance(answer, str) or not answer):
        raise PlaitError("The answer must be a text that is not empty.")
    if model.kind == "contrastive":
        return _labelled(model, read_image(value), answer, labels, template or TEMPLATE)
    if model.kind != "language":
        raise PlaitError(
            f"Explained are images by CLIP and SigLIP, texts by causal language models, and all that our own models "
            f"read; {model.name} is none of these ({model.kind})."
        )
    if not isinstance(value, str):
        raise PlaitError(f"{model.name} reads text. Give a text.")
    return ContinuationQuestion(model, [Words(value)], answer, labels)


def _labelled(
    model: Pretrained, image: PILImage.Image, answer: str | None, labels: list[str] | None, template: str
) -> LabelQuestion:  # fmt: skip
    labels = list(labels or ([answer] if answer else []))
    if not labels:
        raise PlaitError("This model knows no labels of its own. Name them: labels=[...] or --labels a,b,c.")
    if answer is not None and answer not in labels:
        raise PlaitError(f"'{answer}' is not among the labels {', '.join(labels[:8])}. Add it, or ask for one of them.")
    plain = model.processor(
        images=[image], do_rescale=False, do_normalize=False, return_tensors="np"
    )["pixel_values"][0]  # fmt: skip
    pixels = np.moveaxis(np.asarray(plain, np.float32), 0, -1).clip(0, 255).round().astype(np.uint8)
    question = LabelQuestion(model, [Grid(pixels, Image, "image")], labels, 0, template)
    if answer is not None:
        question.place = labels.index(answer)
    else:
        with torch.inference_mode():
            question.place = int(question.logits(question.tensor([pixels]))[0].argmax())
    return question


@dataclass
class LabelQuestion:
    """Why a label suits an image."""

    model: Pretrained
    parts: list[Grid]
    texts: list[str]
    place: int
    template: str
    inputs: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        inputs = self.model.label_inputs(self.texts, self.template)
        self.inputs = {name: tensor.to(self.model.device.torch) for name, tensor in inputs.items()}

    @property
    def answer(self) -> str:
        return self.texts[self.place]

    @property
    def measure(self) -> str:
        return "log-odds" if len(self.texts) > 1 else "similarity"

    def tensor(self, images: list[Any]) -> Tensor:
        """Images (H, W, 3) as (N, 3, H, W) floats from 0 to 255."""
        stacked = torch.from_numpy(np.stack(images)).to(self.model.device.torch)
        return stacked.movedim(-1, 1).float()

    def logits(self, pixels: Tensor) -> Tensor:
        """(N, labels) of what `tensor` gives."""
        known = self.model.processor
        x = pixels * float(known.rescale_factor) if known.do_rescale else pixels
        if known.do_normalize:
            mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (known.image_mean, known.image_std))
            x = (x - mean) / std
        logits: Tensor = self.model.model(pixel_values=x, **self.inputs).logits_per_image
        return logits.float()

    def scores(self, inputs: list[list[Value]]) -> np.ndarray:
        logits_of = []
        with torch.inference_mode(), self.model.device.autocast():
            for start in range(0, len(inputs), BATCH):
                images = [values[0] for values in inputs[start : start + BATCH]]
                images = [self.parts[0].baseline if value is None else value for value in images]
                logits_of.append(self.logits(self.tensor(images)).double().cpu().numpy())
        logits = np.concatenate(logits_of)
        return log_odds(logits, self.place) if len(self.texts) > 1 else logits[:, 0]

    def chances(self, scores: np.ndarray) -> np.ndarray:
        return scores if len(self.texts) == 1 else np.asarray(1 / (1 + np.exp(-scores.clip(-60, 60))))

    def path(self) -> IntegrationPath:
        part = self.parts[0]
        others = [i for i in range(len(self.texts)) if i != self.place]

        def score(pixels: Tensor) -> Tensor:
            logits = self.logits(pixels)
            return logits[:, self.place] - logits[:, others].logsumexp(1) if others else logits[:, 0]

        def by_unit(worth: list[np.ndarray]) -> list[np.ndarray]:
            return [part.summed(np.moveaxis(worth[0], 0, -1))]

        return IntegrationPath(score, (self.tensor([part.sample]),), (self.tensor([part.baseline]),), by_unit)

    def layers(self) -> list[dict[str, Any]]:
        raise PlaitError(f"The logit lens shows what a language model would say; {self.model.name} compares.")


@dataclass
class ContinuationQuestion:
    """Why a text goes on as it does."""

    model: Pretrained
    parts: list[Words]
    wanted: str | None
    labels: list[str] | None
    texts: list[str] = field(init=False)
    ids: list[list[int]] = field(init=False)
    place: int = field(init=False)

    def __post_init__(self) -> None:
        if self.wanted is None and not self.labels:
            with torch.inference_mode():
                logits = self._next([self._read(self.parts[0].text)])[0]
            order = logits.argsort(descending=True).tolist()
            token_texts = (self.model.tokenizer.decode([token]) for token in order)
            self.wanted = next(text for text in token_texts if text.strip() and "\ufffd" not in text)
        self.texts = list(self.labels or [str(self.wanted)])
        if self.wanted is not None and self.wanted not in self.texts:
            raise PlaitError(f"'{self.wanted}' is not among the labels {', '.join(self.texts[:8])}. Add it there.")
        self.ids = [self.model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.texts]
        if not all(self.ids):
            raise PlaitError("An answer has no tokens in this model. Give another.")
        self.place = self.texts.index(self.wanted) if self.wanted is not None else 0
        if self.wanted is None:
            self.place = int(self._log_likelihoods([self._read(self.parts[0].text)])[0].argmax())

    @property
    def answer(self) -> str:
        return self.texts[self.place]

    @property
    def measure(self) -> str:
        return "log-odds" if len(self.texts) > 1 else "log-likelihood"

    def _read(self, text: str) -> list[int]:
        ids = [int(i) for i in self.model.tokenizer(text)["input_ids"]]
        return ids or [self._blank()]

    def _blank(self) -> int:
        known = (self.model.tokenizer.pad_token_id, self.model.tokenizer.eos_token_id)
        return next((int(i) for i in known if i is not None), 0)

    def _next(self, contexts: list[list[int]]) -> Tensor:
        """Logits (N, V) of what follows contexts of one length."""
        with quiet():
            logits: Tensor = self.model.model(input_ids=torch.tensor(contexts, device=self.model.device.torch)).logits
        return logits[:, -1].float()

    def _log_likelihoods(self, contexts: list[list[int]]) -> np.ndarray:
        """log P of each answer after each context, (N, answers)."""
        jobs = [(row, place) for row in range(len(contexts)) for place in range(len(self.ids))]
        log_probs = np.zeros((len(contexts), len(self.ids)))
        with torch.inference_mode(), self.model.device.autocast():
            for start in range(0, len(jobs), BATCH):
                part = jobs[start : start + BATCH]
                rows = [contexts[row] + self.ids[place] for row, place in part]
                longest = max(map(len, rows))
                # What is on the right of a text changes nothing in it.
                padded = torch.tensor([row + [self._blank()] * (longest - len(row)) for row in rows])
                logits = self.model.model(input_ids=padded.to(self.model.device.torch)).logits.float().log_softmax(-1)
                for i, (row, place) in enumerate(part):
                    at = len(contexts[row]) - 1
                    ids = torch.tensor(self.ids[place], device=logits.device)
                    log_probs[row, place] = float(logits[i, at : at + len(ids)].gather(1, ids[:, None]).sum())
        return log_probs

    def scores(self, inputs: list[list[Value]]) -> np.ndarray:
        log_probs = self._log_likelihoods([self._read(str(values[0] or "")) for values in inputs])
        return log_odds(log_probs, self.place) if len(self.texts) > 1 else log_probs[:, 0]

    def chances(self, scores: np.ndarray) -> np.ndarray:
        if len(self.texts) > 1:
            return np.asarray(1 / (1 + np.exp(-scores.clip(-60, 60))))
        return np.asarray(np.exp(scores / len(self.ids[0])))

    def path(self) -> IntegrationPath:
        part, place = self.parts[0], self.model.device.torch
        encoded = self.model.tokenizer(part.text, return_offsets_mapping=True)
        stops = [int(stop) for _, stop in encoded["offset_mapping"]]
        # A special token covers nothing of the text.
        own = np.array([stop > start for start, stop in encoded["offset_mapping"]])
        owners = part.owners(stops)
        context = [int(i) for i in encoded["input_ids"]]
        table = self.model.model.get_input_embeddings()
        with torch.no_grad():
            fixed = table(torch.tensor([context], device=place)).float()
            bare = fixed.clone()
            bare[0, torch.from_numpy(own)] = table(torch.tensor(self._blank(), device=place)).float()
            answers = [table(torch.tensor(ids, device=place)).float() for ids in self.ids]

        def score(x: Tensor) -> Tensor:
            scores = []
            for ids, answer in zip(self.ids, answers, strict=True):
                embeds = torch.cat((x, answer.expand(len(x), -1, -1)), 1)
                logits = self.model.model(inputs_embeds=embeds).logits[:, x.shape[1] - 1 : -1].float().log_softmax(-1)
                targets = torch.tensor(ids, device=place).expand(len(x), -1)
                scores.append(logits.gather(2, targets[..., None])[..., 0].sum(1))
            if len(scores) == 1:
                return scores[0]
            others = torch.stack([one for i, one in enumerate(scores) if i != self.place], 1)
            return scores[self.place] - others.logsumexp(1)

        def by_unit(worth: list[np.ndarray]) -> list[np.ndarray]:
            return [np.bincount(owners[own], worth[0].sum(-1)[own], part.count)]

        return IntegrationPath(score, (fixed,), (bare,), by_unit)

    def layers(self) -> list[dict[str, Any]]:
        network = self.model.model
        head, base = network.get_output_embeddings(), network.base_model
        norm = next((getattr(base, name) for name in FINAL_NORMS if hasattr(base, name)), None)
        if head is None or norm is None:
            raise PlaitError(f"{self.model.name} has no final norm of a known name, which the logit lens needs.")
        ids = torch.tensor([self._read(self.parts[0].text)], device=self.model.device.torch)
        with torch.inference_mode(), quiet():
            states = network(input_ids=ids, output_hidden_states=True).hidden_states
        by_layer = []
        for number, state in enumerate(states):
            with torch.inference_mode():
                # transformers gives the last state after the norm already.
                last = state[0, -1] if number == len(states) - 1 else norm(state[0, -1])
                chances = head(last).float().softmax(-1)
            target = self.ids[self.place][0]
            top = chances.topk(3)
            likeliest = [
                (self.model.tokenizer.decode([i]), float(p))
                for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
            rank = int((chances > chances[target]).sum()) + 1
            by_layer.append({"layer": number, "chance": float(chances[target]), "rank": rank, "likeliest": likeliest})
        return by_layer
