"""Build the embedded emoji images from the two npm packages that carry them.

    npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python tools/build_emoji.py node_modules

Three folders of captioned images appear under `finetune/assets/emoji/`, each a plain image folder as any user has
one (lossless WebP with transparency, captions in `metadata.jsonl`):

- `noto/`            every emoji that both houses draw, as Google's Noto draws it: the base model learns these;
- `twemoji-train/`   400 of them as Twemoji draws them: the LoRA of the demo learns these;
- `twemoji-unseen/`  all the others as Twemoji draws them: never shown to a model, they judge the LoRA.

The sprite sheets are grids of 66-pixel cells, a 64-pixel image with a 1-pixel border, at the positions `emoji.json`
gives (https://github.com/iamcal/emoji-data#using-the-spritesheets).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from PIL import Image

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


def write_folder(folder: Path, sheet: Image.Image, emojis: list[dict[str, Any]]) -> None:
    """Cut the images of `emojis` out of `sheet` and write them with their captions into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for emoji in emojis:
        left, top = (emoji[key] * CELL_PIXELS + 1 for key in ("sheet_x", "sheet_y"))
        image = sheet.crop((left, top, left + IMAGE_PIXELS, top + IMAGE_PIXELS))
        name = (
            re.sub(
                r"[^a-z0-9]+", "-", emoji["short_name"].lower().replace("+1", "plus1").replace("-1", "minus1")
            ).strip("-")
            + ".webp"
        )
        image.save(folder / name, lossless=True, quality=100, method=6, exact=False)
        lines.append(
            json.dumps({"file_name": name, "text": caption(emoji), "category": emoji["category"]}, ensure_ascii=False)
        )
    assert len({json.loads(line)["file_name"] for line in lines}) == len(lines), "two emoji share a file name"
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


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
    write_folder(ASSETS / "noto", sheets["google"], emojis)
    write_folder(ASSETS / "twemoji-train", sheets["twitter"], [e for e in emojis if e["unified"] in training])
    write_folder(ASSETS / "twemoji-unseen", sheets["twitter"], [e for e in emojis if e["unified"] not in training])
    size = sum(file.stat().st_size for file in ASSETS.rglob("*.webp"))
    print(f"{len(emojis)} emoji, {len(training)} for the LoRA, {size / 1e6:.2f} MB of images in {ASSETS}")


if __name__ == "__main__":
    main()
