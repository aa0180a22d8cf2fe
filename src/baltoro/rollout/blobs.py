"""The folder beside a file of episodes: pictures, clips, patches and the tokenizer, each stored once, by hash."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image as PillowImage

from baltoro.agent.trace import media_hash
from baltoro.chat.messages import Clip, Image, MediaItem
from baltoro.chat.tokenizer import Tokenizer

_NAME = re.compile(r"[0-9a-f]{32}")


class Blobs:
    """Files appear whole or not at all, and are never rewritten. Reading raises ValueError for what is no hash, and
    OSError for what is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put_image(self, image: Image) -> str:
        return self._put(media_hash(image), "png", lambda file: PillowImage.fromarray(image.pixels).save(file, "PNG"))

    def image(self, name: str) -> Image:
        with PillowImage.open(self._path(name, "png")) as picture:
            return Image(np.asarray(picture.convert("RGB")))

    def put_clip(self, clip: Clip) -> str:
        return self._put(
            media_hash(clip), "npz", lambda file: np.savez_compressed(file, frames=clip.frames, fps=clip.fps)
        )

    def clip(self, name: str) -> Clip:
        with np.load(self._path(name, "npz")) as arrays:
            return Clip(arrays["frames"], float(arrays["fps"]))

    def put_item(self, item: MediaItem) -> str:
        digest = hashlib.blake2b(f"item {item.grid_thw} {item.patches.shape}".encode(), digest_size=16)
        digest.update(item.patches.tobytes())
        return self._put(
            digest.hexdigest(),
            "npz",
            lambda file: np.savez_compressed(file, patches=item.patches, grid_thw=np.array(item.grid_thw)),
        )

    def item(self, name: str) -> MediaItem:
        with np.load(self._path(name, "npz")) as arrays:
            t, h, w = (int(side) for side in arrays["grid_thw"])
            return MediaItem(arrays["patches"], (t, h, w))

    def put_video(self, data: bytes) -> str:
        return self._put(hashlib.blake2b(data, digest_size=16).hexdigest(), "video", lambda file: file.write(data))

    def video(self, name: str) -> bytes:
        return self._path(name, "video").read_bytes()

    def put_tokenizer(self, tokenizer: Tokenizer) -> str:
        data = tokenizer.to_bytes()
        return self._put(hashlib.blake2b(data, digest_size=16).hexdigest(), "tiktoken", lambda file: file.write(data))

    def tokenizer(self, name: str) -> Tokenizer:
        return Tokenizer.load(self._path(name, "tiktoken"))

    def _path(self, name: str, kind: str) -> Path:
        if not _NAME.fullmatch(name):  # a file of episodes may come from a stranger
            raise ValueError(f"{name[:40]!r} is no hash; the file is damaged")
        return self.folder / f"{name}.{kind}"

    def _put(self, name: str, kind: str, write: Callable[[BinaryIO], object]) -> str:
        path = self._path(name, kind)
        if path.exists():
            return name
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
        return name
