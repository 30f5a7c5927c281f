"""Downloads in parallel."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

_AT_ONCE = 32


def in_parallel(get: Callable[[str], bytes], names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """Each name with what ``get`` returns for it, in the order of arrival. At most 64 wait to be taken.

    Raises: what ``get`` raises; the others are then given up.
    """
    waiting: dict[Future[bytes], str] = {}
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="download")
    try:
        for name in names:
            waiting[pool.submit(get, name)] = name
            if len(waiting) >= 2 * _AT_ONCE:
                yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(waiting: dict[Future[bytes], str]) -> Iterator[tuple[str, bytes]]:
    for each in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(each), each.result()
