"""Numbers as a person reads them: in the unit that suits their size."""

import re

from logitcache.errors import InputError

Units = tuple[tuple[float, str], ...]
COUNTS: Units = ((1, ""), (1e6, " million"), (1e9, " billion"), (1e12, " trillion"))
BYTES: Units = ((1, " bytes"), (1e3, " kB"), (1e6, " MB"), (1e9, " GB"), (1e12, " TB"), (1e15, " PB"))
HOURS: Units = ((1 / 3600, " s"), (1 / 60, " min"), (1, " hours"), (48, " days"))


def in_units(mean: float, low: float, high: float, units: Units) -> str:
    """A mean and its interval in the unit that suits the mean, such as ``1.92 GB (1.70 to 2.11)``."""
    size, name = next((u for u in reversed(units) if mean >= u[0] * 0.9995), units[0])
    size = 24 if name == " days" else size
    digits = 0 if units is not HOURS and size == 1 else max(0, 3 - len(str(int(mean / size))))
    shown, low_shown, high_shown = (f"{v / size:,.{digits}f}" for v in (mean, low, high))
    return f"{shown}{name}" + (f" ({low_shown} to {high_shown})" if low < high else "")


def in_bytes(count: float) -> str:
    return in_units(count, count, count, BYTES)


def parse_bytes(text: str, name: str) -> int:
    """A size such as 20GB, 500 MB or 1.5TB, of powers of 1000; a number alone is bytes.

    Args:
        name: of the option, for the message.
    Raises: InputError.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtTpP]?)[bB]?", text.strip())
    if not found or not float(found[1]):
        raise InputError(f"`{name}` {text!r}: write a size above 0, such as 20GB")
    return int(float(found[1]) * 1000 ** " KMGTP".index(found[2].upper() or " "))
