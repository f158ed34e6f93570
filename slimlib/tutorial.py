"""Execute the numbered notebooks in order, each in a process of its own: what `make tutorial` runs.

    python -m slimlib.tutorial            all of them, into runs/<date>_<time>/
    python -m slimlib.tutorial 00 04      those whose names begin like that
    python -m slimlib.tutorial --write    these and their solutions, written back with outputs, ready to commit

A notebook that fails or hangs stops nothing else; the exit status tells (0: all well, 1: some failed).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import nbformat
import psutil
import yaml
from nbformat import NotebookNode

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = REPO / "notebooks"
NUMBERED = "[0-9][0-9]_*.ipynb"
TIME_LIMIT = 3600.0
"""Seconds that one notebook may take, unless told otherwise."""

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
PROGRESS_BAR = re.compile(r"\d+%\||\d+it \[|\[\d\d:\d\d[<,]")
KEPT_CELL_METADATA = ("tags", "jupyter")


@dataclass(frozen=True)
class Result:
    """What became of one notebook.

    Attributes:
        name: the notebook's name without suffix.
        seconds: wall-clock time.
        peak_bytes: most memory that all its processes held together, looked at twice a second.
        problem: "" if all went well, else what went wrong, in one line.
        output: the executed notebook; of a failed one, as far as it got.
        log: what papermill and the kernel said.
    """

    name: str
    seconds: float
    peak_bytes: int
    problem: str
    output: Path
    log: Path

    @property
    def ok(self) -> bool:
        return not self.problem


def numbered(folder: Path = NOTEBOOKS, solutions: bool = False) -> list[Path]:
    """The numbered notebooks of a folder in order, and after them the solutions of their exercises if wanted."""
    return sorted(folder.glob(NUMBERED)) + (sorted(folder.glob(f"solutions/{NUMBERED}")) if solutions else [])


def run_notebook(
    notebook: Path,
    folder: Path,
    parameters: Mapping[str, object] | None = None,
    time_limit: float = TIME_LIMIT,
) -> Result:
    """Execute one notebook by papermill in a subprocess, in the notebook's own folder.

    Args:
        notebook: the notebook; it is not changed.
        folder: where the executed notebook and its log go, under the notebook's name.
        parameters: values to inject after its `parameters` cell. Papermill only logs a misspelt name:
            whoever passes names compares them with `papermill.inspect_notebook`.
        time_limit: seconds until the notebook and all its processes are killed.

    Returns:
        the result; a notebook that fails, or hangs, is a result too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output, log = folder / notebook.name, folder / f"{notebook.stem}.log"
    output.unlink(missing_ok=True)  # an older one must not pass for this run's
    command = [sys.executable, "-m", "papermill", str(notebook.resolve()), str(output.resolve())]
    command += ["--kernel", "python3", "--language", "python", "--no-progress-bar"]
    command += ["--cwd", str(notebook.resolve().parent)]
    if parameters:
        command += ["--parameters_yaml", yaml.safe_dump(dict(parameters))]
    start = time.monotonic()
    with log.open("wb") as sink, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as private:
        environment, nothing = _environment(private), subprocess.DEVNULL
        process = subprocess.Popen(command, env=environment, stdin=nothing, stdout=sink, stderr=sink)
        status, peak_bytes = _wait(process, start + time_limit)
    seconds = time.monotonic() - start
    if status is None:
        problem = f"stopped at the time limit of {time_limit:.0f} s"
    else:
        problem = "" if status == 0 else _explain(output, log, status)
    return Result(notebook.stem, seconds, peak_bytes, problem, output if output.exists() else log, log)


def clean_notebook(notebook: NotebookNode) -> NotebookNode:
    """Strip in place what differs from run to run or from machine to machine; sources, outputs and ids stay.

    Goes: widget state and views (without the state a page shows an error in their place), papermill's and
    the kernel's notes (paths, times), progress bars, all metadata of cells but tags and a few switches.
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
        }
    )
    for cell in notebook.cells:
        kept = {key: cell.metadata[key] for key in KEPT_CELL_METADATA if cell.metadata.get(key)}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cleaned = [_clean_output(output) for output in cell.outputs]
            cell.outputs = [output for output in cleaned if output is not None]
    return notebook


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parse(arguments)
    everything = numbered(options.notebooks, solutions=options.write)
    chosen = [n for n in everything if not options.only or n.name.startswith(tuple(options.only))]
    unknown = [o for o in options.only if not any(n.name.startswith(o) for n in everything)]
    if unknown or not chosen:
        wanted = " ".join(unknown) or "a number"
        names = ", ".join(n.stem for n in everything) or "none"
        print(f"no notebook in {options.notebooks} begins with {wanted}; there are: {names}", file=sys.stderr)
        return 2

    folder = options.runs / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    print(f"executing {len(chosen)} of {len(everything)} notebooks into {_short(folder)}/", flush=True)
    results: list[Result] = []
    status = 0
    try:
        for i, notebook in enumerate(chosen, 1):
            print(f"[{i}/{len(chosen)}] {notebook.stem} ... ", end="", flush=True)
            place = folder / notebook.relative_to(options.notebooks).parent
            result = run_notebook(notebook, place, time_limit=options.time_limit)
            results.append(result)
            print(f"{'ok' if result.ok else 'FAILED'}, {result.seconds:.0f} s", flush=True)
            if result.ok and options.write:
                _write_back(result.output, notebook)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        status = 130
    table = summary(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}")
    return status or int(not all(result.ok for result in results))


def summary(results: Iterable[Result]) -> str:
    """A table with a line for each notebook, and below it the reason of each failure."""
    results = list(results)
    width = max([len("notebook"), *(len(r.name) for r in results)])
    lines = [f"{'notebook':{width}}  seconds  peak memory  result  where to look"]
    for r in results:
        memory = f"{r.peak_bytes / 1e9:.1f} GB"
        state = "ok" if r.ok else "FAILED"
        lines.append(f"{r.name:{width}}  {r.seconds:7.0f}  {memory:>11}  {state:6}  {_short(r.output)}")
    failed = [r for r in results if not r.ok]
    total = sum(r.seconds for r in results)
    lines += ["", f"{len(results) - len(failed)} of {len(results)} notebooks ran well; {total:.0f} s in all."]
    lines += [f"{r.name} failed: {r.problem} (log: {_short(r.log)})" for r in failed]
    return "\n".join(lines)


# ---- one subprocess --------------------------------------------------------------------------------------


def _environment(private: str) -> dict[str, str]:
    """The environment of a run: this Python's own kernel, and nobody's personal Jupyter settings."""
    # These would bring in other kernels and settings, and a Matplotlib backend that shows nothing.
    foreign = ("JUPYTER_PATH", "JUPYTER_CONFIG_PATH", "MPLBACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        environment[name] = os.path.join(private, name.lower())
    environment["JUPYTER_PREFER_ENV_PATH"] = "1"
    environment.setdefault("HF_HUB_OFFLINE", "1")  # the default scale ships with the repository
    environment.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return environment


def _wait(process: subprocess.Popen, deadline: float) -> tuple[int | None, int]:
    """Wait until `deadline` (monotonic seconds): (exit status or None if killed, peak memory in bytes)."""
    peak = 0
    try:
        while True:
            try:
                return process.wait(timeout=0.5), peak
            except subprocess.TimeoutExpired:
                peak = max(peak, sum(_resident(member) for member in _family(process)))
                if time.monotonic() > deadline:
                    return None, peak
    finally:
        if process.returncode is None:  # the deadline, or Ctrl-C
            _kill(process)


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    """The process and all its descendants: papermill, the kernel, and what the kernel started."""
    try:
        head = psutil.Process(process.pid)
        return [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(member: psutil.Process) -> int:
    try:
        return member.memory_info().rss
    except psutil.Error:
        return 0


def _kill(process: subprocess.Popen) -> None:
    """End papermill and its kernel, which lives in a session of its own and would outlive it."""
    family = _family(process)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=10)


def _explain(output: Path, log: Path, status: int) -> str:
    """Why papermill failed: the error of the cell that raised it, or else the last line of the log."""
    if output.exists():
        for cell in nbformat.read(output, as_version=4).cells:
            for out in cell.get("outputs", []):
                if out.output_type == "error":
                    reason = f"{out.ename}: {out.evalue}".strip(": \n").splitlines()[0]
                    return f"In [{cell.execution_count}]: {reason[:160]}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"exit status {status}: {lines[-1][:160] if lines else 'nothing in the log'}"


# ---- notebooks to commit ---------------------------------------------------------------------------------


def _clean_output(output: NotebookNode) -> NotebookNode | None:
    """An output as it is to be committed, or None if it is not: progress bars and live widgets."""
    if output.output_type != "stream":
        return None if WIDGET_VIEW in output.get("data", {}) else output
    # What a terminal would show in the end: of a line, what came after its last carriage return.
    lines = [line.rstrip("\r").split("\r")[-1] for line in output.text.split("\n")]
    if output.name == "stderr":
        lines = [line for line in lines if not PROGRESS_BAR.search(line)]
    output.text = "\n".join(lines)
    return output if output.text.strip() else None


def _write_back(executed: Path, notebook: Path) -> None:
    """Replace a notebook by its executed and cleaned copy, in one step."""
    node = clean_notebook(nbformat.read(executed, as_version=4))
    nbformat.validate(node)
    temporary = notebook.with_name(f".{notebook.name}.{os.getpid()}")
    try:
        temporary.write_text(nbformat.writes(node).rstrip("\n") + "\n", encoding="utf-8")
        os.replace(temporary, notebook)
    finally:
        temporary.unlink(missing_ok=True)


# ---- command line ----------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m slimlib.tutorial", description="Execute the numbered notebooks in order."
    )
    option = parser.add_argument
    option("only", nargs="*", help="beginnings of names, such as 00 04; all notebooks if none")
    option("--write", action="store_true", help="write them and their solutions back, ready to commit")
    option("--time-limit", type=float, default=TIME_LIMIT, help="seconds for one notebook (%(default)s)")
    option("--notebooks", type=Path, default=NOTEBOOKS, help="folder of the notebooks")
    option("--runs", type=Path, default=REPO / "runs", help="folder of the results")
    return parser.parse_args(arguments)


def _short(path: Path) -> str:
    """A path as seen from the current folder, where it lies below it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main())
