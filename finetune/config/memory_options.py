"""What makes a run fit a smaller card: which of these lines of a recipe go together, and where they cannot apply. Torch-free.

`check` knows the recipe alone; `check_machine` and `notes` also what it will run on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.models.registry import has_unet

if TYPE_CHECKING:
    from finetune.config.machine import Machine
    from finetune.config.schema import Precision, Recipe


TILE = 512  # pixels: side of a VAE's tile; neighbors overlap by a quarter
QUANTIZED: dict[str, float] = {
    "nf4": 0.5 + 4 / 64,
    "int8": 1.0,
}  # bytes a weight: NF4's with the scale of 64; int8's, one a row, weigh nothing
ONE_BY_ONE = ("adamw", "adamw8bit", "adafactor", "lion", "came")  # optimizers that treat each tensor for itself


def check(recipe: Recipe, refuse: Callable[[bool, str, str], None]) -> None:
    """Rules between the keys; `refuse(condition, problem, remedy)` raises if the condition holds."""
    model, train = recipe.model, recipe.train
    lora = recipe.method == "lora"
    refuse(
        model.quantize is not None and not lora,
        f"{model.quantize} weights cannot be trained themselves: what a step changes is smaller than what they round away",
        "set method: lora, which trains an adapter on them; or remove model.quantize and set train.weights: bfloat16",
    )
    refuse(
        model.text_encoder_placement != "device"
        and (model.train_text_encoder or recipe.method == "scratch" or bool(recipe.tokens)),
        f"model.text_encoder_placement: {model.text_encoder_placement} is for text encoders that only encode, and here they train",
        "set model.text_encoder_placement: device, or model.train_text_encoder: false",
    )
    refuse(
        model.vae_tiling and recipe.method == "scratch" and model.vae is None,
        "there is no VAE beside what trains",
        "remove model.vae_tiling; a smaller data.resolution or train.batch_size takes less memory",
    )
    refuse(
        train.offload_blocks and not lora,
        "blocks that train have to stay on the GPU",
        "set method: lora, or remove train.offload_blocks",
    )
    refuse(
        train.offload_blocks and train.checkpointed != 1,
        "without checkpointing, the backward pass holds every block's weights until it is through: offloading would save nothing",
        "set train.gradient_checkpointing: true (every block)",
    )
    refuse(
        train.offload_blocks and has_unet(model.family),
        "a UNet's blocks hold blocks, which the backward pass computes again one by one: none of them can be away as a whole",
        "remove train.offload_blocks; it is for transformers, such as FLUX or SD 3",
    )
    refuse(
        train.weights == "bfloat16" and recipe.method != "full",
        "bfloat16 weights are for full fine-tuning: an adapter's are few, and a new net's are small",
        "remove train.weights" + ("; model.quantize makes the frozen base smaller" if lora else ""),
    )
    refuse(
        train.weights == "bfloat16" and train.precision in ("float32", "float16"),
        f"bfloat16 weights compute in bfloat16, not in {train.precision}",
        "set train.precision: bfloat16, or train.weights: float32",
    )
    refuse(
        recipe.optimizer.paged and recipe.optimizer.name != "adamw8bit",
        f"paging is bitsandbytes' own, and {recipe.optimizer.name} is not its optimizer",
        "set optimizer.name: adamw8bit, or remove optimizer.paged",
    )
    one_by_one = (
        "train.fused_backward"
        if train.fused_backward
        else "train.weights: bfloat16"
        if train.weights == "bfloat16"
        else ""
    )
    refuse(
        bool(one_by_one) and recipe.optimizer.name not in ONE_BY_ONE,
        f"{one_by_one} steps tensor by tensor, and {recipe.optimizer.name} looks at all of them together, or changes them between steps",
        f"set optimizer.name to one of {', '.join(ONE_BY_ONE)}",
    )
    _check_fused(recipe, refuse)


def _check_fused(recipe: Recipe, refuse: Callable[[bool, str, str], None]) -> None:
    """Where a step inside the backward pass cannot apply."""
    train, optimizer = recipe.train, recipe.optimizer
    fused = train.fused_backward
    refuse(
        fused and recipe.method == "lora",
        "an adapter's gradients are small: stepping inside the backward pass would free next to nothing",
        "remove train.fused_backward; model.quantize and train.gradient_checkpointing make a LoRA fit",
    )
    refuse(
        fused and optimizer.clip_norm is not None and optimizer.clip == "global",
        "clipping by the norm of all gradients needs all of them, and fused_backward lets each go before the next is there",
        "set optimizer.clip: tensor (each tensor's norm is bounded alone), or optimizer.clip_norm: null",
    )
    refuse(
        fused and train.accumulation > 1,
        "accumulated gradients stay until the last batch is through, so that fused_backward would free none",
        "set train.accumulation: 1 (and a larger train.batch_size if it fits), or remove train.fused_backward",
    )
    refuse(
        fused and train.precision == "float16",
        "float16's gradient scaler looks at all gradients before any weight steps",
        "set train.precision: bfloat16, or remove train.fused_backward",
    )


def check_machine(recipe: Recipe, machine: Machine, precision: Precision) -> None:
    """What only the machine decides.

    Raises:
        UserError: with the key.
    """
    if recipe.train.fused_backward and machine.processes > 1:
        raise UserError(
            "several processes add up each gradient before any of them steps: fused_backward would step on its own share",
            where="train.fused_backward",
            remedy="train with one process, or remove it",
        )
    if recipe.train.fused_backward and precision == "float16":
        raise UserError(
            f"{machine.name} trains in float16, whose gradient scaler looks at all gradients before any weight steps",
            where="train.fused_backward",
            remedy="remove it, or set train.precision: float32",
        )
    if recipe.train.weights == "bfloat16" and precision != "bfloat16":
        raise UserError(
            f"bfloat16 weights compute in bfloat16, and {machine.name} trains in {precision}",
            where="train.weights",
            remedy="set train.weights: float32",
        )


def notes(recipe: Recipe, machine: Machine) -> tuple[str, ...]:
    """What a line asks for and this machine does otherwise."""
    found = []
    if machine.device != "cuda":
        if recipe.optimizer.paged:
            found.append("optimizer.paged: only CUDA pages; here the 8-bit state stays where it is")
        if recipe.train.offload_blocks:
            found.append("train.offload_blocks: a CPU has one memory; nothing is saved here")
        if recipe.model.text_encoder_placement == "offload":
            found.append("model.text_encoder_placement: offload: a CPU has one memory; nothing is saved here")
    return tuple(found)


def rows(recipe: Recipe) -> list[tuple[str, str]]:
    """For the plan's table: what is done to fit, in words; no row where nothing is."""
    model, train = recipe.model, recipe.train
    said = []
    if model.quantize:
        said.append(f"the frozen base in {model.quantize} (samples are drawn on the whole one)")
    if model.text_encoder_placement != "device":
        said.append(
            "text encoders encode "
            + (
                "layer by layer from host memory"
                if model.text_encoder_placement == "offload"
                else f"in {model.text_encoder_placement}"
            )
        )
    if model.vae_tiling:
        said.append("the VAE in tiles")
    if train.weights == "bfloat16":
        said.append("weights in bfloat16, rounded at random")
    if train.checkpointed:
        which = "every block" if train.checkpointed == 1 else f"one block in {train.checkpointed}"
        said.append(f"{which} recomputed in the backward pass")
    if train.offload_blocks:
        said.append("blocks wait in host memory")
    if train.fused_backward:
        said.append("each weight steps inside the backward pass")
    if recipe.optimizer.paged:
        said.append("optimizer state paged")
    return [("fits by", ", ".join(said))] if said else []
