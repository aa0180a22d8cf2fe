"""Image and video files to pixels.

The bytes come from strangers: only well-kept decoders see them, and what a header declares is checked before it is
decoded.
"""

import io
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image as PilImage
from PIL import ImageOps

from baltoro.chat.media import MediaSpec, preprocess_frames, sample_frames
from baltoro.chat.messages import Image, MediaItem

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
VIDEO_CODECS = ("h264", "hevc", "vp9", "libdav1d", "mpeg4")
PIXEL_LIMIT = 2**26  # of an image or a frame
FRAME_LIMIT = 2**20  # of a video: 9.7 hours at 30 frames per second
# Beyond it the longest side that the release admits (512 patches of 14 pixels) leaves less than a pixel of the other.
ASPECT_LIMIT = 512 * 14

_ADVICE = "encode it as MP4 with H.264"
# These demuxers, unlike that of a playlist, open no other file or address.
_OPEN_OPTIONS = {"format_whitelist": "mp4,webm", "codec_whitelist": ",".join(VIDEO_CODECS)}
_SEEK_FROM = 16  # frames; a jump to a keyframe costs about as much as decoding eight


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


def decode_video(data: bytes | Path, spec: MediaSpec) -> Iterator[tuple[str, MediaItem]]:
    """The chunks of a video as the model sees them, each with its timestamp; `spec` says which frames and how large.

    Lazy, so that memory does not grow with the length: the file is read once for the times of all frames, then only
    what the chosen frames need is decoded, and the caller may stop at any chunk. Frames are taken by presentation time
    and turned upright by the file's rotation; sound is ignored.

    ValueError says what is wrong with the file, at the chunk where it shows: not MP4, MOV, WebM or Matroska with one of
    VIDEO_CODECS, more than PIXEL_LIMIT pixels a frame or FRAME_LIMIT frames, broken. A file that lacks frames which its
    header announces is refused; a Matroska header announces none, so a cut one is the shorter video that it holds.
    """
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        try:
            container = av.open(file, "r", options=_OPEN_OPTIONS, metadata_errors="replace")
        except FFmpegError as error:
            raise ValueError(f"not an MP4, MOV, WebM or Matroska video, or its header is broken; {_ADVICE}") from error
        with container:
            try:
                yield from preprocess_frames(_sampled(container, spec), spec)
            except FFmpegError as error:
                raise ValueError(f"broken video: {error.strerror}; {_ADVICE}") from error


def _sampled(container: InputContainer, spec: MediaSpec) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """(seconds since the first frame, uint8 RGB of shape [height, width, 3]) of the frames that `spec` wants."""
    stream = container.streams.best("video")
    codec = stream.codec_context if isinstance(stream, VideoStream) else None
    if not isinstance(stream, VideoStream) or not codec or codec.name not in VIDEO_CODECS:
        raise ValueError(f"video without a track of {', '.join(VIDEO_CODECS)}; {_ADVICE}")
    check_size("video", stream.width, stream.height)
    codec.options = {"max_pixels": str(PIXEL_LIMIT)}  # a later header may declare another size
    ticks, keys = _presentation_ticks(container, stream)
    assert stream.time_base is not None
    times = (ticks - ticks[0]) * float(stream.time_base)
    frames: Iterator[av.VideoFrame] = iter(())
    at, shape = -_SEEK_FROM, ()
    for i, seconds in _choose(times, stream.average_rate, spec):
        key = keys[i]
        if key - at >= _SEEK_FROM:
            container.seek(int(ticks[key]), stream=stream)
            frames = container.decode(stream)
        pixels = _pixels_at(frames, int(ticks[i]), int(ticks[key]))
        if shape not in ((), pixels.shape):
            raise ValueError(f"video that changes its size; {_ADVICE}")
        yield seconds, pixels
        at, shape = i, pixels.shape


def _presentation_ticks(container: InputContainer, stream: VideoStream) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """When each frame is shown, ascending, in units of the stream's time base; and for each frame the index of the
    keyframe at which its decoding begins. Frames before the first keyframe are left out: nothing can decode them."""
    ticks: set[int] = set()
    keys: set[int] = set()
    packets = 0
    for packet in container.demux(stream):
        packets += packet.size > 0 and not packet.is_corrupt
        if packet.pts is None or packet.is_discard:  # the end of the file; cut away by an edit list
            continue
        ticks.add(packet.pts)
        if packet.is_keyframe:
            keys.add(packet.pts)
        if packets > FRAME_LIMIT:
            raise ValueError(f"video of more than {FRAME_LIMIT} frames; cut it")
    if packets < stream.frames:
        raise ValueError(f"broken video: the file ends after {packets} of {stream.frames} frames; copy it anew")
    if not keys:
        raise ValueError(f"broken video: no keyframe; {_ADVICE}")
    decodable = np.array(sorted(tick for tick in ticks if tick >= min(keys)))
    is_key = np.isin(decodable, sorted(keys))
    return decodable, np.maximum.accumulate(np.where(is_key, np.arange(len(decodable)), 0))


def _choose(times: NDArray[np.float64], rate: Fraction | None, spec: MediaSpec) -> list[tuple[int, float]]:
    """Indices and times of the frames to show. `times`: of all frames, in seconds, the first 0.

    At a constant rate it is the release's rule, times included. Otherwise as many instants are spread evenly over the
    length, and each shows the frame that is on screen then; a frame that stays on screen is shown once.
    """
    frames = len(times)
    # Within a tenth of a frame: Matroska rounds times to milliseconds.
    if frames == 1 or (rate and np.abs(times * float(rate) - np.arange(frames)).max() < 0.1):
        fps = float(rate or 1)
        return [(i, i / fps) for i in sample_frames(frames, fps, spec)]
    kept = len(sample_frames(frames, float((frames - 1) / times[-1]), spec))
    if kept == frames:
        return [(i, float(times[i])) for i in range(frames)]
    instants = np.linspace(0, float(times[-1]), kept) + 1e-6
    return [(i, float(times[i])) for i in sorted({bisect_right(times, instant) - 1 for instant in instants})]


def _pixels_at(frames: Iterator[av.VideoFrame], tick: int, key: int) -> NDArray[np.uint8]:
    """Decodes on to the frame shown at `tick`. `key` is the tick of its keyframe: damage before that is forgotten."""
    for frame in frames:
        if frame.pts is None or frame.pts > tick or (frame.pts >= key and frame.is_corrupt):
            break
        if frame.pts == tick:
            return np.rot90(np.asarray(frame.to_ndarray(format="rgb24"), np.uint8), round(frame.rotation / 90))
    raise ValueError(f"broken video: a frame cannot be decoded; {_ADVICE}")


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
