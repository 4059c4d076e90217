"""Build the bundled digits from scikit-learn, which includes them.

    pip download --no-deps scikit-learn==1.9.1
    python tools/build_digits.py scikit_learn-1.9.1-*.whl

Writes 1,797 images of handwritten digits, 8×8 pixels with 17 gray levels, to `finetune/assets/digits/`: `train.tar`
holds the first 1,000, `validation.tar` the next 350 and `test.tar` the last 447, the split of published likelihoods
(github.com/jmtomczak/intro_dgm). Each image is a gray PNG in the folder of its class; level n of 16 is stored as n ·
255 / 16, rounded, so `data.levels: 17` recovers it exactly.
"""

from __future__ import annotations

import argparse
import gzip
import io
import sys
import zipfile
from pathlib import Path

import numpy
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.archive import write_tar

SPLIT = {"train": (0, 1000), "validation": (1000, 1350), "test": (1350, 1797)}
SIDE, HIGHEST = 8, 16
ASSETS = Path(__file__).resolve().parent.parent / "finetune" / "assets" / "digits"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path, help="scikit-learn's")
    with zipfile.ZipFile(parser.parse_args().wheel) as wheel:
        text = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz")).decode()
    rows = numpy.array([[float(value) for value in line.split(",")] for line in text.splitlines()])
    for name, (first, end) in SPLIT.items():
        members = {}
        for number in range(first, end):
            levels = rows[number, :-1].reshape(SIDE, SIDE)
            content = io.BytesIO()
            Image.fromarray((levels * 255 / HIGHEST).round().astype(numpy.uint8)).save(content, "PNG", optimize=True)
            members[f"{int(rows[number, -1])}/{number:04d}.png"] = content.getvalue()
        write_tar(ASSETS / f"{name}.tar", sorted(members.items()))


if __name__ == "__main__":
    main()
