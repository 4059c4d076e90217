"""Applying gradients: all tensors at once, or each as its gradient arrives; to float32 weights, or to stochastically
rounded bfloat16 weights."""

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

TINY = 1e-6  # added to a norm before dividing by it, as in torch.nn.utils.clip_grad_norm_


@final
class TensorByTensor(torch.optim.Optimizer):
    """An optimizer that can step one tensor without the others, and steps bfloat16 tensors in float32.

    A bfloat16 tensor is widened, stepped as a float32 tensor with float32 state, and rounded stochastically by numbers
    that are a function of (seed, step, tensor): a resumed run rounds as an unbroken one. They are generated on the
    device, being as many as the weights, so a GPU rounds differently from a CPU.

    Args:
        inner: an optimizer with one group that treats each tensor by itself (so not Prodigy).
        parameters: what trains, one for each of the inner's parameters: the same, or the bfloat16 one it stands for.
        key: of the rounding: the run's seed, and the train step's name.
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
        """Start the update of `step` (counted from 0)."""
        self._now = step

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for place in range(len(self._parameters)):
            self.step_one(place)

    @torch.no_grad()
    def step_one(self, place: int) -> None:
        """Step the tensor at this index, if it has a gradient."""
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
    """The parameter to give to an optimizer: itself, or for bfloat16 a float32 one that is empty between steps."""
    if parameter.dtype != torch.bfloat16:
        return parameter
    return nn.Parameter(torch.empty(0, dtype=torch.float32, device=parameter.device))


class Update(ABC):
    """One update, in this order: `begin`, the backward passes, `clip`, and, if all is finite, `apply`."""

    @abstractmethod
    def begin(self, step: int, rate: float) -> None:
        """Set the step (counted from 0) and its learning rate."""

    @abstractmethod
    def clip(self) -> Tensor:
        """Clip the gradients as the recipe says; returns the norm of all together before that."""

    @abstractmethod
    def apply(self) -> None:
        """Step, and free the gradients."""


def make_update(recipe: Recipe, parameters: list[nn.Parameter], optimizer: Any, accelerator: Accelerator) -> Update:
    """The update for `optimizer`, which Accelerate has prepared."""
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

    def apply(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


@final
class Fused(Update):
    """Each tensor inside the backward pass, as soon as its gradient is complete; the gradient is freed at once.

    All gradients never exist together, so what needs them (a global norm, sums over several batches or processes) is
    refused by the recipe or the plan. A loss that is not finite is seen only after the weights were updated.
    """

    def __init__(
        self, recipe: Recipe, parameters: list[nn.Parameter], optimizer: Any, accelerator: Accelerator
    ) -> None:
        self._most = (recipe.optimizer.clip_norm or math.inf) if recipe.optimizer.clip == "tensor" else math.inf
        self._optimizer: TensorByTensor = optimizer.optimizer  # inside Accelerate's wrapper
        self._norms: list[Tensor] = []
        self._open = False
        self._section: Callable[[str], None] | None = None
        for place, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(lambda one, place=place: self._arrived(place, one))

    def begin(self, step: int, rate: float) -> None:
        _begin(self._optimizer, step, rate)
        self._norms, self._open = [], True

    def watch(self, section: Callable[[str], None]) -> None:
        """Call `section("optimizer")` and `section("backward")` at each change between the two."""
        self._section = section

    @torch.no_grad()
    def _arrived(self, place: int, parameter: Tensor) -> None:
        if self._open and parameter.grad is not None:  # else the gradient belongs to another train step
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

    def apply(self) -> None:
        """Nothing is left to do."""


def _begin(optimizer: Any, step: int, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, TensorByTensor):
        inner.begin(step)


def clip_alone(gradient: Tensor, most: float) -> Tensor:
    """Clip one gradient's norm to `most`, in place; returns the norm before, float32."""
    norm = _norm(gradient)
    if math.isfinite(most):
        gradient.mul_((most / (norm + TINY)).clamp(max=1.0))
    return norm


def _norm(values: Tensor) -> Tensor:
    return full(torch.linalg.vector_norm(values, dtype=torch.float32))
