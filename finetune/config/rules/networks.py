"""Rules about the `net` sections of models from scratch, and about the stages before them."""

from __future__ import annotations

from typing import Any

from finetune.config.rules import Context, Rule


def _has(context: Context, *keys: str) -> bool:
    """Whether the family's section has these keys."""
    return context.net is not None and all(hasattr(context.net, key) for key in keys)


def _second_stage_over_codes(context: Context) -> bool:
    return context.spec.slug in ("vq-pixelcnn", "vq-transformer")


def _halvings(context: Context) -> int:
    """How many times the network halves the sides of the images; 0 if it does not, or not of the images themselves."""
    if _has(context, "halvings"):
        halvings: int = context.net.halvings
        return halvings
    if _has(context, "channel_multipliers") and context.model.vae is None:
        multipliers: tuple[int, ...] = context.net.channel_multipliers
        return len(multipliers) - 1
    return 0


def _nearest_batch(net: Any, batch: int) -> int:
    """The multiple of the group that is nearest to the batch size."""
    group: int = net.stddev_group
    return max(1, round(batch / group)) * group


RULES: tuple[Rule, ...] = (
    Rule(
        "base-run-needs-cascade",
        "model.base_run",
        lambda c: c.model.base_run is not None and not getattr(c.net, "refines", False),
        "model.base_run is for cascades; family {model.family} generates images from noise alone",
        "remove model.base_run",
    ),
    Rule(
        "cascade-needs-base-run",
        "model.base_run",
        lambda c: getattr(c.net, "refines", False) and c.model.base_run is None,
        "the second stage of a cascade needs a first stage",
        "train scratch/cascade-low first and set model.base_run to its folder",
    ),
    Rule(
        "codes-need-first-stage",
        "model.vae",
        lambda c: c.net is not None and _second_stage_over_codes(c) and c.model.vae is None,
        "family {model.family} needs a first stage: a trained VQ-VAE or VQ-GAN",
        "train scratch/vqvae or scratch/vqgan first and set model.vae to its folder",
    ),
    Rule(
        "unet-width",
        "net.width",
        lambda c: _has(c, "channel_multipliers") and c.net.width % 4 != 0,
        "net.width must be a multiple of 4, the group size of its normalization, not {net.width}",
        lambda c: f"set net.width: {max(8, round(c.net.width / 4) * 4)}",
    ),
    Rule(
        "unet-multipliers",
        "net.channel_multipliers",
        lambda c: _has(c, "channel_multipliers") and not c.net.channel_multipliers,
        "net.channel_multipliers needs at least one number",
        "set it to, for example, [1, 2, 2]",
    ),
    Rule(
        "halvings-divide-resolution",
        "data.resolution",
        # With buckets, the sides depend on the images: the model checks them when it is built.
        lambda c: not c.data.buckets and c.data.resolution % 2 ** _halvings(c) != 0,
        lambda c: f"{c.data.resolution}×{c.data.resolution} pixels cannot be halved {_halvings(c)} times",
        lambda c: (
            f"set data.resolution to a multiple of {2 ** _halvings(c)}, or "
            + ("set net.halvings lower" if _has(c, "halvings") else "use fewer net.channel_multipliers")
        ),
    ),
    Rule(
        "heads-divide-width",
        "net.heads",
        lambda c: _has(c, "heads", "width") and c.net.width % c.net.heads != 0,
        "net.heads must divide net.width; {net.heads} does not divide {net.width}",
        lambda c: f"set net.width: {max(1, round(c.net.width / c.net.heads)) * c.net.heads}, or another net.heads",
    ),
    Rule(
        "edm-sigmas",
        "net.sigma_min",
        lambda c: _has(c, "sigma_min", "sigma_max") and c.net.sigma_min >= c.net.sigma_max,
        "net.sigma_min must be less than net.sigma_max",
        "lower net.sigma_min or raise net.sigma_max",
    ),
    Rule(
        "flow-shift-of-net",
        "flow.shift",
        lambda c: c.net is not None and c.flow is not None and c.flow.shift is not None,
        "flow.shift applies to pretrained models only",
        "set net.shift, which applies to training and sampling",
    ),
    Rule(
        "flow-guidance-of-net",
        "flow.guidance",
        lambda c: c.net is not None and c.flow is not None and c.flow.guidance is not None,
        "flow.guidance applies to pretrained models only",
        "remove it: this network has no guidance input",
    ),
    Rule(
        "penalty-without-batch-norm",
        "net.discriminator_norm",
        lambda c: (
            _has(c, "discriminator_norm")
            and c.net.discriminator_norm == "batch"
            and bool(c.net.gradient_penalty or c.net.r1 or c.net.r2)
        ),
        "gradient penalties are incompatible with batch normalization in the discriminator",
        "set net.discriminator_norm: none",
    ),
    Rule(
        "stddev-group-divides-batch",
        "net.stddev_group",
        lambda c: (
            _has(c, "stddev_group") and c.net.minibatch == "stddev" and bool(c.train.batch_size % c.net.stddev_group)
        ),
        "net.stddev_group must divide train.batch_size; {net.stddev_group} does not divide {train.batch_size}",
        lambda c: (
            f"set train.batch_size: {_nearest_batch(c.net, c.train.batch_size)}, or net.stddev_group to a divisor of "
            f"{c.train.batch_size}"
        ),
    ),
    Rule(
        "discrimination-needs-batch",
        "net.minibatch",
        lambda c: _has(c, "minibatch") and c.net.minibatch == "discrimination" and c.train.batch_size < 2,
        "net.minibatch: discrimination compares the images of a batch, and train.batch_size is 1",
        "set train.batch_size: 2 or more, or net.minibatch: none",
    ),
    Rule(
        "categorical-pixels-are-gray",
        "net.distribution",
        lambda c: c.spec.slug == "pixelcnn++" and c.net.distribution == "categorical" and not c.data.grayscale,
        "net.distribution: categorical models each channel on its own, so it is for grayscale images only",
        "set net.distribution: logistics, or data.grayscale: true",
    ),
)
