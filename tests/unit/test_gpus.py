"""The list of GPUs: specifications, names, custom prices, and `ft gpus`."""

from __future__ import annotations

import json
import re
import statistics
from datetime import date
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.estimate.hardware import gpus
from finetune.estimate.hardware.gpus import DESCRIBED, PRICES, VISIBLE_SHARE, at_price, described, find, known
from tests.helpers import commands

IDS = [
    "rtx3060", "rtx3070", "rtx3080", "rtx3090", "rtx4060ti", "rtx4070", "rtx4080", "rtx4090", "rtx5080", "rtx5090",
    "t4", "l4", "a10g", "a40", "a6000", "l40s", "a100-40gb", "a100-80gb", "h100-pcie", "h100-sxm", "h200", "b200", "v100", "mi300x",
    "rtx2070", "rtx2080ti", "rtx3060ti", "3080-12gb", "rtx4060", "4070super", "rtx4070ti", "rtx5060", "5060ti-8gb",
    "rtx5060ti", "rtx5070", "rtx5070ti", "m1", "m1pro", "m1max", "m1ultra", "m2", "m2max", "m2ultra", "m3max", "m4max",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_custom_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PRICES, raising=False)


def ft(*arguments: str) -> int:
    return commands.ft("gpus", *arguments)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_known_gpus_are_listed_once() -> None:
    assert [gpu.id for gpu in known()] == IDS and len(IDS) == 45
    assert len({gpu.name for gpu in known()}) == 45


APPLE = tuple(gpu for gpu in known() if gpu.platform == "mps")
TURING_OR_OLDER = ("t4", "v100", "rtx2070", "rtx2080ti")


@pytest.mark.parametrize("gpu", APPLE, ids=lambda gpu: gpu.id)
def test_apple_specifications_are_plausible(gpu: gpus.Gpu) -> None:
    """Unified memory of which three quarters count; the rate of the shaders; no time is shown."""
    assert not gpu.timed and gpu.price is None and "MPS" in gpu.note
    assert gpu.visible_gib == 0.75 * gpu.sold_gb and 16 <= gpu.sold_gb <= 192
    assert 15 < gpu.tflops * 1000 / gpu.bandwidth < 45 and gpu.tflops_source and gpu.other_source


@pytest.mark.parametrize("gpu", [gpu for gpu in known() if gpu not in APPLE], ids=lambda gpu: gpu.id)
def test_gpu_specifications_are_plausible(gpu: gpus.Gpu) -> None:
    assert 8 <= gpu.sold_gb <= 192
    assert gpu.total_mib / 1024 == pytest.approx(gpu.sold_gb, rel=0.07), "ECC takes up to 1/16"
    assert 0.94 < gpu.visible_gib * 1024 / gpu.total_mib < 1, "torch sees less than nvidia-smi"
    assert 20 < gpu.tflops < 2_500 and 250 < gpu.bandwidth <= 8_000
    # No GPU of 2017 to 2025 has a ratio outside this range; a slipped digit or a figure with sparsity would.
    assert 50 < gpu.tflops * 1000 / gpu.bandwidth < 450, "FLOPs per byte"
    assert gpu.bfloat16 == (gpu.id not in TURING_OR_OLDER), "bfloat16 came with Ampere"
    assert gpu.tflops_source and gpu.other_source
    if gpu.price is None:
        assert "no price found" in gpu.note
        return
    assert 0.05 <= gpu.price.low <= gpu.price.high <= 6
    assert re.fullmatch(r"2026-03|", gpu.price.date) and bool(gpu.price.date) == ("Mar 2026" in gpu.price.source)
    assert gpu.price.source or "price approximate" in gpu.note
    assert gpu.tflops_source and gpu.other_source


def test_gpu_specifications_match_data_sheets() -> None:
    """The makers' data sheets, which are not the source of the list."""
    for name, sold, tflops, bandwidth in [
        ("t4", 16, 65, 320),
        ("a100-40gb", 40, 312, 1555),
        ("h100-sxm", 80, 989, 3350),
        ("l4", 24, 121, 300),
    ]:
        gpu = find(name)
        assert (gpu.sold_gb, gpu.tflops, gpu.bandwidth) == (sold, tflops, bandwidth)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", known(), ids=lambda gpu: gpu.id)
def test_find_accepts_id_and_name(gpu: gpus.Gpu) -> None:
    for name in (gpu.id, gpu.name, gpu.id.upper(), f"  NVIDIA {gpu.name} ", f"{gpu.name} {gpu.sold_gb:g} GB"):
        assert find(name) is gpu


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("RTX 3090", "rtx3090"),
        ("rtx-3090", "rtx3090"),
        ("rtx_3090", "rtx3090"),
        ("3090", "rtx3090"),
        ("3090 24gb", "rtx3090"),
        ("GeForce RTX3090", "rtx3090"),
        ("4060 Ti", "rtx4060ti"),
        ("4060ti 16 GiB", "rtx4060ti"),
        ("rtx a6000", "a6000"),
        ("RTX 4060", "rtx4060"),
        ("RTX 3080", "rtx3080"),
        ("RTX 3080 12GB", "3080-12gb"),
        ("NVIDIA GeForce RTX 4070 SUPER", "4070super"),
        ("RTX 5060 Ti", "rtx5060ti"),
        ("RTX 5060 Ti 8GB", "5060ti-8gb"),
        ("Apple M1 Max", "m1max"),
        ("a100 80", "a100-80gb"),
        ("a100_40", "a100-40gb"),
        # as reported by torch.cuda.get_device_name
        ("NVIDIA GeForce RTX 4060 Ti", "rtx4060ti"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_find_accepts_variants_of_a_name(name: str, wanted: str) -> None:
    assert find(name).id == wanted


@pytest.mark.parametrize(
    ("name", "problem", "remedy"),
    [
        ("a100", '"a100" is ambiguous: a100-40gb or a100-80gb', "give the full id"),
        ("H100 80GB", "h100-pcie or h100-sxm", "give the full id"),
        # other GPUs, with other figures, than those of the same number
        ("RTX 4060 Laptop GPU", "unknown GPU", "rtx4060"),
        ("RTX 4070 Ti SUPER", "unknown GPU", "rtx4070"),
        ("RTX 3080 Ti", "unknown GPU", "rtx3080"),
        ("RTX 3070 Laptop GPU", "unknown GPU", "rtx3070"),
        ("L40", "unknown GPU", "l40s"),
        ("A10", "unknown GPU", "a10g"),
        ("h100 nvl", "unknown GPU", "h100-pcie, h100-sxm"),
        ("V100 32GB", "unknown GPU", "v100"),
        ("rtx309", "unknown GPU", "rtx3090"),
        ("abacus", "unknown GPU", "ft gpus"),
        ("16gb", "unknown GPU", "ft gpus"),
        ("", "unknown GPU", "ft gpus"),
    ],
)
def test_find_of_an_unknown_or_ambiguous_name_is_refused(name: str, problem: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        find(name)
    assert problem in caught.value.problem and remedy in caught.value.remedy
    assert DESCRIBED in caught.value.remedy or "give the full id" in remedy


def test_described_gpu_has_the_given_specifications() -> None:
    options = dict(zip(DESCRIBED.split()[::2], map(float, DESCRIBED.split()[1::2]), strict=True))
    gpu = described(options["--vram"], options["--tflops"], options["--bandwidth"])
    assert (gpu.sold_gb, gpu.tflops, gpu.bandwidth, gpu.price) == (16, 40, 500, None)
    assert (
        pytest.approx(
            statistics.median(gpu.visible_gib / gpu.sold_gb for gpu in known() if gpu not in APPLE), abs=0.005
        )
        == VISIBLE_SHARE
    )
    assert gpu.visible_gib == 16 * VISIBLE_SHARE


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ((0, 40, 500), "--vram is in GiB"),
        ((16_000, 40, 500), "--vram is in GiB"),
        ((16, -1, 500), "--tflops is in TFLOP/s"),
        ((16, float("nan"), 500), "not nan"),
        ((16, 40, 2), "--bandwidth is in GB/s"),
        ((16, 40, float("inf")), "not inf"),
    ],
)
def test_described_gpu_with_impossible_specifications_is_refused(
    figures: tuple[float, float, float], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        described(*figures)
    assert says in caught.value.problem and DESCRIBED in caught.value.remedy


# -- prices -----------------------------------------------------------------------------------------------------------

FILES = {
    "prices.yaml": "date: 2026-11-22\nRTX 3090: 0.25  # next door\nh100-sxm: 1.90-2.40\nrtx4070: 0\n",
    "prices.tsv": "gpu\tat\tusd_per_hour\tdate\n3090\there\t0.25\t2026-11-22\n\nh100-sxm\t\t1.90–2.40\t2026-11-22\nrtx4070\t\t0\t2026-11-22\n",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_price_file_replaces_prices_and_dates(
    name: str, by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    if by == "environment":
        monkeypatch.setenv(PRICES, str(path))
    own = {gpu.id: gpu for gpu in known(path if by == "argument" else None)}
    for wanted, low, high in [("rtx3090", 0.25, 0.25), ("h100-sxm", 1.9, 2.4), ("rtx4070", 0, 0)]:
        assert own[wanted].price == gpus.Price(low, high, "2026-11-22", str(path))
    monkeypatch.delenv(PRICES, raising=False)
    assert [own[gpu.id] for gpu in known() if gpu.price == own[gpu.id].price] == [
        own[i] for i in IDS if i not in ("rtx3090", "h100-sxm", "rtx4070")
    ]


def test_price_file_argument_overrides_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRICES, str(tmp_path / "nowhere.yaml"))
    (tmp_path / "here.yaml").write_text("date: 2026-11\nt4: 0.1\n")
    price = find("t4", tmp_path / "here.yaml").price
    assert price is not None and (price.low, price.date) == (0.1, "2026-11")


def test_price_argument_is_dated_today() -> None:
    price = at_price(described(16, 40, 500), 0.00005).price
    assert price is not None and price.low == price.high == 0.00005
    assert date.fromisoformat(price.date) <= date.today()
    for wrong in (-1, float("nan"), float("inf"), 5_000):
        with pytest.raises(UserError, match="not a price per GPU hour"):
            at_price(find("t4"), wrong)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.yaml", "rtx3090: 0.25\n", ["the price has no date", "p.yaml:1", "2026-11-22"]),
        ("p.yaml", "date: soon\nrtx3090: 0.25\n", ['"soon" is not a date', "p.yaml:2"]),
        ("p.yaml", "date: 2026-13\nrtx3090: 0.25\n", ['"2026-13" is not a date']),
        ("p.yaml", "date: 2026-11\nrtx3090: cheap\n", ['"cheap" is not a price', "p.yaml:2", "0.17-0.39"]),
        ("p.yaml", "date: 2026-11\nrtx3090: -1\n", ['"-1" is not a price']),
        ("p.yaml", "date: 2026-11\nrtx3090: 0.4-0.2\n", ['"0.4-0.2" is not a price']),
        ("p.yaml", "date: 2026-11\nrtx3090: 5000\n", ["1,000"]),
        ("p.yaml", "date: 2026-11\nrtx3090: [1, 2]\n", ["must be a single value", "p.yaml:2"]),
        ("p.yaml", "date: 2026-11\nrtx3091: 1\n", ['unknown GPU "rtx3091"', "p.yaml:2", "rtx3090"]),
        ("p.yaml", "date: 2026-11\na100: 1\n", ["a100-40gb or a100-80gb", "p.yaml:2"]),
        ("p.yaml", "date: 2026-11\nrtx3090: 1\n3090: 2\n", ['"rtx3090" has two prices', "p.yaml:3"]),
        ("p.yaml", "- rtx3090\n", ["a file of prices is a list of `key: value` lines", "rtx3090: 0.25"]),
        ("p.tsv", "gpu\tusd_per_hour\nrtx3090\t1\n", ["lacks the column date", "p.tsv:1"]),
        ("p.tsv", "", ["lacks the column date, gpu, usd_per_hour"]),
        ("p.tsv", "gpu\tusd_per_hour\tdate\n\nrtx3090\t1\n", ["the price has no date", "p.tsv:3"]),
        ("p.csv", "", ["must end in .yaml or .tsv", "p.csv"]),
        ("p.tsv", None, ["cannot be read: Is a directory", PRICES]),
    ],
)
def test_price_file_with_a_mistake_is_refused(
    name: str, text: str | None, says: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.mkdir() if text is None else path.write_text(text)
    assert ft("--prices", str(path)) == 2
    told = capsys.readouterr().err.replace(str(date.today()), "2026-11-22")
    assert all(part in told for part in says) and "Traceback" not in told, told


def test_price_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        known(tmp_path / "p.tsv")


# -- ft gpus ----------------------------------------------------------------------------------------------------------


def test_ft_gpus_table_is_aligned_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft() == 0
    heading, *lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(IDS)
    assert max(map(len, lines)) <= 100
    for title in ("TFLOP/s", "bf16", "GB/s"):
        end = heading.index(title) + len(title)
        assert all(line[end - 1] != " " and line[end] == " " for line in lines), title
    for line in lines:
        gpu = find(line.split()[0])
        assert gpu.name in line and f"{gpu.visible_gib:.1f} █" in line and f" {gpu.bandwidth:,.0f} " in line
        assert (f"{gpu.price.low:.2f}" if gpu.price else "unknown") in line
        assert line.endswith((gpu.price.date if gpu.price else "") or "undated")
    bars = {line.split()[0]: line.count("█") for line in lines}
    assert bars["mi300x"] == 24 and bars["rtx3070"] == 1 and bars["a100-80gb"] == 10, "8 GiB each"


def test_ft_gpus_of_one_gpu_shows_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("RTX 3090") == 0
    shown = capsys.readouterr().out
    gpu = find("rtx3090")
    assert gpu.price is not None
    for part in (
        "23.65 GiB",
        "24,576 MiB",
        "71 TFLOP/s",
        "936 GB/s",
        "0.17–0.39 USD/h, 2026-03",
        gpu.tflops_source,
        gpu.other_source,
        gpu.price.source,
    ):
        assert part in shown
    assert all(note in shown for note in gpu.note.split("; "))


def test_ft_gpus_json_holds_all_gpus_and_custom_prices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ft("--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [gpu["id"] for gpu in found] == IDS
    (tmp_path / "p.yaml").write_text("date: 2026-11\nt4: 0.2\n")
    assert ft("T4", "--json", "--prices", str(tmp_path / "p.yaml")) == 0
    one = json.loads(capsys.readouterr().out)
    assert one == found[IDS.index("t4")] | {
        "price": {"low": 0.2, "high": 0.2, "date": "2026-11", "source": str(tmp_path / "p.yaml")}
    }
    assert (one["visible_gib"], one["bfloat16"], one["tflops"]) == (14.56, False, 65.0)
