"""Invalid recipes and images: one clear message with the fix, exit code 2, nothing overwritten."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import finetune
from tests.helpers import tiny
from tests.helpers.scenes import Cases, Scene, check, check_refusal, scene

__all__ = ["scene"]

ROOT = Path(finetune.__file__).resolve().parent.parent

CASES = Cases()
case = CASES.case


def png_of_20000_pixels() -> bytes:
    rows = zlib.compress(b"\0" * (20_000 // 8 + 1) * 20)  # one bit a pixel
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 20_000, 20, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


# -- the recipe -----------------------------------------------------------------------------------------------------------


@case(r'unknown key "batchsize" in train.*--set train.batchsize', 'did you mean "batch_size"')
def misspelled_key(scene: Scene) -> None:
    scene.set("train.batchsize=2")


@case(r'unknown key "optimizr".*recipe.yaml:8', 'did you mean "optimizer"')
def misspelled_section(scene: Scene) -> None:
    scene.recipe.write_text(re.sub("^optimizer", "optimizr", scene.recipe.read_text(), flags=re.MULTILINE) + "\n")
    scene.recipe.write_text("# a\n# b\n# c\n" + scene.recipe.read_text())


@case("train.batch_size must be a whole number", "write a whole number")
def wrong_type(scene: Scene) -> None:
    scene.set("train.batch_size=many")


@case("train.batch_size must be between 1 and 16,384", "between 1 and 16,384")
def out_of_range(scene: Scene) -> None:
    scene.set("train.batch_size=0")


@case('there is no model family "sdlx"', 'did you mean "sdxl"')
def unknown_family(scene: Scene) -> None:
    scene.set("model.family=sdlx")


@case('"adam" is not a choice of optimizer.name', "adamw")
def unknown_choice(scene: Scene) -> None:
    scene.set("optimizer.name=adam")


@case("not valid YAML.*recipe.yaml:", "indentation")
def broken_yaml(scene: Scene) -> None:
    scene.append("sample: [\n")


@case("not UTF-8.*recipe.yaml", "UTF-8")
def recipe_in_another_encoding(scene: Scene) -> None:
    scene.recipe.write_bytes(scene.recipe.read_bytes() + "# café\n".encode("latin-1"))


@case("there is no recipe", "ft recipes")
def missing_recipe(scene: Scene) -> None:
    scene.recipe.unlink()


@case("method is full, not lora", "finetune/full.py")
def recipe_of_another_method(scene: Scene) -> None:
    scene.recipe.write_text(tiny.text("sd15", "full", scene.run))


@case("--set needs KEY=VALUE", "train.batch_size=2")
def override_without_a_value(scene: Scene) -> None:
    scene.set("train.steps")


@case("train.steps or train.epochs", "exactly one")
def two_lengths(scene: Scene) -> None:
    scene.set("train.epochs=2")


@case("nf4 weights cannot be trained", "method: lora")
def full_fine_tuning_of_four_bits(scene: Scene) -> None:
    scene.recipe.write_text(tiny.text("sd15", "full", scene.run))
    scene.set("model.quantize=nf4")


@case("saves nothing without gradient checkpointing", "train.gradient_checkpointing: true")
def offloaded_blocks_that_are_kept(scene: Scene) -> None:
    scene.set("train.offload_blocks=true", "train.gradient_checkpointing=2")


@case("is for transformers such as FLUX", "remove train.offload_blocks")
def offloaded_blocks_of_a_unet(scene: Scene) -> None:
    scene.set("train.offload_blocks=true", "train.gradient_checkpointing=true")


@case("predicts noise: the `flow` section", "see `diffusion`")
def flow_of_a_net_that_predicts_noise(scene: Scene) -> None:
    scene.set("flow={sampling: mode}")


@case("predicts a velocity: the `diffusion` section", "see `flow`")
def noise_schedule_of_a_flow(scene: Scene) -> None:
    scene.set("model.family=flux1", "diffusion={min_snr_gamma: 5}")


@case("predicts a velocity: its prediction cannot be chosen", "remove model.prediction")
def prediction_of_a_flow(scene: Scene) -> None:
    scene.set("model.family=flux1", "model.prediction=epsilon")


@case("is for frozen text encoders; here they train", "model.train_text_encoder: false")
def quantised_encoders_that_train(scene: Scene) -> None:
    scene.set("model.text_encoder_placement=nf4", "model.train_text_encoder=true")


def full(scene: Scene, *assignments: str) -> None:
    scene.recipe.write_text(tiny.text("sd15", "full", scene.run))
    scene.set(*assignments)


@case("needs all of them", "optimizer.clip: tensor")
def fused_backward_clipped_by_the_global_norm(scene: Scene) -> None:
    full(scene, "train.fused_backward=true")


@case("train.fused_backward saves nothing with train.accumulation", "train.accumulation: 1")
def fused_backward_with_accumulation(scene: Scene) -> None:
    full(scene, "train.fused_backward=true", "optimizer.clip_norm=null", "train.accumulation=2")


@case("saves next to nothing with a LoRA", "remove train.fused_backward")
def fused_backward_of_an_adapter(scene: Scene) -> None:
    scene.set("train.fused_backward=true", "optimizer.clip_norm=null")


@case("train.weights: bfloat16 is for full fine-tuning", "model.quantize")
def adapter_in_bfloat16(scene: Scene) -> None:
    scene.set("train.weights=bfloat16")


@case("computes in bfloat16, not in float32", "train.precision: bfloat16")
def bfloat16_weights_in_float32(scene: Scene) -> None:
    full(scene, "train.weights=bfloat16", "train.precision=float32")


@case("updates one tensor at a time; prodigy needs all", "optimizer.name to one of adamw")
def bfloat16_weights_by_an_optimizer_that_needs_all(scene: Scene) -> None:
    full(scene, "train.weights=bfloat16", "optimizer.name=prodigy")


@case("a feature of bitsandbytes' adamw8bit; adafactor", "adamw8bit")
def paged_adafactor(scene: Scene) -> None:
    scene.set("optimizer.paged=true", "optimizer.name=adafactor")


# -- images and captions ------------------------------------------------------------------------------------------------


@case('there is no folder ".*nowhere"', "data.path")
def missing_folder(scene: Scene) -> None:
    scene.set(f"data.path={scene.folder / 'nowhere'}")


@case("is a file", "the folder that contains it")
def file_for_a_folder(scene: Scene) -> None:
    scene.set(f"data.path={scene.data / 'zero.png'}")


@case('there is no folder "nobody/nothing", and no dataset of that name could be loaded', "network")
def data_set_that_no_hub_gives(scene: Scene) -> None:
    scene.set("data.path=nobody/nothing")


@case("contains no images", "add images")
def empty_data_set(scene: Scene) -> None:
    for file in scene.data.iterdir():
        file.unlink()
    (scene.data / "README.md").write_text("no images here")


@case("1 missing caption.*one.png", "data.missing_captions: empty")
def missing_caption(scene: Scene) -> None:
    (scene.data / "one.txt").unlink()


@case(r"1 unreadable caption.*one.txt is not UTF-8 \(byte 4\)", "UTF-8")
def caption_in_another_encoding(scene: Scene) -> None:
    (scene.data / "one.txt").write_bytes("un café".encode("utf-16-le").replace(b"\0", b"")[:3] + b" \xe9t\xe9")


@case(r"metadata.csv is not UTF-8 text \(byte", "UTF-8")
def metadata_in_another_encoding(scene: Scene) -> None:
    (scene.data / "metadata.csv").write_bytes("file_name,text\none.png,été\n".encode("cp1252"))


@case(r"1 missing image.*metadata.jsonl:6 \(\"gone.png\"\)", "remove the line")
def metadata_of_a_missing_image(scene: Scene) -> None:
    names = [file.name for file in sorted(scene.data.iterdir()) if file.suffix != ".txt"]
    (scene.data / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": name, "text": "x"}) for name in [*names, "gone.png"])
    )


@case("metadata.jsonl:1", "one object per line")
def metadata_that_is_no_json(scene: Scene) -> None:
    (scene.data / "metadata.jsonl").write_text("one.png: an image\n")


@case(r"1 unreadable image.*four.jpg: damaged or truncated", "unreadable_images: skip")
def truncated_jpeg(scene: Scene) -> None:
    content = (scene.data / "four.jpg").read_bytes()
    (scene.data / "four.jpg").write_bytes(content[:-20])


@case("1 unreadable image.*one.png: the file is empty", "unreadable_images: skip")
def empty_file(scene: Scene) -> None:
    (scene.data / "one.png").write_bytes(b"")


@case("1 unreadable image.*one.png: 20000×20 pixels", "unreadable_images: skip")
def png_20000_pixels_wide(scene: Scene) -> None:
    (scene.data / "one.png").write_bytes(png_of_20000_pixels())


@case("1 unreadable image.*out.png: links out of the folder", "unreadable_images: skip")
def link_out_of_the_folder(scene: Scene) -> None:
    shutil.copy(scene.data / "one.png", scene.folder / "secret.png")
    (scene.data / "out.png").symlink_to(scene.folder / "secret.png")


@case("no usable image is left", "table above")
def nothing_left_to_train_on(scene: Scene) -> None:
    for file in scene.data.glob("*.txt"):
        file.unlink()
    scene.set("data.missing_captions=skip")


@case(r"longer than the 16 tokens.*: 1 of 5.*one.png: \d\d tokens", "data.long_captions: truncate")
def caption_longer_than_the_tokenizer_reads(scene: Scene) -> None:
    (scene.data / "one.txt").write_text("blue " * 40)


@case('"nocolor" is not an opaque CSS color.*data.background', "white")
def unknown_background(scene: Scene) -> None:
    scene.set("data.background=nocolor")


@case("no bucket has sides that are multiples of 64", "data.bucket_step")
def buckets_wider_than_the_resolution(scene: Scene) -> None:
    scene.set("data.buckets=true")


@case("sides must be multiples of", "data.resolution")
def resolution_that_the_model_cannot_halve(scene: Scene) -> None:
    scene.set("data.resolution=30")


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_one_message_and_fix(
    name: str, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(CASES[name], scene, capsys)


@pytest.mark.parametrize("name", ["misspelled_key", "missing_folder"])
def test_script_with_bad_input_ends_with_code_2(name: str, scene: Scene) -> None:
    spoil, said, remedy = CASES[name]
    spoil(scene)
    found = subprocess.run(
        [sys.executable, str(ROOT / "finetune" / "lora.py"), *scene.arguments()],
        capture_output=True,
        text=True,
        cwd=scene.folder,
        check=False,
    )
    assert found.returncode == 2
    check(found.stdout, found.stderr, said, remedy)
    assert not scene.run.exists()
