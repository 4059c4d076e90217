"""`ft train`: `accelerate launch` of the method's script, with every flag that it would otherwise ask or warn about."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

import click

from finetune.cli.process import FOREIGN, LAST_WORDS, LAUNCHER, foreign
from finetune.config.loader import load_recipe
from finetune.config.schema import Method
from finetune.errors import UserError, did_you_mean
from finetune.estimate.hardware.cpu import threads
from finetune.paths import ASSETS

CONFIGS = ASSETS / "accelerate"
SCRIPTS = Path(__file__).resolve().parent.parent


@click.command()
@click.argument("recipe")
@click.option(
    "overrides",
    "--set",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override one value of the recipe, such as train.batch_size=2.",
)
@click.option(
    "--init", help="A LoRA's file to go on from, in diffusers' or kohya's format; short for --set adapter.init_lora=…"
)
@click.option("--resume", is_flag=True, help="Go on with the run in the recipe's folder.")
@click.option("--force", is_flag=True, help="Train even what the estimate says does not fit into memory.")
@click.option(
    "--processes", type=click.IntRange(min=1), help="One for each GPU; 1, or as the configuration of --accelerate says."
)
@click.option(
    "--accelerate", "config", metavar="NAME", help="A configuration of Accelerate: one that comes with ft, or a file."
)
@click.option(
    "--launch",
    "extra",
    multiple=True,
    metavar="KEY=VALUE",
    help="One more argument of `accelerate launch`, such as machine_rank=1.",
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
    """Train by a recipe, or go on with a run.

    RECIPE is a YAML file, or the name of a bundled recipe. What will not fit into the GPU is refused, with the edit that
    makes it fit. This is `accelerate launch` of finetune/lora.py, full.py or
    scratch.py, and prints that command. Ctrl-C finishes the step, saves and stops, a second one stops at once;
    --resume goes on.

    --accelerate takes many-gpus or many-machines (each process holds the whole model), fsdp2 (each holds a part of it), one-gpu, or a
    file of your own. deepspeed-zero2 and -zero3 come too, and are refused: fsdp2 shares out the same.
    """
    overrides += (f"train.precision={precision}",) if precision else ()
    overrides += (f"adapter.init_lora={init}",) if init else ()
    method = load_recipe(recipe, overrides).method  # whatever is wrong with the recipe is said now, not in ten seconds
    flags = [flag for flag, given in (("--resume", resume), ("--force", force)) if given]
    arguments = [recipe, *(part for assignment in overrides for part in ("--set", assignment)), *flags]
    environment, launch = launcher(method, processes, has_gpu(), config, extra)
    click.echo(
        "$ "
        + shlex.join(
            [*(f"{key}={value}" for key, value in environment.items()), "accelerate", "launch", *launch, *arguments]
        )
    )
    sys.stdout.flush()
    sys.exit(run([sys.executable, "-m", "accelerate.commands.launch", *launch, *arguments], environment))


def launcher(
    method: Method, processes: int | None, gpu: bool, config: str | None = None, extra: tuple[str, ...] = ()
) -> tuple[dict[str, str], list[str]]:
    """Environment and arguments of `accelerate launch`, the script last. Nothing is left to ask, to guess or to warn about.

    Args:
        config: the name or the file of a configuration; what it says is not said here.
        extra: `key=value`, each one more argument.
    """
    environment = {}
    script = str(SCRIPTS / f"{method}.py")
    flags = ["--quiet", "--dynamo_backend", "no", "--mixed_precision", "no"]
    for assignment in extra:
        key, equals, value = assignment.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(
                f"--launch needs KEY=VALUE, not {assignment!r}", remedy="for example: --launch machine_rank=1"
            )
        flags.append(f"--{key}={value}")
    if config is not None:
        file = find_config(config)
        text = file.read_text(encoding="utf-8")
        several = _said(text, "distributed_type") in ("MULTI_GPU", "FSDP")
        here = processes or int(_said(text, "num_processes") or 1) // int(_said(text, "num_machines") or 1)
        flags += ["--config_file", str(file), *(("--num_processes", str(processes)) if processes else ())]
        flags += ["--num_cpu_threads_per_process", str(threads(max(1, here)))]
    else:
        several = (processes or 1) > 1
        flags += [
            "--num_processes",
            str(processes or 1),
            "--num_machines",
            "1",
            "--num_cpu_threads_per_process",
            str(threads(processes or 1)),
        ]
        flags += ["--multi_gpu", "--main_process_port", "0"] if several else []
    if not gpu and several:
        environment["ACCELERATE_USE_CPU"] = "true"  # several processes are "multi-GPU" to Accelerate, on CPUs too
    elif not gpu:
        flags.append("--cpu")
    return environment, [*flags, script]


def find_config(name_or_file: str) -> Path:
    """A configuration of Accelerate that comes with the project, by its name, or one of the user's, by its file.

    Raises:
        UserError: there is none, or it is for an engine that the trainer cannot work with.
    """
    known = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    file = known.get(name_or_file, Path(name_or_file))
    if not file.is_file():
        remedy = f"{did_you_mean(name_or_file, known)} Or give a file"
        raise UserError(f'there is no configuration "{name_or_file}"', where="--accelerate", remedy=remedy)
    text = file.read_text(encoding="utf-8")
    if (engine := _said(text, "distributed_type")) in FOREIGN:
        raise foreign(engine)
    if engine == "FSDP" and _said(text, "fsdp_version") != "2":
        raise foreign("FSDP1")
    return file


def _said(text: str, key: str) -> str:
    """The value of one `key: value` line of a configuration, "" if it has none."""
    found = re.search(rf"^\s*{key}:\s*['\"]?([\w-]*)", text, re.MULTILINE)
    return found[1] if found else ""


def has_gpu() -> bool:
    """Whether some GPU's device is there, without the seconds that importing torch takes. Torch has the last word later on."""
    devices = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, Windows' subsystem for Linux, AMD
    return sys.platform == "darwin" or any(Path(device).exists() for device in devices)


def run(arguments: list[str], environment: dict[str, str]) -> int:
    """Run the launcher to its end; returns the training script's own exit code, or 128 + the signal that ended it.

    Ctrl-C, SIGTERM and a closed terminal are passed on to the training processes themselves, which finish their step and
    save: `accelerate launch` would leave a single one behind, and kill several after 30 seconds. It has a process group
    of its own, and is deaf to Ctrl-C, else it would end with a traceback before the training has stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        last_words = Path(folder) / "words"
        given = {**os.environ, **environment, LAST_WORDS: str(last_words), LAUNCHER: str(os.getpid())}
        launched = subprocess.Popen(arguments, env=given, process_group=0, preexec_fn=_deafen)
        received: list[int] = []

        def pass_on(number: int, frame: FrameType | None) -> None:
            """Tell the processes that train, SIGINT as it is and others as SIGTERM; before any began, end the launcher and what it has started."""
            received.append(number)
            wish = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
            if processes := [int(file.name) for file in Path(folder).iterdir() if file.name.isdigit()]:
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, wish)
            else:  # none has begun: the launcher, and what it has just started
                os.killpg(launched.pid, signal.SIGTERM)

        heard = [
            number
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN
        ]  # nohup's stays
        before = {number: signal.signal(number, pass_on) for number in heard}
        try:
            code = launched.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if last_words.is_file():
            told, _, words = last_words.read_text(encoding="utf-8").partition("\n")
            click.echo(words, err=True)
            code = int(told or 1)
        return 128 + received[0] if code and received else code


def _deafen() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
