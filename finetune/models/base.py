"""What a family gives to the loop: `TrainStep` (a net and its loss) and `Model` (turns, encoders, samples, files)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
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
    """One net and its loss. Most families take one turn a step; a GAN takes two, and only one net trains in each."""

    name: str
    net: nn.Module  # what trains in this turn: its parameters with requires_grad
    every: int = 1  # it is taken in each so many steps, the first of all among them
    cycle: int = 1  # steps after which what it computes comes again, where some steps compute more than others

    @abstractmethod
    def loss(self, batch: Batch, draw: Draw) -> Tensor:
        """The loss of each example, shape [B], float32. `draw` gives the randomness of each example's place."""

    def parameters(self) -> list[nn.Parameter]:
        """What trains in this turn."""
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class SampleRequest:
    """Images to draw: one for each prompt, each from its own seed, so that the batch they come in does not matter."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    negative: str = ""
    size: tuple[int, int] | None = None  # (width, height); none: the training size
    sampler: str | None = None  # of those that the family has; none: its usual one
    eta: float = 0.0  # DDIM's noise on the way: 0 is none, 1 as much as DDPM
    truncation: float = 1.0  # of GANs: how far from the mean image one is; below 1 more alike and better made


class Model(ABC):
    """A family built for one plan."""

    @abstractmethod
    def train_steps(self) -> tuple[TrainStep, ...]:
        """The turns of a step, in order."""

    @abstractmethod
    def encoder(self) -> Encoder:
        """What turns this family's images and captions into what `TrainStep.loss` reads."""

    @abstractmethod
    def sample(self, request: SampleRequest) -> list[Sample]:
        """Draw images with the weights as they are now."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write the artifact that other programs load; returns the files."""

    def diagnostic_images(self) -> dict[str, Image]:
        """What a look shows besides its samples, by a name for the file."""
        return {}

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains, by a name that is stable from run to run."""
        found: dict[str, nn.Parameter] = {}
        for train_step in self.train_steps():
            for name, parameter in train_step.net.named_parameters():
                if parameter.requires_grad:
                    found[f"{train_step.name}.{name}"] = parameter
        return found

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the nets: what trains, and the persistent buffers (running statistics, codebooks).

        Taken before Accelerate wraps the nets, so the names have no wrapper's prefix.
        """
        found: dict[str, Tensor] = dict(self.trained())
        for train_step in self.train_steps():
            persistent = train_step.net.state_dict(keep_vars=True)
            buffers = dict(train_step.net.named_buffers())
            found |= {f"{train_step.name}.{name}": tensor for name, tensor in buffers.items() if name in persistent}
        return found


def detached_forward(net: nn.Module, *arguments: Any) -> Tensor:
    """What a net says while another trains: gradients pass through it, and none reach its weights."""
    found: Tensor = functional_call(net, net.state_dict(), arguments)  # whose tensors are detached
    return found


def gathered(values: Tensor) -> Tensor:
    """The rows of all processes, in their order; alone, the rows themselves."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def check_sizes(plan: Plan, multiple: int) -> None:
    """Raise if a bucket has a side that the family's nets cannot halve often enough."""
    for shape, _ in plan.data.buckets:
        if isinstance(shape, Frame) and (shape.width % multiple or shape.height % multiple):
            nearest = max(multiple, round(plan.recipe.data.resolution / multiple) * multiple)
            raise UserError(
                f"images of {shape.width}×{shape.height} do not suit this model: sides must be multiples of {multiple}",
                where="data.resolution, data.bucket_step",
                remedy=f"set data.resolution: {nearest} and data.bucket_step: {multiple}",
            )
