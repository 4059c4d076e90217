"""`ft train` as a launcher, and the scripts that it launches: flags, exit codes, signals, whole runs."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.cli import launcher, process
from finetune.errors import UserError
from finetune.estimate.hardware import cpu
from finetune.training import run_list
from tests.helpers import tiny
from tests.helpers.commands import CHECKOUT, python, shell

# -- the launcher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "gpu"), [(1, False), (1, True), (2, False), (2, True)])
def test_launch_arguments_are_accepted_by_accelerate_without_warnings(
    processes: int, gpu: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands import launch
    from accelerate.commands.config.config_args import default_yaml_config_file

    assert not Path(default_yaml_config_file).exists(), "the tests' own Hugging Face folder must be empty"
    monkeypatch.delenv("OMP_NUM_THREADS")
    environment, arguments = launcher.launch_arguments("lora", processes, gpu)
    with caplog.at_level(logging.DEBUG):
        parsed, _, _ = launch._validate_launch_command(
            launch.launch_command_parser().parse_args([*arguments, "recipe", "--set", "a=b"])
        )
    assert not caplog.records
    assert parsed.num_processes == processes and parsed.multi_gpu == (processes > 1) and parsed.mixed_precision == "no"
    assert (parsed.cpu or environment.get("ACCELERATE_USE_CPU") == "true") == (not gpu)
    assert parsed.num_cpu_threads_per_process >= 1
    assert parsed.training_script == str(CHECKOUT / "finetune" / "lora.py")
    assert parsed.training_script_args == ["recipe", "--set", "a=b"]


@pytest.mark.parametrize("name", sorted(path.stem for path in launcher.CONFIGS.glob("*.yaml")))
def test_bundled_accelerate_config_is_valid(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked by Accelerate's reader, which refuses unknown keys, its launcher and, where possible, its plugin."""
    from accelerate.commands import launch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = launcher.CONFIGS / f"{name}.yaml"
    text = file.read_text()
    assert re.search(
        r"[Nn]ot (tested )?on (a )?(GPU|separate)",
        " ".join(text.partition("\ncompute_environment")[0].replace("#", "").split()),
    ), "each says what it is not tested on"
    config = load_config_from_file(str(file))
    parser = launch.launch_command_parser()
    parsed, _, _ = launch._validate_launch_command(parser.parse_args(["--config_file", str(file), "script.py"]))
    several = {"one-gpu": 1, "many-machines": 16}.get(name, 2)
    assert (config.num_processes, parsed.num_processes, parsed.mixed_precision) == (several, several, "no")
    keys = {action.dest for action in parser._actions}
    assert {key if key.startswith("fsdp") else f"fsdp_{key}" for key in config.fsdp_config} <= keys
    assert launcher.find_config(name) == file
    assert f"--config_file {file}" in " ".join(
        launcher.launch_arguments("lora", None, True, name, ("machine_rank=1",))[1]
    )
    if config.fsdp_config:
        for key, value in prepare_multi_gpu_env(parsed).items():
            monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        launcher.refuse_unsupported_engines()
        monkeypatch.setenv("FSDP_VERSION", "1")
        with pytest.raises(UserError, match="FSDP1 is not supported"):
            launcher.refuse_unsupported_engines()
        older = tmp_path / "mine.yaml"
        older.write_text(text.replace("fsdp_version: 2", "fsdp_version: 1"))
        with pytest.raises(UserError, match="FSDP1 is not supported"):
            launcher.find_config(str(older))


def test_deepspeed_config_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_processes: 2\n")
    for name in (str(mine), "deepspeed-zero2"):
        with pytest.raises(UserError, match=r"DEEPSPEED is not supported.*\n.*\n.*--accelerate fsdp2"):
            launcher.find_config(name)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="--accelerate fsdp2"):
        launcher.refuse_unsupported_engines()


@pytest.mark.parametrize(
    ("config", "extra", "says"),
    [("many", (), "many-gpus"), ("one-gpu", ("machine_rank",), "KEY=VALUE"), ("one-gpu", ("--x y=1",), "KEY=VALUE")],
)
def test_unknown_accelerate_config_or_key_is_refused(config: str, extra: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError) as caught:
        launcher.launch_arguments("lora", None, True, config, extra)
    assert says in str(caught.value)


def test_threads_follow_omp_num_threads_or_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu.threads(2) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert [cpu.threads(processes) for processes in (1, 2, 100)] == [8, 4, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert cpu.threads(1) == 2, "a container with two cores of a large machine"


# Stands for Accelerate: a launcher that starts the script, waits, and turns every failure into exit code 1.
_LAUNCHER = (
    "import subprocess, sys; sys.exit(1 if subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode else 0)"
)


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("pass", 0, ""),
        ("raise UserError('no such thing', remedy='try another')", 2, "error: no such thing\n  fix:  try another\n"),
        ("raise KeyboardInterrupt", 130, "\nstopped; --resume continues from the last checkpoint\n"),
        ("os._exit(9)", 1, ""),
    ],
)
def test_script_exit_code_and_messages_pass_through_the_launcher(
    body: str, code: int, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "import os\nfrom finetune.cli.process import training_process\nfrom finetune.errors import UserError\n"
    script += f"with training_process():\n    {body}"
    assert launcher.run([sys.executable, "-c", _LAUNCHER, script], {"PYTHONPATH": str(CHECKOUT)}) == code
    assert capfd.readouterr().err == says


def test_killed_training_process_is_reported_with_its_signal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As when the kernel kills it for memory; through Accelerate's and torch's own launchers."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)\n"
    )
    environment, arguments = launcher.launch_arguments("lora", 2, False)
    command = [sys.executable, "-m", "finetune.cli.launcher", *arguments[:-1], str(script)]
    assert launcher.run(command, environment | {"PYTHONPATH": str(CHECKOUT)}) == 128 + signal.SIGKILL
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == (
        "error: a training process was killed (signal 9, SIGKILL), probably because the machine ran out of memory"
    )
    assert lines[1].startswith("  fix:  continue from the last checkpoint with --resume") and len(lines) == 2


@pytest.mark.parametrize(("number", "says"), [(9, "probably because the machine ran out of memory"), (11, "SIGSEGV")])
def test_launcher_ended_by_a_signal_is_reported(number: int, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    body = f"import os; os.kill(os.getpid(), {number})"
    assert launcher.run([sys.executable, "-c", body], {}) == 128 + number
    assert says in capfd.readouterr().err


# The same with two processes, as torch's launcher starts them.
_LAUNCHER_OF_TWO = """
import os, subprocess, sys
started = [subprocess.Popen([sys.executable, '-c', sys.argv[1]], env=os.environ | {'RANK': rank, 'WORLD_SIZE': '2'}) for rank in '01']
sys.exit(1 if any([process.wait() for process in started]) else 0)
"""


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    "other", ["time.sleep(0.1); raise RuntimeError('Connection closed by peer')", "time.sleep(60)"]
)
def test_error_of_one_process_is_shown_once_and_ends_all(
    rank: str, other: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others lose their connection to it (on CPUs), or would wait for it (on GPUs); neither is reported."""
    script = "import os, time\nfrom finetune.cli.process import training_process\nfrom finetune.errors import UserError\nwith training_process():\n"
    script += f"    if os.environ['RANK'] == '{rank}': raise UserError('the disk is full')\n    {other}"
    assert launcher.run([sys.executable, "-c", _LAUNCHER_OF_TWO, script], {"PYTHONPATH": str(CHECKOUT)}) == 2
    assert capfd.readouterr().err == "error: the disk is full\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_stops_the_script_after_its_cleanup(number: signal.Signals, code: int, tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from finetune.cli.process import training_process
with training_process():
    try:
        Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(60)
    finally:
        time.sleep(0.3)  # such as a checkpoint being written
        Path({str(tmp_path / "finished")!r}).touch()
"""
    outer = f"import sys; from finetune.cli import launcher; sys.exit(launcher.run([sys.executable, '-c', {_LAUNCHER!r}, {script!r}], {{}}))"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}

    def as_in_a_terminal() -> None:  # a background job ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        [sys.executable, "-c", outer], env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal
    ) as process:
        for _ in range(300):
            if (tmp_path / "ready").exists():
                break
            time.sleep(0.05)
        process.send_signal(number)
        assert process.stderr is not None
        told = process.stderr.read()
        assert process.wait(20) == code
    assert (tmp_path / "finished").exists()
    assert told == "\nstopped; --resume continues from the last checkpoint\n"


@pytest.mark.parametrize("gone", ["accelerate's launcher", "ft train"])
def test_script_ends_when_its_launcher_is_gone(gone: str, tmp_path: Path) -> None:
    """`accelerate launch` dies of SIGTERM and leaves its script running; `ft train` may be killed."""
    script = f"""
import time
from pathlib import Path
from finetune.cli.process import training_process
with training_process():
    Path({str(tmp_path / "ready")!r}).touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt as stopped:
        Path({str(tmp_path / "stopped")!r}).write_text(str(stopped.number))
"""
    if gone == "ft train":
        outer = f"from finetune.cli import launcher; launcher.run([{sys.executable!r}, '-c', {_LAUNCHER!r}, {script!r}], {{}})"
    else:
        outer = f"import sys; sys.argv = ['', {script!r}]; {_LAUNCHER}"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "ACCELERATE_MIXED_PRECISION": "no"}
    with subprocess.Popen([sys.executable, "-c", outer], env=environment) as process:
        _until((tmp_path / "ready").exists)
        process.kill() if gone == "ft train" else process.terminate()
    _until((tmp_path / "stopped").exists)
    assert (tmp_path / "stopped").read_text() == "15"


def _until(holds: Callable[[], bool]) -> None:
    for _ in range(400):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("timed out")


def test_report_errors_of_several_processes_shows_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    before = signal.getsignal(signal.SIGTERM)
    for rank, expected in (("0", []), ("1", [3])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit), process.report_errors():
            raise UserError("no")
        assert waited == expected, "the other ranks must wait until the launcher ends them"
    signal.signal(signal.SIGTERM, before)
    capsys.readouterr()
    monkeypatch.setenv(process.LAST_WORDS, str(tmp_path / "words"))
    for word in ("first", "second"):
        with pytest.raises(SystemExit), process.report_errors():
            raise UserError(word)
    assert (tmp_path / "words").read_text() == "2\nerror: first"
    assert capsys.readouterr().err == ""


# -- the scripts, end to end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full", "scratch"])
def test_script_runs_from_any_folder_and_refuses_other_methods(method: str, tmp_path: Path) -> None:
    other = "scratch/emoji-vae" if method != "scratch" else "lora/emoji"
    found = shell(sys.executable, CHECKOUT / "finetune" / f"{method}.py", other, cwd=tmp_path)
    assert found.returncode == 2 and "this recipe's method is" in found.stderr and "Traceback" not in found.stderr


def test_ft_train_killed_resumes_from_another_folder_and_finishes(tmp_path: Path) -> None:
    """As a user runs `ft train`: started elsewhere, killed, resumed.

    It is quiet, and names the written files at the end.
    """
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(tiny.text("sd15", "lora", Path("run")))
    asked = [
        sys.executable,
        "-m",
        "finetune.cli.main",
        "train",
        "mine.yaml",
        "--set",
        "train.steps=40",
        "--set",
        "train.checkpoint_every=1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(
        asked, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("$ accelerate launch ")
        process.stdout.close()  # as with `| head`: training continues
        for _ in range(1200):
            if (tmp_path / "run" / "checkpoints").is_dir() and any((tmp_path / "run" / "checkpoints").glob("step-*")):
                break
            time.sleep(0.05)
        process.terminate()
        assert process.stderr is not None
        assert re.search(
            r"SIGTERM: finishing this step.*\n\nstopped after step \d+, which is saved; .*--resume continues",
            process.stderr.read(),
            re.S,
        )
        assert process.wait(60) == 143
    stopped = run_list.look(tmp_path / "run")
    assert stopped.state == "stopped" and stopped.saved[-1] == stopped.step < stopped.steps == 40

    again = python(*asked[1:], "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("$ accelerate launch --quiet ") and " --num_processes 1 " in again.stdout
    assert "\nresuming after step " in again.stdout
    assert "\nadapter: " in again.stdout
    noise = [
        line
        for line in again.stderr.splitlines()
        if not line.startswith(("step ", "encoding ", "samples ", "reading images "))
    ]
    assert not noise
    told = again.stdout.partition("\n── written ")[2].partition("\n")[2]
    places = [tmp_path / line.split("  ")[-1].strip() for line in told.splitlines()]
    named = [place.relative_to(tmp_path / "run").as_posix() for place in places]
    assert named == ["final/pytorch_lora_weights.safetensors", "before-after.png", "report.html"]
    assert all(place.is_file() for place in places)
    os.umask(mask := os.umask(0))
    assert places[0].stat().st_mode & 0o777 == 0o666 & ~mask, "others must be able to read files meant for sharing"
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
