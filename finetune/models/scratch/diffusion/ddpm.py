"""Denoising diffusion in pixel space (DDPM, Ho et al. 2020, arXiv:2006.11239) and its variational bound on −log p.

The bound (equation 5) is KL(q(x_T | x_0) ‖ N(0, I)) + Σ KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) − log p(x_0 |
x_1), where p is normal with the posterior's mean at D(x_t) and the recipe's variance. The last term is the mass of that
normal distribution between a level's edges (equation 13), with the posterior variance of the step before, since its own
is 0.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from finetune.config.nets.ddpm import Net
from finetune.config.schema import Diffusion
from finetune.data.audit.audit import Audit
from finetune.data.batch import Batch
from finetune.models.base import Model
from finetune.models.objectives.noise_paths import VariancePreserving
from finetune.models.objectives.samplers import posterior
from finetune.models.scratch.base import LikelihoodModel, Space, initialize, levels_and_classes, space_of
from finetune.models.scratch.diffusion.base import DiffusionModel
from finetune.models.scratch.distributions import log_mass
from finetune.planning import Plan
from finetune.rng import Draw


@final
class Ddpm(DiffusionModel, LikelihoodModel):
    """DDPM with a bound on the likelihood."""

    exact = False

    def __init__(self, space: Space, section: Net, loss: Diffusion | None = None) -> None:
        self._steps = VariancePreserving(section.timesteps, section.schedule, section.prediction, loss)
        super().__init__(space, section, self._steps, section.variance)
        pairs = [(self._steps.level(step), self._steps.level(max(step, 1) - 1)) for step in range(section.timesteps)]
        between = [posterior(now, then) for now, then in [pairs[1], *pairs[1:]]]  # step 0 has the variance of step 1
        rows = [
            (now.alpha, now.sigma, one.clean, one.small, getattr(one, section.variance))
            for (now, _), one in zip(pairs, between, strict=True)
        ]
        self._table = torch.tensor(rows, dtype=torch.float64).T

    @torch.no_grad()
    def nats(self, batch: Batch, draw: Draw, particles: int = 1) -> Tensor:
        """The variational bound in nats, [B].

        The term of the last step is always included; the T − 1 others are estimated from `particles` of them. Step t is
        sampled with probability proportional to 1/t, which roughly matches the size of its term, and weighted
        accordingly, so the estimate is unbiased. With `particles` ≥ T − 1 each step is included once, which gives the
        exact bound.
        """
        levels, classes = levels_and_classes(batch)
        clean, others = self.canvas.encode(levels), len(self._steps) - 1
        kept, lost = self._table[:2, -1].square().tolist()
        prior = 0.5 * (kept * clean.double().square() + lost - 1 - math.log(lost))
        shares = 1 / torch.arange(1, others + 1, dtype=torch.float64, device=levels.device)
        shares = shares / shares.sum()

        def term(step: Tensor, purpose: str) -> Tensor:
            return self._term(levels, clean, step, draw.normal(purpose, self.canvas.shape), classes)

        total: Tensor = prior.flatten(1).sum(1) + term(
            torch.zeros(len(levels), dtype=torch.long, device=levels.device), "bound"
        )
        for number in range(min(particles, others)):
            if particles >= others:
                total = total + term(torch.full((len(levels),), number + 1, device=levels.device), f"bound {number}")
            else:  # stratified: one from each of `particles` intervals of equal probability
                place = (number + draw.uniform(f"step {number}").double()) / particles
                sampled = torch.searchsorted(shares.cumsum(0), place).clamp(max=others - 1)
                total = total + term(sampled + 1, f"bound {number}") / (particles * shares[sampled])
        return total.float()

    def _term(self, levels: Tensor, clean: Tensor, step: Tensor, noise: Tensor, classes: Tensor | None) -> Tensor:
        """The bound's term for a step [B] of each example, in nats, [B] float64."""
        alpha, sigma, share, small, variance = self._table.to(clean.device)[:, step].view(5, -1, 1, 1, 1)
        noisy = (alpha * clean + sigma * noise).float()
        expected = self.canvas.clamp(
            self._steps.expected(self.net(noisy, step.float(), classes).double(), noisy, alpha, sigma)
        )
        apart = (share * (clean - expected)).square()  # of the two means
        divergence = 0.5 * ((variance / small).log() + (small + apart) / variance - 1)
        last = -log_mass(self.space, levels, expected, small.sqrt())
        return torch.where(step.view(-1, 1, 1, 1) == 0, last, divergence).flatten(1).sum(1)


def build(plan: Plan, audit: Audit) -> Model:
    """Build the model with random weights, and the recipe's `diffusion` section as its loss."""
    space = space_of(plan, audit)
    return initialize(plan, audit, lambda: Ddpm(space, plan.recipe.net, plan.recipe.diffusion))


def create(space: Space, section: Net) -> Ddpm:
    return Ddpm(space, section)
