"""logitcache: run a teacher once, store its top-k log-probabilities for every token, and train students from disk."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcache.cache.reader import Cache
    from logitcache.sections import Sections
    from logitcache.sparse_rows import SparseRows
    from logitcache.trace import Trace

__version__ = "0.1.0"
__all__ = ["Cache", "Sections", "SparseRows", "Trace"]

_HOMES = {"Cache": "cache.reader", "Trace": "trace", "Sections": "sections", "SparseRows": "sparse_rows"}


def __getattr__(name: str) -> Any:
    # Lazy: the kernels import this package on machines without numpy, pyarrow or zstandard.
    if name not in _HOMES:
        raise AttributeError(f"module 'logitcache' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"logitcache.{_HOMES[name]}"), name)
