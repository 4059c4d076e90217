"""Does the demo's LoRA generate unseen emoji in the learned style, and still the right emoji?

    python benchmarks/bench_style.py RUN [RUN …] [--judged 200] [--out style.png]

RUN is a finished run of recipes/lora/emoji.yaml; several are judged side by side, such as one trained on a quantized
base model (model.quantize: nf4) and one on the full one. All are sampled on the full base model; a LoRA of a
quantized base model also on that one, which shows the loss between the two. Two small networks judge, trained on real
images of both vendors for every emoji except the LoRA's 400 and the judged ones: one predicts the vendor; the other
embeds images so that both vendors' images of one emoji are close (emoji-net, retrained, since the bundled one has
seen the judged emoji). Real images pass through the VAE before the judges see them, so that the VAE's blur is no
clue. Base model and LoRA generate the judged names from equal seeds with plain diffusers. A real Noto and Twemoji
image of every name (1,875 × 2, through the VAE) form the gallery for retrieval: the nearest one should have the
prompted name.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as functional
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config.loader import load_recipe
from finetune.data.decoding import to_tensor
from finetune.evaluation.emoji_net import EmojiNet
from finetune.memory.quantization import quantize
from finetune.models.pretrained.loading import open_pipeline
from finetune.report.images import grid
from finetune.rng import key_of
from finetune.terminal import Progress
from tools.build_emoji_net import house_loss, names_loss, real_images, train_judge

DRAWN_AT_ONCE = 20


@torch.no_grad()
def through_vae(vae: Any, pixels: Tensor) -> Tensor:
    """Encode each image to its mean latent and decode it."""
    shown = Progress("real images through the VAE")
    found = []
    for number, batch in enumerate(pixels.split(32)):
        shown.show(number * 32, len(pixels))
        found.append(vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1))
    shown.end()
    return torch.cat(found)


class House(nn.Module):
    """[B, 3, 64, 64] in [-1, 1] → logit of "Twemoji drew it" [B]. Colors and shading tell the houses apart, so both
    are left as they are.

    Each house has a palette of its own, and only Noto shades. So each channel is shown beside its sines and cosines,
    in which close shades lie apart (Fourier features, Tancik et al. 2020, arXiv:2006.10739), at full side, and what is
    found at every side is read.
    """

    WIDTHS = (16, 32, 64, 128)
    LENGTH = 1200, 24  # steps of its training, and pairs of images in each

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3 * 7, self.WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(self.WIDTHS[0]), nn.ReLU()
        )
        self.blocks = nn.Sequential(*(Residual(before, after) for before, after in pairwise(self.WIDTHS)))
        self.logit = nn.Sequential(nn.Dropout(0.2), nn.Linear(2 * sum(self.WIDTHS), 1))

    def forward(self, pixels: Tensor) -> Tensor:
        angles = torch.pi * torch.cat([pixels, 2 * pixels, 4 * pixels], dim=1)
        seen = torch.cat([pixels, angles.sin(), angles.cos()], dim=1).contiguous(
            memory_format=torch.channels_last
        )  # a quarter quicker on a CPU
        features = [self.stem(seen)]
        for block in self.blocks:
            features.append(block(features[-1]))
        pooled = torch.cat([pool for scale in features for pool in (scale.mean((2, 3)), scale.amax((2, 3)))], dim=1)
        found: Tensor = self.logit(pooled).squeeze(1)
        return found

    def says_twemoji(self, pixels: Tensor) -> Tensor:
        """[B] bool, of the image and its mirror image together."""
        found: Tensor = self(pixels) + self(pixels.flip(3)) > 0
        return found


class Residual(nn.Module):
    """Halves the sides (He et al. 2016, arXiv:1512.03385, figure 2)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()),
            *(nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)),
        )
        self.beside = nn.Conv2d(before, after, 1, 2, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return functional.relu(self.body(features) + self.beside(features))


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, captions: list[str], steps: int, guidance: float, what: str) -> Tensor:
    """Generate one image per caption, image i from seed i: [N, 3, 64, 64] in [-1, 1]."""
    shown = Progress(what)
    found = []
    for start in range(0, len(captions), DRAWN_AT_ONCE):
        shown.show(start, len(captions))
        prompts = captions[start : start + DRAWN_AT_ONCE]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(prompts))]
        images = pipeline(
            prompts, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="pil"
        ).images
        found += [to_tensor(numpy.asarray(image)) for image in images]
    shown.end()
    return torch.stack(found)


@torch.no_grad()
def judged(
    house: House, names: EmojiNet, pixels: Tensor, gallery: Tensor, truth: list[int]
) -> tuple[float, float, float]:
    """(share judged Twemoji, share whose nearest name is the prompted one, share with it among the nearest five)."""
    embedding = names(pixels)
    by_name = torch.stack([embedding @ of_house.T for of_house in gallery]).amax(
        0
    )  # [N, names]: the nearer house counts
    nearest = by_name.topk(5, dim=1).indices
    right = nearest == torch.tensor(truth)[:, None]
    return (
        float(house.says_twemoji(pixels).float().mean()),
        float(right[:, 0].float().mean()),
        float(right.any(1).float().mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--judged", type=int, default=200, help="how many unseen names are generated and judged")
    parser.add_argument(
        "--out", type=Path, default=Path("style.png"), help="output image: base, LoRAs and real Twemoji, by name"
    )
    given = parser.parse_args()
    recipe = load_recipe(given.runs[0] / "recipe.yaml")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    start = time.monotonic()

    names, captions, trained, pixels = real_images()
    unseen = sorted((n for n in names if n not in trained), key=key_of)
    judged_names, rest = unseen[: given.judged], unseen[given.judged :]
    place = {name: number for number, name in enumerate(names)}
    base = open_pipeline(recipe.model, "StableDiffusionPipeline", torch.float32)
    base.set_progress_bar_config(disable=True)
    real = through_vae(base.vae, pixels.flatten(0, 1)).view_as(pixels)

    lessons = real[:, [place[name] for name in rest]]
    telling_house = train_judge(
        House(), lessons, lambda net, batch: house_loss(net(batch)), 0.0, generator, "the house", House.LENGTH
    )
    telling_names = train_judge(
        EmojiNet(64), lessons, lambda net, batch: names_loss(net(batch)), 0.1, generator, "the names"
    )
    truth = [place[name] for name in judged_names]
    with torch.no_grad():
        gallery = torch.stack([torch.cat([telling_names(batch) for batch in house.split(128)]) for house in real])
        on_real = [
            float((telling_house.says_twemoji(real[house, truth]) == bool(house)).float().mean()) for house in (0, 1)
        ]

    prompts = [captions[number] for number in truth]
    sample = recipe.sample
    drawn = {"base": draw(base, prompts, sample.steps, sample.guidance, "the base draws")}
    for run in given.runs:
        what = "LoRA" if len(given.runs) == 1 else run.name
        base.load_lora_weights(run / "final")
        drawn[what] = draw(base, prompts, sample.steps, sample.guidance, f"{what} draws")
        base.unload_lora_weights()
        if kind := load_recipe(run / "recipe.yaml").model.quantize:
            other = open_pipeline(recipe.model, "StableDiffusionPipeline", torch.float32)
            other.set_progress_bar_config(disable=True)
            quantize(other.unet, kind, torch.float32)
            other.load_lora_weights(run / "final")
            drawn[f"{what} on {kind}"] = draw(other, prompts, sample.steps, sample.guidance, f"{what} draws on {kind}")

    seconds = time.monotonic() - start
    print(
        f"{len(judged_names)} unseen names judged; judges trained on {len(rest)} others; {len(trained)} trained "
        f"the LoRA; {seconds:.0f} s"
    )
    apart = f"(Noto {100 * on_real[0]:.1f}, Twemoji {100 * on_real[1]:.1f})"
    print(f"judge's accuracy on real images of the judged names: {100 * sum(on_real) / 2:.1f} % {apart}; goal ≥ 95 %")
    width = max(map(len, drawn)) + 2
    print(f"{'':<{width}}{'judged Twemoji':>16}{'right name of ' + str(len(names)):>22}{'among five':>12}")
    for what, images in drawn.items():
        twemoji, first, five = judged(telling_house, telling_names, images, gallery, truth)
        print(f"{what:<{width}}{100 * twemoji:>14.1f} %{100 * first:>20.1f} %{100 * five:>10.1f} %")
    for what in drawn:
        whole = what.partition(" on ")[0]
        if whole != what:
            lost, learned = (127.5 * float((drawn[one] - drawn[whole]).abs().mean()) for one in (what, "base"))
            print(
                f"{what}: {lost:.2f} of 255 from what it draws on the whole base, which is {learned:.2f} from the "
                "base's own"
            )
    shown = [row[:12] for row in (*drawn.values(), pixels[1, truth])]
    tiles = torch.cat(shown).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    grid([Image.fromarray(tile).resize((128, 128), Image.Resampling.NEAREST) for tile in tiles], columns=12).save(
        given.out
    )
    print(f"rows of {given.out}: {', '.join(drawn)}, real Twemoji; columns: {', '.join(prompts[:12])}")


if __name__ == "__main__":
    main()
