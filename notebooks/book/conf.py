"""The lesson as a site: `make book` renders the committed notebooks, without executing them, into runs/book.

Nothing on a page comes from elsewhere. `assets/explorer.html`, the static explorer, stands on the first one.
"""

import json
import logging
import re
import shutil
import sys
from pathlib import Path

import papermill

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
sys.path[:0] = [str(REPO), str(HERE.parent)]

import standalone  # noqa: E402

project, author, html_title = "SLIM, step by step", "the authors of this repository", "SLIM, step by step"
project_copyright = "MIT licence; the pictures' licences stand in assets/scenes/CREDITS.md"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
root_doc, exclude_patterns = "README", ["run.py", "standalone.py", "book/conf.py"]
suppress_warnings = ["mystnb.unknown_mime_type"]

logging.getLogger("papermill").setLevel(logging.WARNING)
nb_execution_mode = "off"  # what is shown is what was committed
myst_enable_extensions, myst_heading_anchors = ["dollarmath", "deflist"], 4
autodoc_member_order, autodoc_typehints = "bysource", "description"
autodoc_default_options = {"members": True}

html_theme, html_static_path, html_css_files = "furo", ["book.css"], ["book.css"]
BY_HAND = standalone.write(REPO / "runs/by_hand")  # what the chapters build, as Python files
html_extra_path = [str(path) for path in [REPO / "assets/explorer.html", *BY_HAND] if path.exists()]
html_theme_options = {"sidebar_hide_name": False}

NUMBERED = sorted(path.stem for path in HERE.parent.glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted(f"solutions/{path.stem}" for path in HERE.parent.glob("solutions/*.ipynb"))
CHAPTERS = {
    "The lesson": [name for name in NUMBERED if name < "10"],
    "Appendix": [name for name in NUMBERED if name >= "10"],
    "Solutions": SOLUTIONS,
    "To look up": ["book/parameters", "book/notation", "book/glossary", "book/api", "book/credits"],
}
EXPLORER = """
## Slide the rate

<iframe src="explorer.html" title="the explorer" style="width: 100%; height: 46rem; border: 1px solid #8888"></iframe>

<a href="explorer.html">The explorer as a page of its own</a> ·
<a href="slim_by_hand.py" download>The whole method, as the chapters build it, in one Python file</a>
"""


def read(app, name: str, source: list[str]) -> None:
    """The first page gets contents and explorer; the code of a solution is folded until somebody opens it."""
    if name == root_doc:
        parts = "\n".join(
            f"```{{toctree}}\n:hidden:\n:caption: {part}\n\n" + "\n".join(names) + "\n```\n"
            for part, names in CHAPTERS.items()
        )
        head, _, rest = source[0].partition("\n\n")
        source[0] = f"{head}\n{parts}{EXPLORER if html_extra_path else ''}\n{rest}"
    elif name in SOLUTIONS:
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell["metadata"].setdefault("tags", []).append("hide-cell")
        source[0] = json.dumps(notebook)
    elif (file := f"ch{name[:2]}.py") in [path.name for path in BY_HAND]:
        notebook = json.loads(source[0])
        link = f'<a href="{file}" download>{file}</a>: what is built here by hand, as a file that needs no slimlib.'
        notebook["cells"].append({"cell_type": "markdown", "id": "by-hand-file", "metadata": {}, "source": link})
        source[0] = json.dumps(notebook)
    elif name == "book/parameters":
        source[0] += "".join(map(parameters, NUMBERED))
    source[0] = source[0].replace("(../assets/scenes/CREDITS.md)", "(book/credits.md)")
    source[0] = source[0].replace("[assets/explorer.html](../assets/explorer.html)", "the first page")
    source[0] = re.sub('"# (Going further|Appendix)', r'"## \1', source[0])  # a chapter has one title


def parameters(notebook: str) -> str:
    """A table of a notebook's parameters, as papermill finds them."""
    rows = papermill.inspect_notebook(HERE.parent / f"{notebook}.ipynb").values()
    table = "".join(
        f"| `{one['name']}` | {one['inferred_type_name']} | `{one['default']}` | {one['help']} |\n" for one in rows
    )
    return f"\n## [](../{notebook}.ipynb)\n\n| name | type | default | meaning |\n|---|---|---|---|\n{table}"


def as_written(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Docstrings are plain text: of a module, with its diagram, as it stands; elsewhere bars and such mean nothing."""
    if what == "module":
        lines[:] = ["::", "", *(f"   {line}" for line in lines)]
    else:
        lines[:] = [re.sub(r"\||[_*](?=\W|$)", r"\\\g<0>", line) for line in lines]


def front(app, error) -> None:
    """A server's front door is index.html."""
    if not error:
        shutil.copy(Path(app.outdir, f"{root_doc}.html"), Path(app.outdir, "index.html"))


def setup(app) -> None:
    app.connect("source-read", read)
    app.connect("build-finished", front)
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before napoleon
