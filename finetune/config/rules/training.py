"""Rules about the optimizer and the memory options."""

from __future__ import annotations

from finetune.config.memory_options import PER_TENSOR
from finetune.config.rules import Context, Rule
from finetune.models.registry import has_unet


def _per_tensor_option(context: Context) -> str:
    """The option that updates tensor by tensor; "" if none is on."""
    if context.train.fused_backward:
        return "train.fused_backward"
    return "train.weights: bfloat16" if context.train.weights == "bfloat16" else ""


RULES: tuple[Rule, ...] = (
    Rule(
        "two-betas",
        "optimizer.betas",
        lambda c: len(c.optimizer.moments) != 2,
        "optimizer.betas must be two numbers",
        "write `betas: [0.9, 0.999]`",
    ),
    Rule(
        "schedule-free-needs-beta",
        "optimizer.betas",
        lambda c: c.optimizer.name == "schedulefree" and c.optimizer.moments[0] == 0,
        "schedule-free AdamW needs a first beta above 0: it averages with it",
        "write `betas: [0.9, 0.999]`",
    ),
    Rule(
        "schedule-free-without-ema",
        "train.ema",
        lambda c: c.optimizer.name == "schedulefree" and c.train.ema is not None,
        "schedule-free AdamW averages the weights itself; train.ema would average them again",
        "remove train.ema",
    ),
    Rule(
        "paged-needs-bitsandbytes",
        "optimizer.paged",
        lambda c: c.optimizer.paged and c.optimizer.name != "adamw8bit",
        "optimizer.paged is a feature of bitsandbytes' adamw8bit; {optimizer.name} does not have it",
        "set optimizer.name: adamw8bit, or remove optimizer.paged",
    ),
    Rule(
        "quantize-needs-lora",
        "model.quantize",
        lambda c: c.model.quantize is not None and c.method != "lora",
        "{model.quantize} weights cannot be trained: one update is smaller than their rounding error",
        "set method: lora, which trains an adapter on them; or remove model.quantize and set train.weights: bfloat16",
    ),
    Rule(
        "text-encoders-that-train-stay",
        "model.text_encoder_placement",
        lambda c: (
            c.model.text_encoder_placement != "device"
            and (c.model.train_text_encoder or c.method == "scratch" or bool(c.recipe.tokens))
        ),
        "model.text_encoder_placement: {model.text_encoder_placement} is for frozen text encoders; here they train",
        "set model.text_encoder_placement: device, or model.train_text_encoder: false",
    ),
    Rule(
        "vae-tiling-needs-frozen-vae",
        "model.vae_tiling",
        lambda c: c.model.vae_tiling and c.method == "scratch" and c.model.vae is None,
        "model.vae_tiling needs a frozen VAE; this model has none",
        "remove model.vae_tiling; a smaller data.resolution or train.batch_size takes less memory",
    ),
    Rule(
        "offload-needs-lora",
        "train.offload_blocks",
        lambda c: c.train.offload_blocks and c.method != "lora",
        "train.offload_blocks needs frozen blocks; weights that train stay on the GPU",
        "set method: lora, or remove train.offload_blocks",
    ),
    Rule(
        "offload-needs-checkpointing",
        "train.offload_blocks",
        lambda c: c.train.offload_blocks and c.train.checkpointed != 1,
        "train.offload_blocks saves nothing without gradient checkpointing: the backward pass would keep every block",
        "set train.gradient_checkpointing: true (every block)",
    ),
    Rule(
        "offload-needs-transformer",
        "train.offload_blocks",
        lambda c: c.train.offload_blocks and has_unet(c.model.family),
        "train.offload_blocks is for transformers such as FLUX or SD 3; a UNet's blocks are nested",
        "remove train.offload_blocks",
    ),
    Rule(
        "bfloat16-weights-need-full",
        "train.weights",
        lambda c: c.train.weights == "bfloat16" and c.method != "full",
        "train.weights: bfloat16 is for full fine-tuning; with method: {method} the trained weights are small",
        lambda c: (
            "remove train.weights" + ("; model.quantize makes the frozen base smaller" if c.method == "lora" else "")
        ),
    ),
    Rule(
        "bfloat16-weights-compute-in-bfloat16",
        "train.weights",
        lambda c: c.train.weights == "bfloat16" and c.train.precision in ("float32", "float16"),
        "train.weights: bfloat16 computes in bfloat16, not in {train.precision}",
        "set train.precision: bfloat16, or train.weights: float32",
    ),
    Rule(
        "per-tensor-optimizer",
        "optimizer.name",
        lambda c: bool(_per_tensor_option(c)) and c.optimizer.name not in PER_TENSOR,
        lambda c: (
            f"{_per_tensor_option(c)} updates one tensor at a time; {c.optimizer.name} needs all tensors together, or "
            "changes them between steps"
        ),
        f"set optimizer.name to one of {', '.join(PER_TENSOR)}",
    ),
    Rule(
        "fused-backward-needs-full",
        "train.fused_backward",
        lambda c: c.train.fused_backward and c.method == "lora",
        "train.fused_backward saves next to nothing with a LoRA, whose gradients are small",
        "remove train.fused_backward; model.quantize and train.gradient_checkpointing make a LoRA fit",
    ),
    Rule(
        "fused-backward-clips-per-tensor",
        "train.fused_backward",
        lambda c: c.train.fused_backward and c.optimizer.clip_norm is not None and c.optimizer.clip == "global",
        "train.fused_backward frees each gradient at once; clipping by the global norm needs all of them",
        "set optimizer.clip: tensor (each tensor's norm is bounded alone), or optimizer.clip_norm: null",
    ),
    Rule(
        "fused-backward-without-accumulation",
        "train.fused_backward",
        lambda c: c.train.fused_backward and c.train.accumulation > 1,
        "train.fused_backward saves nothing with train.accumulation, which keeps all gradients until the last batch",
        "set train.accumulation: 1 (and a larger train.batch_size if it fits), or remove train.fused_backward",
    ),
    Rule(
        "fused-backward-without-float16",
        "train.fused_backward",
        lambda c: c.train.fused_backward and c.train.precision == "float16",
        "train.fused_backward is incompatible with float16, whose loss scaler needs all gradients before any update",
        "set train.precision: bfloat16, or remove train.fused_backward",
    ),
)
