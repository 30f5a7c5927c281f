"""Runs side by side: what they were set to, how far they came, what it cost, and the curves.

Reads what a run writes (`run.json`, and its checkpoints while it lasts) and needs neither torch nor the student.
"""

import contextlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.errors import StudentError
from logitcache.kernels.divergences import DIVERGENCES
from logitcache.runtime.files import publish
from logitcache.student.training.checkpoints import RUN_FILE, SPENT_FILE, find_run, newest_checkpoint, run_status

CURVES_FILE = "curves.png"
SMOOTHED = 50  # a running mean over a 50th of a loss curve's points is drawn over them
AXES = {"step": "optimiser steps", "tokens_taught": "tokens taught", "seconds": "seconds of training"}

# Of run.json, what a run did; all else is what it was told.
_DONE = {"status", "signal", "again", "eval_before", "eval_after", "history", "steps", "seconds", "cost"}
_DONE |= {"tokens_fed", "tokens_taught", "tokens_per_second"}
_HELD_OUT = ("cache", "traces", "held_out")  # settings that choose the traces a run is evaluated on
_OBJECTIVE = ("view", "sections", "top_k", "divergence", "tail", "beta", "alpha", "temperature", "ce_weight")
_OBJECTIVE += ("section_weights",)  # those that say what its training loss is


def compare(runs: list[Path], out: Path | None = None) -> dict[str, Any]:
    """Runs side by side, finished or not: one that lasts is shown as its newest checkpoint has it.

    Args:
        out: directory for curves.png; None: no picture. Needs matplotlib.
    Returns: {"runs": [what `_read` gives]; "differs": {setting: [one value a run]}, nested settings by dotted names;
        "held_out_differs", "loss_differs": those of them that make held-out KL, and training losses, incomparable;
        "files": [pictures]}.
    Raises: StudentError for a directory that is no run, and where matplotlib is missing; WriteError.
    """
    if not runs:
        raise StudentError("no run to compare: give directories that `logitcache train --out` made")
    if out is not None and importlib.util.find_spec("matplotlib") is None:
        raise StudentError("curves need matplotlib: pip install matplotlib, or leave `out` away for the table")
    found = [_read(path) for path in runs]
    for run, name in zip(found, _names(runs), strict=True):
        run["name"] = name
    settings = [_flat(run.pop("settings")) for run in found]
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each.get(key) for each in settings] for key in keys}
    differs = {key: v for key, v in values.items() if any(value != v[0] for value in v)}
    held_out, loss = ([k for k in differs if k.startswith(names)] for names in (_HELD_OUT, _OBJECTIVE))
    files = []
    if out is not None:
        nats = all(DIVERGENCES[each["divergence"]].in_nats for each in settings if "divergence" in each)
        unit = "objectives differ" if loss else "nats a row" if nats else "a row"
        publish(out / CURVES_FILE, _curves_png(found, unit))
        files.append(str(out / CURVES_FILE))
    return {"runs": found, "differs": differs, "held_out_differs": held_out, "loss_differs": loss, "files": files}


def _read(path: Path) -> dict[str, Any]:
    """A run's {"path", "status": finished, running or stopped; "settings", "steps", "tokens_fed", "tokens_taught",
    "seconds", "tokens_per_second", "cost", "eval_before", "eval_after": the last evaluation, "eval_step": its step;
    "training": {"step", "loss", ...}, "held_out": {"step", "kl", ...}: curves, lists of one length}.

    What is not known is None. Raises: StudentError for a directory that is no run.
    """
    home, run = find_run(path)
    if home != path:
        hint = f"; did you mean {home}?" if home else f"; it has no {RUN_FILE}" if path.is_dir() else " on this disk"
        raise StudentError(f"{path} is no run{hint}; give directories that `logitcache train --out` made")
    state, done = {"log_history": run.get("history") or [], "global_step": run.get("steps")}, dict(run)
    run["status"] = run_status(path, run)
    if run["status"] != "finished":
        checkpoint, newest = newest_checkpoint(path)
        if checkpoint is not None:
            state = newest
            with contextlib.suppress(OSError, ValueError):
                done = run | json.loads((checkpoint / SPENT_FILE).read_text())
    steps, seconds, fed = state.get("global_step"), done.get("seconds"), done.get("tokens_fed")
    training, held_out = _curves(state["log_history"], done, steps)
    after, last = run.get("eval_after"), len(held_out["step"]) - 1
    if after is None and last > 0:
        after = {"kl": held_out["kl"][last], "top1": held_out["top1"][last]}
    return {
        "path": str(path),
        "status": run["status"],
        "settings": {k: v for k, v in run.items() if k not in _DONE},
        "steps": steps,
        "tokens_fed": fed,
        "tokens_taught": done.get("tokens_taught"),
        "seconds": seconds,
        "tokens_per_second": fed / seconds if fed and seconds else None,
        "cost": done.get("cost"),
        "eval_before": run.get("eval_before"),
        "eval_after": after,
        "eval_step": steps if run.get("eval_after") else held_out["step"][last] if last > 0 else None,
        "training": training,
        "held_out": held_out,
    }


def _curves(history: list[dict[str, Any]], run: dict[str, Any], steps: int | None) -> tuple[dict, dict]:
    """Training loss and held-out KL with their steps, tokens taught and seconds.

    The log says after how many tokens and seconds an entry stands; what it leaves out lies on the line between the
    entries around it, and at worst between nothing and the run's totals: steps hold about as many tokens each.
    """
    losses = {e["step"]: (e["loss"],) for e in history if "loss" in e}
    held = {e["step"]: (e["eval_kl"], e.get("eval_top1")) for e in history if e.get("eval_kl") is not None}
    for step, found in ((0, run.get("eval_before")), (steps, run.get("eval_after"))):
        if found and step is not None:
            held.setdefault(step, (found["kl"], found["top1"]))
    training, held_out = _columns(losses, ("loss",)), _columns(held, ("kl", "top1"))
    for name in list(AXES)[1:]:
        known = {0: 0} | {e["step"]: e[name] for e in history if e.get(name) is not None}
        known |= {steps: run[name]} if steps and run.get(name) is not None else {}
        at, counted = zip(*sorted(known.items()), strict=True)
        for curve in (training, held_out):
            curve[name] = np.interp(curve["step"], at, counted).tolist() if len(known) > 1 else None
    return training, held_out


def _columns(points: dict[int, tuple], names: tuple[str, ...]) -> dict[str, Any]:
    ordered = sorted(points)
    return {"step": ordered} | {name: [points[step][i] for step in ordered] for i, name in enumerate(names)}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _names(paths: list[Path]) -> list[str]:
    """As few of their last parts as tell the paths apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = [str(Path(*p[-count:])) for p in parts]
        if len(set(names)) == len({*parts}):
            return names
    return [str(path) for path in paths]


def _curves_png(runs: list[dict[str, Any]], loss_unit: str) -> bytes:
    """Training loss over held-out KL, by steps, tokens taught and seconds; a run without counts is in the first only."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    plots: Any = figure.subplots(2, len(AXES), sharey="row", sharex="col")
    for row, curve, value, label in (
        (plots[0], "training", "loss", f"training loss ({loss_unit})"),
        (plots[1], "held_out", "kl", "held-out KL (nats a row)"),
    ):
        row[0].set_ylabel(label)
        for plot, axis in zip(row, AXES, strict=True):
            for i, run in enumerate(runs):
                style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
                if curve == "held_out":
                    style |= {"marker": "o", "markersize": 4}
                    style |= {"label": f"{run['name']} ({run['status']})"} if axis == "step" else {}
                if run[curve][axis] is not None:
                    _line(plot, np.array(run[curve][axis]), np.array(run[curve][value]), style)
            plot.grid(alpha=0.3)
        seen = [v for run in runs for v in run[curve][value]]
        if seen and min(seen) > 0:  # a start at 10 nats would flatten what follows
            row[0].set_yscale("log")
            narrow = max(seen) < 30 * min(seen)
            row[0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if narrow else (1, 2, 5)))
            row[0].yaxis.set_major_formatter("{x:g}")
            row[0].yaxis.set_minor_formatter(NullFormatter())
    for plot, (axis, unit) in zip(plots[1], AXES.items(), strict=True):
        plot.set_xlabel(unit)
        plot.set_xlim(left=0)
        if axis != "seconds":
            plot.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside upper left", ncols=min(len(runs), 3))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=160)
    return image.getvalue()


def _line(plot: Any, x: np.ndarray, y: np.ndarray, style: dict[str, Any]) -> None:
    """A curve; a loss of many points is drawn faintly, with its running mean over it."""
    if "marker" not in style and (window := len(y) // SMOOTHED) > 1:
        plot.plot(x, y, alpha=0.25, linewidth=0.8, **style)
        mean = np.full(window, 1 / window)
        x, y = np.convolve(x, mean, mode="valid"), np.convolve(y, mean, mode="valid")
    plot.plot(x, y, linewidth=1.6, **style)
