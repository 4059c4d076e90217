"""A run's report, before-after image and tables, read back with independent parsers."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pytest
from PIL import Image

from finetune.config.loader import parse_recipe
from finetune.config.machine import Machine
from finetune.config.schema import Recipe
from finetune.data.audit.audit import scan
from finetune.data.media.image import ImageSample
from finetune.errors import UserError
from finetune.planning import Plan, load_plan, make_plan
from finetune.report import images, svg_charts, tables
from finetune.report.html_report import write_report
from finetune.training.run_folder import Run
from finetune.training.samples import request_of, write_samples

HOSTILE = '<script>alert("1")</script> & </style><img src="http://example.org/x.png">'
PROMPTS = [HOSTILE, "a green house", "日本 ' \" `"]
VOID = {"meta", "img", "br", "link", "input", "path", "polyline"}


class Page(HTMLParser):
    """What a browser would see: elements with attributes, text, and the section that contains each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.found: list[tuple[str, dict[str, str], str]] = []  # tag, attributes, id of the section
        self.text: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == [], "an element was not closed"

    @property
    def section(self) -> str:
        return next((attributes["id"] for tag, attributes in reversed(self.open) if tag == "section"), "")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag not in VOID:
            self.open.append((tag, attributes))
        self.found.append((tag, attributes, self.section))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}, self.section))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data

    def images(self, section: str) -> list[numpy.ndarray]:
        return [
            decoded(attributes["src"]) for tag, attributes, where in self.found if tag == "img" and where == section
        ]

    def line(self, title: str, style: str) -> list[str]:
        """The points of the line with this style in the chart with this title."""
        tags = [(tag, attributes) for tag, attributes, _ in self.found if tag in ("svg", "polyline")]
        start = next(
            index for index, (tag, attributes) in enumerate(tags) if tag == "svg" and attributes["aria-label"] == title
        )
        following = tags[start + 1 :]
        end = next((index for index, (tag, _) in enumerate(following) if tag == "svg"), len(following))
        return next(attributes["points"].split() for _, attributes in following[:end] if attributes["class"] == style)


def decoded(address: str) -> numpy.ndarray:
    kind, _, content = address.partition(";base64,")
    assert kind == "data:image/webp"
    return numpy.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def read(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def noise(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), numpy.uint8))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six captioned images, two of them wide, one smaller than the training size; and one broken file."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(6):
        noise(number, (16, 16) if number < 3 else (32, 16) if number < 5 else (8, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(HOSTILE if number == 0 else f"image {number}", encoding="utf-8")
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "broken.txt").write_text("nothing to see", encoding="utf-8")
    return folder


def recipe_of(data: Path, folder: Path, **sections: object) -> Recipe:
    """A LoRA recipe; `sections` replace or extend its sections."""
    whole: dict[str, object] = {
        "method": "lora",
        "model": {"family": "sd", "path": "some/base", "prediction": "v_prediction"},
        "adapter": {"rank": 16, "alpha": 8, "rslora": True},
        "data": {"path": str(data), "resolution": 16, "buckets": False, "unreadable_images": "skip"},
        "train": {"steps": 40, "batch_size": 2, "accumulation": 3},
        "sample": {"prompts": PROMPTS},
        "output": {"folder": str(folder)},
    }
    given = {key: value for key, value in (whole | sections).items() if value is not None}
    return parse_recipe(json.dumps(given), "test.yaml", "<b>test")


def start(recipe: Recipe) -> Plan:
    """Create a run's folder as it is before the first step."""
    audit = scan(recipe.data)
    plan = make_plan(recipe, audit, Machine("cpu", "A processor", 1, 2, False, 2**34))
    run = Run(plan, resume=False)
    run.create()
    run.write_json("data.json", tables.facts(audit))
    return plan


def write_step_samples(plan: Plan, step: int, drawn: Sequence[Image.Image]) -> None:
    folder = Path(plan.folder) / "samples" / f"step-{step:07d}"
    folder.mkdir(parents=True)
    write_samples([ImageSample(image) for image in drawn], request_of(plan), folder)


def log(plan: Plan, steps: int) -> None:
    run = Run(plan, resume=True)
    for step in range(1, steps + 1):
        record = {"step": step, "seconds": 0.5, "lr": 1e-4, "loss.denoiser": 1 / step, "gradient.denoiser": 2.0}
        run.log(record | ({"validation": 0.5} if step % 10 == 0 else {}))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("runs") / "run"
    plan = start(recipe_of(data, folder))
    log(plan, 40)
    for number, step in enumerate((0, 20, 40)):
        write_step_samples(plan, step, [noise(100 + 10 * number + prompt) for prompt in range(3)])
    (folder / "final").mkdir()
    (folder / "final" / "pytorch_lora_weights.safetensors").write_bytes(bytes(2_340_000))
    return plan


def test_report_is_self_contained_and_shows_every_section(finished: Plan) -> None:
    page = read(Path(finished.folder))
    tags = {tag for tag, _, _ in page.found}
    assert not tags & {"script", "link", "iframe", "object", "base"}
    for tag, attributes, _ in page.found:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"href", "srcset", "data", "action"} & attributes.keys()
        assert tag == "img" or "src" not in attributes
    (style,) = (tag for tag, _, _ in page.found if tag == "style")
    assert "url(" not in page.text[""]
    assert "@import" not in page.text[""]
    assert "prefers-color-scheme: dark" in page.text[""]
    assert style
    sections = [attributes["id"] for tag, attributes, _ in page.found if tag == "section"]
    assert sections == ["before-after", "data", "plan", "curves", "samples", "results"]
    assert "LoRA of sd on some/base · finished after 40 steps" in page.text[""]
    assert "6 images / batch 2 / accumulation 3 = 1 step per epoch; 40 steps = 40 epochs" in page.text["plan"]
    assert "pytorch_lora_weights.safetensors" in page.text["results"]
    assert "2.34 MB" in page.text["results"]
    assert "diffusers" in page.text["results"]


def test_report_escapes_text_from_recipes_and_captions(finished: Plan) -> None:
    page = read(Path(finished.folder))
    for section in ("before-after", "data", "samples"):
        assert HOSTILE in page.text[section]  # unescaped by the parser
    assert PROMPTS[2] in page.text["samples"]
    assert page.text[""].count("<b>test") == 2  # the title and the heading
    raw = (Path(finished.folder) / "report.html").read_text(encoding="utf-8")
    assert "<script" not in raw
    assert "http://example.org/x.png" in raw  # as text


def test_report_shows_images_in_their_places(finished: Plan) -> None:
    page = read(Path(finished.folder))
    pairs = page.images("before-after")
    assert len(pairs) == 6
    for prompt in range(3):
        assert (pairs[2 * prompt] == numpy.asarray(noise(100 + prompt))).all()
        assert (pairs[2 * prompt + 1] == numpy.asarray(noise(120 + prompt))).all()
    strip = page.images("samples")
    for prompt in range(3):
        for number in range(3):
            assert (strip[3 * prompt + number] == numpy.asarray(noise(100 + 10 * number + prompt))).all()
    shown = page.images("data")
    assert len(shown) == 6
    assert (shown[0] == numpy.asarray(noise(0))).all()
    assert (shown[3] == numpy.asarray(noise(3, (32, 16)))[:, 8:24]).all()  # cropped as the model sees it


def test_report_charts_have_a_point_for_every_step(finished: Plan) -> None:
    page = read(Path(finished.folder))
    for title in ("Loss", "Seconds per step", "Gradient norm"):
        assert len(page.line(title, "raw")) == 40
    assert len(page.line("Learning rate", "smooth")) == 40
    assert len(page.line("Loss", "dots")) == 4
    heights = [float(point.partition(",")[2]) for point in page.line("Loss", "raw")]
    assert heights == sorted(heights)  # SVG's y axis points down
    across = [float(point.partition(",")[0]) for point in page.line("Loss", "raw")]
    assert across == pytest.approx([1000 * step / 40 for step in range(1, 41)], abs=0.1)


def test_report_of_a_run_that_has_just_started(data: Path, tmp_path: Path) -> None:
    plan = start(recipe_of(data, tmp_path / "run"))
    page = read(tmp_path / "run")
    assert "not finished, step 0 of 40" in page.text[""]
    assert "No step has been taken yet" in page.text["curves"]
    assert "--resume" in page.text["results"]
    assert not (tmp_path / "run" / "before-after.png").exists()
    log(plan, 1)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "secon')  # still being written
    write_step_samples(plan, 0, [noise(prompt) for prompt in range(3)])
    page = read(tmp_path / "run")
    assert "not finished, step 1 of 40" in page.text[""]
    assert len(page.line("Loss", "raw")) == 1
    assert len(page.images("samples")) == 3
    assert page.images("before-after") == []


def test_report_of_a_run_with_nan_loss_is_written(data: Path, tmp_path: Path) -> None:
    plan = start(recipe_of(data, tmp_path / "run"))
    log(plan, 3)
    Run(plan, resume=True).log(
        {"step": 4, "seconds": 0.5, "lr": 1e-4, "loss.denoiser": math.nan, "gradient.denoiser": math.inf}
    )
    assert len(read(tmp_path / "run").line("Loss", "raw")) == 3


def test_report_of_a_vae_and_of_a_folder_without_a_run(data: Path, tmp_path: Path) -> None:
    model = {"family": "autoencoder-kl", "build": {"latent_channels": 4}}
    recipe = recipe_of(
        data, tmp_path / "run", method="scratch", adapter=None, model=model, autoencoder={"kl_weight": 0.001}
    )
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="no run"):
        write_report(tmp_path / "run")
    start(recipe)
    (tmp_path / "run" / "final").mkdir()
    (tmp_path / "run" / "final" / "config.json").write_text("{}")
    page = read(tmp_path / "run")
    assert "AutoencoderKL.from_pretrained" in page.text["results"]
    assert "l1 reconstruction error + 0.001 × KL divergence" in page.text["plan"]


def test_report_with_large_images_and_many_samples_stays_small(data: Path, tmp_path: Path) -> None:
    plan = start(recipe_of(data, tmp_path / "run", sample={"prompts": ["one"], "every": 1}))
    for step in range(12):
        write_step_samples(plan, step, [noise(step, (640, 400))])
    page = read(tmp_path / "run")
    assert [image.shape for image in page.images("before-after")] == [(320, 512, 3)] * 2
    assert len(page.images("samples")) == 8
    assert "step 0" in page.text["samples"]
    assert "step 11" in page.text["samples"]
    assert (tmp_path / "run" / "report.html").stat().st_size < 2_000_000  # although noise compresses badly


def test_before_and_after_match_by_prompt_and_seed(data: Path, tmp_path: Path) -> None:
    """Prompts may change when a run is resumed: an image must never appear under another prompt."""
    plan = start(recipe_of(data, tmp_path / "run"))
    write_step_samples(plan, 0, [noise(prompt) for prompt in range(3)])
    sample = dataclasses.replace(plan.recipe.sample, prompts=("new", *PROMPTS))
    later = dataclasses.replace(
        plan, recipe=dataclasses.replace(plan.recipe, sample=dataclasses.replace(sample, seed=-1))
    )
    write_step_samples(later, 40, [noise(50 + prompt) for prompt in range(4)])
    pairs = images.before_and_after(images.sample_files(tmp_path / "run", later.recipe.sample.prompts))
    assert [(before.path.name, after.path.name, after.prompt) for before, after in pairs] == [
        ("00.png", "01.png", PROMPTS[0]), ("01.png", "02.png", PROMPTS[1]), ("02.png", "03.png", PROMPTS[2]),
    ]  # fmt: skip


def test_before_after_image_shows_pairs_with_labels(finished: Plan) -> None:
    write_report(Path(finished.folder))
    sheet: numpy.ndarray = numpy.asarray(Image.open(Path(finished.folder) / "before-after.png"))
    side = 16 * (images.CELL // 16)
    for prompt in range(3):
        for seed in (100 + prompt, 120 + prompt):
            enlarged = numpy.asarray(noise(seed)).repeat(side // 16, 0).repeat(side // 16, 1)
            rows, columns = numpy.nonzero((sheet == enlarged[0, 0]).all(-1))
            there = [
                (y, x)
                for y, x in zip(rows, columns, strict=True)
                if y + side <= len(sheet) and x + side <= sheet.shape[1]
            ]
            places = [(y, x) for y, x in there if (sheet[y : y + side, x : x + side] == enlarged).all()]
            assert len(places) == 1
            if seed < 110:
                above = places[0]
        assert places[0][1] == above[1]  # one column
        assert places[0][0] > above[0] + side - 1
        label = sheet[places[0][0] + side :, places[0][1] : places[0][1] + side]
        assert (label < 128).any()


def test_grid_labels_fit_their_cells() -> None:
    dots = [Image.new("RGB", (40, 40), "red") for _ in range(3)]
    plain, labelled = (
        images.grid(dots, columns=3, gap=4),
        images.grid(dots, ["a", "x" * 200, "many words " * 20], columns=3, gap=4),
    )
    assert plain.size == (3 * 44 + 4, 48)
    assert labelled.width == plain.width
    ink = numpy.all(numpy.asarray(labelled)[44:] < 128, axis=-1)
    for number in range(3):
        left = 4 + 44 * number
        assert ink[:, left : left + 40].any()
        assert not ink[:, left + 41 : left + 44].any()  # nothing runs into the next


def test_sample_files_record_prompt_and_seed(finished: Plan) -> None:
    with Image.open(Path(finished.folder) / "samples" / "step-0000020" / "02.png") as image:
        assert (image.info["prompt"], image.info["seed"]) == (PROMPTS[2], "2")


# -- charts ---------------------------------------------------------------------------------------------------------------


def test_smoothed_keeps_lines_and_removes_spikes() -> None:
    line = [(float(x), 3.0 * x + 1) for x in range(200)]
    assert svg_charts.smoothed(line)[:150] == pytest.approx(numpy.asarray(line[:150]))
    spiked = [(x, 100.0 if x == 50 else 1.0) for x, _ in line]
    assert {y for _, y in svg_charts.smoothed(spiked, lambda values: sorted(values)[len(values) // 2])} == {1.0}
    assert svg_charts.smoothed([]) == []
    assert svg_charts.smoothed([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_thinned_keeps_spikes() -> None:
    points = [(float(x), float(x % 7)) for x in range(100_001)]
    points[77_777] = (77_777.0, 99.0)
    thin = svg_charts.thinned(points)
    assert len(thin) <= svg_charts.MAX_POINTS
    assert (77_777.0, 99.0) in thin
    assert thin == sorted(thin)
    assert len(svg_charts.smoothed(points)) <= svg_charts.MAX_POINTS


@pytest.mark.parametrize(
    ("low", "high", "logarithmic"),
    [(0, 1, False), (0.0123, 0.0187, False), (0, 12_345, False), (0.05, 0.9, True), (1e-6, 10, True)],
)
def test_axis_ticks_are_few_round_and_within_range(low: float, high: float, logarithmic: bool) -> None:
    axis = svg_charts.Axis(low, high, logarithmic)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9
    assert all(0 <= axis.place(tick) <= 1 + 1e-9 for tick in ticks)
    assert len({svg_charts.number(tick) for tick in ticks}) == len(ticks)


# -- tables ---------------------------------------------------------------------------------------------------------------


def test_data_table_shows_counts_and_names(data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(data, tmp_path)
    several = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, resolution=32, buckets=True, bucket_step=16, maximum_aspect=3)
    )
    text = tables.data(scan(several.data))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "train 6 images" in lines
    assert any(line.startswith("sizes 32×32 4 █") and line.endswith("nothing is cropped away") for line in lines)
    assert any(
        line.startswith("48×16 2 █") and line.endswith("cropping removes 33% on average, 33% at most") for line in lines
    )
    assert "enlarged 6 images, smaller than the training size" in lines
    assert any(line.startswith("problem 1 × unreadable") and line.endswith("(broken.png)") for line in lines)
    assert any(line.endswith('1.png "image 1"') for line in lines)
    found = tables.facts(scan(several.data))
    assert json.loads(json.dumps(found)) == found
    assert (found["training"], found["held_out"], found["upscaled"]) == (6, 0, 6)
    assert found["problems"][0]["names"] == [str(data / "broken.png")]


def test_plan_table_shows_arithmetic_and_what_trains(data: Path, tmp_path: Path) -> None:
    plan = start(recipe_of(data, tmp_path / "run", diffusion={"min_snr_gamma": 5, "zero_terminal_snr": True}))
    listed = tables.plan_rows(plan)
    rows = dict(listed)
    assert rows["steps"] == "6 images / batch 2 / accumulation 3 = 1 step per epoch; 40 steps = 40 epochs"
    assert rows["trains"] == "LoRA, rank-stabilized on attention of the denoiser: rank 16, alpha 8 (scale 8/√16 = 2)"
    assert rows["loss"] == "mean squared error of the velocity v, min-SNR γ 5, zero terminal SNR"
    text = tables.plan(plan).splitlines()
    assert (
        len({line.index(value) for line, value in zip(text[1:], (row[1] for row in listed), strict=True)}) == 1
    )  # one column
    trained = dataclasses.replace(
        plan.recipe, method="full", adapter=None, model=dataclasses.replace(plan.recipe.model, train_text_encoder=True)
    )
    assert (
        dict(tables.plan_rows(dataclasses.replace(plan, recipe=trained)))["trains"]
        == "all weights of the denoiser and the text encoder"
    )
    assert load_plan(tmp_path / "run") == plan


def test_report_imports_no_torch() -> None:
    """`ft` writes it, and must start in a fraction of a second."""
    code = "import sys, finetune.report.html_report; print({'torch', 'numpy', 'PIL', 'diffusers'} & sys.modules.keys())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert done.stdout.strip() == "set()"
