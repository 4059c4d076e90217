"""The two tables before a run: what is in the data, and what will be done with it."""

from __future__ import annotations

from collections import Counter

from finetune.data.scan import Audit
from finetune.planning import Plan


def data(audit: Audit) -> str:
    """How many pictures train, which do not and why, the buckets and what each crops."""
    lines = [f"data     {len(audit.training)} pictures train" + (f", {len(audit.held_out)} held out for validation" if audit.held_out else "")]
    crops: dict[object, list[float]] = {}
    for picture in audit.training:
        crops.setdefault(picture.crop.bucket, []).append(picture.crop.share_lost)
    for bucket, count in audit.bucket_counts().items():
        lost = crops[bucket]
        lines.append(f"         {count:6d} × {bucket}, cropping loses {100 * sum(lost) / len(lost):.0f} % (worst {100 * max(lost):.0f} %)")
    upscaled = sum(p.crop.upscaled for p in audit.training)
    if upscaled:
        lines.append(f"         {upscaled} are smaller than their bucket and are scaled up")
    for (kind, detail), count in Counter((p.kind, p.detail) for p in audit.problems).items():
        names = [p.name for p in audit.problems if (p.kind, p.detail) == (kind, detail)]
        lines.append(f"         {count} × {kind}: {detail} ({', '.join(names[:3])}{', …' if count > 3 else ''})")
    lines += [f'         e.g. {picture.name}: "{picture.caption}"' for picture in audit.training[:3]]
    return "\n".join(lines)


def plan(plan: Plan) -> str:
    """Every number of the run, the arithmetic of its steps first."""
    recipe, machine = plan.recipe, plan.machine
    optimizer, train = recipe.optimizer, recipe.train
    parts = [
        ("steps", plan.arithmetic),
        ("model", f"{recipe.method} of {recipe.model.family}" + (f" from {recipe.model.path}" if recipe.model.path else "")),
        (
            "rate",
            f"{optimizer.name} {optimizer.lr:g}, {optimizer.schedule}"
            + (f" after {optimizer.warmup_steps} steps of warm-up" if optimizer.warmup_steps else "")
            + (f", gradients clipped at {optimizer.clip_norm:g}" if optimizer.clip_norm else ""),
        ),
        ("numbers", f"{plan.precision}, seed {train.seed}" + (f", EMA {train.ema}" if train.ema else "") + (", gradient checkpointing" if train.gradient_checkpointing else "")),
        ("machine", f"{machine.name}, {machine.processes} × {machine.device}" + (f", {machine.threads} threads" if machine.device == "cpu" else "")),
        ("keeps", f"a checkpoint each {train.checkpoint_every} steps, samples each {recipe.sample.every}, in {plan.folder}"),
        *(("note", note) for note in plan.notes),
    ]
    return "\n".join(f"{name:<8} {text}" for name, text in parts)
