"""Training in several processes: the arguments of `accelerate launch`, and running it with exact exit codes.

`python -m finetune.cli.launcher` is `accelerate launch`, except that its exit code tells how a training process ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType

from finetune import terminal
from finetune.cli.process import LAST_WORDS, LAUNCHER
from finetune.config.schema import Method
from finetune.errors import UserError, did_you_mean
from finetune.estimate.hardware.cpu import threads
from finetune.paths import ASSETS

CONFIGS = ASSETS / "accelerate"
SCRIPTS = Path(__file__).resolve().parent.parent
UNSUPPORTED = ("DEEPSPEED", "MEGATRON_LM")


def unsupported(engine: str) -> UserError:
    """The refusal of an engine that replaces the optimizer and shards weights and state in its own way."""
    return UserError(
        f"{engine} is not supported: its sharded optimizer state cannot be resumed bit for bit",
        where="the Accelerate configuration, distributed_type",
        remedy="use FSDP2, which also shards weights, gradients and optimizer state: ft train --accelerate fsdp2",
    )


def refuse_unsupported_engines() -> None:
    """Raise for engines of Accelerate that the trainer does not support; the launcher names them in the environment."""

    def requested(engine: str) -> bool:
        return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"

    for engine in UNSUPPORTED:
        if requested(engine):
            raise unsupported(engine)
    if requested("FSDP") and os.environ.get("FSDP_VERSION") != "2":
        raise unsupported("FSDP1")


def launch_arguments(
    method: Method, processes: int | None, gpu: bool, config: str | None = None, extra: tuple[str, ...] = ()
) -> tuple[dict[str, str], list[str]]:
    """Environment and arguments of `accelerate launch`, the script last; nothing is left for it to ask or warn about.

    Args:
        config: the name or the file of an Accelerate configuration; what it sets is not set here.
        extra: `key=value`, one more argument each.
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
        several = _value(text, "distributed_type") in ("MULTI_GPU", "FSDP")
        here = processes or int(_value(text, "num_processes") or 1) // int(_value(text, "num_machines") or 1)
        flags += ["--config_file", str(file), *(("--num_processes", str(processes)) if processes else ())]
        flags += ["--num_cpu_threads_per_process", str(threads(max(1, here)))]
    else:
        several = (processes or 1) > 1
        flags += ["--num_processes", str(processes or 1), "--num_machines", "1"]
        flags += ["--num_cpu_threads_per_process", str(threads(processes or 1))]
        flags += ["--multi_gpu", "--main_process_port", "0"] if several else []
    if not gpu and several:
        environment["ACCELERATE_USE_CPU"] = "true"  # several processes are "multi-GPU" to Accelerate, on CPUs too
    elif not gpu:
        flags.append("--cpu")
    return environment, [*flags, script]


def find_config(name_or_file: str) -> Path:
    """A bundled Accelerate configuration by name, or the user's own by its file.

    Raises:
        UserError: there is none, or it selects an engine that the trainer does not support.
    """
    known = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    file = known.get(name_or_file, Path(name_or_file))
    if not file.is_file():
        if name_or_file.startswith("deepspeed"):
            raise unsupported("DEEPSPEED")
        remedy = f"{did_you_mean(name_or_file, known)} Or give a file"
        raise UserError(f'there is no Accelerate configuration "{name_or_file}"', where="--accelerate", remedy=remedy)
    text = file.read_text(encoding="utf-8")
    if (engine := _value(text, "distributed_type")) in UNSUPPORTED:
        raise unsupported(engine)
    if engine == "FSDP" and _value(text, "fsdp_version") != "2":
        raise unsupported("FSDP1")
    return file


def _value(text: str, key: str) -> str:
    """The value of one `key: value` line of a configuration, "" if it has none."""
    match = re.search(rf"^\s*{key}:\s*['\"]?([\w-]*)", text, re.MULTILINE)
    return match[1] if match else ""


def has_gpu() -> bool:
    """Whether a GPU's device file exists, without the seconds that importing torch takes."""
    devices = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, Windows' subsystem for Linux, AMD
    return sys.platform == "darwin" or any(Path(device).exists() for device in devices)


def run(arguments: list[str], environment: dict[str, str]) -> int:
    """Run a launcher to its end; returns the training processes' exit code, or 128 + n for signal n.

    Ctrl-C, SIGTERM and a closed terminal are passed on to the training processes themselves, which finish their step
    and save: `accelerate launch` would leave a single one behind, and kill several after 30 seconds. It has a process
    group of its own and ignores Ctrl-C, else it would end with a traceback before the training has stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        last_words = Path(folder) / "words"
        given = {**os.environ, **environment, LAST_WORDS: str(last_words), LAUNCHER: str(os.getpid())}
        launched = subprocess.Popen(arguments, env=given, process_group=0, preexec_fn=_ignore_interrupts)
        received: list[int] = []

        def pass_on(number: int, frame: FrameType | None) -> None:
            """Pass SIGINT on as it is, others as SIGTERM; before any process has begun, end the launcher itself."""
            received.append(number)
            wish = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
            if processes := [int(file.name) for file in Path(folder).iterdir() if file.name.isdigit()]:
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, wish)
            else:
                os.killpg(launched.pid, signal.SIGTERM)

        candidates = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        handled = [number for number in candidates if signal.getsignal(number) != signal.SIG_IGN]  # nohup's stays
        before = {number: signal.signal(number, pass_on) for number in handled}
        try:
            code = launched.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if last_words.is_file():
            last_code, _, message = last_words.read_text(encoding="utf-8").partition("\n")
            terminal.echo(message, err=True)
            return int(last_code or 1)
    code = 128 - code if code < 0 else code
    if code and received:
        return 128 + received[0]
    if code > 128:
        terminal.echo("\n".join(killed(code - 128).lines()), err=True)
    return code


def killed(number: int) -> UserError:
    """The message about a training process that signal `number` ended: it could not leave one itself."""
    name = signal.Signals(number).name if number in {known.value for known in signal.Signals} else "unknown"
    if number == signal.SIGKILL:
        return UserError(
            f"a training process was killed (signal {number}, {name}), probably because the machine ran out of memory",
            remedy="continue from the last checkpoint with --resume, with fewer processes or a smaller train.batch_size"
            " (and train.accumulation for the same number of images a step)",
        )
    return UserError(
        f"a training process crashed (signal {number}, {name})",
        remedy="continue from the last checkpoint with --resume; if it happens again, run `ft doctor`",
    )


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """Run `accelerate launch`; exit with the code of the first training process that failed, 128 + n for signal n."""
    terminal.silence_libraries()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print their own errors
    from subprocess import CalledProcessError

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args()
    arguments.quiet = False  # else the exit code is 1 whatever happened
    code = 0
    try:
        launch_command(arguments)
    except CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    sys.exit(128 - code if code < 0 else code)


if __name__ == "__main__":
    main()
