"""Tables and numbers for the output of commands."""


def columns(table: list[list[str]]) -> list[str]:
    """Lines of a table; the first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
