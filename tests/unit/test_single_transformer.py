"""Transformers in a single file, as ComfyUI users have them, replace a pipeline's own: files in the original layout.

diffusers' converters of FLUX.1 and Lumina 2 support the real widths only, so these are read in diffusers' layout.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.config.schema import Model
from finetune.errors import UserError
from finetune.models.pretrained.family import family_of
from finetune.models.pretrained.loading import open_pipeline
from tests.helpers import tiny

QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# By family: endings of layers that the original code fuses → the ending of the fused layer.
JOINED: dict[str, dict[tuple[str, ...], str]] = {
    "sd3": {
        QKV: "x_block.attn.qkv",
        ADDED: "context_block.attn.qkv",
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
    },
    "flux2": {QKV: "img_attn.qkv", ADDED: "txt_attn.qkv"},
    "z-image": {("attention.to_q", "attention.to_k", "attention.to_v"): "attention.qkv"},
    "sana": {
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"): "attn.qkv",
        ("attn2.to_k", "attn2.to_v"): "cross_attn.kv_linear",
    },
    "qwen-image": {},
}
# Patterns, applied in order, that turn diffusers' names into those of the original code.
RENAMED: dict[str, list[tuple[str, str]]] = {
    "sd3": [
        (r"^pos_embed\.proj", "x_embedder.proj"),
        (r"^pos_embed\.pos_embed", "pos_embed"),
        (r"^time_text_embed\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"^time_text_embed\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"^time_text_embed\.text_embedder\.linear_1", "y_embedder.mlp.0"),
        (r"^time_text_embed\.text_embedder\.linear_2", "y_embedder.mlp.2"),
        (r"^proj_out", "final_layer.linear"),
        (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"^transformer_blocks", "joint_blocks"),
        (r"attn(2?)\.norm_([qk])\.", r"x_block.attn\1.ln_\2."),
        (r"attn\.norm_added_([qk])\.", r"context_block.attn.ln_\1."),
        (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
        (r"attn\.to_add_out", "context_block.attn.proj"),
        (r"norm1\.linear", "x_block.adaLN_modulation.1"),
        (r"norm1_context\.linear", "context_block.adaLN_modulation.1"),
        (r"ff\.net\.0\.proj", "x_block.mlp.fc1"),
        (r"ff\.net\.2", "x_block.mlp.fc2"),
        (r"ff_context\.net\.0\.proj", "context_block.mlp.fc1"),
        (r"ff_context\.net\.2", "context_block.mlp.fc2"),
    ],
    "flux2": [
        (r"^x_embedder", "img_in"),
        (r"^context_embedder", "txt_in"),
        (r"^time_guidance_embed\.timestep_embedder\.linear_1", "time_in.in_layer"),
        (r"^time_guidance_embed\.timestep_embedder\.linear_2", "time_in.out_layer"),
        (r"_modulation(_img|_txt|)\.linear", r"_modulation\1.lin"),
        (r"^proj_out", "final_layer.linear"),
        (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_out", r"single_blocks.\1.linear2"),
        (r"^transformer_blocks", "double_blocks"),
        (r"attn\.norm_q\.weight", "img_attn.norm.query_norm.scale"),
        (r"attn\.norm_k\.weight", "img_attn.norm.key_norm.scale"),
        (r"attn\.norm_added_q\.weight", "txt_attn.norm.query_norm.scale"),
        (r"attn\.norm_added_k\.weight", "txt_attn.norm.key_norm.scale"),
        (r"attn\.to_out\.0", "img_attn.proj"),
        (r"attn\.to_add_out", "txt_attn.proj"),
        (r"ff\.linear_in", "img_mlp.0"),
        (r"ff\.linear_out", "img_mlp.2"),
        (r"ff_context\.linear_in", "txt_mlp.0"),
        (r"ff_context\.linear_out", "txt_mlp.2"),
    ],
    "z-image": [
        (r"all_(final_layer|x_embedder)\.2-1\.", r"\1."),
        (r"attention\.to_out\.0", "attention.out"),
        (r"attention\.norm_([qk])", r"attention.\1_norm"),
    ],
    "sana": [
        (r"^patch_embed\.proj", "x_embedder.proj"),
        (r"^time_embed\.emb\.timestep_embedder\.linear_1", "t_embedder.mlp.0"),
        (r"^time_embed\.emb\.timestep_embedder\.linear_2", "t_embedder.mlp.2"),
        (r"^time_embed\.linear", "t_block.1"),
        (r"^caption_projection\.linear_", "y_embedder.y_proj.fc"),
        (r"^caption_norm", "attention_y_norm"),
        (r"^proj_out", "final_layer.linear"),
        (r"^scale_shift_table", "final_layer.scale_shift_table"),
        (r"^transformer_blocks", "blocks"),
        (r"attn1\.to_out\.0", "attn.proj"),
        (r"attn2\.to_q", "cross_attn.q_linear"),
        (r"attn2\.to_out\.0", "cross_attn.proj"),
        (r"ff\.conv_(inverted|depth|point)", r"mlp.\1_conv.conv"),
    ],
    "qwen-image": [],
}
# Stored as (shift, scale) by the original code and as (scale, shift) by diffusers.
SWAPPED = {"sd3": ("norm_out.linear", "blocks.1.norm1_context.linear"), "flux2": ("norm_out.linear",)}


def original(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's tensors in the layout of its original code."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        path, _, leaf = key.rpartition(".")
        joined = next(
            ((ends, end) for ends, end in JOINED[name].items() for one in ends if path.endswith(f".{one}")), None
        )
        if joined is not None:
            ends, end = joined
            stem = next(path.removesuffix(one) for one in ends if path.endswith(f".{one}"))
            if path == stem + ends[0]:
                key, tensor = f"{stem}{end}.{leaf}", torch.cat([state[f"{stem}{one}.{leaf}"] for one in ends])
            else:
                continue
        elif path.endswith(SWAPPED.get(name, ("nothing",))):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for pattern, becomes in RENAMED[name]:
            key = re.sub(pattern, becomes, key)
        found[key] = tensor.contiguous()
    if name == "sana":  # present in its files, but unused
        found |= {"pos_embed": torch.zeros(1), "y_embedder.y_embedding": torch.zeros(1)}
    return found


def weights(name: str) -> dict[str, Tensor]:
    """The weights of the tiny pipeline's transformer plus 1, so that they differ from those in its folder."""
    found = load_file(tiny.pipeline(name) / "transformer" / "diffusion_pytorch_model.safetensors")
    return {key: tensor + 1 for key, tensor in found.items()}


def opened(name: str, file: Path, dtype: torch.dtype = torch.float32) -> Any:
    return open_pipeline(
        Model(name, path=str(tiny.pipeline(name)), transformer=str(file)), family_of(name).spec.pipeline, dtype
    )


@pytest.mark.parametrize("name", RENAMED)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_file_in_the_original_layout_gives_the_same_transformer(name: str, prefix: str, tmp_path: Path) -> None:
    """Alone, and with text encoders and a VAE as in a full checkpoint."""
    expected, beside = (
        weights(name),
        {"text_encoders.clip_l.x": torch.zeros(1), "vae.decoder.y": torch.zeros(1)} if prefix else {},
    )
    save_file(
        {prefix + key: tensor for key, tensor in original(name, expected).items()} | beside,
        tmp_path / "any name.safetensors",
    )
    pipeline = opened(name, tmp_path / "any name.safetensors")
    assert pipeline.transformer.state_dict().keys() == expected.keys()
    for key, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("name", ["flux1", "lumina2"])
def test_single_file_in_diffusers_layout_gives_the_same_transformer(name: str, tmp_path: Path) -> None:
    expected = weights(name)
    save_file({key: tensor.to(torch.float8_e4m3fn) for key, tensor in expected.items()}, tmp_path / "one.safetensors")
    pipeline = opened(name, tmp_path / "one.safetensors", torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16 and pipeline.vae.dtype == torch.float32
    for key, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(tensor, expected[key].to(torch.float8_e4m3fn).to(torch.bfloat16)), key


def test_run_with_a_single_file_transformer_trains_it_and_names_it(tmp_path: Path) -> None:
    from safetensors import safe_open

    save_file(original("sd3", weights("sd3")), tmp_path / "mine.safetensors")
    chosen = f"model.transformer={tmp_path / 'mine.safetensors'}"
    job = tiny.train(tiny.recipe("sd3", "lora", chosen, "train.steps=1", "sample.prompts=[]", folder=tmp_path / "run"))
    frozen = job.model.denoiser.get_parameter("transformer_blocks.0.attn.to_q.base_layer.weight")  # type: ignore[attr-defined]
    assert torch.equal(frozen, weights("sd3")["transformer_blocks.0.attn.to_q.weight"])
    with safe_open(tmp_path / "run" / "final" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["ss_sd_model_name"] == "mine"


def test_invalid_single_file_transformer_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"

    def refused(name: str, tensors: dict[str, Tensor]) -> str:
        save_file(tensors, file)
        with pytest.raises(UserError) as caught:
            opened(name, file)
        return str(caught.value)

    sd3 = original("sd3", weights("sd3"))
    assert "contains a transformer of family sd3, but the recipe's family is flux1" in refused("flux1", sd3)
    assert "diffusers cannot read single files of family pixart" in refused(
        "pixart", {"blocks.0.cross_attn.q_linear.weight": torch.zeros(1)}
    )
    assert "a LoRA" in refused("sd3", {"lora_unet_x.lora_down.weight": torch.zeros(1)})
    assert "quantized in a format of ComfyUI" in refused(
        "sd3", sd3 | {"joint_blocks.0.x_block.attn.qkv.scale_weight": torch.zeros(1)}
    )
    lacking = {key: tensor for key, tensor in sd3.items() if "final_layer.linear" not in key}
    assert "lacks some weights of sd3's transformer" in refused("sd3", lacking)
    qwen = {key: tensor for key, tensor in weights("qwen-image").items() if "proj_out" not in key}
    assert "lacks some weights of qwen-image's transformer" in refused("qwen-image", qwen)
    wider = weights("qwen-image") | {"proj_out.weight": torch.zeros(3, 3)}
    assert "model.transformer" in refused("qwen-image", wider)
    with pytest.raises(UserError, match=r"set model\.transformer to this file"):
        open_pipeline(Model("qwen-image", path=str(file)), "QwenImagePipeline", torch.float32)
    for given, said in (
        ("model.transformer=nowhere.safetensors", "there is no file"),
        (f"model.transformer={tmp_path}", "is not a .safetensors file"),
    ):
        with pytest.raises(UserError, match=said):
            tiny.prepare(tiny.recipe("sd3", "lora", given, folder=tmp_path / "run"))
    with pytest.raises(UserError, match="replaces the transformer"):
        tiny.recipe("sd15", "lora", f"model.transformer={file}", folder=tmp_path / "run")
