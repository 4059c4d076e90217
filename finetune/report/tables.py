"""The tables of the data and the plan, which a run prints before it starts and shows in its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.adapters.kinds import kind_of
from finetune.config import memory_options
from finetune.config.schema import Autoencoder, Flow, Recipe, Token
from finetune.data.audit.audit import Audit
from finetune.models.registry import spec_of
from finetune.planning import Plan
from finetune.report import images
from finetune.terminal import Row, table

SHOWN_IMAGES = 12  # training images in the report
MAX_CAPTION = 300  # characters of a caption in a table


def facts(audit: Audit, images_shown: int = SHOWN_IMAGES) -> dict[str, Any]:
    """Summarize the audit as plain values, for `data.json`.

    Args:
        audit: the audit of the data.
        images_shown: how many training images to include as thumbnails, evenly spaced.

    Returns:
        Counts, buckets, findings, problems with the names of all their files, and thumbnails.
    """
    return _counts(audit) | {"images": thumbnails(audit, images_shown)}


def thumbnails(audit: Audit, number: int) -> list[dict[str, Any]]:
    """Names, captions and data URIs of at most `number` training images, evenly spaced, as the model sees them."""
    training = audit.training
    number = min(number, len(training))
    records = [training[index * len(training) // number] for index in range(number)]
    return [
        {
            "name": record.name,
            "caption": record.caption,
            "image": images.of_training(record, audit.background),
        }
        for record in records
    ]


def _counts(audit: Audit) -> dict[str, Any]:
    crops = audit.crops()
    buckets = []
    for bucket, examples in audit.bucket_counts().items():
        lost = [(crop.share_lost, number) for crop, number, _ in crops if crop.shape == bucket]
        mean = sum(share * number for share, number in lost) / sum(number for _, number in lost)
        buckets.append({"size": str(bucket), "examples": examples, "lost": mean, "worst": max(lost)[0]})
    findings = []
    for finding in audit.findings:
        groups = [[audit.images[index].name for index in group] for group in finding.examples]
        findings.append({"kind": finding.kind, "detail": finding.detail, "count": finding.count, "groups": groups})
    names: dict[tuple[str, str], list[str]] = {}
    for problem in audit.problems:
        names.setdefault((problem.kind, problem.detail), []).append(problem.name)
    problems = [
        {"kind": kind, "detail": detail, "count": len(files), "names": files} for (kind, detail), files in names.items()
    ]
    return {
        "training": sum(number for _, number, _ in crops),
        "examples": sum(bucket["examples"] for bucket in buckets),
        "held_out": len(audit.held_out),
        "upscaled": sum(number for crop, number, _ in crops if crop.upscaled),
        "buckets": buckets,
        "findings": findings,
        "problems": problems,
    }


def size_of(bucket: dict[str, Any]) -> str:
    """The shape of a bucket in `data.json`, such as `512×768`."""
    # Version 0.1 wrote width and height.
    return str(bucket["size"]) if "size" in bucket else f"{bucket['width']}×{bucket['height']}"


def data_rows(facts: dict[str, Any]) -> list[Row]:
    """The rows about the data: name and text of each.

    Args:
        facts: what the function `facts` returns, or the `data.json` of a run.
    """
    repeats = f", {facts['examples']} examples with repeats" if facts["examples"] != facts["training"] else ""
    rows = [("train", f"{count(facts['training'], 'image')}{repeats}")]
    if facts["held_out"]:
        rows.append(("held out", f"{count(facts['held_out'], 'image')}, for the validation loss"))
    sizes = [size_of(bucket) for bucket in facts["buckets"]]
    width, most = max(map(len, sizes), default=0), max((bucket["examples"] for bucket in facts["buckets"]), default=1)
    for size, bucket in zip(sizes, facts["buckets"], strict=True):
        bar = "█" * max(1, round(16 * bucket["examples"] / most))
        crop = crop_loss(bucket) if bucket["worst"] >= 0.005 else "nothing is cropped away"
        text = f"{size:<{width}} {bucket['examples']:>{len(str(most))}} {bar:<16} {crop}"
        rows.append(("sizes" if size == sizes[0] else "", text))
    if facts["upscaled"]:
        rows.append(("enlarged", f"{count(facts['upscaled'], 'image')}, smaller than the training size"))
    for finding in facts.get("findings", []):  # runs of earlier versions have none
        shown = finding["groups"][:3]
        groups = [" = ".join(map(short, group[:3])) + (" = …" if len(group) > 3 else "") for group in shown]
        more = ["…"] if finding["count"] > sum(map(len, shown)) else []
        rows.append(("warning", f"{counted(finding)} ({', '.join(groups + more)})"))
    for problem in facts["problems"]:
        names = [short(name) for name in problem["names"][:3]] + (["…"] if problem["count"] > 3 else [])
        rows.append(("problem", f"{counted(problem)} ({', '.join(names)})"))
    return rows


def counted(found: dict[str, Any]) -> str:
    """A finding or problem of `data.json` as text: `2 × tiny: enlarged more than 2 times`."""
    return f"{found['count']} × {found['kind']}: {found['detail']}"


def crop_loss(bucket: dict[str, Any]) -> str:
    """What cropping to a bucket removes: the mean and the largest share of an image's area."""
    return f"cropping removes {bucket['lost']:.0%} on average, {bucket['worst']:.0%} at most"


def plan_rows(plan: Plan) -> list[Row]:
    """The rows about a run: name and text of each, the arithmetic of its steps first."""
    recipe, machine = plan.recipe, plan.machine
    train = recipe.train
    threads = f", {count(machine.threads, 'thread')}" if machine.device == "cpu" else ""
    rows = [
        ("steps", plan.arithmetic),
        ("base", _base(plan)),
        ("trains", _trains(plan)),
        *(("token", _token(token)) for token in recipe.tokens),
        ("loss", _loss(plan)),
        *([("distillation", _distilled(every))] if recipe.adapter and (every := recipe.adapter.distill_every) else []),
        *([("loss weights", weights)] if (weights := _loss_weights(plan)) else []),
        *_optimizer_rows(plan),
        *memory_options.rows(recipe),
        ("precision", _precision(plan) + (f", EMA of the weights with decay {train.ema:g}" if train.ema else "")),
        (
            "captions",
            f"dropped with probability {recipe.data.caption_dropout:.0%}"
            if recipe.data.caption_dropout
            else "never dropped",
        ),
        ("machine", f"{machine.name}, {machine.processes} × {machine.device}{threads}"),
        ("checkpoints", f"every {train.checkpoint_every} steps (the last {train.keep_checkpoints} are kept)"),
        ("samples", _schedule(plan)),
        *([("prompts", _prompts(recipe))] if recipe.method != "scratch" and recipe.sample.prompts else []),
        ("folder", plan.folder),
    ]
    if recipe.model.family == "autoencoder-kl" or (recipe.net is not None and recipe.data.classes is None):
        rows = [row for row in rows if row[0] != "captions"]
    return rows + [("note", note) for note in plan.notes]


def _token(token: Token) -> str:
    start = f'initialized from "{token.init_word}"' if token.init_word else "initialized randomly"
    return f'"{token.token}": {count(token.vectors, "vector")}, {start}, learning rate × {token.lr_multiplier:g}'


def _optimizer_rows(plan: Plan) -> list[Row]:
    """Optimizer, learning rate and batch size."""
    optimizer, train = plan.recipe.optimizer, plan.recipe.train
    epsilon = f", ε {optimizer.eps:g}" if optimizer.name not in ("lion", "came") else ""
    betas = f"β {optimizer.moments[0]:g} and {optimizer.moments[1]:g}"
    moments = f" ({betas}{epsilon})" if optimizer.name != "adafactor" else ""
    clipped = "each tensor's gradient" if optimizer.clip == "tensor" else "gradients"
    clip = f", {clipped} clipped at {optimizer.clip_norm:g}" if optimizer.clip_norm else ""
    warmup = f" after {count(optimizer.warmup_steps, 'warm-up step')}" if optimizer.warmup_steps else ""
    accumulated = f" = {train.batch_size} × {train.accumulation} accumulated" if train.accumulation > 1 else ""
    return [
        ("optimizer", f"{optimizer.name}{moments}, weight decay {optimizer.weight_decay:g}{clip}"),
        ("learning rate", f"{optimizer.lr:g}, {optimizer.schedule}{warmup}"),
        ("batch", f"{count(plan.global_batch, 'image')} per step{accumulated}"),
    ]


def _precision(plan: Plan) -> str:
    train = plan.recipe.train
    trained = "" if plan.precision == "float32" else f", trained weights in {train.weights}"
    return f"{plan.precision}{trained}, seed {train.seed}"


def _prompts(recipe: Recipe) -> str:
    """The first prompts of the samples, each shortened."""
    prompts = recipe.sample.prompts
    shown = [f'"{prompt}"' if len(prompt) <= 50 else f'"{prompt[:49]}…"' for prompt in prompts[:4]]
    return ", ".join(shown) + (f" and {len(prompts) - 4} more" if len(prompts) > 4 else "")


def _schedule(plan: Plan) -> str:
    """How often samples, validation and the monitor for mode collapse run."""
    train, sample = plan.recipe.train, plan.recipe.sample
    parts = [
        f"every {sample.every} steps ({sample.steps} sampling steps, guidance {sample.guidance:g})"
        if sample.prompts and sample.every
        else "none"
    ]
    parts += [f"validation every {train.validate_every}"] if plan.data.held_out else []
    parts += [f"mode collapse checked every {sample.collapse_check_every}"] if sample.collapse_check_every else []
    return ", ".join(parts)


def _base(plan: Plan) -> str:
    model = plan.recipe.model
    origin = f"{model.family}, {model.path}" if model.path else f"{model.family}, from scratch"
    return origin + (
        f", with the VAE {model.vae}" if model.vae else f", following {model.base_run}" if model.base_run else ""
    )


def _trains(plan: Plan) -> str:
    """Which weights train; for an adapter also the numbers that its scale comes from."""
    recipe = plan.recipe
    adapter = recipe.adapter
    if recipe.net is not None:
        return "all weights"
    text_encoder = recipe.model.family != "autoencoder-kl" and (
        recipe.model.train_text_encoder or recipe.method == "scratch"
    )
    models = " of the denoiser and the text encoder" if text_encoder else " of the denoiser"
    if adapter is None:
        return "all weights" + ("" if recipe.model.family == "autoencoder-kl" else models)
    return kind_of(adapter).describe(adapter, f"{adapter.targets}{models}")


def _distilled(every: int) -> str:
    target = "the adapter is held to the base model's prediction"
    return f"1 in {every} steps is a self-distillation step at high noise: {target}"


def _loss_weights(plan: Plan) -> str:
    """How the loss is weighted by source, prior images and masks; "" if it is not."""
    data, prior = plan.recipe.data, plan.recipe.prior
    parts = [f"{short(source.path)} × {source.weight:g}" for source in data.sources if source.weight != 1]
    if prior is not None:
        parts.append(f'{prior.images} images generated by the base for "{prior.prompt}" × {prior.weight:g}')
    if data.masks:
        where = "next to the images" if data.masks == "beside" else f"in {short(data.masks)}"
        parts.append(f"masks {where}: black areas × {data.unmasked_weight:g}")
    return "; ".join(parts)


def _loss(plan: Plan) -> str:
    recipe = plan.recipe
    if recipe.net is not None:
        return str(recipe.net.loss)
    if recipe.model.family == "autoencoder-kl":
        autoencoder = recipe.autoencoder or Autoencoder()
        terms = [f"{autoencoder.reconstruction} reconstruction error"]
        terms += [f"(color × {autoencoder.color_weight:g})"] if autoencoder.color_weight != 1 else []
        terms += [f"+ {autoencoder.coarse_weight:g} × the same at low resolution"] if autoencoder.coarse_weight else []
        return " ".join([*terms, f"+ {autoencoder.kl_weight:g} × KL divergence of the latents"])
    spec = spec_of(recipe.model.family)
    if spec.objective == "flow":
        return _flow_loss(recipe.flow or Flow(), spec.sampling)
    predicted = {"epsilon": "the noise ε", "v_prediction": "the velocity v", None: "the base's own target"}[
        recipe.model.prediction
    ]
    loss = recipe.diffusion
    if loss is None:
        return f"mean squared error of {predicted}"
    parts = [f"{'mean squared' if loss.huber is None else f'pseudo-Huber (δ {loss.huber:g})'} error of {predicted}"]
    parts += [f"min-SNR γ {loss.min_snr_gamma:g}"] if loss.min_snr_gamma else []
    parts += [f"noise offset {loss.noise_offset:g}"] if loss.noise_offset else []
    parts += ["zero terminal SNR"] if loss.zero_terminal_snr else []
    parts += [f"timesteps shifted by {loss.shift:g}"] if loss.shift != 1 else []
    return ", ".join(parts)


def _flow_loss(flow: Flow, sampling: str) -> str:
    distribution = flow.sampling or sampling
    numbers = {
        "logit_normal": f" (mean {flow.mean:g}, deviation {flow.std:g})",
        "mode": f" (scale {flow.mode_scale:g})",
    }.get(distribution, "")
    shift = f"shifted by {flow.shift:g}" if flow.shift else "shifted as in the base's scheduler"
    weighting = f", weighted by {flow.weighting}" if flow.weighting != "none" else ""
    levels = f"{distribution.replace('_', '-')}{numbers}, {shift}{weighting}"
    return f"mean squared error of the velocity; noise levels {levels}"


def data(audit: Audit) -> str:
    """The table of the data: counts, sizes, crops, warnings, problems and some captions."""
    examples = [{"name": record.name, "caption": record.caption} for record in audit.training[:3]]
    return table("data", data_rows(_counts(audit)) + caption_rows(examples))


def caption_rows(shown: Sequence[dict[str, Any]], summary: str = "") -> list[Row]:
    """Rows with names and captions of some images.

    Args:
        shown: `name` and `caption` of each, and `tokens` where they are known, which are shown instead of the caption.
        summary: text of a last row.
    """
    width = max((len(short(each["name"])) for each in shown), default=0)
    texts = [" · ".join(each["tokens"]) if each.get("tokens") else f'"{_cut(each["caption"])}"' for each in shown]
    rows = [
        ("" if number else "captions", f"{short(each['name']):<{width}}  {text}")
        for number, (each, text) in enumerate(zip(shown, texts, strict=True))
    ]
    return rows + ([("", summary)] if summary else [])


def _cut(caption: str) -> str:
    return caption if len(caption) <= MAX_CAPTION else caption[:MAX_CAPTION] + "…"


def plan(plan: Plan) -> str:
    """The table of every number of the run."""
    return table("plan", plan_rows(plan))


def count(number: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def short(name: str) -> str:
    """A file's name without its folders, also in a reference to a table's line: `a/metadata.csv:3 ("b/c.png")`."""
    file, quote, rest = name.partition(' ("')
    return file.replace("\\", "/").rsplit("/", 1)[-1] + quote + rest
