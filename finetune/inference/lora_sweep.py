"""Compare a LoRA run's checkpoints × strengths with the same prompt and seed: one sheet for each prompt."""

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
    """Draw every prompt (with every seed) by every checkpoint at every strength.

    Args:
        run: the folder of a LoRA run, finished or not.
        strengths: factors on what the LoRA adds: 0 is the base, 1 as it was trained.
        steps_taken: checkpoints by the steps that the run had taken; none: all that it keeps.
        prompts, seeds, steps, guidance, negative, out: as for `finetune.inference.sample.sample`.

    Returns:
        The sheets, `sheet-NN.png`, one for each prompt and seed: rows are checkpoints, columns strengths.

    Raises:
        UserError: the run is no LoRA's, or keeps no such checkpoint.
    """
    folder = Path(run).expanduser()
    plan = load_plan(folder)
    if plan.recipe.method != "lora":
        raise UserError(
            f"this run is of method {plan.recipe.method}: only a LoRA has a strength",
            where=str(folder),
            remedy="draw it without --strengths",
        )
    adapter = plan.recipe.adapter
    if adapter is not None and not kind_of(adapter).has_strength and set(strengths) != {1}:
        raise UserError(
            f"{kind_of(adapter).title} has no strength: half a rotation is not half its effect",
            where="--strengths",
            remedy="--strengths 1",
        )
    kept = checkpoint.kept(folder, steps_taken, "--checkpoints")
    request = request_for(plan, prompts, seeds, steps, guidance, negative)
    target = free_folder(out, folder)
    family = family_of(plan.recipe.model.family)
    pipeline, nets = _open(plan, family)
    rows = [f"step {int(path.name.removeprefix('step-')):,}" for path in kept]
    columns = [f"{strength:g}" for strength in strengths]
    drawing = Progress("drawing")
    drawn: list[list[Sample]] = [[] for _ in request.prompts]  # by prompt, row after row
    for row, path in enumerate(kept):
        _load(nets, path, plan)
        for column, strength in enumerate(strengths):
            _set_strength(nets, strength)
            for number in range(len(request.prompts)):
                done = (row * len(strengths) + column) * len(request.prompts) + number
                drawing.show(
                    done, len(kept) * len(strengths) * len(request.prompts), f"{rows[row]}, strength {columns[column]}"
                )
                drawn[number].append(
                    generate_from_prompt(family, pipeline, request, request.prompts[number], request.seeds[number])
                )
    drawing.end()
    try:
        return _write(target, request, rows, columns, drawn)
    except OSError as error:
        raise UserError(
            f"the images cannot be written: {error.strerror}",
            where=str(target),
            remedy="choose another place with --out",
        ) from error


def _open(plan: Plan, family: Family) -> tuple[Any, dict[str, nn.Module]]:
    """The base with adapters as the trainer puts them on, and its nets by the beginning of their names in checkpoints."""
    recipe = plan.recipe
    assert recipe.adapter is not None
    torch.manual_seed(recipe.train.seed)  # as the trainer does: PiSSA's start depends on it
    pipeline: Any = open_pipeline(recipe.model, family.spec.pipeline, dtype_of(plan.precision))
    set_schedule(pipeline, recipe)
    new = textual_inversion.add(pipeline, family.encoders, recipe.tokens, recipe.train.seed)
    encoders = [name for _, name in family.encoders] if recipe.model.train_text_encoder else []
    nets = {name: getattr(pipeline, name) for name in (family.spec.denoiser, *encoders)}
    model = Trainable(
        recipe, nets, family.spec.denoiser, dtype_of(plan.precision), torch.device("cpu"), pipeline, family
    )
    make_trainable(model, only=ADAPTER_PASSES)
    nets |= {name: getattr(pipeline, name) for name in new}
    for net in nets.values():
        net.eval()
    return placed(pipeline), {
        "denoiser.denoiser." if name == family.spec.denoiser else f"denoiser.encoders.{name}.": net
        for name, net in nets.items()
    }


@torch.no_grad()
def _load(nets: dict[str, nn.Module], path: Path, plan: Plan) -> None:
    """Take the adapters' weights from a checkpoint: the averaged ones where the run keeps them, since these are what it writes at its end."""
    found = checkpoint.load_whole(path)
    weights = found.weights | found.averages
    named = {prefix + name: parameter for prefix, net in nets.items() for name, parameter in net.named_parameters()}
    trained = {name: parameter for name, parameter in named.items() if name in weights}
    for name, parameter in trained.items():
        parameter.copy_(weights[name])
    average(plan.recipe.optimizer, trained.values(), found.optimizers["denoiser"])


def _set_strength(nets: dict[str, nn.Module], strength: float) -> None:
    """Multiply what every adapter adds, besides by its own alpha / rank.

    PiSSA has changed the base W to W − s B₀ A₀: of what it adds, s (B A − B₀ A₀), the second half is in the base, and is changed there.
    """
    for net in nets.values():
        started: dict[str, Tensor] = getattr(net, "pissa_start", {})
        for path, module in net.named_modules():
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
    target: Path, request: SampleRequest, rows: list[str], columns: list[str], drawn: list[list[Sample]]
) -> list[Path]:
    target.mkdir(parents=True, exist_ok=True)
    sheets = []
    for number, (prompt, seed, cells) in enumerate(zip(request.prompts, request.seeds, drawn, strict=True)):
        for place, image in enumerate(cells):
            row, column = divmod(place, len(columns))
            image.save(
                target
                / f"{number:02d}-{rows[row].replace(' ', '-').replace(',', '')}-strength-{columns[column]}{image.suffix}"
            )
        sheets.append(target / f"sheet-{number:02d}.png")
        sheet(
            [enlarged(cell.thumbnail()) for cell in cells],
            rows,
            [f"strength {column}" for column in columns],
            f"{prompt}   (seed {seed})",
        ).save(sheets[-1])
    return sheets
