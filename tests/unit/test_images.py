"""From an image file to what the model sees: formats and oddities, scaling and cropping."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.buckets import Crop, buckets, fit
from finetune.data.media.image import Unreadable, apply, canonical_color, decode
from finetune.data.shape import Frame, ImageShape

# -- images ---------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(content: bytes, background: str = "#ffffff", at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    found = decode(content, background).getpixel(at)
    assert isinstance(found, tuple)
    return found


def empty_png(width: int, height: int) -> bytes:
    """A PNG that claims a size but has no pixels, so decoding fails for another reason than its size."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", body), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


# For each EXIF orientation, the pixel of the stored 2×3 image that is displayed at the top left (TIFF 6.0, tag 274).
TOP_LEFT = {1: (0, 0), 2: (1, 0), 3: (1, 2), 4: (0, 2), 5: (0, 0), 6: (0, 2), 7: (1, 2), 8: (1, 0)}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = Image.new("RGB", (2, 3), "blue")
    stored.putpixel(TOP_LEFT[orientation], (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode(encoded(stored, exif=exif), "#ffffff")
    assert upright.size == ((2, 3) if orientation < 5 else (3, 2))
    assert upright.getpixel((0, 0)) == (255, 0, 0)


def test_transparent_image_is_composited_over_the_background() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    expected = tuple(round(128 / 255 * red + 127 / 255 * green) for red, green in ((255, 0), (0, 128), (0, 0)))
    assert pixel(encoded(half), canonical_color("green")) == pytest.approx(expected, abs=1)
    clear = Image.new("LA", (2, 2), (0, 0))
    assert pixel(encoded(clear), canonical_color("rgb(1, 2, 3)")) == (1, 2, 3)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 1), 1)
    for kind in ("PNG", "GIF"):
        content = encoded(palette, kind, transparency=0)
        assert pixel(content, "#ff00ff") == (255, 0, 255)
        assert pixel(content, "#ff00ff", (1, 1)) == (40, 50, 60)
    alphas = encoded(palette, transparency=b"\x00\x80")
    assert pixel(alphas, "#000000") == (0, 0, 0)
    assert pixel(alphas, "#000000", (1, 1)) == pytest.approx((20, 25, 30), abs=1)
    assert pixel(encoded(Image.new("RGB", (2, 2), (9, 9, 9)), transparency=(9, 9, 9)), "#00ff00") == (0, 255, 0)


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF")])
def test_gray_image_of_more_than_8_bits_is_scaled_not_clipped(mode: str, kind: str) -> None:
    values = numpy.array([[0, 255, 0x1234, 0x8000, 0xFFFF]])
    stored = (
        (values / 65535).astype(numpy.float32)
        if mode == "F"
        else values.astype(numpy.uint16 if mode == "I;16" else numpy.int32)
    )
    content = encoded(Image.fromarray(stored), kind)
    assert Image.open(io.BytesIO(content)).mode == mode
    seen = numpy.asarray(decode(content, "#ffffff"))
    assert (seen == numpy.round(values / 257)[..., None]).all()


def test_16_bit_gray_image_with_a_transparent_value_shows_the_background() -> None:
    stored = Image.fromarray(numpy.array([[7, 40_000]], dtype=numpy.uint16))
    content = encoded(stored, transparency=7)
    assert pixel(content, "#0000ff") == (0, 0, 255)
    assert pixel(content, "#0000ff", (1, 0)) == (156, 156, 156)


def test_cmyk_and_animated_images_decode_to_rgb_of_the_first_frame() -> None:
    assert pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)) == pytest.approx(
        (255, 0, 0), abs=3
    )
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green")]
    for kind in ("GIF", "WEBP", "PNG", "MPO"):
        content = encoded(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 2
        assert pixel(content) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"hello", "not a supported image format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a supported image format"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-200], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50))[:-200], "truncated"),
        (empty_png(20_000, 20), "20000×20 pixels: a side is longer than 16384"),
        (empty_png(20, 20_000), "20×20000 pixels: a side is longer than 16384"),
        (empty_png(16_000, 16_000), "more than 179 million pixels"),
    ],
)
def test_decode_of_an_unreadable_image_is_refused_with_the_reason(content: bytes, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        decode(content, "#ffffff")


def test_canonical_color_is_equal_for_equal_colors() -> None:
    assert {
        canonical_color(color)
        for color in ("white", "#fff", "#FFFFFF", "rgb(255, 255, 255)", "hsl(0, 0%, 100%)", "#ffffffff")
    } == {"#ffffff"}


# -- buckets and crops --------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(st.integers(8, 2048), st.sampled_from([1, 8, 32, 64]), st.floats(1, 4))
@settings(deadline=None, max_examples=40)
def test_buckets_respect_step_area_and_aspect(resolution: int, step: int, aspect: float) -> None:
    step = max(step, resolution // 32)
    found = buckets(resolution, step, aspect, several=True)
    assert len(set(found)) == len(found)
    assert bool(found) == (step <= resolution)
    for bucket in found:
        assert bucket.width % step == bucket.height % step == 0
        assert bucket.width * bucket.height <= resolution**2
        assert max(bucket.width, bucket.height) <= aspect * min(bucket.width, bucket.height)
        assert ImageShape(bucket.width, bucket.height) in found
    square = resolution // step * step
    assert not found or ImageShape(square, square) in found
    assert buckets(resolution, step, aspect, several=False) == [ImageShape(resolution, resolution)]


@given(shapes, st.sampled_from([64, 200, 512]), st.sampled_from([8, 64]))
@settings(deadline=None)
def test_fit_chooses_the_bucket_nearest_in_aspect_and_covers_it(
    size: tuple[int, int], resolution: int, step: int
) -> None:
    choices = buckets(resolution, step, 2.0, several=True)
    crop = fit(size, choices)

    def distance(bucket: Frame) -> float:
        """The ratio of the bucket's aspect to the image's, or its inverse if that is larger."""
        ratio = (bucket.width / bucket.height) / (size[0] / size[1])
        return max(ratio, 1 / ratio)

    assert distance(crop.shape) == pytest.approx(min(map(distance, choices)))
    assert crop.original == size
    # Scaled as a whole: one factor for both sides up to rounding; one side equals the bucket's, neither is smaller.
    scale = max(crop.shape.width / size[0], crop.shape.height / size[1])
    assert all(abs(scaled - side * scale) <= 1 for scaled, side in zip(crop.scaled, size, strict=True))
    assert crop.scaled[0] == crop.shape.width or crop.scaled[1] == crop.shape.height
    # The crop lies inside, centered.
    assert 0 <= crop.left <= crop.scaled[0] - crop.shape.width <= 2 * crop.left + 1
    assert 0 <= crop.top <= crop.scaled[1] - crop.shape.height <= 2 * crop.top + 1
    assert 0 <= crop.share_lost < 1
    assert crop.upscaled == (scale > 1 and crop.scaled[0] > size[0])


@given(shapes)
@settings(deadline=None, max_examples=25)
def test_apply_gives_images_of_any_shape_the_bucket_size(size: tuple[int, int]) -> None:
    crop = fit(size, buckets(64, 8, 2.0, several=True))
    assert apply(Image.new("RGB", size), crop).size == (crop.shape.width, crop.shape.height)


def test_apply_crops_the_center_and_mirrors() -> None:
    stripes = Image.new("RGB", (300, 100), "black")
    stripes.paste("red", (100, 0, 150, 100))
    stripes.paste("blue", (150, 0, 200, 100))
    crop = fit((300, 100), [ImageShape(50, 50)])
    assert crop == Crop((300, 100), (150, 50), 50, 0, ImageShape(50, 50))
    assert crop.share_lost == pytest.approx(2 / 3)
    seen = apply(stripes, crop)
    assert seen.getpixel((10, 25)) == (255, 0, 0)
    assert seen.getpixel((40, 25)) == (0, 0, 255)
    assert apply(stripes, dataclasses.replace(crop, mirrored=True)).getpixel((10, 25)) == (0, 0, 255)


def test_apply_of_a_crop_matches_scaling_the_whole_image() -> None:
    noise = Image.effect_noise((211, 97), 80).convert("RGB")
    crop = fit(noise.size, [ImageShape(64, 64)])
    whole = noise.resize(crop.scaled, Image.Resampling.LANCZOS)
    expected = whole.crop((crop.left, crop.top, crop.left + 64, crop.top + 64))
    difference = numpy.asarray(apply(noise, crop)).astype(int) - numpy.asarray(expected).astype(int)
    assert abs(difference).max() <= 1


def test_buckets_of_512_in_steps_of_64_are_the_expected_five() -> None:
    """Worked out by hand: for each width the greatest height, with no aspect over 2."""
    found = buckets(512, 64, 2.0, several=True)
    assert {(b.width, b.height) for b in found} == {(512, 512), (576, 448), (448, 576), (640, 384), (384, 640)}
    assert fit((500, 300), found).shape == ImageShape(384, 640)
    assert fit((1000, 1000), found).share_lost == 0
    assert fit((30, 30), [ImageShape(8, 8), ImageShape(16, 16), ImageShape(4, 4)]).shape == ImageShape(
        16, 16
    )  # among equal aspects, the largest
