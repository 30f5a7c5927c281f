"""Confines a process for good: afterwards it computes, uses the descriptors that it has, and nothing else.

No files, network, processes or signals to other processes: libseccomp refuses every system call that is not listed here.
"""

import signal
import subprocess
import sys
from functools import cache
from typing import Any

from logitcache.errors import first_line

MEMORY = 4 << 30  # bytes of address space
_PDEATHSIG = 1  # of prctl: the signal that a parent's end sends

# What Python needs to compute and to use open descriptors. Nothing here takes a path or names another process.
_ALLOWED = (
    *("read", "write", "close", "fstat", "lseek"),
    *("brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "futex"),
    *("clock_gettime", "clock_getres", "gettimeofday", "time", "getrusage", "getrandom"),
    *("getpid", "gettid", "sched_getaffinity", "sched_yield", "sysinfo", "uname"),
    *("rt_sigreturn", "restart_syscall", "exit", "exit_group"),
)

# The parts of sympy that import further modules when they first need them.
SYMPY = ("core", "functions", "integrals", "sets", "concrete", "assumptions", "combinatorics", "series", "solvers",
         "simplify", "polys", "matrices", "calculus", "logic", "ntheory", "physics.units")  # fmt: skip


@cache
def rules() -> Any:
    """What `confine` loads: a filter of system calls.

    Raises: ImportError or RuntimeError where the system has no libseccomp.
    """
    import errno

    import pyseccomp

    found = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    found.set_attr(pyseccomp.Attr.CTL_TSYNC, True)
    for name in _ALLOWED:
        if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) >= 0:  # not every architecture has "time"
            found.add_rule(pyseccomp.ALLOW, name)
    return found


def confine(parent: int) -> None:
    """Confines this process and all its threads; it ends when its parent, of this process id, ends.

    Raises: OSError, ImportError or RuntimeError where the system cannot do that.
    """
    import ctypes
    import os
    import resource

    wanted = rules()
    if ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL) or os.getppid() != parent:
        raise OSError("the parent has ended")
    limits = {
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    wanted.load()


def import_all(package: str, *parts: str) -> None:
    """Imports the modules of parts of a package, which load some only when they need them: a confined process cannot."""
    import pkgutil
    import warnings
    from importlib import import_module

    root = import_module(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated modules
        for part in parts:
            folders = [f"{path}/{part}" for path in root.__path__]
            for module in pkgutil.walk_packages(folders, f"{package}.{part}."):
                if not {"tests", "benchmarks", "trace"} & set(module.name.split(".")):  # trace imports quantum physics
                    import_module(module.name)


@cache
def unconfinable() -> str | None:
    """Why this system cannot confine a process; None if it can. Tried once, in a process of its own."""
    tried = subprocess.run(
        python("from logitcache.grading import confinement; confinement.try_out()"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(),
    )
    return None if tried.stdout == "confined\n" else tried.stdout.strip() or f"the trial ended with {tried.returncode}"


def try_out() -> None:
    """Confines this process and prints whether that works."""
    import os

    try:
        confine(os.getppid())
        os.open("/", os.O_RDONLY)
        print("the system reports success and does not confine", flush=True)
    except PermissionError:
        print("confined", flush=True)
    except Exception as e:
        print(first_line(e), flush=True)


def python(code: str) -> list[str]:
    """A command that runs ``code`` with the modules of this process and nothing else of its surroundings."""
    import os
    from pathlib import Path

    import logitcache

    ours = str(Path(logitcache.__file__).parents[1])
    paths = list(dict.fromkeys([ours, *(os.path.abspath(path) for path in sys.path if path)]))
    return [sys.executable, "-I", "-B", "-c", f"import sys; sys.path[:] = {paths!r}; {code}"]


def environment() -> dict[str, str]:
    """The environment of such a process: no tokens or other secrets, one thread."""
    import os

    given = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    return given | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
