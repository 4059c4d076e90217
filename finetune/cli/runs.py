"""`ft runs`: the state of runs, live or finished."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import click

from finetune import terminal
from finetune.cli import completion
from finetune.terminal import duration, plural
from finetune.training.run_list import Seen, all_runs, look
from finetune.training.watchdog import PATIENCE

MARKS = {"running": "▸", "finished": "✓", "stopped": "‖", "killed": "†", "failed": "✗"}


@click.group(invoke_without_command=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Folder to search."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(context: click.Context, folder: Path, as_json: bool) -> None:
    """List runs: state, progress, time left."""
    if context.invoked_subcommand is not None:
        return
    runs = all_runs(folder)
    if as_json:
        terminal.echo(json.dumps([as_dict(run) for run in runs], indent=1, ensure_ascii=False))
    elif not runs:
        terminal.echo(f"no runs in {folder.resolve()}")
    else:
        width = max(len(str(run.folder)) for run in runs)
        for run in runs:
            terminal.echo(
                f"{MARKS[run.state]} {run.folder!s:<{width}}  {f'{run.step}/{run.steps}':>13}  {state_of(run)}"
            )


@command.command()
@click.argument("run", type=click.Path(path_type=Path), shell_complete=completion.runs)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(run: Path, as_json: bool) -> None:
    """Show one run: state, checkpoints, losses, processes, and how to resume it."""
    seen = look(run)
    if as_json:
        terminal.echo(json.dumps(as_dict(seen), indent=1, ensure_ascii=False))
        return
    losses = [
        f"{name} {value:.4g}" for name, value in seen.record.items() if name.startswith("loss.") or name == "validation"
    ]
    rows = [
        ("state", state_of(seen)),
        ("method", f"{seen.method}, family {seen.family}"),
        ("steps", f"{seen.step} of {seen.steps} finished"),
    ]
    if losses:
        rows.append(("last", f"{', '.join(losses)}, {seen.record.get('seconds', 0):.3g} s/step"))
    rows.append(("saved", _saved(seen.saved)))
    if seen.best is not None:
        rows.append(("best", f"step {seen.best[0]}, held-out loss {seen.best[1]:.4g}"))
    now = time.time()
    if seen.state == "running":
        for process in seen.processes:
            count = f" {process.done} of {process.total}" if process.total else ""
            text = f"{process.phase or 'starting'}{count} on {process.host}, process {process.pid},"
            text += f" last seen {duration(now - process.beat)} ago"
            if process.quiet > PATIENCE:
                text += f"; no progress for {duration(process.quiet)}, at {process.at}"
            rows.append((f"rank {process.rank}", text))
    elif seen.state != "finished":
        rows.append(("resume", f"ft train {run / 'recipe.yaml'} --set output.folder={run} --resume"))
    terminal.echo(terminal.table(run.name, rows))


def _saved(steps: tuple[int, ...]) -> str:
    """Which checkpoints are there."""
    if not steps:
        return "no checkpoint yet"
    return f"{plural(len(steps), 'checkpoint')}, after step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def state_of(run: Seen) -> str:
    """The state of a run in a few words."""
    if run.state == "running":
        return " · ".join(
            part
            for part in (run.phase or "starting", f"{duration(run.seconds_left)} left" if run.seconds_left else "")
            if part
        )
    if run.state == "finished":
        return "finished"
    return f"{run.state}: {run.reason}" if run.reason else run.state


def as_dict(run: Seen) -> dict[str, object]:
    """The run as plain values, for JSON."""
    return dataclasses.asdict(run) | {"folder": str(run.folder)}
