"""PNG files of plots, with a mark that tells them from the user's own, and text that a plot shows as it is."""

import io
from pathlib import Path
from typing import Any

from logitcache.runtime.regular_files import open_regular
from logitcache.runtime.text import visible

_MARK = {"Software": "logitcache"}


def png(figure: Any, dpi: int) -> bytes:
    """A matplotlib figure as a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=dpi, metadata=_MARK)
    return image.getvalue()


def is_ours(path: Path) -> bool:
    """Whether ``png`` made the file at ``path``."""
    try:
        with open_regular(path) as file:
            return b"tEXtSoftware\0logitcache" in file.read(200)
    except OSError:
        return False


def label(text: str) -> str:
    """``text`` for a label: without mathematics between dollars, and not hidden from a legend by an underscore."""
    text = visible(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
