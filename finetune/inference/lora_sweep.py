"""Compare checkpoints × strengths of a LoRA run with the same prompt and seed: one grid per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from finetune.adapters.kinds import kind_of
from finetune.data.media.sample import Sample
from finetune.errors import UserError
from finetune.inference.sample import dtype_of, free_folder, placed, request_for
from finetune.models.base import SampleRequest
from finetune.models.pretrained import textual_inversion
from finetune.models.pretrained.family import Family, family_of
from finetune.models.pretrained.loading import open_pipeline
from finetune.models.pretrained.model import generate_from_prompt, set_schedule
from finetune.models.pretrained.trainable import ADAPTER_PASSES, Trainable, make_trainable
from finetune.planning import Plan, load_plan
from finetune.report.images import enlarged, sheet
from finetune.terminal import Progress
from finetune.training import checkpoint
from finetune.training.optimizers import average


def compare(
    run: str | Path,
    strengths: Sequence[float],
    steps_taken: Sequence[int] | None = None,
    prompts: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    out: Path | None = None,
) -> list[Path]:
    """Generate every prompt (with every seed) with every checkpoint at every strength.

    Args:
        run: the folder of a LoRA run, finished or not.
        strengths: factors on the LoRA's output: 0 is the base model, 1 the LoRA as trained.
        steps_taken: step numbers of the checkpoints; None: all checkpoints of the run.
        prompts, seeds, steps, guidance, negative, out: as for `finetune.inference.sample.sample`.

    Returns:
        The grids, `sheet-NN.png`, one for each prompt and seed: rows are checkpoints, columns are strengths.

    Raises:
        UserError: the run is not a LoRA run, or lacks a checkpoint.
    """
    folder = Path(run).expanduser()
    plan = load_plan(folder)
    if plan.recipe.method != "lora":
        raise UserError(
            f"this run used method {plan.recipe.method}: only a LoRA has a strength",
            where=str(folder),
            remedy="leave out --strengths",
        )
    adapter = plan.recipe.adapter
    if adapter is not None and not kind_of(adapter).has_strength and set(strengths) != {1}:
        raise UserError(
            f"{kind_of(adapter).title} has no strength: its effect cannot be scaled",
            where="--strengths",
            remedy="use --strengths 1",
        )
    kept = checkpoint.kept(folder, steps_taken, "--checkpoints")
    request = request_for(plan, prompts, seeds, steps, guidance, negative)
    target = free_folder(out, folder)
    family = family_of(plan.recipe.model.family)
    pipeline, networks = _open(plan, family)
    rows = [f"step {int(path.name.removeprefix('step-')):,}" for path in kept]
    columns = [f"{strength:g}" for strength in strengths]
    progress, total = Progress("sampling"), len(kept) * len(strengths) * len(request.prompts)
    generated: list[list[Sample]] = [[] for _ in request.prompts]  # by prompt, row after row
    for row, path in enumerate(kept):
        _load(networks, path, plan)
        for column, strength in enumerate(strengths):
            _set_strength(networks, strength)
            for number in range(len(request.prompts)):
                done = (row * len(strengths) + column) * len(request.prompts) + number
                progress.show(done, total, f"{rows[row]}, strength {columns[column]}")
                generated[number].append(
                    generate_from_prompt(family, pipeline, request, request.prompts[number], request.seeds[number])
                )
    progress.end()
    try:
        return _write(target, request, rows, columns, generated)
    except OSError as error:
        raise UserError(
            f"the images cannot be written: {error.strerror}",
            where=str(target),
            remedy="choose another folder with --out",
        ) from error


def _open(plan: Plan, family: Family) -> tuple[Any, dict[str, nn.Module]]:
    """The base pipeline with adapters as in training, and its networks by the prefix of their names in checkpoints."""
    recipe = plan.recipe
    assert recipe.adapter is not None
    torch.manual_seed(recipe.train.seed)  # as in training: PiSSA's initialization depends on it
    pipeline: Any = open_pipeline(recipe.model, family.spec.pipeline, dtype_of(plan.precision))
    set_schedule(pipeline, recipe)
    new = textual_inversion.add(pipeline, family.encoders, recipe.tokens, recipe.train.seed)
    encoders = [name for _, name in family.encoders] if recipe.model.train_text_encoder else []
    networks = {name: getattr(pipeline, name) for name in (family.spec.denoiser, *encoders)}
    model = Trainable(
        recipe, networks, family.spec.denoiser, dtype_of(plan.precision), torch.device("cpu"), pipeline, family
    )
    make_trainable(model, only=ADAPTER_PASSES)
    networks |= {name: getattr(pipeline, name) for name in new}
    for network in networks.values():
        network.eval()
    return placed(pipeline), {
        "denoiser.denoiser." if name == family.spec.denoiser else f"denoiser.encoders.{name}.": network
        for name, network in networks.items()
    }


@torch.no_grad()
def _load(networks: dict[str, nn.Module], path: Path, plan: Plan) -> None:
    """Load the adapters' weights from a checkpoint: averaged weights if the run keeps them, as in its final files."""
    loaded = checkpoint.load_whole(path)
    weights = loaded.weights | loaded.averages
    named = {
        prefix + name: parameter
        for prefix, network in networks.items()
        for name, parameter in network.named_parameters()
    }
    trained = {name: parameter for name, parameter in named.items() if name in weights}
    for name, parameter in trained.items():
        parameter.copy_(weights[name])
    average(plan.recipe.optimizer, trained.values(), loaded.optimizers["denoiser"])


def _set_strength(networks: dict[str, nn.Module], strength: float) -> None:
    """Scale the output of every adapter by `strength`, in addition to its own alpha / rank.

    PiSSA changes the base weight W to W − s B₀ A₀, so its effect is s (B A − B₀ A₀). The second term is part of the
    base weight, and is scaled there.
    """
    for network in networks.values():
        started: dict[str, Tensor] = getattr(network, "pissa_start", {})
        for path, module in network.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            for name in module.active_adapters:
                if f"{path}.lora_A.weight" in started:
                    down, up = (started[f"{path}.lora_{side}.weight"].to(module.weight.device) for side in "AB")
                    module.set_scale(name, 1)
                    own, before = module.scaling[name], getattr(module, "strength", 1.0)
                    module.weight.data += ((before - strength) * own * (up @ down)).to(module.weight.dtype)
                    module.strength = strength
                module.set_scale(name, strength)


def _write(
    target: Path, request: SampleRequest, rows: list[str], columns: list[str], generated: list[list[Sample]]
) -> list[Path]:
    target.mkdir(parents=True, exist_ok=True)
    sheets = []
    for number, (prompt, seed, cells) in enumerate(zip(request.prompts, request.seeds, generated, strict=True)):
        for place, image in enumerate(cells):
            row, column = divmod(place, len(columns))
            step = rows[row].replace(" ", "-").replace(",", "")
            image.save(target / f"{number:02d}-{step}-strength-{columns[column]}{image.suffix}")
        sheets.append(target / f"sheet-{number:02d}.png")
        sheet(
            [enlarged(cell.thumbnail()) for cell in cells],
            rows,
            [f"strength {column}" for column in columns],
            f"{prompt}   (seed {seed})",
        ).save(sheets[-1])
    return sheets
