"""Unusable output folders and full disks: one clear message with the fix, exit code 2, nothing overwritten."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from finetune.training import checkpoint
from finetune.training.run_folder import Run
from tests.helpers.scenes import Cases, Scene, check_refusal, raising, scene

__all__ = ["scene"]

CASES = Cases()
case = CASES.case


@case("run already exists; nothing in it was changed", "--resume.*output.folder")
def run_folder_that_exists(scene: Scene) -> None:
    (scene.run / "checkpoints").mkdir(parents=True)
    (scene.run / "recipe.yaml").write_text("of another run")


@case("run already exists", "output.folder")
def file_in_place_of_the_run_folder(scene: Scene) -> None:
    scene.run.write_text("precious")


@case("cannot be used: Not a directory", "output.folder")
def run_folder_below_a_file(scene: Scene) -> None:
    scene.set(f"output.folder={scene.recipe / 'run'}")


@case("cannot be used: File name too long", "output.folder")
def run_folder_with_an_endless_name(scene: Scene) -> None:
    scene.set(f"output.folder={scene.folder / ('x' * 300)}")


@case("cannot be used: ", "output.folder")
def run_folder_where_nobody_may_write(scene: Scene) -> None:
    scene.set("output.folder=/proc/run")


@case("cannot be used: Permission denied", "output.folder")
def run_folder_without_permission(scene: Scene) -> None:
    mkdir = Path.mkdir

    def refuse(self: Path, *arguments: Any, **named: Any) -> None:
        if self.is_relative_to(scene.run):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *arguments, **named)

    scene.patch.setattr(Path, "mkdir", refuse)


@case('output.folder is inside the source ".*data", which is never written to', "elsewhere")
def run_folder_among_the_images(scene: Scene) -> None:
    scene.set(f"output.folder={scene.data / 'run'}")


@case('data.cache is inside the source ".*data", which is never written to', "elsewhere")
def cache_among_the_images(scene: Scene) -> None:
    scene.set(f"data.cache={scene.data / '.cache'}")


@case("the cache cannot be written: Not a directory", "data.cache.*FT_CACHE")
def cache_below_a_file(scene: Scene) -> None:
    scene.set(f"data.cache={scene.recipe / 'cache'}")


@case("the cache cannot be written: No space left on device", "data.cache.*FT_CACHE")
def disk_full_of_cache(scene: Scene) -> None:
    scene.set(f"data.cache={scene.folder / 'cache'}")
    scene.no_space(lambda file: file.is_relative_to(scene.folder / "cache"))


@case("cannot be used: No space left on device", "free some disk space.*--resume")
def disk_full_at_the_start(scene: Scene) -> None:
    scene.no_space(lambda file: file.is_relative_to(scene.run))


@case(r"a checkpoint needs .* MB of disk space, and 0 MB are free", "free some disk space.*--resume")
def disk_too_full_for_a_checkpoint(scene: Scene) -> None:
    usage = namedtuple("usage", "total used free")
    scene.patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 0))


@case("the checkpoint of step 2 could not be written: .*No space left", "free some disk space.*--resume")
def disk_full_while_a_checkpoint_is_written(scene: Scene) -> None:
    scene.patch.setattr(
        checkpoint,
        "save_file",
        raising(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
    )


@case("the record of step 1 could not be written: No space left", "free some disk space.*--resume")
def disk_full_at_the_first_record(scene: Scene) -> None:
    create = Run.create

    def with_a_full_record(self: Run) -> None:
        create(self)
        (self.folder / "metrics.jsonl").symlink_to("/dev/full")

    scene.patch.setattr(Run, "create", with_a_full_record)


@case("the trained weights could not be written: .*No space left", "free some disk space.*--resume")
def disk_full_at_the_end(scene: Scene) -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    scene.patch.setattr("finetune.models.pretrained.model.TextToImage.save", raising(error))


@pytest.mark.parametrize("name", CASES)
def test_bad_output_folder_is_refused_with_one_message_and_fix(
    name: str, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(CASES[name], scene, capsys)
