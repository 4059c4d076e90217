"""The table of the trained weights, printed before a run. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from finetune.estimate.memory import bytes_a_weight
from finetune.terminal import table

if TYPE_CHECKING:
    from finetune.models.base import Model
    from finetune.planning import Plan

FLOAT32_BYTES = 4


def adapted(model: Model) -> str:
    """One line with the number of adapted layers, and the number and share of trainable parameters."""
    ranks = sorted(set(_ranks(model).values()))
    trained = _count(model.trained().values())
    whole = sum(_weights(train_step.net) for train_step in model.train_steps())
    differ = f" of ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ""
    layers = f"{len(_ranks(model))} layers{differ}"
    return f"adapter: {layers}, {_short(trained)} trainable parameters of {_short(whole)} ({trained / whole:.1%})"


def adapted_layers(model: Model) -> str:
    """How many layers of each kind have an adapter, with the rank where ranks differ."""
    ranks = _ranks(model)
    differ = len(set(ranks.values())) > 1
    kinds = Counter((_ending(name), rank if differ else 0) for name, rank in ranks.items())
    return ", ".join(
        f"{count} × {kind}" + (f" (rank {rank})" if rank else "") for (kind, rank), count in sorted(kinds.items())
    )


def _ranks(model: Model) -> dict[str, int]:
    """Each adapted layer's rank; 0 for OFT, which has none."""
    return {
        name: 0 if hasattr(module, "oft_block_size") else module.r["default"]
        for train_step in model.train_steps()
        for name, module in train_step.net.named_modules()
        if isinstance(ranks := getattr(module, "r", None), dict) and "default" in ranks
    }


def whole(model: Model, plan: Plan) -> str:
    """The table for full fine-tuning: trained parameters, and their memory without activations."""
    parts = of_what_trains(model, plan)
    summed = " + ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
    rows = [
        ("train", f"{_short(_count(model.trained().values()))} parameters, all in {plan.recipe.train.weights}"),
        ("memory", f"{summed} = {gigabytes(sum(parts.values()))}, plus activations"),
    ]
    return table("weights", rows)


def of_what_trains(model: Model, plan: Plan) -> dict[str, int]:
    """Bytes of trained weights, gradients, optimizer state and EMA, which do not depend on the batch size."""
    trained, optimizer = _count(model.trained().values()), plan.recipe.optimizer.name
    width = FLOAT32_BYTES if plan.recipe.train.weights == "float32" else 2
    parts: dict[str, float] = {"weights": width, "gradients": width, optimizer: bytes_a_weight(optimizer)}
    if plan.recipe.train.fused_backward:  # only one tensor's gradient exists at a time
        del parts["gradients"]
    if plan.recipe.train.ema:
        parts["averages"] = FLOAT32_BYTES
    return {name: round(size * trained) for name, size in parts.items()}


def built(model: Model) -> str:
    """The table of a model trained from scratch: its networks and their sizes."""
    rows = []
    for train_step in model.train_steps():
        for name, net in train_step.net.named_children():
            if count := _count(net.parameters()):
                rows.append((name, f"{type(net).__name__}, {_short(count)} parameters, randomly initialized"))
    return table("networks", rows)


def _ending(place: str) -> str:
    """A layer's name within its block: `…transformer_blocks.0.ff.net.0.proj` → `ff.net.0.proj`."""
    return re.sub(r"^.*s\.\d+\.", "", place)


def _count(tensors: Iterable[object]) -> int:
    return sum(tensor.numel() for tensor in tensors)  # type: ignore[attr-defined]


def _weights(net: Any) -> int:
    """The number of weights of a network, including packed (quantized) and offloaded ones."""
    return _count(net.parameters()) + sum(getattr(module, "packed_away", 0) for module in net.modules())


def _short(count: int) -> str:
    """Format a number of parameters: `61.4 k`, `5.61 M`, `2.57 B`."""
    size, unit = next(
        (size, unit) for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if count >= size or size == 1
    )
    return f"{count / size:.3g} {unit}".rstrip()


def gigabytes(size: int) -> str:
    """Format bytes as `5.61 GiB`."""
    return f"{size / 2**30:.2f} GiB"
