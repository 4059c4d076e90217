"""The files in `final/` beside the weights, and a LoRA's header: accurate, readable by the hub, nothing private."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cache
from pathlib import Path

from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open

from finetune.adapters.formats.metadata import PEFT
from finetune.adapters.lora_file import LORA_FILE
from finetune.export import export
from finetune.export.model_card import COMFYUI, write_card
from finetune.paths import public_name
from finetune.planning import load_plan
from tests.helpers import tiny

PROMPT = "a [red] *circle* | `<script>`"


@cache
def run() -> Path:
    """A trained LoRA: a trigger word, a scale that is not 1, a prompt full of Markdown."""
    folder = tiny.root() / "card"
    sources = f'data.sources=[{{path: "{tiny.images()}", prefix: "sks"}}]'
    more = ("data.path=null", "data.long_captions=truncate", "adapter.rslora=true", "adapter.alpha=3")
    tiny.train(tiny.recipe("sd15", "lora", *more, sources, f'sample.prompts=["{PROMPT}"]', folder=folder))
    return folder


def header(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def content_hash(file: Path) -> str:
    content = file.read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def test_lora_header_describes_the_model_and_its_training() -> None:
    file = run() / "final" / LORA_FILE
    found = header(file)
    assert {
        "ss_network_dim": "4",
        "ss_network_alpha": "6",  # 3 · √4: rsLoRA's scale, folded into the alpha
        "ss_sd_model_name": "sd15",
        "ss_resolution": "(32, 32)",
        "ss_num_train_images": "5",
        "ss_steps": "2",
        "ss_num_epochs": "1",
        "ss_learning_rate": "0.001",
        "modelspec.title": "tiny",
        "modelspec.resolution": "32x32",
        "modelspec.trigger_phrase": "sks",
        "sshs_model_hash": content_hash(file),
        "modelspec.hash_sha256": f"0x{content_hash(file)}",
    }.items() <= found.items()
    assert found["modelspec.description"].startswith("Trained by ft on 5 images, 2 steps of 2 at about 32×32")
    assert PEFT in found


def test_exported_lora_header_has_the_same_metadata_and_its_own_hash(tmp_path: Path) -> None:
    whole = header(run() / "final" / LORA_FILE)
    for layout, out in (("diffusers", tmp_path / "half"), ("kohya", tmp_path / "half.safetensors")):
        (file,) = export(run(), layout, dtype="float16", out=out)
        found = header(file)
        assert found["sshs_model_hash"] == content_hash(file) != whole["sshs_model_hash"]
        assert {key: found[key] for key in whole if "hash" not in key and key != PEFT} == {
            key: value for key, value in whole.items() if "hash" not in key and key != PEFT
        }
        assert (PEFT in found) == (layout == "diffusers")


def test_model_card_is_valid_for_the_hub_and_shows_the_samples() -> None:
    final = run() / "final"
    card = ModelCard.load(final / "README.md")
    front = card.data.to_dict()
    assert (front["library_name"], front["pipeline_tag"], front["instance_prompt"]) == (
        "diffusers",
        "text-to-image",
        "sks",
    )
    assert "lora" in front["tags"]
    assert "base_model" not in front, "the base is not on the hub, so its link would lead nowhere"
    (shown,) = front["widget"]
    assert shown["text"] == PROMPT
    with (
        Image.open(final / shown["output"]["url"]) as image,
        Image.open(run() / "samples" / "step-0000002" / "00.png") as last,
    ):
        assert image.tobytes() == last.tobytes()
    assert r"a \[red\] \*circle\* \| \`&lt;script>\`" in card.text
    assert "pipeline.load_lora_weights('FOLDER-OF-THIS-FILE')" in card.text
    assert "| steps | 5 images / batch 2" in card.text
    assert "| train | 5 images |" in card.text


def test_model_card_says_which_file_is_not_for_comfyui() -> None:
    assert "`ft export RUN --format comfyui`" in COMFYUI
    assert "Do not put `pytorch_lora_weights.safetensors` there: that file is for diffusers" in COMFYUI


def test_model_card_names_a_base_on_the_hub(tmp_path: Path) -> None:
    plan = load_plan(run())
    model = dataclasses.replace(plan.recipe.model, path="stabilityai/stable-diffusion-2-1")
    write_card(tmp_path, run(), dataclasses.replace(plan, recipe=dataclasses.replace(plan.recipe, model=model)), 2)
    front = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert (front["base_model"], front["base_model_relation"]) == ("stabilityai/stable-diffusion-2-1", "adapter")


def test_final_folder_holds_no_private_paths() -> None:
    for file in (run() / "final").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for private in (str(tiny.root()), str(Path.home()), str(tiny.images())):
                assert private.encode() not in content, file


def test_public_name_strips_local_folders(tmp_path: Path) -> None:
    assert public_name("owner/model") == "owner/model"
    assert public_name("embedded:base") == "embedded:base"
    assert public_name(str(tmp_path / "my-model")) == "my-model"
    assert public_name("~/models/dream.v1.safetensors") == "dream.v1"
    assert public_name("./models/mine") == "mine"
