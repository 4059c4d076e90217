"""`ft runs`: where the runs stand, running or not."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import click

from finetune.terminal import duration
from finetune.training.run_list import Seen, all_runs, look
from finetune.training.watchdog import PATIENCE

MARKS = {"running": "▸", "finished": "✓", "stopped": "‖", "killed": "†", "failed": "✗"}


@click.group(invoke_without_command=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("runs"), show_default=True, help="Where to look."
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.pass_context
def command(context: click.Context, folder: Path, as_json: bool) -> None:
    """List runs: where each stands, how far, and how long to go."""
    if context.invoked_subcommand is not None:
        return
    found = all_runs(folder)
    if as_json:
        click.echo(json.dumps([plain(run) for run in found], indent=1, ensure_ascii=False))
    elif not found:
        click.echo(f"no runs in {folder.resolve()}")
    else:
        width = max(len(str(run.folder)) for run in found)
        for run in found:
            click.echo(f"{MARKS[run.state]} {run.folder!s:<{width}}  {f'{run.step}/{run.steps}':>13}  {said(run)}")


@command.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def show(run: Path, as_json: bool) -> None:
    """Show one run: its state, checkpoints, losses and processes, and how to go on."""
    seen = look(run)
    if as_json:
        click.echo(json.dumps(plain(seen), indent=1, ensure_ascii=False))
        return
    from finetune.terminal import table

    losses = [
        f"{name} {value:.4g}" for name, value in seen.record.items() if name.startswith("loss.") or name == "validation"
    ]
    rows = [
        ("state", said(seen)),
        ("trains", f"{seen.method}, family {seen.family}"),
        ("steps", f"{seen.step} of {seen.steps} finished"),
    ]
    if losses:
        rows.append(("last", f"{', '.join(losses)}, {seen.record.get('seconds', 0):.3g} s/step"))
    rows.append(("saved", f"after steps {', '.join(map(str, seen.saved))}" if seen.saved else "no checkpoint yet"))
    if seen.best is not None:
        rows.append(("best", f"after step {seen.best[0]}, validation loss {seen.best[1]:.4g}"))
    now = time.time()
    if seen.state == "running":
        for one in seen.processes:
            counted = f" {one.done} of {one.total}" if one.total else ""
            alive = f"{one.phase or 'starting'}{counted} on {one.host}, process {one.pid}, seen {duration(now - one.beat)} ago"
            quiet = (
                f"; nothing has moved for {duration(one.quiet)}, it stands at {one.at}" if one.quiet > PATIENCE else ""
            )
            rows.append((f"rank {one.rank}", alive + quiet))
    elif seen.state != "finished":
        rows.append(("go on", f"ft train {run / 'recipe.yaml'} --set output.folder={run} --resume"))
    click.echo(table(run.name, rows))


def said(run: Seen) -> str:
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


def plain(run: Seen) -> dict[str, object]:
    """For JSON."""
    return dataclasses.asdict(run) | {"folder": str(run.folder)}
