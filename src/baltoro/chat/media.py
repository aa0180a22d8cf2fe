"""From pixels to patches: the released image and video preprocessing (model.md section 7), PIL and numpy only."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage

from baltoro.chat.messages import Clip, Image, MediaItem


@dataclass(frozen=True)
class MediaSpec:
    """How a vision tower wants its input.

    patch_size: pixels per patch side. merge: patches per media-token side. patch_limit: most patches of one image
    before padding; frame_patch_limit: the same for one frame of a clip. side_limit: most patches along one side.
    sample_fps: highest frame rate of a clip. mean, std: per RGB channel, for pixel values in [0, 1].
    """

    patch_size: int
    merge: int
    patch_limit: int
    side_limit: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frames_per_chunk: int
    frame_patch_limit: int = 4096
    sample_fps: float = 2.0

    K25: ClassVar[Self]

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


def preprocess_image(image: Image, spec: MediaSpec) -> MediaItem:
    return _item([image.pixels], spec, spec.patch_limit)


def preprocess_clip(clip: Clip, spec: MediaSpec) -> list[tuple[str, MediaItem]]:
    """Samples the clip down to `sample_fps` and cuts it into chunks, each with the timestamp of its first frame."""
    frames = len(clip.frames)
    kept = max(round(frames * min(spec.sample_fps, clip.fps) / clip.fps), 1)
    indices = np.round(np.linspace(0, frames - 1, kept)).astype(int).tolist()
    chunks = [indices[i : i + spec.frames_per_chunk] for i in range(0, kept, spec.frames_per_chunk)]
    return [
        (timestamp(chunk[0] / clip.fps), _item([clip.frames[i] for i in chunk], spec, spec.frame_patch_limit))
        for chunk in chunks
    ]


def timestamp(seconds: float) -> str:
    """`HH:MM:SS.mmm`; milliseconds are cut off, not rounded, from the nearest microsecond."""
    milliseconds = round(seconds * 1e6) // 1000
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}.{milliseconds % 1000:03d}"


def fitted_size(width: int, height: int, spec: MediaSpec, patch_limit: int) -> tuple[int, int]:
    """(width, height) after shrinking to the limits and before padding; never larger than the input.

    The limit counts whole patches of the unpadded picture, so padding may exceed it slightly, as in the release.
    """
    side = spec.side_limit * spec.patch_size
    patches = max(1, width // spec.patch_size) * max(1, height // spec.patch_size)
    scale = min(1.0, math.sqrt(patch_limit / patches), side / width, side / height)
    return min(max(1, int(width * scale)), side), min(max(1, int(height * scale)), side)


def _item(frames: list[NDArray[np.uint8]], spec: MediaSpec, patch_limit: int) -> MediaItem:
    grids = list(_frame_grids(frames, spec, patch_limit))
    h, w = grids[0].shape[:2]
    patches = np.concatenate([grid.reshape(h * w, 3, spec.patch_size, spec.patch_size) for grid in grids])
    return MediaItem(patches, (len(frames), h, w))


def _frame_grids(frames: list[NDArray[np.uint8]], spec: MediaSpec, limit: int) -> Iterator[NDArray[np.float32]]:
    """Each frame as float32 [h, w, 3, patch, patch]."""
    p, cell = spec.patch_size, spec.patch_size * spec.merge
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    for pixels in frames:
        height, width = pixels.shape[:2]
        size = fitted_size(width, height, spec, limit)
        if size != (width, height):
            pixels = np.asarray(PilImage.fromarray(pixels).resize(size, PilImage.Resampling.BICUBIC))
        # Padding comes before normalisation, so that it is black, not grey.
        pixels = np.pad(pixels, ((0, -size[1] % cell), (0, -size[0] % cell), (0, 0)))
        values: NDArray[np.float32] = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        h, w = values.shape[0] // p, values.shape[1] // p
        yield values.reshape(h, p, w, p, 3).transpose(0, 2, 4, 1, 3)
