"""Faster replacements for parts of diffusers, PEFT and PyTorch: same weights, same names, same results up to rounding.

Every patch of another library's class lives in this package.

| kernel | replaces | in |
| --- | --- | --- |
| `fused_lora` | PEFT's LoRA layers, linear and convolution | every network with plain LoRA layers |
| `fused_lora.shared_input` | layers that read the same tensor (q, k, v) compute together | the same |
| `unet_blocks` | diffusers' residual and attention blocks | frozen U-Nets that carry adapters |
| `rope` | diffusers' rotary embeddings | FLUX.1, FLUX.2 and networks with the same attention |
| `rope.cast` | rotated queries and keys are rounded to attention's dtype at once | the same |
| `onednn_conv` | PyTorch's convolutions with frozen weights on a CPU | inside `fused_lora`'s convolutions |

A kernel's module is imported when a network that it covers is built. If what it replaces is missing or has another
signature in the installed library, the library's own code runs, and one warning on the logger `finetune.kernels` says
so.

Switches: `FT_KERNELS=off` turns all kernels off, `FT_KERNELS=rope,fused_lora` keeps only these, `FT_KERNELS=-rope`
turns one off; in code, `with kernels.without("rope"): …`. Estimates and cost profiles assume that all are on.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

ADAPTER_NAME = "default"  # what diffusers and transformers call an adapter that is given no name
VARIABLE = "FT_KERNELS"
logger = logging.getLogger(__name__)


class Unavailable(Exception):
    """The installed library lacks what a kernel replaces, or it has changed."""


@dataclass(frozen=True)
class Kernel:
    """What a kernel covers.

    Attributes:
        replaces: for the log.
        networks: class names of the networks that are expected to contain `parts`.
        parts: names of diffusers' classes, of modules or of their attention processors; empty: any network.
    """

    replaces: str
    networks: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def covers(self, network: nn.Module) -> bool:
        """Whether `network` has, or should have, a part that this kernel replaces."""
        return not self.parts or type(network).__name__ in self.networks or any(_parts(network, self.parts))


KERNELS = {
    "fused_lora": Kernel("PEFT's LoRA layers"),
    "unet_blocks": Kernel(
        "diffusers' U-Net blocks", ("UNet2DConditionModel",), ("ResnetBlock2D", "Attention", "Transformer2DModel")
    ),
    "rope": Kernel(
        "diffusers' rotary embeddings",
        ("FluxTransformer2DModel", "Flux2Transformer2DModel"),
        ("FluxAttnProcessor", "Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor"),
    ),
    "onednn_conv": Kernel("PyTorch's convolutions on a CPU"),
}
OPTIONS = ("fused_lora.shared_input", "rope.cast")
_disabled: list[str] = []  # by `without`
_reported: set[str] = set()  # kernels whose absence has been logged


def apply(name: str, network: nn.Module) -> None:
    """Replace what kernel `name` covers in `network`, in place. Where that is impossible, `network` stays as it is."""
    if not enabled(name) or not KERNELS[name].covers(network):
        return
    try:
        importlib.import_module(f"{__name__}.{name}").patch(network)
    except (ImportError, AttributeError, Unavailable) as error:
        report_missing(name, error)


def enabled(name: str) -> bool:
    """Whether a kernel, or an option of one, is switched on."""
    kernel = name.partition(".")[0]
    return not {name, kernel} & {*_disabled, *_switched_off(os.environ.get(VARIABLE, ""))}


@contextlib.contextmanager
def without(*names: str) -> Iterator[None]:
    """Switch kernels or their options off for networks built inside this context."""
    for name in names:
        _check(name)
    _disabled.extend(names)
    try:
        yield
    finally:
        del _disabled[len(_disabled) - len(names) :]


def report_missing(name: str, error: Exception) -> None:
    """Log, once per process, that a kernel does not fit the installed libraries."""
    if name not in _reported:
        _reported.add(name)
        reason = " ".join(str(error).split())
        logger.warning("%s is off: %s. Training uses %s and is slower.", name, reason, KERNELS[name].replaces)


def _parts(network: nn.Module, names: tuple[str, ...]) -> Iterator[Any]:
    """Modules and attention processors of `network` whose diffusers class has one of `names`."""
    for module in network.modules():
        for part in (module, getattr(module, "processor", None)):
            if type(part).__name__ in names and type(part).__module__.startswith("diffusers."):
                yield part


def _switched_off(value: str) -> set[str]:
    """The kernels that a value of `FT_KERNELS` turns off."""
    words = [word.strip() for word in value.split(",") if word.strip()]
    if words in ([], ["all"]):
        return set()
    if words == ["off"]:
        return set(KERNELS)
    for word in words:
        _check(word.removeprefix("-"))
    kept = {word for word in words if not word.startswith("-")}
    off = {word[1:] for word in words if word.startswith("-")}
    return off | (set(KERNELS) - kept if kept else set())


def _check(name: str) -> None:
    if name not in (known := [*KERNELS, *OPTIONS]):
        raise UserError(f'there is no kernel "{name}"', where=VARIABLE, remedy=did_you_mean(name, ["off", *known]))
