"""Generate the documentation's reference pages from the code: python tools/generate_docs.py [PAGE …] [--check]

Pages:
    cli       docs/reference/cli.md, from the commands
    models    docs/models.md, from the families' records
    recipe    docs/reference/recipe.md, from the recipe's sections
    schema    recipes/recipe.schema.json, likewise
    settings  docs/how-to/choose-settings.md, from the table of training lengths and the estimates

With --check nothing is written: the exit code is 1 if a page is out of date.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.cli.main import ft
from finetune.config import json_schema, reference
from finetune.config.loader import bundled_recipes, load_recipe
from finetune.config.samplers import SAMPLERS, valid_for
from finetune.models.registry import specs
from finetune.models.spec import FamilySpec
from tools import settings_page

ROOT = Path(__file__).resolve().parent.parent
ARXIV = "https://arxiv.org/abs/"


def models() -> str:
    """docs/models.md: every family, its checkpoints, recipes, LoRA formats and samplers."""
    known = specs().values()
    pretrained = [spec for spec in known if spec.pretrained]
    scratch = [spec for spec in known if not spec.pretrained]
    parts = [
        "# Models",
        "This page is generated from the families' records by `python tools/generate_docs.py models`.",
        "## Fine-tuning",
        "`model.family` names the family, `model.path` the checkpoint: a name on the Hugging Face Hub, a diffusers "
        "folder or a `.safetensors` file. Other checkpoints of the same architecture work too.",
        _table(
            ("Family", "Checkpoint", "Resolution", "Released", "License", "Recipes", "LoRA files besides diffusers'"),
            (row for spec in pretrained for row in _checkpoints(spec)),
        ),
        "## Training from scratch",
        _table(("Family", "Model", "Kind", "Paper", "Recipes"), (_from_scratch(spec) for spec in scratch)),
        "## Samplers",
        "`sample.sampler` in a recipe and `ft sample --sampler` choose the sampler. Without it, a pretrained model "
        "uses the scheduler that it was published with.",
        _table(
            ("Sampler", "What it is", "Order", "Network calls per step", "Valid for"),
            (
                (f"`{name}`", one.description, str(one.order), str(one.calls), ", ".join(_families_with(name)))
                for name, one in SAMPLERS.items()
            ),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _families_with(sampler: str) -> list[str]:
    found = [f"`{spec.slug}`" for spec in specs().values() if sampler in valid_for(spec.slug)]
    return [*found, "diffusion from scratch"] if SAMPLERS[sampler].scratch else found


def _checkpoints(spec: FamilySpec) -> Iterable[tuple[str, ...]]:
    for variant in spec.variants.values():
        repository = variant.hub[0]
        yield (
            f"`{spec.slug}`",
            f"[{repository}](https://huggingface.co/{repository})",
            str(variant.resolution),
            variant.released,
            variant.license,
            _codes(one for one in recipes_of(spec) if load_recipe(one).model.path in variant.hub),
            ", ".join(spec.lora_formats) or "none",
        )


def _from_scratch(spec: FamilySpec) -> tuple[str, ...]:
    paper = f"[{spec.paper}]({ARXIV}{spec.paper})" if spec.paper else ""
    return f"`{spec.slug}`", spec.title, spec.kind, paper, _codes(recipes_of(spec))


def recipes_of(spec: FamilySpec) -> list[str]:
    """The bundled recipes of a family."""
    return [name for name in bundled_recipes() if load_recipe(name).model.family == spec.slug]


def _codes(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cli() -> str:
    """docs/reference/cli.md: every command of `ft`: usage, description, arguments and options, as `ft COMMAND --help`
    prints them.
    """
    lines = [
        "# Command line",
        "",
        "`ft COMMAND --help` prints the same text. Exit codes: 0 success, 1 a failure, 2 a mistake in what was given, "
        "130 after Ctrl-C, 143 after SIGTERM. `python -m finetune` is the same as `ft`.",
        "",
    ]
    for command, context in _commands(ft, click.Context(ft, info_name="ft", **ft.context_settings)):
        lines += _command_section(command, context)
    return "\n".join(lines).rstrip() + "\n"


def _commands(group: click.Group, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """All commands below `group`, depth first, each with the context that knows its full name."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        below = click.Context(command, info_name=name, parent=context)
        yield command, below
        if isinstance(command, click.Group):
            yield from _commands(command, below)


def _command_section(command: click.Command, context: click.Context) -> list[str]:
    """The Markdown of one command."""
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    depth = "##" if context.parent is not None and context.parent.parent is None else "###"
    lines = [f"{depth} {context.command_path}", "", "```text", usage, "```", "", *_help(command), ""]
    records = [
        record
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option)
        and "--help" not in parameter.opts  # the same for all; click keeps the names of its first use
        and (record := parameter.get_help_record(context)) is not None
    ]
    if records:
        lines += ["| option | meaning |", "|---|---|"]
        lines += [f"| `{_cell(option)}` | {_cell(_prose(meaning))} |" for option, meaning in records]
        lines += [""]
    return lines


def _help(command: click.Command) -> list[str]:
    """The description of a command: one line per paragraph; a paragraph after `\\b` is preformatted, as in the
    terminal.
    """
    lines: list[str] = []
    for paragraph in inspect.cleandoc(command.help or "").partition("\f")[0].split("\n\n"):
        if paragraph.startswith("\b\n"):
            head, _, body = paragraph.removeprefix("\b\n").partition("\n")
            if head.startswith(" "):
                head, body = "", f"{head}\n{body}"
            lines += [*([head, ""] if head else []), "```text", inspect.cleandoc(f"\n{body}"), "```", ""]
        else:
            lines += [_prose(paragraph), ""]
    return lines[:-1]


def _prose(text: str) -> str:
    """Escape text that Markdown would take for HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "cli": ("docs/reference/cli.md", cli),
    "models": ("docs/models.md", models),
    "recipe": ("docs/reference/recipe.md", reference.markdown),
    "schema": ("recipes/recipe.schema.json", json_schema.text),
    "settings": ("docs/how-to/choose-settings.md", settings_page.text),
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(PAGES)))
@click.option("--check", is_flag=True, help="Write nothing; fail if a page is out of date.")
def main(names: tuple[str, ...], check: bool) -> None:
    """Generate the pages NAMES, or all of them."""
    stale = []
    for name in names or PAGES:
        path, generate = PAGES[name]
        text = generate()
        if check:
            if not (ROOT / path).is_file() or (ROOT / path).read_text(encoding="utf-8") != text:
                stale.append(path)
        else:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(text, encoding="utf-8")
    if stale:
        raise SystemExit(f"out of date: {', '.join(stale)}; run python tools/generate_docs.py")


if __name__ == "__main__":
    main()
