"""Adaptive discriminator augmentation (ADA, Karras et al. 2020, arXiv:2006.06676), for small data sets.

Without it, the discriminator overfits. Real and fake images are augmented alike, and the generator is trained through
the augmentation, so that it does not learn to generate augmented images as long as each transformation is skipped often
enough. The probability of each is controlled by the mean sign of the discriminator's logits at real images: near 1 it
overfits. Of the paper's transformations this includes pixel blitting, geometry and color, which it found to help.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.models.base import gathered
from finetune.rng import Draw

MAX_PROBABILITY = 0.85  # above this, augmentations could leak into the generated images (figure 4)
SHIFT = 0.125  # of a side
LUMA = (0.299, 0.587, 0.114)


@final
class Augmentation(nn.Module):
    """Random augmentations with a controlled probability.

    Args:
        target: the mean sign of the discriminator's logits at real images to maintain.
        images: the number of images that can raise the probability from 0 to 1.
    """

    probability: Tensor

    def __init__(self, target: float, images: int) -> None:
        super().__init__()
        self.register_buffer("probability", torch.zeros(()))
        self._target, self._images = target, images

    @torch.no_grad()
    def steer(self, logits: Tensor) -> None:
        """Adjust the probability by a batch's logits at real images, [B], from all processes."""
        signs = gathered(logits.detach().float().sign())
        self.probability.add_((signs.mean() - self._target).sign() * (len(signs) / self._images)).clamp_(
            0, MAX_PROBABILITY
        )

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        """Augment scaled images [B, C, H, W]; differentiable, and random as a function of the step and the example."""
        return self._colored(self._moved(images, draw), draw)

    def _drawn(self, draw: Draw, name: str, neutral: float, values: Tensor) -> Tensor:
        """`values` [B] where the transformation is applied, `neutral` elsewhere."""
        return torch.where(
            draw.uniform(f"{name}, whether") < self.probability, values, torch.full_like(values, neutral)
        )

    def _moved(self, images: Tensor, draw: Draw) -> Tensor:
        height, width = images.shape[2:]
        flip = self._drawn(draw, "flip", 1, 1 - 2 * draw.integers("flip", 2).float())
        quarters = self._drawn(draw, "quarters", 0, draw.integers("quarters", 4).float())
        shift: list[Tensor] = []  # by whole pixels (shift) and by fractions (slide)
        slide: list[Tensor] = []
        for side in (width, height):
            pixels = ((2 * draw.uniform(f"shift {len(shift)}") - 1) * SHIFT * side).round()
            shift.append(self._drawn(draw, f"shift {len(shift)}", 0, pixels / side))
            slide.append(self._drawn(draw, f"slide {len(slide)}", 0, SHIFT * draw.normal(f"slide {len(slide)}", ())))
        zoom = self._drawn(draw, "zoom", 1, torch.exp2(0.2 * draw.normal("zoom", ())))
        turn = self._drawn(draw, "turn", 0, (2 * draw.uniform("turn") - 1) * math.pi)
        angle = quarters * (math.pi / 2) + turn
        cosine, sine = angle.cos() / zoom, angle.sin() / zoom
        aspect = height / width
        # Sampling coordinates, where each side runs from −1 to 1: hence the aspect ratio.
        across = torch.stack([flip * cosine, -flip * sine * aspect, 2 * (shift[0] + slide[0])], 1)
        down = torch.stack([sine / aspect, cosine, 2 * (shift[1] + slide[1])], 1)
        matrices = torch.stack([across, down], 1)
        grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
        moved = functional.grid_sample(
            images.float(), grid.float(), mode="bilinear", padding_mode="reflection", align_corners=False
        )
        still = (matrices == torch.eye(2, 3, device=matrices.device)).flatten(1).all(1)
        return torch.where(still.view(-1, 1, 1, 1), images, moved)  # bit-identical where nothing moves

    def _colored(self, images: Tensor, draw: Draw) -> Tensor:
        def column(values: Tensor) -> Tensor:
            return values.view(-1, 1, 1, 1)

        brightness = self._drawn(draw, "brightness", 0, 0.2 * draw.normal("brightness", ()))
        contrast = self._drawn(draw, "contrast", 1, torch.exp2(0.5 * draw.normal("contrast", ())))
        result = images * column(contrast) + column(brightness)
        if images.shape[1] == 3:
            saturation = self._drawn(draw, "saturation", 1, torch.exp2(draw.normal("saturation", ())))
            gray = (result * torch.tensor(LUMA, device=result.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
            result = torch.lerp(gray.expand_as(result), result, column(saturation).expand_as(result))
        return result
