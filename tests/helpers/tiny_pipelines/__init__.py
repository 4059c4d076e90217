"""One tiny pipeline per transformer family, built from its real classes. Tests find a new module here automatically.

Importing this package imports no torch; a module is imported when its pipeline is built or its cases are listed.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.models.registry import specs


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline and how it is tested.

    Attributes:
        build: captions that its tokenizers should know → the pipeline.
        seed: of its random weights; golden losses depend on it.
        lora, full: overrides of the recipe in the case of each method.
        checkpoint_nf4: whether the case with a quantized base uses gradient checkpointing.
        idle: parts of parameter names that no gradient reaches in full fine-tuning.
        guidance: the pipeline's argument for the guidance scale.
        negative: whether the pipeline takes a negative prompt.
        arguments: further arguments of the pipeline's call.
        bool_masks: whether the pipeline's float masks must be made boolean to mask anything.
    """

    build: Callable[[tuple[str, ...]], Any]
    seed: int
    lora: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    checkpoint_nf4: bool = True
    idle: tuple[str, ...] = ()
    guidance: str = "guidance_scale"
    negative: bool = True
    arguments: Mapping[str, object] = field(default_factory=dict)
    bool_masks: bool = False


@functools.cache
def names() -> tuple[str, ...]:
    """Slugs of the families with a module in this package."""
    modules = {module.name for module in pkgutil.iter_modules(__path__)}
    return tuple(slug for slug in specs() if slug.replace("-", "_") in modules)


@functools.cache
def tiny_of(slug: str) -> Tiny:
    """The tiny pipeline of a family."""
    found: Tiny = importlib.import_module(f"{__name__}.{slug.replace('-', '_')}").TINY
    return found


def save(slug: str, captions: tuple[str, ...], folder: Path) -> None:
    """Write a family's tiny pipeline, with random weights that are the same each time."""
    import torch

    tiny = tiny_of(slug)
    torch.manual_seed(tiny.seed)
    pipeline = tiny.build(captions)
    # diffusers initializes last layers and gates to zero, where a first step changes little: imitate some training.
    for parameter in pipeline.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline.save_pretrained(folder)
