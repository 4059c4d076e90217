"""How far drawn images are from real ones, by their features: [N, D], one row an image, float64 inside.

Written out rather than taken from torchmetrics, which takes seconds to import and wants torch-fidelity for its own features, or from
prdc, which brings scikit-learn and SciPy: each measure is a few lines. Tested against closed forms and the figures that prdc publishes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

NEIGHBOURS = 5  # as Naeem et al. take


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """|μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), of Gaussians fitted to both (Heusel et al. 2017, arXiv:1706.08500, equation 6).

    The eigenvalues of Σ₁ Σ₂ are those of the symmetric Σ₁^½ Σ₂ Σ₁^½, so no root of a general matrix is needed.
    Falls as images are added: compare only equal numbers of them.
    """
    (mean_one, covariance_one), (mean_other, covariance_other) = _fitted(one), _fitted(other)
    values, vectors = torch.linalg.eigh(covariance_one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_other @ root).clamp(min=0).sqrt().sum()
    found = (mean_one - mean_other).square().sum() + covariance_one.trace() + covariance_other.trace() - 2 * cross
    return max(0.0, float(found))


def _fitted(features: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [D], covariance [D, D])."""
    features = features.double()
    return features.mean(0), torch.atleast_2d(torch.cov(features.T))


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """The unbiased squared MMD with the kernel (x·y / D + 1)³ (Bińkowski et al. 2018, arXiv:1801.01401, equation 4); about 0 for equals.

    Over all images at once, not over random subsets of them: the same each time, and as unbiased.
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
class Neighbourhoods:
    """Shares, but for the density, which may exceed 1.

    Attributes:
        precision: of drawn images that lie in some real image's neighborhood: looks real.
        recall: of real images that lie in some drawn image's neighborhood (Kynkäänniemi et al. 2019, arXiv:1904.06991).
        density: mean count of real neighborhoods that a drawn image lies in, ÷ k; unlike precision not lifted by one outlier.
        coverage: of real images in whose neighborhood a drawn one lies (both Naeem et al. 2020, arXiv:2002.09797); of
            equal distributions 1 − 2^−k is expected.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbourhoods(real: Tensor, drawn: Tensor, neighbours: int = NEIGHBOURS) -> Neighbourhoods:
    """An image's neighborhood is the ball that reaches its `neighbors`-th nearest of its own kind (fewer where there are not so many)."""
    real, drawn = real.double(), drawn.double()
    of_real, of_drawn, between = radii(real, neighbours), radii(drawn, neighbours), torch.cdist(real, drawn)
    in_real, in_drawn = between <= of_real[:, None], between <= of_drawn[None]
    return Neighbourhoods(
        precision=_share(in_real.any(0)),
        recall=_share(in_drawn.any(1)),
        density=float(in_real.double().sum(0).mean()) / neighbours,
        coverage=_share(in_real.any(1)),
    )


def radii(features: Tensor, neighbours: int) -> Tensor:
    """The distance of each to its `neighbors`-th nearest other, [N]."""
    distances = torch.cdist(features, features)
    distances.fill_diagonal_(0)  # which rounding may leave a little above 0
    return distances.kthvalue(min(neighbours + 1, len(features)), dim=1).values


def _share(these: Tensor) -> float:
    return float(these.double().mean())


def diversity(features: Tensor) -> float:
    """Mean distance between two different images: 0 where all are the same."""
    count = len(features)
    return float(torch.pdist(features.double()).mean()) if count > 1 else 0.0


def copies(drawn: Tensor, training: Tensor) -> tuple[Tensor, Tensor, float]:
    """(the training image nearest to each drawn one [N], how far it is [N], and the share of drawn ones that come closer to theirs than any
    other training image does: 1 − authenticity, Alaa et al. 2022, arXiv:2102.08921, §4.2).

    Fresh images of the same distribution have a share too, the lower the more dimensions it fills: only a higher one tells of copying.
    """
    drawn, training = drawn.double(), training.double()
    distances, nearest = torch.cdist(drawn, training).min(1)
    return nearest, distances, _share(distances < radii(training, 1)[nearest])
