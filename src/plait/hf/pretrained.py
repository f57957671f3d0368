"""Models of other architectures at work through transformers, behind the verbs of `Model`.

CLIP and SigLIP classify and embed, BERT and its kin embed, Whisper transcribes, image-to-text models describe, other
causal language models generate. transformers is imported when the first one is loaded; a model's own code never runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from plait.core.device import Device, choose_device
from plait.core.dist import import_extra
from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.core.interruption import pause_point
from plait.hf.hub import explained, find, no_safetensors, other_weights, parameters_of, quiet
from plait.hf.sentences import BATCH, SentenceEncoder
from plait.hf.speech import Segment, Speech
from plait.inference.base import Model
from plait.inference.memory import check_memory
from plait.inference.results import Prediction, Predictions
from plait.inference.sampling import Options
from plait.modalities.audio_files import decode_audio, resample
from plait.modalities.descriptor import MediaError
from plait.modalities.image_files import decode_image
from plait.modalities.inputs import as_audio, as_image, medium_of

# What each kind of model can do.
VERBS = {
    "contrastive": ("classify", "embed"),
    "encoder": ("classify", "embed"),
    "speech": ("transcribe",),
    "image-to-text": ("describe",),
    "language": ("generate",),
}
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")  # that transformers has
GENERATE_OPTIONS = (*SAMPLING_OPTIONS, "do_sample", "repetition_penalty", "seed", "max_new_tokens")
WINDOWS = 16  # of a long text that are read at once
SHARPNESS = 20.0  # what cosines of texts and labels are multiplied by: the scale that text encoders are trained with
TEXT_TEMPLATE = "{}"  # what a text encoder is asked about a label
TEMPLATE = "This is a photo of {}."  # what CLIP and SigLIP are asked about a label


def load_pretrained(name_or_folder: str | Path, device: str = "auto", precision: str = "auto") -> Pretrained:
    """A model that transformers knows, from a local folder, the Hugging Face cache or the hub, in that order.

    Raises PlaitError where it cannot be found, has no safetensors, lacks weights, needs code of its own or does
    nothing that Plait asks for.
    """
    folder = find(name_or_folder)
    return Pretrained(folder, str(name_or_folder), kind_of(folder), choose_device(device, precision))


def kind_of(folder: Path) -> str:
    """A key of VERBS: what a folder's model is, by its configuration.

    Raises PlaitError where it is none of them, or its weights are not there as safetensors.
    """
    config = read_json(folder / "config.json")
    if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
        raise PlaitError(no_safetensors(folder, other_weights(folder)))
    transformers = import_extra("transformers", "huggingface", str(folder))
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise PlaitError(f"{folder / 'config.json'} has no model_type. Fetch the model again.")
    return _kind(config, folder, transformers)


def _kind(config: dict[str, Any], folder: Path, transformers: Any) -> str:
    names = transformers.models.auto.modeling_auto
    model, heads = config["model_type"], config.get("architectures") or [""]
    if model not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        custom_code = " It brings code of its own (auto_map), which Plait never runs." if "auto_map" in config else ""
        raise PlaitError(
            f"{folder / 'config.json'}: transformers does not know the architecture '{model}'.{custom_code}"
        )
    if model in ("clip", "siglip", "siglip2"):
        return "contrastive"
    if model == "whisper":
        return "speech"
    if model in names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return "image-to-text"
    if model in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_encoder_decoder"):
        return "encoder"
    if model in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not heads[0].endswith("Classification"):
        return "language"
    supported = "; ".join(f"{kind}: {', '.join(verbs)}" for kind, verbs in VERBS.items())
    raise PlaitError(f"{folder}: no use is made here of a model of type '{model}'. Used are {supported}.")


class Pretrained(Model):
    """A model that transformers runs."""

    folder: Path

    def __init__(self, folder: Path, name: str, kind: str, device: Device) -> None:
        import transformers

        self.folder, self.name, self.kind, self.device = folder, name, kind, device
        self._labels: tuple[tuple[str, ...], np.ndarray] = ((), np.empty(0))  # the last ones, embedded
        auto = {
            "contrastive": "AutoModel",
            "encoder": "AutoModel",
            "speech": "AutoModelForSpeechSeq2Seq",
            "image-to-text": "AutoModelForImageTextToText",
            "language": "AutoModelForCausalLM",
        }[kind]
        local = {"local_files_only": True, "trust_remote_code": False}
        check_memory(parameters_of(folder), "fp32", folder, others=False)
        with explained(folder), quiet():
            self.model, info = getattr(transformers, auto).from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
            )
            # An encoder's pooler is often left out, and not used here.
            missing = sorted(key for key in info["missing_keys"] if not (kind == "encoder" and "pooler." in key))
            missing += sorted(str(key[0]) for key in info.get("mismatched_keys", ()))
            if missing or info.get("error_msgs"):
                raise PlaitError(f"{folder} lacks weights of its model: {', '.join(missing[:3])}. Fetch it again.")
            self.tokenizer: Any = None
            self.processor: Any = None
            if kind in ("encoder", "language"):
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
            elif kind == "speech":
                self.processor = transformers.AutoFeatureExtractor.from_pretrained(folder, **local)
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
            elif kind == "image-to-text" and self.model.config.model_type != "vision-encoder-decoder":
                self.processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil", **local)
                self.tokenizer = self.processor.tokenizer
            else:
                self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **local)
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
        self.model.eval().to(device.torch)
        self.sentences = SentenceEncoder(folder, self.model, self.tokenizer, device) if kind == "encoder" else None
        if self.sentences is not None:
            self.embed_batch = BATCH

    @property
    def verbs(self) -> list[str]:
        """What this model can do."""
        return list(VERBS[self.kind])

    def _can(self, verb: str, column: str | None = None) -> None:
        if column is not None:
            raise PlaitError(f"{self.name} has no columns. Leave out --column.")
        if verb not in VERBS[self.kind]:
            what = f"{self.name} ({self.model.config.model_type})"
            raise PlaitError(f"{what} cannot {verb}; it can {' and '.join(self.verbs)}. Use another model for that.")

    def _run(self, function: Any, **inputs: Any) -> Any:
        pause_point()
        tensors = {key: v.to(self.device.torch) if isinstance(v, Tensor) else v for key, v in inputs.items()}
        with torch.inference_mode(), self.device.autocast():
            return function(**tensors)

    # --- images and texts in one space --------------------------------------------------------------------------

    def classify_inputs(
        self,
        inputs: list[Any],
        labels: list[str] | None = None,
        column: str | None = None,
        top: int | None = 5,
        template: str | None = None,
    ) -> list[Predictions]:
        """The likeliest labels of images, or with a text encoder of texts, with their probabilities, likeliest first;
        zero-shot.

        Probabilities sum to one over the labels, but for SigLIP, which judges each label by itself, as it was trained
        to. `template` puts a label, at its {}, into a sentence; a label's underscores are spaces there.
        """
        self._can("classify", column)
        if not labels:
            raise PlaitError("This model knows no labels of its own. Name them: labels=[...] or --labels a,b,c.")
        if self.sentences is not None:
            rows = [self._text_labels(value, labels, template or TEXT_TEMPLATE) for value in inputs]
        else:
            texts = self.label_inputs(labels, template or TEMPLATE)
            rows = [self._image_labels(value, texts) for value in inputs]
        return [ranked(chances, labels, top) for chances in rows]

    def _image_labels(self, value: Any, texts: Any) -> Tensor:
        """The probability (N,) of each label, whose texts are tensors already, for an image."""
        pixels = self.processor(images=[read_image(value)], return_tensors="pt")
        logits = self._run(self.model, **texts, **pixels).logits_per_image[0].float()
        # SigLIP has a bias beside the temperature: the mark of a sigmoid loss.
        chances: Tensor = (logits.sigmoid() if hasattr(self.model, "logit_bias") else logits.softmax(-1)).cpu()
        return chances

    def _text_labels(self, value: Any, labels: list[str], template: str) -> Tensor:
        """The probability (N,) of each label for a text, by how near their embeddings are."""
        if not isinstance(value, str):
            raise PlaitError(f"{self.name} reads texts, not {type(value).__name__}. Use a CLIP or SigLIP model.")
        key = (template, *labels)
        if self._labels[0] != key:  # the same for many texts
            self._labels = key, self.embed_inputs([sentence(label, template) for label in labels])
        cosines = self._labels[1] @ self.embed_inputs([value])[0]
        return torch.from_numpy(cosines * SHARPNESS).softmax(-1)

    def label_inputs(self, labels: list[str], template: str) -> Any:
        """The texts that stand for labels, as tensors."""
        return self.text_inputs([sentence(label, template) for label in labels])

    def text_inputs(self, texts: list[str]) -> Any:
        """Texts as CLIP or SigLIP reads them, as tensors."""
        # SigLIP was trained on texts padded to its full length, without a mask.
        if hasattr(self.model, "logit_bias"):
            length = self.model.config.text_config.max_position_embeddings
            return self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        limit = min(self.tokenizer.model_max_length, self.model.config.text_config.max_position_embeddings)
        return self.tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")

    def embed_inputs(self, inputs: list[Any], prompt: str | None = None) -> np.ndarray:
        """The embedding of each input, (N, E) float32, of unit length: texts and images with CLIP and SigLIP, texts
        with an encoder, as sentence-transformers embeds them. Of a long text the beginning is read. `prompt` names one
        of a text encoder's prompts, as "query"."""
        self._can("embed")
        if self.sentences is not None:
            if other := [value for value in inputs if not isinstance(value, str)]:
                raise PlaitError(
                    f"{self.name} embeds texts, not {type(other[0]).__name__}. Use a CLIP or SigLIP model."
                )
            return self.sentences.embed(inputs, prompt)
        vectors_of_inputs = [self._contrastive(value) for value in inputs]
        if not vectors_of_inputs:
            return np.zeros((0, 0), np.float32)
        vectors = torch.stack(vectors_of_inputs).float()
        return np.asarray(torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy(), np.float32)

    def _contrastive(self, value: Any) -> Tensor:
        if isinstance(value, str):
            result = self._run(self.model.get_text_features, **self.text_inputs([value]))
        else:
            pixels = self.processor(images=[read_image(value)], return_tensors="pt")
            result = self._run(self.model.get_image_features, **pixels)
        vector: Tensor = getattr(result, "pooler_output", result)[0]
        return vector

    # --- texts ----------------------------------------------------------------------------------------------------

    def transcribe(
        self,
        audio: Any,
        column: str | None = None,
        *,
        language: str | None = None,
        max_new_tokens: int | None = None,
        task: str = "transcribe",
    ) -> str:
        """The words of an audio clip of any length; none of silence. `language` ("en", "german") is found out where it
        is not given and the model knows several; the `task` "translate" writes English."""
        self._can("transcribe", column)
        wave = self._heard(medium_of(audio))
        return self._speech().text(wave, language, task, max_new_tokens)

    def segments(
        self, audio: Any, language: str | None = None, task: str = "transcribe", words: bool = False
    ) -> list[Segment]:
        """What is said when in an audio clip of any length; with `words` also when each word is said."""
        self._can("transcribe")
        return self._speech().segments(self._heard(medium_of(audio)), language, task, words)

    def _heard(self, audio: Any) -> np.ndarray:
        wave, rate = _audio(audio)
        return resample(wave, rate, self.processor.sampling_rate)

    def _speech(self) -> Speech:
        return Speech(self.name, self.model, self.processor, self.tokenizer, self._run)

    def describe(
        self, image: Any, column: str | None = None, prompt: str | None = None, max_new_tokens: int | None = None
    ) -> str:
        """What the model writes about an image; `prompt` asks a question, where the model takes one."""
        self._can("describe", column)
        image = read_image(medium_of(image))
        if self.model.config.model_type == "vision-encoder-decoder":
            if prompt is not None:
                raise PlaitError(f"{self.name} writes captions and takes no prompt. Leave it out.")
            inputs = self.processor(images=[image], return_tensors="pt")
        else:
            text = self._prompt(prompt)
            inputs = self.processor(images=[image], return_tensors="pt", **({} if text is None else {"text": [text]}))
        with quiet():
            ids = self._run(self.model.generate, **inputs, max_new_tokens=max_new_tokens or 50, do_sample=False)[0]
        read = inputs.get("input_ids")
        if read is not None and torch.equal(ids[: read.shape[1]].cpu(), read[0].cpu()):
            ids = ids[read.shape[1] :]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True).strip())

    def _prompt(self, prompt: str | None) -> str | None:
        """The text beside an image, in the form that this model was trained on."""
        question = prompt or "Describe this image."
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            return str(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if mark := getattr(self.processor, "image_token", None):
            return f"{mark}\n{question}" if prompt or "llava" in self.model.config.model_type else f"{mark}"
        return prompt

    def generate(
        self,
        prompt: str,
        *,
        max_length: int | None = None,
        num_return_sequences: int = 1,
        n: int | None = None,
        **options: Unpack[Options],
    ) -> str | list[str]:
        """Prompt and continuation, or a list of them where several are asked for; options as in `Model.generate`."""
        self._can("generate")
        if not isinstance(prompt, str) or not prompt:
            raise PlaitError(f"{self.name} continues a text. Give a prompt that is a str and not empty.")
        count = num_return_sequences if n is None else n
        set_options = {name: value for name, value in options.items() if value is not None}
        if unknown := [name for name in set_options if name not in GENERATE_OPTIONS]:
            raise PlaitError(f"{self.name} runs in transformers, which has no {unknown[0]} here. Leave it out.")
        sampling = {name: set_options[name] for name in SAMPLING_OPTIONS if name in set_options}
        do_sample, max_new_tokens = options.get("do_sample"), options.get("max_new_tokens")
        if do_sample is None:
            do_sample = (count > 1 or bool(sampling)) and options.get("temperature") != 0
        if not do_sample and count > 1:
            raise PlaitError("Without sampling all results are the same. Ask for one, or leave do_sample out.")
        inputs = dict(self.tokenizer(prompt, return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        length = inputs["input_ids"].shape[1]
        if max_length is not None:
            if max_length <= length:
                raise PlaitError(
                    f"max_length is {max_length}, but the prompt alone takes {length} tokens. Raise it, or use "
                    "max_new_tokens, which does not count the prompt."
                )
            max_new_tokens = min(max_length - length, max_new_tokens or max_length)
        settings: dict[str, Any] = {"do_sample": do_sample, **(sampling if do_sample else {})}
        if "repetition_penalty" in set_options:
            settings["repetition_penalty"] = set_options["repetition_penalty"]
        with quiet(), torch.random.fork_rng():
            torch.manual_seed(options.get("seed", 0))
            ids = self._run(
                self.model.generate,
                **inputs,
                **settings,
                max_new_tokens=max_new_tokens or 50,
                num_return_sequences=count,
                pad_token_id=self._padding(),
            )
        texts = [prompt + self.tokenizer.decode(row[length:], skip_special_tokens=True) for row in ids]
        return texts[0] if count == 1 else texts

    def _padding(self) -> int:
        settings = self.model.generation_config
        end = settings.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return next((int(id) for id in (settings.pad_token_id, end) if id is not None), 0)


def ranked(chances: Tensor, labels: list[str], top: int | None) -> Predictions:
    """The likeliest of labels (N,), by their probabilities."""
    order = chances.argsort(descending=True, stable=True)[:top]
    return Predictions(Prediction(labels[i], float(chances[i])) for i in order.tolist())


def sentence(label: str, template: str) -> str:
    """A label in the sentence that stands for it."""
    if "{}" not in template:
        raise PlaitError(f"The template {template!r} has no {{}} where the label goes.")
    return template.replace("{}", label.replace("_", " "))


def read_image(value: Any) -> PILImage.Image:
    """An image as RGB. Raises PlaitError where it is none or cannot be read."""
    if isinstance(value, (PILImage.Image, np.ndarray)):
        return as_image(value).convert("RGB")
    if not isinstance(value, (Path, bytes)):  # a str is a text: it may come over the network, and must open no file
        what = "a text" if isinstance(value, str) else type(value).__name__
        raise PlaitError(f"An image is a PIL image, an array, a file or bytes, not {what}.")
    try:
        return decode_image(value).convert("RGB")
    except MediaError as error:
        raise PlaitError(f"{'The image' if isinstance(value, bytes) else value}: {error}.") from error


def _audio(value: Any) -> tuple[np.ndarray, int]:
    """(waveform (T,), rate). Raises PlaitError where it is none or cannot be read."""
    if (audio := as_audio(value)) is not None:
        return audio
    if not isinstance(value, (Path, bytes)):
        what = "a text" if isinstance(value, str) else type(value).__name__
        raise PlaitError(f"An audio clip is (waveform, rate), a file or bytes, not {what}.")
    try:
        return decode_audio(value)
    except MediaError as error:
        raise PlaitError(f"{'The audio' if isinstance(value, bytes) else value}: {error}.") from error
