"""Key maps of transformer LoRAs: diffusers' own converters read the exported files back, layer by layer.

The converters of FLUX.1 and Lumina 2 work for the real widths only, so these layers have them; at rank 2 a LoRA is
still small.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.adapters import peft
from finetune.adapters.formats.metadata import PEFT
from finetune.adapters.lora_file import LORA_FILE
from finetune.errors import UserError
from finetune.export import export
from finetune.models.registry import specs
from finetune.paths import ASSETS
from tests.helpers import tiny

Layers = dict[str, tuple[int, int]]  # path → (outputs, inputs)
CLASSES = {
    slug: spec.pipeline
    for slug, spec in specs().items()
    if slug in tiny.FLOWS and spec.lora_formats and hasattr(getattr(diffusers, spec.pipeline), "lora_state_dict")
}


def attention(block: str, width: int, names: tuple[str, ...]) -> Layers:
    return {f"{block}.attn.{name}": (width, width) for name in names}


BOTH = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FLUX = {
    **attention("transformer_blocks.1", 64, BOTH),
    **{f"transformer_blocks.1.{name}": (256, 64) for name in ("ff.net.0.proj", "ff_context.net.0.proj")},
    **{f"transformer_blocks.1.{name}": (64, 256) for name in ("ff.net.2", "ff_context.net.2")},
    **attention("single_transformer_blocks.3", 3072, ("to_q", "to_k", "to_v")),
    "single_transformer_blocks.3.proj_mlp": (12288, 3072),
    "single_transformer_blocks.3.proj_out": (3072, 15360),
}
FLUX2 = {
    **attention("transformer_blocks.0", 64, BOTH),
    **{f"transformer_blocks.0.{name}": (384, 64) for name in ("ff.linear_in", "ff_context.linear_in")},
    **{f"transformer_blocks.0.{name}": (64, 192) for name in ("ff.linear_out", "ff_context.linear_out")},
    "single_transformer_blocks.2.attn.to_qkv_mlp_proj": (576, 64),
    "single_transformer_blocks.2.attn.to_out": (64, 256),
    "x_embedder": (64, 128),
}
QWEN = {
    **attention("transformer_blocks.0", 64, BOTH),
    "transformer_blocks.0.img_mlp.net.0.proj": (256, 64),
    "transformer_blocks.0.txt_mlp.net.2": (64, 256),
    "transformer_blocks.0.img_mod.1": (384, 64),
}
Z_IMAGE = {
    f"{block}.{layer}": (64, 64)
    for block in ("layers.1", "noise_refiner.0", "context_refiner.1")
    for layer in (
        *(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
        "feed_forward.w1",
        "feed_forward.w2",
    )
}
LUMINA2 = {
    **{
        f"layers.0.attn.{name}": (width, 2304)
        for name, width in (("to_q", 2304), ("to_k", 768), ("to_v", 768), ("to_out.0", 2304))
    },
    **{f"layers.0.feed_forward.linear_{number}": (64, 64) for number in (1, 2, 3)},
    "layers.0.norm1.linear": (64, 64),
}
SD3 = attention("transformer_blocks.2", 64, BOTH)
LAYERS: dict[str, Layers] = {
    "sd3": SD3,
    "flux1": FLUX,
    "flux2": FLUX2,
    "qwen-image": QWEN,
    "z-image": Z_IMAGE,
    "lumina2": LUMINA2,
    "pixart": SD3,
}


@functools.cache
def layers_of(family: str) -> Layers:
    """One block of each kind: the layers that attention+mlp adapts, with the shapes of the published network."""
    if family in LAYERS:
        return LAYERS[family]
    spec = specs()[family]
    config = ASSETS / "configs" / next(iter(spec.variants)) / spec.denoiser / "config.json"
    with torch.device("meta"):
        network = getattr(diffusers, spec.denoiser_class).from_config(json.loads(config.read_text(encoding="utf-8")))
    return {
        name: (network.get_submodule(name).out_features, network.get_submodule(name).in_features)
        for name in peft.layers(network, "attention+mlp")
        if ".0." in name
    }


def run_of(
    family: str, folder: Path, alpha: float = 2.0, layers: Layers | None = None
) -> tuple[Path, dict[str, Tensor]]:
    """A run's folder with a LoRA of rank 2, and its tensors."""
    torch.manual_seed(0)
    tensors = {}
    for path, (outputs, inputs) in (layers or layers_of(family)).items():
        tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(2, inputs)
        tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(outputs, 2)
    (folder / "final").mkdir(parents=True)
    settings = {"transformer.r": 2, "transformer.lora_alpha": alpha, "transformer.use_rslora": False}
    save_file(tensors, folder / "final" / LORA_FILE, {PEFT: json.dumps(settings), "format": "pt"})
    model = json.dumps({"family": family, "path": "owner/model"})
    (folder / "recipe.yaml").write_text(
        f"method: lora\nname: mine\nmodel: {model}\ndata: {{path: images}}\ntrain: {{steps: 1}}\nadapter: {{rank: 2, alpha: {alpha}}}\n"
    )
    return folder, tensors


def change(tensors: dict[str, Tensor], path: str) -> Tensor:
    """What the LoRA adds to a layer's outputs for eight random inputs, in float64.

    The weight product would be large.
    """
    down, up = (tensors[f"transformer.{path}.lora_{side}.weight"].double() for side in "AB")
    return up @ (down @ torch.randn(down.shape[1], 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def read_back(family: str, file: Path) -> dict[str, Tensor]:
    found = getattr(diffusers, CLASSES[family]).lora_state_dict(str(file))
    state: dict[str, Tensor] = found[0] if isinstance(found, tuple) else found
    return state


@pytest.mark.parametrize(
    ("family", "layout"), [(family, layout) for family in CLASSES for layout in specs()[family].lora_formats]
)
def test_exported_lora_is_read_back_by_diffusers_unchanged(family: str, layout: str, tmp_path: Path) -> None:
    run, tensors = run_of(family, tmp_path / "run")
    (file,) = export(run, layout)
    back = read_back(family, file)
    paths = {
        name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        for name in back
        if name.endswith(".lora_A.weight")
    }
    assert paths == set(layers_of(family))
    for path in paths:
        torch.testing.assert_close(change(back, path), change(tensors, path), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("family", "layout"), [("flux1", "kohya"), ("flux2", "comfyui"), ("qwen-image", "comfyui")])
def test_export_folds_the_lora_scale_into_the_weights(family: str, layout: str, tmp_path: Path) -> None:
    run, tensors = run_of(family, tmp_path / "run", alpha=3.0)
    (file,) = export(run, layout)
    back = read_back(family, file)
    for path in layers_of(family):
        torch.testing.assert_close(change(back, path), 1.5 * change(tensors, path), rtol=1e-5, atol=1e-4)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["ss_network_alpha"] == opened.metadata()["ss_network_dim"] == "2"


def test_export_of_part_of_a_fused_layer_fills_the_rest_with_zeros(tmp_path: Path) -> None:
    """Targets may be q and v alone: the original code's single layer then has zero rows for k and the MLP."""
    layers = {f"single_transformer_blocks.0.attn.{name}": (3072, 3072) for name in ("to_q", "to_v")}
    run, tensors = run_of("flux1", tmp_path / "run", layers=layers)
    (file,) = export(run, "kohya")
    written = load_file(file)
    assert written["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (21504, 4)
    back = read_back("flux1", file)
    for path in layers:
        torch.testing.assert_close(change(back, path), change(tensors, path), rtol=1e-12, atol=1e-12)
    for path in ("single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.proj_mlp"):
        assert not change(back, path).any()


def test_export_names_keys_as_other_programs_do(tmp_path: Path) -> None:
    expected = {
        ("flux1", "kohya"): "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight",
        ("flux1", "comfyui"): "transformer.single_transformer_blocks.3.proj_mlp.lora_B.weight",
        ("flux2", "comfyui"): "diffusion_model.double_blocks.0.txt_attn.qkv.lora_A.weight",
        ("qwen-image", "kohya"): "lora_unet_transformer_blocks_0_attn_add_q_proj.alpha",
        ("z-image", "comfyui"): "transformer.layers.1.attention.to_out.0.lora_B.weight",
        ("lumina2", "comfyui"): "diffusion_model.layers.0.attention.qkv.lora_B.weight",
        ("pixart", "comfyui"): "transformer.transformer_blocks.2.attn.to_q.lora_A.weight",
    }
    for (family, layout), name in expected.items():
        (file,) = export(run_of(family, tmp_path / f"{family}-{layout}")[0], layout, dtype="bfloat16")
        assert load_file(file)[name].dtype == torch.bfloat16


def test_export_in_an_unsupported_format_is_refused(tmp_path: Path) -> None:
    assert "kohya" not in specs()["z-image"].lora_formats  # ComfyUI would load none of its layers

    def refused(family: str, layout: str, layers: Layers | None = None) -> str:
        with pytest.raises(UserError) as caught:
            export(run_of(family, tmp_path / f"{family}-{layout}-{len(layers or ())}", layers=layers)[0], layout)
        return str(caught.value)

    assert "the comfyui format does not exist for family sana" in refused("sana", "comfyui", SD3)
    assert "export it as diffusers or comfyui" in refused("sd3", "kohya")
    assert 'no name for the layer "norm_out.linear"' in refused("flux1", "kohya", {"norm_out.linear": (8, 8)})
