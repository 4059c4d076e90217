"""The interface between families and the training loop: `TrainStep` (a network and its loss) and `Model`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from finetune.data.batch import Batch, Encoder
from finetune.data.shape import Frame
from finetune.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.data.media.sample import Sample
    from finetune.planning import Plan
    from finetune.rng import Draw


class TrainStep(ABC):
    """One network and its loss. Most families have one train step; a GAN has two, one for each network.

    Attributes:
        net: its parameters with `requires_grad` are trained.
        every: the train step runs in every n-th optimization step, starting with the first.
        cycle: period, in steps, of the computations, if some steps compute more than others.
    """

    name: str
    net: nn.Module
    every: int = 1
    cycle: int = 1

    @abstractmethod
    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Loss of each example, [B] float32.

        `draw` is the source of randomness: a function of seed, step and position.
        """

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that this step trains."""
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class SampleRequest:
    """Samples to generate: one for each prompt, each from its own seed, so that the batch does not matter.

    Attributes:
        size: (width, height); None: the training size.
        sampler: a name in `finetune.config.samplers`; None: the model's default.
        eta: noise that DDIM adds in each step, from 0 (none) to 1 (as much as DDPM).
        truncation: of GANs, factor on the distance from the mean latent; below 1, better and less varied images.
        references: of image editing, the input image of each prompt.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    negative: str = ""
    size: tuple[int, int] | None = None
    sampler: str | None = None
    eta: float = 0.0
    truncation: float = 1.0
    references: tuple[Path, ...] = ()

    def part(self, which: slice) -> SampleRequest:
        """The request for some of the samples."""
        return replace(self, prompts=self.prompts[which], seeds=self.seeds[which], references=self.references[which])


class Model(ABC):
    """A family built for one plan."""

    @abstractmethod
    def train_steps(self) -> tuple[TrainStep, ...]:
        """The train steps of one optimization step, in order."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """The encoder that turns examples into the tensors that `TrainStep.loss` reads."""

    @abstractmethod
    def sample(self, request: SampleRequest) -> list[Sample]:
        """Generate samples with the current weights."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write the files that other programs load; returns their paths."""

    def diagnostic_images(self) -> dict[str, Image]:
        """Additional images to save with the sample grid, by file name."""
        return {}

    def trained(self) -> dict[str, nn.Parameter]:
        """Every trained parameter, by a name that is the same in every run."""
        parameters: dict[str, nn.Parameter] = {}
        for train_step in self.train_steps():
            for name, parameter in train_step.net.named_parameters():
                if parameter.requires_grad:
                    parameters[f"{train_step.name}.{name}"] = parameter
        return parameters

    def state(self) -> dict[str, Tensor]:
        """The networks' part of a checkpoint: trained parameters and persistent buffers (running means, codebooks).

        Call it before Accelerate wraps the networks, so that names have no prefix of a wrapper.
        """
        tensors: dict[str, Tensor] = dict(self.trained())
        for train_step in self.train_steps():
            persistent = train_step.net.state_dict(keep_vars=True)
            buffers = dict(train_step.net.named_buffers())
            tensors |= {f"{train_step.name}.{name}": tensor for name, tensor in buffers.items() if name in persistent}
        return tensors


def detached_forward(net: nn.Module, *arguments: Any) -> Tensor:
    """Call a network with detached weights: gradients flow through it, but not into its weights."""
    output: Tensor = functional_call(net, net.state_dict(), arguments)  # `state_dict` detaches its tensors
    return output


def gathered(values: Tensor) -> Tensor:
    """Gather the rows of all processes, in the order of ranks. With one process, returns `values`."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def check_sizes(plan: Plan, multiple: int) -> None:
    """Raise if a side of a bucket is not a multiple of `multiple`, as the networks need."""
    for shape, _ in plan.data.buckets:
        if isinstance(shape, Frame) and (shape.width % multiple or shape.height % multiple):
            nearest = max(multiple, round(plan.recipe.data.resolution / multiple) * multiple)
            raise UserError(
                f"images of {shape.width}×{shape.height} do not fit this model: sides must be multiples of {multiple}",
                where="data.resolution, data.bucket_step",
                remedy=f"set data.resolution: {nearest} and data.bucket_step: {multiple}",
            )
