"""Train emoji-net, the small network whose features `ft eval` uses to compare images: `finetune/assets/emoji-net/`.

    python tools/build_emoji_net.py            # a minute on one core

It learns three tasks on the 1,875 emoji that Noto and Twemoji share: embed both vendors' images of one emoji close
together (InfoNCE, van den Oord et al. 2018, arXiv:1807.03748), predict the vendor, and detect images that were
blurred, made noisy or cut up and reassembled, as generators do. Images have 32 pixels and are shifted and mirrored.
200 emoji are held out to measure each task. Weights are saved in float16, with these figures in their metadata.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, final

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.data.decoding import to_tensor
from finetune.data.media.image import decode
from finetune.evaluation.emoji_net import SIDE, WEIGHTS, EmojiNet
from finetune.rng import key_of
from finetune.terminal import Progress
from tools.archive import bundled

HOUSES = ("noto", "twemoji")
STEPS, PAIRS = 800, 48  # of a judge
LENGTH = 500, 48  # of emoji-net's training
LEFT_OUT = 200

Net = TypeVar("Net", bound=nn.Module)


def real_images() -> tuple[list[str], list[str], set[str], Tensor]:
    """(file names, captions, file names in `twemoji-train`, pixels [2 houses, names, 3, 64, 64] in [-1, 1])."""
    shards = {name: bundled(f"emoji/{name}") for name in ("noto", "twemoji-train", "twemoji-unseen")}
    houses = (shards["noto"], shards["twemoji-train"] | shards["twemoji-unseen"])
    names = sorted(shards["noto"])
    pixels = [
        torch.stack([to_tensor(numpy.asarray(decode(house[name].read(), "white"))) for name in names])
        for house in houses
    ]
    captions = [shards["noto"][name].caption or "" for name in names]
    return names, captions, set(shards["twemoji-train"]), torch.stack(pixels)


def train_judge(
    net: Net,
    images: Tensor,
    loss_of: Callable[[Net, Tensor], Tensor],
    tint: float,
    generator: torch.Generator,
    what: str,
    length: tuple[int, int] = (STEPS, PAIRS),
) -> Net:
    """`images`: [2, names, 3, side, side]. Each step takes both houses' images of some names, moved, mirrored and
    tinted at random.

    Args:
        loss_of: the loss of the network for Noto's images, followed by Twemoji's of the same names.
        tint: standard deviation of the value added to each color; colors are in [-1, 1].
        length: steps, and pairs of images in each.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=length[0])
    shown = Progress(f"learning to tell {what}")
    for step in range(length[0]):
        chosen = torch.randperm(images.shape[1], generator=generator)[: length[1]]
        loss = loss_of(net, torch.cat([_jitter(images[house, chosen], tint, generator) for house in (0, 1)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        shown.show(step + 1, length[0], f"loss {loss.item():.3f}")
    shown.end()
    return net.eval()


def damaged(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[B, 3, 32, 32] → (every fourth left alone, blurred, made noisy, cut up; which it was, 0 … 3, [B])."""
    kinds, found = torch.arange(len(pixels)) % 4, pixels.clone()
    how = float(torch.rand((), generator=generator))
    size = (side := round(20 - 12 * how), side)  # blurred to between 20 and 8 of its 32 pixels
    small = functional.interpolate(pixels[1::4], size, mode="bilinear", antialias=True)
    found[1::4] = functional.interpolate(small, pixels.shape[2:], mode="bicubic")
    found[2::4] += (0.1 + 0.3 * how) * torch.randn(found[2::4].shape, generator=generator)
    squares = functional.unfold(pixels[3::4], 8, stride=8)  # in another order
    found[3::4] = functional.fold(
        squares[:, :, torch.randperm(squares.shape[2], generator=generator)], pixels.shape[2:], 8, stride=8
    )
    return found.clamp(-1, 1), kinds


def house_loss(logit: Tensor) -> Tensor:
    """Cross-entropy with labels of 3 and 97 %, Noto's images first: some are nearly the same for both vendors."""
    return functional.binary_cross_entropy_with_logits(
        logit, torch.tensor([0.03, 0.97]).repeat_interleave(len(logit) // 2)
    )


def names_loss(embedding: Tensor) -> Tensor:
    """InfoNCE at temperature 0.1, from each vendor's images to the other's."""
    one, other = embedding.chunk(2)
    similarity, same = one @ other.T / 0.1, torch.arange(len(one))
    return functional.cross_entropy(similarity, same) + functional.cross_entropy(similarity.T, same)


def _jitter(pixels: Tensor, tint: float, generator: torch.Generator) -> Tensor:
    """Shift by up to a twentieth of the side over white, mirror half of the time, and change each image's colors a
    little.
    """
    side, most = pixels.shape[3], pixels.shape[3] // 20
    padded = functional.pad(pixels, (most,) * 4, value=1.0)
    top, left = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    shifted = padded[:, :, top : top + side, left : left + side]
    if torch.rand((), generator=generator) < 0.5:
        shifted = shifted.flip(3)
    return (shifted + tint * torch.randn(len(pixels), 3, 1, 1, generator=generator)).clamp(-1, 1)


@final
class Lessons(nn.Module):
    """emoji-net and what it is taught by: (its embedding [B, 128]; by its features a logit of "Twemoji drew it" [B],
    and of each damage [B, 4]).
    """

    def __init__(self) -> None:
        super().__init__()
        self.net, self.told = EmojiNet(), nn.Linear(EmojiNet.WIDTHS[-1], 5)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.net.body(pixels)
        told = self.told(maps.mean((2, 3)))
        return functional.normalize(self.net.head(maps), dim=1), told[:, 0], told[:, 1:]


def lessons_loss(lessons: Lessons, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """The sum of the three losses; the embedding's only for images that were not cut up."""
    pixels, kinds = damaged(pixels, generator)
    embedding, house, damage = lessons(pixels)
    return names_loss(embedding[kinds != 3]) + house_loss(house) + functional.cross_entropy(damage, kinds)


@torch.no_grad()
def figures(lessons: Lessons, images: Tensor, generator: torch.Generator) -> dict[str, str]:
    """The figures on held-out images, [2, names, 3, 32, 32]."""
    one, other = (lessons(house) for house in images)
    right = (one[0] @ other[0].T).argmax(1) == torch.arange(len(one[0]))
    house = torch.cat([one[1] <= 0, other[1] > 0])
    pixels, kinds = damaged(images.flatten(0, 1), generator)
    damage = lessons(pixels)[2].argmax(1) == kinds
    shares = {"the same emoji among them": right, "the house": house, "the damage": damage}
    return {
        "left out": str(len(right)),
        **{name: f"{float(share.float().mean()):.3f}" for name, share in shares.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    given = parser.parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    names, _, _, large = real_images()
    pixels = (
        functional.interpolate(large.flatten(0, 1), (SIDE, SIDE), mode="bicubic", antialias=True)
        .clamp(-1, 1)
        .unflatten(0, large.shape[:2])
    )
    order = sorted(range(len(names)), key=lambda place: key_of(names[place]))
    left_out, kept = order[:LEFT_OUT], order[LEFT_OUT:]

    def loss_of(lessons: Lessons, batch: Tensor) -> Tensor:
        return lessons_loss(lessons, batch, generator)

    lessons = train_judge(Lessons(), pixels[:, kept], loss_of, 0.1, generator, "emoji, houses and damage", LENGTH)
    said = figures(lessons, pixels[:, left_out], generator)
    print(said)
    weights = {name: tensor.half().contiguous() for name, tensor in lessons.net.state_dict().items()}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        weights,
        given.out,
        said | {"made by": "tools/build_emoji_net.py", "trained on": f"{len(kept)} emoji of each house"},
    )
    print(f"{given.out}: {given.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
