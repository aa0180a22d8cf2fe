"""Video files, all written here with PyAV. Each frame carries its index as 16 black and white squares."""

import struct
import subprocess
import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from baltoro.chat import decode
from baltoro.chat.decode import decode_video
from baltoro.chat.media import MediaSpec, preprocess_clip
from baltoro.chat.messages import Clip, MediaItem, Video, user
from baltoro.chat.render import render
from baltoro.chat.tokenizer import Tokenizer

K25 = MediaSpec.K25
EACH = replace(K25, frames_per_chunk=1, uniform_frames=2**30)  # every frame and its own timestamp
SIDE = 64
CONTAINERS = [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx-vp9"), ("mov", "mpeg4")]


def numbered(i: int) -> NDArray[np.uint8]:
    bits = np.array([i >> bit & 1 for bit in range(16)], np.uint8).reshape(4, 4) * 255
    return np.repeat(bits.repeat(SIDE // 4, 0).repeat(SIDE // 4, 1)[..., None], 3, 2)


def number(pixels: NDArray[np.float32]) -> int:
    middles = pixels[SIDE // 8 : SIDE : SIDE // 4, SIDE // 8 : SIDE : SIDE // 4, 0].ravel()
    return sum(int(value > 0) << bit for bit, value in enumerate(middles))


def encoded(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    kind: str = "mp4",
    codec: str = "libx264",
    rate: int | Fraction = 30,
    gop: int = 12,
    size: tuple[int, int] = (SIDE, SIDE),
    milliseconds: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """A file of constant `rate`, or with the given presentation times."""
    fast = {"libx264": {"preset": "veryfast"}, "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"}}
    with av.open(path, "w", format=kind, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=fast.get(codec, {"deadline": "realtime"}))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.gop_size = gop
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def count(path: Path, frames: int, **options: Any) -> Path:
    return encoded(path, map(numbered, range(frames)), **options)


def seen(chunks: Iterable[tuple[str, MediaItem]]) -> list[tuple[str, list[int]]]:
    """Each chunk's timestamp and the numbers on its frames."""
    found = []
    for time, item in chunks:
        t, h, w = item.grid_thw
        pictures = item.patches.reshape(t, h, w, 3, 14, 14).transpose(0, 1, 4, 2, 5, 3).reshape(t, h * 14, w * 14, 3)
        found.append((time, [number(picture) for picture in pictures]))
    return found


@pytest.mark.parametrize("frames", range(1, 10))
@pytest.mark.parametrize(("kind", "codec"), CONTAINERS)
def test_chunks_of_four_and_the_rest(tmp_path: Path, frames: int, kind: str, codec: str) -> None:
    chunks = seen(decode_video(count(tmp_path / "v", frames, kind=kind, codec=codec, rate=2), K25))
    times = ["00:00:00.000", "00:00:02.000", "00:00:04.000"]
    assert chunks == [(times[i // 4], list(range(i, min(i + 4, frames)))) for i in range(0, frames, 4)]


@pytest.mark.parametrize(("kind", "codec"), [*CONTAINERS, ("mp4", "libx265")])
def test_two_frames_a_second_with_cut_milliseconds(tmp_path: Path, kind: str, codec: str) -> None:
    # round(90 * 2 / 30) = 6 of 0..89: 0, 17.8, 35.6, 53.4, 71.2, 89. 71 / 30 = 2.3667, although Matroska stores 2.367
    chunks = seen(decode_video(count(tmp_path / "v", 90, kind=kind, codec=codec), K25))
    assert chunks == [("00:00:00.000", [0, 18, 36, 53]), ("00:00:02.366", [71, 89])]


def test_television_rate(tmp_path: Path) -> None:
    # 29.97 fps: round(100 * 2 / 29.97) = round(6.67) = 7 of 0..99 in steps of 16.5, halves to even; 66 * 1001 / 30000
    path = count(tmp_path / "v", 100, rate=Fraction(30000, 1001))
    assert seen(decode_video(path.read_bytes(), K25)) == [
        ("00:00:00.000", [0, 16, 33, 50]),
        ("00:00:02.202", [66, 82, 99]),
    ]


@given(
    st.sampled_from(CONTAINERS), st.integers(1, 90), st.sampled_from([1, 3, 10, 25, 30]), st.integers(1, 40), st.data()
)
@settings(max_examples=25, deadline=None)
def test_jumping_between_keyframes_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory,
    container: tuple[str, str],
    frames: int,
    rate: int,
    gop: int,
    data: st.DataObject,
) -> None:
    kind, codec = container
    path = count(tmp_path_factory.mktemp("v") / "v", frames, kind=kind, codec=codec, rate=rate, gop=gop)
    spec = replace(K25, uniform_frames=data.draw(st.integers(0, 9)))
    with av.open(path) as file:
        shown = np.array([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)], np.uint8)
    expected = preprocess_clip(Clip(shown, rate), spec)
    for (time, item), (expected_time, expected_item) in zip(decode_video(path, spec), expected, strict=True):
        assert time == expected_time
        np.testing.assert_array_equal(item.patches, expected_item.patches)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_a_video_is_written_like_a_clip_of_its_frames(
    tmp_path: Path, byte_tokenizer: Tokenizer, as_bytes: bool
) -> None:
    path = count(tmp_path / "v", 11, rate=4)
    with av.open(path) as file:
        clip = Clip(np.array([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)], np.uint8), 4)
    video = Video(path.read_bytes() if as_bytes else path)
    ours, expected = (render([user("a", part, "b")], byte_tokenizer, K25) for part in (video, clip))
    assert ours.ids == expected.ids
    assert [item.grid_thw for item in ours.media] == [(4, 6, 6), (2, 6, 6)]
    for mine, item in zip(ours.media, expected.media, strict=True):
        np.testing.assert_array_equal(mine.patches, item.patches)


def test_changing_rates_are_sampled_by_the_clock(tmp_path: Path) -> None:
    # 20 frames in the first second, the last at 4 s: on average 5 a second, so round(21 * 2 / 5) = 8 instants every
    # 4 / 7 s. On screen then: 0, 11 (since 0.55 s), 19 (since 0.95 s) five times, 20.
    path = count(tmp_path / "v", 21, milliseconds=[*range(0, 1000, 50), 4000])
    chunks = seen(decode_video(path, replace(K25, frames_per_chunk=1)))
    assert chunks == [("00:00:00.000", [0]), ("00:00:00.550", [11]), ("00:00:00.950", [19]), ("00:00:04.000", [20])]


@pytest.mark.parametrize("kind", ["mp4", "matroska"])
def test_a_slide_show_keeps_every_slide(tmp_path: Path, kind: str) -> None:
    path = count(tmp_path / "v", 4, kind=kind, milliseconds=[500, 700, 10_500, 3_672_499])
    assert seen(decode_video(path, EACH)) == [
        ("00:00:00.000", [0]),
        ("00:00:00.200", [1]),
        ("00:00:10.000", [2]),
        ("01:01:11.999", [3]),
    ]


@pytest.mark.parametrize(
    ("matrix", "quarter_turns"),  # of the track header: (x, y) is shown at (a x + c y, b x + d y), y downwards
    [((1, 0, 0, 1), 0), ((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],
)
def test_a_turned_telephone(tmp_path: Path, matrix: tuple[int, ...], quarter_turns: int) -> None:
    quarters = np.array([[40, 90], [140, 220]], np.uint8).repeat(28, 0).repeat(56, 1)[..., None].repeat(3, 2)
    data = bytearray(encoded(tmp_path / "v", [quarters], size=(112, 56)).read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    [(_, item)] = decode_video(bytes(data), K25)
    _, h, w = item.grid_thw
    picture = item.patches.reshape(h, w, 3, 14, 14).transpose(0, 3, 1, 4, 2).reshape(h * 14, w * 14, 3)
    np.testing.assert_allclose((picture + 1) * 127.5, np.rot90(quarters, quarter_turns), atol=12)


def test_colours_follow_the_matrix_of_the_file(tmp_path: Path) -> None:
    red = np.full((56, 56, 3), (200, 30, 60), np.uint8)
    with av.open(tmp_path / "v", "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 56
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = 1  # BT.709
        frame = av.VideoFrame.from_ndarray(red, format="rgb24")
        container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="itu709")))
        container.mux(stream.encode())
    [(_, item)] = decode_video(tmp_path / "v", K25)
    np.testing.assert_allclose((item.patches.mean((0, 2, 3)) + 1) * 127.5, (200, 30, 60), atol=4)


@pytest.mark.parametrize(
    ("width", "height", "tokens_short", "tokens_long", "tokens_longest_side"),
    [
        # 128 x 128 patches shrink to 896 and 448 pixels a side
        (1792, 1792, 32 * 32, 16 * 16, 16 * 16),
        # 137 x 77 patches: by sqrt(4096 / 10549) to 1196 x 672, by sqrt(1024 / 10549) to 598 x 336, and by 448 / 1920
        # to 448 x 252, the 36 tokens a frame of a chunk of four
        (1920, 1080, 43 * 24, 22 * 12, 4 * 36),
    ],
)
def test_benchmark_settings(
    tmp_path: Path, width: int, height: int, tokens_short: int, tokens_long: int, tokens_longest_side: int
) -> None:
    path = encoded(tmp_path / "v", [np.zeros((height, width, 3), np.uint8)], codec="mpeg4", size=(width, height))
    longest = replace(MediaSpec.K25_LONG_VIDEO, frame_side_limit=448 // 14)
    for spec, tokens in [
        (MediaSpec.K25_SHORT_VIDEO, tokens_short),
        (MediaSpec.K25_LONG_VIDEO, tokens_long),
        (longest, tokens_longest_side),
    ]:
        [(_, item)] = decode_video(path, spec)
        assert spec.tokens(item.grid_thw) == tokens


@pytest.fixture(scope="module")
def hour(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3,700 s at 5 frames a second."""
    return count(tmp_path_factory.mktemp("v") / "hour.mp4", 18_500, rate=5, gop=50)


def test_128_and_2048_frames_of_an_hour(hour: Path) -> None:
    for spec, frames in ((MediaSpec.K25_SHORT_VIDEO, 128), (MediaSpec.K25_LONG_VIDEO, 2048)):
        chunks = seen(decode_video(hour, spec))
        expected = [round(i * 18_499 / (frames - 1)) for i in range(frames)]
        assert [i for _, numbers in chunks for i in numbers] == expected
        assert [len(numbers) for _, numbers in chunks] == [4] * (frames // 4)
        # 18,061 / 5 = 3,612.2 s; 18,472 / 5 = 3,694.4 s
        assert chunks[-1][0] == {128: "01:00:12.400", 2048: "01:01:34.400"}[frames]


PEAK = """
import resource, sys
from pathlib import Path
from typing import Any
from baltoro.chat.decode import decode_video
from baltoro.chat.media import MediaSpec
chunks = sum(1 for _ in decode_video(Path(sys.argv[1]), MediaSpec.K25))
print(chunks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length(hour: Path, tmp_path: Path) -> None:
    def peak(path: Path) -> tuple[int, int]:
        """Chunks and the most KiB that a process held while it went through them."""
        out = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True).stdout
        chunks, size = map(int, out.split())
        return chunks, size

    brief_chunks, brief = peak(count(tmp_path / "v", 100, rate=5, gop=50))
    long_chunks, long = peak(hour)
    assert (brief_chunks, long_chunks) == (10, 1850)  # 40 and 7,400 frames
    # All chosen frames are 91 MB as pixels and 627 MB as patches; the times of 18,500 frames are not 2 MB.
    assert long - brief < 20_000


def test_a_reader_may_stop_early(hour: Path) -> None:
    chunks = decode_video(hour, K25)
    assert next(chunks)[0] == "00:00:00.000"
    assert isinstance(chunks, Generator)
    chunks.close()


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    whole = count(tmp_path / "v", 60, options={"movflags": "faststart"}).read_bytes()
    for kept in np.linspace(0, len(whole) - 20, 15).astype(int):
        with pytest.raises(ValueError, match=r"header is broken|without a track|ends after \d+ of 60 frames"):
            list(decode_video(whole[:kept], K25))
    index_last = count(tmp_path / "w", 60).read_bytes()
    with pytest.raises(ValueError, match="header is broken"):
        list(decode_video(index_last[: len(index_last) // 2], K25))


def test_a_cut_matroska_file_is_a_shorter_video(tmp_path: Path) -> None:
    data = count(tmp_path / "v", 60, kind="webm", codec="libvpx-vp9").read_bytes()
    numbers = [i for _, [i] in seen(decode_video(data[: len(data) * 2 // 3], EACH))]
    assert numbers == list(range(len(numbers)))
    assert 10 < len(numbers) < 60


def test_damage_in_the_middle_is_refused(tmp_path: Path) -> None:
    data = bytearray(count(tmp_path / "v", 60, options={"movflags": "faststart"}).read_bytes())
    middle = (data.index(b"mdat") + len(data)) // 2
    data[middle : middle + 400] = bytes(400)
    with pytest.raises(ValueError, match="broken video"):
        list(decode_video(bytes(data), EACH))


def test_a_frame_behind_a_damaged_one_is_refused(tmp_path: Path) -> None:
    # The decoder conceals the damage of frame 5 and would show frame 8, which builds upon it, without an error.
    noise = np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 3), np.uint8)
    path = encoded(tmp_path / "v", noise, gop=100)
    data = bytearray(path.read_bytes())
    with av.open(path) as file:
        at, size = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size][5]
    assert at is not None
    data[at + size // 2 : at + size] = bytes(size - size // 2)
    spec = replace(K25, uniform_frames=2)  # the first frame and the last
    assert len(list(decode_video(path, spec))) == 1
    with pytest.raises(ValueError, match="a frame cannot be decoded"):
        list(decode_video(bytes(data), spec))


def sound(path: Path) -> Path:
    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_what_is_no_video_of_ours_is_refused(tmp_path: Path) -> None:
    good = count(tmp_path / "good.mp4", 2)
    # A playlist would make an obliging demuxer open whatever file or address it names.
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{good}\n#EXT-X-ENDLIST\n".encode()
    for data in (b"", b"a letter", playlist, count(tmp_path / "v.avi", 3, kind="avi", codec="mpeg4")):
        with pytest.raises(ValueError, match="not an MP4, MOV, WebM or Matroska video"):
            list(decode_video(data, K25))
    for path in (sound(tmp_path / "sound"), count(tmp_path / "v", 3, codec="mjpeg")):
        with pytest.raises(ValueError, match="video without a track of h264"):
            list(decode_video(path, K25))
    with pytest.raises(FileNotFoundError):
        list(decode_video(tmp_path / "nothing.mp4", K25))


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = count(tmp_path / "v", 9)
    monkeypatch.setattr(decode, "PIXEL_LIMIT", SIDE**2 - 1)
    with pytest.raises(ValueError, match="64 x 64 pixels: more than 4095"):
        list(decode_video(path, K25))
    monkeypatch.setattr(decode, "PIXEL_LIMIT", SIDE**2)
    monkeypatch.setattr(decode, "FRAME_LIMIT", 8)
    with pytest.raises(ValueError, match="more than 8 frames"):
        list(decode_video(path, K25))


@pytest.mark.parametrize(("limit", "message"), [(2**26, "changes its size"), (64**2, "broken video")])
def test_a_picture_that_grows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, message: str
) -> None:
    # WebM of two streams, one after the other, under the header of the first
    monkeypatch.setattr(decode, "PIXEL_LIMIT", limit)
    with av.open(tmp_path / "v", "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for start, side in ((0, 64), (10, 128)):
            encoder = av.CodecContext.create("libvpx-vp9", "w")
            encoder.width, encoder.height, encoder.pix_fmt = side, side, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 10), Fraction(10)
            packets = []
            for i in range(10):
                frame = av.VideoFrame.from_ndarray(np.full((side, side, 3), 9, np.uint8), format="rgb24")
                frame.pts = i
                packets += encoder.encode(frame)
            for packet in packets + encoder.encode(None):
                packet.stream, packet.time_base = stream, Fraction(1, 10)
                packet.pts, packet.dts = packet.pts + start, packet.dts + start
                container.mux(packet)
    with pytest.raises(ValueError, match=message):
        list(decode_video(tmp_path / "v", K25))


@given(st.sampled_from(CONTAINERS), st.data())
@settings(max_examples=150, deadline=None)
def test_damage_gives_chunks_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, container: tuple[str, str], data: st.DataObject
) -> None:
    kind, codec = container
    path = tmp_path_factory.getbasetemp() / f"{kind}-{codec}"
    if not path.exists():
        count(path, 5, kind=kind, codec=codec)
    file = bytearray(path.read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(file) - 1), st.integers(0, 255)), max_size=5)):
        file[at] = value
    try:
        chunks = list(decode_video(bytes(file), K25))
    except ValueError:
        return
    assert chunks
