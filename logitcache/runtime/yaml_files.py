"""Reads YAML files within bounds: of size, of depth, and of what aliases make of them."""

import re
from pathlib import Path
from typing import Any

from logitcache.errors import InputError, first_line

_LARGEST = 1 << 18  # bytes; PyYAML parses them in about 2 s
_MOST = 20_000  # nodes, each alias counted as all that it stands for
_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")


def read_yaml(path: Path) -> tuple[Any, Any]:
    """The root node of a YAML file, None for an empty one, and the loader that constructs values of it.

    Raises: InputError naming file and line for what is not YAML or exceeds the bounds.
    """
    import yaml

    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise InputError(f"{path}: over {_LARGEST >> 10} KiB; settings take less")
        loader = dialect(yaml.SafeLoader)(data.decode("utf-8-sig"))
        node = loader.get_single_node()
        if node is not None:
            _size(node, path, {})
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; give a YAML file") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{path}{place_of(e)}: not valid YAML ({reason_of(e)})") from None
    return node, loader


def _size(node: Any, path: Path, known: dict[int, int | None]) -> int:
    """Nodes of a tree in which aliases are written out.

    Raises: InputError for too many, for one that contains itself, and for a mapping that has a key twice: YAML would keep the
        last.
    """
    if id(node) not in known:
        known[id(node)], size = None, 1  # None: this node is being counted
        children = node.value if node.id in ("sequence", "mapping") else []
        seen: set[tuple[str, str]] = set()
        for child in children:
            key, *value = child if node.id == "mapping" else (child,)
            if value and key.id == "scalar":
                if (key.tag, key.value) in seen and key.tag != "tag:yaml.org,2002:merge":
                    raise InputError(f"{path}:{key.start_mark.line + 1}: {key.value} is given twice")
                seen.add((key.tag, key.value))
            size += sum(_size(part, path, known) for part in (key, *value))
        known[id(node)] = size
    size = known[id(node)]
    if size is None or size > _MOST:
        what = "an alias in itself" if size is None else f"over {_MOST:,} values, with aliases written out"
        raise InputError(f"{path}:{node.start_mark.line + 1}: {what}; write the values without aliases")
    return size


def construct(node: Any, loader: Any) -> Any:
    """The value of a node: text, numbers, booleans, dates, lists, mappings.

    Raises: ValueError; its text has no line, as a ``yaml.YAMLError`` has.
    """
    try:
        return loader.construct_object(node, deep=True)
    except (RecursionError, TypeError, OverflowError) as e:
        raise ValueError(first_line(e)) from None


def dialect(base: Any) -> Any:
    """A loader or dumper for which 1e-4 is a number, as in YAML 1.2 and JSON; to YAML 1.1 it is text."""
    made = type("Dialect", (base,), {})
    made.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))
    return made


def place_of(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def reason_of(error: Any) -> str:
    return getattr(error, "problem", None) or first_line(error)
