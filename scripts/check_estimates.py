"""Published runs beside what is predicted for them: scripts/check_estimates.py. Takes minutes; needs no GPU.

The runs are finetune/assets/published_runs.tsv, each with its source. A row that cannot be traced yet is named with the reason.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.recipe import ASSETS, load_recipe

# What other trainers' words mean here: model → the recipe that describes it.
MODELS = {"SD1.5 (dreamshaper-8)": "lora/sd15", "SDXL base 1.0": "lora/sdxl", "SD2 UNet 866M": "full/sd21"}
METHODS = {"LoRA attn qkvo": "attention", "from scratch (MLPerf)": ""}  # the targets of an adapter
GPUS = {"H100 80GB": "h100-sxm", "L40S 48GB": "l40s", "8x H100 SXM 80GB": "h100-sxm", "8x H200 141GB": "h200", "64x L40S 48GB": "l40s"}
CHECKPOINTING = {"no": "false", "yes (every block)": "true", "yes": "true"}


class Row(NamedTuple):
    """One published run that could be traced: GiB and seconds a step; the peak is what PyTorch reserved (0: was not said)."""

    name: str
    model: str
    measured: float
    predicted: float
    measured_seconds: float
    predicted_seconds: float
    parameters_only: float
    formula: float


def main() -> None:
    lines = (ASSETS / "published_runs.tsv").read_text(encoding="utf-8").splitlines()
    header = lines[0].split("\t")
    rows = [dict(zip(header, line.split("\t"), strict=False)) for line in lines[1:]]
    found, left = [], Counter[str]()
    for row in rows:
        reason = why_not(row)
        if reason:
            left[reason] += 1
            continue
        found.append(predicted(row))
        one = found[-1]
        peak = f"{one.measured:>6.2f} GiB" if one.measured else "         ?"
        off = f"({one.predicted / one.measured - 1:+.1%})" if one.measured else ""
        pace = f"{one.measured_seconds:.3f} s, predicted {one.predicted_seconds:.3f} ({one.predicted_seconds / one.measured_seconds - 1:+.0%})"
        print(f"{one.name:<42} {peak}, predicted {one.predicted:>6.2f} {off:<8}   {pace}", flush=True)
    print(f"\n{len(found)} of {len(rows)} rows; not traced:")
    print("\n".join(f"  {count:>3}  {reason}" for reason, count in left.most_common()))
    print("\nerrors                      median    90 %")
    for title, pairs in (
        ("memory", [(one.predicted, one.measured) for one in found if one.measured]),
        ("s/step", [(one.predicted_seconds, one.measured_seconds) for one in found]),
        ("parameters × bytes", [(one.parameters_only, one.measured) for one in found if one.measured]),
        ("12 × batch × (side/512)²", [(one.formula, one.measured) for one in found if one.measured]),
    ):
        errors = sorted(abs(predicted / measured - 1) for predicted, measured in pairs)
        print(f"  {title:<26}{statistics.median(errors):>6.1%} {errors[min(len(errors) - 1, int(0.9 * len(errors)))]:>6.1%}")


def why_not(row: dict[str, str]) -> str:
    """Why a row is not traced; "" if it is."""
    if row["model"] not in MODELS:
        return f"{row['model']}: no family here yet"
    if row["method"] not in METHODS:
        return f"{row['method']}: an adapter that is not here yet"
    if "int8" in row["weights_dtype"] or "fp8" in row["weights_dtype"]:
        return f"{row['weights_dtype']}: not here yet"
    if "fp8" in row["compute_dtype"] or row["compute_dtype"] == "NeMo":
        return f"computes in {row['compute_dtype']}: what precision is not said"
    if row["grad_ckpt"] not in CHECKPOINTING:
        return f"checkpointing {row['grad_ckpt']}: not here yet"
    return "" if row["gpu"] in GPUS else f"GPU {row['gpu']}"


def predicted(row: dict[str, str]) -> Row:
    """The step of a published run, traced."""
    import torch

    from finetune.estimate.allocator import replay
    from finetune.estimate.cards import Work
    from finetune.estimate.constants import GIB, WORKSPACE, WORKSPACE_HOPPER
    from finetune.estimate.gpus import find
    from finetune.estimate.memory import HOPPER
    from finetune.estimate.speed import bounds
    from finetune.estimate.subject import Subject

    side, batch = int(row["resolution"].partition("x")[0]), int(row["batch_per_gpu"])
    sets = [f"train.batch_size={batch}", "train.accumulation=1", "train.ema=null", "optimizer.name=adamw"]
    sets += [f"train.gradient_checkpointing={CHECKPOINTING[row['grad_ckpt']]}"]
    sets += [f"adapter.rank={row['rank']}", f"adapter.targets={METHODS[row['method']]}"] if METHODS[row["method"]] else []
    dtype = torch.bfloat16 if "adapter bf16" in row["weights_dtype"] else torch.float32
    phase = Subject(load_recipe(MODELS[row["model"]], sets), "bfloat16", (side, side), trained_dtype=dtype).phases(only_training=True)["train"]
    gpu = find(GPUS[row["gpu"]])
    reserved = replay(phase.events).peak_reserved + (WORKSPACE_HOPPER if gpu.model in HOPPER else WORKSPACE)
    works = [Work(one.kind, one.width, (one.flops, 0), (one.bytes, 0), 1) for one in last_step(phase)]
    pace = re.search(r"\(([\d.]+) per GPU\)", row["seconds_per_step_or_its"])
    seconds = batch / float(pace[1]) if pace else float(row["seconds_per_step_or_its"].split()[0])
    return Row(
        name=row["id"],
        model=row["model"],
        measured=0.0 if row["peak_vram_gb"] == "-" else float(row["peak_vram_gb"]),
        predicted=reserved / GIB,
        measured_seconds=seconds,
        predicted_seconds=sum(bounds(works, 1.0, 1, gpu)[:3]),
        parameters_only=(phase.held["weights"] + phase.held["trained"] * 4) / GIB,
        formula=12 * batch * (side / 512) ** 2 * 1e9 / GIB,
    )


def last_step(phase: Any) -> Iterable[Any]:
    last = max(number for number, section in enumerate(phase.sections) if section.name == "batch")
    return [operator for section in phase.sections[last:] for operator in section.operators]


if __name__ == "__main__":
    main()
