"""Gather what the notebooks build by hand into Python files that need no slimlib.

    python notebooks/standalone.py FOLDER    ch02.py for notebook 02, ..; slim_by_hand.py, the whole method

What counts are the cells tagged `standalone`: they define functions, classes and constants, and run nothing. A file
holds a chapter's own cells, those of other chapters that they need, and the imports of both, in order.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat

NOTEBOOKS = Path(__file__).resolve().parent
WHOLE = "slim_by_hand.py"
IMPORTS = (ast.Import, ast.ImportFrom)


class Cell(NamedTuple):
    """A cell tagged `standalone`: what it says, defines, and uses without defining it."""

    chapter: str  # the notebook's name, "02_latent_compression"
    title: str
    source: str
    defines: set[str]
    uses: dict[str, str]  # each name with the import that its notebook gets it from, or ""


def read_cells(notebooks: list[Path]) -> list[Cell]:
    """All tagged cells of some notebooks, in order; ValueError where one uses slimlib, or runs something."""
    cells: list[Cell] = []
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        title = notebook.cells[0].source.partition("\n")[0].strip("# ")
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        statements = [statement for cell in code for statement in ast.parse(cell.source).body]
        imports: dict[str, str] = {}  # a name, and the import that brings it
        for node in statements:
            if isinstance(node, IMPORTS) and not getattr(node, "module", "").startswith("ch0"):
                for one in node.names:
                    alone = ast.Import([one]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [one], 0)
                    imports[one.asname or one.name.partition(".")[0]] = ast.unparse(alone)
        for cell in (cell for cell in code if "standalone" in cell.metadata.get("tags", [])):
            tree = ast.parse(cell.source)
            body = [node for node in tree.body if not isinstance(node, IMPORTS)]
            if not all(isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign)) for node in body):
                raise ValueError(f"{path.name}: a cell tagged `standalone` defines things, and runs nothing: {cell.id}")
            names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
            local = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            uses = {name: imports.get(name, "") for name in {node.id for node in names} - local}
            if said := [one for one in uses.values() if "slimlib" in one]:
                raise ValueError(f"{path.name}: a cell tagged `standalone` uses slimlib: {said[0]}")
            defines = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
            assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
            defines |= {node.id for target in assigned for node in ast.walk(target) if isinstance(node, ast.Name)}
            first = min(node.lineno for node in [body[0], *getattr(body[0], "decorator_list", [])])
            source = "\n".join(cell.source.splitlines()[first - 1 :])
            cells.append(Cell(path.stem, title, source, defines, uses))
    return cells


def needed(cells: list[Cell], chapter: str) -> list[Cell]:
    """A chapter's cells and those that they need, by the names that they use."""
    chosen = [cell for cell in cells if cell.chapter == chapter]
    names = {name for cell in chosen for name in cell.uses}
    while more := [cell for cell in cells if cell not in chosen and cell.defines & names]:
        chosen += more
        names |= {name for cell in more for name in cell.uses}
    return [cell for cell in cells if cell in chosen]


def as_file(cells: list[Cell], about: str) -> str:
    """Cells as a Python file."""
    lines = {line for cell in cells for line in cell.uses.values() if line}
    names: dict[str, list[str]] = {}
    for line in sorted(lines, key=str.lower):
        head, _, name = line.partition(" import ")
        names.setdefault(head, []).append(name)
    imports = [f"{head} import {', '.join(some)}" if some[0] else head for head, some in names.items()]
    parts, before = [f'"""{about}"""\n\n' + "\n".join(sorted(imports, key=lambda line: line.lower().split()[1]))], ""
    for cell in cells:
        parts.append(("" if cell.chapter == before else f"# {'-' * 20} {cell.title}\n\n\n") + cell.source)
        before = cell.chapter
    if any("main" in cell.defines for cell in cells):
        parts.append('if __name__ == "__main__":\n    main()')
    return "\n\n\n".join(parts) + "\n"


def write(folder: Path) -> list[Path]:
    """Write all files into a folder; returns their paths, the whole method last."""
    folder.mkdir(parents=True, exist_ok=True)
    cells, files = read_cells(sorted(NOTEBOOKS.glob("0[0-9]_*.ipynb"))), []
    for chapter in dict.fromkeys(cell.chapter for cell in cells):
        about = f"What notebooks/{chapter}.ipynb builds by hand, gathered by notebooks/standalone.py."
        own = [cell for cell in needed(cells, chapter) if "main" not in cell.defines]
        files.append(folder / f"ch{chapter[:2]}.py")
        files[-1].write_text(as_file(own, about), encoding="utf-8")
    about = "SLIM by hand: all that the notebooks build, gathered by notebooks/standalone.py.\n\n"
    about += f"python {WHOLE} assets PICTURE DECODED.png    compress by the shipped weights, and decode\n"
    files.append(folder / WHOLE)
    files[-1].write_text(as_file(cells, about), encoding="utf-8")
    return files


if __name__ == "__main__":
    for file in write(Path(sys.argv[1])):
        print(f"{file}: {len(file.read_text(encoding='utf-8').splitlines())} lines")
