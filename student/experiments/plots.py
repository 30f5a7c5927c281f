"""Plots of an experiment's results."""

from statistics import fmean
from typing import Any

from logitcache.runtime.pictures import label as plain
from logitcache.runtime.pictures import png
from logitcache.student.experiments.catalog import BEFORE
from logitcache.student.experiments.results import (
    COSTS,
    NATURAL,
    Rows,
    budgets,
    columns,
    groups,
    relative,
    values,
    variants_of,
)

QUALITY, COST, BUDGETS, LENGTH = FILES = ("quality.png", "cost.png", "budgets.png", "length.png")


def draw(title: str, rows: Rows, reference: str | None) -> dict[str, tuple[bytes, str]]:
    """Draws the plots that the rows allow.

    If three variants or more differ in the share of tokens they keep, the plots are over that share, else by variant.
    Returns: by file name, the PNG and its caption.
    """
    trained = [each for each in rows if each["variant"] != BEFORE]
    plots: dict[str, tuple[bytes, str]] = {}
    if not trained:
        return plots
    by_share = _by_share(trained)
    where = "by the share of each trace's tokens that is kept" if by_share else "by variant"
    dots = f"Dots: runs; {'lines' if by_share else 'bars'}: means."
    natural = f"accuracy {NATURAL}"
    measures = {"kl": "held-out KL (nats per position)"}
    if any(each.get(natural) is not None for each in rows):
        measures = {natural: "accuracy, no reasoning budget"} | measures
    listed = " and ".join(measures.values())
    plots[QUALITY] = (
        _quality(title, rows, measures),
        f"{listed[0].upper()}{listed[1:]}, {where}. {dots} Dashed: untrained.",
    )
    if reference and (shares := relative(trained, reference)):
        notes = " Dotted: cost in proportion to the tokens kept." if by_share else ""
        if by_share and any(each["kept"] is None for each in trained):
            notes += " Variants that do not vary this share are only in the table."
        plots[COST] = _cost(title, shares, reference), f"Cost of a run relative to {reference}, {where}.{notes}"
    every = budgets(rows)
    if len(every) > 1:
        plots[BUDGETS] = (
            _budgets(title, rows, every),
            "Accuracy by reasoning budget, means over seeds. Dashed: untrained.",
        )
    if f"reasoning tokens {NATURAL}" in columns(rows):
        plots[LENGTH] = (
            _quality(title, rows, {f"reasoning tokens {NATURAL}": "reasoning tokens, no reasoning budget"}),
            f"Mean length of the reasoning without a budget, {where}. {dots} Dashed: untrained.",
        )
    return plots


def _by_share(rows: Rows) -> bool:
    return len({each["kept"] for each in rows if each["kept"] is not None}) > 2


def _quality(title: str, rows: Rows, measures: dict[str, str]) -> bytes:
    """A panel per measure; over shares, a variant without a share is a horizontal line."""
    trained = [each for each in rows if each["variant"] != BEFORE]
    names = variants_of(trained)
    by_share = _by_share(trained)
    figure = _figure(title, len(measures), 5.2, 4.4 if by_share else 1.6 + 0.34 * len(names))
    plots = _panels(figure, len(measures), sharey=not by_share)
    for plot, (name, label) in zip(plots, measures.items(), strict=True):
        percent = name.startswith("accuracy")
        if by_share:
            _over_shares(plot, trained, name, "C0", None)
            others = [variant for variant in names if _kept(trained, variant) is None]
            for i, variant in enumerate(others, 1):
                if found := values(trained, variant, name):
                    plot.axhline(fmean(found), color=f"C{i}", linestyle="-.", linewidth=1.2, label=plain(variant))
            plot.set_xlabel("share of the tokens kept")
            plot.set_xlim(0, 1.03)
            plot.set_ylabel(label)
            _percent(plot.yaxis, percent)
        else:
            for y, variant in enumerate(names):
                found = values(trained, variant, name)
                if found:
                    plot.barh(y, fmean(found), color="C0", alpha=0.35, height=0.6)
                    plot.plot(found, [y] * len(found), "o", color="C0", markersize=4)
            plot.set_yticks(range(len(names)), list(map(plain, names)))
            plot.set_ylim(len(names) - 0.4, -0.6)
            plot.set_xlabel(label)
            _percent(plot.xaxis, percent)
        before = values(rows, BEFORE, name)
        if before:
            line = plot.axhline if by_share else plot.axvline
            line(before[0], color="black", linestyle="--", linewidth=1, label=BEFORE)
        _finish(plot)
    return _png(figure, plots)


def _cost(title: str, shares: Rows, reference: str) -> bytes:
    names, by_share = variants_of(shares), _by_share(shares)
    figure = _figure(f"{title}; cost relative to {reference}", 1, 6.4, 4.4 if by_share else 1.8 + 0.5 * len(names))
    (plot,) = _panels(figure, 1)
    if by_share:
        for i, (name, label) in enumerate(COSTS.items()):
            _over_shares(plot, shares, name, f"C{i}", label)
        plot.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1, zorder=0)
        plot.set_xlabel("share of the tokens kept")
        plot.set_xlim(0, 1.03)
        _percent(plot.yaxis, True)
        plot.set_ylim(bottom=0)
    else:
        for i, (name, label) in enumerate(COSTS.items()):
            for y, variant in enumerate(names):
                if found := values(shares, variant, name):
                    place = y + 0.26 * (i - 1)
                    plot.barh(
                        place, fmean(found), color=f"C{i}", alpha=0.35, height=0.24, label=label if y == 0 else None
                    )
                    plot.plot(found, [place] * len(found), "o", color=f"C{i}", markersize=3)
        plot.set_yticks(range(len(names)), list(map(plain, names)))
        plot.set_ylim(len(names) - 0.4, -0.6)
        plot.axvline(1, color="grey", linestyle=":", linewidth=1)
        _percent(plot.xaxis, True)
    _finish(plot)
    return _png(figure, [plot])


def _budgets(title: str, rows: Rows, every: list[str]) -> bytes:
    """A panel for all prompts and one per group; budgets in the order in which they were given."""
    parts = {"all prompts": "", **{group: f" [{group}]" for group in groups(rows)}}
    figure = _figure(f"{title}; accuracy by reasoning budget", len(parts), 4.2, 4.6)
    panels, colors = _panels(figure, len(parts), sharey=True), _by_kept(rows)
    for plot, (name, suffix) in zip(panels, parts.items(), strict=True):
        for i, variant in enumerate(variants_of(rows)):
            found = [values(rows, variant, f"accuracy {budget}{suffix}") for budget in every]
            points = [(x, fmean(each)) for x, each in enumerate(found) if each]
            style = {"color": colors.get(variant, f"C{i % 10}"), "marker": "os^"[i // 10 % 3]}
            style = {"color": "black", "linestyle": "--"} if variant == BEFORE else style
            if points:
                plot.plot(*zip(*points, strict=True), markersize=4, linewidth=1.4, label=plain(variant), **style)
        plot.set_xticks(range(len(every)), list(map(plain, every)))
        plot.set_xlabel("reasoning budget")
        plot.set_title(plain(name), fontsize=10)
        _percent(plot.yaxis, True)
        _finish(plot)
    return _png(figure, panels)


def _over_shares(plot: Any, rows: Rows, name: str, color: str, label: str | None) -> None:
    placed = sorted((kept, variant) for variant in variants_of(rows) if (kept := _kept(rows, variant)) is not None)
    means = [(kept, fmean(found)) for kept, variant in placed if (found := values(rows, variant, name))]
    for kept, variant in placed:
        found = values(rows, variant, name)
        plot.plot([kept] * len(found), found, "o", color=color, markersize=3.5, alpha=0.6)
    if means:
        plot.plot(*zip(*means, strict=True), color=color, linewidth=1.5, label=label)


def _by_kept(rows: Rows) -> dict[str, Any]:
    """Colours by the share kept: the more, the lighter."""
    from matplotlib import colormaps

    if not _by_share(rows):
        return {}
    return {
        variant: colormaps["viridis"](0.95 * kept)
        for variant in variants_of(rows)
        if (kept := _kept(rows, variant)) is not None
    }


def _kept(rows: Rows, variant: str) -> float | None:
    return next((each["kept"] for each in rows if each["variant"] == variant), None)


def _figure(title: str, panels: int, width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels + 0.8, height), layout="constrained")
    figure.suptitle(plain(title), fontsize=11)
    return figure


def _panels(figure: Any, count: int, sharey: bool = False) -> list[Any]:
    return list(figure.subplots(1, count, sharey=sharey, squeeze=False)[0])


def _percent(axis: Any, wanted: bool) -> None:
    from matplotlib.ticker import PercentFormatter

    if wanted:
        axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _finish(plot: Any) -> None:
    plot.grid(alpha=0.3)
    plot.set_axisbelow(True)


def _png(figure: Any, panels: list[Any]) -> bytes:
    """The figure with one legend below all panels."""
    handles = {name: h for p in panels for h, name in zip(*p.get_legend_handles_labels(), strict=True)}
    if handles:
        columns = min(len(handles), 4 * len(panels))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    return png(figure, 150)
