"""A store from a URL."""

from logitcache.storage.location import Url
from logitcache.storage.store import Store


def connect(url: Url) -> Store:
    """The store behind ``url``. No request is made before its first method is called, except for hf://, which is pinned to
    the commit that its revision is now.

    Raises: InputError if the extra `remote` is missing, or the URL names nothing that can be connected to.
    """
    if url.scheme == "hf":
        from logitcache.storage.hub import HubStore

        return HubStore(url)
    from logitcache.storage.objects import ObjectStore

    return ObjectStore(url)
