"""Every numbered notebook, and every solution, runs with small parameters and is committed as a reader should find it.

Also the runner behind `make tutorial` and `make notebooks`, on notebooks made up here.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import sys
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import psutil
import pytest
import run
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from run import NOTEBOOKS, WIDGET_VIEW, clean_notebook, numbered, run_notebook

SMALL: dict[str, dict[str, object]] = {
    "00_start_here": {"qualities": [0.2, 0.8]},
    "01_roi_extraction": {"n_scenes": 16, "n_val": 12, "sigmas": [2, 16]},
    "02_latent_compression": {"n_scenes": 6, "n_fit": 16, "n_sweep": 5, "qualities": [0.5, 1.0]},
    "03_roi_captioning": {"n_scenes": 31, "n_drawn": 8, "draw_steps": 4, "n_decoded": 6, "noise_levels": [100, 500]},
    "04_diffusion_enhancement": {"n_scenes": 4, "noise_levels": [100, 600], "steps_tried": [1, 4]},
    "05_stage1_training": {"n_train": 32, "n_scenes": 24, "train_steps": 16, "batch": 8},
    "06_stage2_training": {"n_train": 16, "n_scenes": 6, "train_steps": 2, "lora_steps": 1, "batch": 4, "n_views": 3}
    | {"qualities": [0.4, 0.8]},
    "07_evaluation": {"n_scenes": 6, "n_gallery": 1, "draws": 20, "time_scenes": 1, "coverage_trials": 100},
    "08_bitrate_explorer": {"qualities": [0.2, 0.8], "caption_qualities": [0.5]},
    "09_compressor_by_hand": {"n_train": 16, "n_scenes": 4, "train_steps": 6, "batch": 4, "qualities": [0.2, 0.8]},
    "10_pocket_scenes": {"size": 64},
    "11_pocket_models": {"n_scenes": 24, "n_drawn": 4, "draw_steps": 4},
    "12_paper_scale": {"sizes": [256], "n_pictures": 8, "train_steps": 4},
    "13_faster_diffusion": {"n_scenes": 3, "n_walks": 4, "train_steps": 3, "steps_tried": [1, 2, 8]}
    | {"qualities": [0.0]},
    "14_grids_of_runs": {"values": [0.2, 1.0]},
    "solutions/00_wrong_caption": {"n_scenes": 2, "qualities": [0.5]},
    "solutions/01_keep_a_share": {"n_scenes": 24, "shares": [0.0, 0.1, 0.2, 1.0]},
    "solutions/02_adaptive_counts": {"n_scenes": 3, "n_fit": 8},
    "solutions/03_learning_a_prior": {"n_train": 124, "n_scenes": 31},
    "solutions/04_many_seeds": {"n_scenes": 4, "n_seeds": 4},
    "solutions/05_background_weight": {"n_train": 24, "n_scenes": 16, "train_steps": 8, "batch": 8}
    | {"background_weights": [0.02, 1.0]},
    "solutions/06_flat_latents": {"n_scenes": 3, "descent_steps": 8, "n_noises": 2},
    "solutions/07_bd_accuracy": {},
    "solutions/08_smallest_file": {"n_scenes": 2, "n_qualities": 3},
    "solutions/09_bits_per_cell": {"n_scenes": 3},
    "solutions/10_two_objects": {"size": 128},
    "solutions/11_latent_bits": {"n_scenes": 24, "finest": 0.5, "n_steps": 3},
    "solutions/12_how_many_pictures": {},
    "solutions/13_progressive": {"n_points": 2000},
    "solutions/14_over_seeds": {"n_grids": 4000},
}
"""For each notebook, by its path in notebooks/ without suffix: the parameters that make it run in seconds."""

FOUND = numbered(solutions=True)


def _name(path: Path) -> str:
    return path.relative_to(NOTEBOOKS).with_suffix("").as_posix()


def _read(path: Path) -> NotebookNode:
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=nbformat.NO_CONVERT)


each_notebook = pytest.mark.parametrize("path", FOUND, ids=_name)


def test_each_notebook_has_small_parameters_and_a_place_in_the_index() -> None:
    assert sorted(SMALL) == sorted(map(_name, FOUND)), "keep the table SMALL in step with notebooks/"
    index = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in numbered() if f"]({path.name})" not in index]
    assert not missing, "link them in notebooks/README.md"


@each_notebook
def test_parameters(path: Path) -> None:
    """One cell of plain literals, each explained. SMALL names no others: papermill only logs a wrong one."""
    cells = [cell for cell in _read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1 and cells[0].cell_type == "code", "exactly one code cell is tagged `parameters`"
    known, assigned = papermill.inspect_notebook(str(path)), set()
    for statement in ast.parse(cells[0].source).body:
        assert isinstance(statement, (ast.Assign, ast.AnnAssign)), "assignments only; derive in the next cell"
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        assert isinstance(target, ast.Name) and statement.value is not None
        ast.literal_eval(statement.value)
        assigned.add(target.id)
        assert known.get(target.id, {}).get("help"), f"{target.id}: no comment that papermill finds"
    assert set(known) == assigned
    assert set(SMALL.get(_name(path), {})) <= assigned, "SMALL names a parameter that is not there"


@each_notebook
def test_committed_as_a_reader_should_find_it(path: Path) -> None:
    """What `make notebooks` leaves: outputs of one run in order, and nothing of the machine that ran it."""
    notebook = _read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}, "run `make notebooks`"
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make notebooks`"
    assert outputs and not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if WIDGET_VIEW in o.get("data", {})], "a live widget; show a picture too"
    texts = [cell.source for cell in notebook.cells] + [str(o.get("text", "")) for o in outputs]
    texts += [str(v) for o in outputs for kind, v in o.get("data", {}).items() if not kind.startswith("image/")]
    folders = rf"(?:/(?:home|root|Users|tmp|mnt|opt|private)/\w+|[A-Z]:\\\w+|{re.escape(sys.prefix)})"
    found = re.findall(rf"(?<![\w.]){folders}|\bat 0x[0-9a-f]+", "\n".join(texts))
    assert not found, f"paths of a machine or addresses in memory: {found[:3]}"
    assert path.stat().st_size < 1_500_000, "smaller figures, or fewer"
    slides = [cell.metadata.slideshow.slide_type for cell in notebook.cells]
    assert slides == run.slide_types(notebook.cells), "run `make notebooks`"


@each_notebook
def test_reads_well(path: Path) -> None:
    cells = _read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    kinds = "".join(cell.cell_type[0] for cell in cells)
    assert "ccc" not in kinds, f"{cells[kinds.index('ccc') + 2].id}: a third code cell without prose"
    long = [c.id for c in cells if c.cell_type == "code" and len(c.source.splitlines()) > 40]
    assert not long, "more than 40 lines"


def test_slides_are_of_the_core() -> None:
    texts = ["# A", "import os", "values", "n: int = 1", "## One", "f()", "g()", "and", "h()", "# Going further", "i"]
    cells = [new_markdown_cell(t) if t[0] == "#" or t in ("and", "values") else new_code_cell(t) for t in texts]
    cells[2].source = "The values that may be changed"
    cells[3].metadata = {"tags": ["parameters"]}
    wanted = ["slide", *["skip"] * 3, "slide", "-", "subslide", "subslide", "-", "skip", "skip"]
    assert run.slide_types(cells) == wanted


def _filled(path: Path) -> tuple[NotebookNode, int]:
    """A notebook whose cells to fill in hold their answers, and the number of these cells.

    Of a small one the answer stands in the notebook itself, folded; of the exercise, in the cells of the solution that
    are tagged `solution`.
    """
    notebook = _read(path)
    cells = [*notebook.cells, *(c for f in path.parent.glob(f"solutions/{path.name[:2]}_*") for c in _read(f).cells)]
    answers = [text for cell in cells for text in re.findall(r"^```python\n(.*?)^```", cell.source, re.M | re.S)]
    answers += [cell.source for cell in cells if "solution" in cell.metadata.get("tags", [])]
    stubs = [cell for cell in notebook.cells if cell.cell_type == "code" and "raise NotImplementedError" in cell.source]
    for cell in stubs:
        lines, done = cell.source.splitlines(), set[str]()
        for part in ast.parse(cell.source).body:
            if isinstance(part, ast.FunctionDef) and "raise NotImplementedError" in ast.unparse(part):
                answer = next((a for a in answers if re.search(rf"^def {part.name}\(", a, re.M)), None)
                assert answer, f"{path.stem}: nothing answers {part.name}"
                kept = [""] * (part.end_lineno - part.lineno)  # type: ignore[operator]
                lines[part.lineno - 1 : part.end_lineno] = ["" if answer in done else answer.replace("\n", "\r"), *kept]
                done.add(answer)
        cell.source = "\n".join(lines).replace("\r", "\n")
    return notebook, len(stubs)


@pytest.mark.notebook
@each_notebook
def test_runs(path: Path, tmp_path: Path) -> None:
    filled, count = _filled(path)
    nbformat.write(filled, tmp_path / path.name)
    result = run_notebook(tmp_path / path.name, tmp_path / "run", SMALL.get(_name(path)), 600, path.parent)
    assert not result.problem, f"{result.problem}\n{result.log.read_text(errors='replace')[-3000:]}"
    assert {kept.suffix for kept in path.parent.iterdir()} <= {".ipynb", ".md", ".py", ""}, "it leaves files behind"
    said = [str(output.get("text", "")) for cell in _read(result.output).cells for output in cell.get("outputs", [])]
    unsolved = [text for text in said if text.startswith("Not ")]
    assert not unsolved and sum("Right: " in text for text in said) >= count, "an answer fails its check"


# ---- the runner -----------------------------------------------------------------------------------------


def _write(folder: Path, name: str, *sources: str) -> Path:
    """A notebook with a title and the given code cells, never executed."""
    notebook = new_notebook(cells=[new_markdown_cell("# Title"), *(new_code_cell(s) for s in sources)])
    path = folder / f"{name}.ipynb"
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    return path


@pytest.mark.notebook
def test_failing_notebooks_stop_nothing_else_and_fail_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "foreign/kernels/python3"  # somebody's own kernel of that name, which does not work
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "foreign"))
    source, runs = tmp_path / "notebooks", tmp_path / "runs"
    (source / "solutions").mkdir(parents=True)
    (source / "00_broken.ipynb").write_text("{")
    bad = _write(source, "01_bad", "print('before')", "raise ValueError('no such luck')", "print('never')")
    bars = "import ipywidgets\nfrom tqdm import tqdm\nfor _ in tqdm(range(3)): pass\nipywidgets.IntSlider()"
    good = _write(
        source / "solutions", "02_good", "import sys, os\nprint(sys.prefix, os.path.basename(os.getcwd()))", bars
    )
    before, ids = bad.read_bytes(), [cell.id for cell in _read(good).cells]

    assert run.main(["--write", "--notebooks", str(source), "--runs", str(runs)]) == 1

    said = capsys.readouterr().out
    assert re.search(r"\[2/3\] 01_bad \.\.\. FAILED, \d+ s\n\[3/3\] 02_good \.\.\. ok, \d+ s\n", said)
    assert "In [2]: ValueError: no such luck" in said and "1 of 3 notebooks ran well" in said
    assert "00_broken failed: nbformat.reader.NotJSONError" in said
    assert re.search(r"02_good +[\d.]+ +0\.\d +ok +\S*solutions/02_good\.ipynb", said), said
    (folder,) = runs.iterdir()
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    logs = {"00_broken.log", "01_bad.log", "solutions/02_good.log"}
    assert left == logs | {"01_bad.ipynb", "solutions/02_good.ipynb", "summary.txt"}
    assert bad.read_bytes() == before, "a failed notebook is not written back"
    written = _read(good)
    assert [cell.id for cell in written.cells] == ids
    assert written.cells[1].outputs[0].text == f"{sys.prefix} solutions\n", "this Python, that folder"
    assert written.cells[2].outputs == [], "neither the progress bar nor the widget"
    assert set(written.metadata) == {"kernelspec", "language_info"}
    assert not [path for path in source.rglob("*") if path.is_file() and path.suffix != ".ipynb"]


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What has ended well counts, but for changed notebooks, other commands, and runs that may still be at work."""
    source, ran, deadly = tmp_path / "notebooks", [], ["01_b"]
    source.mkdir()
    for name in ("00_a", "01_b"):
        _write(source, name, "1")

    def fake(notebook: Path, folder: Path, parameters: dict, time_limit: float) -> run.Result:
        ran.append(notebook.stem)
        if notebook.stem in deadly:
            raise SystemExit(137)
        return run.Result(1.0, 0, "", notebook, notebook)

    def go(*words: str) -> None:
        ran.clear()
        with contextlib.suppress(SystemExit):
            run.main(["--notebooks", str(source), "--runs", str(tmp_path / "runs"), *words])

    monkeypatch.setattr(run, "run_notebook", fake)
    go()
    go()
    assert ran == ["00_a", "01_b"], "this process is alive: it may still be at work"
    monkeypatch.setattr(run.psutil, "pid_exists", lambda _: False)
    go("--time-limit", "9")
    assert ran == ["00_a", "01_b"]
    go()
    assert ran == ["01_b"] and "00_a ... ok, before the run was stopped" in capsys.readouterr().out
    _write(source, "00_a", "2")
    deadly.clear()
    go()
    assert ran == ["00_a", "01_b"] and "2 of 2 notebooks ran well" in capsys.readouterr().out


@pytest.mark.notebook
def test_a_grid_of_parameters_ends_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, runs = tmp_path / "notebooks", tmp_path / "runs"
    source.mkdir()
    cells = [new_code_cell("k: int = 2  # a factor\nname = 'a'  # said along"), new_code_cell("")]
    cells[0].metadata["tags"], cells[1].metadata["tags"] = ["parameters"], ["metrics"]
    cells[1].source = "import json\nprint(json.dumps({'double': 2 * k, 'name': name}))"
    nbformat.write(new_notebook(cells=cells, metadata=run.METADATA), source / "05_a.ipynb")
    there = ["05", "--notebooks", str(source), "--runs", str(runs)]
    assert run.main([*there, "-p", "k", "3", "5"]) == 0
    (folder,) = runs.iterdir()
    alone = json.loads((folder / "k=5" / "metrics.json").read_text())
    assert alone == {"parameters": {"k": 5}, "metrics": {"double": 10, "name": "a"}}
    table = pd.read_csv(folder / "metrics.csv")
    assert table[["k", "double", "name"]].values.tolist() == [[3, 6, "a"], [5, 10, "a"]]
    assert (folder / "k=5/05_a.ipynb").exists() and (folder / "metrics.png").stat().st_size > 1000
    for words in (["-p", "kk", "3"], ["-p", "k"], ["-p", "k", "3", "--write"]):
        with pytest.raises(SystemExit):
            run.main([*there, *words])
        assert "05_a has k, name" in capsys.readouterr().err


@pytest.mark.notebook
def test_a_hanging_notebook_is_killed_with_its_kernel(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    parameters = "where = ''  # a file\nrate = 0.5  # a number that YAML and JSON write differently"
    leave_word = "import os, pathlib, time\npathlib.Path(where).write_text(f'{os.getpid()} {rate * 2}')"
    path = _write(tmp_path, "00_hangs", parameters, leave_word, "time.sleep(600)")
    notebook = _read(path)
    notebook.cells[1].metadata["tags"] = ["parameters"]
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    result = run_notebook(path, tmp_path / "out", {"where": str(pid_file), "rate": 1e-05}, time_limit=10)
    assert "time limit of 10 s" in result.problem and 10 <= result.seconds < 60
    if pid_file.exists():  # on a very busy machine the kernel may not have come that far
        pid, rate = pid_file.read_text().split()
        assert float(rate) == 2e-05
        assert not psutil.pid_exists(int(pid))


@pytest.mark.parametrize("wanted", [["07"], ["00", "nonsense"], []])
def test_asking_for_notebooks_that_do_not_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: list[str]
) -> None:
    if wanted:
        _write(tmp_path, "00_only", "1")
    with pytest.raises(SystemExit) as stop:
        run.main([*wanted, "--notebooks", str(tmp_path), "--runs", str(tmp_path / "runs")])
    assert stop.value.code == 2
    assert f"there are: {'00_only' if wanted else 'none'}" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_cleaning_keeps_what_was_said_and_drops_what_was_noise() -> None:
    figure = new_output("display_data", {"image/png": "iVBO", "text/plain": "<Figure>"})
    bars = "\r  0%|    | 0/9\r100%|####| 9/9 [00:01<00:00]\nmind this\n"
    cell = new_code_cell(
        "x",
        metadata={"tags": ["parameters"], "papermill": {"duration": 1.0}, "execution": {"shell.reply": "t"}},
        outputs=[
            new_output("stream", name="stdout", text="step 1\rstep 2\n\ndone\n"),
            new_output("stream", name="stderr", text=bars),
            new_output("stream", name="stderr", text="12it [00:03, 4.0it/s]\n"),
            new_output("display_data", {WIDGET_VIEW: {"model_id": "1"}, "text/plain": "IntSlider()"}),
            figure,
        ],
    )
    notebook = new_notebook(cells=[cell], metadata={"widgets": {"state": {}}, "papermill": {"input_path": "somewhere"}})
    clean_notebook(notebook)
    nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert cell.metadata == {"tags": ["parameters"], "slideshow": {"slide_type": "skip"}}
    assert [output.get("text") for output in cell.outputs] == ["step 2\n\ndone\n", "mind this\n", None]
    assert cell.outputs[-1] == figure
    again = nbformat.writes(notebook)
    assert nbformat.writes(clean_notebook(notebook)) == again
