"""Write a model card: `final/README.md` with the hub's front matter and sample images. It contains no local paths.

Front matter: https://huggingface.co/docs/hub/model-cards. It names no license: that depends on the base and the author.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from finetune import terminal
from finetune.config.schema import trigger_words
from finetune.export.usage import usage
from finetune.models.registry import spec_of
from finetune.paths import public_name
from finetune.planning import Plan
from finetune.report import images, tables
from finetune.training.run_list import read_json

MOST_IMAGES = 8
HERE = "FOLDER-OF-THIS-FILE"
PRIVATE = ("folder", "base", "note")  # rows of the plan that may contain local paths
COMFYUI = (
    "`ft export RUN --format comfyui` writes the LoRA with ComfyUI's layer names. Put that file into "
    "`ComfyUI/models/loras` and load it with the node *Load LoRA* between the checkpoint and the sampler. Do not put "
    "`pytorch_lora_weights.safetensors` there: that file is for diffusers, and ComfyUI ignores its layers or its alpha."
)
WORDS = "Put the files in `embeddings` into `ComfyUI/models/embeddings`; in prompts, write `embedding:NAME`."
METHODS = {"lora": "LoRA", "full": "fine-tuned model", "scratch": "model trained from scratch"}


def write_card(final: Path, run: Path, plan: Plan, steps: int) -> Path:
    """Write the card into `final`, with the last samples of the run beside it; returns its path.

    Args:
        final: the folder with the result.
        run: the run's folder, with its samples, data and versions.
        plan: the run's plan.
        steps: steps trained.
    """
    shown = _copied(final, run, plan)
    recipe, parts = plan.recipe, []
    words = trigger_words(recipe)
    base = public_name(recipe.model.path or "")
    what = METHODS[recipe.method] + (
        f" for {base}" if base and recipe.method == "lora" else f", from {base}" if base else ""
    )
    parts.append(
        f"# {_line(recipe.name)}\n\nA {_line(what)}: {plan.data.images} images, {steps} steps of {plan.global_batch}."
    )
    if words:
        parts.append("Write into the prompt " + " or ".join(f"`{word}`" for word in words) + ".")
    if shown:
        parts.append(_table(["image", "prompt"], [[f"![{_line(text)}]({file})", _line(text)] for file, text in shown]))
    place = base.replace("embedded:", "finetune/assets/")  # as it lies in a checkout
    if lines := usage(plan, place, HERE):
        parts.append(f"## With diffusers\n\n```python\n{lines}\n```")
    if recipe.method == "lora" and "comfyui" in spec_of(recipe.model.family).lora_formats:
        parts.append(f"## With ComfyUI\n\n{COMFYUI}" + (f" {WORDS}" if recipe.tokens else ""))
    if (data := read_json(run / "data.json")) is not None:
        parts.append("## The images\n\n" + _rows(_data(data)))
    parts.append("## The plan\n\n" + _rows(row for row in tables.plan_rows(plan) if row[0] not in PRIVATE))
    made = read_json(run / "versions.json") or {}
    if told := [f"{name} {made[name]}" for name in ("torch", "diffusers", "transformers", "peft") if name in made]:
        parts.append(f"Made with {', '.join(told)}.")
    front = yaml.safe_dump(_front_matter(plan, base, shown), sort_keys=False, allow_unicode=True)
    path = final / "README.md"
    path.write_text(f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _front_matter(plan: Plan, base: str, shown: list[tuple[str, str]]) -> dict[str, Any]:
    """The hub's metadata. A base that is not on the hub is left out."""
    recipe = plan.recipe
    draws = spec_of(recipe.model.family).pretrained
    found: dict[str, Any] = {}
    if "/" in base and not base.startswith("embedded:"):
        found |= {"base_model": base, "base_model_relation": "adapter" if recipe.method == "lora" else "finetune"}
    found |= {"library_name": "diffusers"} | ({"pipeline_tag": "text-to-image"} if draws else {})
    if words := trigger_words(recipe):
        found["instance_prompt"] = words[0]
    found["tags"] = [
        *(["text-to-image"] if draws else []),
        "diffusers",
        "diffusers-training",
        *(["lora"] if recipe.method == "lora" else []),
    ]
    if draws and shown:
        found["widget"] = [{"text": text, "output": {"url": file}} for file, text in shown]
    return found


def _copied(final: Path, run: Path, plan: Plan) -> list[tuple[str, str]]:
    """Copy the run's last samples into `final`; returns (file as the card names it, prompt)."""
    looks = images.sample_files(run, plan.recipe.sample.prompts)
    found = []
    for drawn in looks[max(looks)][:MOST_IMAGES] if looks else ():
        (final / "images").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(drawn.path, final / "images" / drawn.path.name)
        found.append((f"images/{drawn.path.name}", str(drawn.prompt)))  # Pillow's text has a class of its own
    return found


def _data(found: dict[str, Any]) -> Iterable[terminal.Row]:
    """Counts and sizes; names of problematic files are left out."""
    return tables.data_rows(found | {"problems": []})


def _rows(rows: Iterable[terminal.Row]) -> str:
    return _table(["", ""], [[_line(name), _line(text)] for name, text in rows])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _line(text: str) -> str:
    """Escape text as one line of Markdown."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#" else letter for letter in text)
