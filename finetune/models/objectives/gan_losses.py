"""Losses and gradient penalties of GANs, per example [B].

Losses are computed from logits (higher means "real") with softplus: log σ(…) would lose its gradient where it matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits of real images, of fake images), [B] each → [B]


@dataclass(frozen=True)
class AdversarialLoss:
    """The losses of discriminator and generator.

    Attributes:
        discriminator: its loss.
        generator: its loss.
        paired: whether the generator's loss also needs the logits of real images.
    """

    discriminator: Loss
    generator: Loss
    paired: bool = False


ADVERSARIAL_LOSSES = {
    # Non-saturating: −log σ(D(real)) − log σ(−D(fake)) and −log σ(D(fake)).
    # Goodfellow et al. 2014, arXiv:1406.2661, §3.
    "logistic": AdversarialLoss(lambda real, fake: softplus(-real) + softplus(fake), lambda _, fake: softplus(-fake)),
    # Lim & Ye 2017, arXiv:1705.02894.
    "hinge": AdversarialLoss(lambda real, fake: relu(1 - real) + relu(1 + fake), lambda _, fake: -fake),
    # Arjovsky et al. 2017, arXiv:1701.07875, equation 2.
    "wasserstein": AdversarialLoss(lambda real, fake: fake - real, lambda _, fake: -fake),
    # Relativistic pairing, Jolicoeur-Martineau 2018, arXiv:1807.00734; Huang et al. 2024, arXiv:2501.05441, equation 2.
    "relativistic": AdversarialLoss(
        lambda real, fake: softplus(fake - real), lambda real, fake: softplus(real - fake), paired=True
    ),
}


def input_gradients(logits: Tensor, images: Tensor) -> Tensor:
    """∇D at each image, flattened, [B, D], without autocast and differentiable."""
    with torch.autocast(images.device.type, enabled=False):
        (result,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return result.flatten(1).float()


def zero_centered_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """½‖∇D‖², [B], to be multiplied by γ: R1 at real images, R2 at fake ones.

    Mescheder et al. 2018, arXiv:1801.04406, equations 9 and 10.
    """
    return input_gradients(logits, images).square().sum(1) / 2


def one_centered_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """(‖∇D‖ − 1)², [B], to be multiplied by λ (WGAN-GP, Gulrajani et al. 2017, arXiv:1704.00028, equation 3)."""
    lengths: Tensor = torch.linalg.vector_norm(input_gradients(logits, images), dim=1)
    return (lengths - 1).square()
