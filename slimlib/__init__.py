"""slimlib: the codec behind the notebooks. `from slimlib import SlimCodec` is all that most readers need."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimlib.codec import SlimCodec

# CompressAI still uses torch.jit.script, twice at import; its users can do nothing about that.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

__version__ = "0.1.0"
__all__ = ["SlimCodec", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the codec, and with it torch and its seconds, only when somebody asks for it (PEP 562)."""
    if name == "SlimCodec":
        return import_module("slimlib.codec").SlimCodec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
