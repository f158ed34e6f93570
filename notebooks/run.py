"""Execute the numbered notebooks in order, each in a process of its own: `make tutorial` and `make notebooks`.

    python notebooks/run.py            all of them, into runs/<date>_<time>/
    python notebooks/run.py 00 04      those whose names begin like that
    python notebooks/run.py --write    these and their solutions, written back with outputs, ready to commit
    python notebooks/run.py 05 -p w_bg 0.02 0.05 0.2 -p seed 0 1    every combination of these parameters

With parameters, what cells tagged `metrics` print (JSON) goes into a metrics.json beside each notebook; metrics.csv
gathers all of them, and metrics.png draws them.
A notebook that fails or hangs stops nothing else; the exit status tells (0: all well, 1: some failed). Where a run was
killed, the same command goes on in its folder: what has ended well there, and is still the same notebook, counts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import nbformat
import pandas as pd
import papermill
import psutil
import yaml
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

from slimlib.__main__ import in_one_line
from slimlib.utils import write_file

NOTEBOOKS = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}
STATE = ".unfinished.json"  # in a run's folder until it ends
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PROGRESS_BAR = re.compile(r".*(\d+%\||\d+it \[|\[\d\d:\d\d[<,]).*\n?")


class Result(NamedTuple):
    seconds: float
    memory: int  # bytes: the most that papermill, the kernel and its children held together
    problem: str  # "" if all went well
    output: Path  # the executed notebook; of a failed one, as far as it got
    log: Path


def numbered(folder: Path = NOTEBOOKS, solutions: bool = False) -> list[Path]:
    """The numbered notebooks of a folder in order, and after them the solutions of their exercises if wanted."""
    pattern = "[0-9][0-9]_*.ipynb"
    return sorted(folder.glob(pattern)) + (sorted(folder.glob(f"solutions/{pattern}")) if solutions else [])


def run_notebook(
    notebook: Path, folder: Path, parameters: dict | None = None, time_limit: float = 3600, home: Path | None = None
) -> Result:
    """Execute a notebook by papermill in a subprocess, in `home` (its own folder); copy and log go into `folder`.

    Papermill only logs a misspelt parameter: whoever passes some compares them with `papermill.inspect_notebook`.
    After `time_limit` seconds the notebook and all its processes are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output, log = folder / notebook.name, folder / f"{notebook.stem}.log"
    output.unlink(missing_ok=True)  # an older one must not pass for this run's
    command = [sys.executable, "-m", "papermill", str(notebook.resolve()), str(output.resolve()), "--no-progress-bar"]
    command += ["--kernel", "python3", "--language", "python", "--cwd", str((home or notebook.parent).resolve())]
    command += ["--parameters_yaml", yaml.safe_dump(parameters)] if parameters else []
    start, memory, problem = time.monotonic(), 0, f"stopped at the time limit of {time_limit:.0f} s"
    with log.open("wb") as sink, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as private:
        # This Python's own kernel, nobody's personal settings, and no Matplotlib backend that shows nothing.
        empty = dict.fromkeys(["JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "MPLBACKEND"], "")
        own = ["JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"]
        # Threads that spin while they wait take half an hour in place of a minute on a busy machine.
        given = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        environment = {**given, **empty, **dict.fromkeys(own, private)}
        environment["JUPYTER_PREFER_ENV_PATH"] = "1"
        streams: dict = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": sink}
        process = psutil.Popen(command, env=environment, preexec_fn=_die_with_parent, **streams)
        family = [process]
        try:
            while time.monotonic() - start < time_limit:
                with contextlib.suppress(psutil.NoSuchProcess):
                    family = [process, *process.children(recursive=True)]
                    memory = max(memory, sum(member.memory_info().rss for member in family))
                with contextlib.suppress(psutil.TimeoutExpired):
                    failed = process.wait(timeout=0.5)
                    problem = _last_words(log.read_text(errors="replace")) if failed else ""
                    break
        finally:  # the kernel lives in a session of its own, and would outlive papermill
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=10)
    return Result(time.monotonic() - start, memory, problem, output if output.exists() else log, log)


def _die_with_parent() -> None:
    """Whoever kills this script (kill -9) ends papermill, too, and a kernel ends with that. On Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _last_words(log: str) -> str:
    """The cell that failed, and the last line of what was said: mostly the exception."""
    cell = re.findall(r'Exception encountered at "(In \[\d+\])"', log)
    return ": ".join([*cell[-1:], log.strip().rpartition("\n")[2][:160] or "nothing was said"])


def clean_notebook(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Strip in place what differs from run to run or from machine to machine; sources, outputs and ids stay.

    Goes: widget state and views (without the state a page shows an error in their place), papermill's and
    the kernel's notes (paths, times), progress bars, all metadata of cells but tags and what hides them. The place of
    each cell in a slide show is set by `slide_types`.
    """
    CoalesceStreamsPreprocessor().preprocess(notebook, {})  # of a line, what came after its last carriage return
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell, slide in zip(notebook.cells, slide_types(notebook.cells), strict=True):
        kept = {name: cell.metadata[name] for name in ("tags", "jupyter") if cell.metadata.get(name)}
        cell.metadata = nbformat.from_dict(kept | {"slideshow": {"slide_type": slide}})
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                output.text = PROGRESS_BAR.sub("", output.text)
        if cell.cell_type == "code":
            shown = [o for o in cell.outputs if WIDGET_VIEW not in o.get("data", {})]
            cell.outputs = [o for o in shown if o.get("text", "-").strip()]
    return notebook


def slide_types(cells: list[nbformat.NotebookNode]) -> list[str]:
    """Where each cell stands in a slide show, as nbconvert and RISE read it: the core, without imports and parameters.

    A heading begins a slide, other prose one below it; code stands under the prose before it.
    """
    types, core, above = list[str](), True, ""  # the kind of the cell above, "" where that is left out
    for cell in cells:
        core = core and not cell.source.startswith("# Going further")
        setup = "parameters" in cell.metadata.get("tags", []) or re.match(r"(import|from) ", cell.source)
        if not core or setup or cell.source.startswith("The values that may be changed"):
            types.append("skip")
        elif cell.cell_type == "markdown":
            types.append("slide" if cell.source.startswith(("# ", "## ")) else "subslide")
        else:
            types.append("-" if above == "markdown" else "subslide")
        above = "" if types[-1] == "skip" else cell.cell_type
    return types


def unfinished(runs: Path, words: str) -> tuple[Path, dict]:
    """The folder of a run of the same command that somebody has killed, and what had ended well; or a new folder."""
    for path in sorted(runs.glob(f"*/{STATE}"), reverse=True):
        state = json.loads(path.read_text())
        if state["command"] == words and not psutil.pid_exists(state["process"]):
            return path.parent, state["done"]
    now = datetime.now().strftime("%Y-%m-%d_%H%M%S")
    names = [now, *(f"{now}_{number}" for number in range(2, 100))]  # several may begin in one second
    return next(runs / name for name in names if not (runs / name).exists()), {}


def sources(notebook: Path) -> str:
    """A digest of what is executed, which writing outputs back does not change."""
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def metrics_of(notebook: Path) -> dict:
    """What the cells of an executed notebook that are tagged `metrics` have printed: an object of JSON each."""
    cells = nbformat.read(notebook, as_version=4).cells if notebook.suffix == ".ipynb" else []
    told = [cell.outputs for cell in cells if "metrics" in cell.metadata.get("tags", [])]
    texts = ["".join(output.get("text", "") for output in outputs) for outputs in told]
    return {name: value for text in texts if text.strip() for name, value in json.loads(text).items()}


def compare(folder: Path, names: list[str], rows: list[dict]) -> None:
    """Runs with different parameters as a table, metrics.csv, and a picture, metrics.png, a panel for each metric."""
    table = pd.DataFrame(rows)
    write_file(folder / "metrics.csv", table.to_csv(index=False, float_format="%.6g").encode())
    metrics = [name for name in table.select_dtypes("number") if name not in names]
    print(table.to_string(index=False, float_format="%.4g"), "", sep="\n")
    if metrics:
        table["run"] = table[["notebook"] * (table.notebook.nunique() > 1) + names].astype(str).agg(", ".join, axis=1)
        panels = table.plot(x="run", y=metrics, subplots=True, marker="o", ls="", legend=False, title=metrics, rot=20)
        panels[-1].set_xlabel(", ".join(names))
        panels[-1].figure.set_size_inches(6.4, 2.2 * len(metrics))
        panels[-1].figure.savefig(folder / "metrics.png", dpi=100, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("only", nargs="*", help="beginnings of names, such as 00 04; all notebooks if none")
    option("--write", action="store_true", help="write them and their solutions back, ready to commit")
    option("-p", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"), help="values to try, as YAML")
    option("--time-limit", type=float, default=3600, help="seconds for one notebook (%(default)s)")
    option("--notebooks", type=Path, default=NOTEBOOKS, help="folder of the notebooks")
    option("--runs", type=Path, default=NOTEBOOKS.parent / "runs", help="folder of the results")
    options = parser.parse_args(arguments)
    there = numbered(options.notebooks, solutions=options.write)
    chosen = [n for n in there if not options.only or n.name.startswith(tuple(options.only))]
    unknown = [o for o in options.only if not any(n.name.startswith(o) for n in there)]
    if unknown or not chosen:
        names = ", ".join(n.stem for n in there) or "none"
        parser.error(f"no notebook begins with {' '.join(unknown) or 'a number'}; there are: {names}")
    for notebook, (name, *values) in itertools.product(chosen if options.p else [], options.p):
        known = papermill.inspect_notebook(notebook)
        if name not in known or not values or options.write:  # papermill would only log a misspelt name
            parser.error(f"-p NAME VALUE ..., without --write; {notebook.stem} has {', '.join(known)}")
    names, tried = [name for name, *_ in options.p], [map(yaml.safe_load, values) for _, *values in options.p]
    grid = [dict(zip(names, values, strict=True)) for values in itertools.product(*tried)]
    runs = list(itertools.product(chosen, grid))

    words, rows, failed = " ".join(sys.argv[1:] if arguments is None else arguments), [], []
    folder, done = unfinished(options.runs, words)
    state = {"command": words, "process": os.getpid(), "done": done}
    write_file(folder / STATE, json.dumps(state).encode())
    print(f"executing {len(runs)} of {len(there) * len(grid)} notebooks into {os.path.relpath(folder)}/", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for i, (notebook, parameters) in enumerate(runs, 1):
            label = ",".join(f"{name}={value}" for name, value in parameters.items()).replace("/", "_")
            title = f"{notebook.stem} {label}".strip()
            print(f"[{i}/{len(runs)}] {title} ... ", end="", flush=True)
            name = (notebook.relative_to(options.notebooks).parent / label / notebook.name).as_posix()
            if name in done and done[name]["sources"] == sources(notebook):
                print("ok, before the run was stopped", flush=True)
                rows.append(done[name]["row"])
                continue
            place = (folder / name).parent
            result = run_notebook(notebook, place, parameters, time_limit=options.time_limit)
            how = "FAILED" if result.problem else "ok"
            print(f"{how}, {result.seconds:.0f} s", flush=True)
            rows.append([title, result.seconds, result.memory / 1e9, how, os.path.relpath(result.output)])
            if result.problem:
                failed.append(f"{notebook.stem} failed: {result.problem} (log: {os.path.relpath(result.log)})")
            elif options.write:
                clean = clean_notebook(nbformat.read(result.output, as_version=4))
                nbformat.validate(clean)
                write_file(notebook, (nbformat.writes(clean).rstrip("\n") + "\n").encode())
            if not result.problem and parameters:
                found = {"parameters": parameters, "metrics": metrics_of(result.output)}
                write_file(place / "metrics.json", (json.dumps(found, indent=1) + "\n").encode())
            if not result.problem:
                done[name] = {"sources": sources(notebook), "row": rows[-1]}
                write_file(folder / STATE, json.dumps(state).encode())
    table = pd.DataFrame(rows, columns=["notebook", "seconds", "memory [GB]", "result", "where to look"])
    total = f"{len(rows) - len(failed)} of {len(runs)} notebooks ran well; {table.seconds.sum():.0f} s in all."
    text = "\n".join([table.to_string(index=False, float_format="%.1f"), "", total, *failed, ""])
    write_file(folder / "summary.txt", text.encode())
    if options.p:
        ended = zip(runs, rows, strict=False)  # fewer rows than runs where somebody has interrupted them
        compare(folder, names, [{"notebook": n.stem, **p, **metrics_of(Path(row[-1]))} for (n, p), row in ended])
    (folder / STATE).unlink()
    print(f"\n{text}", end="")
    return int(bool(failed) or len(rows) < len(runs))


if __name__ == "__main__":
    sys.exit(in_one_line("run.py", main))
