"""The repository as a whole: one list of dependencies, commands that work, nothing of one machine in it."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import slimlib
from slimlib.__main__ import COMMANDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parent.parent
MAKEFILE = (REPO / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
PYTHONS = ["3.10", "3.11", "3.12"]


def _cells(kind: str) -> list[tuple[Path, str]]:
    """The cells of a kind of each notebook, as one text."""
    found = []
    for path in sorted((REPO / "notebooks").rglob("*_*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            found.append((path, "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == kind)))
    return found


# ---- dependencies ---------------------------------------------------------------------------------------


def test_conda_takes_everything_from_pyproject() -> None:
    environment = yaml.safe_load((REPO / "environment.yml").read_text(encoding="utf-8"))
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": ["-e .[dev]"]}], "pyproject.toml has the list"
    assert environment["channels"] == ["conda-forge"]


def test_everybody_means_the_same_pythons() -> None:
    admitted = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(20) if f"3.{minor}.5" in admitted] == PYTHONS
    assert [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3" in line] == PYTHONS
    assert sorted(set(re.findall(r"python(3\.\d+)", MAKEFILE))) == PYTHONS
    assert "not (3, 10) <= sys.version_info[:2] <= (3, 12)" in MAKEFILE


def test_bounds_are_low_and_admit_what_is_installed() -> None:
    for requirement in [*NEEDED, *(r for extra in EXTRAS.values() for r in extra)]:
        assert any(s.operator in (">=", "==") for s in requirement.specifier), requirement
    for requirement in [*NEEDED, *EXTRAS["dev"]]:
        if requirement.marker is None or requirement.marker.evaluate():
            installed = importlib.metadata.version(requirement.name)
            assert installed in requirement.specifier, f"{requirement} is asked for, {installed} is installed"
    assert "2.0.0" not in next(r for r in NEEDED if r.name == "numpy").specifier, "compressai needs numpy<2"


def test_what_is_imported_is_declared() -> None:
    """Nothing may work only because some other package happens to bring it along."""
    use = {canonicalize_name(r.name) for r in [*NEEDED, *EXTRAS["retrain"], *EXTRAS["imagenet"], *EXTRAS["heic"]]}
    develop = use | {canonicalize_name(r.name) for r in EXTRAS["dev"]}
    distributions = importlib.metadata.packages_distributions()
    files = [path for folder in ("slimlib", "tests", "assets", "notebooks") for path in (REPO / folder).rglob("*.py")]
    ours = {"slimlib", *(path.stem for path in files), *(f"ch{i:02}" for i in range(10))}  # by standalone.py
    sources = [(path, path.read_text(encoding="utf-8")) for path in files]
    sources += [(path, re.sub(r"^(\s*)[%!].*", r"\1pass", code, flags=re.M)) for path, code in _cells("code")]
    missing = set()
    for path, source in sources:
        nodes = list(ast.walk(ast.parse(source)))
        names = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
        for module in names - {*sys.stdlib_module_names, "tomllib"} - ours:
            # a package's name is mostly that of its module; tomli, say, is not installed everywhere
            candidates = {canonicalize_name(name) for name in distributions.get(module, [module])}
            if not candidates & (develop if path.is_relative_to(REPO / "tests") else use):
                missing.add(f"{path.relative_to(REPO)} imports {module}")
    assert not missing, f"not declared in pyproject.toml: {sorted(missing)}"


# ---- the package ----------------------------------------------------------------------------------------


def test_the_codec_is_found_when_asked_for() -> None:
    assert "SlimCodec" in dir(slimlib) and slimlib.SlimCodec.__name__ == "SlimCodec"
    with pytest.raises(AttributeError, match="no attribute 'SlimKodek'"):
        slimlib.SlimKodek  # noqa: B018


def test_version_entry_point_and_packages() -> None:
    assert PROJECT["dynamic"] == ["version"] and re.fullmatch(r"\d+\.\d+\.\d+", slimlib.__version__)
    assert PROJECT["scripts"] == {"slim": "slimlib.__main__:main"}
    tools = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = sorted(path.parent for path in (REPO / "slimlib").rglob("__init__.py"))
    assert tools["packages"] == [".".join(folder.relative_to(REPO).parts) for folder in folders]
    for path in (REPO / "slimlib").rglob("*.*"):
        patterns = tools["package-data"].get(".".join(path.parent.relative_to(REPO).parts), [])
        known = path.suffix in (".py", ".pyc") or f"*{path.suffix}" in patterns
        assert known, f"{path.relative_to(REPO)} would not be installed: see package-data in pyproject.toml"


# ---- the commands ---------------------------------------------------------------------------------------


def test_make_help_lists_every_command() -> None:
    text = _make(REPO, "help").stdout
    (targets,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.M)
    assert {"tutorial", "test", "lab", "notebooks", "lint", "types", "clean", "install"} <= set(targets.split())
    for target in targets.split():
        assert f"make {target}" in text
    assert _make(REPO).stdout == text, "make without a target shows the help"


def test_pages_name_commands_and_options_that_there_are() -> None:
    """The READMEs, the notebooks, the Makefile, and the examples in each command's help."""
    pages = [(name, (REPO / name).read_text(encoding="utf-8")) for name in ("README.md", "notebooks/README.md")]
    pages += [*_cells("markdown"), ("Makefile", MAKEFILE.replace("$(PY)", "python"))]
    modules = {name: import_module(where) for name, (where, _) in COMMANDS.items() if isinstance(where, str)}
    pages += [(name, str(module.__doc__)) for name, module in modules.items()]
    pages += [("slim", str(import_module("slimlib.__main__").__doc__))]
    options = {name: modules[name].Options if name in modules else where[0] for name, (where, _) in COMMANDS.items()}
    wrong, seen = [], set()
    for page, text in pages:
        text = text.replace("\\\n", " ")
        targets = re.findall(r"(?:^ *|`)make ([a-z-]+)", text, flags=re.M)
        wrong += [(page, target) for target in targets if not re.search(rf"^{target}:", MAKEFILE, flags=re.M)]
        scripts = re.findall(r"python ((?:assets|notebooks)/[\w./]*|-m slimlib\.[\w.]+)", text)
        wrong += [(page, script) for script in scripts if not (REPO / script).is_file()]
        for name, words in re.findall(r"(?:^ *|`|-m )slim(?:lib)? ([a-z]+)\b([^`#\n]*)", text, flags=re.M):
            seen.add(name)
            known = {field.name for field in fields(options[name])} if name in options else set()
            used = [word.replace("-", "_").removeprefix("no_") for word in re.findall(r"\s--([a-z0-9-]+)", words)]
            wrong += [(page, name, option) for option in used if option not in known]
    assert not wrong, wrong
    assert seen == set(COMMANDS)


@pytest.mark.parametrize("usable", ["python3.11", "python3.12", "python3.10", "python3", None])
def test_make_finds_a_python_past_dead_ones_or_says_what_is_missing(tmp_path: Path, usable: str | None) -> None:
    """A version manager leaves shims that exist and only complain."""
    _fake_commands(tmp_path, usable)
    done = _make(tmp_path, ".venv/bin/python", PATH=str(tmp_path / "bin"))
    if usable:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / ".venv/bin/python").read_text() == f"{usable} -m venv --clear .venv\n"
    else:
        assert done.returncode
        assert "needs Python 3.10, 3.11 or 3.12" in done.stderr and "python3-venv" in done.stderr


def test_environment_is_made_only_where_missing_and_renewed_when_the_list_changes(tmp_path: Path) -> None:
    _fake_commands(tmp_path, usable=None)
    (tmp_path / "pyproject.toml").write_text("")
    python, stamp = tmp_path / ".venv/bin/python", tmp_path / ".venv/.installed"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    stamp.write_text("")
    assert "pip install" not in _make(tmp_path, "-n", "test").stdout
    os.utime(stamp, (0, 0))
    dry = _make(tmp_path, "-n", "test").stdout
    assert "pip install" in dry and ".[dev]" in dry and "-m venv" not in dry


def _make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make here")
    # A make above this one would hand down its own options, and a word about the folder.
    above = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "ONLY", "ARGS")
    inherited = {name: value for name, value in os.environ.items() if name not in above}
    command = [make, "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True)


def _fake_commands(folder: Path, usable: str | None) -> None:
    """A folder with the Makefile, and a bin/ of Pythons that all fail but one, which only pretends."""
    shutil.copy(REPO / "Makefile", folder)
    (folder / "bin").mkdir()
    for name in ("mkdir", "cat"):
        (folder / "bin" / name).symlink_to(str(shutil.which(name)))
    for name in ("python3.11", "python3.12", "python3.10", "python3", "python"):
        body = "echo 'command not found' >&2; exit 127"
        if name == usable:
            body = f'[ "$1" = -m ] || exit 0; mkdir -p .venv/bin; echo "{name} $*" >.venv/bin/python'
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / "bin" / name).chmod(0o755)


def test_ci_calls_the_same_commands_as_people_do() -> None:
    script = REPO / ".ci/run"
    text = script.read_text(encoding="utf-8")
    assert os.access(script, os.X_OK) and "set -euo pipefail" in text
    assert re.findall(r"^make ([\w-]+)$", text, flags=re.M) == ["install", "lint", "types", "test", "paper-check"]
    subprocess.run(["bash", "-n", str(script)], check=True)


# ---- what a reader finds --------------------------------------------------------------------------------


def test_licences_links_and_places_are_there() -> None:
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    assert (REPO / "LICENSE").read_text(encoding="utf-8").startswith("MIT License") and PROJECT["license"] == "MIT"
    assert "assets/scenes/CREDITS.md" in readme
    for page in (REPO / "README.md", REPO / "notebooks/README.md"):
        text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\((?![a-z]+:)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page} links to {target}"
    section = readme.partition("## Where things are")[2]
    modules = {path.stem for path in (REPO / "slimlib").rglob("*.py")} - {"__init__"}
    assert not {name for name in modules if not re.search(rf"\b{name}\b", section)}, "README says where everything is"


def test_style_uses_known_settings_and_fonts_that_everybody_has(caplog: pytest.LogCaptureFixture) -> None:
    import matplotlib.style
    from matplotlib import font_manager

    with matplotlib.rc_context():
        matplotlib.style.use(REPO / "assets/slim.mplstyle")
        for family in matplotlib.rcParams["font.sans-serif"]:
            found = Path(font_manager.findfont(family, fallback_to_default=False))
            shipped = Path(matplotlib.get_data_path()).resolve()
            assert found.resolve().is_relative_to(shipped), f"{family} does not ship with Matplotlib"
        colours = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
        assert len(set(colours)) == len(colours) >= 6
    assert not caplog.messages, "Matplotlib logs what it does not understand"


def test_no_machine_and_no_registry_is_named() -> None:
    """A path of somebody's machine, or the address of a package registry, makes the repository his."""
    pattern = r"(?<![\w./~-])/(?:home|root|Users)/\w+"
    pattern += r"|pypi\.org|pythonhosted\.org|repo\.anaconda\.com|deb\.debian\.org|archive\.ubuntu\.com"
    if len(REPO.parts) > 2:  # "/repo" alone is part of too many honest words
        pattern += rf"|(?<![\w./~-]){re.escape(str(REPO))}(?![\w-])"
    found = []
    for path in _files_of_the_project():
        text = path.read_bytes().decode("utf-8", errors="ignore") if b"\0" not in path.read_bytes()[:1024] else ""
        found += [f"{path.relative_to(REPO)}: {m.group()}" for m in re.finditer(pattern, text)]
    assert not found, found


def _files_of_the_project() -> list[Path]:
    """What git tracks, or would if added; without git, all files outside hidden folders."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=REPO, check=True, capture_output=True).stdout
        paths = [REPO / os.fsdecode(name) for name in listed.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [p for p in REPO.rglob("*") if not any(part.startswith(".") for part in p.relative_to(REPO).parts)]
    return [path for path in paths if path.is_file() and not path.is_symlink()]
