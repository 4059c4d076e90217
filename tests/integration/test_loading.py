"""Loading models from every kind of source, and the errors when that fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.adapters.formats.kohya import sgm_path
from finetune.config.schema import Model
from finetune.errors import UserError
from finetune.models.pretrained import loading, single_file
from finetune.models.pretrained.loading import open_pipeline, open_vae
from finetune.models.registry import variants
from tests.helpers import tiny

CLASSES = {"sd15": "StableDiffusionPipeline", "sd21": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
FAMILIES = {"sd15": "sd", "sd21": "sd", "sdxl": "sdxl"}

# -- the original layout, written from a diffusers pipeline -----------------------------------------------------------


def original_unet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        found[f"model.diffusion_model.{sgm_path(path)}.{leaf}"] = tensor
    return found


def original_vae(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """CompVis' autoencoder: decoder levels count from the other end; attention is a 1×1 convolution."""
    renamed = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    found = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if len(parts) > 2 and parts[1] in ("down_blocks", "up_blocks"):
            up = parts[1] == "up_blocks"
            level = levels - 1 - int(parts[2]) if up else int(parts[2])
            rest = (
                ["upsample" if up else "downsample", *parts[5:]]
                if parts[3].endswith("samplers")
                else ["block", *parts[4:]]
            )
            parts = [parts[0], "up" if up else "down", str(level), *rest]
        elif len(parts) > 2 and parts[1] == "mid_block" and parts[2] == "resnets":
            parts = [parts[0], "mid", f"block_{int(parts[3]) + 1}", *parts[4:]]
        elif len(parts) > 2 and parts[1] == "mid_block":
            leaf = parts[-1]
            parts = [parts[0], "mid", "attn_1", renamed[".".join(parts[4:-1])], leaf]
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        found[
            "first_stage_model."
            + ".".join(parts).replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        ] = tensor
    return found


def original_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def original_open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """OpenCLIP: one matrix for query, key and value; the projection is transposed."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    renamed = {
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
    }
    found = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T
    for name, tensor in state.items():
        if not name.startswith("encoder.layers."):
            continue
        _, _, layer, *rest, leaf = name.split(".")
        block = f"transformer.resblocks.{layer}"
        if rest[-1] in ("q_proj", "k_proj", "v_proj"):
            pieces = [state[f"encoder.layers.{layer}.self_attn.{which}_proj.{leaf}"] for which in "qkv"]
            found[f"{block}.attn.in_proj_{leaf}"] = torch.cat(pieces)
        else:
            found[f"{block}.{renamed['.'.join(rest)]}.{leaf}"] = tensor
    return {prefix + name: tensor for name, tensor in found.items()}


# -- the bundled configurations, and small versions of them -----------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {
    "unet": {"norm_num_groups": 4, "sample_size": 8},
    "vae": {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 4, "sample_size": 32},
    "text_encoder": {"num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
    "text_encoder_2": {
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "hidden_size": 40,
        "projection_dim": 40,
    },
}
WIDTHS = {"sd15": 24, "sd21": 32, "sdxl": 24 + 40}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled configurations with small networks, in place of the bundled ones."""
    configs = tmp_path / "configs"
    shutil.copytree(single_file.CONFIGS, configs)
    for name, width in WIDTHS.items():
        levels = {
            "block_out_channels": [8, 8, 16],
            "attention_head_dim": [2, 2, 4],
            "transformer_layers_per_block": [1, 1, 2],
        }
        if name != "sdxl":
            levels = {"block_out_channels": [8, 8, 16, 16], "attention_head_dim": [2, 2, 4, 4]}
        changes = {
            "unet": {**SMALL["unet"], "cross_attention_dim": width, **levels},
            "text_encoder": {**SMALL["text_encoder"], "hidden_size": 24},
        }
        if name == "sd21":
            changes["text_encoder"]["hidden_size"] = width
        if name == "sdxl":
            changes["unet"] |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 40}
        for part in (configs / name).glob("*/config.json"):
            config = json.loads(part.read_text()) | SMALL[part.parent.name] | changes.get(part.parent.name, {})
            part.write_text(json.dumps(config))
    monkeypatch.setattr(single_file, "CONFIGS", configs)
    monkeypatch.setattr(single_file, "BY_WIDTH", {width: name for name, width in WIDTHS.items()})
    return configs


def nets(configs: Path) -> dict[str, nn.Module]:
    """The networks that a configuration folder describes, with their initial weights."""
    found: dict[str, nn.Module] = {}
    for part, entry in json.loads((configs / "model_index.json").read_text()).items():
        if isinstance(entry, list) and (configs / part / "config.json").is_file():
            library: Any = {"diffusers": diffusers, "transformers": transformers}[entry[0]]
            cls = getattr(library, entry[1])
            if entry[0] == "diffusers":
                found[part] = cls.from_config(cls.load_config(configs / part))
            else:
                found[part] = cls(cls.config_class.from_pretrained(configs / part))
    return found


def original(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A whole checkpoint in the original layout."""
    found = original_unet(parts["unet"].state_dict()) | original_vae(parts["vae"].state_dict(), 4)
    if "text_encoder_2" in parts:
        found |= original_clip(parts["text_encoder"].state_dict(), "conditioner.embedders.0.transformer.")
        found |= original_open_clip(parts["text_encoder_2"].state_dict(), "conditioner.embedders.1.model.")
    elif parts["text_encoder"].config.hidden_size == WIDTHS["sd21"]:  # type: ignore[union-attr]
        found |= original_open_clip(parts["text_encoder"].state_dict(), "cond_stage_model.model.")
    else:
        found |= original_clip(parts["text_encoder"].state_dict(), "cond_stage_model.transformer.")
    return {name: tensor.contiguous() for name, tensor in found.items()}


@pytest.mark.parametrize("name", CLASSES)
def test_single_file_gives_the_same_pipeline(name: str, small: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    parts = nets(small / name)
    save_file(original(parts), tmp_path / "any name.safetensors")
    section = Model(FAMILIES[name], path=str(tmp_path / "any name.safetensors"))
    opened: Any = open_pipeline(section, CLASSES[name], torch.float32)
    for part, net in parts.items():
        loaded = getattr(opened, part).state_dict()
        assert loaded.keys() == net.state_dict().keys()
        for key, tensor in net.state_dict().items():
            assert torch.equal(loaded[key], tensor), f"{part}.{key}"
        net.eval()
    tokenizers = {key: single_file.clip_tokenizer(padding) for key, padding in variants()[name][1].padding.items()}
    cls: Any = getattr(diffusers, CLASSES[name])
    checker = (
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False} if name != "sdxl" else {}
    )
    reference = cls(**parts, **tokenizers, **checker, scheduler=opened.scheduler)
    images = []
    for pipeline in (reference, opened):
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            "a red circle",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            width=32,
            height=32,
            output_type="np",
        )
        images.append(drawn.images)
    assert abs(images[0] - images[1]).max() < 1e-5  # equal weights in another memory layout
    assert images[0].std() > 0.01

    half: Any = open_pipeline(section, CLASSES[name], torch.bfloat16)
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16
    assert half.vae.dtype == torch.float32


def test_single_file_prediction_type_is_detected(small: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    path, section = tmp_path / "model.safetensors", Model("sd", path=str(tmp_path / "model.safetensors"))

    def predicted(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> dict[str, Any]:
        save_file(tensors, path, metadata)
        found: dict[str, Any] = dict(open_pipeline(section, CLASSES["sd21"], torch.float32).scheduler.config)
        return found

    tensors = original(nets(small / "sd21"))
    bias = single_file.V_BIAS
    tensors[bias] = torch.tensor([0.2, -0.2] * (tensors[bias].numel() // 2))
    assert predicted(tensors)["prediction_type"] == "v_prediction"
    tensors[bias] = tensors[bias] / 4
    assert predicted(tensors)["prediction_type"] == "epsilon"
    assert predicted(tensors, {"modelspec.prediction_type": "v"})["prediction_type"] == "v_prediction"

    tensors = original(nets(small / "sd15"))
    assert predicted(tensors)["prediction_type"] == "epsilon"
    assert predicted(tensors | {"v_pred": torch.zeros(0)})["prediction_type"] == "v_prediction"
    config = predicted(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    assert config["prediction_type"] == "v_prediction"
    for stated in ("v", "v_prediction", "v-prediction", "V Prediction", "vpred"):
        assert predicted(tensors, {"modelspec.prediction_type": stated})["prediction_type"] == "v_prediction"
    for stated in ("epsilon", "eps", "Epsilon"):
        assert predicted(tensors, {"modelspec.prediction_type": stated})["prediction_type"] == "epsilon"
    for stated in ("rectified_flow", "flow", "sample", "x0", "edm", "velocity field"):
        with pytest.raises(UserError, match=f'another target than ε or v: "{stated}"'):
            predicted(tensors, {"modelspec.prediction_type": stated})
    with pytest.raises(UserError, match=r'zero terminal SNR without v; it contains the tensor "ztsnr"'):
        predicted(tensors | {"ztsnr": torch.zeros(0)})
    for mark in ("edm_mean", "edm_vpred.sigma_max"):
        with pytest.raises(UserError, match=rf'EDM .*it contains the tensor "{mark}"'):
            predicted(tensors | {mark: torch.zeros(4)})


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("EDMEulerScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"prediction_type": "sample"}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ],
)
def test_a_folder_trained_for_another_target_is_refused(scheduler: str, config: dict[str, Any], tmp_path: Path) -> None:
    import diffusers

    base = tmp_path / "base"
    shutil.copytree(tiny.pipeline("sdxl"), base)
    getattr(diffusers, scheduler)(**config).save_pretrained(base / "scheduler")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", scheduler]}))
    with pytest.raises(UserError, match=rf"trained for another target than ε or v: its scheduler is {scheduler}"):
        tiny.prepare(tiny.recipe("sdxl", "lora", f"model.path={base}", folder=tmp_path / "run"))


@pytest.mark.parametrize(
    ("name", "unet", "text"),
    [
        ("sd15", 859_520_964, 123_060_480),
        ("sd21", 865_910_724, 340_387_840),
        ("sdxl", 2_567_463_684, 123_060_480 + 694_659_840),
    ],
)
def test_bundled_configuration_has_the_published_size(name: str, unet: int, text: int) -> None:
    with torch.device("meta"):
        count = {
            part: sum(p.numel() for p in net.parameters()) for part, net in nets(single_file.CONFIGS / name).items()
        }
    assert count["unet"] == unet
    assert count["vae"] == 83_653_863
    assert sum(size for part, size in count.items() if part.startswith("text_encoder")) == text


def header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file with tensors of these shapes, all zeros and sparse, so that it takes no disk space."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    return path


@pytest.mark.parametrize("name", CLASSES)
def test_architecture_is_read_from_the_header(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = nets(single_file.CONFIGS / name)["unet"]
    path = header(
        tmp_path / "wrong-name-sdxl-sd15.safetensors",
        {key: tuple(t.shape) for key, t in original_unet(unet.state_dict()).items()},
    )
    assert single_file.architecture(single_file.read_shapes(path), path) == name


def test_clip_tokenizer_gives_known_ids() -> None:
    """Ids from CLIP's vocabulary (openai/clip-vit-large-patch14)."""
    tokenizer = single_file.clip_tokenizer("!")
    assert len(tokenizer) == 49408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A  Photo", padding="max_length", max_length=77).input_ids == [49406, 320, 1125, 49407] + [0] * 73
    assert single_file.clip_tokenizer("<|endoftext|>").pad_token_id == 49407


# -- folders, runs, VAEs ----------------------------------------------------------------------------------------------


def test_open_pipeline_reads_folders_and_finished_runs(tmp_path: Path) -> None:
    folder = tiny.pipeline("sd15")
    opened: Any = open_pipeline(Model("sd", path=str(folder)), CLASSES["sd15"], torch.bfloat16)
    assert opened.unet.dtype == torch.bfloat16
    assert opened.vae.dtype == torch.float32
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match="has no final weights yet"):
        open_pipeline(Model("sd", path=str(tmp_path / "run")), CLASSES["sd15"], torch.float32)
    shutil.copytree(folder, tmp_path / "run" / "final")
    again: Any = open_pipeline(
        Model("sd", path=str(tmp_path / "run"), vae=str(tiny.vae())), CLASSES["sd15"], torch.float32
    )
    assert again.unet.config.block_out_channels == opened.unet.config.block_out_channels


def test_open_vae_reads_every_kind_of_source(small: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    parts = nets(small / "sdxl")
    parts["vae"].save_pretrained(tmp_path / "run" / "final")  # type: ignore[operator]
    parts["vae"].save_pretrained(tmp_path / "pipeline" / "vae")  # type: ignore[operator]
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    alone = {
        name.removeprefix("first_stage_model."): t.contiguous()
        for name, t in original_vae(parts["vae"].state_dict(), 4).items()
    }
    save_file(alone, tmp_path / "alone.safetensors")
    save_file(original(parts), tmp_path / "whole.safetensors")
    expected = parts["vae"].state_dict()
    for place in ("run", "run/final", "pipeline", "alone.safetensors", "whole.safetensors"):
        vae = open_vae(str(tmp_path / place), CLASSES["sdxl"])
        assert vae.config.scaling_factor == 0.13025
        assert all(torch.equal(tensor, expected[name]) for name, tensor in vae.state_dict().items()), place
    assert open_vae(str(tmp_path / "alone.safetensors"), CLASSES["sd15"]).config.scaling_factor == 0.18215


# -- what cannot be loaded --------------------------------------------------------------------------------------------


def refused(path: object, class_name: str = CLASSES["sd15"]) -> str:
    with pytest.raises(UserError) as caught:
        open_pipeline(Model("sd", path=str(path)), class_name, torch.float32)
    return str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "./model",
        "/no/such/model",
        "~/no-such-model",
        "model",
        "tests/model",
        "owner/model.safetensors",
        "embedded:model",
        "a/b/c",
    ],
)
def test_missing_local_path_is_not_looked_up_on_the_hub(path: str) -> None:
    assert f"there is no file or folder {path}" in refused(path)


def test_unreachable_or_gated_hub_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the Hub cannot be reached" in refused("owner/model")
    with pytest.raises(UserError, match="the Hub cannot be reached"):
        open_vae("owner/model")

    def gated(*_: object) -> str:
        response: Any = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("403 Client Error", response=response)

    for name in ("get_hf_file_metadata", "hf_hub_download"):
        monkeypatch.setattr(loading, name, gated)
    said = refused("owner/model")
    assert "accept the license on https://huggingface.co/owner/model" in said
    assert "hf auth login" in said


def test_incomplete_model_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.pipeline("sd15"), folder)
    assert "set model.family: sd" in refused(folder, CLASSES["sdxl"])
    shutil.rmtree(folder / "text_encoder")
    assert "lacks its text_encoder" in refused(folder)
    shutil.copytree(tiny.pipeline("sd15") / "text_encoder", folder / "text_encoder")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "could not be loaded" in refused(folder)
    weights.rename(weights.with_suffix(".bin"))
    assert "pickles" in refused(folder)
    weights.with_suffix(".bin").unlink()
    assert "no weights" in refused(folder)
    (folder / "model_index.json").unlink()
    assert "no model_index.json" in refused(folder)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert "--merge" in refused(folder)
    assert "the folder of a single network" in refused(tiny.vae())


def test_file_that_is_not_a_model_is_refused(small: Path, tmp_path: Path) -> None:
    for name, said in (
        ("model.ckpt", "pickle"),
        ("model.bin", "pickle"),
        ("model.txt", "not a model file"),
        ("model.safetensors", "could not be loaded"),
    ):
        (tmp_path / name).write_bytes(b"nothing")
        assert said in refused(tmp_path / name)
    path = tmp_path / "file.safetensors"
    assert "is a LoRA" in refused(header(path, {"lora_unet_conv_in.lora_down.weight": (4, 4)}))
    entry, width = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    )
    assert "inpainting" in refused(header(path, {entry: (8, 9, 3, 3), width: (8, 24)}))
    assert "cross-attention is 999" in refused(header(path, {entry: (8, 4, 3, 3), width: (8, 999)}))
    assert "no such UNet" in refused(header(path, {"something": (1,)}))
    assert "no text encoder" in refused(header(path, {entry: (8, 4, 3, 3), width: (8, 24)}))
    assert "set model.family: sdxl" in refused(header(path, {width: (8, WIDTHS["sdxl"])}))
    tensors = original(nets(small / "sd15"))
    save_file({name: t for name, t in tensors.items() if not name.startswith("first_stage_model.")}, path)
    assert "has no VAE" in refused(path)
    save_file({name: t for name, t in tensors.items() if "time_embed.2" not in name}, path)
    assert "lacks some weights" in refused(path)
    save_file({name: t for name, t in tensors.items() if "layers.1.mlp.fc1" not in name}, path)
    assert "lacks some weights" in refused(path)
