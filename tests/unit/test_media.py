"""Media: shapes, clips and sounds, saved and read back."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from PIL import Image

from finetune.data.media import audio, video
from finetune.data.media.audio import AudioSample
from finetune.data.media.image import ImageSample, Unreadable
from finetune.data.media.sample import open_sample
from finetune.data.media.video import VideoSample
from finetune.data.shape import AudioShape, ImageShape, Shape, VideoShape, shape_of


@pytest.mark.parametrize(
    ("shape", "text", "latent"),
    [
        (ImageShape(768, 512), "512×768", (96, 64)),
        (VideoShape(5, 64, 32, 8.0), "5×32×64", (2, 8, 4)),
        (AudioShape(32_000, 16_000), "2 s", (4_000,)),
    ],
)
def test_shape_has_the_expected_text_latent_and_plain_form(shape: Shape, text: str, latent: tuple[int, ...]) -> None:
    assert str(shape) == text
    assert shape.latent(8, 4) == latent
    assert shape_of(shape.plain()) == shape


def test_video_sample_is_equal_after_saving_and_opening(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (12, 8), (40 * number, 10, 200)) for number in range(5)]
    VideoSample(frames, 10).save(tmp_path / "a.webp", {"prompt": "x"})
    clip, about = open_sample(tmp_path / "a.webp")
    assert isinstance(clip, VideoSample) and about == {"prompt": "x"} and clip.fps == pytest.approx(10)
    assert [frame.tobytes() for frame in clip.frames] == [frame.tobytes() for frame in frames]
    assert clip.thumbnail().size == (36, 8)
    half = video.decode((tmp_path / "a.webp").read_bytes(), "white", 3, 5.0)
    assert [frame.tobytes() for frame in half] == [frames[number].tobytes() for number in (0, 2, 4)]
    with pytest.raises(Unreadable, match="5 frames, too few for 6"):
        video.decode((tmp_path / "a.webp").read_bytes(), "white", 6)


def test_audio_sample_is_equal_to_16_bits_after_saving_and_opening(tmp_path: Path) -> None:
    time = numpy.arange(1600) / 16_000
    wave = numpy.stack([numpy.sin(2 * numpy.pi * 440 * time), time * 5]).astype(numpy.float32)
    AudioSample(wave, 16_000).save(tmp_path / "a.wav", {"seed": "1"})
    sound, about = open_sample(tmp_path / "a.wav")
    assert isinstance(sound, AudioSample) and about == {"seed": "1"} and sound.rate == 16_000
    assert numpy.abs(sound.waveform - wave).max() < 1e-4
    assert sound.player(100)["element"] == "audio" and sound.thumbnail().size == audio.WAVEFORM
    low = audio.resample(wave[:1], 16_000, 8_000)
    assert low.shape == (1, 800) and numpy.abs(low[0, 50:-50] - wave[0, ::2][50:-50]).max() < 0.05
    assert audio.cut(low, 1000).shape == (1, 1000) and audio.cut(low, 10).shape == (1, 10)
    with pytest.raises(Unreadable, match="PCM WAV"):
        audio.decode(b"no sound")


def test_image_sample_keeps_its_metadata(tmp_path: Path) -> None:
    ImageSample(Image.new("RGB", (4, 4), "red")).save(tmp_path / "a.png", {"prompt": "ein Fuß"})
    image, about = open_sample(tmp_path / "a.png")
    assert isinstance(image, ImageSample) and about["prompt"] == "ein Fuß"
