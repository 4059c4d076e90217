"""Pictures, captions and the audit: what trains, what does not and why, and that the user's folder is never written."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.data.pictures import Bucket, Crop, Unreadable, apply, buckets, canonical_colour, decode, fit
from finetune.data.scan import Audit, Picture, _hold_out, scan
from finetune.errors import UserError
from finetune.recipe import Data, Source
from finetune.report import tables

# -- pictures ---------------------------------------------------------------------------------------------------------


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(content: bytes, background: str = "#ffffff", at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    found = decode(content, background).getpixel(at)
    assert isinstance(found, tuple)
    return found


def empty_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels: whoever decodes it fails in another way than by its size."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", body), (b"IDAT", b""), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


# For each EXIF orientation, where in the stored 2×3 picture the pixel lies that is seen at the top left (TIFF 6.0, tag 274).
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


def test_transparency_lies_over_the_background() -> None:
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 128))
    expected = tuple(round(128 / 255 * red + 127 / 255 * green) for red, green in ((255, 0), (0, 128), (0, 0)))
    assert pixel(encoded(half), canonical_colour("green")) == pytest.approx(expected, abs=1)
    clear = Image.new("LA", (2, 2), (0, 0))
    assert pixel(encoded(clear), canonical_colour("rgb(1, 2, 3)")) == (1, 2, 3)
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
def test_grey_of_more_than_8_bits_is_scaled_and_not_clipped(mode: str, kind: str) -> None:
    values = numpy.array([[0, 255, 0x1234, 0x8000, 0xFFFF]])
    stored = (values / 65535).astype(numpy.float32) if mode == "F" else values.astype(numpy.uint16 if mode == "I;16" else numpy.int32)
    content = encoded(Image.fromarray(stored), kind)
    assert Image.open(io.BytesIO(content)).mode == mode
    seen = numpy.asarray(decode(content, "#ffffff"))
    assert (seen == numpy.round(values / 257)[..., None]).all()


def test_16_bit_grey_with_a_transparent_value() -> None:
    stored = Image.fromarray(numpy.array([[7, 40_000]], dtype=numpy.uint16))
    content = encoded(stored, transparency=7)
    assert pixel(content, "#0000ff") == (0, 0, 255)
    assert pixel(content, "#0000ff", (1, 0)) == (156, 156, 156)


def test_cmyk_and_the_first_frame() -> None:
    assert pixel(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)) == pytest.approx((255, 0, 0), abs=3)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green")]
    for kind in ("GIF", "WEBP", "PNG", "MPO"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
        assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 2
        assert pixel(content) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"hello", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture"),
        (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-200], "truncated"),
        (encoded(Image.effect_noise((64, 64), 50))[:-200], "truncated"),
        (empty_png(20_000, 20), "20000×20 pixels: a side of more than 16384"),
        (empty_png(20, 20_000), "20×20000 pixels: a side of more than 16384"),
        (empty_png(16_000, 16_000), "more than 179 million pixels"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_reason(content: bytes, said: str) -> None:
    with pytest.raises(Unreadable, match=said):
        decode(content, "#ffffff")


@pytest.mark.parametrize("colour", ["whit", "#12", "transparent", "rgb(300, 0, 0)", "#ffffff80", ""])
def test_a_background_that_is_no_opaque_colour_is_named(colour: str) -> None:
    with pytest.raises(UserError) as caught:
        scan(Data(path="anywhere", background=colour))
    assert caught.value.where == "data.background"


def test_equal_colours_are_one() -> None:
    assert {canonical_colour(colour) for colour in ("white", "#fff", "#FFFFFF", "rgb(255, 255, 255)", "hsl(0, 0%, 100%)", "#ffffffff")} == {"#ffffff"}


# -- buckets and crops --------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))


@given(st.integers(8, 2048), st.sampled_from([1, 8, 32, 64]), st.floats(1, 4))
@settings(deadline=None, max_examples=40)
def test_buckets(resolution: int, step: int, aspect: float) -> None:
    step = max(step, resolution // 32)
    found = buckets(resolution, step, aspect, several=True)
    assert len(set(found)) == len(found)
    assert bool(found) == (step <= resolution)
    for bucket in found:
        assert bucket.width % step == bucket.height % step == 0
        assert bucket.width * bucket.height <= resolution**2
        assert max(bucket.width, bucket.height) <= aspect * min(bucket.width, bucket.height)
        assert Bucket(bucket.height, bucket.width) in found
    square = resolution // step * step
    assert not found or Bucket(square, square) in found
    assert buckets(resolution, step, aspect, several=False) == [Bucket(resolution, resolution)]


@given(shapes, st.sampled_from([64, 200, 512]), st.sampled_from([8, 64]))
@settings(deadline=None)
def test_a_picture_goes_to_the_bucket_nearest_in_aspect_and_covers_it(size: tuple[int, int], resolution: int, step: int) -> None:
    choices = buckets(resolution, step, 2.0, several=True)
    crop = fit(size, choices)

    def distance(bucket: Bucket) -> float:
        """How far one must stretch the picture's aspect to get the bucket's, as a ratio."""
        ratio = (bucket.width / bucket.height) / (size[0] / size[1])
        return max(ratio, 1 / ratio)

    assert distance(crop.bucket) == pytest.approx(min(map(distance, choices)))
    assert crop.original == size
    # Scaled as a whole: both sides by one factor up to rounding, one side meets the bucket, none falls short.
    scale = max(crop.bucket.width / size[0], crop.bucket.height / size[1])
    assert all(abs(scaled - side * scale) <= 1 for scaled, side in zip(crop.scaled, size, strict=True))
    assert crop.scaled[0] == crop.bucket.width or crop.scaled[1] == crop.bucket.height
    # The crop lies inside, in the middle.
    assert 0 <= crop.left <= crop.scaled[0] - crop.bucket.width <= 2 * crop.left + 1
    assert 0 <= crop.top <= crop.scaled[1] - crop.bucket.height <= 2 * crop.top + 1
    assert 0 <= crop.share_lost < 1
    assert crop.upscaled == (scale > 1 and crop.scaled[0] > size[0])


@given(shapes)
@settings(deadline=None, max_examples=25)
def test_every_shape_comes_out_at_its_bucket_size(size: tuple[int, int]) -> None:
    crop = fit(size, buckets(64, 8, 2.0, several=True))
    assert apply(Image.new("RGB", size), crop).size == (crop.bucket.width, crop.bucket.height)


def test_cropping_shows_the_middle_and_mirroring_turns_it() -> None:
    stripes = Image.new("RGB", (300, 100), "black")
    stripes.paste("red", (100, 0, 150, 100))
    stripes.paste("blue", (150, 0, 200, 100))
    crop = fit((300, 100), [Bucket(50, 50)])
    assert crop == Crop((300, 100), (150, 50), 50, 0, Bucket(50, 50))
    assert crop.share_lost == pytest.approx(2 / 3)
    seen = apply(stripes, crop)
    assert seen.getpixel((10, 25)) == (255, 0, 0)
    assert seen.getpixel((40, 25)) == (0, 0, 255)
    assert apply(stripes, dataclasses.replace(crop, mirrored=True)).getpixel((10, 25)) == (0, 0, 255)


def test_scaling_only_what_is_kept_gives_what_scaling_all_would() -> None:
    noise = Image.effect_noise((211, 97), 80).convert("RGB")
    crop = fit(noise.size, [Bucket(64, 64)])
    whole = noise.resize(crop.scaled, Image.Resampling.LANCZOS)
    expected = whole.crop((crop.left, crop.top, crop.left + 64, crop.top + 64))
    difference = numpy.asarray(apply(noise, crop)).astype(int) - numpy.asarray(expected).astype(int)
    assert abs(difference).max() <= 1


# -- the audit of folders -------------------------------------------------------------------------------------------------


def put(folder: Path, name: str, colour: str = "red", size: tuple[int, int] = (16, 16), caption: str | None = None) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    if caption is not None:
        file.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return file


def data(path: Path, **changes: Any) -> Data:
    return Data(**{"path": str(path), "resolution": 16, "bucket_step": 8, **changes})


def captions(audit: Audit) -> dict[str, str]:
    return {Path(picture.name).name: picture.caption for picture in audit.pictures}


def problems(audit: Audit) -> dict[str, tuple[str, str]]:
    return {Path(problem.name).name: (problem.kind, problem.detail) for problem in audit.problems}


def test_text_files_beside_nested_pictures(tmp_path: Path) -> None:
    put(tmp_path, "a.png", caption="\ufeff one \n two\t")
    put(tmp_path, "b/c.d.JPG", caption="deep")
    put(tmp_path, ".hidden/e.png")
    put(tmp_path, "._f.png")
    audit = scan(data(tmp_path))
    assert captions(audit) == {"a.png": "one two", "c.d.JPG": "deep"}
    assert audit.problems == ()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_a_metadata_file_names_captions_and_nothing_is_dropped_in_silence(tmp_path: Path, name: str) -> None:
    for picture in ("a.png", "deep/b.png", "unnamed.png", "blank.png"):
        put(tmp_path, picture)
    (tmp_path / "unnamed.txt").write_text("not read")
    (tmp_path / "README.txt").write_text("about")
    rows = [("a.png", "a, \u2028 red  one"), ("./deep//b.png", "below"), ("gone.png", "nowhere"), ("../outside.png", "never"), ("blank.png", " ")]
    put(tmp_path.parent, "outside.png")
    if name.endswith("jsonl"):
        (tmp_path / name).write_text(
            "\n".join(json.dumps({"file_name": file, "text": text}, ensure_ascii=False) for file, text in rows), encoding="utf-8"
        )
    else:
        (tmp_path / name).write_text("file_name,text\n" + "".join(f'{file},"{text}"\n' for file, text in rows), encoding="utf-8")
    audit = scan(data(tmp_path, missing_captions="skip", unreadable_pictures="skip"))
    assert captions(audit) == {"a.png": "a, red one", "b.png": "below"}
    first = 1 if name.endswith("jsonl") else 2
    assert problems(audit) == {
        "unnamed.png": ("missing caption", "no caption was found, so it does not train"),
        "blank.png": ("missing caption", "no caption was found, so it does not train"),
        f'{name}:{first + 2} ("gone.png")': ("missing picture", "names a picture that is not there"),
        'outside.png")': ("missing picture", "names a file outside its folder, which is not read"),
        "unnamed.txt": ("unused caption", "not read: a metadata file speaks for its picture"),
        "README.txt": ("unused caption", "no picture has its name"),
    }
    with pytest.raises(UserError, match="2 missing captions and 2 missing pictures") as caught:
        scan(data(tmp_path)).raise_if_stopped()
    assert "gone.png" in caught.value.where
    assert "outside.png" in caught.value.where


def test_the_nearest_metadata_file_speaks(tmp_path: Path) -> None:
    put(tmp_path, "a.png", caption="beside")
    put(tmp_path, "sub/b.png")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.png,from the table\n")
    assert captions(scan(data(tmp_path))) == {"a.png": "beside", "b.png": "from the table"}


@pytest.mark.parametrize(
    ("name", "content", "said", "line"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{oops', "not a JSON object", 2),
        ("metadata.jsonl", b"\n[1]", "not a JSON object", 2),
        ("metadata.jsonl", b'{"file_name": "a.png"}', 'no "text" in this line, but file_name', 1),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"file_name": "./a.png", "text": "y"}', "named twice", 2),
        ("metadata.csv", b"file_name;text\na.png;x\n", 'no "file_name" in this line, but file_name;text', 2),
        ("metadata.csv", b'file_name,text\na.png,"x\n', "comma-separated", 2),
        ("metadata.csv", "file_name,text\na.png,é\n".encode("latin-1"), r"not UTF-8 text \(byte 21\)", None),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16"), r"not UTF-8 text \(byte 0\)", None),
        ("metadata.parquet", b"PAR1", "metadata.parquet", None),
    ],
)
def test_a_metadata_file_that_cannot_be_read_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, said: str, line: int | None) -> None:
    put(tmp_path, "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        scan(data(tmp_path))
    assert caught.value.where == str(tmp_path / name) + (f":{line}" if line else "")
    assert caught.value.remedy


def test_two_metadata_files_side_by_side(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="which is meant"):
        scan(data(tmp_path))


def test_a_caption_in_another_encoding_names_file_and_byte(tmp_path: Path) -> None:
    put(tmp_path, "a.png").with_suffix(".txt").write_bytes("a café".encode("latin-1"))
    with pytest.raises(UserError, match="1 unreadable caption") as caught:
        scan(data(tmp_path, missing_captions="empty")).raise_if_stopped()
    assert "a.txt is not UTF-8 (byte 5)" in caught.value.where


def test_a_caption_that_is_no_text_is_named(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two"]}')
    with pytest.raises(UserError, match="1 unreadable caption") as caught:
        scan(data(tmp_path)).raise_if_stopped()
    assert "metadata.jsonl:1 is not text" in caught.value.where


def test_several_sources_with_repeats_and_prefix(tmp_path: Path) -> None:
    put(tmp_path / "one", "a.png", "red", caption="a cat")
    put(tmp_path / "one", "b.png", "blue")
    put(tmp_path / "two", "c.png", "green", (32, 8), caption="a dog")
    sources = (Source(str(tmp_path / "one"), repeats=3, prefix="sks style,"), Source(str(tmp_path / "two")))
    audit = scan(Data(sources=sources, resolution=32, bucket_step=8, missing_captions="empty"))
    assert captions(audit) == {"a.png": "sks style, a cat", "b.png": "sks style,", "c.png": "a dog"}
    assert [picture.repeats for picture in audit.pictures] == [3, 3, 1]
    assert audit.bucket_counts() == {Bucket(32, 32): 6, Bucket(40, 24): 1}
    assert problems(audit) == {"b.png": ("missing caption", 'trains with only "sks style," for a caption')}
    assert not audit.problems[0].stops


def test_links_are_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data", tmp_path / "elsewhere"
    put(inside, "a.png", caption="mine")
    secret = put(outside, "secret.png", "blue", caption="secret")
    (inside / "out.png").symlink_to(secret)
    (inside / "out.txt").symlink_to(outside / "secret.txt")
    (inside / "folder").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    (inside / "broken.png").symlink_to(inside / "nothing.png")
    (inside / "again.png").symlink_to(inside / "a.png")
    (inside / "again.txt").symlink_to("a.txt")
    os.mkfifo(inside / "pipe.png")
    audit = scan(data(inside, unreadable_pictures="skip"))
    assert captions(audit) == {"a.png": "mine", "again.png": "mine"}
    found = problems(audit)
    assert found.keys() == {"out.png", "out.txt", "folder", "loop", "broken.png", "pipe.png"}
    assert {kind for kind, _ in found.values()} == {"unreadable picture"}
    assert all("link" in detail for name, (_, detail) in found.items() if name in ("out.png", "out.txt", "folder", "loop"))
    with pytest.raises(UserError, match="6 unreadable pictures"):
        scan(data(inside)).raise_if_stopped()


def test_unreadable_pictures_stop_the_run_or_are_skipped_by_name(tmp_path: Path) -> None:
    put(tmp_path, "fine.png", caption="fine")
    jpeg = put(tmp_path, "cut.jpg", size=(64, 64), caption="cut")
    jpeg.write_bytes(jpeg.read_bytes()[:-20])
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "phone.txt").write_text("from a phone")
    put(tmp_path, "nothing.png", caption="nothing").write_bytes(b"")
    audit = scan(data(tmp_path, unreadable_pictures="skip"))
    assert captions(audit) == {"fine.png": "fine"}
    assert {name: kind for name, (kind, _) in problems(audit).items()} == dict.fromkeys(
        ("cut.jpg", "phone.heic", "nothing.png"), "unreadable picture"
    )
    shown = tables.data(audit)
    assert "1 pictures" in shown
    assert all(name in shown for name in ("cut.jpg", "phone.heic", "nothing.png", "truncated", "empty"))
    with pytest.raises(UserError, match="3 unreadable pictures") as caught:
        scan(data(tmp_path)).raise_if_stopped()
    assert all(name in caught.value.where for name in ("cut.jpg", "phone.heic", "nothing.png"))
    assert "unreadable_pictures: skip" in caught.value.remedy


def test_each_picture_is_read_once_and_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        put(tmp_path, f"{number}.png", caption="x")
    opened: list[str] = []
    decoded: list[bytes] = []
    read_bytes = Path.read_bytes

    def counting_read(self: Path) -> bytes:
        opened.append(self.name)
        return read_bytes(self)

    def counting_decode(content: bytes, background: str) -> Image.Image:
        decoded.append(content)
        return decode(content, background)

    monkeypatch.setattr(Path, "read_bytes", counting_read)
    monkeypatch.setattr("finetune.data.scan.decode", counting_decode)
    told: list[tuple[int, str]] = []
    scan(data(tmp_path), lambda seen, name: told.append((seen, Path(name).name)))
    assert sorted(name for name in opened if name.endswith(".png")) == ["0.png", "1.png", "2.png", "3.png"]
    assert len(decoded) == 4
    assert told == [(number, f"{number}.png") for number in range(4)]


def test_names_that_are_not_utf8_can_be_printed(tmp_path: Path) -> None:
    put(tmp_path, os.fsdecode(b"caf\xe9.png"), caption="x")
    assert tables.data(scan(data(tmp_path))).encode("utf-8")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Every file's and folder's time of change, and every file's bytes."""
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in [folder, *folder.rglob("*")]}


def test_the_folder_is_never_written(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    put(tmp_path / "folder", "sub/a.png", caption="a")
    put(tmp_path / "folder", "b.jpg")
    (tmp_path / "folder" / "b.jpg").write_bytes(b"broken")
    hugging_face(datasets, {"train": ["red", "blue"]})["train"].save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet").mkdir()
    hugging_face(datasets, {"train": ["red"]})["train"].to_parquet(str(tmp_path / "parquet" / "train-00000.parquet"))
    before = snapshot(tmp_path)
    for name in ("folder", "saved", "parquet"):
        for picture in scan(data(tmp_path / name, missing_captions="empty", unreadable_pictures="skip")).pictures:
            picture.read()
    assert snapshot(tmp_path) == before


@given(st.sets(st.binary(min_size=8, max_size=8), min_size=2, max_size=30), st.floats(0.01, 0.5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_held_out_pictures_depend_on_their_bytes_alone(digests: set[bytes], share: float, random: Any) -> None:
    crop, count = fit((16, 16), [Bucket(16, 16)]), len(digests)
    pictures = [Picture(f"{n}.png", "", digest.hex(), crop, 1, False, bytes) for n, digest in enumerate(sorted(digests))]
    random.shuffle(pictures)
    held = {p.digest for p in _hold_out(pictures, share) if p.held_out}
    assert 1 <= len(held) < count
    assert abs(len(held) - share * count) <= 1
    renamed = [dataclasses.replace(p, name=f"x{n}.png") for n, p in enumerate(random.sample(pictures, count))]
    assert {p.digest for p in _hold_out(renamed, share) if p.held_out} == held
    copies = [p.held_out for p in _hold_out([*pictures, *pictures], share)]
    assert copies[:count] == copies[count:]
    # One more picture takes at most one other's place.
    more = _hold_out([*pictures, dataclasses.replace(pictures[0], digest="0" * 16)], share)
    assert len({p.digest for p in more if p.held_out} ^ held) <= 2
    assert not any(p.held_out for p in _hold_out(pictures, 0.0))


def test_held_out_pictures_are_told(tmp_path: Path) -> None:
    for number, colour in enumerate(("red", "green", "blue", "black")):
        put(tmp_path, f"{number}.png", colour, caption=colour)
    audit = scan(data(tmp_path, held_out=0.25))
    assert (len(audit.training), len(audit.held_out)) == (3, 1)
    shown = tables.data(audit)
    assert "3 pictures" in shown
    assert "1 pictures, for the validation loss" in shown


# -- Hugging Face data sets -----------------------------------------------------------------------------------------------


def hugging_face(datasets: Any, splits: dict[str, list[str]]) -> Any:
    """A `DatasetDict` of one small picture for each colour, with captions "a <colour>"."""
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {"image": [Image.new("RGB", (16, 16), c) for c in colours], "text": [f"a {c}" for c in colours]}, features=features
            )
            for split, colours in splits.items()
        }
    )


def test_hugging_face_data_sets_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    both = hugging_face(datasets, {"train": ["red", "blue"], "test": ["green"]})
    both.save_to_disk(str(tmp_path / "dict"))
    both["train"].save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    both["train"].to_parquet(str(tmp_path / "parquet" / "data" / "train-00000.parquet"))
    for name in ("dict", "saved", "parquet"):
        audit = scan(data(tmp_path / name))
        assert [picture.caption for picture in audit.training] == ["a red", "a blue"]
        assert [decode(picture.read(), "#ffffff").getpixel((0, 0)) for picture in audit.training] == [(255, 0, 0), (0, 0, 255)]
        assert [problem.kind for problem in audit.problems] == (["unused split"] if name == "dict" else [])
    with pytest.raises(UserError, match='no column "prompt"') as caught:
        scan(data(tmp_path / "saved", caption_column="prompt"))
    assert (caught.value.where, caught.value.remedy) == ("data.caption_column", "columns there: image, text")
    datasets.Dataset.from_dict({"image": [1, 2], "text": ["a", "b"]}).save_to_disk(str(tmp_path / "numbers"))
    with pytest.raises(UserError, match="holds no pictures"):
        scan(data(tmp_path / "numbers"))


def test_rows_without_a_picture_or_with_captions_that_are_no_text_are_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    secret = put(tmp_path, "secret.png")
    good = encoded(Image.new("RGB", (16, 16)))
    cells = [{"bytes": good, "path": None}, None, {"bytes": None, "path": str(secret)}, {"bytes": b"junk", "path": None}]
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_dict({"image": cells, "text": [["a", "b"]] * 4}, features=features).save_to_disk(str(tmp_path / "lists"))
    assert [p.kind for p in scan(data(tmp_path / "lists")).problems] == ["unreadable caption"] * 4
    features["text"] = datasets.Value("string")
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict({"image": cells, "text": ["x"] * 4}, features=features).to_parquet(str(tmp_path / "rows" / "train.parquet"))
    audit = scan(data(tmp_path / "rows"))
    assert len(audit.pictures) == 1
    assert [problem.detail.split(":")[0] for problem in audit.problems] == [
        "the row has no picture",
        "the row names a file outside the data set, which is not read",
        "not a picture that can be opened",
    ]


def test_a_hub_name_without_a_network_gets_one_sentence() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(UserError) as caught:
        scan(Data(path="nobody/no-such-data"))
    assert caught.value.problem.startswith('there is no folder "nobody/no-such-data", and the hub gave no data set of that name: ')
    assert "\n" not in caught.value.problem
    assert "network" in caught.value.remedy


def test_buckets_in_numbers() -> None:
    """By hand, for 512² in steps of 64: of each width the tallest, none thinner than 2."""
    found = buckets(512, 64, 2.0, several=True)
    assert {(b.width, b.height) for b in found} == {(512, 512), (576, 448), (448, 576), (640, 384), (384, 640)}
    assert fit((500, 300), found).bucket == Bucket(640, 384)
    assert fit((1000, 1000), found).share_lost == 0
