"""`ft train`: training in this process, or in several through `accelerate launch`."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from finetune import terminal
from finetune.cli import completion, launch_target, launcher
from finetune.cli.preflight import refuse_early
from finetune.cli.process import report_errors, stoppable
from finetune.config.loader import load_recipe
from finetune.errors import UserError
from finetune.estimate.hardware.cpu import threads
from finetune.training.run_folder import restored_recipe


@contextlib.contextmanager
def _restorable(recipe: str, resume: bool) -> Iterator[None]:
    """Within, an error in a run's own `recipe.yaml` names the copy that other files of the run still have."""
    try:
        yield
    except UserError as error:
        path = Path(recipe)
        if resume and path.name == "recipe.yaml" and (restored := restored_recipe(path.parent)) is not None:
            error.remedy = f"use the copy from the run's other files: ft train {restored} --resume"
        raise


@click.command()
@click.argument("recipe", shell_complete=completion.recipes)
@click.option(
    "overrides",
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one value of the recipe, such as train.batch_size=2.",
)
@click.option(
    "--init", help="Continue training a LoRA file, in diffusers' or kohya's format. Short for --set adapter.init_lora=…"
)
@click.option("--resume", is_flag=True, help="Continue the run in the recipe's folder.")
@click.option("--force", is_flag=True, help="Train even if the estimate says that the run does not fit into memory.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="One for each GPU. Default: 1, or as the --accelerate configuration says.",
)
@click.option(
    "--accelerate", "config", metavar="NAME", help="An Accelerate configuration: a bundled one, or your own file."
)
@click.option(
    "--launch",
    "extra",
    multiple=True,
    metavar="KEY=VALUE",
    help="One more argument for `accelerate launch`, such as machine_rank=1.",
)
@click.option(
    "--precision", type=click.Choice(["float32", "float16", "bfloat16"]), help="Short for --set train.precision=…"
)
def command(
    recipe: str,
    overrides: tuple[str, ...],
    init: str | None,
    resume: bool,
    force: bool,
    processes: int | None,
    config: str | None,
    extra: tuple[str, ...],
    precision: str | None,
) -> None:
    """Train a recipe, or resume a run.

    RECIPE is a YAML file, or the name of a bundled recipe. A run that does not fit into GPU memory is refused, with the
    edits that make it fit. Ctrl-C finishes the step, saves and stops; a second Ctrl-C stops at once. --resume
    continues.

    \b
    Examples:
      ft train lora/emoji
      ft train mine.yaml --set train.steps=1000
      ft train mine.yaml --resume
      ft train full/sdxl --accelerate fsdp2

    Several processes run under `accelerate launch`; the command is printed. --accelerate takes many-gpus or
    many-machines (each process holds the whole model), fsdp2 (weights, gradients and optimizer state are sharded),
    one-gpu, or your own file.
    """
    overrides += (f"train.precision={precision}",) if precision else ()
    overrides += (f"adapter.init_lora={init}",) if init else ()
    with _restorable(recipe, resume):
        loaded = load_recipe(recipe, overrides)
    refuse_early(loaded, resume)
    flags = [flag for flag, given in (("--resume", resume), ("--force", force)) if given]
    arguments = [recipe, *(part for assignment in overrides for part in ("--set", assignment)), *flags]
    gpu = launcher.has_gpu()
    environment, launch = launcher.launch_arguments(loaded.method, processes, gpu, config, extra)
    assignments = [f"{key}={value}" for key, value in environment.items()]
    terminal.echo("$ " + shlex.join([*assignments, "accelerate", "launch", *launch, *arguments]))
    if (processes or 1) > 1 or config is not None or extra:
        sys.exit(launcher.run([sys.executable, "-m", "finetune.cli.launcher", *launch, *arguments], environment))
    # One process needs no launcher. Torch reads the number of threads when it is imported.
    os.environ["OMP_NUM_THREADS"] = str(threads(1))
    with report_errors(), stoppable():  # here, because click would turn every signal into Ctrl-C
        launch_target.train(loaded, resume, force)
