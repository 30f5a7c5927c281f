"""vLLM's sampling parameters from settings that were given as JSON or text."""

import typing
from typing import Any

from logitcache.errors import InputError, did_you_mean
from logitcache.runtime.secrets import hide


def refuse_unknown(option: str, given: dict[str, Any], known: set[str]) -> None:
    """Raises: InputError for a setting that vLLM does not have, with the nearest that it has."""
    for name in given:
        if name not in known:
            raise InputError(f"`{option}` {name}: vLLM has no such setting; {did_you_mean(name, known)}")


def typed(option: str, given: dict[str, Any], kind: type) -> dict[str, Any]:
    """The settings as the types that the annotations of a class of vLLM name: ``{"5": 1}`` as ``{5: 1.0}``.

    Raises: InputError for an unknown name, and for a value of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = typing.get_type_hints(kind, include_extras=True)
    refuse_unknown(option, given, {name for name in hints if not name.startswith("_")})
    found = {}
    for name, value in given.items():
        try:
            found[name] = TypeAdapter(hints[name]).validate_python(_without_bools(value, hints[name]))
        except (ValidationError, ValueError, TypeError) as e:
            why = e.errors()[0]["msg"] if isinstance(e, ValidationError) else str(e)
            expected = (
                str(typing.get_type_hints(kind)[name])
                .replace("typing.", "")
                .removeprefix("<class '")
                .removesuffix("'>")
            )
            raise InputError(hide(f"`{option}` {name}={value!r}: expected {expected} ({why})")) from None
    return found


def _without_bools(value: Any, hint: Any) -> Any:
    """The value. Raises: TypeError for true or false where a number is expected, which Python takes for one."""
    if isinstance(value, bool) and bool not in (hint, *typing.get_args(hint)):
        raise TypeError("true and false are no numbers")
    return value
