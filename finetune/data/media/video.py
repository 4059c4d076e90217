"""Clips: decode frames of animated GIF, WebP, AVIF and APNG files with Pillow, and show a clip.

Other containers, such as MP4, can use the same functions.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from finetune.data.buckets import Crop
from finetune.data.media.image import LOSSLESS_SIDE, MAXIMUM_SIDE_PIXELS, Unreadable, apply, open_image, upright
from finetune.data.media.sample import EMPTY, Sample, data_uri
from finetune.data.shape import VideoShape

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

DEFAULT_FPS = 10.0  # of files without frame durations, as in browsers
MAXIMUM_FRAMES = 100_000
FRAMES = ".frames"  # suffix of a folder whose images, sorted by name, are the frames of one clip


def read_frames(folder: str) -> bytes:
    """Pack a folder of frames into an uncompressed tar that depends only on the files' names and contents.

    Raises:
        OSError: a file cannot be read.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for file in sorted(Path(folder).iterdir()):
            if file.is_file() and not file.name.startswith("."):
                content = file.read_bytes()
                member = tarfile.TarInfo(file.name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _files(content: bytes) -> list[bytes]:
    """The files of a folder that `read_frames` has packed; empty for any other content."""
    if content[257:262] != b"ustar":
        return []
    files = []
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            opened = archive.extractfile(member)
            files.append(opened.read() if opened is not None else b"")
    return files


def first_frame(content: bytes) -> bytes:
    """Image content whose first frame is the first frame of the clip."""
    return next(iter(_files(content)), content)


def size_of(content: bytes) -> tuple[int, int, int]:
    """(frames, width, height) of a clip, without decoding any frame.

    Raises:
        Unreadable: it is not a clip or image, or has more than `MAXIMUM_FRAMES` frames.
    """
    files = _files(content)
    image = open_image(files[0] if files else content)
    frames = len(files) or int(getattr(image, "n_frames", 1))
    if frames > MAXIMUM_FRAMES:
        raise Unreadable(f"{frames:,} frames: the limit is {MAXIMUM_FRAMES:,}; cut the clip")
    return frames, image.width, image.height


def check(content: bytes, frames: int, fps: float = 0.0) -> None:
    """Check that a clip has the frames that `decode` would return, without decoding.

    Raises:
        Unreadable: it has fewer.
    """
    _wanted(content, frames, fps)


def decode(content: bytes, background: str, frames: int, fps: float = 0.0) -> list[PillowImage]:
    """The first `frames` frames as upright RGB, sampled at `fps` (0: every frame of the file).

    A frame lasts until the next one begins: if `fps` is higher than the file's rate, frames repeat.

    Raises:
        Unreadable: the clip is damaged or too short.
    """
    wanted, image, files = _wanted(content, frames, fps)
    decoded: list[PillowImage] = []
    try:
        for number in wanted:
            if files:
                decoded.append(upright(open_image(files[number]), background))
                continue
            image.seek(number)
            decoded.append(upright(image.copy(), background))
    except (EOFError, OSError, ValueError) as error:
        raise Unreadable(f"damaged or truncated ({error})") from error
    return decoded


def _wanted(content: bytes, frames: int, fps: float) -> tuple[Sequence[int], PillowImage, list[bytes]]:
    """(numbers of the sampled frames, opened clip, its files if it is a folder of frames)."""
    files = _files(content)
    image = open_image(files[0] if files else content)
    available = len(files) or int(getattr(image, "n_frames", 1))
    if files:
        fps = 0.0  # each file is a frame
    wanted = range(frames) if not fps else _at_rate(image, available, frames, fps)
    if max(wanted) >= available:
        at = f" at {fps:g} frames per second" if fps else ""
        raise Unreadable(f"the clip has {available} frames, too few for {frames}{at}")
    return wanted, image, files


def _at_rate(image: PillowImage, available: int, frames: int, fps: float) -> list[int]:
    """For each sampled frame, the number of the file's frame at its time; `available` after the end of the clip."""
    ends, time = [], 0.0
    for number in range(available):
        image.seek(number)
        time += float(image.info.get("duration") or 1000 / DEFAULT_FPS) / 1000
        ends.append(time)
    found, place = [], 0
    for number in range(frames):
        while place < available and ends[place] <= number / fps + 1e-9:
            place += 1
        found.append(place)
    return found


def crop(frames: Sequence[PillowImage], how: Crop) -> list[PillowImage]:
    """Scale and crop each frame."""
    return [apply(frame, how) for frame in frames]


def rate_of(shape: VideoShape) -> float:
    """Frames per second of a clip of this shape."""
    return shape.fps or DEFAULT_FPS


@final
class VideoSample(Sample):
    """A generated clip, saved as animated WebP."""

    medium = "video"
    suffix = ".webp"

    def __init__(self, frames: Sequence[PillowImage], fps: float = DEFAULT_FPS) -> None:
        self.frames, self.fps = list(frames), fps

    def save(self, path: Path, about: Mapping[str, str] = EMPTY) -> None:
        """Write a lossless WebP; `about` goes into a .json file beside it."""
        path.write_bytes(self._webp(lossless=True))
        if about:
            path.with_suffix(".json").write_text(json.dumps(dict(about), ensure_ascii=False), encoding="utf-8")

    def thumbnail(self) -> PillowImage:
        """The first, middle and last frame side by side."""
        from PIL import Image

        shown = [self.frames[0], self.frames[len(self.frames) // 2], self.frames[-1]]
        width, height = shown[0].size
        found = Image.new("RGB", (3 * width, height))
        for number, frame in enumerate(shown):
            found.paste(frame, (number * width, 0))
        return found

    def player(self, side: int) -> dict[str, Any]:
        """An `<img>` that plays in a loop."""
        small = max(self.frames[0].size) <= LOSSLESS_SIDE
        return {"source": data_uri("image/webp", self._webp(lossless=small, side=side)), "small": small}

    def _webp(self, lossless: bool = False, side: int = MAXIMUM_SIDE_PIXELS) -> bytes:
        frames = [frame.convert("RGB") for frame in self.frames]
        for frame in frames:
            frame.thumbnail((side, side))
        buffer = io.BytesIO()
        frames[0].save(
            buffer,
            "WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / self.fps),
            loop=0,
            lossless=lossless,
            quality=100 if lossless else 88,
        )
        return buffer.getvalue()


def open_sample(path: Path) -> tuple[VideoSample, dict[str, str]]:
    """A clip that `VideoSample.save` wrote, and what it was generated from."""
    content = path.read_bytes()
    frames, _, _ = size_of(content)
    image = open_image(content)
    image.load()
    duration = float(image.info.get("duration") or 1000 / DEFAULT_FPS)
    about = path.with_suffix(".json")
    described = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    return VideoSample(decode(content, "white", frames), 1000 / duration), described
