"""Record every allocation, release and operator of a step on fake tensors.

`FakeTensorMode` computes shapes and dtypes only. `Recorder` sees each operator that the dispatcher runs: a new
storage is an allocation, a storage that is freed is a release.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from finetune.estimate.allocator.caching import Event, allocate, free
from finetune.estimate.tracing.op_cache import OpCache


class Operator(NamedTuple):
    """The cost of one kernel launch.

    Attributes:
        kind: matmul, conv, attention, random or other.
        bytes: bytes read and written.
        width: bytes per operand element.
        eager: Python ran it and autograd recorded it (forward passes, recomputation); else autograd's engine or an
            optimizer.
    """

    kind: str
    flops: int
    bytes: int
    width: int
    eager: bool


@final
@dataclass
class Section:
    """A part of a step: index of its first event, and its operators in order."""

    name: str
    start: int
    operators: list[Operator] = field(default_factory=list)


KINDS = {
    "matmul": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm"),
    "conv": ("convolution", "_convolution", "convolution_backward"),
    "random": ("bernoulli_",),
    "attention": (
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
        *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"),
        *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
    ),
}
KIND = {name: kind for kind, names in KINDS.items() for name in names}
# No kernel on the GPU: views, no-ops, and random numbers, which this project generates on the host.
NO_LAUNCH = {
    "randn",
    "rand",
    "randint",
    "detach",
    "lift_fresh",
    "_unsafe_view",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "alias",
    "_local_scalar_dense",
}


DRAWN = "_drawn"  # marks random tensors and comparisons with them
_integer = ContextVar("integer", default=1)


@contextlib.contextmanager
def reading(integer: int) -> Iterator[None]:
    """Within, reading an integer from a fake tensor returns this value.

    (A float reads as 1 and a boolean as False, except comparisons with random numbers, which adapters use for dropout.)
    """
    before = _integer.set(integer)
    try:
        yield
    finally:
        _integer.reset(before)


@final
class Recorder(TorchDispatchMode):
    """Records events and operators in order.

    Args:
        scratch: returns a kernel's scratch bytes from an operator's name and arguments.
    """

    def __init__(self, scratch: Callable[[str, Any], int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scratch = scratch
        self.events: list[Event] = []
        self.sections: list[Section] = []
        self._outcome = OpCache()
        self._names: dict[
            int, tuple[int, Any]
        ] = {}  # address of a live storage → its identifier, and a weak reference with a callback for its end

    def section(self, name: str) -> None:
        """Start a section called `name`."""
        self.sections.append(Section(name, len(self.events)))

    def adopt(self, tensors: Iterable[Tensor]) -> int:
        """Record existing tensors as allocated now, in this order; returns their bytes."""
        return sum(self._see(tensor) for tensor in tensors)

    def _see(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._names:
            return 0
        size, identifier = storage.nbytes(), len(self.events)

        def gone(_: Any) -> None:
            del self._names[address]
            self.events.append(free(identifier))

        self._names[address] = identifier, weakref.ref(storage, gone)
        self.events.append(allocate(identifier, size))
        return int(size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(
            args[0], FakeTensor
        ):  # two of three calls ask for a tensor's device
            return args[0].fake_device
        kwargs = kwargs or {}
        name = func._overloadpacket.__name__
        if name == "_local_scalar_dense":  # reads a value, which fake tensors do not have
            return (
                hasattr(args[0], DRAWN)
                if args[0].dtype == torch.bool
                else 1.0
                if args[0].is_floating_point()
                else _integer.get()
            )
        out = self._outcome(func, args, kwargs)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name == "rand" or (name == "gt" and hasattr(args[0], DRAWN)):
            setattr(out, DRAWN, True)
        if func.namespace in ("aten", "bitsandbytes") and not func.is_view and name not in NO_LAUNCH and self.sections:
            self.sections[-1].operators.append(_cost(func, name, args, kwargs, out, outs))
        for tensor in outs:
            self._see(tensor)
        if self._scratch is not None and (size := self._scratch(name, args)):
            self.events += [allocate(identifier := len(self.events), size), free(identifier)]
        return out


def _cost(func: Any, name: str, args: Any, kwargs: Any, out: Any, outs: list[Tensor]) -> Operator:
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    count = flop_registry.get(torch.ops.aten.addmm if name == "addmm_" else func._overloadpacket)
    flops = int(count(*args, **kwargs, out_val=out)) if count is not None else 0
    moved = {id(tensor): tensor.numel() * tensor.element_size() for tensor in (*inputs, *outs)}
    kind = KIND.get(name, "other")
    factors = inputs[:1] if kind == "attention" else inputs  # the backward pass also reads float32 softmax sums
    width = max((tensor.element_size() for tensor in factors if tensor.is_floating_point()), default=4)
    return Operator(kind, flops, sum(moved.values()), width, torch.is_grad_enabled())


def tensors_of(net: nn.Module) -> list[Tensor]:
    """Parameters and buffers in the order in which `.to(device)` moves them."""
    tensors: list[Tensor] = []
    for module in net.modules():
        tensors += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return tensors
