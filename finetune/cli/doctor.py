"""`ft doctor`: what of this machine works."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from finetune.system import doctor


@click.command()
@click.option(
    "as_json",
    "--json",
    is_flag=True,
    help="For programs: every finding with its state (works, limited, fails) and remedy.",
)
def command(as_json: bool) -> None:
    """Say what of this machine works, and what to do about the rest.

    Looks at versions, the GPU and its driver, memory, disk and the hub; changes nothing. Exit code 1 says that training
    will not work.
    """
    findings = doctor.examine()
    works = not any(finding.state == "fails" for finding in findings)
    if as_json:
        click.echo(
            json.dumps(
                {"works": works, "findings": [asdict(finding) for finding in findings]}, indent=1, ensure_ascii=False
            )
        )
    else:
        click.echo("\n".join(doctor.lines(findings)))
    sys.exit(0 if works else 1)
