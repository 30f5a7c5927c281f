"""Compares runs: their settings, results, costs and curves.

Reads run.json and, for an unfinished run, its checkpoints. Needs neither torch nor the student's weights.
"""

import contextlib
import importlib.util
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from logitcache.errors import StudentError, first_line
from logitcache.runtime.files import publish
from logitcache.runtime.options import Option
from logitcache.runtime.pictures import is_ours, label, png
from logitcache.student.model.measures import Measures
from logitcache.student.training.checkpoint_files import SPENT_FILE
from logitcache.student.training.checkpoints import RUN_FILE, find_run, newest_checkpoint, run_status
from logitcache.student.training.run_record import OLDER

CURVES_FILE = "curves.png"
SMOOTHED = 50  # the running mean drawn over a loss curve spans a 50th of its points
AXES = {"step": "optimizer steps", "tokens_taught": "supervised tokens", "seconds": "training seconds"}

# Keys of run.json that say what a run did; all others are its settings.
_RESULTS = {"status", "signal", "again", "eval_before", "eval_after", "history", "steps", "seconds", "cost"}
_RESULTS |= {"tokens_fed", "tokens_taught", "tokens_per_second"}
_HELD_OUT = ("cache", "traces", "held_out")  # settings that choose the held-out traces
# Settings that define the training loss.
_OBJECTIVE = ("view", "sections", "top_k", "divergence", "tail", "beta", "alpha", "temperature", "ce_weight")
_OBJECTIVE += ("section_weights",)


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """Training loss; all lists have the same length. None: run.json has no counts."""

    step: list[int]
    loss: list[float]
    tokens_taught: list[float] | None
    seconds: list[float] | None


@dataclass(frozen=True, kw_only=True)
class HeldOutCurve:
    """Held-out KL (nats per position) and top-1 agreement; all lists have the same length. None: no counts."""

    step: list[int]
    kl: list[float]
    top1: list[float | None]
    tokens_taught: list[float] | None
    seconds: list[float] | None


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run as its run.json has it, or, unfinished, as its newest checkpoint has it. None: not known."""

    path: str
    status: str  # finished, running or stopped
    steps: int | None
    tokens_fed: int | None
    tokens_taught: int | None
    seconds: float | None
    tokens_per_second: float | None
    cost: dict[str, Any] | None
    eval_before: dict[str, Any] | None
    eval_after: dict[str, Any] | None  # the last evaluation
    eval_step: int | None  # its step
    training: LossCurve
    held_out: HeldOutCurve
    name: str  # the shortest end of its path that tells it from the others


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side."""

    runs: list[ComparedRun]
    differs: dict[str, list[Any]]  # setting: its value in each run; nested settings by dotted names
    held_out_differs: list[str]  # settings that make held-out KL not comparable
    loss_differs: list[str]  # settings that make training losses not comparable
    files: list[str]  # plots

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    runs: Annotated[list[Path], Option("Run directories, finished or not.", positional=True)],
    *,
    out: Annotated[Path | None, Option("Directory for curves.png.", default="no plot")] = None,
) -> Comparison:
    """Compares the settings, results and costs of runs. An unfinished run counts as its newest checkpoint has it.

    Args:
        out: directory for curves.png, which needs matplotlib; None: no plot.
    Raises: StudentError for a directory that is not a run, or if matplotlib is missing; WriteError.
    """
    runs, out = [Path(run) for run in runs], out and Path(out)  # a script may give text
    if not runs:
        raise StudentError("no runs to compare: give directories that `logitcache train --out` made")
    if out is not None and importlib.util.find_spec("matplotlib") is None:
        raise StudentError("curves need matplotlib: pip install matplotlib, or omit `out` to get the table alone")
    curves = out and out / CURVES_FILE
    if curves and os.path.lexists(curves) and not is_ours(curves):
        raise StudentError(f"{curves} was not drawn by logitcache; move it away, or give `out` another directory")
    read = [_checked(path, name) for path, name in zip(runs, _names(runs), strict=True)]
    compared, settings = [run for run, _ in read], [_flat(OLDER | found) for _, found in read]
    keys = dict.fromkeys(key for each in settings for key in each)
    values = {key: [each.get(key) for each in settings] for key in keys}
    differs = {key: v for key, v in values.items() if any(value != v[0] for value in v)}
    held_out, loss = ([k for k in differs if k.startswith(names)] for names in (_HELD_OUT, _OBJECTIVE))
    files = []
    if curves:
        nats = all(each.get("divergence") != "tv" for each in settings)
        unit = "objectives differ" if loss else "nats per position" if nats else "per position"
        publish(curves, _curves_png(compared, unit))
        files.append(str(curves))
    return Comparison(runs=compared, differs=differs, held_out_differs=held_out, loss_differs=loss, files=files)


def _checked(path: Path, name: str) -> tuple[ComparedRun, dict[str, Any]]:
    """Returns: as `_read`. Raises: StudentError for a directory that is not a run, or has values that no run has."""
    try:
        run, settings = _read(path, name)
        _check(run)
        return run, settings
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as e:
        raise StudentError(f"{path}: its records are not those of `logitcache train` ({first_line(e)})") from None


def _check(run: ComparedRun) -> None:
    """Raises: TypeError for text or a list where a run has a number or a mapping."""
    numbers = [run.steps, run.tokens_fed, run.tokens_taught, run.seconds, run.eval_step]
    numbers += [*run.training.loss, *run.held_out.kl, *run.held_out.top1]
    for part in (run.cost or {}, run.eval_before or {}, run.eval_after or {}):
        numbers += [part.get(measure) for measure in (*Measures.__slots__, "flops", "peak_memory") if measure != "tail"]
        numbers += (part.get("seconds") or {}).values()
        numbers += [section.get("kl") for section in part.get("sections", {}).values()]
    for number in numbers:
        if not isinstance(number, int | float | None) or isinstance(number, bool):
            raise TypeError(f"{number!r} is not a number")


def _read(path: Path, name: str) -> tuple[ComparedRun, dict[str, Any]]:
    """Returns: the run and its settings. Raises: StudentError for a directory that is not a run."""
    home, run = find_run(path)
    if home != path:
        hint = (
            f"; did you mean {home}?" if home else f"; it has no {RUN_FILE}" if path.is_dir() else "; no such directory"
        )
        raise StudentError(f"{path} is not a run{hint}; give directories that `logitcache train --out` made")
    history, steps, counts = run.get("history") or [], run.get("steps"), dict(run)
    status = run_status(path, run)
    if status != "finished":
        checkpoint, state = newest_checkpoint(path)
        if checkpoint is not None:
            history, steps = state["log_history"], state.get("global_step")
            with contextlib.suppress(OSError, ValueError):
                counts = run | json.loads((checkpoint / SPENT_FILE).read_text())
    seconds, tokens = counts.get("seconds"), counts.get("tokens_fed")
    training, held_out = _curves(history, counts, steps)
    after, last = run.get("eval_after"), len(held_out.step) - 1
    eval_step = steps if after else held_out.step[last] if last > 0 else None
    if after is None and last > 0:
        after = {"kl": held_out.kl[last], "top1": held_out.top1[last]}
    compared = ComparedRun(
        path=str(path),
        status=status,
        steps=steps,
        tokens_fed=tokens,
        tokens_taught=counts.get("tokens_taught"),
        seconds=seconds,
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        cost=counts.get("cost"),
        eval_before=run.get("eval_before"),
        eval_after=after,
        eval_step=eval_step,
        training=training,
        held_out=held_out,
        name=name,
    )
    return compared, {key: value for key, value in run.items() if key not in _RESULTS}


def _curves(history: list[dict[str, Any]], counts: dict[str, Any], steps: int | None) -> tuple[LossCurve, HeldOutCurve]:
    """Training loss and held-out KL with their steps, supervised tokens and seconds.

    Log entries without counts get interpolated ones, if need be between 0 and the run's totals: steps hold about the
    same number of tokens.
    """
    losses = {e["step"]: e["loss"] for e in history if "loss" in e}
    held = {e["step"]: (e["eval_kl"], e.get("eval_top1")) for e in history if e.get("eval_kl") is not None}
    for step, found in ((0, counts.get("eval_before")), (steps, counts.get("eval_after"))):
        if found and step is not None:
            held.setdefault(step, (found["kl"], found["top1"]))

    def interpolated(name: str, at: list[int]) -> list[float] | None:
        known = {0: 0} | {e["step"]: e[name] for e in history if e.get(name) is not None}
        known |= {steps: counts[name]} if steps and counts.get(name) is not None else {}
        known_steps, values = zip(*sorted(known.items()), strict=True)
        return np.interp(at, known_steps, values).tolist() if len(known) > 1 else None

    trained, evaluated = sorted(losses), sorted(held)
    training = LossCurve(
        step=trained,
        loss=[losses[step] for step in trained],
        tokens_taught=interpolated("tokens_taught", trained),
        seconds=interpolated("seconds", trained),
    )
    held_out = HeldOutCurve(
        step=evaluated,
        kl=[held[step][0] for step in evaluated],
        top1=[held[step][1] for step in evaluated],
        tokens_taught=interpolated("tokens_taught", evaluated),
        seconds=interpolated("seconds", evaluated),
    )
    return training, held_out


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _names(paths: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = [str(Path(*p[-count:])) for p in parts]
        if len(set(names)) == len({*parts}):
            return names
    return [str(path) for path in paths]


def _curves_png(runs: list[ComparedRun], loss_unit: str) -> bytes:
    """Training loss above held-out KL, by steps, supervised tokens and seconds; a run without counts is drawn by steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    plots: Any = figure.subplots(2, len(AXES), sharey="row", sharex="col")
    for row, name, drawn in (
        (plots[0], f"training loss ({loss_unit})", [(run.training, run.training.loss) for run in runs]),
        (plots[1], "held-out KL (nats per position)", [(run.held_out, run.held_out.kl) for run in runs]),
    ):
        row[0].set_ylabel(name)
        for plot, axis in zip(row, AXES, strict=True):
            for i, (run, (curve, y)) in enumerate(zip(runs, drawn, strict=True)):
                style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
                if curve is run.held_out:
                    style |= {"marker": "o", "markersize": 4}
                    style |= {"label": label(f"{run.name} ({run.status})")} if axis == "step" else {}
                if (x := getattr(curve, axis)) is not None:
                    _line(plot, np.array(x), np.array(y), style)
            plot.grid(alpha=0.3)
        seen = [value for _, y in drawn for value in y]
        if seen and min(seen) > 0:  # on a linear axis a start at 10 nats would flatten everything after it
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
    return png(figure, 160)


def _line(plot: Any, x: np.ndarray, y: np.ndarray, style: dict[str, Any]) -> None:
    """Draws a curve; a loss with many points is drawn faintly, under its running mean."""
    if "marker" not in style and (window := len(y) // SMOOTHED) > 1:
        plot.plot(x, y, alpha=0.25, linewidth=0.8, **style)
        mean = np.full(window, 1 / window)
        x, y = np.convolve(x, mean, mode="valid"), np.convolve(y, mean, mode="valid")
    plot.plot(x, y, linewidth=1.6, **style)
