"""Adaptive augmentation of what the critic sees (Karras et al. 2020, arXiv:2006.06676): for sets so small that it learns them by heart.

True and made images are augmented alike and the generator learns through it, so that it is not the augmented images that are
learned, as long as each transformation is left out often enough. How often each is applied is steered by the mean sign of the
critic's logits at true images: near 1, it knows them too well. Of the paper's transformations: those of pixels, of geometry and
of color, which it found to help.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.models.base import gathered
from finetune.rng import Draw

HIGHEST = 0.85  # probability: above, what was augmented could be learned for what is (the paper's figure 4)
SHIFT = 0.125  # of a side
LUMA = (0.299, 0.587, 0.114)


@final
class Augmentation(nn.Module):
    """Args:
    target: mean sign of the critic's logits at true images that is held.
    images: that take the probability from 0 to 1.
    """

    probability: Tensor

    def __init__(self, target: float, images: int) -> None:
        super().__init__()
        self.register_buffer("probability", torch.zeros(()))
        self._target, self._images = target, images

    @torch.no_grad()
    def steer(self, logits: Tensor) -> None:
        """Move the probability by a batch's logits at true images, [B]; those of all processes count."""
        signs = gathered(logits.detach().float().sign())
        self.probability.add_((signs.mean() - self._target).sign() * (len(signs) / self._images)).clamp_(0, HIGHEST)

    def forward(self, images: Tensor, draw: Draw) -> Tensor:
        """Scaled images [B, C, H, W] → the same shape, differentiable; what each place draws is a function of the step."""
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
        shift: list[Tensor] = []  # by whole pixels, and by any part
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
        # Where in the image each place reads, in units in which a side goes from −1 to 1: hence the aspect between the two.
        across = torch.stack([flip * cosine, -flip * sine * aspect, 2 * (shift[0] + slide[0])], 1)
        down = torch.stack([sine / aspect, cosine, 2 * (shift[1] + slide[1])], 1)
        matrices = torch.stack([across, down], 1)
        grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
        moved = functional.grid_sample(
            images.float(), grid.float(), mode="bilinear", padding_mode="reflection", align_corners=False
        )
        still = (matrices == torch.eye(2, 3, device=matrices.device)).flatten(1).all(1)
        return torch.where(still.view(-1, 1, 1, 1), images, moved)  # unmoved, bit for bit

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
