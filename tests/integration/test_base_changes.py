"""A run resumes only on the base model that it was started with; each file is compared by its content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.config.schema import Recipe
from finetune.data.sources import file_digest
from finetune.errors import UserError
from finetune.training import base_files, checkpoint
from tests.helpers import tiny


def recipe(folder: Path, *overrides: str) -> Recipe:
    base = folder / "base"
    if not base.exists():
        shutil.copytree(tiny.pipeline("sd15"), base)
    return tiny.recipe("sd15", "lora", f"model.path={base}", "sample.prompts=[]", *overrides, folder=folder / "run")


def save_one_step(asked: Recipe) -> None:
    job = tiny.prepare(asked)
    job.trainer.train_step(0)
    job.trainer.save(1)


def scale(file: Path) -> None:
    """Scale one tensor; size and modification time stay the same."""
    before, tensors = file.stat(), load_file(file)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file(tensors | {name: tensors[name] * 1.01}, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_resume_with_a_changed_base_file_is_refused(file: str, tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    save_one_step(asked)
    tiny.prepare(asked, resume=True).trainer.resume()
    changed = tmp_path / "base" / file
    content = changed.read_bytes()
    if changed.suffix == ".json":
        changed.write_bytes(content + b"\n")
    else:
        scale(changed)
    with pytest.raises(UserError) as caught:
        tiny.prepare(asked, resume=True)
    problem = f"the base model has changed since this run was started: model.path {file} has changed"
    assert caught.value.problem == problem
    assert caught.value.where == f"model.path: {tmp_path / 'base'}"
    assert "restore those files" in caught.value.remedy
    changed.write_bytes(content)
    tiny.prepare(asked, resume=True).trainer.resume()


def test_resume_with_a_new_base_file_is_refused(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    save_one_step(asked)
    (tmp_path / "base" / "tokenizer" / "added_tokens.json").write_text("{}")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(
        b"a variant, which is not read"
    )
    (tmp_path / "base" / "README.md").write_text("not read either")
    with pytest.raises(UserError, match=r"started: model\.path tokenizer/added_tokens\.json is new\n"):
        tiny.prepare(asked, resume=True)


def test_resume_with_a_changed_vae_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny.vae(), tmp_path / "vae")
    asked = recipe(tmp_path, f"model.vae={tmp_path / 'vae'}")
    save_one_step(asked)
    scale(tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors")  # replaced by model.vae, so not read
    tiny.prepare(asked, resume=True).trainer.resume()
    scale(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"model\.vae diffusion_pytorch_model\.safetensors has changed"):
        tiny.prepare(asked, resume=True)


def test_resume_with_a_changed_first_stage_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny.vae(), tmp_path / "vae")
    asked = tiny.recipe("sd", "scratch", f"model.vae={tmp_path / 'vae'}", "sample.prompts=[]", folder=tmp_path / "run")
    save_one_step(asked)
    scale(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"model\.vae diffusion_pytorch_model\.safetensors has changed"):
        tiny.prepare(asked, resume=True)


def test_resume_of_a_run_without_base_digests_gives_one_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = recipe(tmp_path)
    job = tiny.prepare(asked)
    job.trainer.train_step(0)
    state = job.trainer.state.checkpoint(1)
    assert "base" not in state.facts
    checkpoint.save(job.run.folder / "checkpoints", state, 1)
    scale(tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    again = tiny.prepare(asked, resume=True)
    assert again.trainer.resume() == 1
    assert caplog.text.count("does not record its base model") == 1


def test_sha256_of_reads_a_file_again_only_if_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.data.audit.cache.SETTLED_SECONDS", 0)
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"one")
    first = file_digest.sha256_of(file, cache)
    (kept,) = (cache / "digests").iterdir()
    assert kept.read_text() == first
    kept.write_text("0" * 64)
    assert file_digest.sha256_of(file, cache) == "0" * 64, "an unchanged file must not be read again"
    kept.write_bytes(b"\xff damaged")
    assert file_digest.sha256_of(file, cache) == first
    file.write_bytes(b"two")
    assert file_digest.sha256_of(file, cache) != first


def test_base_digest_of_a_hub_model_uses_the_blob_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blobs of large files are named by their SHA-256, so they need not be read."""
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs, sha = repo / "snapshots" / ("c" * 40), repo / "blobs", "a" * 64
    for folder in (snapshot / "unet", blobs, repo / "refs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("c" * 40)
    (blobs / sha).write_bytes(b"weights")
    (blobs / ("b" * 40)).write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", "UNet2DConditionModel"]}))
    (snapshot / "model_index.json").symlink_to(blobs / ("b" * 40))
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").symlink_to(blobs / sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = tiny.recipe("sd15", "lora", "model.path=owner/name", folder=tmp_path / "run")
    found = base_files.digest(asked)
    assert found["model.path unet/diffusion_pytorch_model.safetensors"] == sha
    assert found.keys() == {"model.path model_index.json", "model.path unet/diffusion_pytorch_model.safetensors"}


def test_resume_with_an_unchanged_base_is_bit_exact(tmp_path: Path) -> None:
    asked = [recipe(tmp_path / name, "train.steps=2") for name in ("whole", "broken")]
    tiny.train(asked[0])
    save_one_step(asked[1])
    tiny.train(asked[1], resume=True)
    ours, theirs = (tiny.final_weights(tmp_path / name / "run") for name in ("broken", "whole"))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
