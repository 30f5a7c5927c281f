"""Plots of an experiment's rows, and how rows are read: by variant, over seeds, by budget, relative to a variant."""

import io
from statistics import fmean
from typing import Any

from logitcache.student.experiments.catalog import BEFORE

Rows = list[dict[str, Any]]
QUALITY, COST, BUDGETS, LENGTH = FILES = ("quality.png", "cost.png", "budgets.png", "length.png")
COSTS = {"seconds": "time", "peak_memory": "peak memory", "flops": "FLOPs"}
NATURAL = "none"


def variants_of(rows: Rows) -> list[str]:
    return list(dict.fromkeys(each["variant"] for each in rows))


def values(rows: Rows, variant: str, name: str) -> list[float]:
    """What the seeds of a variant have in a column."""
    return [each[name] for each in rows if each["variant"] == variant and each.get(name) is not None]


def budgets(rows: Rows) -> list[str]:
    names = dict.fromkeys(name for each in rows for name in each if name.startswith("accuracy ") and "[" not in name)
    return [name.removeprefix("accuracy ") for name in names]


def groups(rows: Rows) -> list[str]:
    names = dict.fromkeys(name for each in rows for name in each if name.startswith("accuracy ") and "[" in name)
    return list(dict.fromkeys(name.partition("[")[2].rstrip("]") for name in names))


def relative(rows: Rows, reference: str) -> Rows:
    """Rows with costs and natural accuracy as shares of the reference's of the same seed.

    Seeds that the reference lacks are left out, and measures that are 0 for one of its seeds, of which nothing is a share.
    """
    base = {each["seed"]: each for each in rows if each["variant"] == reference}
    names = [n for n in dict.fromkeys(n for each in rows for n in each) if n.startswith(f"accuracy {NATURAL}")]
    names = [n for n in (*names, "tokens_fed", "tokens_taught", *COSTS) if all(each.get(n) for each in base.values())]
    return [
        {"variant": each["variant"], "seed": each["seed"], "kept": each["kept"]}
        | {n: each[n] / base[each["seed"]][n] for n in names if each.get(n) is not None}
        for each in rows
        if each["seed"] in base
    ]


def draw(title: str, rows: Rows, reference: str | None) -> dict[str, tuple[bytes, str]]:
    """The plots that the rows allow: by file name, the PNG and what it shows.

    Over the kept share where that is what three variants or more vary, else variant by variant.
    """
    trained = [each for each in rows if each["variant"] != BEFORE]
    plots: dict[str, tuple[bytes, str]] = {}
    if not trained:
        return plots
    where = "by the share of each trace's tokens that is kept" if _by_share(trained) else "by variant"
    dots = "Dots are runs, lines their means." if _by_share(trained) else "Dots are runs, bars their means."
    natural = f"accuracy {NATURAL}"
    measures = {"kl": "held-out KL, nats a row"}
    if any(each.get(natural) is not None for each in rows):
        measures = {natural: "accuracy, natural completions"} | measures
    said = " and ".join(measures.values())
    plots[QUALITY] = _quality(title, rows, measures), f"{said[0].upper()}{said[1:]}, {where}. {dots} Dashed: untrained."
    if reference and (shares := relative(trained, reference)):
        line = " Dotted: cost in proportion to the tokens kept." if _by_share(trained) else ""
        line += (
            " Variants without such a share are in the table."
            if line and any(r["kept"] is None for r in trained)
            else ""
        )
        plots[COST] = _cost(title, shares, reference), f"Costs of a run relative to {reference}, {where}.{line}"
    every = budgets(rows)
    if len(every) > 1:
        plots[BUDGETS] = (
            _budgets(title, rows, every),
            "Accuracy by the budget of reasoning, means over seeds; dashed: untrained.",
        )
    if f"reasoning tokens {NATURAL}" in {name for each in rows for name in each}:
        plots[LENGTH] = (
            _quality(title, rows, {f"reasoning tokens {NATURAL}": "reasoning tokens, natural completions"}),
            f"Mean length of the reasoning in natural completions, {where}. {dots} Dashed: untrained.",
        )
    return plots


def _by_share(rows: Rows) -> bool:
    return len({each["kept"] for each in rows if each["kept"] is not None}) > 2


def _quality(title: str, rows: Rows, measures: dict[str, str]) -> bytes:
    """One panel a measure; variants without a kept share are dashed lines of their own where the others have one."""
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
                    plot.axhline(fmean(found), color=f"C{i}", linestyle="-.", linewidth=1.2, label=variant)
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
            plot.set_yticks(range(len(names)), names)
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
        plot.set_yticks(range(len(names)), names)
        plot.set_ylim(len(names) - 0.4, -0.6)
        plot.axvline(1, color="grey", linestyle=":", linewidth=1)
        _percent(plot.xaxis, True)
    _finish(plot)
    return _png(figure, [plot])


def _budgets(title: str, rows: Rows, every: list[str]) -> bytes:
    """A panel for all prompts and one a group; budgets stand in the order in which they were asked for."""
    parts = {"all prompts": "", **{group: f" [{group}]" for group in groups(rows)}}
    figure = _figure(f"{title}; accuracy by budget of reasoning", len(parts), 4.2, 4.6)
    panels, colors = _panels(figure, len(parts), sharey=True), _by_kept(rows)
    for plot, (name, suffix) in zip(panels, parts.items(), strict=True):
        for i, variant in enumerate(variants_of(rows)):
            found = [values(rows, variant, f"accuracy {budget}{suffix}") for budget in every]
            points = [(x, fmean(each)) for x, each in enumerate(found) if each]
            style = {"color": colors.get(variant, f"C{i % 10}"), "marker": "os^"[i // 10 % 3]}
            style = {"color": "black", "linestyle": "--"} if variant == BEFORE else style
            if points:
                plot.plot(*zip(*points, strict=True), markersize=4, linewidth=1.4, label=variant, **style)
        plot.set_xticks(range(len(every)), every)
        plot.set_xlabel("reasoning kept")
        plot.set_title(name, fontsize=10)
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
    """Colours of variants that keep more and more, from dark to light."""
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
    figure.suptitle(title, fontsize=11)
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
    """With one legend below all panels."""
    handles = {name: h for p in panels for h, name in zip(*p.get_legend_handles_labels(), strict=True)}
    if handles:
        columns = min(len(handles), 4 * len(panels))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    return image.getvalue()
