"""The second stage of a cascade: super-resolution by diffusion (Ho et al. 2022, arXiv:2106.15282; Saharia et al. 2022).

`model.base_run` names the run of the first stage, which generates low-resolution images. It is frozen and saved with
the second stage. The network's additional input is the upsampled low-resolution image. In training that is the
downsampled training image,
which is better than what a first stage generates: so it is noised to a random level s, which is also an input (noise
conditioning augmentation of Imagen, arXiv:2205.11487, §2.3).
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from finetune.config import nets
from finetune.config.nets.cascade import Net
from finetune.config.schema import Diffusion
from finetune.data.audit.audit import Audit
from finetune.errors import UserError
from finetune.models.base import Model, SampleRequest
from finetune.models.objectives.noise_paths import VariancePreserving
from finetune.models.scratch.base import PixelModel, Space, initialize, model_from_config, open_model, space_of
from finetune.models.scratch.diffusion.base import Condition, DiffusionModel
from finetune.planning import Plan
from finetune.rng import Draw


@final
class UpsampledImage(Condition):
    """The condition: a low-resolution image noised to cos(πs/2) x + sin(πs/2) ε and upsampled, and a channel with s.

    Args:
        space: the images of the second stage.
        first: the first stage.
        section: the recipe's `net` section.
    """

    def __init__(self, space: Space, first: PixelModel, section: Net) -> None:
        self._space, self._first, self._section = space, first, section
        self._factor, self.channels = space.height // first.space.height, space.channels + 1

    def beside(self, small: Tensor, share: Tensor, noise: Tensor) -> Tensor:
        """Low-resolution images [B, C, h, w] in [-1, 1], s [B] and noise [B, C, h, w] → [B, C + 1, H, W]."""
        angle = share.view(-1, 1, 1, 1) * (torch.pi / 2)
        noised = angle.cos() * small + angle.sin() * noise
        large = functional.interpolate(noised, size=self._space.shape[1:], mode="bilinear")
        return torch.cat([large, share.view(-1, 1, 1, 1).expand(-1, 1, *self._space.shape[1:])], 1)

    def for_training(self, levels: Tensor, draw: Draw) -> Tensor | None:
        small = functional.avg_pool2d(self._space.scaled(levels), self._factor)
        share = self._section.augmentation * draw.uniform("augmentation")
        return self.beside(small, share, draw.normal("augmentation noise", small.shape[1:]))

    def for_sampling(self, classes: Tensor | None, draw: Draw, request: SampleRequest) -> Tensor | None:
        first = self._first
        small = first.space.scaled(
            first.generate(classes if first.space.classes else None, draw.of_step("low"), request)
        )
        share = torch.full((len(small),), self._section.sampling_augmentation, device=small.device)
        return self.beside(small, share, draw.normal("augmentation noise", small.shape[1:]))


@final
class Cascade(DiffusionModel):
    """The second stage, together with the frozen first stage."""

    def __init__(self, space: Space, section: Net, first: PixelModel, loss: Diffusion | None = None) -> None:
        self.first = first
        path = VariancePreserving(section.timesteps, section.schedule, section.prediction, loss)
        super().__init__(
            space, section, path, section.variance, condition=UpsampledImage(space, first, section), first=first.net
        )

    def parts(self) -> dict[str, Any]:
        return {"first": self.first.config()}


def build(plan: Plan, audit: Audit) -> Model:
    """Build the second stage on the first stage that `model.base_run` names.

    Raises:
        UserError: there is no first stage, or it does not fit.
    """
    space, recipe = space_of(plan, audit), plan.recipe
    assert recipe.model.base_run is not None  # a rule of `config.rules.networks`
    first = open_model(recipe.model.base_run)
    _check(first.space, space, recipe.model.base_run)
    return initialize(plan, audit, lambda: Cascade(space, recipe.net, first, recipe.diffusion))


def _check(low: Space, space: Space, given: str) -> None:
    """Raise a UserError if the first stage's images are not downsampled versions of the second stage's."""
    factor = space.height // low.height
    if factor < 2 or (low.height * factor, low.width * factor) != (space.height, space.width):
        raise UserError(
            f"{given} generates {low.width}×{low.height} pixels:"
            f" {space.width}×{space.height} is not a multiple of that",
            where="data.resolution",
            remedy=f"set data.resolution: {2 * low.height}, or train the first stage at {space.height // 2}",
        )
    if (low.channels, low.levels) != (space.channels, space.levels) or low.classes not in ((), space.classes):
        raise UserError(
            f"{given} generates images with other channels, levels or classes",
            where="model.base_run",
            remedy="use the same data section in both stages",
        )


def restore(space: Space, section: nets.Section, config: dict[str, Any]) -> PixelModel:
    """Build the model of a saved configuration."""
    assert isinstance(section, Net)
    return Cascade(space, section, model_from_config(config["first"]))
