"""Image files: bytes <-> pixels, with every limit checked before memory is asked for. Imports no torch."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from plait.core.rejects import RejectKind
from plait.modalities.descriptor import (
    LIMITS,
    Comparison,
    Format,
    Limits,
    MediaError,
    MediaFiles,
    Packed,
    container_brand,
    short,
)
from plait.modalities.simple_features import image_features

SIDE = 2048  # pixels a side that are handed from one process to another
PREVIEW_BYTES, PREVIEW_SIDE = 16_384, 128
PAGE_SIDE = 256  # pixels a side on a page
PRINT_SIDE, CHROMA = 24, 8  # of a fingerprint's brightness and of its two colour planes
PRINT = PRINT_SIDE * PRINT_SIDE + 2 * CHROMA * CHROMA
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"mif2")
_AVIF = (b"avif", b"avis")


class ImageFiles(MediaFiles):
    """The descriptor of images. A value is a PIL image in mode L, LA, RGB or RGBA, 8 bits a channel, upright."""

    kind, verb, writes, unit, element = "image", "describe", "draw", "pixels", "img"
    comparison = Comparison.PIXELS
    file_column = "file_name"
    simple_model = "gradients, colours and a linear SVM"
    formats = (
        Format("png", (".png",), "image/png"),
        Format("jpeg", (".jpg", ".jpeg", ".jpe", ".jfif"), "image/jpeg"),
        Format("gif", (".gif",), "image/gif"),
        Format("webp", (".webp",), "image/webp"),
        Format("bmp", (".bmp", ".dib"), "image/bmp"),
        Format("tiff", (".tif", ".tiff"), "image/tiff"),
        Format("heic", (".heic", ".heif", ".hif"), "image/heic", needs="pillow_heif"),
        Format("avif", (".avif",), "image/avif"),
        Format("jxl", (".jxl",), "image/jxl", needs="pillow_jxl"),
    )

    def sniff(self, head: bytes) -> str | None:
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            return "png"
        if head.startswith(b"\xff\xd8\xff"):
            return "jpeg"
        if head[:6] in (b"GIF87a", b"GIF89a"):
            return "gif"
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return "webp"
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return "tiff"
        sized = head[:2] == b"BM" and len(head) >= 18
        if sized and struct.unpack_from("<I", head, 14)[0] in (12, 40, 52, 56, 64, 108, 124):
            return "bmp"
        if head[:2] == b"\xff\x0a" or head[:12] == b"\0\0\0\x0cJXL \r\n\x87\n":
            return "jxl"
        brand = container_brand(head)
        if brand in _AVIF or (brand in _HEIC and b"avif" in head[12:64]):
            return "avif"
        return "heic" if brand in _HEIC else None

    def decode(self, data: bytes | Path, limits: Limits = LIMITS) -> Image.Image:
        return decode_image(data, limits)

    def check(self, data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
        image = decode_image(data, limits)
        return {"width": image.width, "height": image.height}

    def facts(self, value: Image.Image) -> tuple[float, float]:
        return value.width, value.height

    def length(self, first: Any, second: Any) -> Any:
        return np.maximum(first, second)

    def size_name(self, first: float, second: float) -> str:
        return f"{first:.0f}x{second:.0f}"

    def look(self, data: bytes, fingerprint: bool) -> tuple[float, float, bytes]:
        """A JPEG is decoded no larger than a fingerprint needs: all bytes are read, most pixels are not made."""
        decoded = _decoded(data, LIMITS, small=True)
        print_ = image_fingerprint(decoded.image, decoded.scale) if fingerprint else b""
        return decoded.width, decoded.height, print_

    def fingerprint(self, value: Image.Image) -> bytes:
        """Brightness (24 x 24) and two colour planes (8 x 8 each) over white: 704 x uint8."""
        return image_fingerprint(value)

    def preview(self, data: bytes, value: Image.Image) -> bytes:
        """The image itself where it is small and a browser shows it, else a thumbnail."""
        if len(data) <= PREVIEW_BYTES and self.sniff(data[:64]) in ("png", "jpeg", "gif", "webp", "avif"):
            return data
        small = value.copy()
        small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        out = io.BytesIO()
        small.save(out, "PNG" if small.mode in ("LA", "RGBA") else "JPEG", quality=80)
        return out.getvalue()

    def page_preview(self, data: bytes) -> bytes:
        image = decode_image(data)
        image.thumbnail((PAGE_SIDE, PAGE_SIDE))
        if image.mode in ("L", "RGB") and max(image.size) > 64:
            out = io.BytesIO()
            image.save(out, "JPEG", quality=85)
            return out.getvalue()
        return encode_png(image)

    def tile(self, preview: bytes, side: int) -> Image.Image:
        image = decode_image(preview).convert("RGBA")
        zoom = side / max(image.size)
        smooth = Image.Resampling.NEAREST if zoom > 2 else Image.Resampling.LANCZOS
        image = image.resize((max(round(image.width * zoom), 1), max(round(image.height * zoom), 1)), smooth)
        tile = blank_tile(side)
        tile.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
        return tile

    def message_part(self, data: bytes, form: str) -> dict[str, Any]:
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/{form};base64,{base64.b64encode(data).decode()}"},
        }

    def simple_features(self, samples: Sequence[np.ndarray], bands: int) -> np.ndarray:
        return image_features(samples)

    def pack(self, value: Image.Image) -> Packed:
        """An image whose longer side is above SIDE is reduced by a whole factor."""
        value = value.reduce(-(-max(value.size) // SIDE)) if max(value.size) > SIDE else value
        return Packed({"mode": value.mode, "width": value.width, "height": value.height}, value.tobytes())

    def unpack(self, packed: Packed) -> Image.Image:
        facts = packed.facts
        return Image.frombytes(facts["mode"], (facts["width"], facts["height"]), packed.body)


IMAGE = ImageFiles()


@dataclass(frozen=True)
class _Decoded:
    """An image as it is decoded.

    Attributes:
        image: In mode L, LA, RGB or RGBA, upright.
        width: Of the file, upright, whatever the image was reduced to.
        height: Likewise.
        scale: How many pixels of the file a side of one of the image stands for.
    """

    image: Image.Image
    width: int
    height: int
    scale: int


def decode_image(data: bytes | Path, limits: Limits = LIMITS) -> Image.Image:
    """The first frame of an image file in mode L, LA, RGB or RGBA, 8 bits a channel, upright.

    Raises MediaError where it is damaged, of another format or larger than the limits, before memory is asked for.
    """
    return _decoded(data, limits, small=False).image


def _decoded(data: bytes | Path, limits: Limits, small: bool) -> _Decoded:
    """`decode_image`; `small` lets a JPEG be reduced to what a fingerprint needs."""
    data, form = IMAGE.read(data, limits)
    if form.name == "webp":
        _check_size(_webp_size(data), limits)
    _register(form)
    try:
        try:
            return _decode(data, form, limits, small)
        except MediaError:
            raise
        except MemoryError as error:
            raise MediaError("needs too much memory", RejectKind.NO_MEMORY) from error
        except Exception:
            # Text, profiles and previews that a file carries along do not spoil its pixels.
            bare = _without_metadata(data, form.name)
            if bare is None:
                raise
            return _decode(bare, form, limits, small)
    except MediaError:
        raise
    except MemoryError as error:
        raise MediaError("needs too much memory", RejectKind.NO_MEMORY) from error
    except Image.DecompressionBombError as error:
        raise MediaError(f"more than {limits.pixels / 1e6:g} million pixels", RejectKind.TOO_LARGE) from error
    # Pillow's parsers raise nearly every built-in class on damaged files.
    except Exception as error:
        raise MediaError(f"damaged {form.name}: {short(error)}") from error


def _register(form: Format) -> None:
    """Make Pillow know a format of the extra `media`."""
    if form.name == "heic":
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
    elif form.name == "jxl":
        import pillow_jxl  # noqa: F401 - it registers itself


_TURNED = (5, 6, 7, 8)  # orientations that exchange the sides
_SINGLE = ("JPEG", "PNG", "BMP")  # formats of which Pillow keeps nothing beside the pixels once they are loaded


def _decode(data: bytes, form: Format, limits: Limits, small: bool) -> _Decoded:
    pillow_name = {"heic": "HEIF"}.get(form.name, form.name.upper())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oddities of metadata; the size is checked here, by our own limit
        with Image.open(io.BytesIO(data), formats=[pillow_name]) as image:
            _check_size(image.size, limits)
            width, height = image.size
            scale = _first_reduction(image.size) if small and pillow_name == "JPEG" else 1
            if scale > 1:
                image.draft(None, (width // scale, height // scale))
                scale = round(width / image.width)
            image.load()
            _check_size(image.size, limits)
            if scale == 1:
                width, height = image.size  # as some decoders know it only now
            with contextlib.suppress(Exception):  # a broken EXIF block does not spoil the image
                before, turned = image.size, False
                if before[0] == before[1] and width != height:  # nothing will show whether it was turned
                    turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
                ImageOps.exif_transpose(image, in_place=True)
                if turned or image.size != before:
                    width, height = height, width
            target = _target_mode(image)
            if target is None:
                return _Decoded(_eight_bits(image), width, height, scale)
            if image.mode != target:
                return _Decoded(image.convert(target), width, height, scale)
            # What is loaded stays when the file is closed; a copy would take as long as decoding does.
            return _Decoded(image if pillow_name in _SINGLE else image.copy(), width, height, scale)


def _target_mode(image: Image.Image) -> str | None:
    """The mode that an image becomes; None where its values have more than 8 bits."""
    mode, clear = image.mode, "transparency" in image.info
    if mode in ("F", "I") or mode.startswith("I;"):
        return None
    if mode in ("LA", "RGBA") or (mode in ("L", "RGB") and not clear):
        return mode
    if mode in ("1", "L", "La"):
        return "LA" if clear or mode == "La" else "L"
    return "RGBA" if clear or mode in ("PA", "RGBa") else "RGB"


def _check_size(size: tuple[int, int] | None, limits: Limits) -> None:
    if size is not None and size[0] * size[1] > limits.pixels:
        raise MediaError(
            f"{size[0]} x {size[1]} pixels, more than {limits.pixels / 1e6:g} million", RejectKind.TOO_LARGE
        )
    if size is not None and min(size) < 1:
        raise MediaError("the image has no pixels", RejectKind.EMPTY)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from a WebP header: Pillow's decoder allocates the canvas already on opening."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit, 32-bit or float grey image scaled to mode L.

    A file of 16 bits says what white is. One of 32 bits or of floats does not: values up to 1 (floats), to 255 and to
    65,535 are taken for the scales that these numbers suggest.
    """
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise MediaError("pixels that are not numbers", RejectKind.BAD_VALUE)
    top = float(values.max(initial=0))
    if image.mode.startswith("I;"):
        scale = 1 / 257
    elif values.dtype.kind == "f" and top <= 1.0:
        scale = 255.0
    else:
        scale = 1.0 if top <= 255.0 else 1 / 257
    values = values.astype(np.float32) * np.float32(scale)
    if values.max(initial=0) > 255.5 or values.min(initial=0) < -0.5:
        raise MediaError("pixel values beyond 16 bits", RejectKind.BAD_VALUE)
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


# --- metadata ---------------------------------------------------------------------------------------------------


def _without_metadata(data: bytes, name: str) -> bytes | None:
    """The file without what is not needed for its pixels, or None where this is not known of its format."""
    strip = {"png": _bare_png, "jpeg": _bare_jpeg, "webp": _bare_webp}.get(name)
    try:
        return strip(data) if strip else None
    except (struct.error, IndexError):
        return None


def _bare_png(data: bytes) -> bytes:
    """Without texts, profiles and EXIF; a bad checksum of what is left is still an error."""
    kept, at = [data[:8]], 8
    while at + 12 <= len(data):
        size = struct.unpack_from(">I", data, at)[0]
        if data[at + 4 : at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf"):
            kept.append(data[at : at + 12 + size])
        elif (
            data[at + 4 : at + 8] == b"eXIf"
            and zlib.crc32(data[at + 4 : at + 8 + size]) == struct.unpack_from(">I", data, at + 8 + size)[0]
        ):
            kept.append(data[at : at + 12 + size])  # it says which side is up
        at += 12 + size
    return b"".join(kept)


def _bare_jpeg(data: bytes) -> bytes:
    """Without comments and application segments, but for those of JFIF and Adobe, which say what the colours are."""
    kept, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker = data[at + 1]
        size = 2 + struct.unpack_from(">H", data, at + 2)[0]
        if not (0xE1 <= marker <= 0xEF or marker == 0xFE) or marker == 0xEE:
            kept.append(data[at : at + size])
        at += size
    return b"".join([*kept, data[at:]])


def _bare_webp(data: bytes) -> bytes:
    """Without colour profile, EXIF and XMP."""
    kept, at = [], 12
    while at + 8 <= len(data):
        size = struct.unpack_from("<I", data, at + 4)[0]
        size += size & 1
        if data[at : at + 4] not in (b"ICCP", b"EXIF", b"XMP "):
            kept.append(data[at : at + 8 + size])
        at += 8 + size
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


# --- encoding and fingerprints ----------------------------------------------------------------------------------


def blank_tile(side: int) -> Image.Image:
    """The ground on which a medium is shown, `side` pixels a side."""
    return Image.new("RGB", (side, side), (244, 245, 248))


def encode_png(image: Image.Image | np.ndarray) -> bytes:
    """The image (PIL, or uint8 array H x W or H x W x channels) as PNG bytes, lossless."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _first_reduction(size: tuple[int, int]) -> int:
    """The whole number by which a side may be divided first on the way to a fingerprint: 1, 2, 4 or 8, as JPEG decoders
    do, who then make the means of as many pixels."""
    most = min(size) // (2 * PRINT_SIDE)
    return next(scale for scale in (8, 4, 2, 1) if scale <= max(most, 1))


def image_fingerprint(image: Image.Image, scale: int = 1) -> bytes:
    """Brightness (24 x 24) and two colour planes (8 x 8 each) of an image over white: 704 x uint8. `scale` is what its
    sides were divided by already."""
    if scale == 1 and (factor := _first_reduction(image.size)) > 1:
        image = image.reduce(factor)
    if (factor := min(image.size) // (2 * PRINT_SIDE)) > 1:
        image = image.reduce(factor)
    if image.mode in ("LA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    small = image.convert("RGB").resize((PRINT_SIDE, PRINT_SIDE), Image.Resampling.BOX).convert("YCbCr")
    colour = small.resize((CHROMA, CHROMA), Image.Resampling.BOX).tobytes()
    return small.tobytes()[::3] + colour[1::3] + colour[2::3]
