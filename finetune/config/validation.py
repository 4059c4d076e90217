"""Rules between a recipe's keys: what each section allows by itself is declared in `recipe`. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapters import kinds
from finetune.config import memory_options, samplers
from finetune.errors import UserError
from finetune.models.registry import has_unet, spec_of

if TYPE_CHECKING:
    from finetune.config.schema import Precision, Recipe

Refuse = Callable[[bool, str, str], None]  # (condition, problem, remedy): raises if the condition holds


def check(recipe: Recipe, where: str) -> None:
    """Raise if keys contradict one another.

    Args:
        where: what an error calls the recipe.
    """

    def refuse(condition: bool, problem: str, remedy: str) -> None:
        if condition:
            raise UserError(problem, where=where, remedy=remedy)

    refuse(
        Path(recipe.name).name != recipe.name,
        "`name` is one word: the run's folder is called by it",
        "remove `name`, or the slashes in it",
    )
    train, data, model = recipe.train, recipe.data, recipe.model
    refuse(
        (train.steps is None) == (train.epochs is None),
        "a run's length is train.steps or train.epochs: one of them",
        "give exactly one",
    )
    refuse(
        bool(data.path) == bool(data.sources),
        "the images are at data.path or in data.sources: one of them",
        "give exactly one",
    )
    refuse(
        recipe.method == "lora" and recipe.adapter is None,
        "a LoRA needs an `adapter` section",
        "add `adapter: {rank: 16}`",
    )
    refuse(
        recipe.method != "lora" and recipe.adapter is not None,
        f"method {recipe.method} trains the weights themselves: it has no adapter",
        "remove the `adapter` section, or set `method: lora`",
    )
    if recipe.adapter is not None:
        for broken, problem, remedy in kinds.rules(recipe.adapter, model):
            refuse(broken, problem, remedy)
    refuse(
        recipe.method == "scratch" and not model.build and recipe.net is None,
        "from scratch needs model.build, the nets",
        "see `ft recipes show scratch/emoji-vae`",
    )
    refuse(
        recipe.net is not None and bool(model.build),
        f"family {model.family} is described by its `net` section",
        "remove model.build",
    )
    _pixels(recipe, refuse)
    refuse(
        recipe.method != "scratch" and bool(model.build),
        "model.build is for method: scratch only",
        "remove model.build",
    )
    refuse(
        recipe.method != "scratch" and model.path is None,
        "model.path is missing: the pretrained model to start from",
        "add model.path",
    )
    refuse(
        recipe.method == "scratch" and model.path is not None, "from scratch starts from no model", "remove model.path"
    )
    refuse(
        model.transformer is not None and (model.path is None or has_unet(model.family)),
        "model.transformer takes the place of the transformer of a pretrained pipeline",
        "remove it; a Stable Diffusion 1.5, 2.1 or XL is one file in model.path",
    )
    _optimizer(recipe, refuse)
    memory_options.check(recipe, refuse)
    refuse(
        bool(recipe.tokens) and recipe.method != "lora",
        "new words are learned together with a LoRA",
        "set method: lora, or remove `tokens`",
    )
    for new in recipe.tokens:
        refuse(
            len(new.token.split()) != 1, f'"{new.token}" is not one word', "give one without blanks, such as <my-dog>"
        )
    refuse(
        len({new.token for new in recipe.tokens}) < len(recipe.tokens),
        "a word of `tokens` is given twice",
        "keep one of them",
    )
    refuse(
        recipe.method == "scratch" and recipe.prior is not None,
        "from scratch there is no base to draw class images",
        "remove `prior`",
    )
    samplers.check(recipe.net, model.family, recipe.sample.sampler, recipe.sample.eta, f"{where}, sample")
    _predicted(recipe, refuse)


def check_sharded(recipe: Recipe, precision: Precision) -> None:
    """What cannot be where each process has a part of every weight, gradient and optimizer state.

    Raises:
        UserError: with the key.
    """
    train, optimizer = recipe.train, recipe.optimizer
    rules = (
        (
            recipe.method == "scratch",
            "method",
            "a net from scratch is small, and may read its weights between layers",
            "train it on one GPU",
        ),
        (
            recipe.model.quantize is not None,
            "model.quantize",
            "weights are packed, and a part of them means nothing",
            "remove it",
        ),
        (train.offload_blocks, "train.offload_blocks", "blocks would come from host memory whole", "remove it"),
        (
            train.fused_backward,
            "train.fused_backward",
            "a gradient is there once all processes have summed its block's",
            "remove it",
        ),
        (
            train.weights == "bfloat16",
            "train.weights",
            "they are rounded by numbers drawn for whole tensors",
            "set train.weights: float32",
        ),
        (
            optimizer.name != "adamw",
            "optimizer.name",
            f"{optimizer.name} judges or packs whole tensors",
            "set optimizer.name: adamw",
        ),
        (
            precision == "float16",
            "train.precision",
            "float16's scaler looks at whole gradients",
            "set train.precision: bfloat16",
        ),
    )
    for condition, where, problem, remedy in rules:
        if condition:
            remedy += ", or share nothing out: --accelerate many-gpus"
            raise UserError(f"{where} cannot be with weights shared out by FSDP: {problem}", where=where, remedy=remedy)


def _pixels(recipe: Recipe, refuse: Refuse) -> None:
    """What only families with a `net` section know: those that draw pixels."""
    data, model = recipe.data, recipe.model
    refuse(
        recipe.net is None and (data.classes is not None or data.grayscale or data.levels != type(data).levels),
        f"data.classes, data.grayscale and data.levels are for families that draw pixels, and {model.family} does not",
        "remove them",
    )
    refuse(
        recipe.sample.truncation != 1 and (recipe.net is None or spec_of(model.family).kind != "GAN"),
        f"sample.truncation is for GANs, and {model.family} is none",
        "remove sample.truncation",
    )
    refuse(
        recipe.net is None and recipe.sample.collapse_check_every is not None,
        f"lost modes are watched in families that draw pixels, and {model.family} does not",
        "remove sample.collapse_check_every; `ft eval` measures a finished run",
    )


def _predicted(recipe: Recipe, refuse: Refuse) -> None:
    """What the net starts from, and what it predicts."""
    model = recipe.model
    refuse(
        model.base_run is not None and not getattr(recipe.net, "refines", False),
        f"family {model.family} draws its images from nothing: model.base_run is for families that make small ones large",
        "remove model.base_run",
    )
    refuse(
        recipe.net is not None and model.prediction is not None,
        f"what the net of family {model.family} predicts is said in its `net` section, if at all",
        "remove model.prediction",
    )
    diffusion = recipe.diffusion
    if diffusion is not None and diffusion.zero_terminal_snr:
        refuse(
            model.prediction == "epsilon",
            "zero_terminal_snr needs v_prediction: at pure noise, predicting the noise teaches nothing",
            "set model.prediction: v_prediction, or remove diffusion.zero_terminal_snr",
        )


def _optimizer(recipe: Recipe, refuse: Refuse) -> None:
    optimizer = recipe.optimizer
    betas, averages = optimizer.moments, optimizer.name == "schedulefree"
    refuse(len(betas) != 2, "optimizer.betas are two numbers", "write `betas: [0.9, 0.999]`")
    refuse(any(not 0 <= beta < 1 for beta in betas), "optimizer.betas lie in [0, 1)", "write `betas: [0.9, 0.999]`")
    refuse(
        averages and betas[0] == 0,
        "without a first beta, schedule-free AdamW has nothing to average",
        "write `betas: [0.9, 0.999]`",
    )
    refuse(
        averages and recipe.train.ema is not None,
        "schedule-free AdamW averages the weights itself: a second average of them says nothing",
        "remove train.ema",
    )
