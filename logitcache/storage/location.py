"""A cache's location: a directory, or a URL of an object store."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from logitcache.errors import InputError, did_you_mean

SCHEMES = ("s3", "gs", "az", "memory", "hf")  # file:// is a directory


@dataclass(frozen=True, slots=True)
class Url:
    """A location in an object store, such as s3://bucket/cache; without a slash at its end."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0]

    @property
    def name(self) -> str:
        """The last part, as ``Path.name``."""
        return self.text.rpartition("/")[2]


Location = Path | Url


def is_url(text: object) -> bool:
    return isinstance(text, Url) or (isinstance(text, str) and "://" in text)


def locate(given: "str | Path | Url") -> Location:
    """The location that a user wrote: a `Url` for s3://, gs://, az://, memory:// and hf://, else a path.

    Raises: InputError for an unknown scheme and a URL without a bucket or a name.
    """
    if isinstance(given, Url) or not is_url(given):
        return given if isinstance(given, Path | Url) else Path(given)
    text = str(given)
    scheme, _, rest = text.partition("://")
    if scheme == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise InputError(f"{text}: write file:///PATH, with three slashes")
        return Path(unquote(parts.path))
    if scheme not in SCHEMES:
        raise InputError(f"{text}: unknown scheme {scheme}://; {did_you_mean(scheme, (*SCHEMES, 'file'))}")
    if not rest.strip("/"):
        raise InputError(f"{text}: names no bucket; write {scheme}://BUCKET/NAME")
    if "@" in rest.partition("/")[0]:
        raise InputError(f"{scheme}://{rest.rpartition('@')[2]}: give credentials in the environment, not in the URL")
    return Url(f"{scheme}://{rest.rstrip('/')}")


def identified(location: Location) -> Location:
    """What is equal for two ways to write one location."""
    return location.resolve() if isinstance(location, Path) else location


def is_inside(inner: Location, outer: Location) -> bool:
    """Whether ``inner`` is ``outer`` or lies in it."""
    if isinstance(inner, Path) and isinstance(outer, Path):
        return inner.resolve().is_relative_to(outer.resolve())
    return inner == outer or str(inner).startswith(f"{outer}/")
