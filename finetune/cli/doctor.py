"""`ft doctor`: whether this machine can train."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from finetune import terminal
from finetune.system import doctor


@click.command()
@click.option(
    "as_json",
    "--json",
    is_flag=True,
    help="Print JSON: every result with its state (works, limited, fails) and fix.",
)
def command(as_json: bool) -> None:
    """Check this machine, and suggest fixes.

    Checks versions, the GPU and its driver, memory, disk and access to the Hugging Face Hub; changes nothing.
    Exit code 1: training will not work.
    """
    findings = doctor.examine()
    works = not any(finding.state == "fails" for finding in findings)
    if as_json:
        terminal.echo(
            json.dumps(
                {"works": works, "findings": [asdict(finding) for finding in findings]}, indent=1, ensure_ascii=False
            )
        )
    else:
        terminal.echo("\n".join(doctor.lines(findings)))
    sys.exit(0 if works else 1)
