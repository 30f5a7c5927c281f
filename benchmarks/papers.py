"""Two papers on a reasoner of our own: its cache, their experiments, and their headlines beside what came out.

    python -m benchmarks.papers --out papers                # all of it, hours on two cores; what is done is not done again
    python -m benchmarks.papers --out papers --only lsp     # one experiment; beside another, once the cache is there
    python -m benchmarks.papers --out papers --publish      # into benchmarks/reports: reports, and the table of headlines

Distilling the Essence: Efficient Reasoning Distillation via Sequence Truncation (arXiv 2512.21002)
Learning from Partial Chain-of-Thought via Truncated-Reasoning Self-Distillation (arXiv 2603.13274)
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.reasoner.make import SIZES, make
from benchmarks.reasoner.problems import FAMILIES
from logitcache.student.figures import Rows, relative, values
from logitcache.student.findings import CSV_FILE, REPORT_FILE, from_csv, spread

REPORTS = Path(__file__).with_name("reports")
LOGITCACHE = str(Path(sys.executable).with_name("logitcache"))
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
# TRSD starts from the teacher itself, and is asked under every budget. The costs are of a larger batch, without answers.
EXPERIMENTS = {
    "lsp": ["lsp", "--student", STUDENT, *SHORT, *NATURAL],
    "sections": ["sections", "--student", STUDENT, *SHORT, *NATURAL],
    "halves": ["halves", "--student", STUDENT, "--teacher", TEACHER, *SHORT, *NATURAL],
    "trsd": ["trsd", "--student", TEACHER, "--held-out", "0.02", "--max-steps", "250", "--lr", "5e-4", *ANSWERED],
    "cost": [
        "lsp", "--student", STUDENT, "--points", "0.5,1", "--held-out", "0.02",
        "--tokens-per-batch", "16384", "--max-steps", "20",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.papers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder; what is in it is not made again")
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="such as lsp,trsd [default: all]")
    parser.add_argument("--publish", action="store_true", help="copy reports that are there, and write their headlines")
    given = parser.parse_args()
    if unknown := set(given.only.split(",")) - EXPERIMENTS.keys():
        parser.error(f"--only {', '.join(unknown)}: choose from {', '.join(EXPERIMENTS)}")
    if given.publish:
        return publish(given.out)
    make(SIZES["cpu"], given.out / "reasoner")
    logitcache(given.out, *GENERATE)
    for name in given.only.split(","):
        logitcache(given.out, "experiment", *EXPERIMENTS[name], "--cache", CACHE, "--out", name)


def publish(out: Path) -> None:
    for name in EXPERIMENTS:
        if (out / name / CSV_FILE).exists():
            shutil.rmtree(REPORTS / name, ignore_errors=True)
            (REPORTS / name).mkdir(parents=True)
            for file in (out / name / REPORT_FILE, out / name / CSV_FILE, *(out / name).glob("*.png")):
                shutil.copy(file, REPORTS / name)
    readme = REPORTS / "README.md"
    readme.write_text(with_headlines(readme.read_text()))


def with_headlines(text: str) -> str:
    """The text with what stands between its two comments made anew from the committed results."""
    table = f"<!-- headlines -->\n{headlines()}\n<!-- end -->"
    return re.sub(r"<!-- headlines -->.*<!-- end -->", lambda _: table, text, flags=re.DOTALL)


def headlines() -> str:
    """Each headline of the papers beside the committed results: means over seeds ± standard deviation."""
    found = {name: from_csv((REPORTS / name / CSV_FILE).read_text()) for name in EXPERIMENTS}
    lsp, trsd = found["lsp"], found["trsd"]
    half, costs = relative(lsp, "lsp:1"), relative(found["cost"], "lsp:1")
    sections, halves = relative(found["sections"], "all"), found["halves"]
    named = {"seconds": "time", "peak_memory": "memory", "flops": "FLOPs"}

    def accuracy(rows: Rows, arm: str, budget: str = "none", family: str | None = None) -> str:
        return spread(values(rows, arm, f"accuracy {budget}" + (f" [{family}]" if family else "")), ".1%")

    def shares(rows: Rows, arm: str, name: str) -> str:
        return spread(values(rows, arm, name), ".1%")

    def lengths(arm: str) -> str:
        return ", ".join(spread(values(trsd, arm, f"reasoning tokens none [{f}]"), ".1f") for f in FAMILIES)

    essence = [
        ("accuracy at lead-span 0.5, of that at 1.0", "about 91%", shares(half, "lsp:0.5", "accuracy none")),
        *(
            (
                f"... {f}: before, 0.5, 1.0",
                "",
                " / ".join(accuracy(lsp, a, family=f) for a in ("before", "lsp:0.5", "lsp:1")),
            )
            for f in FAMILIES
        ),
        *(
            (
                f"{label} at 0.5, of that at 1.0: 16,384 tokens a step; 4,096",
                "about 50%",
                f"{shares(costs, 'lsp:0.5', name)}; {shares(half, 'lsp:0.5', name)}",
            )
            for name, label in named.items()
        ),
        ("reasoning alone, of all sections", "as good", shares(sections, "reasoning", "accuracy none")),
        ("answer alone, of all sections", "far worse", shares(sections, "answer", "accuracy none")),
        (
            "left, middle, right half",
            "early tokens matter most",
            " / ".join(accuracy(halves, arm) for arm in ("left", "middle", "right")),
        ),
    ]
    budgets, arms = ("0", "25%", "50%", "75%", "100%", "none"), ("before", "trsd-anchored", "trsd:0.1-0.9")
    robust = [(f"redundant, budget {b}", *(accuracy(trsd, arm, b, "redundant") for arm in arms)) for b in budgets]
    robust += [(f"{f}, budget 50%", *(accuracy(trsd, arm, "50%", f) for arm in arms)) for f in FAMILIES[1:]]
    robust += [("all families, natural", *(accuracy(trsd, arm) for arm in arms))]
    robust += [(f"natural length: {', '.join(FAMILIES)}", *(lengths(arm) for arm in arms))]
    return "\n\n".join(
        [
            markdown(("Distilling the Essence", "paper", "here"), essence),
            markdown(("TRSD, accuracy at a budget", "before", "trsd-anchored", "trsd, answers alone"), robust),
        ]
    )


def markdown(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


def logitcache(where: Path, *arguments: str) -> None:
    print(f"\n$ logitcache {' '.join(arguments)}", flush=True)
    if code := subprocess.run([LOGITCACHE, *arguments], cwd=where).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
