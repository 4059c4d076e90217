"""Rules about which sections and keys go together: method, length, data, model, sampling."""

from __future__ import annotations

from pathlib import Path

from finetune.config.rules import Context, Rule
from finetune.models.registry import has_unet

OBJECTIVES = {"noise": "predicts noise", "flow": "predicts a velocity"}


def _predicts(context: Context) -> str:
    return OBJECTIVES.get(context.spec.objective, "is not a denoising model")


def _repeated(context: Context) -> str:
    tokens = [new.token for new in context.recipe.tokens]
    return next((token for token in tokens if tokens.count(token) > 1), "")


def _with_blanks(context: Context) -> str:
    return next((new.token for new in context.recipe.tokens if len(new.token.split()) != 1), "")


RULES: tuple[Rule, ...] = (
    Rule(
        "name-is-one-word",
        "name",
        lambda c: Path(c.recipe.name).name != c.recipe.name,
        "name must not contain slashes: the run's folder is named after it",
        "remove name, or the slashes in it",
    ),
    Rule(
        "one-length",
        "train.steps",
        lambda c: c.train.steps is not None and c.train.epochs is not None,
        "the run's length must be given by train.steps or train.epochs, and by one of them only",
        "give exactly one of the two",
    ),
    Rule(
        "scratch-needs-length",
        "train.steps",
        lambda c: c.method == "scratch" and c.train.steps is None and c.train.epochs is None,
        "training from scratch needs train.steps or train.epochs",
        "add `steps: 10000` under `train`",
    ),
    Rule(
        "one-warmup",
        "optimizer.warmup_steps",
        lambda c: c.optimizer.warmup > 0 and c.optimizer.warmup_steps > 0,
        "the warm-up is given by optimizer.warmup (a share of the run) and by optimizer.warmup_steps",
        "remove one of the two",
    ),
    Rule(
        "one-place-of-images",
        "data.path",
        lambda c: bool(c.data.path) == bool(c.data.sources),
        "the images must be given by data.path or data.sources, and by one of them only",
        "give exactly one of the two",
    ),
    Rule(
        "lora-needs-adapter",
        "method",
        lambda c: c.method == "lora" and c.adapter is None,
        "method: lora needs an `adapter` section",
        "add `adapter: {{rank: 16}}`",
    ),
    Rule(
        "adapter-needs-lora",
        "adapter",
        lambda c: c.method != "lora" and c.adapter is not None,
        "method: {method} trains the weights themselves and has no adapter",
        "remove the `adapter` section, or set method: lora",
    ),
    Rule(
        "scratch-needs-network",
        "model",
        lambda c: c.method == "scratch" and not c.model.build and c.net is None,
        "training from scratch needs model.build, the network's arguments",
        "see `ft recipes show scratch/emoji-vae`",
    ),
    Rule(
        "net-or-build",
        "model.build",
        lambda c: c.net is not None and bool(c.model.build),
        "family {model.family} is configured by its `net` section, not by model.build",
        "remove model.build",
    ),
    Rule(
        "build-is-for-scratch",
        "model.build",
        lambda c: c.method != "scratch" and bool(c.model.build),
        "model.build is for method: scratch only",
        "remove model.build",
    ),
    Rule(
        "pretrained-needs-path",
        "model",
        lambda c: c.method != "scratch" and c.model.path is None,
        "model.path is missing: the pretrained model to start from",
        "add model.path",
    ),
    Rule(
        "scratch-has-no-path",
        "model.path",
        lambda c: c.method == "scratch" and c.model.path is not None,
        "method: scratch starts from random weights and takes no model.path",
        "remove model.path",
    ),
    Rule(
        "scratch-only-family",
        "model.family",
        lambda c: c.model.path is not None and not c.spec.pipeline,
        "family {model.family} can only be trained from scratch",
        "set method: scratch, or another family",
    ),
    Rule(
        "transformer-of-a-pipeline",
        "model.transformer",
        lambda c: c.model.transformer is not None and (c.model.path is None or has_unet(c.model.family)),
        "model.transformer replaces the transformer of a pretrained pipeline; {model.family} has none",
        "remove model.transformer; a Stable Diffusion 1.5, 2.1 or XL checkpoint is one file in model.path",
    ),
    Rule(
        "diffusion-section-needs-noise-schedule",
        "diffusion",
        lambda c: c.diffusion is not None and c.spec.objective != "noise",
        lambda c: (
            f"family {c.model.family} {_predicts(c)}: the `diffusion` section is for families with a noise schedule"
        ),
        lambda c: "remove the section" + (", or see `flow`" if c.spec.objective == "flow" else ""),
    ),
    Rule(
        "flow-section-needs-velocity",
        "flow",
        lambda c: c.flow is not None and c.spec.objective != "flow",
        lambda c: f"family {c.model.family} {_predicts(c)}: the `flow` section is for families that predict a velocity",
        lambda c: "remove the section" + (", or see `diffusion`" if c.spec.objective == "noise" else ""),
    ),
    Rule(
        "net-says-prediction",
        "model.prediction",
        lambda c: c.net is not None and c.model.prediction is not None,
        "model.prediction is for pretrained models; what family {model.family} predicts is set in its `net` section",
        "remove model.prediction",
    ),
    Rule(
        "prediction-needs-noise-schedule",
        "model.prediction",
        lambda c: c.model.prediction is not None and c.spec.objective != "noise",
        lambda c: f"family {c.model.family} {_predicts(c)}: its prediction cannot be chosen",
        "remove model.prediction",
    ),
    Rule(
        "zero-terminal-snr-needs-v",
        "diffusion.zero_terminal_snr",
        lambda c: c.diffusion is not None and c.diffusion.zero_terminal_snr and c.model.prediction == "epsilon",
        "diffusion.zero_terminal_snr needs v_prediction: at pure noise, the noise itself is not a useful target",
        "set model.prediction: v_prediction, or remove diffusion.zero_terminal_snr",
    ),
    Rule(
        "tokens-need-lora",
        "tokens",
        lambda c: bool(c.recipe.tokens) and c.method != "lora",
        "tokens are learned together with a LoRA",
        "set method: lora, or remove `tokens`",
    ),
    Rule(
        "token-without-blanks",
        "tokens",
        lambda c: any(len(new.token.split()) != 1 for new in c.recipe.tokens),
        lambda c: f'the token "{_with_blanks(c)}" must be one word',
        "give one without blanks, such as <my-dog>",
    ),
    Rule(
        "tokens-are-distinct",
        "tokens",
        lambda c: bool(_repeated(c)),
        lambda c: f'the token "{_repeated(c)}" is given twice',
        "keep one of them",
    ),
    Rule(
        "prior-needs-base",
        "prior",
        lambda c: c.method == "scratch" and c.recipe.prior is not None,
        "`prior` needs a pretrained base model to generate the class images",
        "remove `prior`",
    ),
    Rule(
        "pixel-keys-of-data",
        "data",
        lambda c: (
            c.net is None and (c.data.classes is not None or c.data.grayscale or c.data.levels != type(c.data).levels)
        ),
        "data.classes, data.grayscale and data.levels are for models from scratch with a `net` section; "
        "{model.family} has none",
        "remove them",
    ),
    Rule(
        "truncation-needs-gan",
        "sample.truncation",
        lambda c: c.sample.truncation != 1 and (c.net is None or c.spec.kind != "GAN"),
        "sample.truncation is for GANs, and {model.family} is not one",
        "remove sample.truncation",
    ),
    Rule(
        "collapse-check-needs-net",
        "sample.collapse_check_every",
        lambda c: c.net is None and c.sample.collapse_check_every is not None,
        "sample.collapse_check_every is for models from scratch with a `net` section; {model.family} has none",
        "remove sample.collapse_check_every; `ft eval` measures a finished run",
    ),
)
