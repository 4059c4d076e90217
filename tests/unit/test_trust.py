"""Untrusted files run nothing and read only what they name; secrets stay secret."""

from __future__ import annotations

import json
import os
import shutil
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.cli import process
from finetune.config.schema import Model
from finetune.errors import UserError
from finetune.models.pretrained.loading import open_pipeline
from finetune.training import checkpoint
from tests.helpers import tiny

SECRETS = {
    "HF_TOKEN": "hf_doNotTellAnyone1",
    "WANDB_API_KEY": "doNotTellAnyone2",
    "HUGGING_FACE_HUB_TOKEN": "hf_doNotTellAnyone3",
}
STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.getaddrinfo",
)

watched: list[tuple[str, Any]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if watched is not None and (event == "open" or event in STARTS):
        watched.append((event, arguments[0]))


sys.addaudithook(_audit)  # it cannot be removed; it records only while a test uses `watch`


@pytest.fixture
def watch() -> Iterator[list[tuple[str, Any]]]:
    global watched
    watched = []
    yield watched
    watched = None


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A whole model with additional code wherever a library might look for it; the code would create a canary file."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.pipeline("sd15"), folder)
    code = f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n"
    for part in ("", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        for name in ("evil", "pipeline", "modeling", "__init__", "sitecustomize"):
            (folder / part / f"{name}.py").write_text(code)
        for config in (folder / part).glob("*config.json"):
            found = json.loads(config.read_text())
            every = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "UNet2DConditionModel")
            config.write_text(
                json.dumps(found | {"auto_map": dict.fromkeys(every, "evil.Evil"), "trust_remote_code": True})
            )
    return folder


def test_code_in_a_model_folder_is_never_run(poisoned: Path, tmp_path: Path) -> None:
    open_pipeline(Model("sd", str(poisoned)), "StableDiffusionPipeline", torch.float32)
    shutil.copy(
        poisoned / "evil.py", poisoned / "scheduler" / "diffusers.py"
    )  # which diffusers would take for the scheduler's module
    with pytest.raises(UserError, match="contains custom code"):
        open_pipeline(Model("sd", str(poisoned)), "StableDiffusionPipeline", torch.float32)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "entry", [["evil", "Evil"], ["os", "system"], ["subprocess", "Popen"], ["pipeline", "Evil"], ["builtins", "exec"]]
)
def test_model_that_names_custom_classes_is_refused(entry: list[str], poisoned: Path, tmp_path: Path) -> None:
    index = poisoned / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": entry}))
    with pytest.raises(UserError, match="code of a model is never run"):
        open_pipeline(Model("sd", str(poisoned)), "StableDiffusionPipeline", torch.float32)
    assert not (tmp_path / "canary").exists()


def test_checkpoint_with_code_is_refused(tmp_path: Path) -> None:
    """The optimizer's state is the only file in torch format; it is read with `weights_only`."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "canary"),)

    found = checkpoint.Checkpoint(1, {"w": torch.ones(1)}, {}, {"turn": {"state": {}, "param_groups": []}}, {})
    path = checkpoint.save(tmp_path, found, keep=1)
    torch.save(Evil(), path / "optimizer-turn.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load(path)
    assert not (tmp_path / "canary").exists()


def test_run_reads_only_named_files_starts_nothing_and_leaks_no_secret(
    tmp_path: Path, watch: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run under Python's audit hook may open its own folders, those of model, data and cache, and installed code."""
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    given = ("data.held_out=0.2", f"data.cache={tmp_path / 'cache'}", "output.trackers=[tensorboard]")
    asked = tiny.recipe("sd15", "lora", *given, folder=tmp_path / "run")
    named = [Path(str(asked.model.path)), Path(str(asked.data.path)), tmp_path]
    watch.clear()
    tiny.train(asked)
    events = list(watch)
    assert not [(event, what) for event, what in events if event != "open"]
    # FT_CACHE is the user's cache, which holds this machine's calibration.
    checkout, temporary = (
        Path(__file__).resolve().parents[2],
        [Path(os.environ[name]) for name in ("HF_HOME", "FT_CACHE")],
    )
    temporary += [Path("/proc"), Path("/sys"), Path("/dev")]
    code = [
        Path(sys.prefix),
        Path(sys.base_prefix),
        *map(Path, site.getsitepackages()),
        checkout / "finetune",
        *map(Path, sys.path),
    ]
    allowed = [path.resolve() for path in (*named, *code, *temporary)]
    opened = {Path(os.fsdecode(path)).resolve() for _, path in events if isinstance(path, str | bytes)}
    assert len(opened) > 20
    foreign = {path for path in opened if not any(path.is_relative_to(place) for place in allowed)}
    assert not {path for path in foreign if not str(path).startswith(("/usr", "/lib", "/etc/mime", "/etc/localtime"))}
    told = "".join(capfd.readouterr())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 15 and any(path.name == "README.md" for path in written)
    for secret in SECRETS.values():
        assert secret not in told
        assert not [path for path in written if secret.encode() in path.read_bytes()]


def test_hub_error_does_not_show_the_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRETS["HF_TOKEN"])
    with pytest.raises(SystemExit), process.report_errors():
        open_pipeline(Model("sd", "owner/private-model"), "StableDiffusionPipeline", torch.float32)
    said = capsys.readouterr().err
    assert "owner/private-model" in said and SECRETS["HF_TOKEN"] not in said
