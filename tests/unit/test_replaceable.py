"""Functions with an exchangeable implementation, which tracing uses instead of mocks."""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path

import pytest

from finetune.replaceable import patched, replaceable


@replaceable
def double(value: int) -> int:
    """Twice the value."""
    return 2 * value


def test_replaced_by_exchanges_the_function_for_every_caller_and_restores_it() -> None:
    imported_elsewhere = double
    with double.replaced_by(lambda value: 3 * value):
        assert imported_elsewhere(2) == 6 and double.original(2) == 4
        with double.replaced_by(lambda value: 4 * value):
            assert imported_elsewhere(2) == 8
        assert imported_elsewhere(2) == 6
    assert imported_elsewhere(2) == 4
    assert inspect.unwrap(double).__name__ == "double" and double.__doc__ == "Twice the value."


def test_replaced_by_restores_the_function_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), double.replaced_by(lambda value: 0):
        raise RuntimeError("stop")
    assert double(1) == 2


def test_patched_replaces_an_attribute_and_restores_it() -> None:
    library = types.SimpleNamespace(run=1, __name__="library")
    with patched(library, "run", 2):
        assert library.run == 2
    assert library.run == 1


def test_patched_names_an_attribute_that_the_installed_release_lacks() -> None:
    with pytest.raises(RuntimeError, match=r"no library\.gone"), patched(types.ModuleType("library"), "gone", 1):
        pass


def test_package_imports_no_mocks() -> None:
    for path in sorted((Path(__file__).parents[2] / "finetune").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            origin = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert not any("mock" in name for name in (*names, origin)), path
