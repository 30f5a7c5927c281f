"""Values of rows, made the same whichever format they come from."""

import json
import math
from decimal import Decimal
from typing import Any

from logitcache.errors import PromptsError


def finite(value: Any) -> Any:
    """``value`` with null for each NaN and infinity, at every depth."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float | Decimal) and not math.isfinite(value) else value


def without_nulls(value: Any) -> Any:
    """``value`` without the entries of objects that are null, at every depth: Parquet fills missing entries with null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def records(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of objects. It may be given as JSON text, or as an object of lists, which is how `datasets` stores one.

    Args:
        name: what to call it in messages.
    Raises: PromptsError.
    """
    value = from_json(name, value)
    if isinstance(value, dict):
        value = {key: items for key, items in value.items() if items is not None}
        if not all(isinstance(items, list) for items in value.values()):
            raise PromptsError(f"`{name}` must be a list of objects, found an object")
        if len({len(items) for items in value.values()}) > 1:
            sizes = ", ".join(f"{len(items)} of {key}" for key, items in value.items())
            raise PromptsError(f"`{name}` has {sizes}; give as many of each")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        found = "a list of other things" if isinstance(value, list) else kind_of(value)
        raise PromptsError(f"`{name}` must be a list of objects, found {found}")
    return value


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON."""
    kinds = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def from_json(name: str, value: Any) -> Any:
    """``value``, or what it says if it is JSON text.

    Raises: PromptsError for text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return finite(json.loads(value))
    except ValueError:
        shown = value if len(value) <= 40 else value[:40] + "..."
        raise PromptsError(f"`{name}` is text that is not JSON: {shown!r}") from None
