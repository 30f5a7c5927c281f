"""Runs the experiments of two papers on a small reasoner, and compares the results with the papers' headline figures.

    python -m benchmarks.papers --out papers                # everything; hours on two cores; skips finished parts
    python -m benchmarks.papers --out papers --only lsp     # one experiment; may run next to another once the cache exists
    python -m benchmarks.papers --out papers --publish      # copies reports to benchmarks/reports and updates its tables

Distilling the Essence: Efficient Reasoning Distillation via Sequence Truncation (arXiv 2512.21002)
Learning from Partial Chain-of-Thought via Truncated-Reasoning Self-Distillation (arXiv 2603.13274)
"""

import argparse
import re
import shutil
from pathlib import Path

from benchmarks.demo import logitcache
from benchmarks.reasoner.make import SIZES, make
from benchmarks.reasoner.problems import FAMILIES
from logitcache.accuracy.options import DEFAULT_BUDGETS
from logitcache.runtime.text import markdown_table
from logitcache.student.experiments.plots import FILES
from logitcache.student.experiments.report import REPORT_FILE
from logitcache.student.experiments.results import COSTS, CSV_FILE, TENTHS, Rows, from_csv, relative, spread, values

ACCURACY = "accuracy none"
REPORTS = Path(__file__).with_name("reports")
STUDENT, TEACHER, CACHE = "./reasoner/student", "./reasoner/teacher", "cache"

GENERATE = [
    "generate", "reasoner/prompts-train.jsonl", "--teacher", TEACHER, "--out", CACHE,
    "--top-k", "16", "--prompt-logits", "--max-tokens", "300", "--engine-arg", "max_model_len=512",
]  # fmt: skip
ANSWERED = [
    "--prompts", "reasoner/prompts-test.jsonl", "--max-tokens", "200", "--answer-tokens", "16",
    "--engine-arg", "max_model_len=512", "--engine-arg", "enforce_eager=true",
]  # fmt: skip
NATURAL = [*ANSWERED, "--budgets", "none"]
SHORT = ["--held-out", "0.02", "--max-steps", "200", "--lr", "3e-4"]
# TRSD starts from the teacher itself and is measured at every budget. Costs use a larger batch and no answers.
EXPERIMENTS = {
    "lsp": ["lsp", "--student", STUDENT, *SHORT, *NATURAL],
    "sections": ["sections", "--student", STUDENT, *SHORT, *NATURAL],
    "halves": ["halves", "--student", STUDENT, "--teacher", TEACHER, *SHORT, *NATURAL],
    "trsd": ["trsd", "--student", TEACHER, "--held-out", "0.02", "--max-steps", "250", "--lr", "5e-4", *ANSWERED],
    "cost": [
        "lsp", "--student", STUDENT, "--points", "0.5,1", "--held-out", "0.02",
        "--tokens-per-batch", "32768", "--max-steps", "10",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder; finished parts are skipped")
    parser.add_argument(
        "--only", default=",".join(EXPERIMENTS), help="experiments to run, such as lsp,trsd [default: all]"
    )
    parser.add_argument(
        "--publish", action="store_true", help="only copy finished reports to benchmarks/reports and update its tables"
    )
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - EXPERIMENTS.keys():
        parser.error(f"--only {', '.join(unknown)}: choose from {', '.join(EXPERIMENTS)}")
    if given.publish:
        return publish(given.out)
    make(SIZES["cpu"], given.out / "reasoner")
    logitcache(*GENERATE, where=given.out)
    for name in given.only.split(","):
        logitcache("experiment", *EXPERIMENTS[name], "--cache", CACHE, "--out", name, where=given.out)


def publish(out: Path) -> None:
    for name in EXPERIMENTS:
        if (out / name / CSV_FILE).exists():
            (REPORTS / name).mkdir(parents=True, exist_ok=True)
            for plot in FILES:
                (REPORTS / name / plot).unlink(missing_ok=True)
            for file in (out / name / REPORT_FILE, out / name / CSV_FILE, *(out / name).glob("*.png")):
                shutil.copy(file, REPORTS / name)
    readme = REPORTS / "README.md"
    readme.write_text(with_headlines(readme.read_text()))


def with_headlines(text: str) -> str:
    """Replaces the tables between the two comments of ``text`` by those of the committed results."""
    table = f"<!-- headlines -->\n{headlines()}\n<!-- end -->"
    return re.sub(r"<!-- headlines -->.*<!-- end -->", lambda _: table, text, flags=re.DOTALL)


def headlines() -> str:
    """Tables of the papers' headlines and the committed results: means over seeds ± standard deviation."""
    found = {name: from_csv((REPORTS / name / CSV_FILE).read_text()) for name in EXPERIMENTS}
    return "\n\n".join([essence(found), places(found["lsp"]), trsd(found["trsd"])])


def essence(found: dict[str, Rows]) -> str:
    lsp, half, costs = found["lsp"], relative(found["lsp"], "lsp:1"), relative(found["cost"], "lsp:1")
    sections = relative(found["sections"], "all")
    cost = [
        [f"{label} at 0.5, of 1.0: in steps of 32,768 tokens", "about 50%", shown(costs, "lsp:0.5", name)]
        for name, label in COSTS.items()
    ]
    cost += [[f"... of 4,096: {', '.join(COSTS.values())}", "", several(half, ["lsp:0.5"], *COSTS)]]
    family = [
        [f"... {f}: before, 0.5, 1.0", "", several(lsp, ["before", "lsp:0.5", "lsp:1"], f"{ACCURACY} [{f}]")]
        for f in FAMILIES
    ]
    variants = ["reasoning", "answer", "prompt+answer"]
    halves = several(found["halves"], ["left", "middle", "right"], ACCURACY)
    return markdown_table(
        ["Distilling the Essence", "paper", "here"],
        [
            ["accuracy at lead-span 0.5, of 1.0", "about 91%", shown(half, "lsp:0.5", ACCURACY)],
            *family,
            *cost,
            [
                "accuracy supervised on the reasoning alone, of all sections",
                "as good",
                shown(sections, variants[0], ACCURACY),
            ],
            ["... the answer alone; prompt and answer", "far worse", several(sections, variants[1:], ACCURACY)],
            ["accuracy after the left, middle, right half", "early tokens matter most", halves],
        ],
        "---:",
    )


def places(lsp: Rows) -> str:
    variants = ["before", "lsp:0.5", "lsp:1"]
    labels = [name.removeprefix("kl ") for name in TENTHS]
    lines = [[variant, *(shown(lsp, variant, name, ".3f") for name in TENTHS)] for variant in variants]
    return markdown_table(["held-out KL, nats, by place in the completion", *labels], lines, "---:")


def trsd(rows: Rows) -> str:
    variants = ["before", "trsd-anchored", "trsd:0.1-0.9", "trsd:1"]
    asked = [("redundant", b) for b in DEFAULT_BUDGETS] + [(f, "50%") for f in FAMILIES[1:]]
    lines = [[f"{f}, {b}", *(shown(rows, variant, f"accuracy {b} [{f}]") for variant in variants)] for f, b in asked]
    lines += [["all families, none", *(shown(rows, variant, ACCURACY) for variant in variants)]]
    for f in FAMILIES:
        lines += [
            [
                f"natural length, {f}",
                *(shown(rows, v, f"reasoning tokens none [{f}]", ".1f") for v in variants),
            ]
        ]
    return markdown_table(["TRSD, accuracy by budget", *variants], lines, "---:")


def shown(rows: Rows, variant: str, name: str, form: str = ".1%") -> str:
    return spread(values(rows, variant, name), form)


def several(rows: Rows, variants: list[str], *names: str) -> str:
    return ", ".join(shown(rows, variant, name) for variant in variants for name in names)


if __name__ == "__main__":
    main()
