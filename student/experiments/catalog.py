"""The experiments: for each, a table of its variants. Pure functions, without torch.

sections          which sections to supervise                  Distilling the Essence (2025)
lsp               the first 0.1, ..., 1.0 of all tokens        "
halves            first half, middle half and last half, each scored by the teacher on its own
token-matched     one section each, with equally many supervised tokens
losses            divergence, ids per row and tail, each varied around forward_kl, all ids, bucket
trsd              answers after truncated reasoning            Truncated-Reasoning Self-Distillation (2026)
first-derivation  traces truncated at the first derivation of the answer, where a second one follows
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from logitcache.errors import InputError
from logitcache.kernels.divergences import DIVERGENCES
from logitcache.student.data.token_masks import Share

BEFORE = "before"  # the name of the untrained student in tables
PROMPT, REASONING, ANSWER = ALL = ("prompt", "reasoning", "answer")
TENTHS = tuple(i / 10 for i in range(1, 11))
MIDDLE = (0.4, 0.5, 0.6, 0.7)  # shares of all tokens; with the prompt, half of the reasoning ends above 0.5


@dataclass(frozen=True)
class Variant:
    """One way to train the student from the cache."""

    name: str
    description: str
    view: str = "full"
    sections: tuple[str, ...] = ALL
    kept: float | None = None  # share of each trace's tokens that is input; None: the variant does not vary it
    crop: str | None = (
        None  # train on a cache made by `logitcache score --crop` with this crop; None: on the cache itself
    )
    set: dict[str, Any] = field(default_factory=dict)  # other fields of TrainOptions

    @property
    def folder(self) -> str:
        return self.name.replace(":", "-").replace("/", "-")


@dataclass(frozen=True)
class CacheFacts:
    """What the variants of an experiment depend on: properties of the cache, and the chosen points."""

    prompt_rows: bool  # whether prompt tokens have rows
    top_k: int
    sampled: bool = False  # whether every token was sampled at temperature 1 without a filter
    points: tuple[float, ...] | None = None  # shares for lsp and first-derivation


@dataclass(frozen=True)
class Experiment:
    """An experiment of the catalog."""

    title: str
    variants: Callable[[CacheFacts], list[Variant]]
    reference: tuple[str, ...] = ()  # costs are relative to the first of these variants that was trained
    crops: bool = False  # whether the teacher must score crops of the traces
    points: bool = False  # whether `points` applies
    where: str | None = None  # if the cache has this column: train and evaluate only on traces that match


def get_experiment(name: str) -> Experiment:
    """Raises: InputError with the nearest name."""
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown experiment {name!r}: did you mean {near!r}? All: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def _sections(facts: CacheFacts) -> list[Variant]:
    chosen = {
        "all": (ALL, True),
        "reasoning+answer": ((REASONING, ANSWER), False),
        "reasoning": ((REASONING,), False),
        "answer": ((ANSWER,), False),
        "prompt+answer": ((PROMPT, ANSWER), True),
    }
    return [
        Variant(
            name,
            f"supervised on {' and '.join(sections)}; tokens after the last supervised one are dropped",
            sections=sections,
        )
        for name, (sections, prompt) in chosen.items()
        if facts.prompt_rows or not prompt
    ]


def _lead_span(p: float) -> Variant:
    view = f"lsp:{Share(p)}"
    return Variant(view, f"the first {100 * p:.4g}% of all tokens of a trace, the prompt included", view, kept=p)


def _lsp(facts: CacheFacts) -> list[Variant]:
    return [_lead_span(p) for p in facts.points or TENTHS]


def _halves(facts: CacheFacts) -> list[Variant]:
    crops = {
        "middle": "the middle half, scored by the teacher without the tokens around it",
        "right": "the last half, scored by the teacher without the first half",
    }
    return [
        Variant("left", "the first half of each trace's tokens", "lsp:0.5", kept=0.5),
        *(Variant(side, about, f"{side}:0.5", kept=0.5, crop=f"{side}:0.5") for side, about in crops.items()),
    ]


def _token_matched(facts: CacheFacts) -> list[Variant]:
    return [
        Variant(
            name,
            f"tokens of the {name}, as many as the trace's shortest section with rows has",
            "token-matched",
            sections=(name,),
        )
        for name in (REASONING, ANSWER, PROMPT)
        if facts.prompt_rows or name != PROMPT
    ]


def _losses(facts: CacheFacts) -> list[Variant]:
    """Varies each of the three alone, and the tail for short rows too, where it matters most."""

    def variant(divergence: str = next(iter(DIVERGENCES)), k: int = facts.top_k, tail: str = "bucket") -> Variant:
        name = f"{divergence},k={k},{tail}"
        about = f"{divergence} on the top {k} ids of a row and the pinned ids, tail {tail}"
        short = {"top_k": k} if k < facts.top_k else {}
        return Variant(name, about, set={"divergence": divergence, "tail": tail, **short})

    fewer = [k for k in (facts.top_k // 4, facts.top_k // 16, 1) if 0 < k < facts.top_k]
    short = [k for k in fewer if k > 1][-1:]  # a single renormalised id carries almost no information
    tails = ["support", *(["sampled"] if facts.sampled else [])]
    variants = [variant(divergence) for divergence in DIVERGENCES]
    variants += [variant(k=k) for k in fewer]
    variants += [variant(k=k, tail=tail) for k in (facts.top_k, *short) for tail in tails]
    return list({each.name: each for each in variants}.values())


def _trsd(facts: CacheFacts) -> list[Variant]:
    return [
        Variant("full", "the whole trace, all rows"),
        Variant(
            "trsd:0.1-0.9",
            "the answer's rows after a random share of the reasoning, drawn anew in each epoch",
            "trsd:0.1-0.9",
        ),
        Variant("trsd:0.5", "the answer's rows after the first half of the reasoning", "trsd:0.5"),
        Variant("trsd:1", "the answer's rows after the whole reasoning (control)", "trsd:1"),
        Variant(
            "trsd-anchored",
            "the answer's rows after 25%, 50%, 75% or 100% of the reasoning, and the rows of that reasoning",
            "trsd-anchored:0.25,0.5,0.75,1",
        ),
    ]


def _first_derivation(facts: CacheFacts) -> list[Variant]:
    parts = {
        0.25: "the rows of the first quarter of the reasoning, then cross-entropy on the answer",
        0.5: "the rows of the first half of the reasoning, which contains the answer, then cross-entropy on the answer",
    }
    return [
        Variant("full", "the whole trace, all rows", kept=1.0),
        *(_lead_span(p) for p in facts.points or MIDDLE),
        *(Variant(f"reasoning-lsp:{p:g}", about, f"reasoning-lsp:{p:g}") for p, about in parts.items()),
    ]


EXPERIMENTS = {
    "sections": Experiment("Which sections to supervise", _sections, ("all", "reasoning+answer")),
    "lsp": Experiment("Lead span: how much of each trace is enough", _lsp, ("lsp:1",), points=True),
    "halves": Experiment("First half, middle or last half", _halves, ("left",), crops=True),
    "token-matched": Experiment("Sections at an equal number of supervised tokens", _token_matched, (REASONING,)),
    "losses": Experiment("Divergence, ids per row, and tail", _losses),
    "trsd": Experiment("Answers after truncated reasoning (TRSD)", _trsd, ("full",)),
    "first-derivation": Experiment(
        "Traces truncated at the first derivation",
        _first_derivation,
        ("full",),
        points=True,
        where="meta.family=redundant",
    ),
}
