"""Going on from a LoRA: what a run begins with is what the file draws, in either format, and what does not fit is refused."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.export import export
from finetune.initial import look
from finetune.models.loading import LORA_FILE
from tests import tiny

LAYERS = "adapter.targets='to_q, to_v, conv1, q_proj, out_proj'"


@cache
def before(name: str) -> Path:
    """A run whose LoRA has a scale that is not 1, on attention, convolutions and text encoders."""
    folder = tiny.root() / f"init-{name}"
    more = ("adapter.rslora=true", "adapter.alpha=3", "model.train_text_encoder=true", "optimizer.lr=0.02", "train.steps=3")
    tiny.train(tiny.recipe(name, "lora", LAYERS, *more, folder=folder))
    return folder


@cache
def in_format(name: str, layout: str) -> Path:
    if layout == "diffusers":
        return before(name) / "final" / LORA_FILE
    return export(before(name), "kohya")[0]


def picture(run: Path, step: int) -> numpy.ndarray:
    with Image.open(run / "samples" / f"step-{step:07d}" / "00.png") as opened:
        return numpy.asarray(opened.convert("RGB")).astype(int)


def going_on(name: str, file: Path, folder: Path, *overrides: str, resume: bool = False) -> Any:
    given = (f"adapter.init={json.dumps(str(file))}", "model.train_text_encoder=true", "train.checkpoint_every=1", *overrides)
    return tiny.train(tiny.recipe(name, "lora", *given, folder=folder), resume)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_a_run_begins_with_what_the_file_draws(layout: str, tmp_path: Path) -> None:
    file = in_format("sd15", layout)
    job = going_on("sd15", file, tmp_path / "run", "adapter.rank=16")
    assert abs(picture(tmp_path / "run", 0) - picture(before("sd15"), 3)).max() <= 1
    assert abs(picture(tmp_path / "run", 2) - picture(before("sd15"), 3)).max() > 0

    adapter = job.plan.recipe.adapter
    assert (adapter.rank, adapter.alpha, adapter.rslora) == ((4, 3, True) if layout == "diffusers" else (4, 6, False))  # 3 / √4 = 6 / 4
    (said,) = [note for note in job.plan.notes if "goes on from" in note]
    assert f"in the format of {layout}, {len(load_file(in_format('sd15', 'diffusers'))) // 2} layers of rank 4" in said
    assert "adapter.rank is 16 in the recipe and 4 in the file: the file's is taken" in job.plan.notes
    old, new = (load_file(folder / "final" / LORA_FILE) for folder in (before("sd15"), tmp_path / "run"))
    assert {key: tensor.shape for key, tensor in old.items()} == {key: tensor.shape for key, tensor in new.items()}
    assert not any(torch.equal(new[key], old[key]) for key in old)


def test_it_resumes_exactly(tmp_path: Path) -> None:
    file = in_format("sd15", "kohya")
    going_on("sd15", file, tmp_path / "whole", "train.steps=2", "sample.prompts=[]")
    going_on("sd15", file, tmp_path / "broken", "train.steps=1", "sample.prompts=[]")
    going_on("sd15", file, tmp_path / "broken", "train.steps=2", "sample.prompts=[]", resume=True)
    one, other = (tmp_path / name / "checkpoints" / "step-0000002" / "weights.safetensors" for name in ("whole", "broken"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(UserError, match=r"another .*adapter\.init"):
        going_on("sd15", in_format("sd15", "diffusers"), tmp_path / "broken", "train.steps=3", resume=True)


def test_a_frozen_base_in_half_precision_does_not_round_the_file(tmp_path: Path) -> None:
    file = in_format("sd15", "diffusers")
    recipe = tiny.recipe("sd15", "lora", f"adapter.init={file}", "model.train_text_encoder=true", "train.precision=bfloat16", folder=tmp_path / "run")
    job = tiny.prepare(recipe)
    begun = {key.removeprefix("denoiser.denoiser."): parameter for key, parameter in job.model.trained().items()}
    for key, tensor in load_file(file).items():
        if key.startswith("unet."):
            assert torch.equal(begun[key.removeprefix("unet.").replace(".weight", ".default.weight")], tensor)


def refused(given: Path | str, folder: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        tiny.prepare(tiny.recipe("sd15", "lora", f"adapter.init={given}", *overrides, folder=folder))
    assert not folder.exists()
    return str(caught.value)


def test_refusals(tmp_path: Path) -> None:
    run, text = tmp_path / "run", "model.train_text_encoder=true"
    assert "does not fit this StableDiffusion; it is a LoRA of another base" in refused(in_format("sdxl", "diffusers"), run, text)
    assert "does not fit this StableDiffusion; it is a LoRA of another base" in refused(in_format("sdxl", "kohya"), run, text)
    wider = {key: torch.cat([tensor, tensor], 1) if key.endswith("to_q.lora_A.weight") else tensor for key, tensor in plain().items()}
    save_file(wider, tmp_path / "wider.safetensors")
    assert "is a LoRA of another base" in refused(tmp_path / "wider.safetensors", run, text)
    deeper = plain() | {key.replace("mid_block", "middle_block"): tensor for key, tensor in plain().items() if "mid_block" in key}
    save_file(deeper, tmp_path / "deeper.safetensors")
    assert "is a LoRA of another base" in refused(tmp_path / "deeper.safetensors", run, text)
    assert "also adapts the text_encoder" in refused(in_format("sd15", "kohya"), run)
    assert "there is no LoRA at" in refused(tmp_path / "nowhere.safetensors", run)
    (tmp_path / "lora.pt").write_bytes(b"pickle")
    assert "is no .safetensors file" in refused(tmp_path / "lora.pt", run)
    (tmp_path / "cut.safetensors").write_bytes(in_format("sd15", "kohya").read_bytes()[:300])
    assert "cannot be read" in refused(tmp_path / "cut.safetensors", run)
    assert "holds no LoRA" in refused(tiny.pipeline("sd15") / "unet" / "diffusion_pytorch_model.safetensors", run)
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    assert "is a LoHa" in refused(tmp_path / "loha.safetensors", run)


def plain() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(in_format("sd15", "diffusers"))
    return found


def test_alpha_is_read_whatever_its_numbers(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = {"lora_unet_a.lora_down.weight": torch.ones(4, 8), "lora_unet_a.lora_up.weight": torch.ones(8, 4)}
        save_file({**layer, "lora_unet_a.alpha": torch.tensor(3.5, dtype=dtype)}, tmp_path / "a.safetensors")
        found = look(str(tmp_path / "a.safetensors"))
        assert (found.format, found.rank, found.alpha) == ("kohya", 4, 3.5)
