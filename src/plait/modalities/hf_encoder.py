"""A pretrained network of transformers in an encoder's place, built from its configuration alone.

What the encoder reads is prepared by the modality whose encoder it is; where its weights come from is
`model.encoders`'s business. transformers is imported when the first encoder is built.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from plait.core.dist import import_extra
from plait.core.errors import PlaitError


class HFEncoderSettings(BaseModel):
    """What a checkpoint keeps of an encoder beside its weights; taken from the encoder's own files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: dict[str, Any] = Field(description="The encoder's own config.json.")
    reads: Literal["pixels", "mel", "wave"] = Field(description="What it reads: pixels, log-mel or the waveform.")
    size: int = Field(0, description="Side of the images that it reads, in pixels.")
    mean: list[float] = Field([0.0, 0.0, 0.0], description="Mean of each channel, of pixels in [0, 1].")
    std: list[float] = Field([1.0, 1.0, 1.0], description="Standard deviation of each channel.")
    rate: int = Field(0, description="Samples a second of the audio that it reads, Hz.")
    bands: int = Field(0, description="Bands of Whisper's log-mel.")
    normalise: bool = Field(False, description="A waveform is brought to zero mean and unit variance.")
    masked: bool = Field(False, description="It is told where a waveform ends.")

    @property
    def row(self) -> int:
        """Numbers that stand for 10 ms of audio."""
        return self.bands if self.reads == "mel" else self.rate // 100

    @property
    def longest(self) -> float:
        """Seconds of audio that the encoder has positions for."""
        return self.config.get("max_source_positions", 1500) / 50 if self.reads == "mel" else math.inf


def transformers_for(what: str) -> Any:
    """The library. Raises PlaitError where it is not installed."""
    return import_extra("transformers", "huggingface", what)


class KeptStates:
    """What a frozen encoder gave for inputs that it has read, until `limit` bytes are full: by the inputs' content.

    Inputs are read one by one, so that what one gives does not depend on the others of its batch, nor a run that was
    resumed on what it had kept before.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.known: dict[bytes, Tensor] = {}

    def states(self, network: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The last hidden states (N, ...) of inputs (N, ...) each."""
        rows = [self._of(network, {name: value[n : n + 1] for name, value in inputs.items()})
                for n in range(len(next(iter(inputs.values()))))]  # fmt: skip
        return torch.cat(rows)

    def _of(self, network: Any, row: dict[str, Tensor]) -> Tensor:
        digest = hashlib.blake2b(digest_size=16)
        for value in row.values():
            digest.update(value.contiguous().numpy().data)
        key = digest.digest()
        if (known := self.known.get(key)) is not None:
            return known
        states: Tensor = network(**row).last_hidden_state
        if self.held + states.nbytes <= self.limit:
            self.held += states.nbytes
            self.known[key] = states.clone()
        return states


class HFEncoder(nn.Module):
    """Prepared inputs to the last hidden states (N, tokens, H), or (N, H, h, w) of convolutional encoders; `width` is
    H.

    A frozen encoder always works as in use: no gradient, no dropout. Its weights mean nothing until they are loaded.
    """

    optimizer_groups: ClassVar = {"*": "pretrained"}

    def __init__(self, config: dict[str, Any], frozen: bool) -> None:
        super().__init__()
        transformers = transformers_for(f"The pretrained encoder ({config.get('model_type')})")
        rest = {key: value for key, value in config.items() if key != "model_type"}
        # What would hide or skip parts at random outside torch's generators, or is ours to decide.
        rest |= {"apply_spec_augment": False, "layerdrop": 0.0, "encoder_layerdrop": 0.0}
        from transformers.initialization import no_init_weights  # they are loaded in any case

        try:
            described = transformers.AutoConfig.for_model(config["model_type"], **rest)
            if described.model_type == "whisper":
                from transformers.models.whisper.modeling_whisper import WhisperEncoder

                self.network = WhisperEncoder(described)
            else:
                with no_init_weights():
                    self.network = transformers.AutoModel.from_config(described, dtype=torch.float32)
        except Exception as error:  # its classes raise nearly anything on odd values
            reason = " ".join(str(error).split())[:200].rstrip(".")
            raise PlaitError(f"The pretrained encoder cannot be built from its configuration: {reason}.") from error
        self.width = _width(described, self.network)
        self.frozen = frozen
        self.kept: KeptStates | None = None
        if frozen:
            self.requires_grad_(False)
        self.eval()

    def keep_states(self, limit: int) -> None:
        """Keep up to so many bytes of what it gives, for training, where the same inputs come again."""
        self.kept = KeptStates(limit)

    def train(self, mode: bool = True) -> HFEncoder:
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # no batch statistics
        return self

    def forward(self, **inputs: Tensor) -> Tensor:
        needs_grad = any(value.requires_grad for value in inputs.values())  # an explanation, of what it reads
        if self.kept is not None and not needs_grad:
            with torch.no_grad():
                return self.kept.states(self.network, inputs).float()
        with torch.set_grad_enabled(torch.is_grad_enabled() and (needs_grad or not self.frozen)):
            states: Tensor = self.network(**inputs).last_hidden_state
        return states.float()


def _width(config: Any, network: Any) -> int:
    """H: what the configuration calls the width of the last hidden states; where it has no such name, as EfficientNet
    has none, it is seen from an empty image."""
    sizes = getattr(config, "hidden_sizes", None)
    known = getattr(config, "hidden_size", None) or (sizes[-1] if sizes else None)
    if known is not None:
        return int(known)
    side, place = int(getattr(config, "image_size", 224)), next(network.parameters())
    pixels = torch.zeros(1, int(getattr(config, "num_channels", 3)), side, side, device=place.device)
    with torch.no_grad():
        states = network.eval()(pixels).last_hidden_state
    return int(states.shape[1] if states.ndim == 4 else states.shape[2])
