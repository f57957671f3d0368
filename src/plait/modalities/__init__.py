"""Raw input <-> tensors <-> codes: one modality, one file."""

from typing import Any

from plait.modalities.audio import Audio, AudioSettings
from plait.modalities.image import Image, ImageSettings

MODALITIES: dict[str, Any] = {"image": Image, "audio": Audio}
SETTINGS: dict[str, Any] = {"image": ImageSettings, "audio": AudioSettings}
