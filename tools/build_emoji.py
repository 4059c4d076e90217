"""Build the bundled emoji images from the two npm packages that contain them.

    npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python tools/build_emoji.py node_modules

Writes three WebDataset shards of captioned images to `finetune/assets/emoji/` (`NAME.webp`, lossless with
transparency, and `NAME.json` with the caption as `text`):

- `noto.tar`            every emoji that both vendors have, by Google's Noto: training data of the base model;
- `twemoji-train.tar`   400 of them by Twemoji: training data of the demo's LoRA;
- `twemoji-unseen.tar`  all others by Twemoji: never shown to a model, used to judge the LoRA.

The sprite sheets are grids of 66-pixel cells, a 64-pixel image with a 1-pixel border, at the positions in `emoji.json`
(https://github.com/iamcal/emoji-data#using-the-spritesheets).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.archive import write_tar

IMAGE_PIXELS = 64
CELL_PIXELS = IMAGE_PIXELS + 2
TRAINING_IMAGES = 400
ASSETS = Path(__file__).resolve().parent.parent / "finetune" / "assets" / "emoji"


def words(name: str) -> str:
    """A name as a caption reads: lower case, punctuation that separates words turned into spaces."""
    return re.sub(r"[\s_:;-]+", " ", name.lower()).strip()


def caption(emoji: dict[str, Any]) -> str:
    """The Unicode name, led by the everyday short name where that adds a word ("heart, heavy black heart").

    Flags keep their name alone, as their short names are two-letter country codes, and so do thumbs ("+1").
    """
    name, short = words(emoji["name"]), words(emoji["short_name"])
    if emoji["category"] == "Flags" or emoji["short_name"][0] in "+-" or set(short.split()) <= set(name.split()):
        return name
    return f"{short}, {name}"


def drawn_by_both(emoji: dict[str, Any]) -> bool:
    return emoji["has_img_google"] and emoji["has_img_twitter"] and not emoji.get("obsoleted_by")


def write_shard(shard: Path, sheet: Image.Image, emojis: list[dict[str, Any]]) -> None:
    """Cut the images of `emojis` out of `sheet` and write them with their captions, sorted by name."""
    found: dict[str, tuple[bytes, bytes]] = {}
    for emoji in emojis:
        left, top = (emoji[key] * CELL_PIXELS + 1 for key in ("sheet_x", "sheet_y"))
        image = sheet.crop((left, top, left + IMAGE_PIXELS, top + IMAGE_PIXELS))
        short = emoji["short_name"].lower().replace("+1", "plus1").replace("-1", "minus1")
        name = re.sub(r"[^a-z0-9]+", "-", short).strip("-")
        assert f"{name}.webp" not in found, "two emoji share a file name"
        content = io.BytesIO()
        image.save(content, "WEBP", lossless=True, quality=100, method=6, exact=False)
        described = json.dumps({"text": caption(emoji), "category": emoji["category"]}, ensure_ascii=False)
        found[f"{name}.webp"] = content.getvalue(), described.encode()
    members = []
    for file_name, (content_bytes, described_bytes) in sorted(found.items()):
        members += [(file_name, content_bytes), (f"{file_name.removesuffix('.webp')}.json", described_bytes)]
    write_tar(shard, members)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("node_modules", type=Path, help="the folder that npm installed the two packages into")
    modules = parser.parse_args().node_modules
    emojis = [
        e for e in json.loads((modules / "emoji-datasource-google" / "emoji.json").read_text()) if drawn_by_both(e)
    ]
    sheets = {
        house: Image.open(modules / f"emoji-datasource-{house}" / "img" / house / "sheets-256" / "64.png").convert(
            "RGBA"
        )
        for house in ("google", "twitter")
    }
    # Which 400 the LoRA sees is decided by a hash of the name: fixed for ever, and spread over all categories.
    by_hash = sorted(emojis, key=lambda emoji: hashlib.sha256(emoji["unified"].encode()).hexdigest())
    training = {emoji["unified"] for emoji in by_hash[:TRAINING_IMAGES]}
    write_shard(ASSETS / "noto.tar", sheets["google"], emojis)
    write_shard(ASSETS / "twemoji-train.tar", sheets["twitter"], [e for e in emojis if e["unified"] in training])
    write_shard(ASSETS / "twemoji-unseen.tar", sheets["twitter"], [e for e in emojis if e["unified"] not in training])
    size = sum(file.stat().st_size for file in ASSETS.glob("*.tar"))
    print(f"{len(emojis)} emoji, {len(training)} for the LoRA, {size / 1e6:.2f} MB of images in {ASSETS}")


if __name__ == "__main__":
    main()
