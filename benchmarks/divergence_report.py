"""Results of `bench_divergence.py`: appended to a CSV file, read back, shown as a table and as a plot."""

import csv
from pathlib import Path


def save(path: Path, rows: list[dict]) -> None:
    """Appends rows; a file with other columns is rewritten with all columns."""
    path.parent.mkdir(exist_ok=True)
    old = load(path) if path.exists() else []
    names = list(dict.fromkeys(name for row in (*old[:1], *rows) for name in row))
    anew = not old or list(old[0]) != names
    with path.open("w" if anew else "a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if anew:
            writer.writeheader()
        writer.writerows([*old, *rows] if anew else rows)


def load(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def newest(path: Path) -> dict[tuple[str, ...], list[dict]]:
    """The newest row of each implementation by (N, H, V), of the last commit's runs, without sweeps."""
    rows, cases = load(path), {}
    commit = rows[-1]["commit"].removesuffix("-dirty")
    for row in rows:
        if row["commit"].removesuffix("-dirty") == commit and "=" not in row["impl"]:
            case = cases.setdefault((row["N"], row["H"], row["V"]), [])
            if case and case[0]["date"] != row["date"]:
                case.clear()
            case.append(row)
    return cases


def table(path: Path) -> str:
    lines = []
    for (n, h, v), rows in newest(path).items():
        lines += [f"| N={n}, H={h}, V={int(v):,} | ms median (p20 - p80) | of torch | extra MiB | of the floor |"]
        lines += ["|---|---|---|---|---|"]
        for row in rows:
            times = f"{float(row['ms_median']):,.0f} ({float(row['ms_p20']):,.0f} - {float(row['ms_p80']):,.0f})"
            extra, share = (float(row[name] or "nan") for name in ("extra_mib", "floor_share"))
            lines += [f"| {row['impl']} | {times} | {row['of_torch']} | {extra:z,.0f} | {share:.0%} |"]
        lines += [""]
    return "\n".join(lines)


def plot(path: Path, out: Path) -> None:
    """Plots the newest runs as bars, one group per case: time over that of the bare products (p20 to p80), and extra memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = newest(path)
    last = load(path)[-1]
    names = [n for n in dict.fromkeys(r["impl"] for rows in cases.values() for r in rows) if n != "matrix products"]
    figure, panels = plt.subplots(2, 1, figsize=(4.5 + 1.5 * len(cases), 6.5), sharex=True, layout="constrained")
    width = 0.8 / len(names)
    for group, rows in enumerate(cases.values()):
        bare = next((float(r["ms_median"]) for r in rows if r["impl"] == "matrix products"), 1.0)
        for row in rows:
            if row["impl"] not in names:
                continue
            number = names.index(row["impl"])
            at, color = group - 0.4 + (number + 0.5) * width, f"C{number}"
            low, mid, high = (float(row[name]) / bare for name in ("ms_p20", "ms_median", "ms_p80"))
            panels[0].bar(at, mid, 0.9 * width, color=color, label=row["impl"] if group == 0 else None)
            panels[0].plot([at, at], [low, high], color="black", linewidth=1)
            panels[1].bar(at, max(float(row["extra_mib"] or 0), 1), 0.9 * width, color=color)
    panels[0].axhline(1.0, color="gray", linewidth=0.8, linestyle="dotted")
    panels[1].set_yscale("log")
    panels[1].set_ylim(bottom=1)
    if panels[0].get_ylim()[1] > 5:
        panels[0].set_yscale("log")
        panels[0].set_yticks([t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if t < panels[0].get_ylim()[1]])
        panels[0].set_ylim(bottom=0.5)
        panels[0].minorticks_off()
    for panel, label in zip(panels, ("time / bare matrix products", "extra memory, MiB (at least 1)"), strict=True):
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_ylabel(label)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].set_xticks(range(len(cases)), [f"N={n}\nH={h}\nV={v}" for n, h, v in cases])
    figure.legend(loc="outside upper center", fontsize="small", frameon=False, ncols=3)
    panels[0].set_title(f"forward + backward; {last['machine']}, torch {last['torch']}", fontsize="small")
    figure.savefig(out, dpi=110)
