"""Starting from a LoRA file: the first sample equals the file's own, in either format; what does not fit is refused."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.adapters.lora_file import LORA_FILE, look
from finetune.adapters.peft import PEFT_PREFIX
from finetune.errors import UserError
from finetune.export import export
from finetune.memory import quantization
from finetune.memory.quantization import QuantizedLinear
from finetune.models.registry import specs
from tests.helpers import tiny

LAYERS = "adapter.targets='to_q, to_v, conv1, q_proj, out_proj'"
# Of a transformer; diffusers' kohya converter of FLUX.1 (and Chroma) supports single blocks of the real width only.
OF_TRANSFORMERS = {
    slug: "adapter.targets='transformer_blocks.*to_[qkv], transformer_blocks.*to_out.0'"
    for slug in tiny.FLOWS
    if specs()[slug].lora_formats.get("kohya", "").endswith(":FLUX")
}
FLOW_FORMATS = [(name, layout) for name in tiny.FLOWS for layout in ("diffusers", *specs()[name].lora_formats)]
TEXT = "model.train_text_encoder=true"


def text(name: str) -> tuple[str, ...]:
    return () if name in tiny.FLOWS else (TEXT,)


@cache
def before(name: str) -> Path:
    """A run whose LoRA has a scale other than 1, on attention and, where they exist, convolutions and text encoders."""
    folder = tiny.root() / f"init-{name}"
    layers = OF_TRANSFORMERS.get(name, "adapter.targets=attention") if name in tiny.FLOWS else LAYERS
    more = ("adapter.rslora=true", "adapter.alpha=3", *text(name), "optimizer.lr=0.02", "train.steps=3")
    tiny.train(tiny.recipe(name, "lora", layers, *more, folder=folder))
    return folder


@cache
def in_format(name: str, layout: str) -> Path:
    if layout == "diffusers":  # or PEFT's format, for pipelines that load no LoRA
        return look(str(before(name))).file
    return export(before(name), layout)[0]


def image(run: Path, step: int) -> numpy.ndarray:
    with Image.open(run / "samples" / f"step-{step:07d}" / "00.png") as opened:
        return numpy.asarray(opened.convert("RGB")).astype(int)


def train_from(name: str, file: Path, folder: Path, *overrides: str, resume: bool = False) -> Any:
    given = (f"adapter.init_lora={json.dumps(str(file))}", *text(name), "train.checkpoint_every=1", *overrides)
    return tiny.train(tiny.recipe(name, "lora", *given, folder=folder), resume)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_init_lora_starts_with_the_files_own_sample(layout: str, tmp_path: Path) -> None:
    file = in_format("sd15", layout)
    job = train_from("sd15", file, tmp_path / "run", "adapter.rank=16")
    assert abs(image(tmp_path / "run", 0) - image(before("sd15"), 3)).max() <= 1
    assert abs(image(tmp_path / "run", 2) - image(before("sd15"), 3)).max() > 0

    adapter = job.plan.recipe.adapter
    assert (adapter.rank, adapter.alpha, adapter.rslora) == (
        (4, 3, True) if layout == "diffusers" else (4, 6, False)
    )  # 3 / √4 = 6 / 4
    (text,) = [note for note in job.plan.notes if "continues from" in note]
    assert f"({layout} format, {len(load_file(in_format('sd15', 'diffusers'))) // 2} layers of rank 4)" in text
    assert "adapter.rank: using 4, as in the file, instead of the recipe's 16" in job.plan.notes
    old, new = (load_file(folder / "final" / LORA_FILE) for folder in (before("sd15"), tmp_path / "run"))
    assert {key: tensor.shape for key, tensor in old.items()} == {key: tensor.shape for key, tensor in new.items()}
    assert not any(torch.equal(new[key], old[key]) for key in old)


def check_start(name: str, file: Path, folder: Path, *overrides: str) -> Any:
    """Train two steps from `file`; the first sample equals the file's own, then training changes it."""
    job = train_from(name, file, folder, *overrides)
    assert abs(image(folder, 0) - image(before(name), 3)).max() <= 1
    assert abs(image(before(name), 0) - image(before(name), 3)).max() > 1
    now, then = (load_file(in_file) for in_file in (look(str(folder)).file, in_format(name, "diffusers")))
    ends = (".lora_A.weight", ".lora_B.weight")
    assert {key for key in now if key.endswith(ends)} == {key for key in then if key.endswith(ends)}
    assert not all(torch.equal(now[key], then[key]) for key in then if now[key].shape == then[key].shape)
    return job


@pytest.mark.parametrize(("name", "layout"), FLOW_FORMATS)
def test_init_lora_of_a_transformer_starts_with_the_files_own_sample(name: str, layout: str, tmp_path: Path) -> None:
    job = check_start(name, in_format(name, layout), tmp_path / "run")
    adapter = job.plan.recipe.adapter
    found = look(str(in_format(name, layout)))
    assert (adapter.rank, adapter.alpha, adapter.rslora) == (
        (4, 3, True) if layout == "diffusers" else (found.rank, found.rank, False)
    )
    with safe_open(found.file, framework="pt") as file:
        assert file.metadata()["ss_steps"] == "3" and file.metadata()["sshs_model_hash"]
    assert found.format == (
        "PEFT" if (name, layout) == ("pixart", "diffusers") else "kohya" if layout == "kohya" else "diffusers"
    )


@pytest.mark.parametrize("name", tiny.FLOWS)
def test_init_lora_on_a_quantized_base_starts_with_the_files_own_sample(name: str, tmp_path: Path) -> None:
    """Samples are generated with the unquantized base, so the first is the same."""
    with mock.patch.object(quantization, "SMALLEST", 256):  # in weights: tiny transformers are that narrow
        job = check_start(
            name,
            in_format(name, next(iter(specs()[name].lora_formats), "diffusers")),
            tmp_path / "run",
            "model.quantize=nf4",
        )
    assert any(isinstance(module, QuantizedLinear) for module in job.model.denoiser.modules())


def test_resume_of_a_run_with_init_lora_is_exact(tmp_path: Path) -> None:
    file = in_format("sd15", "kohya")
    train_from("sd15", file, tmp_path / "whole", "train.steps=2", "sample.prompts=[]")
    train_from("sd15", file, tmp_path / "broken", "train.steps=1", "sample.prompts=[]")
    train_from("sd15", file, tmp_path / "broken", "train.steps=2", "sample.prompts=[]", resume=True)
    one, other = (
        tmp_path / name / "checkpoints" / "step-0000002" / "weights.safetensors" for name in ("whole", "broken")
    )
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(UserError, match=r"another .*adapter\.init"):
        train_from("sd15", in_format("sd15", "diffusers"), tmp_path / "broken", "train.steps=3", resume=True)


@pytest.mark.parametrize("name", ["sd15", *tiny.FLOWS])
def test_init_lora_with_a_half_precision_base_is_not_rounded(name: str, tmp_path: Path) -> None:
    file = in_format(name, "diffusers")
    job = tiny.prepare(
        tiny.recipe(
            name, "lora", f"adapter.init_lora={file}", *text(name), "train.precision=bfloat16", folder=tmp_path / "run"
        )
    )
    in_file = {
        re.sub(rf"^(unet\.|transformer\.|{PEFT_PREFIX})", "", key): tensor for key, tensor in load_file(file).items()
    }
    initialized = {
        key.removeprefix("denoiser.denoiser."): parameter
        for key, parameter in job.model.trained().items()
        if key.startswith("denoiser.denoiser.")
    }
    assert initialized
    assert all(torch.equal(parameter, in_file[key.replace(".default.", ".")]) for key, parameter in initialized.items())


def refused(given: Path | str, folder: Path, *overrides: str, name: str = "sd15") -> str:
    with pytest.raises(UserError) as caught:
        tiny.prepare(tiny.recipe(name, "lora", f"adapter.init_lora={given}", *overrides, folder=folder))
    assert not folder.exists()
    return str(caught.value)


# Tiny networks have the same widths, and some have layers of the same names: these differ as real ones do.
OTHERS = {
    "sd3": "z-image",
    "flux1": "lumina2",
    "flux2": "sana",
    "qwen-image": "z-image",
    "z-image": "sd3",
    "lumina2": "z-image",
    "sana": "flux1",
}


@pytest.mark.parametrize(("name", "other"), [*OTHERS.items(), ("pixart", "sd3")])
def test_init_lora_of_another_family_is_refused(name: str, other: str, tmp_path: Path) -> None:
    assert "is a LoRA of another base" in refused(in_format(other, "diffusers"), tmp_path / "run", name=name)


def test_init_lora_with_text_encoders_that_cannot_train_is_refused(tmp_path: Path) -> None:
    layer = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}
    layer |= {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(32, 4)}
    save_file(load_file(in_format("sd3", "diffusers")) | layer, tmp_path / "with-text.safetensors")
    said = refused(tmp_path / "with-text.safetensors", tmp_path / "run", name="sd3")
    assert "also adapts the text_encoder" in said
    assert "give a LoRA of the transformer alone" in said


def test_init_lora_with_an_unusable_file_is_refused(tmp_path: Path) -> None:
    run, text = tmp_path / "run", TEXT
    assert "does not match this StableDiffusion: it is a LoRA of another base" in refused(
        in_format("sdxl", "diffusers"), run, text
    )
    assert "does not match this StableDiffusion: it is a LoRA of another base" in refused(
        in_format("sdxl", "kohya"), run, text
    )
    wider = {
        key: torch.cat([tensor, tensor], 1) if key.endswith("to_q.lora_A.weight") else tensor
        for key, tensor in plain().items()
    }
    save_file(wider, tmp_path / "wider.safetensors")
    assert "is a LoRA of another base" in refused(tmp_path / "wider.safetensors", run, text)
    deeper = plain() | {
        key.replace("mid_block", "middle_block"): tensor for key, tensor in plain().items() if "mid_block" in key
    }
    save_file(deeper, tmp_path / "deeper.safetensors")
    assert "is a LoRA of another base" in refused(tmp_path / "deeper.safetensors", run, text)
    assert "also adapts the text_encoder" in refused(in_format("sd15", "kohya"), run)
    assert "there is no LoRA at" in refused(tmp_path / "nowhere.safetensors", run)
    (tmp_path / "lora.pt").write_bytes(b"pickle")
    assert "is not a .safetensors file" in refused(tmp_path / "lora.pt", run)
    (tmp_path / "cut.safetensors").write_bytes(in_format("sd15", "kohya").read_bytes()[:300])
    assert "cannot be read" in refused(tmp_path / "cut.safetensors", run)
    assert "contains no LoRA" in refused(tiny.pipeline("sd15") / "unet" / "diffusion_pytorch_model.safetensors", run)
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, tmp_path / "loha.safetensors")
    assert "is a LoHa" in refused(tmp_path / "loha.safetensors", run)


def plain() -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(in_format("sd15", "diffusers"))
    return found


def test_init_lora_reads_alpha_in_any_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = {"lora_unet_a.lora_down.weight": torch.ones(4, 8), "lora_unet_a.lora_up.weight": torch.ones(8, 4)}
        save_file({**layer, "lora_unet_a.alpha": torch.tensor(3.5, dtype=dtype)}, tmp_path / "a.safetensors")
        found = look(str(tmp_path / "a.safetensors"))
        assert (found.format, found.rank, found.alpha) == ("kohya", 4, 3.5)
