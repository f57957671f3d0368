"""What this folder adds to the package; see `plait.core.features`."""

from __future__ import annotations

from plait.core.features import Feature

FEATURE = Feature(
    name="hf",
    adds={
        "encoder_source": "plait.hf.encoders:HF_ENCODERS",
        "checkpoint_source": "plait.hf.huggingface:load",
        "model_finder": "plait.hf.hub:find",
        "adapter_source": "plait.hf.adapters:read_adapter",
        "model_source": "plait.hf.load:load_model",
    },
)
