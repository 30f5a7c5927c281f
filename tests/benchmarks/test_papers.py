"""The committed reports of the papers' experiments."""

from collections import Counter

from benchmarks import papers
from logitcache.student.experiments.results import from_csv


def test_the_headlines_are_those_of_the_committed_results():
    text = (papers.REPORTS / "README.md").read_text()
    assert papers.with_headlines(text) == text
    for name in papers.EXPERIMENTS:
        rows = from_csv((papers.REPORTS / name / "results.csv").read_text())
        runs = Counter(row["variant"] for row in rows if row["variant"] != "before")
        assert set(runs.values()) == {3}, "three seeds of every variant"
