"""The explorer as a web page of its own, on this machine only; no network is needed.

Examples:
    slim explore                  start the page and open a browser
    slim explore --static OUT     write the static explorer, one HTML file that needs nothing else (minutes)
"""

from __future__ import annotations

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

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65_535:
            raise ValueError(f"argument --port: {self.port} is not a number from 1 to 65535")


def command(options: Options) -> int:
    """Serve the page until it is interrupted, or write the static one."""
    if options.static:
        from slimlib.explorer.static import build

        print(build(options.static))
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
