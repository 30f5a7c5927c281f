"""Facts about a cache as a person reads them."""

from typing import Any


def describe(facts: dict[str, Any]) -> str:
    """The text of ``logitcache info``, from ``Cache.info()``."""
    identity = facts["identity"]
    sampling = ", ".join(f"{key} {value}" for key, value in identity["sampling"].items())
    lines = {
        "teacher": f"{identity['teacher']} @ {identity['teacher_revision'][:12]}, {identity['dtype']}, {identity['engine']}",
        "sampling": sampling,
        "support": f"top-{identity['top_k']} of {identity['vocab_size']:,}"
        + (f", trimmed to mass {identity['top_p']}" if identity["top_p"] is not None else "")
        + f"; {facts['mean_support']:.1f} ids a row, {facts['mean_tail_mass']:.2%} of the mass in the tail",
        "markers": " ".join(identity["reasoning_markers"] or ["none"]),
        "traces": f"{facts['traces']:,} of {facts['prompts']:,} prompts in {facts['shards']:,} shards",
        "tokens": f"{facts['tokens']:,}: "
        + ", ".join(f"{n:,} {name}" for name, n in facts["section_tokens"].items() if n),
        "rows": f"{facts['taught_rows']:,} (tokens with the teacher's distribution)",
        "size": f"{facts['bytes']:,} bytes; {facts['bytes_per_token']:.1f} a row, {facts['block_bytes_per_token']:.1f} of them top-k",
    }
    return "\n".join([f"{facts['path']}", *(f"  {name:<9}{text}" for name, text in lines.items())])
