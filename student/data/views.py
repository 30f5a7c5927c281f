"""Views: pure functions from a trace to the student's input and to the cached rows that supervise it.

    view = step { "+" step }      step = NAME [":" ARGUMENT]      such as lsp:0.5, trsd:0.1-0.9+random-mask:0.5

At most one step cuts the trace, and it comes first; the others choose among the supervised tokens (`token_masks.STEPS` is
the table). Sections choose last, by the section of the supervised token. Both delimiters belong to the reasoning: a
student that learns to reason must open and close it.

A position's output predicts the next input token, so the row of an uncut trace's token t supervises position t - 1.
"""

import difflib
import functools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache.errors import StudentError
from logitcache.identity import Identity
from logitcache.sections import SECTIONS
from logitcache.student.data.token_masks import (
    STEPS,
    Share,
    Step,
    TokenMasks,
    crop,
    reasoning_lsp,
    sections_of,
    trsd,
    trsd_anchored,
)
from logitcache.trace import Trace

# L tokens of a trace, T input positions of its view, N some of the tokens.

UNSUPERVISED = -1


@dataclass(frozen=True, slots=True, eq=False)
class SupervisedTrace:
    """The student's input for one trace. It ends at the last supervised position, since later tokens affect no loss."""

    input_ids: np.ndarray  # int64 [T]
    target: np.ndarray  # int64 [T], the token a position predicts, as an index into the trace; or UNSUPERVISED
    row: np.ndarray  # int64 [T], its cached row; UNSUPERVISED too where the token alone supervises
    kd: np.ndarray  # float32 [T], weight of the divergence from the row; 0 where there is none
    ce: np.ndarray  # float32 [T], weight of the cross-entropy with the token; 0 where there is none


@dataclass(frozen=True)
class View:
    """What a student sees of each trace, and which sections supervise it.

    `text` and `sections` are stored in a canonical form: View("lsp:0.50") equals View("lsp:0.5").

    Raises: StudentError for an unknown step or section, with the nearest one, and for steps that cannot be combined.
    """

    text: str = "full"
    sections: tuple[str, ...] = tuple(SECTIONS)

    def __post_init__(self) -> None:
        for name in self.sections:
            if name not in SECTIONS:
                near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.0)[0]
                raise StudentError(
                    f"unknown section {name!r} in `sections`: did you mean {near!r}? All: {', '.join(SECTIONS)}"
                )
        if not self.sections:
            raise StudentError(f"`sections` is empty: choose some of {', '.join(SECTIONS)}")
        object.__setattr__(self, "text", _text(parse(self.text)))
        object.__setattr__(self, "sections", tuple(name for name in SECTIONS if name in self.sections))

    def __str__(self) -> str:
        return self.text

    def __call__(self, trace: Trace, epoch: int = 0) -> SupervisedTrace:
        (first, argument), *choices = parse(self.text)
        assert first.cut
        masks = first.cut(trace, epoch, argument)
        supervised_L = (masks.by_row | masks.by_token) & ~trace.is_context
        for step, argument in choices:
            assert step.choose
            supervised_L = step.choose(trace, supervised_L, argument)
        chosen = [i for i, name in enumerate(SECTIONS) if name in self.sections]
        return _supervise(trace, masks, supervised_L & np.isin(sections_of(trace), chosen))

    def check(self, identity: Identity, path: str) -> None:
        """Checks that a cache has what this view needs.

        Raises: StudentError, with the command that makes a suitable cache, for a crop that the cache at `path` was not
            scored on, and for a cut of the reasoning where its traces have none.
        """
        (step, argument), *_ = parse(self.text)
        path = path.rstrip("/") or path
        if step.cut is crop:
            _check_crop(f"{step.name}:{argument}", identity, path)
        if step.cut in (reasoning_lsp, trsd, trsd_anchored):
            _check_reasoning(step.name, identity, path)


@functools.lru_cache
def parse(text: str) -> tuple[tuple[Step, Any], ...]:
    """The steps of a view's text with their arguments. The first one cuts; it is `full` where the text has no cut.

    Raises: StudentError for an unknown name, with the nearest one, a bad argument, two cuts, and a cut that is not first.
    """
    named = [_step(text, part.strip()) for part in text.split("+")]
    named = [(step, argument) for step, argument in named if step.name != "full"]  # full changes nothing
    cuts, choices = [s for s in named if s[0].cut], [s for s in named if s[0].choose]
    if len(cuts) > 1:
        raise StudentError(
            f"view {text!r}: {cuts[0][0].name} and {cuts[1][0].name} both cut the trace; use one of them"
        )
    if cuts and named[0] != cuts[0]:
        raise StudentError(
            f"view {text!r}: {cuts[0][0].name} cuts the trace and must come first: write {_text(cuts + choices)}"
        )
    return (*(cuts or [(STEPS["full"], None)]), *choices)


def _text(named: Sequence[tuple[Step, Any]]) -> str:
    """The canonical text of these steps."""
    shown = [f"{step.name}:{argument}" if step.takes else step.name for step, argument in named if step.name != "full"]
    return "+".join(shown) or "full"


def _step(view: str, text: str) -> tuple[Step, Any]:
    name, colon, argument = text.partition(":")
    if name not in STEPS:
        near = difflib.get_close_matches(name, STEPS, n=1, cutoff=0.0)[0] if name else "full"
        raise StudentError(
            f"unknown view {name!r} in {view!r}: did you mean {STEPS[near].example!r}? "
            f"All: {', '.join(step.usage for step in STEPS.values())}, joined by +; use `sections` to choose sections"
        )
    step = STEPS[name]
    if step.takes is None:
        if colon:
            raise StudentError(f"view {view!r}: {name} takes no argument; write {name}")
        return step, None
    try:
        return step, step.takes.parse(argument)
    except ValueError:
        raise StudentError(f"view {view!r}: {name} takes {step.takes.wants}; write {step.example}") from None


def _supervise(trace: Trace, masks: TokenMasks, supervised_L: np.ndarray) -> SupervisedTrace:
    index = masks.input.nonzero()[0]
    source_T, target_T = index[:-1], index[1:]
    supervised_T = supervised_L[target_T]
    length = int(supervised_T.nonzero()[0][-1]) + 1 if supervised_T.any() else 0
    source_T, target_T, supervised_T = source_T[:length], target_T[:length], supervised_T[:length]
    by_row_T, by_token_T = supervised_T & masks.by_row[target_T], supervised_T & masks.by_token[target_T]
    return SupervisedTrace(
        input_ids=trace.token_ids[source_T].astype(np.int64),
        target=np.where(supervised_T, target_T, UNSUPERVISED),
        row=np.where(by_row_T, target_T - trace.row_start, UNSUPERVISED),
        kd=by_row_T.astype(np.float32),
        ce=by_token_T.astype(np.float32),
    )


def section_of(trace: Trace, target_N: np.ndarray) -> np.ndarray:
    """int64 [N], each token's section as an index into SECTIONS; UNSUPERVISED stays. Tokens are indices into the trace."""
    return np.append(sections_of(trace), UNSUPERVISED)[target_N]


def tenth_of(trace: Trace, target_N: np.ndarray) -> np.ndarray:
    """int64 [N], 0 to 9, each token's tenth of the completion; -1 for tokens of the prompt and for UNSUPERVISED."""
    start, length = trace.sections.prompt_end, len(trace.token_ids)
    return np.where(target_N < start, -1, (target_N - start) * 10 // max(1, length - start))


def _check_crop(wanted: str, identity: Identity, path: str) -> None:
    """`wanted`: such as right:0.5. A later slice, merge or split of the cache does not change its crop."""
    where, _, share = wanted.partition(":")
    made = [m for what in identity.derived if (m := re.fullmatch(r"score .*--crop (\w+):(\S+)", what))]
    found = (made[-1][1], float(made[-1][2])) if made else None
    if found == (where, float(share)):
        return
    whole = "WHOLE" if found else path
    words = ["--from-cache", whole, "--crop", wanted, "--teacher", identity.teacher, "--out", f"{path}-{where}"]
    raise StudentError(
        f"{path}: view {wanted} needs rows that the teacher made from that crop alone, and these were made from "
        + (f"the crop {found[0]}:{Share(found[1])}" if found else "whole traces")
        + f"; make them with `logitcache score {shlex.join(words)}`"
        + (", where WHOLE is the cache that was cropped" if found else "")
        + (f", or use view lsp:{share}, which is the same on a cache of whole traces" if where == "left" else "")
    )


def _check_reasoning(name: str, identity: Identity, path: str) -> None:
    if identity.reasoning_markers or identity.answer_regex:
        return
    words = ["--teacher", identity.teacher, "--reasoning-markers", "<think>,</think>", "--out", f"{path}-sections"]
    raise StudentError(
        f"{path}: view {name} cuts the reasoning, but this cache has none: it was made without `reasoning_markers` or "
        f"`answer_regex`; make another with `logitcache generate PROMPTS {shlex.join(words)}`"
    )
