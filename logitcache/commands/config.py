"""Reads and writes ``--config FILE.yaml``: values of a command's options by name."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from logitcache.errors import InputError, first_line

_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
CONFIG, PRINT_CONFIG = "config_file", "print_config"  # parameters of every command


class FromFile(Protocol):
    """An option that reads its value from a file."""

    def from_file(self, value: Any) -> Any: ...


def read_config(path: Path, known: Mapping[str, FromFile], command: str) -> dict[str, Any]:
    """The settings of a YAML file, as the values that the command line would have.

    Raises: InputError naming file and line for a file that is not YAML, a key that is not an option of the command (with
        the nearest that is), a repeated key, and a value of the wrong type.
    """
    import yaml

    try:
        loader = _dialect(yaml.SafeLoader)(path.read_text("utf-8-sig"))
        node = loader.get_single_node()
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; give --config a YAML file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{path}{_place(e)}: not valid YAML ({_reason(e)})") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path}:1: expected options and their values, such as top_k: 64")
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{where}: expected the name of an option")
        name = str(key_node.value).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"{where}: {key_node.value} is not an option of {command}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        if name in found:
            raise InputError(f"{where}: {key_node.value} is given twice")
        _refuse_repeated(value_node, path)
        try:
            value = loader.construct_object(value_node, deep=True)
            if value is not None:
                found[name] = known[name].from_file(value)
        except yaml.YAMLError as e:
            raise InputError(f"{path}{_place(e)}: {key_node.value}: {_reason(e)}") from None
        except ValueError as e:
            raise InputError(f"{where}: {key_node.value}: {e}") from None
    return found


def _refuse_repeated(node: Any, path: Path) -> None:
    """Raises: InputError for a key that a mapping has twice; YAML would keep the last."""
    seen: set[str] = set()
    for key, _ in node.value if node.id == "mapping" else ():
        if str(key.value) in seen:
            raise InputError(f"{path}:{key.start_mark.line + 1}: {key.value} is given twice")
        seen.add(str(key.value))


def dump(settings: dict[str, Any]) -> str:
    """Settings as a YAML file that `read_config` reads back."""
    import yaml

    plain = {k: _plain(v) for k, v in settings.items()}
    return yaml.dump(plain, Dumper=_dialect(yaml.SafeDumper), sort_keys=False, allow_unicode=True).rstrip()


def _dialect(base: Any) -> Any:
    """A loader or dumper for which 1e-4 is a number, as in YAML 1.2 and JSON; to YAML 1.1 it is text."""
    made = type("Dialect", (base,), {})
    made.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789."))
    return made


def _place(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _reason(error: Any) -> str:
    return getattr(error, "problem", None) or first_line(error)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)
