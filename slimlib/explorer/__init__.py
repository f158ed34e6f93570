"""The bitrate explorer: slide the rate, see what the machine still sees.

    python -m slimlib.explorer    a web page of its own, on this machine, offline
    notebooks/08                  the same page in JupyterLab, and how it works

`engine` holds state and pictures in plain Python, `page` the widgets around it, `__main__` the web page's server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimlib.explorer.engine import Explorer, Newest, Settings, open_photo
    from slimlib.explorer.page import Page

__all__ = ["Explorer", "Newest", "Page", "Settings", "open_photo"]


def __getattr__(name: str) -> Any:
    """Import on demand: the web page's server needs no torch, only its kernels do (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'page' if name == 'Page' else 'engine'}"), name)
