"""A folder with everything unusual that an image, a caption or a name can be.

Each valid image is red on its left and blue on its right if decoded correctly: upright, over white, its first frame,
in 8 bits.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)
# Files that train, with their reported oddities.
TRAINS = {
    "plain.png": (),
    "rotated.jpg": ("rotated by EXIF",),
    "cmyk.jpg": ("CMYK",),
    "cmyk.tif": ("CMYK",),
    "deep.png": ("more than 8 bits",),
    "deep.tif": ("more than 8 bits",),
    "palette.png": ("palette",),
    "palette.gif": ("palette",),
    "transparent.png": ("transparent",),
    "transparent.webp": ("transparent",),
    "animated.gif": ("animated", "palette"),
    "animated.webp": ("animated",),
    "animated.png": ("animated",),
    "two frames.tif": ("animated",),
    "tiny.png": ("tiny",),
    "wide.png": ("extreme aspect ratio",),
    "copy.png": (),
    "again.jpg": (),
    "日本語 🐈.png": (),
    "e\u0301.png": (),
    "\u00e9.png": (),
    "line\nbreak \x1b[31m.png": (),
    "<img src=x onerror=alert(1)>.png": (),
    "quote'\"&.PNG": (),
    "wrong-ending.jpg": (),
    os.fsdecode(b"caf\xe9.png"): (),
    "long caption.png": ("long caption",),
    "marked.png": (),
    "sub/named.png": (),
}
# Files that do not train, with the reported reason.
REFUSED = {
    "empty.png": "the file is empty",
    "cut.jpg": "damaged or truncated",
    "cut.png": "damaged or truncated",
    "text.png": "not a supported image format",
    "phone.heic": "not a supported image format",
    "page.svg": "not a supported image format",
    "bomb.png": "million pixels: scale it down",
    "bomb.gif": "million pixels: scale it down",
    "strip.png": "a side is longer than",
    "pipe.png": "neither a file nor a folder",
    "out.png": "links out of the folder",
    "loop.png": "neither a file nor a folder",
    "no caption.png": "it has no caption",
    "empty caption.png": "its caption is empty",
    "latin.png": "latin.txt is not UTF-8 (byte 5)",
    "utf16.png": "utf16.txt is not UTF-8 (byte 0)",
    'metadata.jsonl:2 ("../plain.png")': "is outside the folder",
    'metadata.jsonl:3 ("/etc/passwd")': "is outside the folder",
    'metadata.jsonl:4 ("gone.png")': "the image does not exist",
    "sub/unnamed.png": "it has no caption",
    "alone.txt": "no image has this name",
    "link.txt": "links out of the folder",
}

SPECIAL = {"pipe.png", "out.png", "loop.png"}  # not regular files
SUFFIXES = {".png", ".jpg", ".gif", ".tif", ".webp", ".heic", ".svg"}


def halves(size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """An RGB PNG written by hand: Pillow cannot write 16-bit RGB, or a size without pixels."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _images() -> dict[str, bytes]:
    plain, green = halves(), Image.new("RGB", (64, 64), "green")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated a quarter turn clockwise
    deep = numpy.zeros((64, 64, 3), ">u2")
    deep[:, :32, 0] = deep[:, 32:, 2] = 65535
    clear = halves(mode="RGBA")
    clear.putpixel((32, 63), (9, 9, 9, 0))
    bomb = bytearray(saved(plain, "GIF"))
    bomb[6:10] = struct.pack("<HH", 16000, 16000)
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    frames: dict[str, Any] = {"save_all": True, "append_images": [green]}
    return {
        "plain.png": saved(plain, "PNG"),
        "copy.png": saved(plain, "PNG"),
        "again.jpg": saved(plain, "JPEG", quality=80),
        "rotated.jpg": saved(plain.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95),
        "cmyk.jpg": saved(plain.convert("CMYK"), "JPEG", quality=100),
        "cmyk.tif": saved(plain.convert("CMYK"), "TIFF"),
        "deep.png": png(64, 64, 16, b"".join(b"\0" + row.tobytes() for row in deep)),
        "palette.png": saved(plain.convert("P"), "PNG"),
        "palette.gif": saved(plain.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        "transparent.png": saved(clear, "PNG"),
        "transparent.webp": saved(clear, "WEBP", lossless=True),
        "animated.gif": saved(plain, "GIF", **frames),
        "animated.webp": saved(plain, "WEBP", lossless=True, **frames),
        "animated.png": saved(plain, "PNG", **frames),
        "two frames.tif": saved(plain, "TIFF", **frames),
        "tiny.png": saved(halves((10, 10)), "PNG"),
        "wide.png": saved(halves((400, 64)), "PNG"),
        "wrong-ending.jpg": saved(plain, "PNG", compress_level=1),
        "empty.png": b"",
        "cut.jpg": saved(noise, "JPEG")[:-300],
        "cut.png": saved(noise, "PNG")[:-300],
        "text.png": b"hello",
        "phone.heic": b"\0\0\0\x18ftypheic",
        "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "bomb.png": png(16_000, 16_000, 8, b""),
        "bomb.gif": bytes(bomb),
        "strip.png": png(60_000, 20, 8, b""),
    }


def make(folder: Path) -> Path:
    """Write the corpus into `folder/images` and return that path; targets of its links lie outside."""
    root = folder / "images"
    (root / "sub").mkdir(parents=True)
    images = _images()
    for number, name in enumerate([*TRAINS, *REFUSED]):
        file = root / name
        if file.suffix.lower() in SUFFIXES and name not in SPECIAL:
            # Files without an image of their own get a unique one.
            file.write_bytes(images[name] if name in images else saved(halves((64, 64 + 2 * number)), "PNG"))
            if file.parent == root and name != "no caption.png":
                file.with_suffix(".txt").write_text(f"caption {number}", encoding="utf-8")
    deep = Image.fromarray(numpy.asarray(halves().convert("L"), numpy.uint16) * 257)
    (root / "deep.tif").write_bytes(saved(deep, "TIFF"))
    (root / "marked.txt").write_bytes("\ufeffmarked\r\n".encode())
    (root / "long caption.txt").write_text("word " * 40_000)
    (root / "empty caption.txt").write_text(" \n")
    (root / "latin.txt").write_bytes("a café".encode("latin-1"))
    (root / "utf16.txt").write_bytes("a cat".encode("utf-16"))
    (root / "alone.txt").write_text("alone")
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(images["plain.png"])
    (outside / "secret.txt").write_text("secret")
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / "link.txt").symlink_to(outside / "secret.txt")
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    rows = ["named.png", "../plain.png", "/etc/passwd", "gone.png"]
    (root / "sub" / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": "from the table"}) for name in rows)
    )
    return root
