"""The modalities that a model may have, by name."""

from typing import Any

from plait.modalities.audio import Audio, AudioSettings
from plait.modalities.image import Image, ImageSettings
from plait.modalities.item import Item, ItemCodes, ItemCodesSettings, ItemSettings
from plait.modalities.video import Video, VideoSettings

MODALITIES: dict[str, Any] = {"image": Image, "audio": Audio, "video": Video, "item": Item, "item_codes": ItemCodes}
SETTINGS: dict[str, Any] = {
    "image": ImageSettings,
    "audio": AudioSettings,
    "video": VideoSettings,
    "item": ItemSettings,
    "item_codes": ItemCodesSettings,
}
