"""The experiments, as tables of variants: what each variant is trained on, and nothing of how. Pure, and without torch.

sections          which sections to supervise                  Distilling the Essence (2025)
lsp               the first 0.1 ... 1.0 of all tokens          "
halves            first half, middle, last half, each as a teacher reads it alone
token-matched     one section each, equally many tokens
losses            divergence, entries of a row, tail: each varied around forward_kl, all, bucket
trsd              answers after cut reasoning                  Truncated-Reasoning Self-Distillation (2026)
first-derivation  as far as the first derivation, of traces that then verify it
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from logitcache.errors import InputError
from logitcache.student.data.token_masks import Share

BEFORE = "before"  # the variant that is not trained: the student as it was given
PROMPT, REASONING, ANSWER = ALL = ("prompt", "reasoning", "answer")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "tv")
TENTHS = tuple(i / 10 for i in range(1, 11))
MIDDLE = (0.4, 0.5, 0.6, 0.7)  # of all tokens, the prompt's too: half of the reasoning lies above a half


@dataclass(frozen=True)
class Variant:
    """One way to train the student from the cache.

    kept: share of each trace's tokens that is fed, by its name; None where that is not what the variant varies.
    crop: of which the teacher's rows must be, as `score --crop` names it; None: the cache itself.
    set: other fields of TrainOptions.
    """

    name: str
    about: str
    view: str = "full"
    sections: tuple[str, ...] = ALL
    kept: float | None = None
    crop: str | None = None
    set: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return self.name.replace(":", "-").replace("/", "-")


@dataclass(frozen=True)
class Facts:
    """Of a cache and of what was asked, all that an experiment's variants depend on."""

    prompt_rows: bool  # whether the prompt's tokens have rows
    top_k: int
    sampled: bool = False  # whether its tokens were drawn at temperature 1 without a filter
    points: tuple[float, ...] | None = None  # shares for lsp and first-derivation


@dataclass(frozen=True)
class Experiment:
    """title: what it varies. reference: the variant that costs are set against, the first of these that there is.

    crops: whether the teacher has to read parts of traces alone. points: whether its shares can be chosen. where: the
    traces it is about, if the cache has that column; it is then evaluated on held-out traces of that kind.
    """

    title: str
    variants: Callable[[Facts], list[Variant]]
    reference: tuple[str, ...] = ()
    crops: bool = False
    points: bool = False
    where: str | None = None


def experiment(name: str) -> Experiment:
    """Raises: InputError with the nearest name."""
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0.0)[0]
        raise InputError(f"experiment {name!r} is unknown: did you mean {near!r}? All: {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]


def _sections(facts: Facts) -> list[Variant]:
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
            f"taught on {' and '.join(sections)}; everything is fed up to the last taught token",
            sections=sections,
        )
        for name, (sections, prompt) in chosen.items()
        if facts.prompt_rows or not prompt
    ]


def _lead_span(p: float) -> Variant:
    view = f"lsp:{Share(p)}"
    return Variant(view, f"the first {100 * p:.4g}% of prompt, reasoning and answer; the rest is not fed", view, kept=p)


def _lsp(facts: Facts) -> list[Variant]:
    return [_lead_span(p) for p in facts.points or TENTHS]


def _halves(facts: Facts) -> list[Variant]:
    crops = {
        "middle": "the middle half, which the teacher read without what stands around it",
        "right": "the last half, which the teacher read without the first",
    }
    return [
        Variant("left", "the first half of each trace's tokens", "lsp:0.5", kept=0.5),
        *(Variant(side, about, f"{side}:0.5", kept=0.5, crop=f"{side}:0.5") for side, about in crops.items()),
    ]


def _token_matched(facts: Facts) -> list[Variant]:
    return [
        Variant(
            name,
            f"tokens of the {name}, as many as the trace's smallest section with rows has",
            "token-matched",
            sections=(name,),
        )
        for name in (REASONING, ANSWER, PROMPT)
        if facts.prompt_rows or name != PROMPT
    ]


def _losses(facts: Facts) -> list[Variant]:
    """Each of the three varied alone, and the tail once more where rows are short, where it matters."""

    def variant(divergence: str = DIVERGENCES[0], k: int = facts.top_k, tail: str = "bucket") -> Variant:
        name = f"{divergence},k={k},{tail}"
        about = f"{divergence} from the {k} likeliest ids of a row and the pinned ones, tail {tail}"
        short = {"top_k": k} if k < facts.top_k else {}
        return Variant(name, about, set={"divergence": divergence, "tail": tail, **short})

    fewer = [k for k in (facts.top_k // 4, facts.top_k // 16, 1) if 0 < k < facts.top_k]
    short = [k for k in fewer if k > 1][-1:]  # of one id, renormalised, hardly anything is to learn
    tails = ["support", *(["sampled"] if facts.sampled else [])]
    variants = [variant(divergence) for divergence in DIVERGENCES]
    variants += [variant(k=k) for k in fewer]
    variants += [variant(k=k, tail=tail) for k in (facts.top_k, *short) for tail in tails]
    return list({each.name: each for each in variants}.values())


def _trsd(facts: Facts) -> list[Variant]:
    return [
        Variant("full", "all tokens and all rows, nothing cut"),
        Variant(
            "trsd:0.1-0.9", "the answer's rows after a part of the reasoning, drawn anew each epoch", "trsd:0.1-0.9"
        ),
        Variant("trsd:0.5", "the answer's rows after the first half of the reasoning", "trsd:0.5"),
        Variant("trsd:1", "the answer's rows after the whole reasoning: the control, nothing is cut", "trsd:1"),
        Variant(
            "trsd-anchored",
            "the answer's rows after a quarter, half, three quarters or all of the reasoning, and the rows of that part",
            "trsd-anchored:0.25,0.5,0.75,1",
        ),
    ]


def _first_derivation(facts: Facts) -> list[Variant]:
    parts = {
        0.25: "the first quarter of the reasoning, then the answer by its tokens",
        0.5: "the first half of the reasoning, where the answer stands already, then the answer by its tokens",
    }
    return [
        Variant("full", "all tokens and all rows, nothing cut", kept=1.0),
        *(_lead_span(p) for p in facts.points or MIDDLE),
        *(Variant(f"reasoning-lsp:{p:g}", about, f"reasoning-lsp:{p:g}") for p, about in parts.items()),
    ]


EXPERIMENTS = {
    "sections": Experiment("Which sections to supervise", _sections, ("all", "reasoning+answer")),
    "lsp": Experiment("Lead span: how much of each trace is enough", _lsp, ("lsp:1",), points=True),
    "halves": Experiment("First half, middle or last half", _halves, ("left",), crops=True),
    "token-matched": Experiment("Sections at an equal number of taught tokens", _token_matched, (REASONING,)),
    "losses": Experiment("Divergence, entries of a row, and tail", _losses),
    "trsd": Experiment("Answers after cut reasoning (TRSD)", _trsd, ("full",)),
    "first-derivation": Experiment(
        "As far as the first derivation", _first_derivation, ("full",), points=True, where="meta.family=redundant"
    ),
}
