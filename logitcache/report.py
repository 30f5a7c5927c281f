"""Facts about a cache and about a run as a person reads them."""

from pathlib import Path
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


def describe_run(run: dict[str, Any], out: Path) -> str:
    """The closing lines of ``logitcache train``, from what its ``run.json`` holds."""
    if run["status"] == "stopped":
        return f"stopped by {run['signal']} at step {run['steps']}: run the same command again to go on"
    before, after = run["eval_before"], run["eval_after"]
    return (
        ("nothing to do, this run is finished\n" if run.get("again") else "")
        + f"{out}: held-out KL {before['kl']:.4f} -> {after['kl']:.4f} nats a row, "
        f"top-1 agreement {before['top1']:.1%} -> {after['top1']:.1%}; {run['steps']} steps, "
        f"{run['tokens_fed']:,} tokens in {run['seconds']:.1f} s, {run['tokens_per_second']:,.0f} tokens/s"
    )
