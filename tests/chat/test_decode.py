"""Image files, all written here with PIL or byte by byte."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as PilImage

from baltoro.chat.decode import PIXEL_LIMIT, decode_image

RNG = np.random.default_rng(0)
# Four flat quarters of different colours, 24 high and 40 wide, so that no turn or flip looks like another.
QUARTERS = (
    np.array([[(250, 10, 10), (10, 250, 10)], [(10, 10, 250), (240, 240, 20)]], np.uint8).repeat(12, 0).repeat(20, 1)
)


def saved(picture: PilImage.Image | NDArray[np.uint8], kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (picture if isinstance(picture, PilImage.Image) else PilImage.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(orientation: int) -> PilImage.Exif:
    exif = PilImage.Exif()
    exif[0x0112] = orientation
    return exif


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG file by the letter of its specification, whatever its header claims."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("orientation", "stored"),  # by the EXIF standard: which edge of the scene row 0 and column 0 show
    [
        (1, QUARTERS),  # top, left
        (2, QUARTERS[:, ::-1]),  # top, right
        (3, QUARTERS[::-1, ::-1]),  # bottom, right
        (4, QUARTERS[::-1]),  # bottom, left
        (5, QUARTERS.transpose(1, 0, 2)),  # left, top
        (6, QUARTERS[:, ::-1].transpose(1, 0, 2)),  # right, top
        (7, QUARTERS[::-1, ::-1].transpose(1, 0, 2)),  # right, bottom
        (8, QUARTERS[::-1].transpose(1, 0, 2)),  # left, bottom
    ],
)
@pytest.mark.parametrize(("kind", "tolerance"), [("JPEG", 12), ("PNG", 0)])
def test_the_picture_stands_upright(orientation: int, stored: NDArray[np.uint8], kind: str, tolerance: int) -> None:
    data = saved(np.ascontiguousarray(stored), kind, exif=oriented(orientation), quality=95, subsampling=0)
    np.testing.assert_allclose(decode_image(data).pixels.astype(int), QUARTERS, atol=tolerance)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP"])
def test_formats_without_loss_give_back_their_pixels(kind: str, tmp_path: Path) -> None:
    data = saved(QUARTERS, kind, lossless=True)
    (tmp_path / "picture").write_bytes(data)
    np.testing.assert_array_equal(decode_image(data).pixels, QUARTERS)
    np.testing.assert_array_equal(decode_image(tmp_path / "picture").pixels, QUARTERS)


def test_transparency_lies_on_white() -> None:
    # red at alpha 255, 128 and 0: 255 - alpha of white, 255 * 127 / 255 = 127
    pixels = np.array([[(255, 0, 0, 255), (255, 0, 0, 128), (255, 0, 0, 0)]], np.uint8)
    expected = [[[255, 0, 0], [255, 127, 127], [255, 255, 255]]]
    assert decode_image(saved(pixels, "PNG")).pixels.tolist() == expected
    assert decode_image(saved(pixels, "WEBP", lossless=True, exact=True)).pixels.tolist() == expected
    grey = np.array([[(9, 255), (0, 0)]], np.uint8)
    assert decode_image(saved(PilImage.fromarray(grey, "LA"), "PNG")).pixels.tolist() == [[[9] * 3, [255] * 3]]


def test_a_transparent_palette_entry_is_white() -> None:
    picture = PilImage.fromarray(np.array([[0, 1, 2]], np.uint8))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for kind in ("GIF", "PNG"):
        data = saved(picture, kind, transparency=1)
        assert decode_image(data).pixels.tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_sixteen_bits_are_scaled_to_eight() -> None:
    values = (0, 255, 256, 7 * 256 + 255, 0x8000, 0xFFFF)
    eight = (0, 0, 1, 7, 128, 255)
    grey = png(6, 1, 16, 0, b"\0" + struct.pack(">6H", *values))
    assert decode_image(grey).pixels[0, :, 0].tolist() == list(eight)
    rgb = png(2, 1, 16, 2, b"\0" + struct.pack(">6H", *values))
    assert decode_image(rgb).pixels.ravel().tolist() == list(eight)


def test_black_and_white_and_ink() -> None:
    bits = png(10, 1, 1, 0, b"\0" + bytes([0b10110000, 0b01000000]))
    assert decode_image(bits).pixels[0, :, 1].tolist() == [255, 0, 255, 255, 0, 0, 0, 0, 0, 255]
    # No ink is white, all ink is black, cyan takes the red away.
    ink = np.array([(0, 0, 0, 0), (255, 255, 255, 255), (255, 0, 0, 0)], np.uint8).repeat(16, 0).reshape(1, 48, 4)
    picture = PilImage.fromarray(ink.repeat(16, 0), "CMYK")
    pixels = decode_image(saved(picture, "JPEG", quality=95)).pixels.astype(int)
    np.testing.assert_allclose(pixels[8, [8, 24, 40]], [(255, 255, 255), (0, 0, 0), (0, 255, 255)], atol=10)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_shows_its_first_frame(kind: str) -> None:
    frames = [PilImage.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (30, 120, 210)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert (decode_image(data).pixels == 30).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"I am a letter, whatever my name ends in.", "not an image"),
        (saved(QUARTERS, "TIFF"), "not an image of PNG, JPEG, WEBP, GIF, BMP"),
        (saved(QUARTERS, "PNG")[:20], "broken"),
        (png(0, 5, 8, 2, b""), "broken"),
        # 100 bytes that claim seven gigabytes, and some that claim just too much
        (png(50_000, 50_000, 8, 2, b""), f"more than {PIXEL_LIMIT} pixels"),
        (png(2**13, 2**13 + 1, 8, 2, b""), "8192 x 8193 pixels: more than"),
        (png(7169, 1, 8, 2, bytes(1 + 3 * 7169)), "7169 x 1 pixels: a side over 7168 times the other"),
        (png(4, 4, 8, 2, bytes(20)), "broken PNG"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_image(data)


def test_the_most_extreme_picture_is_read() -> None:
    assert decode_image(png(7168, 1, 8, 2, bytes(1 + 3 * 7168))).pixels.shape == (1, 7168, 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_cut_file_is_refused(kind: str) -> None:
    data = saved(RNG.integers(0, 256, (40, 64, 3), np.uint8), kind)
    for kept in np.linspace(0, len(data) - 100, 20).astype(int):
        with pytest.raises(ValueError, match=r"not an image|broken"):
            decode_image(data[:kept])


def test_a_missing_file_is_not_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        decode_image(tmp_path / "nothing.png")


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]), st.data())
@settings(max_examples=300, deadline=None)
def test_damage_gives_a_picture_or_a_value_error(kind: str, data: st.DataObject) -> None:
    options = {} if kind in ("GIF", "BMP") else {"exif": oriented(6)}
    file = bytearray(saved(QUARTERS, kind, **options))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(file) - 1), st.integers(0, 255)), max_size=6)):
        file[at] = value
    try:
        pixels = decode_image(bytes(file)).pixels
    except ValueError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
