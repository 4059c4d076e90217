"""Distances against closed forms, and `ft eval` on runs of every kind that generates images."""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageFilter
from safetensors import safe_open
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from benchmarks import bench_families
from finetune.cli import estimate
from finetune.cli.evaluate import command
from finetune.config.schema import Data, Source
from finetune.data.audit.audit import scan
from finetune.errors import UserError
from finetune.estimate import benchmarks
from finetune.evaluation import metrics
from finetune.evaluation.emoji_net import WEIGHTS
from finetune.evaluation.evaluate import as_generated, evaluate
from finetune.evaluation.features import Dinov2, EmojiNet
from tests.helpers import scratch, tiny
from tools.archive import bundled


def normal(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Features with exactly this sample mean and covariance."""
    drawn = normal(50, len(mean), seed)
    white = (drawn - drawn.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(drawn.T))).T
    found: Tensor = white @ torch.linalg.cholesky(covariance).T + mean
    return found


def test_frechet_distance_between_gaussians_has_its_closed_form() -> None:
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    one = with_moments(
        torch.zeros(3, dtype=torch.float64), torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)), 1
    )
    other = with_moments(mean, torch.diag(torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)), 2)
    assert metrics.frechet_distance(one, other) == pytest.approx(
        float(mean.square().sum()) + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    )
    roots = [normal(3, 3, seed) for seed in (3, 4)]
    first, second = (root @ root.T + torch.eye(3) for root in roots)  # these do not commute
    trace = float(torch.linalg.eigvals(first @ second).sqrt().real.sum())
    expected = float(first.trace() + second.trace()) - 2 * trace
    zero = torch.zeros(3, dtype=torch.float64)
    assert metrics.frechet_distance(with_moments(zero, first, 5), with_moments(zero, second, 6)) == pytest.approx(
        expected
    )
    assert metrics.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_matches_its_formula_and_is_unbiased() -> None:
    one, other = normal(4, 3, 1), normal(5, 3, 2) + 0.5

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(float((a @ b / 3 + 1) ** 3) for a, b in pairs) / len(pairs)

    def apart(these: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(a, b) for i, a in enumerate(these) for j, b in enumerate(these) if i != j]

    by_hand = mean(apart(one)) + mean(apart(other)) - 2 * mean([(a, b) for a in one for b in other])
    assert metrics.kernel_distance(one, other) == pytest.approx(by_hand)
    of_equals = torch.tensor(
        [metrics.kernel_distance(normal(20, 4, 2 * seed), normal(20, 4, 2 * seed + 1)) for seed in range(300)]
    )
    assert abs(float(of_equals.mean())) < 3 * float(of_equals.std()) / math.sqrt(300)


def test_neighborhoods_of_equal_distributions_have_the_expected_values() -> None:
    """Naeem et al. 2020, §3.3: expected coverage 1 − 2^−k, density about 1.

    An outlier in the real data lifts precision only.
    """
    real, drawn = normal(1500, 32, 1), normal(1500, 32, 2)
    found = metrics.neighborhoods(real, drawn)
    assert found.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    assert found.density == pytest.approx(1, abs=0.1)
    far = drawn + 100
    outlier = torch.cat([real, 50 + torch.zeros(1, 32)])
    assert metrics.neighborhoods(real, far) == metrics.Neighborhoods(0, 0, 0, 0)
    lifted = metrics.neighborhoods(outlier, 50 + drawn)
    assert lifted.precision > 0.9 and lifted.density < 0.3
    same = metrics.neighborhoods(real[:100], real[:100])
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)


def test_half_of_the_classes_halves_the_coverage() -> None:
    """The features are the pixels of handwritten digits, which separate the classes."""
    files = bundled("digits/train")
    features = torch.stack(
        [
            torch.from_numpy(numpy.asarray(Image.open(io.BytesIO(file.read())), dtype=numpy.float64)).flatten()
            for file in files.values()
        ]
    )
    real, other = features[::2], features[1::2]
    few = other[torch.tensor([int(name.partition("/")[0]) < 5 for name in list(files)[1::2]])]
    whole, half = metrics.neighborhoods(real, other), metrics.neighborhoods(real, few)
    assert whole.coverage > 0.85
    assert half.coverage / whole.coverage == pytest.approx(0.5, abs=0.1)
    assert half.precision == pytest.approx(whole.precision, abs=0.1), "the samples are as realistic as before"
    assert metrics.frechet_distance(real, few) > 2 * metrics.frechet_distance(real, other)


def test_emoji_net_gives_degraded_images_larger_distances() -> None:
    """Blurred, noisy, tinted or too few kinds: each is farther from the real images than other real images are."""
    some = Source("embedded:emoji/noto", limit=300)
    audit = scan(Data(sources=(some,), resolution=32, buckets=False, missing_captions="empty"))
    images = list(as_generated(audit.training, audit.background))
    net = EmojiNet()
    real, other = net.features(images[::2]), images[1::2]

    def far(changed: Callable[[Image.Image], Image.Image]) -> float:
        return metrics.frechet_distance(real, net.features(changed(image) for image in other))

    itself, blurred, blurrier, noisy = far(lambda p: p), far(blur(1)), far(blur(2)), far(noise(20))
    assert 1.5 * itself < blurred < blurrier and 1.5 * itself < noisy
    few = [other[place % 10] for place in range(150)]
    assert metrics.neighborhoods(real, net.features(few)).coverage < 0.3


def blur(pixels: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.filter(ImageFilter.GaussianBlur(pixels))


def noise(deviation: float) -> Callable[[Image.Image], Image.Image]:
    generator = numpy.random.default_rng(0)
    return lambda image: Image.fromarray(
        (numpy.asarray(image) + generator.normal(0, deviation, (32, 32, 3))).clip(0, 255).astype(numpy.uint8)
    )


def test_copies_of_training_images_are_detected() -> None:
    training = normal(200, 8, 1)
    nearest, far, share = metrics.copies(training[:50] + 1e-6, training)
    assert torch.equal(nearest, torch.arange(50)) and float(far.max()) < 1e-4 and share == 1
    assert metrics.copies(normal(200, 8, 2), training)[2] < 0.7
    assert metrics.diversity(torch.ones(5, 3)) == 0
    assert metrics.diversity(torch.tensor([[0.0, 0], [3, 4], [0, 0]])) == pytest.approx(10 / 3)


@functools.cache
def run(kind: str) -> Path:
    """A finished tiny run."""
    folder = tiny.root() / "evaluated" / kind
    if kind == "lora":
        tiny.train(tiny.recipe("emoji", "lora", folder=folder))
    else:
        tiny.train(scratch.recipe(kind, folder, "train.steps=3", "sample.prompts=[]", "data.held_out=0.3"))
    return folder


@pytest.mark.parametrize(("kind", "exact"), [("vae", False), ("pixelcnn++", True), ("dcgan", None), ("lora", None)])
def test_eval_writes_figures_and_image_grids(kind: str, exact: bool | None) -> None:
    outcome = CliRunner().invoke(command, [str(run(kind)), "--images", "4", "--json"], catch_exceptions=False)
    found = json.loads(outcome.stdout)
    folder = Path(found["folder"])
    assert json.loads((folder / "figures.json").read_text(encoding="utf-8")) == found
    assert (found["features"], found["generated"], found["real"]) == ("emoji-net", 4, 4)
    assert all(math.isfinite(value) for value in found["closeness"].values())
    assert found["seconds_per_image"] > 0
    if exact is None:
        assert found["likelihood"] is None and found["no_likelihood"]
    else:
        assert found["likelihood"]["exact"] is exact and found["likelihood"]["of"] == "held-out images"
        assert 0 < found["likelihood"]["bits_per_dimension"] < 20
    shown = {"samples", "nearest"} | ({"unlikely"} if exact is not None else set())
    shown |= {"reconstruction", "interpolation", "arithmetic 0 to 1"} if kind == "vae" else set()
    assert shown - {file.stem for file in folder.glob("*.png")} == set()


def test_eval_table_names_features_and_reference(tmp_path: Path) -> None:
    (tmp_path / "images" / "0").mkdir(parents=True)
    for number, file in enumerate(sorted((scratch.digits() / "0").glob("*.png"))):
        (tmp_path / "images" / "0" / f"{number}.png").write_bytes(file.read_bytes())
    given = [
        str(run("vae")),
        "--against",
        str(tmp_path / "images"),
        "--images",
        "3",
        "--out",
        str(tmp_path / "out"),
    ]
    shown = CliRunner().invoke(command, given, catch_exceptions=False).stdout
    assert "emoji-net Fréchet distance" in shown and "FID" not in shown
    assert "generated       real" in shown, "the other three of the six images show the attainable values"
    assert f"upper bound, of {tmp_path / 'images'}" in shown
    assert (tmp_path / "out" / "nearest.png").is_file()


def test_eval_ranks_an_odd_image_as_least_likely(tmp_path: Path) -> None:
    """As for anomaly detection: the model was trained on digits, and one image is noise."""
    learned = tiny.train(
        scratch.recipe(
            "vae",
            tmp_path / "run",
            "train.steps=60",
            "optimizer.lr=3e-3",
            "optimizer.schedule=constant",
            "data.classes=null",
        )
    )
    (tmp_path / "images").mkdir()
    for number, file in enumerate(sorted(scratch.digits().rglob("*.png"))[:5]):
        (tmp_path / "images" / f"{number}.png").write_bytes(file.read_bytes())
    Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (8, 8), dtype=numpy.uint8)).save(
        tmp_path / "images" / "odd.png"
    )
    found = evaluate(learned.run.folder, str(tmp_path / "images"), images=6)
    assert found.likelihood is not None and found.likelihood.least[0].endswith("odd.png")


def test_eval_with_dinov2_features_from_a_folder(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=224, patch_size=56
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    found = evaluate(run("vae"), images=3, features=str(tmp_path / "dino"), scored=0)
    assert found.likelihood is None and found.no_likelihood == "not requested"
    assert found.features == "DINOv2 (dino)" and math.isfinite(found.closeness.frechet_distance)
    image = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=numpy.uint8))
    pixels = (
        torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1) / 255
        - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    ) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        direct = Dinov2Model.from_pretrained(tmp_path / "dino")(pixels[None]).pooler_output
    assert torch.allclose(Dinov2(str(tmp_path / "dino")).features([image]), direct, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"features": "no-such-folder/at/all"}, "cannot load a DINOv2"),
        ({"against": "nowhere"}, 'there is no folder "nowhere"'),
        ({"images": 1}, "distances need at least two images"),
    ],
)
def test_eval_with_invalid_options_is_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        evaluate(run("vae"), **given)  # type: ignore[arg-type]


def test_emoji_net_weights_are_small_and_documented() -> None:
    with safe_open(WEIGHTS, "pt") as file:
        said = file.metadata()
    assert WEIGHTS.stat().st_size <= 2_000_000
    assert (
        said["made by"] == "tools/build_emoji_net.py"
        and float(said["the same emoji among them"]) > 0.4
        and float(said["the damage"]) > 0.8
    )


def test_bench_families_measures_equal_time_and_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = scratch.CASES["vae"]
    small = (
        f"data.path={scratch.digits()}",
        *scratch.DIGITS,
        *scratch.COMMON,
        *case.small,
        "data.held_out=0.3",
        "optimizer.schedule=constant",
    )
    monkeypatch.setattr(bench_families, "FIXED", (*small, "train.steps=10000000", "train.checkpoint_every=10000000"))
    monkeypatch.setattr(bench_families, "NOTED_EVERY", 10)
    row = bench_families.measured("vae", tmp_path / "vae-0", 0, minutes=0.01, images=4, scored=3)
    spent = json.loads((tmp_path / "vae-0" / "spent.json").read_text())
    assert 0.5 < spent < 3 and row["steps"] > 1 and row["cpu_seconds_per_step"] == pytest.approx(spent / row["steps"])
    assert row["failed"] == "" and len(row["losses"]) == 2 and row["bits_per_dimension"] > 0 and row["exact"] is False
    assert bench_families.measured("vae", tmp_path / "vae-0", 0, minutes=0.01, images=4, scored=3) == row, (
        "a finished measurement must not be repeated"
    )
    assert f"{row['frechet_distance']:.2f}" in bench_families.table({"vae": row})
    monkeypatch.setattr(benchmarks, "MEASURED", tmp_path / "families.json")
    assert benchmarks.quoted("sampling-speed") == ""
    kept = {
        "minutes": 10,
        "rows": {"vae": {"coverage": 0.4, "frechet_distance": 3.14159}, "dcgan": {"coverage": 0.7}, "old": {}},
    }
    benchmarks.MEASURED.write_text(json.dumps(kept))
    said = benchmarks.quoted("diversity")
    assert said.startswith("dcgan 70%, vae 40% (of the real images") and "after 10 CPU minutes" in said
    assert benchmarks.quoted("sampling-speed") == "", "no row has that figure"
    asked = ["--images", "500", "--data", "small-images", "--goal", "latent", "--gpu", "cpu"]
    assert (
        "Measured:    vae 3.14 (emoji-net Fréchet distance; after 10"
        in CliRunner().invoke(estimate.command, asked, catch_exceptions=False).stdout
    )


def test_bench_families_stable_requires_finite_falling_loss_and_diversity() -> None:
    found = {"failed": "", "losses": [2.0, 1.0], "diversity": 0.6}
    assert bench_families.stable("vae", found)
    for broken in (
        {"failed": "the loss is nan"},
        {"losses": [1.0, 2.0]},
        {"losses": [2.0, math.inf]},
        {"diversity": 0.4},
    ):
        assert not bench_families.stable("vae", found | broken)
