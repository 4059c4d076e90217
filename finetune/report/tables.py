"""The two tables before a run: what is in the data, and what will be done with it. The page of the run shows the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.config import memory_options
from finetune.config.schema import Autoencoder, Flow
from finetune.data.audit.audit import Audit
from finetune.models.registry import spec_of
from finetune.planning import Plan
from finetune.report import images
from finetune.terminal import Row, table

SHOWN_IMAGES = 12  # training images in the report
SHOWN_CHARACTERS = 300  # of a caption in a table


def facts(audit: Audit, count: int = SHOWN_IMAGES) -> dict[str, Any]:
    """The audit as plain values, for `data.json`: counts, buckets, problems with all their files, and `count` images as the model sees them."""
    training = audit.training
    spread = training[:: max(1, len(training) // count)][:count]
    shown = [
        {
            "name": shown_image.name,
            "caption": shown_image.caption,
            "image": images.of_training(shown_image, audit.background),
        }
        for shown_image in spread
    ]
    return _counts(audit) | {"images": shown}


def _counts(audit: Audit) -> dict[str, Any]:
    crops = audit.crops()
    buckets = []
    for bucket, count in audit.bucket_counts().items():
        lost = [(crop.share_lost, number) for crop, number, _ in crops if crop.bucket == bucket]
        mean = sum(share * number for share, number in lost) / sum(number for _, number in lost)
        buckets.append(
            {"width": bucket.width, "height": bucket.height, "examples": count, "lost": mean, "worst": max(lost)[0]}
        )
    findings = []
    for finding in audit.findings:
        groups = [[audit.images[place].name for place in group] for group in finding.examples]
        findings.append({"kind": finding.kind, "detail": finding.detail, "count": finding.count, "groups": groups})
    named: dict[tuple[str, str], list[str]] = {}
    for problem in audit.problems:
        named.setdefault((problem.kind, problem.detail), []).append(problem.name)
    problems = [
        {"kind": kind, "detail": detail, "count": len(names), "names": names} for (kind, detail), names in named.items()
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


def data_rows(found: dict[str, Any]) -> list[Row]:
    """Name and text of each line about the data; `found` is what `facts` returns."""
    repeats = f", {found['examples']} examples with repeats" if found["examples"] != found["training"] else ""
    rows = [("train", f"{_count(found['training'], 'image')}{repeats}")]
    if found["held_out"]:
        rows.append(("held out", f"{_count(found['held_out'], 'image')}, for the validation loss"))
    sizes = [f"{bucket['width']}×{bucket['height']}" for bucket in found["buckets"]]
    most = max((bucket["examples"] for bucket in found["buckets"]), default=1)
    for size, bucket in zip(sizes, found["buckets"], strict=True):
        bar = "█" * max(1, round(16 * bucket["examples"] / most))
        crop = (
            f"cropping loses {bucket['lost']:.0%}, at worst {bucket['worst']:.0%}"
            if bucket["worst"] >= 0.005
            else "nothing is cropped away"
        )
        rows.append(
            (
                "sizes" if size == sizes[0] else "",
                f"{size:<{max(map(len, sizes))}} {bucket['examples']:>{len(str(most))}} {bar:<16} {crop}",
            )
        )
    if found["upscaled"]:
        rows.append(("scaled up", f"{_count(found['upscaled'], 'image')}, smaller than the size they train at"))
    for finding in found.get("findings", []):  # runs of earlier versions have none
        groups = [
            " = ".join(map(short, group[:3])) + (" = …" if len(group) > 3 else "") for group in finding["groups"][:3]
        ]
        more = ["…"] if finding["count"] > sum(map(len, finding["groups"][:3])) else []
        rows.append(
            ("odd", f"{finding['count']} × {finding['kind']}: {finding['detail']} ({', '.join(groups + more)})")
        )
    for problem in found["problems"]:
        names = [short(name) for name in problem["names"][:3]] + (["…"] if problem["count"] > 3 else [])
        rows.append(("problem", f"{problem['count']} × {problem['kind']}: {problem['detail']} ({', '.join(names)})"))
    return rows


def plan_rows(plan: Plan) -> list[Row]:
    """Name and text of each line about the run, the arithmetic of its steps first."""
    recipe, machine = plan.recipe, plan.machine
    optimizer, train, sample = recipe.optimizer, recipe.train, recipe.sample
    rate = f"{optimizer.lr:g}, {optimizer.schedule}" + (
        f" after {optimizer.warmup_steps} steps of warm-up" if optimizer.warmup_steps else ""
    )
    accumulated = f" = {train.batch_size} × {train.accumulation} accumulated" if train.accumulation > 1 else ""
    batch = f"{_count(plan.global_batch, 'image')} a step{accumulated}"
    threads = f", {_count(machine.threads, 'thread')}" if machine.device == "cpu" else ""
    clipped = "each tensor's gradient" if optimizer.clip == "tensor" else "gradients"
    clip = f", {clipped} clipped at {optimizer.clip_norm:g}" if optimizer.clip_norm else ""
    epsilon = f", ε {optimizer.eps:g}" if optimizer.name not in ("lion", "came") else ""
    adam = (
        f" (β {optimizer.moments[0]:g} and {optimizer.moments[1]:g}{epsilon})" if optimizer.name != "adafactor" else ""
    )
    numbers = (
        f"{plan.precision}"
        + ("" if plan.precision == "float32" else f", what trains in {train.weights}")
        + f", seed {train.seed}"
    )
    looks = (
        f", samples every {sample.every} ({sample.steps} steps, guidance {sample.guidance:g})"
        if sample.prompts
        else ", no samples"
    )
    looks += f", validation every {train.validate_every}" if plan.data.held_out else ""
    looks += f", lost modes watched every {sample.collapse_check_every}" if sample.collapse_check_every else ""
    rows = [
        ("steps", plan.arithmetic),
        ("base", _base(plan)),
        ("trains", _trains(plan)),
        *(
            (
                "word",
                f'"{new.token}": {_count(new.vectors, "vector")} from {new.init_word or "nothing"}, {new.lr_multiplier:g} times as fast',
            )
            for new in recipe.tokens
        ),
        ("loss", _loss(plan)),
        *([("preserves", _preserved(every))] if recipe.adapter and (every := recipe.adapter.distill_every) else []),
        *([("counts", weighing)] if (weighing := _weighing(plan)) else []),
        ("optimizer", f"{optimizer.name}{adam}, weight decay {optimizer.weight_decay:g}{clip}"),
        ("rate", rate),
        ("batch", batch),
        *memory_options.rows(recipe),
        ("numbers", numbers + (f", weights averaged with decay {train.ema:g}" if train.ema else "")),
        (
            "captions",
            f"{recipe.data.caption_dropout:.0%} left out while training"
            if recipe.data.caption_dropout
            else "always read",
        ),
        ("machine", f"{machine.name}, {machine.processes} × {machine.device}{threads}"),
        ("keeps", f"a checkpoint every {train.checkpoint_every} steps (the last {train.keep_checkpoints}){looks}"),
        ("folder", plan.folder),
    ]
    if recipe.model.family == "autoencoder-kl" or (recipe.net is not None and recipe.data.classes is None):
        rows = [row for row in rows if row[0] != "captions"]
    return rows + [("note", note) for note in plan.notes]


def _base(plan: Plan) -> str:
    model = plan.recipe.model
    origin = f"{model.family}, {model.path}" if model.path else f"{model.family}, from scratch"
    return origin + (
        f", with the VAE of {model.vae}" if model.vae else f", after {model.base_run}" if model.base_run else ""
    )


def _trains(plan: Plan) -> str:
    """What gets gradients, and of an adapter the numbers that make its scale."""
    recipe = plan.recipe
    adapter = recipe.adapter
    if recipe.net is not None:
        return "all weights"
    text_encoder = recipe.model.family != "autoencoder-kl" and (
        recipe.model.train_text_encoder or recipe.method == "scratch"
    )
    if adapter is None:
        return "all weights" + (
            " of denoiser and text encoder"
            if text_encoder
            else ""
            if recipe.model.family == "autoencoder-kl"
            else " of the denoiser"
        )
    nets = " of denoiser and text encoder" if text_encoder else " of the denoiser"
    if adapter.kind == "oft":
        return f"OFT on {adapter.targets}{nets}: blocks of side {adapter.rank}"
    alpha = adapter.alpha if adapter.alpha is not None else adapter.rank
    scale = alpha / (adapter.rank**0.5 if adapter.rslora else adapter.rank)
    names = {"lora": "DoRA" if adapter.dora else "LoRA", "loha": "LoHa", "lokr": "LoKr"}
    kind = (
        names[adapter.kind] + (", rank-stabilized" if adapter.rslora else "") + (" from PiSSA" if adapter.pissa else "")
    )
    root = "√" if adapter.rslora else ""
    dropout = f", dropout {adapter.dropout:g}" if adapter.dropout else ""
    own = "".join(
        f"; {name} {value:g} on {end}"
        for name in ("rank", "alpha")
        for end, value in getattr(adapter, f"{name}_pattern").items()
    )
    scaled = f"alpha {alpha:g} (scale {alpha:g}/{root}{adapter.rank} = {scale:.3g})"
    return f"{kind} on {adapter.targets}{nets}: rank {adapter.rank}, {scaled}{own}{dropout}"


def _preserved(every: int) -> str:
    return f"one of {every} steps: at the noisiest 1/{every} of the noise levels the adapter learns what the base says"


def _weighing(plan: Plan) -> str:
    """How the loss is weighed from source to source and from place to place; "" if it is not."""
    data, prior = plan.recipe.data, plan.recipe.prior
    parts = [f"{short(source.path)} × {source.weight:g}" for source in data.sources if source.weight != 1]
    parts += (
        [f'{prior.images} images of "{prior.prompt}", drawn by the base, × {prior.weight:g}']
        if prior is not None
        else []
    )
    where = "beside the images" if data.masks == "beside" else f"in {short(data.masks or '')}"
    parts += [f"by masks {where}, × {data.unmasked_weight:g} where they are black"] if data.masks else []
    return "; ".join(parts)


def _loss(plan: Plan) -> str:
    recipe = plan.recipe
    if recipe.net is not None:
        return str(recipe.net.loss)
    if recipe.model.family == "autoencoder-kl":
        autoencoder = recipe.autoencoder or Autoencoder()
        terms = [f"{autoencoder.reconstruction} of the pixels"]
        terms += [f"(color × {autoencoder.color_weight:g})"] if autoencoder.color_weight != 1 else []
        terms += [f"+ {autoencoder.coarse_weight:g} × the same of averaged pixels"] if autoencoder.coarse_weight else []
        return " ".join([*terms, f"+ {autoencoder.kl_weight:g} × KL of the latents"])
    spec = spec_of(recipe.model.family)
    if spec.objective == "flow":
        return _flow_loss(recipe.flow or Flow(), spec.sampling)
    predicted = {"epsilon": "the noise ε", "v_prediction": "the velocity v", None: "what the base predicts"}[
        recipe.model.prediction
    ]
    loss = recipe.diffusion
    if loss is None:
        return f"squared error in {predicted}"
    parts = [f"{'squared' if loss.huber is None else f'pseudo-Huber (δ {loss.huber:g})'} error in {predicted}"]
    parts += [f"min-SNR γ {loss.min_snr_gamma:g}"] if loss.min_snr_gamma else []
    parts += [f"noise offset {loss.noise_offset:g}"] if loss.noise_offset else []
    parts += ["noise up to zero terminal SNR"] if loss.zero_terminal_snr else []
    parts += [f"timesteps shifted by {loss.shift:g}"] if loss.shift != 1 else []
    return ", ".join(parts)


def _flow_loss(flow: Flow, sampling: str) -> str:
    chosen = flow.sampling or sampling
    numbers = {
        "logit_normal": f" (mean {flow.mean:g}, deviation {flow.std:g})",
        "mode": f" (scale {flow.mode_scale:g})",
    }.get(chosen, "")
    shift = f"shifted by {flow.shift:g}" if flow.shift else "shifted as the base's scheduler says"
    weighting = f", weighted by {flow.weighting}" if flow.weighting != "none" else ""
    return f"squared error in the velocity; noise levels {chosen.replace('_', '-')}{numbers}, {shift}{weighting}"


def data(audit: Audit) -> str:
    """The table of the data: how many images train, which do not and why, sizes and what each crops, some captions."""
    examples = [{"name": shown_image.name, "caption": shown_image.caption} for shown_image in audit.training[:3]]
    return table("data", data_rows(_counts(audit)) + caption_rows(examples))


def caption_rows(shown: Sequence[dict[str, Any]], counted: str = "") -> list[Row]:
    """Some images' names and captions, or, where they are known, the captions' tokens; `counted` says more of them."""
    width = max((len(short(each["name"])) for each in shown), default=0)
    rows = [
        (short(each["name"]), " · ".join(each["tokens"]) if each.get("tokens") else f'"{_cut(each["caption"])}"')
        for each in shown
    ]
    named = [
        ("captions" if number == 0 else "", f"{name:<{width}}  {words}") for number, (name, words) in enumerate(rows)
    ]
    return named + ([("", counted)] if counted else [])


def _cut(caption: str) -> str:
    return caption if len(caption) <= SHOWN_CHARACTERS else caption[:SHOWN_CHARACTERS] + "…"


def plan(plan: Plan) -> str:
    """The table of every number of the run."""
    return table("plan", plan_rows(plan))


def _count(number: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def short(name: str) -> str:
    """A file's name without its folders, also of a line of a table (`a/metadata.csv:3 ("b/c.png")`)."""
    place, quote, named = name.partition(' ("')
    return place.replace("\\", "/").rsplit("/", 1)[-1] + quote + named
