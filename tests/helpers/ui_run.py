"""A run's folder as `ft train` leaves it, written in milliseconds: for pages that read runs."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict
from pathlib import Path

import yaml
from PIL import Image

from finetune.config.loader import load_recipe, to_dict
from finetune.config.machine import Machine
from finetune.data.media.image import ImageSample
from finetune.data.shape import ImageShape
from finetune.planning import DataFacts, Plan, describe
from finetune.training.run_status import Status
from tests.helpers import web

GIB = 2**30


def finished_run(folder: Path, steps: int, prompt: str = "rocket") -> Plan:
    """A finished LoRA run of the embedded base with samples at its start and its end, checkpoints and an estimate."""
    recipe = load_recipe("lora/emoji", (f"train.steps={steps}", f"sample.prompts={json.dumps([prompt, 'fox face'])}"))
    data = DataFacts(20, 20, 2, ((ImageShape(64, 64), 20),), "0" * 64)
    machine = Machine("cpu", "a CPU", processes=1, threads=1, bfloat16=False, memory_bytes=8 * GIB)
    plan = Plan(recipe, data, machine, "float32", 8, 2.5, steps, str(folder), ())
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True))
    _write(folder / "plan.json", describe(plan))
    _write(folder / "versions.json", {"torch": "2.9"})
    measured = {"estimated": GIB, "measured": 1.5 * GIB, "not_measured": None}
    pace = {"estimated": 0.2, "measured": 0.25, "steps": steps}
    _write(
        folder / "estimate.json",
        {"gpu": "a CPU", "no_estimate": None, "memory_bytes": measured, "seconds_per_step": pace},
    )
    web.write_metrics(folder, steps)
    for step, loss in ((steps // 2, 0.25), (steps, 0.5)):
        place = folder / "checkpoints" / f"step-{step}"
        place.mkdir(parents=True)
        _write(place / "manifest.json", {})
        _write(place / "state.json", {"step": step, "validation": loss})
    for step in (0, steps):
        place = folder / "samples" / f"step-{step}"
        place.mkdir(parents=True)
        for number, text in enumerate((prompt, "fox face")):
            image = ImageSample(Image.new("RGB", (64, 64), (step % 256, 80 * number, 90)))
            image.save(place / f"{number:02d}.png", {"prompt": text, "seed": str(number)})
        Image.new("RGB", (64, 64)).save(place / "grid.png")
    (folder / "final").mkdir()
    (folder / "final" / "pytorch_lora_weights.safetensors").write_bytes(b"0" * 1000)
    (folder / "final" / "README.md").write_text("---\ntags: [lora]\n---\n\n# lora-emoji\n\nA LoRA of the base.\n")
    (folder / "status").mkdir()
    now = time.time()
    status = Status("finished", "", steps, steps, 0, socket.gethostname(), 1, now - 100, now, now)
    _write(folder / "status" / "0.json", asdict(status))
    return plan


def _write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, default=str))
