"""The shape of slimlib: imports go one way, and it stays small enough to be read."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
FILES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((REPO / "slimlib").rglob("*.py"))
}
LAYERS = ["the method", "slimlib.data", "slimlib.measure", "slimlib.explorer", "slimlib.__main__"]
"""Each may import from itself and from those before it."""


def _imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever it does; also what only a type checker reads."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: write imports in full, from slimlib.x import y"
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return names


IMPORTS = {name: _imports(path) for name, path in FILES.items()}
GRAPH = {name: (imports & FILES.keys()) - {name, "slimlib"} for name, imports in IMPORTS.items() if name != "slimlib"}
"""What each module imports of slimlib. The package's own names are its modules', imported when somebody asks."""


def _layer(module: str) -> int:
    return next((i for i, layer in enumerate(LAYERS) if f"{module}.".startswith(f"{layer}.")), 0)


def test_there_is_no_circle() -> None:
    order = list(TopologicalSorter(GRAPH).static_order())  # CycleError names the modules of a circle
    assert order.index("slimlib.utils") < order.index("slimlib.codec") < order.index("slimlib.measure.evaluation")


def test_imports_go_one_way() -> None:
    wrong = [(name, other) for name, others in GRAPH.items() for other in others if _layer(other) > _layer(name)]
    assert not wrong, f"{' <- '.join(LAYERS)}"
    scripts = {"assets", "notebooks", "run", "tests"}
    assert not [name for name, imports in IMPORTS.items() if scripts & {i.partition(".")[0] for i in imports}]


def test_only_the_command_line_reads_options() -> None:
    assert {name for name, imports in IMPORTS.items() if "argparse" in imports} == {"slimlib.__main__"}


def test_it_stays_small() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert not {name: count for name, count in lines.items() if count > 450}
    method = {name: n for name, n in lines.items() if FILES[name].parent.name == "slimlib" and "__main__" not in name}
    # What has been reached; lower these with every line that goes. They were raised once, by 70 and 120, for the second
    # edition of the pocket world: two teachers, three judges, a decoder that does what each quality needs, photographs;
    # and once by 30 and 49 for real files: JPEG XL's size before its pixels, TIFFs of 12 bits, links, shells, bounds.
    assert sum(method.values()) <= 3_148, method
    assert sum(lines.values()) <= 7_423, lines
