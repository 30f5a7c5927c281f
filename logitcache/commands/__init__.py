"""The commands: for each its module, its panel in --help, and a summary.

A module is imported when its command runs, so that ``logitcache --help`` imports none of them. The function in it has
the command's name, with an underscore appended if Python uses that name: ``slice_``.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One command."""

    module: str  # in this package
    panel: str
    summary: str


_TEACHER, _STUDENT, _CACHES, _SHARING = "Teacher", "Student", "Caches", "Sharing and other formats"

COMMANDS = {
    "generate": Entry("capture", _TEACHER, "Run the teacher on prompts and cache its log-probabilities."),
    "plan": Entry("capture", _TEACHER, "Estimate time and disk for a job from a few of its traces."),
    "score": Entry("capture", _TEACHER, "Cache the teacher's log-probabilities of existing text."),
    "train": Entry("training", _STUDENT, "Distil a student from a cache."),
    "eval": Entry("evaluation", _STUDENT, "Evaluate a student against its teacher, or on problems with answers."),
    "compare": Entry("evaluation", _STUDENT, "Compare training runs side by side."),
    "experiment": Entry("experiments", _STUDENT, "Train the variants of an experiment and write a report."),
    "info": Entry("caches", _CACHES, "Show what a cache holds."),
    "verify": Entry("caches", _CACHES, "Check all of a cache, and repair it."),
    "compact": Entry("caches", _CACHES, "Put the indexes of all shards into one file, to open a large cache fast."),
    "slice": Entry("caches", _CACHES, "Make a smaller cache: fewer ids, sections or traces."),
    "merge": Entry("caches", _CACHES, "Join several caches into one."),
    "split": Entry("caches", _CACHES, "Split a cache by prompt, such as into training and test."),
    "export": Entry("sharing", _SHARING, "Write a cache in another format, such as Parquet."),
    "import": Entry("sharing", _SHARING, "Make a cache from another tool's capture."),
    "push": Entry("sharing", _SHARING, "Upload a cache to the Hugging Face hub."),
    "pull": Entry("sharing", _SHARING, "Download a cache from the Hugging Face hub."),
}
