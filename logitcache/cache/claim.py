"""What a running worker makes, before the cache has a manifest: so that workers of other settings are refused at once."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from logitcache.cache import manifest
from logitcache.cache.workers import Worker
from logitcache.errors import ShardCorruptError
from logitcache.identity import Identity
from logitcache.runtime.files import LOCK, publish_json, read_json
from logitcache.runtime.locks import exclusive, holder


@contextmanager
def claim(cache: Path, worker: Worker, identity: Identity) -> Iterator[Identity | None]:
    """Says during the block that the worker, which holds its lock, makes traces of this identity. Yields the identity in the
    manifest; None if there is no manifest yet.

    Raises: IdentityError naming the first field that differs from what another running worker makes, or from the manifest.
    """
    own = cache / f"{LOCK}-{worker.index}-of-{worker.count}.json"
    with exclusive(cache / LOCK, str(cache), wait=True):  # several workers may start at once
        found = manifest.match(cache, identity)
        for path in cache.glob(f"{LOCK}-*-of-*.json"):
            if path != own and holder(path.with_suffix("")):
                with suppress(ShardCorruptError, FileNotFoundError):  # a worker that ends now
                    manifest.refuse_difference(cache, Identity(**read_json(path)), identity)
        publish_json(own, asdict(identity))
    try:
        yield found
    finally:
        own.unlink(missing_ok=True)
