"""What makes a run fit a smaller card: which of these lines of a recipe go together, and where they cannot apply. Torch-free.

`check` knows the recipe alone, `notes` also what it will run on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.planning import Machine
    from finetune.recipe import Recipe


def check(recipe: Recipe, refuse: Callable[[bool, str, str], None]) -> None:
    """Rules between the keys; `refuse(condition, problem, remedy)` raises if the condition holds."""
    model, train = recipe.model, recipe.train
    lora = recipe.method == "lora"
    refuse(
        model.quantize is not None and not lora,
        f"{model.quantize} weights cannot be trained themselves: what a step changes is smaller than what they round away",
        "set method: lora, which trains an adapter on them; or remove model.quantize",
    )
    refuse(
        model.encoders != "whole" and (model.train_text_encoder or recipe.method == "scratch"),
        f"model.encoders: {model.encoders} is for text encoders that only encode, and here they train",
        "set model.encoders: whole, or model.train_text_encoder: false",
    )
    refuse(
        model.vae_tiling and recipe.method == "scratch" and model.vae is None,
        "there is no VAE beside what trains",
        "remove model.vae_tiling; a smaller data.resolution or train.batch_size takes less memory",
    )
    refuse(train.offload_blocks and not lora, "blocks that train have to stay on the GPU", "set method: lora, or remove train.offload_blocks")
    refuse(
        train.offload_blocks and train.checkpointed != 1,
        "without checkpointing, the backward pass holds every block's weights until it is through: offloading would save nothing",
        "set train.gradient_checkpointing: true (every block)",
    )


def notes(recipe: Recipe, machine: Machine) -> tuple[str, ...]:
    """What a line asks for and this machine does otherwise."""
    found = []
    if machine.device != "cuda":
        if recipe.train.offload_blocks:
            found.append("train.offload_blocks: a CPU has one memory; nothing is saved here")
        if recipe.model.encoders == "offload":
            found.append("model.encoders: offload: a CPU has one memory; nothing is saved here")
    return tuple(found)


def rows(recipe: Recipe) -> list[tuple[str, str]]:
    """For the plan's table: what is done to fit, in words; no row where nothing is."""
    model, train = recipe.model, recipe.train
    said = []
    if model.quantize:
        said.append(f"the frozen base in {model.quantize} (samples are drawn on the whole one)")
    if model.encoders != "whole":
        said.append("text encoders encode " + ("layer by layer from host memory" if model.encoders == "offload" else f"in {model.encoders}"))
    if model.vae_tiling:
        said.append("the VAE in tiles")
    if train.checkpointed:
        which = "every block" if train.checkpointed == 1 else f"one block in {train.checkpointed}"
        said.append(f"{which} recomputed in the backward pass")
    if train.offload_blocks:
        said.append("blocks wait in host memory")
    return [("fits by", ", ".join(said))] if said else []
