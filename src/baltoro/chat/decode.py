"""Image files to pixels. The bytes come from strangers, so what a header declares is checked before it is decoded."""

import io
from pathlib import Path

import numpy as np
from PIL import Image as PilImage
from PIL import ImageOps

from baltoro.chat.messages import Image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
PIXEL_LIMIT = 2**26
# Beyond it the longest side that the release admits (512 patches of 14 pixels) leaves less than a pixel of the other.
ASPECT_LIMIT = 512 * 14


def decode_image(data: bytes | Path) -> Image:
    """The picture as a viewer shows it: upright by its EXIF orientation, the first frame of an animation.

    Transparency lies on white, where the release's bare RGB conversion would reveal the colours hidden under it.
    ValueError says what is wrong with the file: not one of IMAGE_FORMATS, broken or truncated, more than PIXEL_LIMIT
    pixels, one side more than ASPECT_LIMIT times the other.
    """
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        try:
            picture = PilImage.open(file, formats=IMAGE_FORMATS)
        except PilImage.UnidentifiedImageError as error:
            formats = ", ".join(IMAGE_FORMATS)
            raise ValueError(f"not an image of {formats}, or its header is broken; convert it to PNG") from error
        except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning) as error:
            raise ValueError(f"image of more than {PIXEL_LIMIT} pixels; scale it down") from error
        except Exception as error:  # PIL raises whatever the bytes make it
            raise ValueError(f"broken image: {error}; save it anew") from error
        check_size("image", picture.width, picture.height)
        try:
            ImageOps.exif_transpose(picture, in_place=True)
            return Image(np.asarray(_rgb(picture)))
        except Exception as error:
            raise ValueError(f"broken {picture.format} image: {error}; save it anew") from error


def check_size(kind: str, width: int, height: int) -> None:
    if min(width, height) < 1:
        raise ValueError(f"{kind} of {width} x {height} pixels holds no picture")
    if width * height > PIXEL_LIMIT:
        raise ValueError(f"{kind} of {width} x {height} pixels: more than {PIXEL_LIMIT}; scale it down")
    if max(width, height) > ASPECT_LIMIT * min(width, height):
        raise ValueError(f"{kind} of {width} x {height} pixels: a side over {ASPECT_LIMIT} times the other; cut it")


def _rgb(picture: PilImage.Image) -> PilImage.Image:
    if picture.mode.startswith("I"):  # PIL would clip 16 bits to 255 instead of scaling them
        return PilImage.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        return PilImage.alpha_composite(PilImage.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")
