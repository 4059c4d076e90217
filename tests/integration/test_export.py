"""Export: the content of each format, and that plain diffusers generates the same image from it."""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.adapters import peft
from finetune.adapters.lora_file import LORA_FILE
from finetune.errors import UserError
from finetune.export import export
from finetune.training.run_list import validations
from tests.helpers import tiny

CLASSES: dict[str, Any] = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
EVERYWHERE = "to_q, to_k, to_v, to_out.0, proj_in, ff.net.0.proj, ff.net.2, conv1, conv_shortcut, time_emb_proj, conv, q_proj, out_proj, fc1"


@cache
def base(name: str) -> Path:
    """A tiny pipeline; SDXL's UNet has two resnets a level and three levels, as kohya's names for it assume."""
    if name == "sd15":
        return tiny.pipeline("sd15")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny.pipeline("sdxl"))
    changes = {
        "layers_per_block": 2,
        "block_out_channels": [8, 16, 16],
        "attention_head_dim": [2, 2, 4],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 1, 2],
    }
    torch.manual_seed(7)
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **changes})
    pipeline.save_pretrained(tiny.root() / "sdxl-two-layers")
    return tiny.root() / "sdxl-two-layers"


def run_of(name: str, folder: Path, *overrides: str) -> Path:
    """A run's folder with a LoRA on each trained network, as the trainer writes it, with large random weights."""
    recipe = tiny.recipe(
        name,
        "lora",
        f"model.path={base(name)}",
        "model.train_text_encoder=true",
        "adapter.alpha=3",
        *overrides,
        folder=folder,
    )
    assert recipe.adapter is not None
    pipeline = CLASSES[name].from_pretrained(base(name))
    torch.manual_seed(11)
    arguments: dict[str, Any] = {}
    for part in ("unet", "text_encoder", "text_encoder_2") if recipe.model.train_text_encoder else ("unet",):
        net = getattr(pipeline, part, None)
        if net is None:
            continue
        peft.add_adapter(net, recipe.adapter)
        for key, parameter in net.named_parameters():
            if "lora_magnitude" in key:
                parameter.data *= 1.3
            elif parameter.requires_grad:
                parameter.data.normal_(std=0.15)
        arguments |= {
            f"{part}_lora_layers": peft.lora_weights(net),
            f"{part}_lora_adapter_metadata": peft.lora_configuration(net),
        }
    CLASSES[name].save_lora_weights(folder / "final", **arguments)
    model = {"family": recipe.model.family, "path": str(base(name)), "train_text_encoder": True}
    (folder / "recipe.yaml").write_text(
        f"method: lora\nname: my style\nmodel: {json.dumps(model)}\ndata: {{path: images, resolution: {tiny.SIZE}}}\n"
        f"train: {{steps: 1}}\nadapter: {{rank: {recipe.adapter.rank}}}\n"
    )
    return folder


def generate(pipeline: Any) -> numpy.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    found: numpy.ndarray = pipeline(
        "a red circle", num_inference_steps=2, generator=generator, width=tiny.SIZE, height=tiny.SIZE, output_type="np"
    ).images[0]
    return found


def generate_with(name: str, lora: Path | None) -> numpy.ndarray:
    pipeline = CLASSES[name].from_pretrained(base(name))
    if lora is not None:
        pipeline.load_lora_weights(lora)
    return generate(pipeline)


@pytest.mark.parametrize(("name", "rslora"), [("sd15", False), ("sd15", True), ("sdxl", True)])
def test_kohya_and_merged_exports_generate_the_same_image(name: str, rslora: bool, tmp_path: Path) -> None:
    run = run_of(name, tmp_path / "run", f"adapter.targets={EVERYWHERE}", f"adapter.rslora={str(rslora).lower()}")
    expected = generate_with(name, run / "final" / LORA_FILE)
    assert abs(expected - generate_with(name, None)).max() > 0.02, "the LoRA has no effect, so this test proves nothing"

    (file,) = export(run, "kohya")
    assert file == run / "export" / "my style-kohya.safetensors"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert abs(generate_with(name, file) - expected).max() < 1e-4

    export(run, merge=True, out=tmp_path / "merged")
    assert abs(generate(CLASSES[name].from_pretrained(tmp_path / "merged")) - expected).max() < 1e-4


def test_kohya_export_has_sd_scripts_names_and_metadata(tmp_path: Path) -> None:
    file = export(
        run_of("sdxl", tmp_path / "run", f"adapter.targets={EVERYWHERE}", "adapter.rslora=true"),
        "kohya",
        dtype="float16",
    )[0]
    tensors = load_file(file)
    layers = {key.partition(".")[0] for key in tensors}
    for layer in (  # as in files that sd-scripts writes for SDXL
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_8_1_transformer_blocks_1_attn2_to_out_0",
        "lora_unet_input_blocks_3_0_op",
        "lora_unet_middle_block_1_proj_in",
        "lora_unet_middle_block_2_in_layers_2",
        "lora_unet_output_blocks_0_1_transformer_blocks_1_ff_net_0_proj",
        "lora_unet_output_blocks_2_2_conv",
        "lora_unet_output_blocks_8_0_skip_connection",
        "lora_unet_output_blocks_8_0_emb_layers_1",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_mlp_fc1",
    ):
        assert layer in layers
    assert all(
        {f"{layer}.{piece}" for piece in ("lora_down.weight", "lora_up.weight", "alpha")} <= tensors.keys()
        for layer in layers
    )
    assert tensors["lora_unet_middle_block_1_proj_in.lora_down.weight"].dtype == torch.float16
    assert float(tensors["lora_unet_middle_block_1_proj_in.alpha"]) == 6  # 3 · √4: rsLoRA's scale, folded

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert float(metadata["ss_network_alpha"]) == 6
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["ss_resolution"] == "(32, 32)"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.title"] == "my style"
    content = file.read_bytes()
    assert (
        metadata["sshs_model_hash"] == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    )


def dora(weight: Tensor, tensors: dict[str, Tensor], layer: str) -> Tensor:
    """W' = m · (W + ΔW) / ‖W + ΔW‖ by rows (arXiv:2402.09353, eq. 5).

    ComfyUI reads a scale with one entry per row in this way.
    """
    down, up, scale = (tensors[f"{layer}.{piece}"] for piece in ("lora_down.weight", "lora_up.weight", "dora_scale"))
    changed = weight + float(tensors[f"{layer}.alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1)).view(
        weight.shape
    )
    assert scale.shape == (weight.shape[0], *[1] * (weight.dim() - 1))
    norm: Tensor = changed.flatten(1).norm(dim=1).view(scale.shape)
    return scale * changed / norm


def test_dora_exports_match_the_formula(tmp_path: Path) -> None:
    run = run_of(
        "sd15", tmp_path / "run", "model.train_text_encoder=false", "adapter.targets=to_q, conv1", "adapter.dora=true"
    )
    expected = generate_with("sd15", run / "final" / LORA_FILE)
    export(run, merge=True, out=tmp_path / "merged")
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert abs(generate(merged) - expected).max() < 1e-4
    tensors = load_file(export(run, "kohya", out=tmp_path / "file.safetensors")[0])
    before, after = StableDiffusionPipeline.from_pretrained(base("sd15")).unet.state_dict(), merged.unet.state_dict()
    for layer in ("mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"):
        by_hand = dora(before[f"{layer}.weight"], tensors, f"lora_unet_{layer.replace('.', '_')}")
        torch.testing.assert_close(by_hand, after[f"{layer}.weight"], atol=1e-5, rtol=1e-4)


def test_merge_in_half_precision_keeps_the_noise_schedule(tmp_path: Path) -> None:
    run = run_of("sd15", tmp_path / "run", "model.train_text_encoder=false")
    recipe = (run / "recipe.yaml").read_text().replace('"family"', '"prediction": "v_prediction", "family"')
    (run / "recipe.yaml").write_text(recipe + "diffusion: {zero_terminal_snr: true}\n")
    files = export(run, merge=True, dtype="float16", out=tmp_path / "merged")
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float16}
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert merged.scheduler.config.prediction_type == "v_prediction"
    assert float(merged.scheduler.alphas_cumprod[-1]) == 0
    assert merged.unet.dtype == merged.text_encoder.dtype == torch.float32


def test_lora_export_in_another_dtype_keeps_its_configuration(tmp_path: Path) -> None:
    run = run_of("sd15", tmp_path / "run", "adapter.targets=to_q, q_proj")
    (file,) = export(run, dtype="bfloat16")
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(file).values())
    with safe_open(file, framework="pt") as new, safe_open(run / "final" / LORA_FILE, framework="pt") as old:
        assert new.metadata() == old.metadata()
    expected = generate_with("sd15", run / "final" / LORA_FILE)
    assert 0 < abs(generate_with("sd15", file) - expected).max() < 0.02


def scratch_run(folder: Path) -> Path:
    StableDiffusionPipeline.from_pretrained(tiny.pipeline("emoji")).save_pretrained(folder / "final")
    (folder / "recipe.yaml").write_text(tiny.text("sd", "scratch", folder))
    return folder


def test_pipeline_export_in_float16_halves_the_size(tmp_path: Path) -> None:
    run = scratch_run(tmp_path / "run")
    files = export(run, dtype="float16", out=tmp_path / "base")
    assert {file.parent.name for file in files} == {"unet", "vae", "text_encoder"}
    for file in files:
        assert file.stat().st_size < 0.6 * (run / "final" / file.relative_to(tmp_path / "base")).stat().st_size
    opened = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    assert {opened.unet.dtype, opened.vae.dtype, opened.text_encoder.dtype} == {torch.float32}
    assert opened.safety_checker is None
    assert abs(generate(opened) - generate(StableDiffusionPipeline.from_pretrained(run / "final"))).max() < 0.01


def test_checkpoint_export_equals_the_final_weights_of_its_step(tmp_path: Path) -> None:
    """Including the averages of a schedule-free optimizer, and for a run that never finished."""
    setting = ("optimizer.name=schedulefree", "optimizer.schedule=constant", "data.held_out=0.2", "sample.prompts=[]")
    every = ("train.steps=3", "train.checkpoint_every=1", "train.validate_every=1", "train.keep_checkpoints=3")
    run = tiny.train(tiny.recipe("sd15", "lora", *setting, *every, folder=tmp_path / "run")).run.folder
    final = load_file(run / "final" / LORA_FILE)
    shutil.rmtree(run / "final")
    at = {step: export(run, checkpoint=str(step))[0] for step in (2, 3)}
    last, before = load_file(at[3]), load_file(at[2])
    assert last.keys() == final.keys() == before.keys()
    assert all(torch.equal(last[name], tensor) for name, tensor in final.items())
    assert not any(torch.equal(before[name], tensor) for name, tensor in final.items())
    with safe_open(at[2], framework="pt") as file:
        assert file.metadata()["ss_steps"] == "2"
    losses = {step: loss for step, loss in validations(run / "checkpoints").items() if loss is not None}
    best = min(losses, key=lambda step: losses[step])
    (file,) = export(run, "kohya", checkpoint="best")
    assert file.name == f"tiny-step-000000{best}-kohya.safetensors"
    for asked, says in (("4", "there is no checkpoint of step 4"), ("last", '"last" is not a checkpoint')):
        with pytest.raises(UserError, match=says):
            export(run, checkpoint=asked)
    with pytest.raises(UserError, match="no final weights yet"):
        export(run)
    (run / "checkpoints" / "step-0000002" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        export(run, checkpoint="2", out=tmp_path / "never")
    for path in run.glob("checkpoints/*/state.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"validation": None}))
    with pytest.raises(UserError, match="no checkpoint of this run has a validation loss"):
        export(run, checkpoint="best")


def test_exported_files_name_no_local_paths(tmp_path: Path) -> None:
    tiny.train(tiny.recipe("sdxl", "full", "train.steps=1", "sample.prompts=[]", folder=tmp_path / "full"))
    merged = run_of("sdxl", tmp_path / "lora")
    for folder in (
        tmp_path / "full" / "final",
        export(tmp_path / "full", dtype="float16")[0].parents[1],
        export(merged, merge=True)[0].parents[1],
    ):
        texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".txt")]
        assert folder / "model_index.json" in texts
        assert not [path for path in texts if str(tiny.root()) in path.read_text(encoding="utf-8")]


def test_export_of_invalid_input_is_refused(tmp_path: Path) -> None:
    run = scratch_run(tmp_path / "run")

    def refused(*arguments: Any, **named: Any) -> str:
        with pytest.raises(UserError) as caught:
            export(*arguments, **named)
        return str(caught.value)

    existing = tmp_path / "existing"
    existing.mkdir()
    (existing / "mine.txt").write_text("mine")
    assert "already exists" in refused(run, out=existing)
    assert [path.name for path in existing.iterdir()] == ["mine.txt"]
    assert 'did you mean "kohya"' in refused(run, "khoya")
    assert 'did you mean "float16"' in refused(run, dtype="flaot16")
    assert "contains no LoRA" in refused(run, "kohya")
    assert "contains no LoRA" in refused(run, merge=True)
    assert "is not a run's folder" in refused(existing)
    assert "could not be written" in refused(run, out=existing / "mine.txt" / "below")

    weights = run / "final" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1e6
    save_file(tensors, weights)
    assert "conv_in.bias has weights too large for float16" in refused(run, dtype="float16", out=tmp_path / "half")
    assert not list(tmp_path.glob("*half*")), "a failed export must leave nothing behind"

    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    assert "no final weights yet" in refused(tmp_path / "unfinished")

    lora = run_of("sd15", tmp_path / "lora")
    assert "use one of the two" in refused(lora, "kohya", merge=True)
    assert "does not end in .safetensors" in refused(lora, "kohya", out=tmp_path / "file")
