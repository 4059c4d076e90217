"""The `ft` command: fast start, errors with fixes, and arguments passed on."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import click
import pytest

import finetune
from finetune.cli import main as cli_main
from finetune.config.loader import bundled_recipes
from finetune.errors import UserError
from finetune.models.pretrained import check
from tests.helpers import tiny
from tests.helpers.commands import CHECKOUT, ft, python

HEAVY = {
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "PIL",
    "safetensors",
    "bitsandbytes",
    "pydantic",
}


# -- imports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statements",
    [
        "from finetune.cli import main; main.main(['--help'])",
        "from finetune.cli import main; main.main(['recipes'])",
        "from finetune.cli import main; main.main(['gpus'])",
        "from finetune.cli import main; main.main(['gpus', 'h200'])",
        "from finetune.cli import main; main.main(['train', 'lora/emoji', '--set', 'a=b'])",
        "import finetune; finetune.load_recipe('lora/emoji')",
        "from finetune import planning, rng; from finetune.config import yaml_reader; from finetune.data import sources",
        "from finetune.data.audit import audit; from finetune.cli import preflight, launch_target, launcher",
        "from finetune.report import model_summary, html_report, tables",
        "from finetune.cli import check, doctor, export, gpus, recipes, sample, train",
    ],
)
def test_command_without_need_imports_no_heavy_library(statements: str, tmp_path: Path) -> None:
    code = f"import sys, atexit; atexit.register(lambda: print('\\n' + repr(sorted(sys.modules)), file=sys.stderr)); {statements}"
    found = python("-c", code, cwd=tmp_path)
    modules = eval(found.stderr.splitlines()[-1])
    assert "finetune" in modules
    assert not HEAVY & set(modules)


FAKE_RUN = """
from pathlib import Path
for folder in ("run/final", "full"):
    Path(folder).mkdir(parents=True)
Path("run/recipe.yaml").write_text(
    "method: lora\\nmodel: {family: sd, path: embedded:base}\\nadapter: {}\\ntrain: {steps: 1}\\n"
    "data: {path: embedded:emoji}\\n"
)
Path("run/final/pytorch_lora_weights.safetensors").touch()
Path("full/there.txt").touch()
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "lora/emoji", "--set", "output.folder=full"], "full already exists"),
        (["train", "lora/emoji", "--set", "data.path=/no/images"], 'there is no folder "/no/images"'),
        (["train", "lora/emoji", "--set", "model.family=sdx"], "sdxl"),
        (["train", "lora/emoji", "--set", "model.path=/no/model"], "/no/model"),
        (["check", "lora/emoji", "--set", "data.path=/no/images"], 'there is no folder "/no/images"'),
        (["data", "check", "/no/images"], 'there is no folder "/no/images"'),
        (["export", "run", "--out", "full/there.txt"], "full/there.txt already exists"),
        (["export", "no-run"], 'there is no run "no-run"'),
        (["sample", "no-run", "--prompt", "a"], 'there is no run "no-run"'),
        (["sample", "run", "--prompt", "a", "--out", "full"], "full already exists"),
        (["eval", "no-run"], 'there is no run "no-run"'),
    ],
)
def test_mistake_that_needs_no_torch_is_refused_without_it(arguments: list[str], says: str, tmp_path: Path) -> None:
    code = FAKE_RUN + "import sys, atexit\n"
    code += "atexit.register(lambda: print('torch' in sys.modules))\n"
    code += f"from finetune.cli import main; main.main({arguments!r})"
    found = python("-c", code, cwd=tmp_path)
    assert found.returncode == 2 and found.stderr.startswith("error: ") and says in found.stderr, found.stderr
    assert found.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("arguments", [["--help"], ["gpus", "h200"]])
def test_python_m_finetune_is_the_ft_command(arguments: list[str], tmp_path: Path) -> None:
    shown = python("-m", "finetune", *arguments, cwd=tmp_path)
    assert shown.returncode == 0 and shown.stdout == python("-m", "finetune.cli.main", *arguments, cwd=tmp_path).stdout


def test_help_documents_shell_completion(tmp_path: Path) -> None:
    assert "_FT_COMPLETE=bash_source ft" in python("-m", "finetune", "--help", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("ft tr", ["plain,train"]),
        ("ft train lora/emo", ["plain,lora/emoji"]),
        ("ft train min", ["file,min"]),
        ("ft export runs/a", ["plain,runs/a", "plain,runs/ab"]),
        ("ft nothing --re", []),
    ],
)
def test_shell_completes_commands_recipes_and_runs(line: str, completed: list[str], tmp_path: Path) -> None:
    for run in ("a", "ab", "b"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "plan.json").touch()
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_FT_COMPLETE": "bash_complete"}
    found = python("-m", "finetune", cwd=tmp_path, **words)
    assert (found.stdout.split(), found.stderr) == (completed, "")


def test_recipe_file_without_its_ending_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").touch()
    assert ft("check", "mine") == 2
    assert 'did you mean the file "mine.yaml"?' in capsys.readouterr().err


def test_launch_target_without_a_recipe_trains_the_bundled_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from finetune.cli import launch_target

    for method, name in launch_target.DEFAULTS.items():
        monkeypatch.setattr("sys.argv", [f"{method}.py", "--set", "train.steps=2"])
        recipe, resume, force = launch_target.parse_arguments(method)
        assert (recipe.method, recipe.train.steps, resume, force) == (method, 2, False, False)
        assert f"No recipe given: training the bundled {name}" in caplog.messages[-1]


def test_help_starts_quickly(tmp_path: Path) -> None:
    wall, processor = [], []
    for _ in range(5):
        start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = python("-m", "finetune.cli.main", "--help", cwd=tmp_path).stdout
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - start)
        processor.append(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)
    assert all(f"  {name}" in shown and line in shown for name, line in cli_main.COMMANDS.items())
    assert min(processor) < 0.3, "seconds; 0.15 when this was written"
    assert min(wall) < 0.9, "seconds; less strict, since the machine may be busy"


@pytest.mark.parametrize("name", cli_main.COMMANDS)
def test_command_summary_is_the_first_line_of_its_help(name: str) -> None:
    command = cli_main.ft.get_command(click.Context(cli_main.ft), name)
    assert command is not None and command.help is not None
    assert command.help.splitlines()[0] == cli_main.COMMANDS[name]


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
        (["check", "lora/emoji", "--set", "model.path=some/model", "--set", "data.path=/no/images"], "/no/images"),
        (["sample", "/no/run", "--prompt", "a"], "/no/run"),
        (["export", "/no/run"], "/no/run"),
        (["export", "/no/run", "--format", "khya"], "kohya"),
        (["gpus", "a100"], "a100-40gb or a100-80gb"),
        (["gpus", "--prices", "/no/prices.yaml"], "/no/prices.yaml"),
    ],
)
def test_command_with_a_mistake_ends_with_code_2_and_a_fix(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ft(*arguments) == 2
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("overrides", "says", "remedy"),
    [
        (["model.path=HERE/file.ckpt"], "is not a .safetensors file", "a diffusers folder"),
        (["model.path=HERE/empty"], "it has no model_index.json", "a diffusers folder"),
        (["model.path=HERE/damaged"], "cannot be read", "copy or download"),
        (["model.path=HERE/sdxl"], "holds a StableDiffusionXLPipeline", "set model.family: sdxl"),
        (["model.path=HERE/other"], "holds a KandinskyV22Pipeline", "give another"),
        (["model.path=a/b/c"], 'no file or folder "a/b/c"', "Hub name"),
        (["model.path=a/b", "model.vae=./nowhere"], 'no file or folder "./nowhere"', "VAE"),
        (["model.path=a/b", "model.vae=HERE/empty"], "holds no trained VAE", "config.json"),
    ],
)
def test_check_of_an_invalid_model_path_is_refused(
    overrides: list[str], says: str, remedy: str, tmp_path: Path
) -> None:
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
        check.check(
            finetune.load_recipe("lora/emoji", [override.replace("HERE", str(tmp_path)) for override in overrides])
        )
    assert says in caught.value.problem and remedy in caught.value.remedy


def test_check_of_a_plausible_model_path_passes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    for path in (
        str(tmp_path / "model.safetensors"),
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "gpt2",
        str(tiny.pipeline("sd15")),
    ):
        check.check(finetune.load_recipe("lora/emoji", [f"model.path={path}"]))


# -- commands ---------------------------------------------------------------------------------------------------------


def test_recipes_lists_audiences_and_shows_files(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == bundled_recipes()
    assert all("  For " in line for line in lines)
    assert ft("recipes", "show", "lora/emoji") == 0
    assert capsys.readouterr().out == (CHECKOUT / "recipes" / "lora" / "emoji.yaml").read_text(encoding="utf-8")


def test_recipes_copy_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    original = (CHECKOUT / "recipes" / "lora" / "emoji.yaml").read_text(encoding="utf-8")
    assert ft("recipes", "copy", "lora/emoji") == 0
    schema, copied = Path("lora-emoji.yaml").read_text(encoding="utf-8").split("\n", 1)
    assert copied == original.split("\n", 1)[1], "all but the line that names the schema's place"
    assert Path(schema.partition("$schema=")[2]).is_file()
    Path("lora-emoji.yaml").write_text("mine")
    assert ft("recipes", "copy", "lora/emoji") == 2
    assert Path("lora-emoji.yaml").read_text() == "mine" and "not changed" in capsys.readouterr().err
    assert ft("recipes", "copy", "lora/emoji", "other.yaml") == 0
    assert Path("other.yaml").is_file()
    assert ft("recipes", "copy", "lora/emoji", "no/folder/x.yaml") == 2
    Path("there").mkdir()
    assert ft("recipes", "copy", "lora/emoji", "there") == 0
    assert Path("there/lora-emoji.yaml").is_file()


def test_check_shows_data_and_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [
        "check",
        "lora/emoji",
        *("--set", f"model.path={tiny.pipeline('emoji')}"),
        *("--set", "data.long_captions=truncate"),  # of this tiny tokenizer
        *("--set", "train.batch_size=4"),
        *("--set", "train.steps=300"),
    ]
    assert ft(*asked) == 0
    out = capsys.readouterr().out
    assert "380 images / batch 4 = 95 steps per epoch; 300 steps = 3.158 epochs" in out
    assert "train.batch_size=4" in out.splitlines()[-1], "the command for the next step"
    assert not list(tmp_path.iterdir())


def test_sample_and_export_pass_their_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune.cli.export
    import finetune.inference.sample

    monkeypatch.chdir(tmp_path)
    Path("runs/x").mkdir(parents=True)

    taken: list[object] = []

    def take(*arguments: object, **named: object) -> list[Path]:
        taken[:] = [arguments, named]
        return [tmp_path / "a"]

    monkeypatch.setattr(finetune.inference.sample, "sample", take)
    monkeypatch.setattr(finetune.cli.export, "export", take)
    named = ["--steps", "5", "--guidance", "2.5", "--sampler", "ddim", "--eta", "0.5", "--out", "there"]
    assert ft("sample", "runs/x", "--prompt", "a", "--prompt", "b c", "--seed", "3", "--seed", "4", *named) == 0
    asked = {
        "steps": 5,
        "guidance": 2.5,
        "negative": None,
        "out": Path("there"),
        "sampler": "ddim",
        "eta": 0.5,
        "truncation": None,
    }
    assert taken == [("runs/x", ("a", "b c"), (3, 4)), asked]
    assert ft("sample", "runs/x") == 0
    assert taken == [("runs/x", (), None), dict.fromkeys(asked)]
    assert str(tmp_path) in capsys.readouterr().out
    assert ft("export", "runs/x", "--format", "kohya", "--dtype", "float16", "--out", "x.safetensors") == 0
    assert taken == [(Path("runs/x"), "kohya", False, "float16", Path("x.safetensors"), None), {}]
    assert ft("export", "runs/x", "--merge", "--checkpoint", "best") == 0
    assert taken == [(Path("runs/x"), "diffusers", True, None, None, "best"), {}]
