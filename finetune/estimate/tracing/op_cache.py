"""Cache the results of operators on fake tensors: blocks repeat, and with them the input shapes of each operator.

`FakeTensorMode` has a cache too, but its lookups are slower.
"""

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

RESHAPING = {"set_", "resize_", "resize_as_"}  # in-place operators that change shapes without a tag
UNPREDICTABLE = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)
PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


class Shape(NamedTuple):
    """A tensor that an operator returns. `offset`: into the storage of the first argument, for views; None for new
    tensors.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int | None


Known = Any  # a Shape, a tuple or list of them, `SAME` (the first argument); None: cannot be cached
SAME = "same"


@final
class OpCache:
    """Calls PyTorch operators; for known input shapes, only creates the outputs."""

    def __init__(self) -> None:
        self._known: dict[Any, Known] = {}
        self._predictable: dict[Any, bool] = {}  # operators → whether they can be cached

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func not in self._predictable:
            self._predictable[func] = predictable(func)
        key: list[Any] = [func]
        if not (
            self._predictable[func]
            and args
            and type(args[0]) is FakeTensor
            and _describe(args, key)
            and _describe(kwargs, key)
        ):
            return func(*args, **kwargs)
        entry = tuple(key)
        if entry not in self._known:
            out = func(*args, **kwargs)
            self._known[entry] = _outcome(func, out, args[0])
            return out
        found = self._known[entry]
        if found is None:
            return func(*args, **kwargs)
        if found is SAME:
            return args[0]
        with no_dispatch(), torch._C.DisableTorchFunction():
            if isinstance(found, Shape):
                return _made(found, args[0])
            return type(found)(_made(shape, args[0]) for shape in found)


def predictable(func: Any) -> bool:
    """Whether an operator's result depends on shapes alone."""
    writes = [
        argument
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    in_place = writes == func._schema.arguments[:1] and func.__name__.partition(".")[0].endswith("_")
    return (
        func.namespace == "aten"
        and not any(tag in func.tags for tag in UNPREDICTABLE)
        and func._overloadpacket.__name__ not in RESHAPING
        and (not writes or in_place)
    )


def _describe(value: Any, parts: list[Any]) -> bool:
    """Append a cache key of `value` to `parts`; returns whether it has one."""
    if isinstance(value, Tensor):
        if type(value) is not FakeTensor or value.layout is not torch.strided or value.is_conj() or value.is_neg():
            return False
        parts += (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        return True
    if isinstance(value, tuple | list):
        parts.append(len(value))
        return all(_describe(one, parts) for one in value)
    if isinstance(value, dict):
        parts.append(tuple(value))
        return all(_describe(one, parts) for one in value.values())
    parts += (type(value), value)
    return isinstance(value, PLAIN)


def _outcome(func: Any, out: Any, first: FakeTensor) -> Known:
    """The cache entry for `out`, relative to the operator's first argument; None if it cannot be recreated."""
    if out is first:
        return SAME
    if func._schema.is_mutable:
        return None
    outs = out if isinstance(out, tuple | list) else (out,)
    shapes = [
        shape
        for one in outs
        if (shape := _shape(one, first)) is not None and (shape.offset is not None) == func.is_view
    ]
    if len(shapes) < len(outs) or len({id(one) for one in outs}) < len(outs):
        return None
    return type(out)(shapes) if isinstance(out, tuple | list) else shapes[0]


def _shape(out: Any, first: FakeTensor) -> Shape | None:
    if type(out) is not FakeTensor or out.layout is not torch.strided or out.is_conj() or out.is_neg():
        return None
    shape = Shape(tuple(out.shape), out.stride(), out.dtype, out.fake_device, None)
    if out.untyped_storage()._cdata == first.untyped_storage()._cdata:
        return shape._replace(offset=int(out.storage_offset()))
    needed = torch._prims_common.compute_required_storage_length(shape.size, shape.stride, 0) * out.element_size()
    return shape if not out.storage_offset() and out.untyped_storage().nbytes() == needed else None


def _made(shape: Shape, first: FakeTensor) -> FakeTensor:
    made = torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
    if shape.offset is not None:
        made.set_(first.untyped_storage(), shape.offset, shape.size, shape.stride)
    mode: FakeTensorMode = first.fake_mode
    return FakeTensor(mode, made, shape.device)
