"""Duplicate images are found whatever was done to them, in nearly linear time."""

from __future__ import annotations

import io
import time

import numpy
import pytest
from PIL import Image, ImageEnhance

from finetune.data.audit import duplicates
from finetune.data.audit.duplicates import NEAR_BITS, NEAR_COLOR, groups, near
from finetune.data.audit.inspect import COLOR_BYTES, FINGERPRINT_BYTES, HASH_BYTES, fingerprint
from tools.archive import bundled


def emoji(count: int) -> list[Image.Image]:
    files = [*bundled("emoji/noto").values()][:: max(1, 1875 // count)][:count]
    return [Image.open(io.BytesIO(file.read())).convert("RGBA").resize((96, 96)) for file in files]


def on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


def test_near_duplicates_include_rescaled_and_recompressed_images_only() -> None:
    images = [on_white(image) for image in emoji(60)]
    ways = (
        lambda image: image.resize((64, 64), Image.Resampling.LANCZOS),
        lambda image: image.resize((500, 500), Image.Resampling.LANCZOS),
        lambda image: recompressed(image, 60),
        lambda image: ImageEnhance.Brightness(image).enhance(0.97),
    )
    changed = [ways[number % 4](image) for number, image in enumerate(images)]
    found = list(groups(near(b"".join(fingerprint(image) for image in [*images, *changed]))))
    pairs = [[n, n + len(images)] for n in range(len(images))]
    assert sum(pair in found for pair in pairs) >= 0.95 * len(pairs)
    assert sum(len(group) > 2 for group in found) <= 3  # flags and faces that resemble each other


def test_fingerprint_distinguishes_colors_of_one_shape() -> None:
    shape = emoji(60)[7].getchannel("A")
    painted = [
        Image.composite(Image.new("RGB", shape.size, color), Image.new("RGB", shape.size, "white"), shape)
        for color in ("red", "blue")
    ]
    left, right = (fingerprint(image) for image in painted)
    assert not list(groups(near(left + right)))
    assert list(groups(near(left + left))) == [[0, 1]]


def is_near(left: numpy.ndarray, right: numpy.ndarray) -> bool:
    bits = sum(int(byte).bit_count() for byte in left[:HASH_BYTES] ^ right[:HASH_BYTES])
    return bits <= NEAR_BITS and int(abs(left[HASH_BYTES:].astype(int) - right[HASH_BYTES:]).max()) <= NEAR_COLOR


@pytest.mark.parametrize("seed", range(3))
def test_near_by_bands_finds_the_same_groups_as_all_pairs(seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    rows = generator.integers(0, 256, (60, FINGERPRINT_BYTES), dtype=numpy.uint8)
    rows = rows[generator.integers(0, 60, 150)]
    for row in rows:  # flip up to 9 random bits, change colors
        for bit in generator.integers(0, 8 * HASH_BYTES, generator.integers(0, 10)):
            row[bit // 8] ^= 1 << (bit % 8)
        row[HASH_BYTES:] = (row[HASH_BYTES:].astype(int) + generator.integers(0, 12, COLOR_BYTES)).clip(0, 255)
    labels = numpy.arange(len(rows))
    for left in range(len(rows)):  # the reference: compare every pair and join
        for right in range(left):
            if is_near(rows[left], rows[right]):
                labels[labels == labels[left]] = labels[right]
    assert list(groups(near(rows.tobytes()))) == list(groups(labels))
    assert list(groups(labels))


def test_near_with_many_images_in_one_band_is_not_quadratic() -> None:
    """20,000 images that share a band, as blank backgrounds do, and differ elsewhere."""
    rows = numpy.random.default_rng(0).integers(0, 256, (20_000, FINGERPRINT_BYTES), dtype=numpy.uint8)
    rows[:, :2] = 0
    rows[19_999] = rows[5]
    start = time.perf_counter()
    assert list(groups(near(rows.tobytes()))) == [[5, 19_999]]
    assert time.perf_counter() - start < 30  # all pairs would take minutes


def test_near_of_zero_or_one_image_finds_nothing() -> None:
    assert list(groups(near(b""))) == []
    assert list(groups(near(bytes(FINGERPRINT_BYTES)))) == []
    assert list(groups(duplicates.equal(b"abcabd", 3))) == []
