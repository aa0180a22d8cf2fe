"""Pictures as text: PNG in data: URIs."""

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PillowImage

from baltoro.chat.messages import Image

PREFIX = "data:image/png;base64,"


def data_uri(pixels: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels).save(buffer, "PNG")
    return PREFIX + base64.b64encode(buffer.getvalue()).decode()


def from_data_uri(text: str) -> Image:
    """Raises ValueError for what is no PNG."""
    try:
        data = base64.b64decode(text.removeprefix(PREFIX), validate=True)
        with PillowImage.open(io.BytesIO(data), formats=["PNG"]) as picture:
            return Image(np.asarray(picture.convert("RGB")))
    except OSError as error:
        raise ValueError(f"no picture: {error}") from None
