"""What a family gives to the loop: `Turn` (a net and its loss) and `Model` (turns, encoders, samples, files)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from finetune.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.engine.draw import Draw
    from finetune.planning import Plan

Batch = dict[str, Tensor]


class Turn(ABC):
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


class Encoders(ABC):
    """What turns pictures and captions into the tensors that the step reads; run once, cached, then released."""

    picture_key: str  # all that a picture's tensors depend on besides its pixels: weights, precision
    caption_key: str  # likewise for captions; "" where captions are not read
    mask_factor: int | None = None  # picture pixels, along one side, of a place that has a loss; none: masks mean nothing to the family
    cached: bool = True  # False: the tensors are as large as the pictures, keeping them gains nothing

    @abstractmethod
    def encode_picture(self, pixels: Tensor) -> Batch:
        """One picture, [3, H, W] float32 in [-1, 1] → named tensors without a batch dimension."""

    @abstractmethod
    def encode_caption(self, caption: str) -> Batch:
        """One caption → named tensors without a batch dimension."""

    def caption_tokens(self, caption: str) -> tuple[int, int] | None:
        """(tokens of the caption, most that are read), or None where captions are not read."""
        return None

    def tokens(self, caption: str) -> list[str]:
        """The caption's tokens as text, for people; none where captions are not read as tokens."""
        return []

    @abstractmethod
    def release(self) -> None:
        """Free what only encoding needs."""


@dataclass(frozen=True)
class SampleRequest:
    """Pictures to draw: one for each prompt, each from its own seed, so that the batch they come in does not matter."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    negative: str = ""
    size: tuple[int, int] | None = None  # (width, height); none: the training size
    sampler: str | None = None  # of those that the family has; none: its usual one
    eta: float = 0.0  # DDIM's noise on the way: 0 is none, 1 as much as DDPM
    truncation: float = 1.0  # of GANs: how far from the mean picture one is; below 1 more alike and better made


class Model(ABC):
    """A family built for one plan."""

    @abstractmethod
    def turns(self) -> tuple[Turn, ...]:
        """The turns of a step, in order."""

    @abstractmethod
    def encoders(self) -> Encoders:
        """What turns this family's pictures and captions into what `Turn.loss` reads."""

    @abstractmethod
    def sample(self, request: SampleRequest) -> list[Image]:
        """Draw pictures with the weights as they are now."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Write the artefact that other programs load; returns the files."""

    def exhibits(self) -> dict[str, Image]:
        """What a look shows besides its samples, by a name for the file."""
        return {}

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that trains, by a name that is stable from run to run."""
        found: dict[str, nn.Parameter] = {}
        for turn in self.turns():
            for name, parameter in turn.net.named_parameters():
                if parameter.requires_grad:
                    found[f"{turn.name}.{name}"] = parameter
        return found

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the nets: what trains, and the persistent buffers (running statistics, codebooks).

        Taken before Accelerate wraps the nets, so the names have no wrapper's prefix.
        """
        found: dict[str, Tensor] = dict(self.trained())
        for turn in self.turns():
            persistent = turn.net.state_dict(keep_vars=True)
            buffers = dict(turn.net.named_buffers())
            found |= {f"{turn.name}.{name}": tensor for name, tensor in buffers.items() if name in persistent}
        return found


def as_constant(net: nn.Module, *arguments: Any) -> Tensor:
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
    for width, height, _ in plan.data.buckets:
        if width % multiple or height % multiple:
            nearest = max(multiple, round(plan.recipe.data.resolution / multiple) * multiple)
            raise UserError(
                f"pictures of {width}×{height} do not suit this model: sides must be multiples of {multiple}",
                where="data.resolution, data.bucket_step",
                remedy=f"set data.resolution: {nearest} and data.bucket_step: {multiple}",
            )


def stack(examples: Sequence[Batch]) -> Batch:
    """Join examples along a new first dimension.

    Tensors of several lengths are filled up with zeros to the longest, and `NAME.lengths`, [B] int64, says what they were.
    """
    found: Batch = {}
    for key in examples[0]:
        tensors = [example[key] for example in examples]
        lengths = [len(tensor) if tensor.dim() else 1 for tensor in tensors]
        if len(set(lengths)) > 1:
            found[f"{key}.lengths"] = torch.tensor(lengths)
            found[key] = pad_sequence(tensors, batch_first=True)
        else:
            found[key] = torch.stack(tensors)
    return found
