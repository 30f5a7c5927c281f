"""Facts about a cache as a person reads them, and the tables of all commands."""

from typing import Any


def describe(facts: dict[str, Any]) -> str:
    """The text of ``logitcache info``, from ``Cache.info()``."""
    identity = facts["identity"]
    sampling = ", ".join(f"{key} {value}" for key, value in identity["sampling"].items()) or "none by this teacher"
    lines = {
        "teacher": f"{identity['teacher']} @ {identity['teacher_revision'][:12]}, {identity['dtype']}, "
        f"{identity['engine']}",
        "sampling": sampling,
        "support": f"top-{identity['top_k']} of {identity['vocab_size']:,}"
        + (f" and {pins} pinned" if (pins := len(identity["pin_tokens"])) else "")
        + (f", trimmed to mass {identity['top_p']}" if identity["top_p"] is not None else "")
        + (", bit for bit" if identity["exact"] else "")
        + f"; {facts['mean_support']:.1f} ids a row, {facts['mean_tail_mass']:.2%} of the mass in the tail",
        "markers": " ".join(identity["reasoning_markers"] or ["none"]),
        "traces": f"{facts['traces']:,} of {facts['prompts']:,} prompts in {facts['shards']:,} shards",
        "tokens": f"{facts['tokens']:,}: "
        + ", ".join(f"{n:,} {name}" for name, n in facts["section_tokens"].items() if n),
        "rows": f"{facts['taught_rows']:,} (tokens with the teacher's distribution)",
        "size": f"{facts['bytes']:,} bytes; {facts['bytes_per_token']:.1f} a row, "
        f"{facts['block_bytes_per_token']:.1f} of them top-k",
    }
    if judged := sum(facts["verdicts"].values()):
        lines["verdicts"] = f"{facts['verdicts']['correct']:,} of {judged:,} judged are correct"
    if identity["derived"]:
        lines["derived"] = ", then ".join(identity["derived"])
    return "\n".join([f"{facts['path']}", *(f"  {name:<9}{text}" for name, text in lines.items())])


def columns(table: list[list[str]]) -> list[str]:
    """Lines of a table, its first column on the left and the others on the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in table
    ]


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
