"""GPUs: memory, speed, bandwidth and price per hour, from `assets/gpus.tsv`.

Prices change and differ by provider, so a file can replace them: `--prices FILE`, or its path in the environment
variable `FT_PRICES`. A `.yaml` file has one date for all prices, a `.tsv` file (columns gpu, usd_per_hour, date) one
per line:

    date: 2026-11-22
    rtx3090: 0.25
    h100-sxm: 1.90-2.40  # lowest and highest
    rtx4070: 0           # your own
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, final

from finetune.config import yaml_reader
from finetune.errors import UserError
from finetune.estimate.hardware.cpu import Calibration, calibration, threads
from finetune.paths import ASSETS
from finetune.system.cpu_info import cpu_name, host_memory

PRICES = "FT_PRICES"
PRICES_REMEDY = "a .yaml file has lines such as `date: 2026-11-22` and `rtx3090: 0.25`; a .tsv file has the columns gpu, usd_per_hour, date"
DESCRIBED = "--vram 16 --tflops 40 --bandwidth 500"
NOMINAL = (40.0, 500.0)  # TFLOP/s and GB/s of a GPU whose speed is unknown, to order runs by
# The share of the advertised memory that torch sees: the median of gpus.tsv (0.91 to 0.99; lowest with ECC).
VISIBLE_SHARE = 0.98
# Brand words that do not distinguish models.
_MAKERS = {"nvidia", "geforce", "tesla", "amd", "instinct", "gpu", "apple"}
# Limits of a described GPU: lowest, highest, unit, and a hint for a likely mistake with units.
_LIMITS = {
    "vram": (1.0, 2_000.0, "GiB", "16 for a GPU sold with 16 GB"),
    "tflops": (
        0.5,
        20_000.0,
        "TFLOP/s, dense, 16-bit, summed in float32",
        "half of a figure `with sparsity`",
    ),
    "bandwidth": (10.0, 100_000.0, "GB/s", "2000 for 2 TB/s"),
}
_MOST_PER_HOUR = 1_000.0  # USD; a higher figure is likely a monthly price or another currency


@final
@dataclass(frozen=True)
class Price:
    """The price of one GPU hour in USD.

    Attributes:
        low, high: lowest and highest price, USD/h; equal if there is one figure.
        date: `2026-03` or `2026-03-28`; empty if the source has none.
        source: where the price comes from.
    """

    low: float
    high: float
    date: str
    source: str


@final
@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        id: the short name, such as `a100-80gb`.
        name: the display name.
        sold_gb: the advertised memory; GiB for most GPUs, GB for an H200 (141) and a B200 (180).
        total_mib: memory shown by nvidia-smi, MiB.
        visible_gib: memory that torch sees, GiB (the lowest reported), including the CUDA context.
        tflops: dense tensor-core TFLOP/s, 16-bit operands, float32 accumulation.
        bfloat16: whether tensor cores support bfloat16; if not, `tflops` is for float16.
        bandwidth: memory bandwidth, GB/s.
        price: per hour, or None if unknown.
        note: which figures are approximate, derived or disputed.
        tflops_source, other_source: sources of `tflops`, and of memory and bandwidth.
        calibration: the measured speed of a CPU; None for GPUs, whose speed follows from these figures
            (`constants.PACE`).
        also: words that a full name may include, such as `sxm4` in `NVIDIA A100-SXM4-80GB`.
        platform: "" for CUDA, "rocm" or "mps" for what `ft` has not been run on.
        timed: whether its speed is known; if not, `tflops` and `bandwidth` only order runs, and no time is shown.
    """

    id: str
    name: str
    sold_gb: float
    total_mib: int
    visible_gib: float
    tflops: float
    bfloat16: bool
    bandwidth: float
    price: Price | None
    note: str
    tflops_source: str
    other_source: str
    also: str = ""
    calibration: Calibration | None = None
    platform: Literal["", "rocm", "mps"] = ""
    timed: bool = True

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """The kind of device, which selects a cost profile's variants."""
        return "cpu" if self.calibration else "cuda"

    @property
    def model(self) -> str:
        """The word of the name that identifies the chip: `3090`, `a100`."""
        return _words(self.id)[0]

    def is_called(self, name: str) -> bool:
        """Whether `name` matches this GPU, such as `A100`, `a100 80 GB` or `NVIDIA A100-SXM4-80GB`."""
        asked, sold = {*_words(name)}, f"{self.sold_gb:g}"
        return self.model in asked and asked <= {*_words(f"{self.id} {self.name} {self.also} {sold}gb"), sold}


def known(prices: Path | None = None) -> tuple[Gpu, ...]:
    """All GPUs of gpus.tsv, with prices from the file `prices` or the one that FT_PRICES names.

    Raises:
        UserError: the file cannot be read, or a line has an unknown GPU, an invalid price, or a duplicate.
    """
    if prices is None and os.environ.get(PRICES):
        prices = Path(os.environ[PRICES])
    gpus = _bundled()
    if prices is None:
        return gpus
    given: dict[str, Price] = {}
    for name, price, where in _read_prices(prices):
        gpu = _match(name, gpus, where)
        if gpu.id in given:
            raise UserError(f'"{gpu.id}" has two prices', where=where, remedy="keep one of the two lines")
        given[gpu.id] = price
    return tuple(dataclasses.replace(gpu, price=given.get(gpu.id, gpu.price)) for gpu in gpus)


def find(name: str, prices: Path | None = None) -> Gpu:
    """Find a GPU by its id, or by a name as people and torch write it (`RTX 3090`, `3090`, `NVIDIA A100-SXM4-80GB`).

    Raises:
        UserError: no GPU or several match; and whatever `known` raises.
    """
    return _match(name, known(prices))


def described(vram: float, tflops: float | None = None, bandwidth: float | None = None) -> Gpu:
    """A GPU that is not listed, from its advertised memory (GiB), dense 16-bit TFLOP/s and GB/s. It has no price.

    Without TFLOP/s and GB/s its time is unknown.

    Raises:
        UserError: a figure is out of range.
    """
    timed = tflops is not None and bandwidth is not None
    name = f"GPU of {vram:g} GiB" + (f", {tflops:g} TFLOP/s, {bandwidth:g} GB/s" if timed else "")
    tflops, bandwidth = (tflops, bandwidth) if tflops is not None and bandwidth is not None else NOMINAL
    for option, value in {"vram": vram, "tflops": tflops, "bandwidth": bandwidth}.items():
        least, most, unit, hint = _LIMITS[option]
        if not least <= value <= most:
            raise UserError(
                f"--{option} is in {unit} and must be {least:g} to {most:g}, not {value:g}",
                remedy=f"for example {DESCRIBED} (--{option}: {hint})",
            )
    return Gpu(
        id="described",
        name=name,
        sold_gb=vram,
        total_mib=round(vram * 1024),
        visible_gib=vram * VISIBLE_SHARE,
        tflops=tflops,
        bfloat16=True,
        bandwidth=bandwidth,
        price=None,
        note=f"assumes that torch sees {VISIBLE_SHARE:.0%} of its memory, and that tensor cores support bfloat16",
        tflops_source="given by hand" if timed else "unknown",
        other_source="given by hand",
        timed=timed,
    )


def this_cpu(processes: int = 1) -> Gpu:
    """This machine's CPU as a device to train on. It has no price."""
    found = calibration(threads(processes))
    gib = host_memory() / 2**30
    measured = (
        f"measured {found.date}" if found.measured else "not calibrated: assumes the bundled CPU's speed per core"
    )
    return Gpu(
        id="cpu",
        name=f"CPU ({cpu_name()}, {found.threads} thread{'s' if found.threads > 1 else ''})",
        sold_gb=gib,
        total_mib=round(gib * 1024),
        visible_gib=gib,
        tflops=found.matmul.rate / 1e12,
        bfloat16=False,
        bandwidth=found.other.rate / 1e9,
        price=None,
        note=measured,
        tflops_source=measured,
        other_source=measured,
        calibration=found,
    )


def with_memory(gpu: Gpu, gib: float) -> Gpu:
    """The same Mac with another amount of unified memory."""
    share = gpu.visible_gib / gpu.sold_gb
    return dataclasses.replace(gpu, sold_gb=gib, total_mib=round(gib * 1024), visible_gib=gib * share)


def at_price(gpu: Gpu, usd_per_hour: float) -> Gpu:
    """The same GPU at a price given with `--price`, dated today.

    Raises:
        UserError: the price is invalid.
    """
    today = datetime.date.today().isoformat()
    return dataclasses.replace(
        gpu, price=_price(f"{usd_per_hour:f}", today, "given by hand", f"--price {usd_per_hour:g}")
    )


@functools.cache
def _bundled() -> tuple[Gpu, ...]:
    return tuple(
        Gpu(
            id=row["id"],
            name=row["name"],
            sold_gb=float(row["sold_gb"]),
            total_mib=int(row["total_mib"]),
            visible_gib=float(row["visible_gib"]),
            tflops=float(row["tflops"]),
            bfloat16=row["bfloat16"] == "yes",
            bandwidth=float(row["bandwidth"]),
            price=Price(float(row["usd_low"]), float(row["usd_high"]), row["price_date"], row["price_source"])
            if row["usd_low"]
            else None,
            note=row["note"],
            tflops_source=row["tflops_source"],
            other_source=row["other_source"],
            also=row["also"],
            platform=cast(Literal["", "rocm", "mps"], row.get("platform", "")),
            timed=row.get("platform", "") != "mps",
        )
        for _, row in _rows((ASSETS / "gpus.tsv").read_text(encoding="utf-8"))
    )


def _match(name: str, gpus: tuple[Gpu, ...], where: str = "") -> Gpu:
    """The one of `gpus` whose id `name` is, else the only one that it matches. A name with another word (`3080 12GB`, `4070 Ti`, `L40`) is another
    GPU.
    """
    found = [gpu for gpu in gpus if _words(gpu.id) == _words(name)] or [gpu for gpu in gpus if gpu.is_called(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f'"{name}" is ambiguous: {" or ".join(gpu.id for gpu in found)}',
            where=where,
            remedy=f"give the full id, for example {found[0].id}",
        )
    models = dict.fromkeys(gpu.model for gpu in gpus)
    near = [model for word in _words(name) for model in difflib.get_close_matches(word, models, cutoff=0.5)]
    nearest = ", ".join(gpu.id for model in dict.fromkeys(near) for gpu in gpus if gpu.model == model)
    remedy = f"{f'nearest: {nearest}; ' if nearest else ''}`ft gpus` lists all; or describe it: ft estimate {DESCRIBED}"
    raise UserError(f'unknown GPU "{name}"', where=where, remedy=remedy)


def _words(name: str) -> list[str]:
    """The words that distinguish GPU names: `RTX 4060 Ti 16 GB` → 4060ti, 16gb. A suffix makes another model, so it
    is kept.
    """
    text = name.lower().replace("rtx", " ").replace("gib", "gb")
    text = re.sub(r"(?<=[\di])[\s_-]+(?=(?:ti|super|gb|pro|max|ultra)\b)", "", text)
    return [word for word in re.findall(r"[^\W_]+", text) if word not in _MAKERS]


def _read_prices(path: Path) -> Iterator[tuple[str, Price, str]]:
    """(GPU name, price, file and line) for each line of a price file."""
    if path.suffix.lower() not in (".yaml", ".yml", ".tsv"):
        raise UserError("a price file must end in .yaml or .tsv", where=str(path), remedy=PRICES_REMEDY)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"the price file cannot be read: {error.strerror}",
            where=str(path),
            remedy=f"check the path given by --prices or {PRICES}",
        ) from None
    except UnicodeDecodeError:
        raise UserError("the price file is not UTF-8 text", where=str(path), remedy="save the file as UTF-8") from None
    lines = _tsv_lines(text, str(path)) if path.suffix.lower() == ".tsv" else _yaml_lines(text, str(path))
    for name, amount, date, where in lines:
        yield name, _price(amount, date, str(path), where), where


def _rows(text: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cells by column name) for each line of tab-separated text."""
    header, *lines = text.splitlines() or [""]
    for number, line in enumerate(lines, start=2):
        if line.strip():
            yield number, dict(zip(header.split("\t"), line.split("\t"), strict=False))


def _tsv_lines(text: str, path: str) -> Iterator[tuple[str, str, str, str]]:
    if missing := {"gpu", "usd_per_hour", "date"}.difference(text.partition("\n")[0].rstrip("\r").split("\t")):
        raise UserError(
            f"the price file lacks the column {', '.join(sorted(missing))}", where=f"{path}:1", remedy=PRICES_REMEDY
        )
    for number, row in _rows(text):
        yield row.get("gpu", ""), row.get("usd_per_hour", ""), row.get("date", ""), f"{path}:{number}"


def _yaml_lines(text: str, path: str) -> Iterator[tuple[str, str, str, str]]:
    lines = yaml_reader.read(text, path, "a file of prices", PRICES_REMEDY).content
    assert isinstance(lines, dict)
    date = lines.pop("date", yaml_reader.Node("", path)).content
    for name, node in lines.items():
        if not isinstance(node.content, str) or not isinstance(date, str):
            raise UserError("a price or a date must be a single value", where=node.where, remedy=PRICES_REMEDY)
        yield name, node.content, date, node.where


def _price(amount: str, date: str, source: str, where: str) -> Price:
    """Parse a price such as `0.25` or `0.17-0.39` USD/h, with its day or month `date`."""
    found = re.fullmatch(r"\s*(\d*\.?\d+)\s*(?:[-–]\s*(\d*\.?\d+)\s*)?", amount, re.ASCII)
    low, high = (float(found[1]), float(found[2] or found[1])) if found else (0.0, -1.0)
    if not low <= high <= _MOST_PER_HOUR:
        problem = f'"{amount.strip()}" is not a price per GPU hour in USD, 0 to {_MOST_PER_HOUR:,.0f}'
        raise UserError(problem, where=where, remedy="write a price such as 0.25, or the lowest and highest: 0.17-0.39")
    try:
        if not re.fullmatch(r"\d{4}-\d\d(-\d\d)?", date, re.ASCII):
            raise ValueError
        datetime.date.fromisoformat(date if len(date) == 10 else f"{date}-01")
    except ValueError:
        problem = f'"{date}" is not a date' if date else "the price has no date"
        raise UserError(
            problem,
            where=where,
            remedy=f"add the day or month of the prices, such as {datetime.date.today()}",
        ) from None
    return Price(low, high, date, source)
