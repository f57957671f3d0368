"""Raw input <-> tensors <-> codes: one modality, one file."""

from plait.modalities.audio import Audio, AudioSettings
from plait.modalities.image import Image, ImageSettings

MODALITIES = {"image": Image, "audio": Audio}
SETTINGS = {"image": ImageSettings, "audio": AudioSettings}
