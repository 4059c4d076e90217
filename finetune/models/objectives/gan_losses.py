"""What a critic and a generator want, on logits: log(σ(…)) is never formed, whose gradient dies where it is needed.

A logit is how true the critic takes an image to be. Each loss is of one example, [B].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits of true images, of made ones), [B] each → [B]


@dataclass(frozen=True)
class Objective:
    """`paired`: the generator's loss too reads the logits of true images."""

    critic: Loss
    generator: Loss
    paired: bool = False


OBJECTIVES = {
    # Goodfellow et al. 2014, arXiv:1406.2661, §3, with the generator that does not saturate: −log σ(D(true)) − log σ(−D(made)); −log σ(D(made)).
    "logistic": Objective(lambda true, made: softplus(-true) + softplus(made), lambda _, made: softplus(-made)),
    # Lim & Ye 2017, arXiv:1705.02894.
    "hinge": Objective(lambda true, made: relu(1 - true) + relu(1 + made), lambda _, made: -made),
    # Arjovsky et al. 2017, arXiv:1701.07875, equation 2.
    "wasserstein": Objective(lambda true, made: made - true, lambda _, made: -made),
    # Relativistic pairing, Jolicoeur-Martineau 2018, arXiv:1807.00734; Huang et al. 2024, arXiv:2501.05441, equation 2.
    "relativistic": Objective(
        lambda true, made: softplus(made - true), lambda true, made: softplus(true - made), paired=True
    ),
}


def slopes(logits: Tensor, images: Tensor) -> Tensor:
    """∇D at each image, flattened, [B, D]: of the logits as they are, and so that it can be trained."""
    with torch.autocast(images.device.type, enabled=False):
        (found,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return found.flatten(1).float()


def flatness(logits: Tensor, images: Tensor) -> Tensor:
    """½‖∇D‖², [B]: R1 at true images, R2 at made ones (Mescheder et al. 2018, arXiv:1801.04406, equations 9 and 10), times γ."""
    return slopes(logits, images).square().sum(1) / 2


def unit_slope(logits: Tensor, images: Tensor) -> Tensor:
    """(‖∇D‖ − 1)², [B], the norm over all of an image (Gulrajani et al. 2017, arXiv:1704.00028, equation 3), times λ."""
    lengths: Tensor = torch.linalg.vector_norm(slopes(logits, images), dim=1)
    return (lengths - 1).square()
