"""logitcache: run a teacher once, store its top-k log-probabilities for every token, and train students from disk.

The public names; each is imported when it is first used.
"""

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitcache.accuracy.budgets import AccuracyResult, measure
    from logitcache.accuracy.options import AccuracyOptions
    from logitcache.cache.compact import compact
    from logitcache.cache.reader import Cache
    from logitcache.cache.verify import verify_cache
    from logitcache.capture.generate import GenerateOptions, generate
    from logitcache.capture.plan import JobEstimate, PlanOptions, plan
    from logitcache.capture.score import ScoreOptions, score
    from logitcache.capture.summary import Summary
    from logitcache.errors import LogitcacheError
    from logitcache.interop.formats import export, import_capture
    from logitcache.interop.hub import pull, push
    from logitcache.sections import Sections
    from logitcache.sparse_rows import SparseRows
    from logitcache.trace import Trace
    from logitcache.transform.merge import merge
    from logitcache.transform.slice import slice_cache
    from logitcache.transform.split import split

__version__ = "0.1.0"
__all__ = [
    "AccuracyOptions",
    "AccuracyResult",
    "Cache",
    "GenerateOptions",
    "JobEstimate",
    "LogitcacheError",
    "PlanOptions",
    "ScoreOptions",
    "Sections",
    "SparseRows",
    "Summary",
    "Trace",
    "compact",
    "export",
    "generate",
    "import_capture",
    "measure",
    "merge",
    "plan",
    "pull",
    "push",
    "score",
    "slice_cache",
    "split",
    "verify_cache",
]

_HOMES = {
    "AccuracyOptions": "accuracy.options",
    "AccuracyResult": "accuracy.budgets",
    "measure": "accuracy.budgets",
    "Cache": "cache.reader",
    "compact": "cache.compact",
    "verify_cache": "cache.verify",
    "GenerateOptions": "capture.generate",
    "generate": "capture.generate",
    "JobEstimate": "capture.plan",
    "PlanOptions": "capture.plan",
    "plan": "capture.plan",
    "ScoreOptions": "capture.score",
    "score": "capture.score",
    "Summary": "capture.summary",
    "LogitcacheError": "errors",
    "export": "interop.formats",
    "import_capture": "interop.formats",
    "pull": "interop.hub",
    "push": "interop.hub",
    "Sections": "sections",
    "SparseRows": "sparse_rows",
    "Trace": "trace",
    "merge": "transform.merge",
    "slice_cache": "transform.slice",
    "split": "transform.split",
}


def lazy_exports(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names are imported when they are first used.

    Lazy: the kernels import this package on machines without numpy, pyarrow or zstandard, and command help needs no torch.

    Args:
        homes: module below the package of each public name.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted({*vars(sys.modules[package]), *homes})


__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
