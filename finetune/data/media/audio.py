"""Sounds: decode WAV files with the standard library, and show a sound. Other formats can use the same functions."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from finetune.data.media.image import Unreadable
from finetune.data.media.sample import EMPTY, Sample, data_uri

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image as PillowImage

MAXIMUM_SECONDS = 24 * 3600
WAVEFORM = (192, 96)  # pixels of a thumbnail


def size_of(content: bytes) -> tuple[int, int, int]:
    """(samples, channels, rate) of a sound, without decoding it.

    Raises:
        Unreadable: it is not a PCM WAV file, or is longer than `MAXIMUM_SECONDS`.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            samples, channels, rate = file.getnframes(), file.getnchannels(), file.getframerate()
    except (wave.Error, EOFError, OSError) as error:
        raise Unreadable(f"not a supported audio format; supported: PCM WAV ({error})") from error
    if not samples or not rate:
        raise Unreadable("the sound is empty")
    if samples / rate > MAXIMUM_SECONDS:
        raise Unreadable(f"{samples / rate / 3600:.0f} hours: the limit is {MAXIMUM_SECONDS / 3600:.0f}; cut the sound")
    return samples, channels, rate


def decode(content: bytes) -> tuple[numpy.ndarray, int]:
    """(waveform [C, S] float32 in [-1, 1], samples per second).

    Raises:
        Unreadable: as in `size_of`, or the file is truncated.
    """
    import numpy

    _, channels, rate = size_of(content)
    try:
        with wave.open(io.BytesIO(content)) as file:
            raw, width = file.readframes(file.getnframes()), file.getsampwidth()
    except (wave.Error, EOFError, OSError) as error:
        raise Unreadable(f"damaged or truncated ({error})") from error
    if width == 3:  # 24 bits: as the upper three bytes of 32
        padded = numpy.zeros((len(raw) // 3, 4), numpy.uint8)
        padded[:, 1:] = numpy.frombuffer(raw[: len(raw) // 3 * 3], numpy.uint8).reshape(-1, 3)
        values, full = padded.view("<i4")[:, 0].astype(numpy.float64), float(1 << 31)
    elif width == 1:  # unsigned (WAVE format)
        values, full = numpy.frombuffer(raw, numpy.uint8).astype(numpy.float64) - 128, 128.0
    else:
        usable = raw[: len(raw) // width * width]
        values, full = numpy.frombuffer(usable, f"<i{width}").astype(numpy.float64), float(1 << (8 * width - 1))
    whole = len(values) // channels * channels
    return (values[:whole].reshape(-1, channels).T / full).astype(numpy.float32), rate


def resample(waveform: numpy.ndarray, rate: int, wanted: int) -> numpy.ndarray:
    """Resample [C, S] from `rate` to `wanted` samples per second, band-limited by a Fourier transform (no aliasing)."""
    import numpy

    if rate == wanted:
        return waveform
    length, target = waveform.shape[1], round(waveform.shape[1] * wanted / rate)
    spectrum = numpy.fft.rfft(waveform.astype(numpy.float64))
    kept = numpy.zeros((waveform.shape[0], target // 2 + 1), numpy.complex128)
    common = min(kept.shape[1], spectrum.shape[1])
    kept[:, :common] = spectrum[:, :common]
    resampled: numpy.ndarray = (numpy.fft.irfft(kept, target) * (target / length)).astype(numpy.float32)
    return resampled


def cut(waveform: numpy.ndarray, samples: int) -> numpy.ndarray:
    """The first `samples` samples; a shorter sound is padded with silence."""
    import numpy

    missing = max(0, samples - waveform.shape[1])
    return numpy.pad(waveform[:, :samples], ((0, 0), (0, missing)))


@final
class AudioSample(Sample):
    """A generated sound, `waveform` [C, S] float32 in [-1, 1], saved as WAV of 16 bits."""

    medium = "audio"
    suffix = ".wav"

    def __init__(self, waveform: numpy.ndarray, rate: int) -> None:
        self.waveform, self.rate = waveform, rate

    def save(self, path: Path, about: Mapping[str, str] = EMPTY) -> None:
        """Write a WAV file; `about` goes into a .json file beside it."""
        path.write_bytes(self._wav())
        if about:
            path.with_suffix(".json").write_text(json.dumps(dict(about), ensure_ascii=False), encoding="utf-8")

    def thumbnail(self) -> PillowImage:
        """The waveform: the range of values in each column."""
        from PIL import Image, ImageDraw

        width, height = WAVEFORM
        found = Image.new("RGB", WAVEFORM, "white")
        pen, mono = ImageDraw.Draw(found), self.waveform.mean(0)
        for column in range(width):
            part = mono[
                column * len(mono) // width : max(column * len(mono) // width + 1, (column + 1) * len(mono) // width)
            ]
            if len(part):
                low, high = ((1 - float(value)) * (height - 1) / 2 for value in (part.max(), part.min()))
                pen.line((column, low, column, high), "#336699")
        return found

    def player(self, side: int) -> dict[str, Any]:
        """An `<audio>` with controls."""
        return {"source": data_uri("audio/wav", self._wav()), "small": False, "element": "audio"}

    def _wav(self) -> bytes:
        import numpy

        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(self.waveform.shape[0])
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes((self.waveform.T.clip(-1, 1) * 32767).round().astype(numpy.int16).tobytes())
        return buffer.getvalue()


def open_sample(path: Path) -> tuple[AudioSample, dict[str, str]]:
    """A sound that `AudioSample.save` wrote, and what it was generated from."""
    about = path.with_suffix(".json")
    described = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    return AudioSample(*decode(path.read_bytes())), described
