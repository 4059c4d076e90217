"""What a family gives to the training loop: `TrainStep` (a network and its loss) and `Model`."""

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
    """One network and its loss. Most families have one per step; a GAN has two, and each trains one network."""

    name: str
    net: nn.Module  # its parameters with requires_grad train
    every: int = 1  # taken every so many steps, from the first on
    cycle: int = 1  # period, in steps, of what it computes, if some steps compute more than others

    @abstractmethod
    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """Loss of each example, [B] float32.

        `draw` is the source of randomness: a function of seed, step and position.
        """

    def parameters(self) -> list[nn.Parameter]:
        """Parameters that train in this step."""
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class SampleRequest:
    """Images to generate: one for each prompt, each from its own seed, so that the batch does not matter."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    negative: str = ""
    size: tuple[int, int] | None = None  # (width, height); none: the training size
    sampler: str | None = None  # a name in `finetune.config.samplers`; None: the model's own
    eta: float = 0.0  # noise that DDIM adds in each step: 0 none, 1 as much as DDPM
    truncation: float = 1.0  # GANs: distance from the mean latent; below 1 better and less varied images
    references: tuple[Path, ...] = ()  # image editing: the file that each prompt's sample starts from

    def part(self, which: slice) -> SampleRequest:
        """The request for some of the samples."""
        return replace(self, prompts=self.prompts[which], seeds=self.seeds[which], references=self.references[which])


class Model(ABC):
    """A family built for one plan."""

    @abstractmethod
    def train_steps(self) -> tuple[TrainStep, ...]:
        """Train steps of an optimization step, in order."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """The encoder of examples into the tensors that `TrainStep.loss` reads."""

    @abstractmethod
    def sample(self, request: SampleRequest) -> list[Sample]:
        """Generate samples with the current weights."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write the files that other programs load; returns them."""

    def diagnostic_images(self) -> dict[str, Image]:
        """Further images of a sample grid, by file name."""
        return {}

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains, by a name that is the same in every run."""
        found: dict[str, nn.Parameter] = {}
        for train_step in self.train_steps():
            for name, parameter in train_step.net.named_parameters():
                if parameter.requires_grad:
                    found[f"{train_step.name}.{name}"] = parameter
        return found

    def state(self) -> dict[str, Tensor]:
        """The networks' part of a checkpoint: what trains, and persistent buffers (running statistics, codebooks).

        Read before Accelerate wraps the networks, so the names have no wrapper's prefix.
        """
        found: dict[str, Tensor] = dict(self.trained())
        for train_step in self.train_steps():
            persistent = train_step.net.state_dict(keep_vars=True)
            buffers = dict(train_step.net.named_buffers())
            found |= {f"{train_step.name}.{name}": tensor for name, tensor in buffers.items() if name in persistent}
        return found


def detached_forward(net: nn.Module, *arguments: Any) -> Tensor:
    """Call a network with detached weights: gradients pass through it, and none reach its weights."""
    found: Tensor = functional_call(net, net.state_dict(), arguments)  # whose tensors are detached
    return found


def gathered(values: Tensor) -> Tensor:
    """Rows of all processes, in the order of ranks; with one process, the rows themselves."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def check_sizes(plan: Plan, multiple: int) -> None:
    """Raise if a side of a bucket is not a multiple of what the networks need."""
    for shape, _ in plan.data.buckets:
        if isinstance(shape, Frame) and (shape.width % multiple or shape.height % multiple):
            nearest = max(multiple, round(plan.recipe.data.resolution / multiple) * multiple)
            raise UserError(
                f"images of {shape.width}×{shape.height} do not fit this model: sides must be multiples of {multiple}",
                where="data.resolution, data.bucket_step",
                remedy=f"set data.resolution: {nearest} and data.bucket_step: {multiple}",
            )
