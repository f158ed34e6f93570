"""The explorer as a web page of its own, on this machine only; no network is needed.

Examples:
    slim explore                  start the page and open a browser
    slim explore --static OUT     write the static explorer, one HTML file that needs nothing else (minutes)
    slim explore --benchmark      how long an answer takes: slider to picture, over 100 moves
"""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

CODE = "from slimlib.explorer.page import Page\npage = Page()\npage.box"
TEMPLATE = """{%- extends 'voila/templates/lab/index.html.j2' -%}
{# The lab template fetches an icon font from a server elsewhere. This page has no icons, and works offline. #}
{%- block notebook_css -%}{{ super() | replace('https://cdn.jsdelivr.net/', 'data:text/css,') }}
<title>What does the machine still see?</title>{%- endblock -%}
"""
SERVER = {
    "websocket_max_message_size": 256 * 2**20,  # bytes of an upload; 10 MiB are less than a large photograph
    # Only this machine, by its own names; requests that a page from elsewhere makes are refused by their origin, also
    # the one that ends a kernel when its page goes. That one carries no token: Voila never sets the cookie for it.
    "allow_remote_access": False,
    "local_hostnames": ["localhost"],
    "disable_check_xsrf": True,
}
KERNELS = (
    "--preheat_kernel=True",  # one kernel with a finished page waits for whoever comes next
    "--pool_size=1",
    "--MappingKernelManager.cull_idle_timeout=60",  # seconds; for kernels whose page went without a word
    "--MappingKernelManager.cull_interval=20",
    "--KernelRestarter.restart_limit=0",  # one that died is gone, and its page says so; another would not know the page
)


@dataclass
class Options:  # `utils.option` would import torch, which the server can do without: its kernels compute
    port: int = field(default=8866, metadata={"help": "of the page"})
    browser: bool = field(default=True, metadata={"help": "open the page in a browser"})
    static: Path | None = field(default=None, metadata={"help": "write the static explorer here, and serve nothing"})
    benchmark: bool = field(default=False, metadata={"help": "measure, and serve nothing"})
    moves: int = field(default=100, metadata={"help": "slider moves of the benchmark"})

    def __post_init__(self) -> None:
        for name, most in (("port", 65_535), ("moves", 10_000)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"argument --{name}: {getattr(self, name)} is not a number from 1 to {most}")


def command(options: Options) -> int:
    """Serve the page until it is interrupted, write the static one, or measure how fast it is."""
    if options.static:
        from slimlib.explorer.static import build

        print(build(options.static))
    elif options.benchmark:
        benchmark(options.moves)
    else:
        serve(options.port, options.browser)
    return 0


def serve(port: int, browser: bool) -> None:
    """Run Voila on a notebook of one cell until it is interrupted."""
    from jupyter_server import DEFAULT_STATIC_FILES_PATH
    from voila.app import Voila

    with tempfile.TemporaryDirectory() as folder:
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        page = Path(folder, "explorer.ipynb")
        nbformat.write(new_notebook(cells=[new_code_cell(CODE)], metadata={"kernelspec": kernel}), page)
        template = Path(folder, "voila/templates/explorer")
        template.mkdir(parents=True)
        (template / "index.html.j2").write_text(TEMPLATE)
        (template / "conf.json").write_text('{"base_template": "lab"}')
        # Voila finds templates there, and this Python's own kernel before anybody else's.
        os.environ |= {"JUPYTER_PATH": folder, "JUPYTER_PREFER_ENV_PATH": "1"}
        options = [str(page), f"--port={port}", "--Voila.ip=127.0.0.1", "--template=explorer", *KERNELS]
        options += [] if browser else ["--no-browser"]
        Voila.launch_instance(options, tornado_settings=SERVER | {"static_path": DEFAULT_STATIC_FILES_PATH})


def benchmark(moves: int) -> None:
    """Move the slider over bytes of a page without a browser, and print how long the pictures took."""
    import numpy as np

    from slimlib.explorer.page import SIZES, Page

    page, times = Page(), []
    others = [size for size in SIZES if size != page.controls["size"].value]
    for size in itertools.islice(itertools.cycle(others), moves):
        page.controls["size"].value = size
        page.wait()
        times.append([1000 * page.answered["before"], 1000 * page.answered["after"]])
    (first, finished), (late, last) = np.percentile(times, [50, 95], axis=0)
    print(f"{len(times)} moves of the slider")
    print(f"first picture and bytes: median {first:.0f} ms, 95th percentile {late:.0f} ms")
    print(f"finished picture: median {finished:.0f} ms, 95th percentile {last:.0f} ms")
