"""How gradients become a step: all tensors at once, or one by one as their gradients come; float32 weights, or bfloat16 rounded at random."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.config.schema import Recipe
from finetune.rng import mix
from finetune.training.fsdp import full
from finetune.training.stochastic_rounding import rounded

TINY = 1e-6  # beside a norm that divides, as in torch.nn.utils.clip_grad_norm_


@final
class TensorByTensor(torch.optim.Optimizer):
    """An optimizer of whose tensors one can step without the others, and whose bfloat16 tensors step in float32.

    Such a tensor is widened, takes its step as a float32 one would, state in float32 included, and is rounded at random: by numbers
    that are a function of (seed, step, tensor), so that a resumed run rounds as the unbroken one. They are drawn on the device, for
    they are as many as the weights; so a GPU rounds by others than a CPU.

    Args:
        inner: steps the tensors of its one group each for itself (so not Prodigy, which judges all of them together).
        parameters: what trains, one for each of the inner's: the same, or the bfloat16 one that it stands for.
        key: of the rounding: the run's seed, and the turn.
    """

    def __init__(self, inner: torch.optim.Optimizer, parameters: list[nn.Parameter], key: tuple[int, str]) -> None:
        (group,) = inner.param_groups
        self.inner, self._parameters, self._widened, self._key, self._now = inner, parameters, group["params"], key, 0
        inner.param_groups[:] = [{**group, "params": [parameter]} for parameter in group["params"]]
        self._groups = list(inner.param_groups)
        self.defaults = inner.defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self._groups = list(self.inner.param_groups)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def begin(self, step: int) -> None:
        """What comes is the update of `step` (counted from 0)."""
        self._now = step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for place in range(len(self._parameters)):
            self.step_one(place)

    @torch.no_grad()
    def step_one(self, place: int) -> None:
        """Step the tensor at this place, if it has a gradient."""
        parameter, widened = self._parameters[place], self._widened[place]
        if parameter.grad is None:
            return
        if widened is not parameter:
            widened.data, widened.grad = parameter.detach().float(), parameter.grad.float()
        self.inner.param_groups = [self._groups[place]]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = self._groups
        if widened is not parameter:
            generator = torch.Generator(parameter.device).manual_seed(mix(*self._key, "rounding", self._now, place))
            parameter.copy_(rounded(widened.data, generator))
            widened.data, widened.grad = widened.data.new_empty(0), None


def widened(parameter: nn.Parameter) -> nn.Parameter:
    """What an optimizer is given for `parameter`: itself, or, for a bfloat16 one, a float32 one that holds nothing between steps."""
    if parameter.dtype != torch.bfloat16:
        return parameter
    return nn.Parameter(torch.empty(0, dtype=torch.float32, device=parameter.device))


class Update(ABC):
    """One turn's step, in this order: `begin`, the backward passes, `clip`, and, if all is finite, `take`."""

    @abstractmethod
    def begin(self, step: int, rate: float) -> None:
        """The step (counted from 0) and its learning rate."""

    @abstractmethod
    def clip(self) -> Tensor:
        """Bound the gradients as the recipe says; returns the norm of all together before that."""

    @abstractmethod
    def take(self) -> None:
        """Step, and let the gradients go."""


def make_update(recipe: Recipe, parameters: list[nn.Parameter], optimizer: Any, accelerator: Accelerator) -> Update:
    """`optimizer` is Accelerate's."""
    kind = Fused if recipe.train.fused_backward else AtOnce
    return kind(recipe, parameters, optimizer, accelerator)


@final
class AtOnce(Update):
    """All tensors after the last backward pass."""

    def __init__(
        self, recipe: Recipe, parameters: list[nn.Parameter], optimizer: Any, accelerator: Accelerator
    ) -> None:
        self._section, self._parameters, self._optimizer, self._accelerator = (
            recipe.optimizer,
            parameters,
            optimizer,
            accelerator,
        )

    def begin(self, step: int, rate: float) -> None:
        _begin(self._optimizer, step, rate)

    def clip(self) -> Tensor:
        most = self._section.clip_norm or math.inf
        if self._section.clip == "global":
            return full(self._accelerator.clip_grad_norm_(self._parameters, most))
        self._accelerator.unscale_gradients()
        norms = [clip_alone(parameter.grad, most) for parameter in self._parameters if parameter.grad is not None]
        return _norm(torch.stack(norms))

    def take(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


@final
class Fused(Update):
    """Each tensor inside the backward pass, as soon as its gradient is there; the gradient goes before the next one comes.

    So there are never all gradients at once, and what would need them (a norm over all to clip by, sums over several batches or
    processes) is refused by the recipe or the plan. A loss that is not finite is seen when the weights have taken it.
    """

    def __init__(
        self, recipe: Recipe, parameters: list[nn.Parameter], optimizer: Any, accelerator: Accelerator
    ) -> None:
        self._most = (recipe.optimizer.clip_norm or math.inf) if recipe.optimizer.clip == "tensor" else math.inf
        self._optimizer: TensorByTensor = optimizer.optimizer  # within Accelerate's
        self._norms: list[Tensor] = []
        self._open = False
        self._section: Callable[[str], None] | None = None
        for place, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(lambda one, place=place: self._arrived(place, one))

    def begin(self, step: int, rate: float) -> None:
        _begin(self._optimizer, step, rate)
        self._norms, self._open = [], True

    def watch(self, section: Callable[[str], None]) -> None:
        """Report each change between the backward pass and the optimizer: `section("optimizer")`, `section("backward")`."""
        self._section = section

    @torch.no_grad()
    def _arrived(self, place: int, parameter: Tensor) -> None:
        if self._open and parameter.grad is not None:  # in another turn, the gradient is not this one's
            if self._section is not None:
                self._section("optimizer")
            self._norms.append(clip_alone(parameter.grad, self._most))
            self._optimizer.step_one(place)
            parameter.grad = None
            if self._section is not None:
                self._section("backward")

    def clip(self) -> Tensor:
        self._open = False
        return _norm(torch.stack(self._norms))

    def take(self) -> None:
        """All is done."""


def _begin(optimizer: Any, step: int, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, TensorByTensor):
        inner.begin(step)


def clip_alone(gradient: Tensor, most: float) -> Tensor:
    """Bound one gradient's norm by `most`, in place; returns the norm before, float32."""
    norm = _norm(gradient)
    if math.isfinite(most):
        gradient.mul_((most / (norm + TINY)).clamp(max=1.0))
    return norm


def _norm(values: Tensor) -> Tensor:
    return full(torch.linalg.vector_norm(values, dtype=torch.float32))
