"""Bad input: a valid scene, ways to spoil it, and the expected message. Each test file has one kind of case."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune.cli.main import main
from tests.helpers import tiny

# What `ft train` refuses and `ft check` cannot, with the reason.
UNKNOWN_TO_CHECK = {
    "recipe_of_another_method": "`ft check` takes recipes of every method; only lora.py is for one",
    **dict.fromkeys(
        (
            "disk_full_of_cache",
            "disk_full_at_the_start",
            "disk_too_full_for_a_checkpoint",
            "disk_full_while_a_checkpoint_is_written",
            "disk_full_at_the_first_record",
            "disk_full_at_the_end",
        ),
        "the disk fills up at a file that `ft check` does not write",
    ),
}


@dataclass
class Scene:
    """A recipe that trains a LoRA on a tiny model, its images, and methods with which cases spoil them."""

    folder: Path
    patch: pytest.MonkeyPatch
    overrides: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"

    def set(self, *assignments: str) -> None:
        self.overrides += assignments

    def append(self, text: str) -> None:
        self.recipe.write_text(self.recipe.read_text() + text)

    def arguments(self) -> list[str]:
        return [str(self.recipe), *(part for assignment in self.overrides for part in ("--set", assignment))]

    def no_space(self, when: Callable[[Path], bool]) -> None:
        """Make fsync fail with a full disk for files that `when` selects."""
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            if when(Path(os.readlink(f"/proc/self/fd/{descriptor}"))):
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        self.patch.setattr(os, "fsync", fsync)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise error

    return fail


Spoil = Callable[[Scene], Any]
Case = tuple[Spoil, str, str]


class Cases(dict[str, Case]):
    """Name → (what spoils a scene, patterns of the expected problem or place, and of the fix)."""

    def case(self, said: str, remedy: str) -> Callable[[Spoil], Spoil]:
        def register(spoil: Spoil) -> Spoil:
            self[spoil.__name__] = (spoil, said, remedy)
            return spoil

        return register


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    made = Scene(tmp_path, monkeypatch)
    shutil.copytree(tiny.images(), made.data)
    made.recipe.write_text(tiny.text("sd15", "lora", made.run))
    made.set(f"data.path={made.data}", "sample.prompts=[]")
    return made


def snapshot(*folders: Path) -> dict[Path, tuple[int, bytes | None]]:
    paths = [
        path
        for folder in folders
        for path in [folder, *folder.rglob("*")]
        if path.exists() and not path.is_char_device()
    ]
    return {path: (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


def check_refusal(case: Case, scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """Spoil the scene, run `ft check` and the entry script in this process, and check that both refuse the same and
    change no file.
    """
    from accelerate.state import AcceleratorState

    from finetune.cli import launch_target

    spoil, said, remedy = case
    spoil(scene)
    AcceleratorState._reset_state(reset_partial_state=True)
    mine = snapshot(scene.data, tiny.pipeline("sd15"))
    files = {path: path.read_bytes() for path in scene.folder.rglob("*") if path.is_file()}
    checked = "" if spoil.__name__ in UNKNOWN_TO_CHECK else refusal_of_check(scene, capsys)
    scene.patch.setattr(sys, "argv", ["lora.py", *scene.arguments()])
    with pytest.raises(SystemExit) as ended:
        launch_target.main("lora")
    captured = capsys.readouterr()
    check(captured.out, captured.err, said, remedy)
    assert ended.value.code == 2
    assert not checked or checked == message_of(captured.err)
    assert snapshot(scene.data, tiny.pipeline("sd15")) == mine
    assert {path: path.read_bytes() for path in files} == files
    assert not list(scene.folder.rglob("*.part"))


def refusal_of_check(scene: Scene, capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which `ft check` refuses the scene; it ends with code 2 and changes no file."""
    files = snapshot(scene.folder)
    with pytest.raises(SystemExit) as ended:
        main(["check", *scene.arguments()])
    captured = capsys.readouterr()
    assert ended.value.code == 2, captured.out
    assert snapshot(scene.folder).keys() == files.keys()
    return message_of(captured.err)


def message_of(errors: str) -> str:
    """The error message in what a command printed."""
    return re.sub(r"\A.*^(?=error: )", "", errors, flags=re.MULTILINE | re.DOTALL).rstrip()


def check(output: str, errors: str, said: str, remedy: str) -> None:
    """Check that there is exactly one message, with problem, optional place and fix, and no traceback."""
    assert "Traceback" not in output + errors
    assert len(re.findall("^error: ", output + errors, flags=re.MULTILINE)) == 1
    message = message_of(errors).split("\n")
    assert [line.split()[0] for line in message] in (["error:", "fix:"], ["error:", "where:", "fix:"])
    assert re.search(said, " ".join(message[:-1])), message
    assert re.search(remedy, message[-1]), message
