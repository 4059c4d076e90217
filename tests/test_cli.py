"""The command, the entry scripts, the Python API and the packaging: what a person touches first."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import finetune
from finetune import cli, entry, job, pretrained
from finetune.commands import train
from finetune.engine import runs
from finetune.errors import UserError
from finetune.estimate import cpu
from finetune.recipe import Recipe, bundled_recipes
from tests import tiny

CHECKOUT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "datasets", "PIL", "safetensors", "bitsandbytes", "pydantic"}


def ft(*arguments: str) -> int:
    """`ft …` in this process; returns the exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def shell(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own that finds this checkout by path only."""
    everything = {**os.environ, **environment}
    return subprocess.run(list(map(str, arguments)), cwd=cwd, env=everything, capture_output=True, text=True, timeout=300)


def python(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return shell(sys.executable, *arguments, cwd=cwd, **{"PYTHONPATH": str(CHECKOUT), **environment})


# -- light ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statements",
    [
        "from finetune import cli; cli.main(['--help'])",
        "from finetune import cli; cli.main(['recipes'])",
        "from finetune import cli; cli.main(['gpus'])",
        "from finetune import cli; cli.main(['gpus', 'h200'])",
        "from finetune import cli; cli.main(['train', 'lora/emoji', '--set', 'a=b'])",
        "import finetune; finetune.load_recipe('lora/emoji')",
        "from finetune import planning, pretrained, seeds, strictyaml; from finetune.data import captions, pictures, scan, sources",
        "from finetune.report import nets, page, tables; from finetune.commands import check, doctor, export, gpus, recipes, sample, train",
    ],
)
def test_nothing_heavy_is_imported(statements: str, tmp_path: Path) -> None:
    code = f"import sys, atexit; atexit.register(lambda: print('\\n' + repr(sorted(sys.modules)), file=sys.stderr)); {statements}"
    found = python("-c", code, cwd=tmp_path)
    modules = eval(found.stderr.splitlines()[-1])
    assert "finetune" in modules
    assert not HEAVY & set(modules)


def test_help_answers_at_once(tmp_path: Path) -> None:
    wall, processor = [], []
    for _ in range(5):
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = python("-m", "finetune.cli", "--help", cwd=tmp_path).stdout
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - start)
        processor.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
    assert all(f"  {name}" in shown and line in shown for name, line in cli.COMMANDS.items())
    assert min(processor) < 0.3, "seconds; 0.15 where this was written"
    assert min(wall) < 0.9, "seconds; wider, as others may be at work on the machine"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_one_line_help_is_the_commands_own(name: str) -> None:
    command = cli.ft.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None and command.help is not None
    assert command.help.splitlines()[0] == cli.COMMANDS[name]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], 'did you mean "train"?'),
        (["train", "lora/emojy"], 'did you mean "lora/emoji"'),
        (["train", "lora/emoji", "--resum"], "--resume"),
        (["train", "lora/emoji", "--set", "train.step=1"], 'did you mean "steps"?'),
        (["train", "lora/emoji", "--processes", "0"], "--processes"),
        (["train"], "RECIPE"),
        (["recipes", "shwo"], "show"),
        (["recipes", "show", "lora/emojy"], 'did you mean "lora/emoji"'),
        (["check", "lora/emoji", "--set", "model.family=sdx"], 'did you mean "sdxl"?'),
        (["check", "lora/emoji", "--set", "model.path=/no/model"], 'no file or folder "/no/model"'),
        (["check", "lora/emoji", "--set", "model.path=some/model", "--set", "data.path=/no/pictures"], "/no/pictures"),
        (["sample", "/no/run", "--prompt", "a"], "/no/run"),
        (["export", "/no/run"], "/no/run"),
        (["export", "/no/run", "--format", "khya"], "kohya"),
        (["gpus", "a100"], "a100-40gb or a100-80gb"),
        (["gpus", "--prices", "/no/prices.yaml"], "/no/prices.yaml"),
    ],
)
def test_a_mistake_ends_with_code_2_and_says_what_to_do(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ft(*arguments) == 2
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("overrides", "says", "remedy"),
    [
        (["model.path=HERE/file.ckpt"], "is no .safetensors file", "a diffusers folder"),
        (["model.path=HERE/empty"], "it has no model_index.json", "a diffusers folder"),
        (["model.path=HERE/damaged"], "cannot be read", "copy or download"),
        (["model.path=HERE/sdxl"], "holds a StableDiffusionXLPipeline", "set model.family: sdxl"),
        (["model.path=HERE/other"], "holds a KandinskyV22Pipeline", "give another"),
        (["model.path=a/b/c"], 'no file or folder "a/b/c"', "hub name"),
        (["model.path=a/b", "model.vae=./nowhere"], 'no file or folder "./nowhere"', "VAE"),
        (["model.path=a/b", "model.vae=HERE/empty"], "holds no trained VAE", "config.json"),
    ],
)
def test_what_the_model_path_leads_to_is_looked_at(overrides: list[str], says: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").touch()
    (tmp_path / "empty").mkdir()
    for name, content in {
        "damaged": "{",
        "sdxl": '{"_class_name": "StableDiffusionXLPipeline"}',
        "other": '{"_class_name": "KandinskyV22Pipeline"}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(content)
    with pytest.raises(UserError) as caught:
        pretrained.check(finetune.load_recipe("lora/emoji", [override.replace("HERE", str(tmp_path)) for override in overrides]))
    assert says in caught.value.problem and remedy in caught.value.remedy


def test_models_that_may_be_there_pass(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for path in (str(tmp_path / "model.safetensors"), "stable-diffusion-v1-5/stable-diffusion-v1-5", "gpt2", str(tiny.pipeline("sd15"))):
        pretrained.check(finetune.load_recipe("lora/emoji", [f"model.path={path}"]))


# -- commands ---------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_whom_they_are_for_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == bundled_recipes()
    assert all("  For " in line for line in lines)
    assert ft("recipes", "show", "lora/emoji") == 0
    assert capsys.readouterr().out == (CHECKOUT / "recipes" / "lora" / "emoji.yaml").read_text(encoding="utf-8")


def test_copying_a_recipe_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    original = (CHECKOUT / "recipes" / "lora" / "emoji.yaml").read_text(encoding="utf-8")
    assert ft("recipes", "copy", "lora/emoji") == 0
    assert Path("lora-emoji.yaml").read_text(encoding="utf-8") == original
    Path("lora-emoji.yaml").write_text("mine")
    assert ft("recipes", "copy", "lora/emoji") == 2
    assert Path("lora-emoji.yaml").read_text() == "mine" and "not touched" in capsys.readouterr().err
    assert ft("recipes", "copy", "lora/emoji", "other.yaml") == 0
    assert Path("other.yaml").is_file()
    assert ft("recipes", "copy", "lora/emoji", "no/folder/x.yaml") == 2
    Path("there").mkdir()
    assert ft("recipes", "copy", "lora/emoji", "there") == 0
    assert Path("there/lora-emoji.yaml").is_file()


def test_check_shows_data_and_plan_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [
        "check",
        "lora/emoji",
        *("--set", f"model.path={tiny.pipeline('emoji')}"),
        *("--set", "train.batch_size=4"),
        *("--set", "train.steps=300"),
    ]
    assert ft(*asked) == 0
    out = capsys.readouterr().out
    assert "380 pictures ÷ batch 4 ÷ accumulation 1 = 95 steps an epoch → 300 steps = 3.158 epochs" in out
    assert "train.batch_size=4" in out.splitlines()[-1], "the command that comes next"
    assert not list(tmp_path.iterdir())


def test_sample_and_export_pass_on_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import finetune.commands.export
    import finetune.sampling

    taken: list[object] = []

    def take(*arguments: object, **named: object) -> list[Path]:
        taken[:] = [arguments, named]
        return [tmp_path / "a"]

    monkeypatch.setattr(finetune.sampling, "sample", take)
    monkeypatch.setattr(finetune.commands.export, "export", take)
    named = ["--steps", "5", "--guidance", "2.5", "--sampler", "ddim", "--eta", "0.5", "--out", "there"]
    assert ft("sample", "runs/x", "--prompt", "a", "--prompt", "b c", "--seed", "3", "--seed", "4", *named) == 0
    asked = {"steps": 5, "guidance": 2.5, "negative": None, "out": Path("there"), "sampler": "ddim", "eta": 0.5, "truncation": None}
    assert taken == [("runs/x", ("a", "b c"), (3, 4)), asked]
    assert ft("sample", "runs/x") == 0
    assert taken == [("runs/x", (), None), dict.fromkeys(asked)]
    assert str(tmp_path) in capsys.readouterr().out
    assert ft("export", "runs/x", "--format", "kohya", "--dtype", "float16", "--out", "x.safetensors") == 0
    assert taken == [(Path("runs/x"), "kohya", False, "float16", Path("x.safetensors"), None), {}]
    assert ft("export", "runs/x", "--merge", "--checkpoint", "best") == 0
    assert taken == [(Path("runs/x"), "diffusers", True, None, None, "best"), {}]


# -- ft train: the launcher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "gpu"), [(1, False), (1, True), (2, False), (2, True)])
def test_accelerate_takes_our_flags_without_a_remark(
    processes: int, gpu: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands import launch
    from accelerate.commands.config.config_args import default_yaml_config_file

    assert not Path(default_yaml_config_file).exists(), "the tests' own Hugging Face folder is empty"
    monkeypatch.delenv("OMP_NUM_THREADS")
    environment, arguments = train.launcher("lora", processes, gpu)
    with caplog.at_level(logging.DEBUG):
        parsed, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args([*arguments, "recipe", "--set", "a=b"]))
    assert not caplog.records
    assert parsed.num_processes == processes and parsed.multi_gpu == (processes > 1) and parsed.mixed_precision == "no"
    assert (parsed.cpu or environment.get("ACCELERATE_USE_CPU") == "true") == (not gpu)
    assert parsed.num_cpu_threads_per_process >= 1
    assert parsed.training_script == str(CHECKOUT / "finetune" / "lora.py")
    assert parsed.training_script_args == ["recipe", "--set", "a=b"]


@pytest.mark.parametrize("name", sorted(path.stem for path in train.CONFIGS.glob("*.yaml")))
def test_accelerate_reads_the_configurations_that_come_with_ft(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Accelerate's own reader, which refuses unknown keys, its own launcher's checks, and its own plugin where one can be made here."""
    from accelerate.commands import launch
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = train.CONFIGS / f"{name}.yaml"
    text = file.read_text()
    assert "ntested" in text.partition("\ncompute_environment")[0], "each says that no GPU has seen it"
    config = load_config_from_file(str(file))
    parser = launch.launch_command_parser()
    parsed, _, _ = launch._validate_launch_command(parser.parse_args(["--config_file", str(file), "script.py"]))
    several = {"one-gpu": 1, "many-machines": 16}.get(name, 2)
    assert (config.num_processes, parsed.num_processes, parsed.mixed_precision) == (several, several, "no")
    keys = {action.dest for action in parser._actions}
    assert {key if key.startswith("fsdp") else f"fsdp_{key}" for key in config.fsdp_config} <= keys
    assert config.deepspeed_config.keys() <= keys
    if config.deepspeed_config:
        with pytest.raises(UserError, match="DEEPSPEED is not supported"):
            train.find_config(name)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(UserError, match="--accelerate fsdp2"):
            entry.refuse_foreign_engines()
        return
    assert train.find_config(name) == file
    assert f"--config_file {file}" in " ".join(train.launcher("lora", None, True, name, ("machine_rank=1",))[1])
    if config.fsdp_config:
        for key, value in prepare_multi_gpu_env(parsed).items():
            monkeypatch.setenv(key, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        entry.refuse_foreign_engines()
        monkeypatch.setenv("FSDP_VERSION", "1")
        with pytest.raises(UserError, match="FSDP1 is not supported"):
            entry.refuse_foreign_engines()
        older = tmp_path / "mine.yaml"
        older.write_text(text.replace("fsdp_version: 2", "fsdp_version: 1"))
        with pytest.raises(UserError, match="FSDP1 is not supported"):
            train.find_config(str(older))


@pytest.mark.parametrize(
    ("config", "extra", "says"), [("many", (), "many-gpus"), ("one-gpu", ("machine_rank",), "KEY=VALUE"), ("one-gpu", ("--x y=1",), "KEY=VALUE")]
)
def test_a_configuration_that_is_not_there_is_said(config: str, extra: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError) as caught:
        train.launcher("lora", None, True, config, extra)
    assert says in str(caught.value)


def test_threads_are_those_asked_for_or_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu.threads(2) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert [cpu.threads(processes) for processes in (1, 2, 100)] == [8, 4, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert cpu.threads(1) == 2, "a container's two cores of a large machine"


# What stands between `ft train` and the script: a launcher that starts it, waits, and turns every failure into 1.
_LAUNCHER = "import subprocess, sys; sys.exit(1 if subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode else 0)"


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("pass", 0, ""),
        ("raise UserError('no such thing', remedy='try another')", 2, "error: no such thing\n  mend:  try another\n"),
        ("raise KeyboardInterrupt", 130, "\nstopped; --resume goes on from the last checkpoint\n"),
        ("os._exit(9)", 1, ""),
    ],
)
def test_the_scripts_own_exit_code_and_words_come_through(body: str, code: int, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"import os\nfrom finetune.entry import launched\nfrom finetune.errors import UserError\nwith launched():\n    {body}"
    assert train.run([sys.executable, "-c", _LAUNCHER, script], {"PYTHONPATH": str(CHECKOUT)}) == code
    assert capfd.readouterr().err == says


# The same with two processes, as torch's launcher starts them.
_LAUNCHER_OF_TWO = """
import os, subprocess, sys
started = [subprocess.Popen([sys.executable, '-c', sys.argv[1]], env=os.environ | {'RANK': rank, 'WORLD_SIZE': '2'}) for rank in '01']
sys.exit(1 if any([process.wait() for process in started]) else 0)
"""


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("other", ["time.sleep(0.1); raise RuntimeError('Connection closed by peer')", "time.sleep(60)"])
def test_what_one_process_refuses_is_said_once_and_ends_all(rank: str, other: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The others lose their exchange with it (on CPUs), or would wait for it (on GPUs); neither is told."""
    script = "import os, time\nfrom finetune.entry import launched\nfrom finetune.errors import UserError\nwith launched():\n"
    script += f"    if os.environ['RANK'] == '{rank}': raise UserError('the disk is full')\n    {other}"
    assert train.run([sys.executable, "-c", _LAUNCHER_OF_TWO, script], {"PYTHONPATH": str(CHECKOUT)}) == 2
    assert capfd.readouterr().err == "error: the disk is full\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_script_and_is_waited_for(number: signal.Signals, code: int, tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from finetune.entry import launched
with launched():
    try:
        Path({str(tmp_path / "ready")!r}).touch()
        time.sleep(60)
    finally:
        time.sleep(0.3)  # such as a checkpoint being written
        Path({str(tmp_path / "finished")!r}).touch()
"""
    outer = f"import sys; from finetune.commands import train; sys.exit(train.run([sys.executable, '-c', {_LAUNCHER!r}, {script!r}], {{}}))"
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}

    def as_in_a_terminal() -> None:  # whoever runs the tests in the background has made them deaf to Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen([sys.executable, "-c", outer], env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=as_in_a_terminal) as process:
        for _ in range(300):
            if (tmp_path / "ready").exists():
                break
            time.sleep(0.05)
        process.send_signal(number)
        assert process.stderr is not None
        told = process.stderr.read()
        assert process.wait(20) == code
    assert (tmp_path / "finished").exists()
    assert told == "\nstopped; --resume goes on from the last checkpoint\n"


@pytest.mark.parametrize("gone", ["accelerate's launcher", "ft train"])
def test_nothing_outlives_its_launcher(gone: str, tmp_path: Path) -> None:
    """`accelerate launch` dies of SIGTERM and leaves its script behind; `ft train` may be killed."""
    script = f"""
import time
from pathlib import Path
from finetune.entry import launched
with launched():
    Path({str(tmp_path / "ready")!r}).touch()
    try:
        time.sleep(60)
    except KeyboardInterrupt as stopped:
        Path({str(tmp_path / "stopped")!r}).write_text(str(stopped.number))
"""
    if gone == "ft train":
        outer = f"from finetune.commands import train; train.run([{sys.executable!r}, '-c', {_LAUNCHER!r}, {script!r}], {{}})"
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
    raise AssertionError("it did not come")


def test_of_several_processes_the_first_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    before = signal.getsignal(signal.SIGTERM)
    for rank, expected in (("0", []), ("1", [3])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit), entry.told():
            raise UserError("no")
        assert waited == expected, "the launcher ends the others while they wait"
    signal.signal(signal.SIGTERM, before)
    capsys.readouterr()
    monkeypatch.setenv(entry.LAST_WORDS, str(tmp_path / "words"))
    for word in ("first", "second"):
        with pytest.raises(SystemExit), entry.told():
            raise UserError(word)
    assert (tmp_path / "words").read_text() == "2\nerror: first"
    assert capsys.readouterr().err == ""


# -- the scripts, end to end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full", "scratch"])
def test_a_script_runs_from_any_folder_and_refuses_other_methods(method: str, tmp_path: Path) -> None:
    other = "scratch/emoji-vae" if method != "scratch" else "lora/emoji"
    found = shell(sys.executable, CHECKOUT / "finetune" / f"{method}.py", other, cwd=tmp_path)
    assert found.returncode == 2 and "this recipe is of method" in found.stderr and "Traceback" not in found.stderr


def test_killed_resumed_and_finished_from_another_folder(tmp_path: Path) -> None:
    """`ft train` for a person: started elsewhere, killed, gone on with; quiet, and at its end it names what is there."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(tiny.text("sd15", "lora", Path("run")))
    asked = [sys.executable, "-m", "finetune.cli", "train", "mine.yaml", "--set", "train.steps=40", "--set", "train.checkpoint_every=1"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(asked, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(1200):
            if (tmp_path / "run" / "checkpoints").is_dir() and any((tmp_path / "run" / "checkpoints").glob("step-*")):
                break
            time.sleep(0.05)
        process.terminate()
        assert process.stderr is not None
        assert re.search(r"SIGTERM: finishing this step.*\n\nstopped after step \d+, which is saved; .*--resume goes on", process.stderr.read(), re.S)
        assert process.wait(60) == 143
    stopped = runs.look(tmp_path / "run")
    assert stopped.state == "stopped" and stopped.saved[-1] == stopped.step < stopped.steps == 40

    again = python(*asked[1:], "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("$ accelerate launch --quiet ") and " --num_processes 1 " in again.stdout
    assert "\ngoing on after step " in again.stdout
    assert "\n── adapters ─" in again.stdout
    noise = [line for line in again.stderr.splitlines() if not line.startswith(("step ", "encoding ", "samples ", "looking "))]
    assert not noise
    told = again.stdout.partition("\nwritten\n")[2]
    places = [tmp_path / line.split("  ")[-1].strip() for line in told.splitlines()]
    named = [place.relative_to(tmp_path / "run").as_posix() for place in places]
    assert named == ["final/pytorch_lora_weights.safetensors", "before-after.png", "report.html"]
    assert all(place.is_file() for place in places)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))


# -- Python -----------------------------------------------------------------------------------------------------------


def test_the_python_interface() -> None:
    assert set(finetune.__all__) == set(dir(finetune)) and all(getattr(finetune, name).__doc__ for name in finetune.__all__)
    with pytest.raises(AttributeError, match="'trian'"):
        _ = finetune.trian


def test_training_from_python_and_a_report_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(folder: Path) -> Path:
        raise OSError("no space")

    monkeypatch.setattr("finetune.report.page.write_report", fail)
    recipe: Recipe = tiny.recipe("sd15", "full", folder=tmp_path / "run")
    planned = finetune.plan(recipe)
    assert planned.arithmetic == "5 pictures ÷ batch 2 ÷ accumulation 1 = 2.5 steps an epoch → 2 steps = 0.8 epochs"
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert finetune.train(recipe) == tmp_path / "run"
    shown = capsys.readouterr()
    assert "the report could not be written" in shown.out and "no space" in shown.err
    assert (tmp_path / "run" / "final" / "model_index.json").is_file() and f"model             {tmp_path / 'run' / 'final'}" in shown.out
    with pytest.raises(UserError, match="exists already"):
        job.prepare(recipe)


def test_the_tables_of_what_trains() -> None:
    """Counts against diffusers' own: 2 attentions × 4 and 2 MLP layers for each transformer block of the tiny UNet."""
    from finetune.report import nets

    recipe = tiny.recipe("sd15", "lora", "adapter.targets=attention+mlp", "optimizer.name=adamw", folder=Path("never-made"))
    audit, planned = job.audit_and_plan(recipe, quiet=True)
    from finetune.models import sd

    model = sd.build(planned, audit)
    unet = model.turns()[0].net.get_submodule("denoiser")
    blocks = [name for name, module in unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"]
    adapters = nets.adapted(model)
    assert f"{10 * len(blocks)} layers" in adapters and f"{len(blocks)} × ff.net.0.proj" in adapters
    lora = sum(p.numel() for name, p in unet.named_parameters() if "lora_" in name)
    assert f"({lora / sum(p.numel() for p in unet.parameters()):.1%})" in adapters
    assert "GiB" in nets.whole(model, planned) and "Denoiser" not in nets.built(model)


# -- packaging and scripts --------------------------------------------------------------------------------------------


def test_a_wheel_carries_recipes_and_assets(tmp_path: Path) -> None:
    source = tmp_path / "source"
    pictures = shutil.ignore_patterns("__pycache__", "[b-z]*.webp")  # some of them are enough here
    shutil.copytree(CHECKOUT / "finetune", source / "finetune", ignore=pictures)
    shutil.copytree(CHECKOUT / "recipes", source / "recipes")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(CHECKOUT / name, source)
    options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"]
    built = python("-m", "pip", "wheel", *options, "-w", tmp_path, source, cwd=tmp_path, PYTHONPATH="")
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("ft_image-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    inside = tmp_path / "installed" / "finetune"
    assert _files(inside) - {f"recipes/{name}.yaml" for name in bundled_recipes()} == _files(source / "finetune")
    elsewhere = {"cwd": tmp_path, "PYTHONPATH": str(tmp_path / "installed")}
    listed = python("-m", "finetune.cli", "recipes", **elsewhere)  # type: ignore[arg-type]
    assert [line.split()[0] for line in listed.stdout.splitlines()] == bundled_recipes()
    script = python("-c", "from finetune.commands.train import launcher; print(launcher('full', 1, False)[1][-1])", **elsewhere)  # type: ignore[arg-type]
    assert script.stdout.strip() == str(inside / "full.py")
    refused = shell(sys.executable, inside / "full.py", "lora/emoji", cwd=tmp_path, PYTHONPATH="")
    assert refused.returncode == 2 and "method lora" in refused.stderr


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _scripts(tmp_path: Path, version: str) -> tuple[Path, dict[str, str]]:
    """A checkout with only what `scripts/install` reads, and a PATH whose Pythons all are of `version`."""
    root = tmp_path / "checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "scripts/install", "scripts/constraints.txt"):
        shutil.copy(CHECKOUT / name, root / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        answers = f'--version) echo "Python {version}";; *version_info*) exit {int(version < "3.11")};; *) exit 1;;'
        (programs / name).write_text(f'#!/bin/sh\ncase "$*" in {answers} esac\n')
        (programs / name).chmod(0o755)
    return root, {"PATH": f"{programs}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("version", "says"), [("3.10.9", "ft needs Python 3.11 or later, and Python 3.10.9"), ("3.12.1", "Python 3.12.1 lacks its venv module")]
)
def test_an_unfit_python_is_named_in_one_sentence(version: str, says: str, tmp_path: Path) -> None:
    root, environment = _scripts(tmp_path, version)
    found = shell("sh", "scripts/install", cwd=root, **environment)
    assert found.returncode == 2 and says in found.stderr and found.stderr.count("\n") == 1


def test_an_environment_that_is_up_to_date_is_left_alone(tmp_path: Path) -> None:
    root, environment = _scripts(tmp_path, "3.10.9")
    (root / ".venv").mkdir()
    state = shell("sh", "-c", 'printf "%s" "$(pwd) $(cat pyproject.toml scripts/constraints.txt | cksum)" > .venv/installed-dev', cwd=root)
    assert state.returncode == 0
    assert shell("sh", "scripts/install", cwd=root, **environment).returncode == 0, "dev holds what the demo needs"
    (root / "pyproject.toml").write_text("changed")
    assert shell("sh", "scripts/install", cwd=root, **environment).returncode == 2


def test_the_constraints_pin_every_dependency() -> None:
    import re
    import tomllib

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[>=\[;]", line)[0].strip().lower().replace("_", "-") for line in wanted} - {"ft-image"}
    lines = (CHECKOUT / "scripts" / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if not line.startswith("#")}
    assert names <= pinned, names - pinned
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line) for line in lines if not line.startswith("#"))
