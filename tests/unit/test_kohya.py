"""The kohya format with ranks and alphas by layer: each layer's update as diffusers and `--init` read it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.adapters import peft
from finetune.adapters.formats.kohya import layer_name, with_one_alpha, write_kohya
from finetune.adapters.lora_file import look
from finetune.config.schema import Adapter
from finetune.models.pretrained.init_lora import load_initial_lora
from tests.helpers import tiny

SECTIONS = {
    "one rank and alpha": Adapter(rank=4, alpha=2, targets="all-linear"),
    "ranks by pattern": Adapter(rank=4, targets="all-linear", rank_pattern={"to_k": 2}),
    "alphas by pattern": Adapter(rank=4, alpha=4, targets="all-linear", alpha_pattern={"attn2.to_[kv]": 1, "ff.*": 8}),
    "both": Adapter(rank=4, alpha=3, targets="all-linear", rank_pattern={"to_q": 8}, alpha_pattern={"to_k": 1}),
    "rsLoRA": Adapter(rank=4, alpha=3, rslora=True, targets="all-linear", rank_pattern={"to_k": 2, "attn1.to_v": 8}),
    "convolutions": Adapter(rank=4, alpha=3, targets="conv1, conv2, to_q", rank_pattern={"conv1": 2}),
}


@functools.cache
def folder_of(name: str) -> Path:
    """For SDXL, with two layers a level, as the names of its original code require."""
    if name != "sdxl":
        return tiny.pipeline(name)
    pipe = DiffusionPipeline.from_pretrained(tiny.pipeline(name))
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config(dict(pipe.unet.config) | {"layers_per_block": 2})
    folder = tiny.root() / "sdxl-of-test-kohya"
    pipe.save_pretrained(folder)
    return folder


def pipeline(name: str) -> Any:
    return DiffusionPipeline.from_pretrained(folder_of(name))


def networks(pipe: Any, name: str) -> dict[str, Any]:
    encoders = {"sd15": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}[name]
    return {part: getattr(pipe, part) for part in ("unet", *encoders)}


def deltas(pipe: Any, name: str) -> dict[str, Tensor]:
    """Network and layer → what its adapter adds to the weights."""
    return {
        f"{part}.{path}": module.get_delta_weight(module.active_adapters[0]).detach().clone()
        for part, net in networks(pipe, name).items()
        for path, module in net.named_modules()
        if hasattr(module, "lora_A")
    }


def trained(name: str, section: Adapter, folder: Path) -> dict[str, Tensor]:
    """Save a LoRA with random weights, as the trainer does; returns what it adds."""
    pipe, arguments = pipeline(name), dict[str, Any]()
    for part, net in networks(pipe, name).items():
        if part != "unet" and "conv1" in section.targets:
            continue
        peft.add_adapter(net, section)
        for path, parameter in net.named_parameters():
            if "lora_" in path:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(path)))
        arguments[f"{part}_lora_layers"] = peft.lora_weights(net)
        arguments[f"{part}_lora_adapter_metadata"] = peft.lora_configuration(net)
    type(pipe).save_lora_weights(folder, **arguments)
    return deltas(pipe, name)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(expected) > 4
    for layer, delta in expected.items():
        torch.testing.assert_close(found[layer], delta, rtol=1e-4, atol=1e-5, msg=layer)


def continued(name: str, file: Path) -> dict[str, Tensor]:
    """What `--init` of the file adds."""
    pipe = pipeline(name)
    load_initial_lora(pipe, networks(pipe, name), Adapter(init_lora=str(file)))
    return deltas(pipe, name)


@pytest.mark.parametrize("case", SECTIONS)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_kohya_export_preserves_every_layers_update(name: str, case: str, tmp_path: Path) -> None:
    expected = trained(name, SECTIONS[case], tmp_path)
    target, recipe = tmp_path / "kohya.safetensors", tiny.recipe(name, "lora", folder=tmp_path / "run")
    write_kohya(tmp_path, recipe, None, target)
    tensors = load_file(target)
    assert len({float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha")}) == 1
    for layer, delta in expected.items():  # by definition, as ComfyUI and A1111 read it: alpha / rank · up · down
        net, _, path = layer.partition(".")
        found = layer_name(net, path, name == "sdxl")
        down, up = (tensors[f"{found}.lora_{side}.weight"].flatten(1) for side in ("down", "up"))
        product = float(tensors[f"{found}.alpha"]) / len(down) * (up @ down)
        torch.testing.assert_close(product.view(delta.shape), delta, rtol=1e-4, atol=1e-5)
    pipe = pipeline(name)
    pipe.load_lora_weights(target)
    assert_equal(deltas(pipe, name), expected)
    assert_equal(continued(name, target), expected)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_init_lora_reads_alphas_that_differ_by_layer(name: str, tmp_path: Path) -> None:
    """As in resized LoRAs: half of the layers have another alpha, and one has none, which means its rank."""
    expected = trained(name, SECTIONS["one rank and alpha"], tmp_path)
    target = tmp_path / "kohya.safetensors"
    write_kohya(tmp_path, tiny.recipe(name, "lora", folder=tmp_path / "run"), None, target)
    tensors = load_file(target)
    for number, layer in enumerate(expected):
        net, _, path = layer.partition(".")
        key = f"{layer_name(net, path, name == 'sdxl')}.alpha"
        if number % 2 == 0:
            tensors[key] = torch.tensor(3.0 + number % 3)
        if number == 1:
            del tensors[key]
        alpha = float(tensors.get(key, 4))
        expected[layer] = expected[layer] * (alpha / 2)  # it was alpha 2
    save_file(tensors, target)
    assert len(look(str(target)).alphas) > 2
    assert_equal(continued(name, target), expected)


def test_with_one_alpha_does_not_change_a_file_with_one_alpha() -> None:
    tensors = {
        "a.lora_down.weight": torch.randn(4, 8),
        "a.lora_up.weight": torch.randn(8, 4),
        "a.alpha": torch.tensor(2.0),
    }
    same = with_one_alpha(tensors)
    assert same.keys() == tensors.keys() and all(same[name] is tensor for name, tensor in tensors.items())
