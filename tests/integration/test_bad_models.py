"""Unusable models: one clear message with the fix, exit code 2, nothing overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import save_file

from finetune.models.pretrained import loading
from tests.helpers import tiny
from tests.helpers.scenes import Cases, Scene, check_refusal, raising, scene

__all__ = ["scene"]

RESPONSE: Any = SimpleNamespace(headers={}, request=None)

CASES = Cases()
case = CASES.case


@case("no-model", "model.path|diffusers folder")
def missing_model(scene: Scene) -> None:
    scene.set(f"model.path={scene.folder / 'no-model'}")


@case("no-one/no-model.*Hub", "model|folder")
def model_that_no_hub_gives(scene: Scene) -> None:
    scene.set("model.path=no-one/no-model")


@case("model_index.json", "diffusers folder")
def folder_that_is_no_model(scene: Scene) -> None:
    scene.set(f"model.path={scene.data}")


@case("StableDiffusionPipeline", "model.family: sd")
def model_of_another_family(scene: Scene) -> None:
    scene.set("model.family=sdxl")


@case("contains only a transformer of family flux1", "set model.transformer to this file")
def one_file_of_another_family(scene: Scene) -> None:
    save_file({"vector_in.in_layer.weight": torch.zeros(1)}, scene.folder / "one.safetensors")
    scene.set(f"model.path={scene.folder / 'one.safetensors'}")


@case("holds a StableDiffusion3Pipeline, and family flux1 needs a FluxPipeline", "model.family: sd3")
def flow_of_another_family(scene: Scene) -> None:
    scene.set("model.family=flux1", f"model.path={tiny.pipeline('sd3')}")


@case("the text encoders of family sd3 cannot be trained", "set it to false")
def text_encoders_that_do_not_train(scene: Scene) -> None:
    scene.set("model.family=sd3", f"model.path={tiny.pipeline('sd3')}", "model.train_text_encoder=true")


@case("embeds no guidance", "remove it")
def guidance_that_nothing_reads(scene: Scene) -> None:
    scene.set("model.family=sd3", f"model.path={tiny.pipeline('sd3')}", "flow={guidance: 3}")


@case("PixArtSigmaPipeline loads no LoRA file", "set it to false")
def pissa_without_a_form(scene: Scene) -> None:
    scene.set("model.family=pixart", f"model.path={tiny.pipeline('pixart')}", "adapter.pissa=true")


@case("unet|diffusion_pytorch_model|could not be", "again|model")
def model_with_a_cut_file(scene: Scene) -> None:
    shutil.copytree(tiny.pipeline("sd15"), scene.folder / "model")
    weights = scene.folder / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    scene.set(f"model.path={scene.folder / 'model'}")


@case("model/text_encoder.*", "download the whole model again")
def model_with_a_piece_missing(scene: Scene) -> None:
    shutil.copytree(tiny.pipeline("sd15"), scene.folder / "model")
    shutil.rmtree(scene.folder / "model" / "text_encoder")
    scene.set(f"model.path={scene.folder / 'model'}")


@case("model.safetensors is not a checkpoint of SD 1.5, SD 2.1 or SDXL", "diffusers folder")
def checkpoint_of_something_else(scene: Scene) -> None:
    save_file({"some.weight": torch.ones(2)}, scene.folder / "model.safetensors")
    scene.set(f"model.path={scene.folder / 'model.safetensors'}")


@case("this is a StableDiffusionXLPipeline, and family sd needs a StableDiffusionPipeline", "set model.family: sdxl")
def checkpoint_of_another_family(scene: Scene) -> None:
    layer = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"  # SDXL's width
    save_file({layer: torch.ones(1, 2048)}, scene.folder / "model.safetensors")
    scene.set(f"model.path={scene.folder / 'model.safetensors'}")


@case("lora.safetensors is a LoRA, not a base model", "that it was trained on")
def lora_for_a_base(scene: Scene) -> None:
    scene.set(f"model.path={lora(scene, 'lora_unet_mid_block_attentions_0_proj_in')}")


@case(
    'access to "owner/closed" on the Hub requires accepting its license',
    "https://huggingface.co/owner/closed.*hf auth login",
)
def gated_model(scene: Scene) -> None:
    hub_answers(scene, GatedRepoError("403 Client Error", response=RESPONSE))
    scene.set("model.path=owner/closed")


@case('there is no model "owner/gone" on the Hub that you have access to', "correct the name.*private.*hf auth login")
def model_that_the_hub_does_not_show(scene: Scene) -> None:
    hub_answers(scene, RepositoryNotFoundError("404 Client Error", response=RESPONSE))
    scene.set("model.path=owner/gone")


@case("there is no LoRA at", "the folder or run that holds it")
def lora_to_go_on_from_that_is_not_there(scene: Scene) -> None:
    scene.set(f"adapter.init_lora={scene.folder / 'gone.safetensors'}")


@case(
    "lora does not match this StableDiffusion: it is a LoRA of another base", "a LoRA of this base in adapter.init_lora"
)
def lora_of_another_base(scene: Scene) -> None:
    scene.set(f"adapter.init_lora={lora(scene, 'lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q')}")


def hub_answers(scene: Scene, error: Exception) -> None:
    """Every question to the Hub ends with `error`."""
    for name in ("get_hf_file_metadata", "hf_hub_download"):
        scene.patch.setattr(loading, name, raising(error))


def lora(scene: Scene, layer: str) -> Path:
    """A LoRA file of one layer, with kohya's names."""
    file = scene.folder / "lora.safetensors"
    save_file({f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}, file)
    return file


@pytest.mark.parametrize("name", CASES)
def test_bad_model_is_refused_with_one_message_and_fix(
    name: str, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(CASES[name], scene, capsys)
