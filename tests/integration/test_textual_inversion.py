"""Textual inversion with a LoRA: of the text encoders only the new words train; plain diffusers reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from finetune.errors import UserError
from finetune.export import export
from finetune.export.usage import usage
from finetune.inference.lora_sweep import compare
from finetune.inference.sample import sample
from finetune.job import Job
from finetune.models.pretrained.textual_inversion import NewTokens
from tests.helpers import tiny

PROMPT = "a red <it>"
# Plain diffusers, by the code that the report and the model card show.
FRESH = """
import json, sys, torch
torch.set_num_threads(1)
for job in json.load(open(sys.argv[1])):
    scope = {}
    exec(job["lines"], scope)
    scope["pipeline"](job["prompt"], negative_prompt="", guidance_scale=3, num_inference_steps=2, width=32, height=32,
                      generator=torch.Generator().manual_seed(0)).images[0].save(job["out"])
assert not any(name.partition(".")[0] == "finetune" for name in sys.modules)
"""


@cache
def trained(name: str) -> Job:
    words = "tokens=[{token: <it>, init_word: circle, vectors: 2}]"
    given = (
        "data.path=null",
        f'data.sources=[{{path: "{tiny.images()}", prefix: <it>}}]',
        "data.long_captions=truncate",
        "data.caption_dropout=0",
    )
    more = (
        "adapter.alpha=2",
        f"sample.prompts=[{PROMPT}]",
        "optimizer.lr=0.02",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=9",
    )
    text = ("model.train_text_encoder=true",) if name == "sdxl" else ("train.ema=0.5",)
    return tiny.train(tiny.recipe(name, "lora", *given, words, *more, *text, folder=tiny.root() / f"words-{name}"))


def pixels(file: Path) -> numpy.ndarray:
    with Image.open(file) as image:
        return numpy.asarray(image.convert("RGB")).astype(int)


@cache
def generated_by_diffusers() -> Path:
    folder = tiny.root() / "words-plain"
    folder.mkdir()
    jobs = []
    for name in ("sd15", "sdxl"):
        run = trained(name).run.folder
        lines = "\n".join(usage(trained(name).plan, str(tiny.pipeline(name)), str(run / "final")).splitlines()[:-1])
        jobs.append({"lines": lines, "prompt": PROMPT, "out": str(folder / f"{name}.png")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(folder / "jobs.json")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_textual_inversion_trains_only_its_words_and_diffusers_agrees(name: str) -> None:
    job = trained(name)
    names = set(job.model.trained())
    rows = {key for key in names if key.endswith("token_embedding.offset")}
    encoders = {"sd15": 1, "sdxl": 2}[name]
    assert len(rows) == encoders
    assert all(".lora_" in key for key in names - rows)
    assert any(".encoders." in key for key in names - rows) == (name == "sdxl"), (
        "only if the recipe trains the text encoders too"
    )
    one = load_file(job.run.folder / "checkpoints" / "step-0000001" / "weights.safetensors")
    assert all(one[key].abs().min(1).values.gt(0).all() for key in rows), "both vectors of the word have changed"

    folder = job.run.folder / "samples"
    last = pixels(folder / "step-0000002" / "00.png")
    assert abs(last - pixels(folder / "step-0000000" / "00.png")).max() > 5
    assert abs(pixels(generated_by_diffusers() / f"{name}.png") - last).max() <= 1


def test_textual_inversion_files_card_and_merge_contain_the_words(tmp_path: Path) -> None:
    run = trained("sd15").run.folder
    (file,) = (run / "final" / "embeddings").iterdir()
    assert {key: tensor.shape for key, tensor in load_file(file).items()} == {"<it>": (2, 32)}
    sdxl = load_file(trained("sdxl").run.folder / "final" / "embeddings" / "it.safetensors")
    assert sorted(sdxl) == ["clip_g", "clip_l"]
    assert "Write into the prompt `<it>`" in (run / "final" / "README.md").read_text()
    (again,) = sample(run, [], out=tmp_path / "again")
    last = pixels(run / "samples" / "step-0000002" / "00.png")
    assert abs(pixels(again) - last).max() <= 1
    compare(run, [1], [2], out=tmp_path / "sheet")
    assert abs(pixels(tmp_path / "sheet" / "00-step-2-strength-1.png") - last).max() <= 1
    export(run, merge=True, out=tmp_path / "merged")
    (merged,) = sample(tmp_path / "merged", [PROMPT], seeds=[0], steps=2, guidance=3, out=tmp_path / "of-merged")
    assert abs(pixels(merged) - last).max() <= 1


def test_new_tokens_start_from_the_word_and_scale_their_gradient() -> None:
    embedding = nn.Embedding(10, 4)
    words = NewTokens(embedding, torch.ones(2, 4), torch.tensor([1.0, 5.0]))
    ids = torch.tensor([[3, 10, 11, 9]])
    assert torch.equal(words(ids)[0, [0, 3]], embedding.weight[[3, 9]])
    assert torch.equal(words(ids)[0, 1:3], torch.ones(2, 4))
    words(ids).sum().backward()
    assert words.offset.grad is not None
    assert words.offset.grad.tolist() == [[1.0] * 4, [5.0] * 4]
    with torch.no_grad():
        words.offset.add_(0.1)
    torch.testing.assert_close(words.rows(), torch.tensor([[1.1] * 4, [1.5] * 4]))


def test_textual_inversion_with_invalid_tokens_is_refused(tmp_path: Path) -> None:
    def refused(*overrides: str, method: str = "lora") -> str:
        with pytest.raises(UserError) as caught:
            tiny.prepare(tiny.recipe("sd15", method, *overrides, folder=tmp_path / "run"))
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    assert 'no caption contains the token "<it>"' in refused("tokens=[{token: <it>}]")
    assert 'the tokenizer already has the token "e</w>"' in refused(
        "tokens=[{token: e</w>}]", "data.path=null", source("e</w>")
    )
    assert "must be one word" in refused("tokens=[{token: my dog}]")
    assert "given twice" in refused("tokens=[{token: <it>}, {token: <it>}]")
    assert "together with a LoRA" in refused("tokens=[{token: <it>}]", method="full")
    assert 'did you mean "vectors"' in refused("tokens=[{token: <it>, vector: 2}]")


def source(prefix: str) -> str:
    return f'data.sources=[{{path: "{tiny.images()}", prefix: {prefix}}}]'
