"""Published runs of other trainers, described so that `TracedRun` can trace them: model, adapter, storage, optimizer.

Differences between those trainers and ours are described here, by the terms of finetune/assets/published_runs.tsv.
"""

from __future__ import annotations

import functools
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from finetune.estimate.architecture import CONFIGS
from finetune.estimate.tracing.cuda_mode import fake_tensors
from finetune.estimate.tracing.denoiser import Denoiser, load
from finetune.estimate.tracing.skeletons import STEPS

# Models → the denoiser's name in assets/denoisers, or its folder in assets/configs.
MODELS = {
    "FLUX.2-klein-base-4B": "flux2-klein-4b",
    "LongCat-Image 6B": "longcat-image",
    "Lumina-Image-2.0 2B": "lumina2",
    "PixArt 900M-1024-v0.6 (SimpleTuner default flavour, not the 600M)": "pixart-900m",
    "SD1.5 (dreamshaper-8)": "sd15",
    "SDXL base 1.0": "sdxl",
    "Krea-2-Raw": "krea2",
    "CogVideoX-2b": "cogvideox-2b",
    "SD2 UNet 866M": "sd21",
}
GPUS = {
    "NVIDIA L40S": "l40s",
    "H100 80GB": "h100-sxm",
    "L40S 48GB": "l40s",
    "8x H100 SXM 80GB": "h100-sxm",
    "8x H200 141GB": "h200",
    "64x L40S 48GB": "l40s",
    "A100 80GB (finetrainers/cogvideox-factory)": "a100-80gb",
}
# Operators for a pass of one of SDNQ's layers (`sdnq_operators`): 12.8 and 13.8 by SD 1.5's runs without and with
# checkpointing, 10.5 and 11.5 by SDXL's; PixArt's runs, which something else slows down, say nothing of it.
SDNQ = 12
ROWS = 32  # from which on SDNQ's layers round
GROUP = 128  # values that SDNQ rotates together (SimpleTuner's documentation/experimental/CONVROT.md)
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@final
@dataclass(frozen=True)
class Run:
    """One published run.

    Attributes:
        full: whether the weights themselves train.
        stored: dtype of the frozen weights; int8 and float8 are dequantised at each use.
        trained: dtype of what trains.
        autocast: whether it computes under autocast.
        checkpointed: (blocks that are, of every so many).
        adapt: puts the adapter on a net.
        optimizer: makes it of parameters.
        steps: taken before the peak was read.
    """

    denoiser: Denoiser
    size: tuple[int, int]
    batch: int
    full: bool
    stored: torch.dtype
    trained: torch.dtype
    autocast: bool
    checkpointed: tuple[int, int]
    adapt: Callable[[nn.Module], object]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    steps: int


def why_not(row: dict[str, str]) -> str:
    """Why a row cannot be described; "" if it can."""
    if row["model"] not in MODELS:
        unknown = "its GPU and what was measured" if "aMUSEd" in row["model"] else "batch, precision or side"
        return f"{row['model']}: {unknown} are not said"
    if row["gpu"] not in GPUS:
        return f"GPU {row['gpu']}: not in the table"
    if "UNet+TEs" in row["method"] or "?" in row["resolution"]:
        return (
            f"{row['method']}: "
            f"{'it trains the text encoders too' if 'TEs' in row['method'] else 'its resolution is not said'}"
        )
    if "LyCORIS" in row["method"] and find_spec("lycoris") is None:
        return "LyCORIS: pip install lycoris-lora"
    if "fp8?" in row["compute_dtype"] or row["compute_dtype"].startswith("NeMo"):
        return f"computes in {row['compute_dtype']}: what precision is not said"
    return ""


def sdnq_operators(row: dict[str, str]) -> int:
    """What SDNQ's layers take the host beside their traced operators, in operators that it could launch meanwhile.

    Each pass of a layer, forward, recomputed or backward, goes through a tensor subclass and compiled helpers,
    whatever its size: on both GPUs and at both sizes of model the published runs take longer than those in bfloat16 by
    the passes times one constant.
    """
    if "sdnq" not in row["weights_dtype"]:
        return 0
    some, every = described(row).checkpointed
    return round(SDNQ * linear_layers(row["model"]) * (2 + some / every))


@functools.cache
def linear_layers(model: str) -> int:
    """Of a model's denoiser: those whose weights are quantized."""
    with fake_tensors():
        return sum(type(module) is nn.Linear for module in _denoiser(MODELS[model]).net().modules())


def own_kernels(row: dict[str, str]) -> bool:
    """Whether a run is of PyTorch's own operators. SDNQ rotates and dequantises by kernels of its own, which are not
    traced; LyCORIS' Kronecker products take, on an H100 too, several times what their bytes and FLOPs say."""
    return "LyCORIS" not in row["method"] and "sdnq" not in row["weights_dtype"]


def described(row: dict[str, str]) -> Run:
    full = row["method"].startswith(("full", "from scratch"))
    weights = row["weights_dtype"]
    stored = next(
        (dtype for word, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)) if word in weights),
        torch.bfloat16,
    )
    master = full and not row["compute_dtype"].endswith("no autocast")
    trained = (
        torch.bfloat16
        if "adapter bf16" in weights or row["model"].startswith("Krea") or (full and not master)
        else torch.float32
    )
    partial = re.search(r"partial \((\d) of every (\d) blocks\)", row["grad_ckpt"])
    checkpointed = (
        (int(partial[1]), int(partial[2])) if partial else (1, 1) if row["grad_ckpt"].startswith("yes") else (0, 1)
    )
    sides = [int(side) for side in re.findall(r"\d+", row["resolution"])][-2:]
    return Run(
        denoiser=_denoiser(MODELS[row["model"]]),
        size=(sides[-1], sides[0]),
        batch=int(row["batch_per_gpu"]),
        full=full,
        stored=torch.float32 if master else stored,
        trained=trained,
        autocast=not row["compute_dtype"].endswith("no autocast"),
        checkpointed=checkpointed,
        adapt=lambda net: _adapted(net, row, stored),
        optimizer=OPTIMIZERS[row["optimizer"]],
        # Full fine-tuning at batch 4 took 27.93 with 8-bit state on the GPU and 27.92 with none on it (the source's
        # tables): one step was taken, whose passes found no state yet.
        steps=1 if "memory_before_validation" in row["notes"] else STEPS,
    )


def _denoiser(name: str) -> Denoiser:
    if not (CONFIGS / name / "unet").is_dir():
        return load(name)
    config = json.loads((CONFIGS / name / "unet" / "config.json").read_text(encoding="utf-8"))
    return Denoiser(name, config, resolution=512, tokens=77)


# -- adapters
# -----------------------------------------------------------------------------------------------------------


def _adapted(net: nn.Module, row: dict[str, str], stored: torch.dtype) -> None:
    if stored != torch.bfloat16:
        quantize(net, stored, Rotated if "sdnq" in row["weights_dtype"] else Stored)
    if not row["method"].startswith(("full", "from scratch")):
        _lokr(net, row["method"]) if "LoKr" in row["method"] else _peft(net, row)
    step, every = described(row).checkpointed
    if 0 < step < every:
        checkpoint_some(net, step, every)


def _peft(net: nn.Module, row: dict[str, str]) -> None:
    """An adapter of PEFT, on attention or, as PEFT's own comparison does, on every linear layer of the blocks."""
    import peft

    linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear | Stored)]
    inside = [name for name in linear if "blocks." in name]
    rank = int(re.match(r"\d+", row["rank"])[0]) if re.match(r"\d+", row["rank"]) else 0  # type: ignore[index]
    targets = inside if row["model"].startswith("FLUX.2") else [name for name in linear if name.endswith(ATTENTION)]
    config: Any
    if row["method"] == "ia3":
        config = peft.IA3Config(target_modules=targets, feedforward_modules=[name for name in targets if ".ff" in name])
    elif row["method"] == "loha":
        config = peft.LoHaConfig(r=rank, alpha=rank, target_modules=targets)
    else:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=targets,
            use_dora=row["method"] == "dora",
            init_lora_weights="gaussian",
        )
    net.requires_grad_(False)
    peft.inject_adapter_in_model(config, net)


def _lokr(net: Any, method: str) -> None:
    """LyCORIS's own LoKr, attached to the net so that it trains with it."""
    from lycoris import LycorisNetwork, create_lycoris

    if "bypass" in method:
        LycorisNetwork.apply_preset({"target_module": ["Attention"], "module_algo_map": {}})
        found = create_lycoris(net, 1.0, linear_dim=10_000, linear_alpha=1, algo="lokr", factor=12, bypass_mode=True)
    else:
        LycorisNetwork.apply_preset(
            {
                "target_module": ["Attention", "FeedForward"],
                "module_algo_map": {"Attention": {"factor": 2}, "FeedForward": {"factor": 4}},
            }
        )
        # examples/pixart.lycoris-lokr/lycoris_config.json: products go beside the layers too (`bypass_mode`), and keep
        # what is between them
        found = create_lycoris(
            net, 1.0, linear_dim=10_000, linear_alpha=1, algo="lokr", full_matrix=True, bypass_mode=True
        )
    found.apply_to()
    net.requires_grad_(False)
    net.lycoris = found
    found.requires_grad_(True)


# -- storage
# ------------------------------------------------------------------------------------------------------------


class Stored(nn.Linear):
    """A linear layer whose weight is kept in 8 bits with a scale a row, and dequantised at each use: autograd keeps
    the dequantised one.
    """

    def quantized(self, dtype: torch.dtype) -> None:
        shape = self._parameters.pop("weight").shape  # type: ignore[union-attr]
        self.register_buffer("stored", torch.empty(shape, dtype=dtype))
        self.register_buffer("scale", torch.empty((shape[0], 1), dtype=torch.bfloat16))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.stored.to(torch.bfloat16) * self.scale  # type: ignore[operator]


@final
class Rotated(Stored):
    """A layer of SDNQ 0.2.3 (training/layers/linear/linear_int8): autograd keeps the 8-bit weights alone. Few rows go
    through it plainly.
    """

    def forward(self, values: Tensor) -> Tensor:
        """[…, in] → […, out], in the dtype that came in: autocast, which a norm makes float32 of, does not reach
        inside.
        """
        return RotatedProduct.apply(values, self) if values[..., 0].numel() >= ROWS else super().forward(values)  # type: ignore[no-untyped-call]


@final
class RotatedProduct(torch.autograd.Function):
    """Values are rotated and rounded on their way; backward the gradient is rounded, and what it gives is rotated."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: Rotated) -> Tensor:
        ctx.layer = layer
        return _product(_rotated(values.to(torch.bfloat16)), layer.stored.t(), values.dtype)  # type: ignore[operator]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.stored * ctx.layer.scale.float()
        return _rotated(_product(gradient.to(torch.bfloat16), weight, gradient.dtype)), None


def _product(values: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    found = torch.ops.aten.mm.dtype(values.flatten(0, -2), weight.to(torch.bfloat16), dtype)
    return cast(Tensor, found.unflatten(0, values.shape[:-1]))


def _rotated(values: Tensor) -> Tensor:
    """By a Hadamard matrix, group after group."""
    side = math.gcd(values.shape[-1], GROUP)
    turned = torch.ops.aten.mm.default(values.reshape(-1, side), torch.empty(side, side, dtype=values.dtype))
    return cast(Tensor, turned.view(values.shape))


def quantize(net: nn.Module, dtype: torch.dtype, kind: type[Stored] = Stored) -> None:
    """Keep every linear layer's weight in `dtype`, as layers of `kind` do."""
    for module in list(net.modules()):
        if type(module) is nn.Linear:
            module.__class__ = kind
            cast(Stored, module).quantized(dtype)


def checkpoint_some(net: Any, step: int, every: int) -> None:
    """Checkpoint `step` of every `every` blocks, in the order in which a forward pass comes to them."""
    net.enable_gradient_checkpointing()
    calls = 0
    for module in net.modules():
        whole = getattr(module, "_gradient_checkpointing_func", None)
        if whole is None:
            continue

        def some(block: Any, *args: Any, whole: Any = whole) -> Any:
            nonlocal calls
            calls += 1
            return whole(block, *args) if (calls - 1) % every < step else block(*args)

        module._gradient_checkpointing_func = some


# -- optimizers
# ---------------------------------------------------------------------------------------------------------


class OneAfterAnother(torch.optim.Optimizer, ABC):
    """An optimizer that goes through its tensors one by one."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(list(parameters), {"lr": 1e-4})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every tensor that has a gradient."""
        for parameter in (one for group in self.param_groups for one in group["params"]):
            if parameter.grad is not None:
                self.update(parameter, parameter.grad, self.state[parameter])

    @abstractmethod
    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        """Update one tensor and its state."""


@final
class PerTensor(OneAfterAnother):
    """SimpleTuner's adamw_bf16: three bfloat16 states a weight, and stochastic rounding in six operators."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        for key in ("mean", "square", "shift"):
            state.setdefault(key, torch.zeros_like(parameter))
        state["mean"].mul_(0.9)
        _rounded(state["mean"], state["mean"].float().add_(gradient))
        state["square"].mul_(0.999).addcmul_(gradient, gradient)
        deviation = state["square"].sqrt().add_(1e-8)
        _rounded(state["shift"], state["shift"].float().addcdiv_(state["mean"], deviation))
        before = parameter.clone()
        _rounded(parameter, parameter.float().add_(state["shift"]))
        before.sub_(parameter)
        _rounded(state["shift"], state["shift"].float().add_(before))


def _rounded(target: Tensor, wide: Tensor) -> None:
    """Round float32 values to a bfloat16 tensor by random bits."""
    bits = torch.randint_like(wide, 1 << 16, dtype=torch.int32)
    bits.add_(wide.view(torch.int32)).bitwise_and_(-65536)
    target.copy_(bits.view(torch.float32))


@final
class OneState(OneAfterAnother):
    """Lion's memory and operators: one state a weight."""

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        parameter.mul_(0.99).add_(mean.lerp(gradient, 0.1).sign_())
        mean.lerp_(gradient, 0.02)


def _foreach(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, foreach=True)


def _fused(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def _eight_bit(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    from finetune.estimate.tracing.stubs import AdamW8bit

    return AdamW8bit(list(parameters))


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": _foreach,
    "AdamW (torch)": _foreach,
    "AdamW (fused, distributed)": _fused,
    "AdamW8bit": _eight_bit,
    "AdamW 8bit bnb": _eight_bit,
    "adamw_bf16": PerTensor,
    "optimi-lion (example config)": OneState,
}
