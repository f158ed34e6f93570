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
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import slimlib

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
PYTHONS = ["3.10", "3.11", "3.12"]


# ---- dependencies ---------------------------------------------------------------------------------------


def test_conda_takes_everything_from_pyproject() -> None:
    environment = yaml.safe_load((REPO / "environment.yml").read_text(encoding="utf-8"))
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-e .[dev]"], "Python packages belong into pyproject.toml, the one list there is"
    assert sorted(re.split("[=<>]", entry)[0] for entry in plain) == ["pip", "python"]
    (python,) = [entry for entry in plain if entry.startswith("python")]
    assert python == "python=3.11"
    assert environment["channels"] == ["conda-forge"]


def test_everybody_means_the_same_pythons() -> None:
    admitted = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(20) if f"3.{minor}.5" in admitted] == PYTHONS
    classifiers = [line.rsplit(" ", 1)[1] for line in PROJECT["classifiers"] if "Python :: 3" in line]
    assert classifiers == PYTHONS
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"python(3\.\d+)", makefile))) == PYTHONS
    assert "not (3, 10) <= sys.version_info[:2] <= (3, 12)" in makefile


def test_installed_versions_are_the_admitted_ones() -> None:
    for requirement in [*NEEDED, *EXTRAS["dev"]]:
        if requirement.marker is None or requirement.marker.evaluate():
            installed = importlib.metadata.version(requirement.name)
            assert installed in requirement.specifier, f"{requirement} is asked for, {installed} is installed"


def test_every_dependency_has_a_lower_bound_and_numpy_stays_below_2() -> None:
    for requirement in [*NEEDED, *(r for extra in EXTRAS.values() for r in extra)]:
        assert any(s.operator in (">=", "==") for s in requirement.specifier), requirement
    (numpy,) = [requirement for requirement in NEEDED if requirement.name == "numpy"]
    assert "1.26.4" in numpy.specifier and "2.0.0" not in numpy.specifier, "compressai needs numpy<2"


def test_what_is_imported_is_declared() -> None:
    """Nothing may work only because some other package happens to bring it along."""
    use = {canonicalize_name(r.name) for r in NEEDED + EXTRAS["retrain"] + EXTRAS["imagenet"]}
    develop = use | {canonicalize_name(r.name) for r in EXTRAS["dev"]}
    standard = {*sys.stdlib_module_names, "tomllib"}  # tomllib: from Python 3.11 on
    distributions = importlib.metadata.packages_distributions()
    local = {"slimlib", "conftest", *(path.stem for path in (REPO / "tests").glob("*.py"))}
    missing = set()
    for path, source in _sources():
        declared = develop if path.is_relative_to(REPO / "tests") else use
        for module in _imported_modules(source) - standard - local:
            # a package's name is mostly that of its module; tomli, say, is not installed everywhere
            candidates = {canonicalize_name(name) for name in distributions.get(module, [module])}
            if not candidates & declared:
                missing.add(f"{path.relative_to(REPO)} imports {module}")
    assert not missing, f"not declared in pyproject.toml: {sorted(missing)}"


def _sources() -> Iterator[tuple[Path, str]]:
    """Python files and the code of notebooks, without IPython's magics."""
    for folder in ("slimlib", "tests", "assets"):
        for path in sorted((REPO / folder).rglob("*.py")):
            yield path, path.read_text(encoding="utf-8")
    for path in sorted((REPO / "notebooks").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            lines = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code").splitlines()
            yield path, "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in lines)


def _imported_modules(source: str) -> set[str]:
    """Top-level names of what a source imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


# ---- the package ----------------------------------------------------------------------------------------


def test_import_is_fast_and_the_codec_is_found_when_asked_for() -> None:
    code = (
        "import sys, slimlib; heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy; assert 'SlimCodec' in dir(slimlib)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


def test_unknown_names_of_the_package_are_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SlimKodek'"):
        slimlib.SlimKodek  # noqa: B018


def test_version() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", slimlib.__version__)


# ---- the commands ---------------------------------------------------------------------------------------


def test_make_help_lists_every_command() -> None:
    text = _make(REPO, "help").stdout
    for command in ("tutorial", "test", "lab", "notebooks", "lint", "types", "clean", "install"):
        assert f"make {command}" in text
    assert _make(REPO).stdout == text, "make without a target shows the help"


@pytest.mark.parametrize("usable", ["python3.11", "python3.12", "python3.10", "python3"])
def test_make_finds_a_python_past_dead_ones(tmp_path: Path, usable: str) -> None:
    """A version manager leaves shims that exist and only complain."""
    _fake_commands(tmp_path, usable)
    done = _make(tmp_path, ".venv/bin/python", PATH=str(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv/bin/python").read_text() == f"{usable} -m venv --clear .venv\n"


def test_make_says_what_is_missing_when_there_is_no_python(tmp_path: Path) -> None:
    _fake_commands(tmp_path, usable=None)
    done = _make(tmp_path, ".venv/bin/python", PATH=str(tmp_path / "bin"))
    assert done.returncode != 0
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
        found = shutil.which(name)
        assert found
        (folder / "bin" / name).symlink_to(found)
    for name in ("python3.11", "python3.12", "python3.10", "python3", "python"):
        body = "echo 'command not found' >&2; exit 127"
        if name == usable:
            body = f'[ "$1" = -m ] || exit 0; mkdir -p .venv/bin; echo "{name} $*" >.venv/bin/python'
        script = folder / "bin" / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)


def test_ci_calls_the_same_commands_as_people_do() -> None:
    script = REPO / ".ci/run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert re.findall(r"^make (\w+)$", text, flags=re.M) == ["install", "lint", "types", "test"]
    subprocess.run(["bash", "-n", str(script)], check=True)


# ---- what a reader finds --------------------------------------------------------------------------------


def test_licences_are_stated() -> None:
    assert (REPO / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert PROJECT["license"] == "MIT"
    assert "assets/scenes/CREDITS.md" in (REPO / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["README.md", "notebooks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"<!--.*?-->", "", (REPO / page).read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (REPO / page).parent.joinpath(target).exists(), f"{page} links to {target}"


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
    patterns = [
        r"(?<![\w./~-])/(?:home|root|Users)/\w+",
        r"pypi\.org|pythonhosted\.org|repo\.anaconda\.com|deb\.debian\.org|archive\.ubuntu\.com",
    ]
    if len(REPO.parts) > 2:  # "/repo" alone is part of too many honest words
        patterns.append(rf"(?<![\w./~-]){re.escape(str(REPO))}(?![\w-])")
    found = []
    for path in _files_of_the_project():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(REPO)}: {m.group()}" for p in patterns for m in re.finditer(p, text)]
    assert not found, found


def _files_of_the_project() -> list[Path]:
    """What git tracks, or would if added; without git, all files outside hidden folders."""
    try:
        listed = subprocess.run(
            ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=REPO,
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        everything = [path for path in REPO.rglob("*") if path.is_file()]
        return [p for p in everything if not any(part.startswith(".") for part in p.relative_to(REPO).parts)]
    paths = [REPO / os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


# ---- the tiny world that other tests stand on -----------------------------------------------------------


@pytest.mark.parametrize("variant", ["fp16", None])
def test_tiny_world_loads_in_the_stock_libraries(tiny_world: Path, variant: str | None) -> None:
    import timm
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image
    from transformers import AutoProcessor, BlipForConditionalGeneration

    where = {"variant": variant, "dtype": torch.float32, "local_files_only": True}
    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_world / "ldm"), **where)
    pipeline.set_progress_bar_config(disable=True)
    assert {m.dtype for m in (pipeline.vae, pipeline.unet, pipeline.text_encoder)} == {torch.float32}
    words = pipeline.tokenizer("a photo of a red fox").input_ids
    assert pipeline.tokenizer.unk_token_id not in words
    assert pipeline("a photo of a red fox", num_inference_steps=2).images[0].size == (64, 64)

    captioner = BlipForConditionalGeneration.from_pretrained(str(tiny_world / "captioner"), **where)
    processor = AutoProcessor.from_pretrained(str(tiny_world / "captioner"), local_files_only=True)
    pixels = processor(images=Image.new("RGB", (50, 70)), return_tensors="pt")
    ids = captioner.generate(**pixels, max_new_tokens=5)
    assert isinstance(processor.decode(ids[0], skip_special_tokens=True), str)

    for machine in ("machine_a", "machine_b"):
        model = timm.create_model(f"local-dir:{tiny_world / machine}", pretrained=True).eval()
        assert model(torch.rand(2, 3, 64, 64)).shape == (2, len(model.pretrained_cfg["label_names"]))
