"""Reads and writes ``--config FILE.yaml``: values of a command's options by name."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from logitcache.errors import InputError
from logitcache.runtime.yaml_files import construct, dialect, place_of, read_yaml, reason_of

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

    node, loader = read_yaml(path)
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
        try:
            value = construct(value_node, loader)
            if value is not None:
                found[name] = known[name].from_file(value)
        except yaml.YAMLError as e:
            raise InputError(f"{path}{place_of(e)}: {key_node.value}: {reason_of(e)}") from None
        except ValueError as e:
            raise InputError(f"{where}: {key_node.value}: {e}") from None
    return found


def dump(settings: dict[str, Any]) -> str:
    """Settings as a YAML file that `read_config` reads back."""
    import yaml

    plain = {k: _plain(v) for k, v in settings.items()}
    return yaml.dump(plain, Dumper=dialect(yaml.SafeDumper), sort_keys=False, allow_unicode=True).rstrip()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | None) else str(value)
