"""Memory options of a recipe: constants they share, and how the plan's table describes them. Torch-free.

Which of them go together is in `finetune.config.rules.training`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.config.schema import Recipe

TILE = 512  # pixels: side of a VAE's tile; neighbors overlap by a quarter
# Bytes per weight: NF4's include the scale of each block of 64; int8's scales, one per row, weigh nothing.
QUANTIZED: dict[str, float] = {"nf4": 0.5 + 4 / 64, "int8": 1.0}
PER_TENSOR = ("adamw", "adamw8bit", "adafactor", "lion", "came")  # optimizers that update each tensor on its own


def rows(recipe: Recipe) -> list[tuple[str, str]]:
    """Rows of the plan's table: the memory options that are on; none if none is."""
    model, train = recipe.model, recipe.train
    options = []
    if model.quantize:
        options.append(f"frozen base in {model.quantize} (samples use the whole one)")
    if model.text_encoder_placement == "offload":
        options.append("text encoders offloaded to host memory")
    elif model.text_encoder_placement != "device":
        options.append(f"text encoders in {model.text_encoder_placement}")
    if model.vae_tiling:
        options.append("VAE tiling")
    if train.weights == "bfloat16":
        options.append("bfloat16 weights with stochastic rounding")
    if train.checkpointed:
        which = "every block" if train.checkpointed == 1 else f"every {train.checkpointed} blocks"
        options.append(f"gradient checkpointing of {which}")
    if train.offload_blocks:
        options.append("blocks offloaded to host memory")
    if train.fused_backward:
        options.append("optimizer step fused into the backward pass")
    if recipe.optimizer.paged:
        options.append("paged optimizer state")
    return [("memory", ", ".join(options))] if options else []
