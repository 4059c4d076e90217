"""`ft gpus`: the GPUs that estimates know, and the sources of their figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from finetune import terminal
from finetune.estimate.hardware.gpus import Gpu, find, known

EIGHTHS = " ▏▎▍▌▋▊▉"
BAR = 24  # characters, for the largest memory: 8 GiB each
KEY = """memory    what PyTorch can use; a run and about 0.5 GiB for CUDA must fit into it
TFLOP/s   tensor cores, dense, 16-bit inputs, float32 accumulation; bf16: whether bfloat16 is supported
USD/h     one GPU, from the lowest marketplace price to on-demand; "undated" where the source gives no date
          your own prices: --prices FILE or FT_PRICES=FILE, lines such as `date: 2026-11-22` and `rtx3090: 0.25`
sources   ft gpus NAME"""


@click.command()
@click.argument("name", required=False)
@click.option(
    "--prices",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Your own prices in USD/h: .yaml or .tsv; also FT_PRICES=FILE.",
)
@click.option("as_json", "--json", is_flag=True, help="Print all figures as JSON.")
def command(name: str | None, prices: Path | None, as_json: bool) -> None:
    """List GPUs: memory, speed, price, and the sources of each figure.

    NAME shows one GPU in detail: rtx3090, "RTX 3090", a100-80gb.
    """
    gpus = known(prices) if name is None else find(name, prices)
    if as_json:
        values = dataclasses.asdict(gpus) if isinstance(gpus, Gpu) else [dataclasses.asdict(gpu) for gpu in gpus]
        terminal.echo(json.dumps(values, indent=1, ensure_ascii=False))
    else:
        terminal.echo(details(gpus) if isinstance(gpus, Gpu) else listed(gpus))


def listed(gpus: tuple[Gpu, ...]) -> str:
    """The table, sorted by memory and then speed, and what its columns mean."""
    gpus = tuple(sorted(gpus, key=lambda gpu: (gpu.sold_gb, gpu.tflops)))
    most = max(gpu.visible_gib for gpu in gpus)
    lines = [f"{'':<10} {'':<17} {'memory, GiB':<{BAR + 7}} {'TFLOP/s':>7} {'bf16':>4} {'GB/s':>6}  {'USD/h':<10}"]
    for gpu in gpus:
        memory = f"{gpu.visible_gib:>6.1f} {bar(gpu.visible_gib / most):<{BAR}}"
        speed = f"{gpu.tflops:>7,.0f} {'yes' if gpu.bfloat16 else 'no':>4} {gpu.bandwidth:>6,.0f}"
        lines.append(f"{gpu.id:<10} {gpu.name:<17} {memory} {speed}  {cost(gpu):<10} {when(gpu)}".rstrip())
    return "\n".join([*lines, "", KEY])


def details(gpu: Gpu) -> str:
    """Every figure of one GPU with its source, as a table."""
    rows = [
        (
            "memory",
            f"{gpu.visible_gib:g} GiB for PyTorch, {gpu.total_mib:,} MiB in nvidia-smi, sold as {gpu.sold_gb:g} GB",
        ),
        (
            "speed",
            f"{gpu.tflops:,g} TFLOP/s, dense, {'16-bit' if gpu.bfloat16 else 'float16'} inputs, float32 accumulation",
        ),
        ("", gpu.tflops_source),
        ("bandwidth", f"{gpu.bandwidth:,g} GB/s"),
        ("", gpu.other_source),
        ("price", f"{cost(gpu)} USD/h, {when(gpu)}"),
        ("", gpu.price.source if gpu.price else ""),
        *(("note", note) for note in gpu.note.split("; ") if note),
    ]
    return terminal.table(f"{gpu.id} · {gpu.name}", [row for row in rows if row[1]])


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
