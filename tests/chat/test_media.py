import hashlib
import json
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from baltoro.chat.media import MediaSpec, fitted_size, preprocess_clip, preprocess_image, timestamp
from baltoro.chat.messages import Clip, Image

K25 = MediaSpec.K25


def small(patch_limit: int) -> MediaSpec:
    return MediaSpec(
        patch_size=14,
        merge=2,
        patch_limit=patch_limit,
        side_limit=512,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.25, 1.0),
        frames_per_chunk=4,
    )


def gradient() -> Image:
    x, y = np.meshgrid(np.arange(32), np.arange(48))
    channels = [7 * x + 3 * y + 11, 5 * x + 13 * y + 29, 17 * x + 9 * y + 47]
    return Image((np.stack(channels, axis=-1) % 256).astype(np.uint8))


def checkerboard() -> Image:
    x, y = np.meshgrid(np.arange(57), np.arange(33))
    colours = np.array([(20, 40, 220), (235, 190, 25)], np.uint8)
    return Image(colours[(x // 5 + y // 5) % 2])


def golden_hash(patches: NDArray[np.float32]) -> str:
    """The hash of LMDeploy's gate: a JSON header, NUL, and the pixels as little-endian bfloat16."""
    bits = patches.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
    header = json.dumps({"dtype": "bfloat16", "shape": patches.shape}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(header.encode() + b"\0" + rounded.astype("<u2").tobytes()).hexdigest()


def reassembled(patches: NDArray[np.float32], h: int, w: int) -> NDArray[np.float32]:
    """[height, width, 3] from one frame's patches, patch by patch."""
    p = patches.shape[-1]
    picture = np.zeros((h * p, w * p, 3), np.float32)
    for n, patch in enumerate(patches):
        row, column = n // w * p, n % w * p
        picture[row : row + p, column : column + p] = np.moveaxis(patch, 0, -1)
    return picture


def bicubic(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Axis 0 resampled to `size` as PIL does it: Catmull-Rom (a = -1/2), widened by the scale when shrinking, weights
    normalised and rounded to 22 bits, the sum rounded and clipped to bytes."""
    length = len(pixels)
    scale = length / size
    stretch = max(scale, 1.0)
    rows: list[NDArray[np.int64]] = []
    for i in range(size):
        centre = (i + 0.5) * scale
        first = max(0, int(centre - 2 * stretch + 0.5))
        last = min(length, int(centre + 2 * stretch + 0.5))
        x = np.abs((np.arange(first, last) - centre + 0.5) / stretch)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights = weights / sum(weights.tolist()) * 2**22
        fixed = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int64)
        rows.append(np.tensordot(fixed, pixels[first:last].astype(np.int64), 1))
    return ((np.stack(rows) + 2**21) >> 22).clip(0, 255).astype(np.uint8)


def test_pixels_of_the_release() -> None:
    first, second = preprocess_image(gradient(), K25), preprocess_image(checkerboard(), K25)
    assert (first.grid_thw, second.grid_thw) == ((1, 4, 4), (1, 4, 6))
    assert (K25.tokens(first.grid_thw), K25.tokens(second.grid_thw)) == (4, 6)
    assert golden_hash(first.patches) == "37ae1786eb941cb4b9695c9f78b71996cfdfbb34870b2269a9f2cee08d7b0c52"
    assert golden_hash(second.patches) == "589f703f2e54ba8b231cb09347606dd2076f956533da9b6b27646ffe2ca86478"
    both = np.concatenate([first.patches, second.patches])
    assert golden_hash(both) == "8e994c980d348996607426291292b50facc4b22316bd94229484910123275f62"


@pytest.mark.parametrize(
    ("width", "height", "limit", "size", "grid"),
    [
        # 10 x 4 patches, scale sqrt(16 / 40) = 0.632: 88.5 x 35.4, padded to 112 x 56: 32 patches, above the limit
        (140, 56, 16, (88, 35), (1, 4, 8)),
        (56, 140, 16, (35, 88), (1, 8, 4)),
        # 8000 wide is scaled by 7168 / 8000 = 0.896: 12.5 high
        (8000, 14, 16384, (7168, 12), (1, 2, 512)),
        (14, 8000, 16384, (12, 7168), (1, 512, 2)),
        # 3 x 2800 pixels count as 1 x 200 patches: scale sqrt(2 / 200) = 0.1, and no side falls to 0
        (3, 2800, 2, (1, 280), (1, 20, 2)),
        (1, 1, 16384, (1, 1), (1, 2, 2)),
        (1000, 1000, 16384, (1000, 1000), (1, 72, 72)),
    ],
)
def test_size_and_grid(width: int, height: int, limit: int, size: tuple[int, int], grid: tuple[int, int, int]) -> None:
    assert fitted_size(width, height, K25, limit, 512) == size
    assert preprocess_image(Image(np.zeros((height, width, 3), np.uint8)), small(limit)).grid_thw == grid


@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 40), st.integers(0, 2**32 - 1))
@example(140, 56, 16, 0)
@example(97, 69, 13, 0)  # where Pillow 13 alone would begin with the columns
def test_a_picture_is_resized_to_the_last_bit_and_padded(width: int, height: int, limit: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    item = preprocess_image(Image(pixels), small(limit))
    _, h, w = item.grid_thw
    new_width, new_height = fitted_size(width, height, K25, limit, 512)
    narrowed = bicubic(pixels.transpose(1, 0, 2), new_width).transpose(1, 0, 2)
    padded = np.zeros((h * 14, w * 14, 3))
    padded[:new_height, :new_width] = bicubic(narrowed, new_height)
    values = (padded / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 1.0]
    np.testing.assert_allclose(reassembled(item.patches, h, w), values, atol=1e-6)  # one byte more is 4e-3 more


def test_a_wide_picture_stays_wide() -> None:
    # The right quarter is bright. 200 x 50 patches shrink by sqrt(400 / 10,000) = 0.2 to 40 x 10, 560 x 140 pixels.
    pixels = np.zeros((700, 2800, 3), np.uint8)
    pixels[:, 2100:] = 255
    item = preprocess_image(Image(pixels), replace(K25, patch_limit=400))
    assert item.grid_thw == (1, 10, 40)
    picture = reassembled(item.patches, 10, 40)[..., 0]
    assert (picture[:, :415] < -0.99).all()
    assert (picture[:, 425:] > 0.99).all()


def test_the_largest_picture_is_held_twice_at_most() -> None:
    pixels = np.zeros((1792, 1792, 3), np.uint8)
    tracemalloc.start()
    item = preprocess_image(Image(pixels), K25)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert item.patches.nbytes == 16384 * 588 * 4
    # once as bytes, once as float32
    assert peak < 1.3 * item.patches.nbytes


@given(st.integers(1, 20_000), st.integers(1, 20_000))
def test_never_enlarges_and_keeps_sides_within_bounds(width: int, height: int) -> None:
    new_width, new_height = fitted_size(width, height, K25, K25.patch_limit, 512)
    assert 1 <= new_width <= min(width, 7168)
    assert 1 <= new_height <= min(height, 7168)
    assert fitted_size(height, width, K25, K25.patch_limit, 512) == (new_height, new_width)


def test_a_clip_becomes_timestamped_chunks_of_four_sampled_frames() -> None:
    # 10 frames at 4 fps are sampled down to round(10 * 2 / 4) = 5: 0, 2.25, 4.5, 6.75, 9 -> 0, 2, 4, 7, 9
    frames = np.stack([np.full((28, 56, 3), 10 * i, np.uint8) for i in range(10)])
    (first_time, first), (second_time, second) = preprocess_clip(Clip(frames, 4.0), K25)
    assert (first_time, second_time) == ("00:00:00.000", "00:00:02.250")
    assert (first.grid_thw, second.grid_thw) == ((4, 2, 4), (1, 2, 4))
    assert K25.tokens(first.grid_thw) == K25.tokens(second.grid_thw) == 2
    shown = [*first.patches.reshape(4, -1), *second.patches.reshape(1, -1)]
    for values, frame in zip(shown, (0, 2, 4, 7, 9), strict=True):
        np.testing.assert_allclose(values, frame * 10 / 255 * 2 - 1, atol=1e-6)


def test_a_slow_clip_keeps_all_its_frames() -> None:
    chunks = preprocess_clip(Clip(np.zeros((5, 28, 28, 3), np.uint8), 0.5), K25)
    assert [(time, item.grid_thw[0]) for time, item in chunks] == [("00:00:00.000", 4), ("00:00:08.000", 1)]


def test_the_number_of_sampled_frames_is_rounded() -> None:
    # 7 frames at 3 fps: 7 * 2 / 3 = 4.67 -> 5 of them, 0 2 3 4 | 6
    chunks = preprocess_clip(Clip(np.zeros((7, 28, 28, 3), np.uint8), 3.0), K25)
    assert [(time, item.grid_thw[0]) for time, item in chunks] == [("00:00:00.000", 4), ("00:00:02.000", 1)]


def test_frames_have_a_smaller_limit_than_images() -> None:
    # 71 x 71 patches against 4096: scale 64 / 71, 901 pixels, padded to 924 = 66 patches
    [(_, item)] = preprocess_clip(Clip(np.zeros((1, 1000, 1000, 3), np.uint8), 2.0), K25)
    assert item.grid_thw == (1, 66, 66)


@given(st.integers(0, 80_000), st.sampled_from([1, 2, 3, 7, 24, 25, 29.97, 30, 60]))
def test_timestamps_are_those_of_a_utc_clock(frame: int, fps: float) -> None:
    clock = datetime.fromtimestamp(frame / fps, UTC)
    if clock.day == 1:
        assert timestamp(frame / fps) == f"{clock:%H:%M:%S}.{clock.microsecond // 1000:03d}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.57, "00:00:00.570"), (2 / 3, "00:00:00.666"), (59.9999999, "00:01:00.000"), (3661.9996, "01:01:01.999")],
)
def test_milliseconds_are_cut_off(seconds: float, text: str) -> None:
    assert timestamp(seconds) == text
