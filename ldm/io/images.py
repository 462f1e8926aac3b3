"""Pictures from files to uint8 RGB and back: every mode converted as a viewer would show it, nothing half-decoded."""

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin, features
from torch import Tensor

from ldm.io.files import read_bytes, replacing
from ldm.utils.errors import DataError

HAS_AVIF = "avif" in features.modules and features.check("avif")  # Pillow >= 11.3, as built
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF") + (("AVIF",) if HAS_AVIF else ())
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
MAX_BYTES = 128 << 20
MAX_PIXELS = 24_000_000  # decoded where nobody says otherwise
MOST_PIXELS = 2 * 89_478_485  # Pillow's own limit
MAX_ASPECT = 20
STRIP = 1 << 20  # pixels that are converted at a time: the conversions of a mode hold several copies
ORIENTATION = 0x0112  # of EXIF; 5 to 8 lie on their side
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
TILE_WIDTH, TILE_LENGTH = 322, 323  # of TIFF
PNG = b"\x89PNG\r\n\x1a\n"
WORDS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that say nothing of its pixels as they are read here

Size = tuple[int, int]  # height, width


def read_image(
    source: str | os.PathLike | bytes,
    *,
    background: tuple[int, int, int] = (255, 255, 255),  # shows where the image is transparent
    max_pixels: int = MAX_PIXELS,
    min_side: int | None = None,  # a JPEG may come out at 1/2, 1/4 or 1/8, no smaller than this: many times faster
    name: str | None = None,  # what errors call it, when source is bytes
) -> Tensor:
    """An image as uint8 RGB (3, H, W), upright and opaque; the first frame of an animation. Raises DataError."""
    with _opened(source, name, max_pixels) as image:
        return _decoded(image, background, min_side)


def read_sized_image(
    source: str | os.PathLike | bytes,
    *,
    background: tuple[int, int, int],
    max_pixels: int = MAX_PIXELS,
    min_side: int | None = None,
    name: str | None = None,
) -> tuple[Tensor, Size]:
    """As `read_image`, and the size of the image in its file, which with min_side may be another. Raises DataError."""
    with _opened(source, name, max_pixels) as image:
        size = image.size
        pixels = _decoded(image, background, min_side)
        return pixels, _upright(image, size)


def read_size(source: str | os.PathLike | bytes, *, max_pixels: int = MAX_PIXELS, name: str | None = None) -> Size:
    """The size of an image from the header of its file: no pixel is decoded. Raises DataError."""
    with _opened(source, name, max_pixels) as image:
        return _upright(image, image.size)


def _decoded(image: Image.Image, background: tuple[int, int, int], min_side: int | None) -> Tensor:
    if min_side:
        image.draft(image.mode, (min_side, min_side))
    image.load()
    turn = TURNS.get(_orientation(image))
    image = image if turn is None else image.transpose(turn)
    width, height = image.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, STRIP // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = image if rows >= height else image.crop((0, top, width, bottom))
        pixels[top:bottom] = np.asarray(_rgb(strip, background))
    return torch.from_numpy(pixels).permute(2, 0, 1)  # 3 H W


def _upright(image: Image.Image, size: tuple[int, int]) -> Size:
    """(width, height) as stored -> height and width as shown."""
    return size if _orientation(image) in range(5, 9) else size[::-1]


def _orientation(image: Image.Image) -> int:
    """How the picture lies, 1 to 8; upright where its EXIF is damaged, as viewers show it."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged table ends in any of half a dozen types
        return 1


@contextmanager
def _opened(source: str | os.PathLike | bytes, name: str | None, max_pixels: int) -> Iterator[Image.Image]:
    """An image of which only the header is read so far; whatever goes wrong with it is a DataError."""
    name = name or ("image" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else read_bytes(source, max_bytes=MAX_BYTES)
    data = _without_words(data) if data.startswith(PNG) else data
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.size, max_pixels)
                _check_tile(image, max_pixels)
                yield image
    except Exception as error:  # decoders end in any of a dozen types
        reason = str(error).replace("\n", " ") or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not a {', '.join(FORMATS)} file"
        raise DataError(f"{name}: cannot be read as an image ({reason[:200]})") from error


def write_png(path: str | os.PathLike, image: Tensor, text: Mapping[str, str] | None = None) -> None:
    """A uint8 (3, H, W) or (1, H, W) tensor as PNG, in one step, with Unicode text chunks. Raises DataError."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise DataError(f"{path}: an image is uint8 (3, H, W) or (1, H, W), not {image.dtype} {tuple(image.shape)}")
    pixels = image.detach().cpu().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()  # H W 3
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_itxt(key, value)
    try:
        with replacing(Path(path)) as file:
            Image.fromarray(pixels).save(file, format="PNG", pnginfo=chunks)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def read_png_text(path: str | os.PathLike) -> dict[str, str]:
    """The text chunks of a PNG file. Raises DataError."""
    try:
        with Image.open(io.BytesIO(read_bytes(path, max_bytes=MAX_BYTES)), formats=("PNG",)) as image:
            _check_size(image.size, MAX_PIXELS)
            image.load()  # chunks may follow the pixels
            return {key: str(value) for key, value in image.text.items()}
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read as PNG ({error})") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a bomb by its header, before anything is decoded."""
    width, height = size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, at most {max_pixels:,} are decoded")
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(f"{width} x {height} pixels, an aspect ratio above {MAX_ASPECT}")


def _check_tile(image: Image.Image, max_pixels: int) -> None:
    """Refuse a TIFF whose tiles, in which it is decoded, are far larger than itself."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    width, height = tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)
    if width * height > max_pixels:
        raise ValueError(f"tiles of {width} x {height} pixels, at most {max_pixels:,} are decoded")


def _without_words(data: bytes) -> bytes:
    """A PNG without its texts and profiles, which may be damaged or longer than Pillow reads."""
    parts, start, at = [], 0, len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] in WORDS:
            parts.append(data[start:at])
            start = end
        at = end
    return b"".join([*parts, data[start:]]) if parts else data


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = _grey16(image)
    if image.mode == "F":
        raise ValueError("pixels that are fractions, whose range nobody knows; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")  # 1, L, P, CMYK, YCbCr


def _grey16(image: Image.Image) -> Image.Image:
    """16-bit grey, perhaps with one transparent value, to 8 bits: 65535 / 257 = 255."""
    values = np.asarray(image, dtype=np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise ValueError("pixels of 32 bits, whose range nobody knows; save it with 8 or 16 bits")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(opaque)))
