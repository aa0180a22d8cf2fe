"""From pixels to patches: the released image and video preprocessing (model.md section 7), PIL and numpy only."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from baltoro.chat.messages import Clip, Image, MediaItem


@dataclass(frozen=True)
class MediaSpec:
    """How a vision tower wants its input.

    patch_size: pixels per patch side. merge: patches per media-token side. mean, std: per RGB channel, for pixel values
    in [0, 1]. patch_limit: most patches of one image before padding; frame_patch_limit: the same for one frame of a
    clip or video. side_limit, frame_side_limit: most patches along one side. sample_fps: highest frame rate of a clip;
    uniform_frames, if not 0, replaces it: that many frames evenly spread, however long the clip is.
    """

    patch_size: int
    merge: int
    patch_limit: int
    side_limit: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frames_per_chunk: int
    frame_patch_limit: int = 4096
    frame_side_limit: int = 512
    sample_fps: float = 2.0
    uniform_frames: int = 0

    K25: ClassVar[Self]
    K25_SHORT_VIDEO: ClassVar[Self]
    K25_LONG_VIDEO: ClassVar[Self]

    def tokens(self, grid_thw: tuple[int, int, int]) -> int:
        """Media tokens of one item; temporal pooling makes them independent of t."""
        _, h, w = grid_thw
        return (h // self.merge) * (w // self.merge)


MediaSpec.K25 = MediaSpec(
    patch_size=14,
    merge=2,
    patch_limit=16384,
    side_limit=512,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    frames_per_chunk=4,
)
# The report's settings for video benchmarks (App. E.4): 128 frames at 896 pixels, 2,048 frames at 448 pixels. They are
# read as the area of a square of that side, which is what the released processor limits; a `frame_side_limit` of
# 896 / 14 or 448 / 14 gives the other reading, the longest side.
MediaSpec.K25_SHORT_VIDEO = replace(MediaSpec.K25, uniform_frames=128, frame_patch_limit=(896 // 14) ** 2)
MediaSpec.K25_LONG_VIDEO = replace(MediaSpec.K25, uniform_frames=2048, frame_patch_limit=(448 // 14) ** 2)


def preprocess_image(image: Image, spec: MediaSpec) -> MediaItem:
    return _item([_fitted(image.pixels, spec, spec.patch_limit, spec.side_limit)], spec)


def preprocess_clip(clip: Clip, spec: MediaSpec) -> list[tuple[str, MediaItem]]:
    indices = sample_frames(len(clip.frames), clip.fps, spec)
    return list(preprocess_frames(((i / clip.fps, clip.frames[i]) for i in indices), spec))


def sample_frames(frames: int, fps: float, spec: MediaSpec) -> list[int]:
    """Which frames of a clip of constant frame rate the model sees, evenly spread from the first to the last."""
    kept = min(spec.uniform_frames, frames) or max(round(frames * min(spec.sample_fps, fps) / fps), 1)
    return np.round(np.linspace(0, frames - 1, kept)).astype(int).tolist()


def preprocess_frames(
    frames: Iterable[tuple[float, NDArray[np.uint8]]], spec: MediaSpec
) -> Iterator[tuple[str, MediaItem]]:
    """Cuts sampled frames, each with its time in seconds, into chunks with the timestamp of their first frame.

    Lazy: each frame is shrunk as it arrives, and no more than one chunk is held.
    """
    shrunk = (
        (seconds, _fitted(pixels, spec, spec.frame_patch_limit, spec.frame_side_limit)) for seconds, pixels in frames
    )
    while chunk := list(islice(shrunk, spec.frames_per_chunk)):
        yield timestamp(chunk[0][0]), _item([pixels for _, pixels in chunk], spec)


def timestamp(seconds: float) -> str:
    """`HH:MM:SS.mmm`; milliseconds are cut off, not rounded, from the nearest microsecond."""
    milliseconds = round(seconds * 1e6) // 1000
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


def fitted_size(width: int, height: int, spec: MediaSpec, patch_limit: int, side_limit: int) -> tuple[int, int]:
    """(width, height) after shrinking to the limits and before padding; never larger than the input.

    The limit counts whole patches of the unpadded picture, so padding may exceed it slightly, as in the release.
    """
    side = side_limit * spec.patch_size
    patches = max(1, width // spec.patch_size) * max(1, height // spec.patch_size)
    scale = min(1.0, math.sqrt(patch_limit / patches), side / width, side / height)
    return min(max(1, int(width * scale)), side), min(max(1, int(height * scale)), side)


def _fitted(pixels: NDArray[np.uint8], spec: MediaSpec, patch_limit: int, side_limit: int) -> NDArray[np.uint8]:
    """The picture shrunk to the limits and padded to whole media tokens, still in bytes."""
    height, width = pixels.shape[:2]
    size = fitted_size(width, height, spec, patch_limit, side_limit)
    if size != (width, height):
        # In two steps, since Pillow 13 may begin with the columns, where the Pillow of the release began with the rows.
        rows = PilImage.fromarray(pixels).resize((size[0], height), PilImage.Resampling.BICUBIC)
        pixels = np.asarray(rows.resize(size, PilImage.Resampling.BICUBIC))
    cell = spec.patch_size * spec.merge
    # Padding comes before normalisation, so that it is black, not grey.
    return np.pad(pixels, ((0, -size[1] % cell), (0, -size[0] % cell), (0, 0)))


def _item(frames: list[NDArray[np.uint8]], spec: MediaSpec) -> MediaItem:
    p = spec.patch_size
    h, w = frames[0].shape[0] // p, frames[0].shape[1] // p
    values = np.empty((len(frames), h, w, 3, p, p), np.float32)
    for grid, pixels in zip(values, frames, strict=True):
        grid[:] = pixels.reshape(h, p, w, p, 3).transpose(0, 2, 4, 1, 3)
    # In place: at the limits these are 39 MB a picture.
    values /= np.float32(255)
    values -= np.array(spec.mean, np.float32)[:, None, None]
    values /= np.array(spec.std, np.float32)[:, None, None]
    return MediaItem(values.reshape(-1, 3, p, p), (len(frames), h, w))


def pixels_of(item: MediaItem, spec: MediaSpec) -> NDArray[np.uint8]:
    """What the vision tower sees of an item, padding included: uint8 RGB [frames, height, width, 3]."""
    t, h, w = item.grid_thw
    p = spec.patch_size
    values = item.patches.reshape(t, h, w, 3, p, p).transpose(0, 1, 4, 2, 5, 3).reshape(t, h * p, w * p, 3)
    values = (values * np.array(spec.std, np.float32) + np.array(spec.mean, np.float32)) * np.float32(255)
    return values.round().clip(0, 255).astype(np.uint8)
