"""Check the import graph of `finetune/`: cycles, imports against the order of layers, and torch on the torch-free side.

Usage:
    python tools/import_graph.py               # exit code 0 only if all three counts are 0
    python tools/import_graph.py --deferred    # also list the imports inside functions that go up a layer

The graph is read from the syntax trees; nothing is imported. An edge is an import at module level. Imports under
`TYPE_CHECKING` are ignored. Imports inside functions run later, when everything is loaded: they are counted apart.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "finetune"

# From the bottom to the top. A module belongs to the entry with the longest matching prefix, and may import its own
# layer and those below. The root package and the three launch targets stand at the top: they start everything.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("paths", "rng", "terminal", "distributed", "replaceable", "system.cpu_info"),
    ("models", "models.spec", "models.registry"),
    ("adapters.kinds",),
    ("config",),
    (
        "data.cache_dir",
        "data.prefetch",
        "data.shape",
        "data.buckets",
        "data.example",
        "data.media",
        "data.sources",
        "data.audit",
    ),
    ("adapters.lora_file",),
    ("planning",),
    ("data",),
    ("models.base",),
    ("estimate", "system"),
    ("report.images", "report.svg_charts", "report.html", "report.tables"),
    ("adapters", "kernels", "memory", "models.objectives", "training.device"),
    ("models.pretrained", "models.scratch"),
    ("training",),
    # Measuring and merging use whole models, and so stand higher than the packages they are in.
    (
        "inference",
        "evaluation",
        "export",
        "report",
        "estimate.tracing",
        "estimate.hardware.calibrate",
        "adapters.merge",
    ),
    ("job",),
    ("ui",),
    ("cli", "lora", "full", "scratch", "__main__", ""),
)

# Modules that answer without torch: `ft --help`, `ft check`, `ft estimate`, `ft data check`, `ft runs`, `ft doctor`.
TORCH_FREE = (
    "",
    "cli",
    "config",
    "data.audit",
    "data.buckets",
    "data.cache_dir",
    "data.example",
    "data.media",
    "data.prefetch",
    "data.shape",
    "data.sources",
    "distributed",
    "errors",
    "estimate",
    "models.pretrained.families",
    "models.pretrained.family",
    "models.pretrained.packing",
    "models.registry",
    "models.spec",
    "paths",
    "planning",
    "replaceable",
    "report.html",
    "report.images",
    "report.svg_charts",
    "report.tables",
    "system",
    "terminal",
)
# Modules below these prefixes that run only where torch is wanted, and are imported by a function that wants it.
WITH_TORCH = ("cli.estimate_trace", "estimate.hardware.calibrate", "estimate.tracing")
HEAVY = (
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "PIL",
    "safetensors",
    "bitsandbytes",
)


@dataclass(frozen=True, order=True)
class Import:
    """One import statement: `source` imports `target` (a module of finetune, or a heavy library) at `line`."""

    source: str
    target: str
    line: int

    def __str__(self) -> str:
        return f"{_path_of(self.source)}:{self.line} imports {self.target}"


@dataclass
class Graph:
    """The modules of the package and their imports.

    Attributes:
        modules: dotted name below `finetune` ("" for the package itself) → file.
        imports: at module level.
        deferred: inside functions.
    """

    modules: dict[str, Path] = field(default_factory=dict)
    imports: list[Import] = field(default_factory=list)
    deferred: list[Import] = field(default_factory=list)

    def targets(self) -> dict[str, set[str]]:
        """Module → the modules it imports at module level."""
        found: dict[str, set[str]] = {module: set() for module in self.modules}
        for each in self.imports:
            if each.target in self.modules and each.target != each.source:
                found[each.source].add(each.target)
        return found


def read_graph(package: Path) -> Graph:
    """Read every module below `package`."""
    graph = Graph()
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        graph.modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for module, path in graph.modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        _collect(tree, module, path.name == "__init__.py", graph, graph.imports)
    return graph


def _collect(node: ast.AST, module: str, is_package: bool, graph: Graph, imports: list[Import]) -> None:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.orelse:
                _collect(statement, module, is_package, graph, imports)
        elif isinstance(child, ast.Import | ast.ImportFrom):
            for target in _targets(child, module, is_package, graph.modules):
                imports.append(Import(module, target, child.lineno))
        else:
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            _collect(child, module, is_package, graph, graph.deferred if in_function else imports)


def _targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool, modules: Mapping[str, Path]) -> set[str]:
    """The modules of finetune and the heavy libraries that a statement imports."""
    if isinstance(node, ast.Import):
        names = [(alias.name, "") for alias in node.names]
    else:
        origin = node.module or ""
        if node.level:
            parts = [PACKAGE, *module.split(".")] if module else [PACKAGE]
            parts = parts[: len(parts) - node.level + is_package]
            origin = ".".join((*parts, *filter(None, [node.module])))
        names = [(origin, alias.name) for alias in node.names]
    found = set()
    for origin, name in names:
        head, _, rest = origin.partition(".")
        if head == PACKAGE:
            submodule = f"{rest}.{name}".strip(".")
            found.add(submodule if name and submodule in modules else rest)
        elif head in HEAVY:
            found.add(head)
    return found


def cycles(targets: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that import each other (strongly connected components of more than one; Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in sorted(targets[module]):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            place = stack.index(module)
            if len(stack) - place > 1:
                groups.append(stack[place:])
            del stack[place:]

    for module in sorted(targets):
        if module not in index:
            visit(module)
    return groups


def layer_of(module: str, layers: Sequence[Sequence[str]] = LAYERS) -> int:
    """The number of a module's layer, from 0 at the bottom.

    Raises:
        ValueError: no entry covers it.
    """
    matches = [
        (len(prefix), level) for level, group in enumerate(layers) for prefix in group if _within(module, prefix)
    ]
    if not matches:
        raise ValueError(f"{_path_of(module)} is in no layer: add it to LAYERS in tools/import_graph.py")
    return max(matches)[1]


def _within(module: str, prefix: str) -> bool:
    """Whether `prefix` names the module or a package that contains it; "" names the root package only."""
    return module == prefix or (bool(prefix) and module.startswith(f"{prefix}."))


def upward(imports: Sequence[Import], layer: Callable[[str], int] = layer_of) -> list[Import]:
    """The imports of a module from a higher layer."""
    return [each for each in imports if each.target not in HEAVY and layer(each.target) > layer(each.source)]


def torch_leaks(graph: Graph) -> list[list[Import]]:
    """For each torch-free module that reaches a heavy library: the shortest chain of imports that leads there."""
    edges: dict[str, list[Import]] = {module: [] for module in graph.modules}
    for each in graph.imports:
        edges[each.source].append(each)
        # Importing a module runs the `__init__` of the packages around it.
        parents = each.target.split(".")[:-1] if each.target in graph.modules else []
        for depth in range(1, len(parents) + 1):
            edges[each.source].append(Import(each.source, ".".join(parents[:depth]), each.line))
    free = [module for module in graph.modules if _any(module, TORCH_FREE) and not _any(module, WITH_TORCH)]
    return list(filter(None, (_chain(module, edges) for module in free)))


def _any(module: str, prefixes: Sequence[str]) -> bool:
    return any(_within(module, prefix) for prefix in prefixes)


def _chain(module: str, edges: Mapping[str, Sequence[Import]]) -> list[Import]:
    """The shortest chain from a module to a heavy library; [] if there is none."""
    queue: list[tuple[str, list[Import]]] = [(module, [])]
    seen = {module}
    for source, chain in queue:
        for each in edges[source]:
            if each.target in HEAVY:
                return [*chain, each]
            if each.target in edges and each.target not in seen:
                seen.add(each.target)
                queue.append((each.target, [*chain, each]))
    return []


def _path_of(module: str) -> str:
    """The file of a module, for messages."""
    path = ROOT / PACKAGE / module.replace(".", "/")
    shown = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return str(shown.relative_to(ROOT))


def report(graph: Graph, deferred: bool) -> Iterator[str]:
    """The lines of the printed report."""
    circles, against, leaks = cycles(graph.targets()), upward(graph.imports), torch_leaks(graph)
    for group in circles:
        yield f"cycle: {', '.join(sorted(group))}"
        inside = [each for each in graph.imports if {each.source, each.target} <= set(group)]
        yield from (f"    {each}" for each in sorted(inside))
    yield from (f"upward: {each}" for each in sorted(against))
    yield from (f"torch: {'; '.join(map(str, chain))}" for chain in leaks)
    later = upward(graph.deferred)
    if deferred:
        yield from (f"deferred, upward: {each}" for each in sorted(later))
    yield (
        f"modules {len(graph.modules)}, imports {sum(map(len, graph.targets().values()))}, "
        f"inside functions {len(graph.deferred)} ({len(later)} of them upward)"
    )
    yield f"cycles {len(circles)}, upward {len(against)}, torch leaks {len(leaks)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--deferred", action="store_true", help="list upward imports inside functions too")
    options = parser.parse_args(arguments)
    graph = read_graph(ROOT / PACKAGE)
    print("\n".join(report(graph, options.deferred)))
    return int(bool(cycles(graph.targets()) or upward(graph.imports) or torch_leaks(graph)))


if __name__ == "__main__":
    sys.exit(main())
