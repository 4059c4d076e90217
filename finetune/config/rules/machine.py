"""Rules about the machine that trains, and notes about what it does otherwise than the recipe asks."""

from __future__ import annotations

from collections.abc import Callable

from finetune.config.fields import MAX_COUNT
from finetune.config.rules import Context, Rule
from finetune.config.training_length import MOST_WARMUP


def _paths(context: Context) -> list[str]:
    data = context.data
    return [source.path for source in data.sources] or ([data.path] if data.path else [])


def _sharded(name: str, key: str, broken: Callable[[Context], bool], reason: str, fix: str) -> Rule:
    """A rule for FSDP, where every process holds a part of each weight, gradient and optimizer state."""
    return Rule(
        f"fsdp-{name}",
        key,
        lambda c: c.machine.sharded and broken(c),
        f"{key} is incompatible with FSDP: {reason}",
        f"{fix}, or use DDP (--accelerate many-gpus)",
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "steps-in-range",
        "train.epochs",
        lambda c: c.steps > MAX_COUNT,
        f"the run would take {{steps:,}} steps; at most {MAX_COUNT:,} are allowed",
        "lower train.epochs",
    ),
    Rule(
        "fused-backward-needs-one-process",
        "train.fused_backward",
        lambda c: c.train.fused_backward and c.machine.processes > 1,
        "train.fused_backward needs a single process: with several, a gradient is summed over all before any update",
        "train with one process, or remove train.fused_backward",
    ),
    Rule(
        "fused-backward-on-float16-gpu",
        "train.fused_backward",
        lambda c: c.train.fused_backward and c.precision == "float16",
        "{machine.name} trains in float16, whose loss scaler needs all gradients before any update",
        "remove train.fused_backward, or set train.precision: float32",
    ),
    Rule(
        "bfloat16-weights-on-this-machine",
        "train.weights",
        lambda c: c.train.weights == "bfloat16" and c.precision != "bfloat16",
        "train.weights: bfloat16 computes in bfloat16, and {machine.name} trains in {precision}",
        "set train.weights: float32",
    ),
    _sharded(
        "scratch",
        "method",
        lambda c: c.method == "scratch",
        "small networks from scratch may read their weights between layers",
        "train on one GPU",
    ),
    _sharded(
        "quantize",
        "model.quantize",
        lambda c: c.model.quantize is not None,
        "packed weights cannot be split",
        "remove model.quantize",
    ),
    _sharded(
        "offload",
        "train.offload_blocks",
        lambda c: c.train.offload_blocks,
        "blocks come from host memory whole",
        "remove train.offload_blocks",
    ),
    _sharded(
        "fused-backward",
        "train.fused_backward",
        lambda c: c.train.fused_backward,
        "a gradient is complete only when all processes have summed its block's",
        "remove train.fused_backward",
    ),
    _sharded(
        "bfloat16-weights",
        "train.weights",
        lambda c: c.train.weights == "bfloat16",
        "stochastic rounding draws its numbers for whole tensors",
        "set train.weights: float32",
    ),
    _sharded(
        "optimizer",
        "optimizer.name",
        lambda c: c.optimizer.name != "adamw",
        "{optimizer.name} needs whole tensors",
        "set optimizer.name: adamw",
    ),
    _sharded(
        "float16",
        "train.precision",
        lambda c: c.precision == "float16",
        "float16's loss scaler needs whole gradients",
        "set train.precision: bfloat16",
    ),
)

NOTES: tuple[Rule, ...] = (
    Rule(
        "paging-without-cuda",
        "optimizer.paged",
        lambda c: c.machine.device != "cuda" and c.optimizer.paged,
        "optimizer.paged has no effect here: only CUDA can page optimizer state",
    ),
    Rule(
        "offload-without-cuda",
        "train.offload_blocks",
        lambda c: c.machine.device != "cuda" and c.train.offload_blocks,
        "train.offload_blocks has no effect here: without CUDA there is only one memory",
    ),
    Rule(
        "text-encoder-offload-without-cuda",
        "model.text_encoder_placement",
        lambda c: c.machine.device != "cuda" and c.model.text_encoder_placement == "offload",
        "model.text_encoder_placement: offload has no effect here: without CUDA there is only one memory",
    ),
    Rule(
        "warmup-is-longer-than-the-run",
        "optimizer.warmup_steps",
        lambda c: c.optimizer.warmup_steps >= c.steps,
        "the warm-up takes {optimizer.warmup_steps} of {steps} steps: the full learning rate is never reached",
    ),
    Rule(
        "warmup-is-long",
        "optimizer.warmup_steps",
        lambda c: MOST_WARMUP < c.warmup_share < 1,
        "the warm-up is {warmup_share:.0%} of the run ({optimizer.warmup_steps} of {steps} steps); at most 10% is "
        "usual: set optimizer.warmup: 0.05 instead of optimizer.warmup_steps",
    ),
    Rule(
        "no-sample-before-the-end",
        "sample.every",
        lambda c: bool(c.sample.prompts) and (c.sample.every or 0) >= c.steps > 1,
        "no sample before the end of training (sample.every: {sample.every}, {steps} steps): remove sample.every, and "
        "samples come every eighth of the run",
    ),
    Rule(
        "emoji-base-with-other-images",
        "model.path",
        lambda c: c.model.path == "embedded:base" and any(not path.startswith("embedded:") for path in _paths(c)),
        "the bundled base is trained on emoji at 64×64; it cannot learn photographs (`ft recipes` lists other bases)",
    ),
    Rule(
        "prodigy-lr",
        "optimizer.lr",
        lambda c: c.optimizer.name == "prodigy" and c.optimizer.lr != 1,
        "Prodigy finds the learning rate itself and multiplies it by optimizer.lr, which is {optimizer.lr:g}; 1 is "
        "usual",
    ),
    Rule(
        "schedule-free-schedule",
        "optimizer.schedule",
        lambda c: c.optimizer.name == "schedulefree" and c.optimizer.schedule != "constant",
        "schedule-free AdamW averages the weights instead of lowering the learning rate; with schedule: "
        "{optimizer.schedule} the late steps count even less",
    ),
    Rule(
        "min-snr-with-zero-terminal-snr",
        "diffusion.min_snr_gamma",
        lambda c: c.diffusion is not None and c.diffusion.zero_terminal_snr and c.diffusion.min_snr_gamma is not None,
        "min-SNR gives no weight to pure noise, which zero_terminal_snr adds; remove min_snr_gamma to train on it",
    ),
)
