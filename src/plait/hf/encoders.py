"""Pretrained encoders: what a checkpoint of transformers' says of its encoder, and its weights into ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.hf.hub import explained, find, no_safetensors, other_weights, parameters_of, quiet
from plait.inference.memory import check_memory
from plait.modalities.base import MediaModality
from plait.modalities.hf_encoder import HFEncoder, HFEncoderSettings, transformers_for

_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def folder_of(encoder: object, modality: str) -> Path:
    """The folder that `hf:NAME-OR-FOLDER` stands for. Raises PlaitError within some four seconds where there is none
    or it holds no safetensors."""
    name = encoder.removeprefix("hf:").strip() if isinstance(encoder, str) else ""
    if not name or not str(encoder).startswith("hf:"):
        raise PlaitError(
            f"In the recipe's model.{modality}: encoder is {encoder!r}. Write hf: and a name of the Hugging Face "
            "hub or a folder, as in hf:openai/clip-vit-base-patch32, or leave it out."
        )
    try:
        folder = find(name)
    except PlaitError as error:
        raise PlaitError(f"In the recipe's model.{modality}, encoder: {error}") from error
    if not (folder / "model.safetensors").is_file() and not (folder / "model.safetensors.index.json").is_file():
        raise PlaitError(no_safetensors(folder, other_weights(folder)))
    return folder


def describe(encoder: object, modality: str) -> HFEncoderSettings:
    """What `hf:NAME-OR-FOLDER` is as an encoder of a modality. Raises PlaitError where it is none."""
    folder = folder_of(encoder, modality)
    transformers = transformers_for(str(encoder))
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise PlaitError(f"{folder / 'config.json'} has no model_type. Fetch the model again.")
    with explained(folder), quiet():
        full_config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        part = getattr(full_config, ENCODERS[modality].part, full_config)
        encoder_config = {**part.to_diff_dict(), "model_type": part.model_type}
        for key in ("transformers_version", "architectures", "dtype", "_name_or_path"):
            encoder_config.pop(key, None)
        with torch.device("meta"):  # its shape alone
            reads = HFEncoder(encoder_config, frozen=True).network.main_input_name
        facts = ENCODERS[modality].settings(folder, transformers, part)
    expected = {"pixels": "pixel_values", "mel": "input_features", "wave": "input_values"}[facts["reads"]]
    if reads != expected or (facts["reads"] == "wave" and not hasattr(part, "conv_stride")):
        raise _unfit(folder, part.model_type, modality)
    return HFEncoderSettings(config=encoder_config, **facts)


def _unfit(folder: Path, kind: str, modality: str) -> PlaitError:
    return PlaitError(
        f"{folder}: a model of type '{kind}' cannot encode {modality}. Known are {ENCODERS[modality].known}."
    )


def _pixels(folder: Path, transformers: Any, config: Any) -> dict[str, Any]:
    """Side, mean and deviation as the folder's preprocessor has them."""
    preprocessor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **_LOCAL)
    cropped = getattr(preprocessor, "do_center_crop", False) and getattr(preprocessor, "crop_size", None)
    size = dict(preprocessor.crop_size if cropped else preprocessor.size)
    side = size.get("height") or size.get("shortest_edge") or 0
    if size.get("width", side) != side or not side:
        raise PlaitError(f"{folder} reads images of {size}, which is not a square of a fixed size.")
    facts: dict[str, Any] = {"reads": "pixels", "size": int(side)}
    if preprocessor.do_normalize:
        facts |= {
            "mean": [float(x) for x in preprocessor.image_mean],
            "std": [float(x) for x in preprocessor.image_std],
        }
    return facts


def _audio(folder: Path, transformers: Any, config: Any) -> dict[str, Any]:
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, **_LOCAL)
    rate = int(extractor.sampling_rate)
    if config.model_type == "whisper":
        return {"reads": "mel", "rate": rate, "bands": int(extractor.feature_size)}
    if type(extractor).__name__ != "Wav2Vec2FeatureExtractor":
        raise _unfit(folder, config.model_type, "audio")
    return {
        "reads": "wave",
        "rate": rate,
        "normalise": extractor.do_normalize,
        "masked": extractor.return_attention_mask,
    }


@dataclass(frozen=True)
class EncoderKind:
    """What is peculiar to pretrained encoders of a modality.

    Attributes:
        known: Which models have one, for people.
        part: Where the configuration of a model of several parts keeps the encoder's.
        settings: (folder, transformers, the encoder's configuration) to fields of `HFEncoderSettings`.
    """

    known: str
    part: str
    settings: Callable[[Path, Any, Any], dict[str, Any]]


ENCODERS = {
    "image": EncoderKind(
        "CLIP, SigLIP, ViT, DINOv2, Swin, ConvNeXt and others that turn pixel_values into last_hidden_state",
        "vision_config",
        _pixels,
    ),
    "audio": EncoderKind(
        "Whisper's encoder and wav2vec2, HuBERT, WavLM or data2vec-audio, which read the waveform",
        "audio_config",
        _audio,
    ),
}


class HFEncoders:
    """The encoders of transformers' checkpoints, as `plait.modalities.base.EncoderSource`."""

    def describe(self, encoder: object, modality: str) -> HFEncoderSettings:
        """What `hf:NAME-OR-FOLDER` is as an encoder of a modality. Raises PlaitError where it is none."""
        return describe(encoder, modality)

    def fill(self, modality: MediaModality) -> None:
        """Give a new modality's encoder its weights. Raises PlaitError where they are missing or misshapen."""
        settings: Any = modality.settings
        _fill(modality, folder_of(settings.encoder, modality.name))


HF_ENCODERS = HFEncoders()


def _fill(modality: MediaModality, folder: Path) -> None:
    transformers = transformers_for(str(folder))
    hf_encoder = modality.encoder.hf_encoder
    assert isinstance(hf_encoder, HFEncoder)
    check_memory(parameters_of(folder), "fp32", folder, others=False)
    with explained(folder), quiet():
        full_model, info = transformers.AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **_LOCAL
        )
        part, prefix = full_model, ""
        if full_model.config.model_type == "whisper":
            part, prefix = full_model.encoder, "encoder."
        elif hasattr(full_model.config, "vision_config") and hasattr(full_model, "vision_model"):
            part, prefix = full_model.vision_model, "vision_model."
        lost = sorted({*info["missing_keys"], *(str(key[0]) for key in info.get("mismatched_keys", ()))})
        # A pooler is often left out, and not used here.
        lost = [key for key in lost if key.startswith(prefix) and "pooler." not in key]
        if lost or info.get("error_msgs"):
            raise PlaitError(f"{folder} lacks weights of its encoder: {', '.join(lost[:3])}. Fetch it again.")
        weights = part.state_dict()
        if prefix == "encoder.":  # no more positions than the longest clip has
            places = hf_encoder.network.embed_positions.num_embeddings
            weights["embed_positions.weight"] = weights["embed_positions.weight"][:places]
        hf_encoder.network.load_state_dict(weights)
    if not all(value.isfinite().all() for value in weights.values()):
        raise PlaitError(f"{folder} holds weights that are not finite. Fetch it again.")
    if not hf_encoder.frozen:
        _exclude_unused(modality)


def _exclude_unused(modality: MediaModality) -> None:
    """Take out of training what no state comes from, such as a head for pooling: optimisers and other processes would
    wait for its gradient."""
    settings: Any = modality.settings
    hf_encoder: Any = modality.encoder.hf_encoder
    shape = (settings.size, settings.size, settings.channels) if settings.hf_encoder.reads == "pixels" else None
    sample = torch.zeros(1, *shape) if shape else torch.zeros(1, 4, settings.bands + settings.hf_encoder.row)
    parameters = [p for p in hf_encoder.parameters() if p.requires_grad]
    out = modality.encoder(sample, torch.tensor([sample.shape[1]])).sum()
    for parameter, grad in zip(parameters, torch.autograd.grad(out, parameters, allow_unused=True), strict=True):
        parameter.requires_grad_(grad is not None)
