"""Compare peak memory of real steps on this machine's CPU with their traces, to the byte (three minutes).

    python benchmarks/check_trace.py

Both run the project's own Trainer for two steps in float32. torch's profiler counts the real run's allocations: every
allocation and release of torch's CPU allocator, including temporaries of oneDNN and bitsandbytes. The trace runs on
fake tensors (`TracedRun(device="cpu")`). Prints both peaks; the exit code is 1 if one differs by more than 0.1 %.

The trace includes the scratch memory of convolutions and the fused AdamW on a CPU (`stubs.recorder`; a GPU's
differs), but not oneDNN's scratchpads and the row sums of norms and attention, a few KiB. Neither side counts memory
outside torch's allocator, such as buffers of matrix products and Python's own memory. One known difference changes
none of these peaks: under a dispatch mode such as the recorder, autograd accumulates gradients into a new tensor,
where a real run reuses the older one.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.config.loader import load_recipe
from finetune.config.schema import Recipe
from finetune.data.dataset import Dataset
from finetune.estimate.allocator.caching import Event
from finetune.estimate.tracing.denoiser import Denoiser, DenoiserModel
from finetune.estimate.tracing.recorder import tensors_of
from finetune.estimate.tracing.skeletons import STEPS, skeletons
from finetune.estimate.tracing.traced_run import FakeDataset, TracedRun
from finetune.models.base import Model
from finetune.paths import ASSETS
from finetune.planning import Plan
from finetune.training.run_folder import Run
from finetune.training.trainer import Trainer

MOST = 0.001  # the goal: |traced ÷ real − 1|
TRAINING = "# training"  # marks the training phase in the profile
MIB = 1 << 20

# Over the embedded base's: a UNet of 101 M parameters, and one with SDXL's conditions.
BLOCKS = {
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
}
MIDDLE = {**BLOCKS, "block_out_channels": [160, 320, 640], "attention_head_dim": 8, "norm_num_groups": 32}
XL = {
    **BLOCKS,
    "block_out_channels": [64, 128, 192],
    "transformer_layers_per_block": [1, 1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 64,
    "cross_attention_dim": 256,
    "norm_num_groups": 32,
}
SD3 = Denoiser(
    "a small SD 3",
    {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 32,
        "num_layers": 4,
        "num_attention_heads": 8,
        "caption_projection_dim": 512,
        "joint_attention_dim": 256,
        "pooled_projection_dim": 128,
        "pos_embed_max_size": 48,
    },
    resolution=256,
    tokens=77,
)


class Case(NamedTuple):
    """One configuration: a recipe at a resolution, with `build` if its model is not a family's."""

    name: str
    recipe: Recipe
    side: int
    build: Callable[[Plan], Model] | None = None


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        missed = sum(not compared(case) for case in cases(Path(folder)))
    sys.exit(f"{missed} off by more than {MOST:.1%}" if missed else 0)


def cases(folder: Path) -> Iterator[Case]:
    def recipe(name: str, batch: int, checkpointing: bool, *more: str) -> Recipe:
        sets = (
            f"train.batch_size={batch}",
            "train.accumulation=1",
            "train.ema=null",
            f"train.gradient_checkpointing={str(checkpointing).lower()}",
        )
        return load_recipe(name, [*sets, *more])

    small = f"model.path={pipeline(folder / 'xl', XL, two_encoders=True)}"
    middle = f"model.path={pipeline(folder / 'middle', MIDDLE)}"
    for checkpointing in (False, True):
        said = ", checkpointing" if checkpointing else ""
        yield Case(f"base, LoRA{said}", recipe("lora/emoji", 4, checkpointing), 64)
        yield Case(f"base, full{said}", recipe("full/emoji", 4, checkpointing), 64)
        yield Case(f"small SDXL, LoRA{said}", recipe("lora/sdxl", 2, checkpointing, small), 128)
        yield Case(
            f"middle UNet, full{said}", recipe("full/sd15", 2, checkpointing, middle, "optimizer.name=adamw"), 128
        )
        yield Case(f"small SD 3, LoRA{said}", recipe("lora/sd15", 2, checkpointing), 256, small_sd3)
    averaged = ("train.ema=0.99", "train.accumulation=2")
    yield Case("base, full, averages, accumulation", recipe("full/emoji", 4, False, *averaged), 64)
    eight = "optimizer.name=adamw8bit"
    yield Case("base, full, 8-bit AdamW", recipe("full/emoji", 4, False, eight), 64)
    yield Case("middle UNet, full, checkpointing, 8-bit", recipe("full/sd15", 1, True, middle, eight), 128)
    for kind in ("nf4", "int8"):
        for checkpointing in (False, True):
            said = ", checkpointing" if checkpointing else ""
            quantized = recipe("lora/sd15", 2, checkpointing, f"model.quantize={kind}")
            yield Case(f"small SD 3, LoRA on {kind}{said}", quantized, 256, small_sd3)
    yield Case("base, LoRA on nf4", recipe("lora/emoji", 4, False, "model.quantize=nf4"), 64)
    every = "train.gradient_checkpointing=2"
    yield Case("base, full, every second block", recipe("full/emoji", 4, True, every), 64)
    yield Case("small SD 3, LoRA, every second block", recipe("lora/sd15", 2, True, every), 256, small_sd3)
    yield Case(
        "small SD 3, LoRA, blocks offloaded",
        recipe("lora/sd35-medium", 2, True, "train.offload_blocks=true"),
        256,
        small_sd3,
    )
    inside = ("train.fused_backward=true", "optimizer.clip=tensor")
    half = "train.weights=bfloat16"
    yield Case("base, full, fused backward", recipe("full/emoji", 4, False, *inside), 64)
    yield Case("base, full, bfloat16 weights", recipe("full/emoji", 4, False, half), 64)
    yield Case("base, full, fused, bfloat16, 8-bit", recipe("full/emoji", 4, True, *inside, half, eight), 64)
    yield Case(
        "middle UNet, full, fused, Adafactor",
        recipe("full/sd15", 2, True, middle, *inside, "optimizer.name=adafactor"),
        128,
    )


def small_sd3(plan: Plan) -> Model:
    return DenoiserModel(plan, SD3, (256, 256))


def pipeline(folder: Path, unet: dict[str, Any], two_encoders: bool = False) -> Path:
    """The bundled base model's folder without weights, with another UNet."""
    for file in (ASSETS / "base").rglob("*"):
        if file.suffix in (".json", ".txt"):
            (folder / file.relative_to(ASSETS / "base")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.relative_to(ASSETS / "base"))
    changed(folder / "unet" / "config.json", **unet)
    if two_encoders:
        changed(
            folder / "text_encoder" / "config.json", projection_dim=64, architectures=["CLIPTextModelWithProjection"]
        )
        for name in ("text_encoder", "tokenizer"):
            shutil.copytree(folder / name, folder / f"{name}_2")
        parts = {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        without = dict.fromkeys(("safety_checker", "requires_safety_checker"))
        changed(folder / "model_index.json", _class_name="StableDiffusionXLPipeline", **parts, **without)
    return folder


def changed(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}), encoding="utf-8")


def compared(case: Case) -> bool:
    """Print one line; returns whether the two agree."""
    start = time.perf_counter()
    subject = TracedRun(case.recipe, case.recipe.train.weights, (case.side, case.side), device="cpu", build=case.build)
    phase = subject.phases(only_training=True)["train"]
    traced = peak_of(phase.events, next(section.start for section in phase.sections if section.name == "state"))
    real, parameters = taken(subject)
    off = traced / real - 1
    print(
        f"{case.name:<40} {parameters / 1e6:>6.1f} M parameters   real {real / MIB:>9.3f} MiB   traced "
        f"{traced / MIB:>9.3f}"
        f"   {off:+.3%}   {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return abs(off) <= MOST


def peak_of(events: list[Event], start: int) -> int:
    """The most bytes that were there at once from event `start` on."""
    sizes: dict[int, int] = {}
    total = peak = 0
    for number, event in enumerate(events):
        if event.size is None:
            total -= sizes.pop(event.identifier)
        else:
            sizes[event.identifier] = event.size
            total += event.size
        if number >= start:
            peak = max(peak, total)
    return peak


def taken(subject: TracedRun) -> tuple[int, int]:
    """(peak bytes of a real run: the networks and the most that training allocates on top, number of parameters)."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, skeletons():
        model = subject.build()
        _, example = subject.encode(model)
        gc.collect()
        with record_function(TRAINING):
            made_up = cast(Dataset, FakeDataset(example, torch.zeros))
            trainer = Trainer(subject.plan, model, made_up, cast(Run, None), Accelerator(cpu=True))
            for step in range(STEPS):
                trainer.train_step(step)
    nets = [train_step.net for train_step in model.train_steps()]
    return held(*nets) + counted(profiled), sum(parameter.numel() for net in nets for parameter in net.parameters())


def counted(profiled: profile) -> int:
    """The most bytes at once beyond those that were there at the mark `TRAINING`."""
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events: list[Any] = profiled.profiler.kineto_results.events()
    start = next(event.start_ns() for event in events if event.name() == TRAINING)
    total = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        if event.start_ns() >= start:
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def held(*nets: nn.Module) -> int:
    """Bytes of the networks' parameters and buffers."""
    tensors = [tensor for net in nets for tensor in tensors_of(net)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


if __name__ == "__main__":
    torch.set_num_threads(1)  # kernels share out their work, and take more for themselves, by the number of threads
    main()
