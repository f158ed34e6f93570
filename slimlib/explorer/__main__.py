"""The explorer as a web page of its own, on this machine only; no network is needed.

python -m slimlib.explorer                  starts the page and opens a browser (also: make explorer)
python -m slimlib.explorer --benchmark      how long an answer takes: slider to picture, over 100 moves
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import nbformat
import numpy as np
from nbformat.v4 import new_code_cell, new_notebook

CODE = "from slimlib.explorer import Page\npage = Page()\npage.box"
TEMPLATE = """{%- extends 'voila/templates/lab/index.html.j2' -%}
{# The lab template fetches an icon font from a server elsewhere. This page has no icons, and works offline. #}
{%- block notebook_css -%}{{ super() | replace('https://cdn.jsdelivr.net/', 'data:text/css,') }}{%- endblock -%}
"""
MAX_MESSAGE = 256 * 2**20
"""Largest upload in bytes; the server's own limit of 10 MiB is less than a large photograph."""


def serve(port: int, browser: bool) -> None:
    """Run Voila on a notebook of one cell until it is interrupted."""
    from voila.app import Voila

    with tempfile.TemporaryDirectory() as folder:
        notebook = new_notebook(cells=[new_code_cell(CODE)])
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        page = Path(folder, "explorer.ipynb")
        nbformat.write(notebook, page)
        template = Path(folder, "voila/templates/explorer/index.html.j2")
        template.parent.mkdir(parents=True)
        template.write_text(TEMPLATE)
        (template.parent / "conf.json").write_text('{"base_template": "lab"}')
        # Voila finds templates there, and this Python's own kernel before anybody else's.
        os.environ |= {"JUPYTER_PATH": folder, "JUPYTER_PREFER_ENV_PATH": "1"}
        options = [str(page), f"--port={port}", "--Voila.ip=127.0.0.1", "--template=explorer"]
        options += [] if browser else ["--no-browser"]
        Voila.launch_instance(options, tornado_settings={"websocket_max_message_size": MAX_MESSAGE})


def benchmark(moves: int) -> None:
    """Move the quality slider of a page without a browser, and print how long the pictures took."""
    import torch

    from slimlib.explorer import Page

    page = Page()
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"before": [], "after": []}
    for quality in rng.permutation(np.delete(np.linspace(0, 1, 101), 20))[:moves]:  # not where it stands already
        page.quality.value = float(quality)
        page.wait(rivals=False)
        for name, taken in times.items():
            taken.append(1000 * page.answered[name])
    print(
        f"{len(times['after'])} moves of the quality slider, {torch.get_num_threads()} threads, K = {page.steps.value}"
    )
    for name, label in (("before", "first picture and bytes"), ("after", "finished picture")):
        median, late = np.percentile(times[name], [50, 95])
        print(f"{label:24} median {median:5.0f} ms, 95th percentile {late:5.0f} ms")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m slimlib.explorer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8866, help="of the page (default: %(default)s)")
    parser.add_argument("--no-browser", action="store_true", help="only serve it")
    parser.add_argument("--benchmark", action="store_true", help="measure, and serve nothing")
    parser.add_argument("--moves", type=int, default=100, help="slider moves of the benchmark (default: %(default)s)")
    a = parser.parse_args(arguments)
    if a.benchmark:
        benchmark(a.moves)
    else:
        serve(a.port, not a.no_browser)


if __name__ == "__main__":
    main()
