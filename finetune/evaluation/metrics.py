"""Distances between generated and real images, computed from features [N, D] (one row per image) in float64.

They are implemented here because torchmetrics takes seconds to import and needs torch-fidelity, and prdc needs
scikit-learn and SciPy, while each metric is a few lines. Tests compare them with closed forms and with values that prdc
publishes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

NEIGHBORS = 5  # as in Naeem et al. 2020


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """The Fréchet distance between Gaussians fitted to both sets of features.

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½) (Heusel et al. 2017, arXiv:1706.08500, equation 6). The eigenvalues of Σ₁ Σ₂
    are those of the symmetric matrix Σ₁^½ Σ₂ Σ₁^½, so no root of a general matrix is needed. The distance decreases
    with the number of images: compare only distances of equally many.
    """
    (mean_one, covariance_one), (mean_other, covariance_other) = _fitted(one), _fitted(other)
    values, vectors = torch.linalg.eigh(covariance_one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_other @ root).clamp(min=0).sqrt().sum()
    distance = (mean_one - mean_other).square().sum() + covariance_one.trace() + covariance_other.trace() - 2 * cross
    return max(0.0, float(distance))


def _fitted(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [D] and covariance [D, D]."""
    features = features.double()
    return features.mean(0), torch.atleast_2d(torch.cov(features.T))


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """The kernel distance (KID): the unbiased squared MMD with the kernel (x·y / D + 1)³.

    Bińkowski et al. 2018, arXiv:1801.01401, equation 4. It is about 0 for equal distributions. All images enter at once
    instead of random subsets, which is as unbiased and deterministic.
    """
    one, other = one.double(), other.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(features: Tensor) -> Tensor:
        products, count = kernel(features, features), len(features)
        return (products.sum() - products.trace()) / (count * (count - 1))

    return float(within(one) + within(other) - 2 * kernel(one, other).mean())


@final
@dataclass(frozen=True)
class Neighborhoods:
    """Precision, recall, density and coverage. All are in [0, 1] except the density, which can exceed 1.

    Attributes:
        precision: share of generated images in the neighborhood of a real image (fidelity).
        recall: share of real images in the neighborhood of a generated image (diversity). Both are from Kynkäänniemi et
            al. 2019, arXiv:1904.06991.
        density: mean number of real neighborhoods that a generated image lies in, divided by k. Unlike precision, a
            single outlier does not inflate it.
        coverage: share of real images with a generated image in their neighborhood. Both are from Naeem et al. 2020,
            arXiv:2002.09797; for equal distributions 1 − 2^−k is expected.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighborhoods(real: Tensor, generated: Tensor, neighbors: int = NEIGHBORS) -> Neighborhoods:
    """Compute precision, recall, density and coverage.

    The neighborhood of an image is the ball up to its `neighbors`-th nearest neighbor in its own set (fewer in small
    sets).
    """
    real, generated = real.double(), generated.double()
    distances = torch.cdist(real, generated)
    in_real = distances <= radii(real, neighbors)[:, None]
    in_generated = distances <= radii(generated, neighbors)[None]
    return Neighborhoods(
        precision=_share(in_real.any(0)),
        recall=_share(in_generated.any(1)),
        density=float(in_real.double().sum(0).mean()) / neighbors,
        coverage=_share(in_real.any(1)),
    )


def radii(features: Tensor, neighbors: int) -> Tensor:
    """The distance of each image to its `neighbors`-th nearest neighbor, [N]."""
    distances = torch.cdist(features, features)
    distances.fill_diagonal_(0)  # rounding may leave it slightly above 0
    return distances.kthvalue(min(neighbors + 1, len(features)), dim=1).values


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def diversity(features: Tensor) -> float:
    """The mean distance between pairs of images; 0 if all are equal."""
    count = len(features)
    return float(torch.pdist(features.double()).mean()) if count > 1 else 0.0


def copies(generated: Tensor, training: Tensor) -> tuple[Tensor, Tensor, float]:
    """Compare generated images with the training images to detect copying.

    Returns:
        The index of the nearest training image of each generated image [N], the distance to it [N], and the share of
        generated images that are closer to it than any other training image is: 1 − authenticity (Alaa et al. 2022,
        arXiv:2102.08921, §4.2). New images of the same distribution have such a share too (lower in more dimensions),
        so only a higher one indicates copying.
    """
    generated, training = generated.double(), training.double()
    distances, nearest = torch.cdist(generated, training).min(1)
    return nearest, distances, _share(distances < radii(training, 1)[nearest])
