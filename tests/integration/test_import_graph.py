"""Packages import in one direction only, and torch-free code does not import torch (tools/import_graph.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import import_graph
from tools.import_graph import HEAVY, cycles, layer_of, read_graph, torch_leaks, upward


def test_package_has_no_cycles_upward_imports_or_torch_leaks(capsys: pytest.CaptureFixture[str]) -> None:
    code = import_graph.main([])
    printed = capsys.readouterr().out

    assert code == 0, printed
    assert printed.endswith("cycles 0, upward 0, torch leaks 0\n")


def test_every_module_belongs_to_a_layer() -> None:
    assert all(layer_of(module) >= 0 for module in read_graph(import_graph.ROOT / import_graph.PACKAGE).modules)


def _package(folder: Path, **texts: str) -> Path:
    """A package of modules; `a__b` is `a/b.py`."""
    for name, text in texts.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_import_graph_finds_cycles_upward_imports_and_torch_leaks(tmp_path: Path) -> None:
    package = _package(
        tmp_path,
        errors="from finetune.config import schema\n",
        config__schema="import finetune.paths\n",
        paths="from .rng import mix\n",
        rng="from finetune import paths\nimport torch.nn\n",
    )
    graph = read_graph(package)

    assert [sorted(group) for group in cycles(graph.targets())] == [["paths", "rng"]]
    assert [str(each) for each in upward(graph.imports)] == ["finetune/errors.py:1 imports config.schema"]
    assert [[each.target for each in chain] for chain in torch_leaks(graph)] == [
        ["paths", "rng", "torch"],  # config.schema
        ["config.schema", "paths", "rng", "torch"],  # errors
        ["rng", "torch"],  # paths
    ]


def test_import_graph_ignores_deferred_and_type_checking_imports(tmp_path: Path) -> None:
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
    from finetune import job
def late():
    import torch
    from finetune import job
"""
    graph = read_graph(_package(tmp_path, errors=text, job=""))

    assert graph.imports == []
    assert [each.target for each in graph.deferred] == ["torch", "job"]
    assert [each.target for each in upward(graph.deferred)] == ["job"]


def test_module_outside_every_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"finetune/novel\.py is in no layer"):
        layer_of("novel")


def test_heavy_libraries_are_those_that_ruff_bans_at_module_level() -> None:
    import tomllib

    project = tomllib.loads((import_graph.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    banned = project["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"]
    assert set(HEAVY) == set(banned)
