"""`ft gpus`: the GPUs that estimates know, and where their figures come from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from finetune.estimate.hardware.gpus import Gpu, find, known

EIGHTHS = " ▏▎▍▌▋▊▉"
BAR = 24  # characters, for the largest memory: 8 GiB each
KEY = """memory    what torch sees of it; the sum of all that a run keeps on the GPU, and about 0.5 GiB for CUDA, must fit
TFLOP/s   tensor cores, dense, 16-bit factors summed in float32; bf16 says whether these may be bfloat16
USD/h     one GPU, from a marketplace's least to on demand; "undated" where the source gives no date
          yours instead: --prices FILE, or FT_PRICES=FILE, with lines such as `date: 2026-11-22` and `rtx3090: 0.25`
sources   ft gpus NAME"""


@click.command()
@click.argument("name", required=False)
@click.option(
    "--prices",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prices in USD/h to use instead: .yaml or .tsv; also FT_PRICES=FILE.",
)
@click.option("as_json", "--json", is_flag=True, help="Print everything that is known as JSON.")
def command(name: str | None, prices: Path | None, as_json: bool) -> None:
    """List GPUs: memory, speed, price, and where figures come from.

    NAME is one such as rtx3090, "RTX 3090" or a100-80gb.
    """
    found = known(prices) if name is None else find(name, prices)
    if as_json:
        values = dataclasses.asdict(found) if isinstance(found, Gpu) else [dataclasses.asdict(gpu) for gpu in found]
        click.echo(json.dumps(values, indent=1, ensure_ascii=False))
    else:
        click.echo(one(found) if isinstance(found, Gpu) else listed(found))


def listed(gpus: tuple[Gpu, ...]) -> str:
    """The table, by memory and then speed, and what its columns mean."""
    gpus = tuple(sorted(gpus, key=lambda gpu: (gpu.sold_gb, gpu.tflops)))
    most = max(gpu.visible_gib for gpu in gpus)
    lines = [f"{'':<10} {'':<17} {'memory, GiB':<{BAR + 7}} {'TFLOP/s':>7} {'bf16':>4} {'GB/s':>6}  {'USD/h':<10}"]
    for gpu in gpus:
        memory = f"{gpu.visible_gib:>6.1f} {bar(gpu.visible_gib / most):<{BAR}}"
        speed = f"{gpu.tflops:>7,.0f} {'yes' if gpu.bfloat16 else 'no':>4} {gpu.bandwidth:>6,.0f}"
        lines.append(f"{gpu.id:<10} {gpu.name:<17} {memory} {speed}  {cost(gpu):<10} {when(gpu)}".rstrip())
    return "\n".join([*lines, "", KEY])


def one(gpu: Gpu) -> str:
    """Every figure of one GPU with its source."""
    rows = [
        (
            "memory",
            f"{gpu.visible_gib:g} GiB for torch, of {gpu.total_mib:,} MiB by nvidia-smi, sold as {gpu.sold_gb:g} GB",
        ),
        (
            "speed",
            f"{gpu.tflops:,g} TFLOP/s, dense, {'16-bit' if gpu.bfloat16 else 'float16'} factors summed in float32",
        ),
        ("", gpu.tflops_source),
        ("bandwidth", f"{gpu.bandwidth:,g} GB/s"),
        ("", gpu.other_source),
        ("price", f"{cost(gpu)} USD/h, {when(gpu)}"),
        ("", gpu.price.source if gpu.price else ""),
        *(("note", note) for note in gpu.note.split("; ") if note),
    ]
    from finetune.terminal import table

    return table(f"{gpu.id} · {gpu.name}", [row for row in rows if row[1]])


def bar(share: float) -> str:
    """A bar of at most `BAR` characters, to an eighth of one."""
    whole, eighths = divmod(round(share * BAR * 8), 8)
    return ("█" * whole + EIGHTHS[eighths]).rstrip()


def cost(gpu: Gpu) -> str:
    """`0.17–0.39`, USD per hour."""
    if gpu.price is None:
        return "unknown"
    low, high = f"{gpu.price.low:.2f}", f"{gpu.price.high:.2f}"
    return low if low == high else f"{low}–{high}"


def when(gpu: Gpu) -> str:
    """The date of the price."""
    return (gpu.price.date if gpu.price else "") or "undated"
