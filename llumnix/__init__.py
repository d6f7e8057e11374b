"""Llumnix serves one LLM on many instances and live-migrates running requests between them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llumnix.runtime.connect import Cluster, Generated, connect

__version__ = "0.1.0"
__all__ = ["Cluster", "Generated", "__version__", "connect"]


def __getattr__(name: str) -> Any:
    """The Ray API, imported when first used: the command line and the engine must start without Ray."""
    if name in ("Cluster", "Generated", "connect"):
        from llumnix.runtime import connect as module

        return getattr(module, name)
    raise AttributeError(f"module 'llumnix' has no attribute {name!r}")
