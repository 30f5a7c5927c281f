"""Generates answers: first natural completions, then those after a reasoning that was cut and closed."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from logitcache.accuracy.answer_file import NO_ROOM, Answer, AnswerFile, Key, digest_of
from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.inference.engine import Completion
from logitcache.inference.model import ModelFacts, ModelSpec, Sampling
from logitcache.inference.rendering import render
from logitcache.inference.session import EngineRequest, Session, pulled_from
from logitcache.inference.token_texts import token_texts
from logitcache.prompts import Prompt
from logitcache.sections import Finder, Markers

Allowed = Callable[[list[str | None], tuple[int, ...]], bool]  # text of each token, ids


@dataclass(frozen=True, slots=True)
class Delimiters:
    """Token ids that open and close a reasoning when the model does not do so itself."""

    opening: list[int]
    closing: list[int]

    @classmethod
    def of(cls, answers: Iterable[Answer], facts: ModelFacts, markers: Markers) -> "Delimiters":
        """The form that the model writes most often in natural answers, else the tokens of the markers.

        A form counts only if it is the marker with white space, for a format of several tokens its whole hand-over. A
        model that closes a reasoning it did not open needs no opening.
        """
        tokenizer: Any = facts.tokenizer
        finder = Finder.of(tokenizer, markers)
        openings, closings = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
        for a in answers:
            start = a.opening + a.reasoning
            openings[tuple(a.tokens[: a.opening])] += a.opening > 0 or (a.closing > 0 and not a.opened)
            closings[tuple(a.tokens[start : start + a.closing])] += 1

        def usual(marker: str | None, forms: Counter[tuple[int, ...]], allowed: Allowed) -> list[int]:
            for form, count in forms.most_common():
                if count and allowed(token_texts(facts, list(form)), form):
                    return list(form)
            return tokenizer(marker, add_special_tokens=False)["input_ids"]

        form = markers.format
        return cls(
            usual(markers.opening, openings, lambda pieces, ids: not ids or finder.is_opening(pieces, ids)),
            usual(form and form.hand_over(tokenizer.get_vocab()), closings, finder.is_closing),
        )


@dataclass(frozen=True)
class Questions:
    """What to ask a model, and how to read its answers."""

    spec: ModelSpec
    sampling: Sampling  # its max_tokens is the limit of natural completions
    facts: ModelFacts
    markers: Markers
    prompts: dict[str, Prompt]  # by id
    samples: int
    cuts: Callable[[int], set[int]]  # where a reasoning of so many tokens is cut
    answer_tokens: int  # longest answer after a forced closing
    verifier: str

    def natural(self) -> list[Key]:
        return [Key(prompt_id, i, None) for prompt_id in self.prompts for i in range(self.samples)]

    def forced(self, answers: dict[Key, Answer]) -> list[Key]:
        """The cuts of each natural answer, all of which must exist. Cuts of one sample are adjacent."""
        return [key._replace(cut=cut) for key in self.natural() for cut in sorted(self.cuts(answers[key].reasoning))]

    def missing(self, answers: dict[Key, Answer]) -> list[Key]:
        """What to ask next: natural answers, then, once all exist, forced ones."""
        natural = [key for key in self.natural() if key not in answers]
        return natural or [key for key in self.forced(answers) if key not in answers]


class Run:
    """Generates the missing answers with one engine. Every finished answer is in the file, however the run ends.

    Args:
        delimiters: None: decided from the natural answers, once all exist.
        publish: called with the delimiters once the engine is loaded, and again when they are decided.
        out: directory whose ``logs`` holds the engine's log.
    """

    def __init__(
        self,
        questions: Questions,
        file: AnswerFile,
        delimiters: Delimiters | None,
        publish: Callable[[Delimiters | None], None],
        out: Path,
    ) -> None:
        self.questions, self.file, self.delimiters, self.publish = questions, file, delimiters, publish
        self.out = out
        self.prompt_ids: dict[str, list[int]] = {}
        self.finder = Finder.of(questions.facts.tokenizer, questions.markers)

    def work(self) -> str | None:
        """Returns: the name of the signal that stopped it, or None.

        Raises: InputError before anything is generated; EngineError and WriteError, after which another run resumes.
        """
        asked, answers = self.questions, self.file.answers
        for prompt in asked.prompts.values():
            self.prompt_ids[prompt.id] = self._render(prompt)
        with Session(
            replace(asked.spec, dtype=asked.facts.dtype),
            asked.sampling,
            out=self.out,
            name="eval",
            first=str(list(asked.missing(answers)[0])),
            kept="every answer",
            greeting=f"loading {asked.facts.name}",
        ) as self.session:
            self._refuse_long_prompts()
            self.publish(self.delimiters)  # only now, so that settings which the engine refuses leave nothing behind
            while (missing := asked.missing(answers)) and not self.session.stopped:
                natural = missing[0].cut is None
                if not natural and self.delimiters is None:
                    every = map(answers.__getitem__, asked.natural())
                    self.delimiters = Delimiters.of(every, asked.facts, asked.markers)
                    self.publish(self.delimiters)
                what = "completions" if natural else "answers after a cut"
                try:
                    self.session.run(pulled_from(self._requests(missing)), self._finish, total=len(missing), what=what)
                finally:
                    self.session.finish()
        return self.session.stopped if asked.missing(answers) else None

    def _render(self, prompt: Prompt) -> list[int]:
        asked = self.questions
        ids = render(asked.facts, prompt, asked.spec.template_args)
        spans = self.finder.find(token_texts(asked.facts, ids), len(ids), ids).sections
        if spans.reasoning_end < spans.answer_start and asked.cuts(0):
            raise InputError(
                f"prompt {prompt.id!r}: the chat template closes the reasoning before it begins, so there is none to cut; "
                "switch it on with `template_args`, or set `budgets` to none"
            )
        return ids

    def _refuse_long_prompts(self) -> None:
        most = self.session.max_model_len - 1
        for prompt_id, ids in self.prompt_ids.items():
            if not 0 < len(ids) <= most:
                raise InputError(
                    f"prompt {prompt_id!r}: {len(ids)} tokens, the model takes 1 to {most}; remove the prompt, or try "
                    f"`engine_args` max_model_len={len(ids) + 1}"
                )

    def _requests(self, missing: list[Key]) -> Iterator[EngineRequest]:
        asked = self.questions
        self.keys: dict[str, Key] = {}
        for key in missing:
            ids = self._ids(key)
            if len(ids) >= self.session.max_model_len:
                self.session.later(self._keep, key, [], NO_ROOM)
                assert self.session.progress is not None
                self.session.progress.add(1, 0)
                continue
            self.keys[name := str(list(key))] = key
            longest = asked.sampling.max_tokens if key.cut is None else asked.answer_tokens
            yield EngineRequest(name, ids, longest)

    def _finish(self, completion: Completion) -> int:
        tokens = completion.token_ids[completion.prompt_length :].tolist()
        self.session.later(self._keep, self.keys.pop(completion.key), tokens, completion.finish_reason)
        return len(tokens)

    def _ids(self, key: Key) -> list[int]:
        """The tokens that the model continues: the prompt, and for a cut also the reasoning up to it and a closing delimiter."""
        prompt_ids = self.prompt_ids[key.prompt_id]
        if key.cut is None:
            return prompt_ids
        assert self.delimiters is not None
        natural = self.file.answers[key._replace(cut=None)]
        return [*prompt_ids, *self._opening(natural), *self._kept(natural, key.cut), *self.delimiters.closing]

    def _kept(self, natural: Answer, cut: int) -> list[int]:
        """What is kept of the reasoning."""
        kept = natural.tokens[natural.opening :][:cut].tolist()
        return kept[: self.finder.usable(token_texts(self.questions.facts, kept), kept)]

    def _opening(self, natural: Answer) -> list[int]:
        """The sample's own opening delimiter; the usual one for a sample without delimiters."""
        if natural.opened or natural.closing:
            return natural.tokens[: natural.opening].tolist()
        assert self.delimiters is not None
        return self.delimiters.opening

    def _keep(self, key: Key, tokens: list[int], finish: str) -> None:
        """Finds a finished answer's sections, grades it and appends it to the file."""
        asked, prompt = self.questions, self.questions.prompts[key.prompt_id]
        ended = bool(tokens) and tokens[-1] in asked.facts.eos_ids
        found = self._read_natural(key, tokens, ended) if key.cut is None else self._read_forced(key, tokens, ended)
        correct = verdicts.verdict(asked.verifier, found.text, prompt.answer, prompt.metadata)
        counts = found.opening, found.reasoning, found.closing, found.answer
        digest, written = digest_of(prompt), array("i", tokens)
        self.file.add(Answer(*key, digest, found.opened, *counts, finish, correct, found.text, written))

    def _read_natural(self, key: Key, tokens: list[int], ended: bool) -> "_Reading":
        prompt_ids = self.prompt_ids[key.prompt_id]
        texts = token_texts(self.questions.facts, [*prompt_ids, *tokens])
        if ended:
            texts[-1] = None
        found = self.finder.find(texts, len(prompt_ids), [*prompt_ids, *tokens])
        spans = found.sections
        # Delimiters that the template put into the prompt count as prompt.
        _, start, end, close, length = (max(0, bound - len(prompt_ids)) for bound in spans.bounds())
        reasoning = end - start - (ended and start < end == length)  # the end of sequence does not count as reasoning
        return _Reading(
            opened=spans.prompt_end < spans.reasoning_start,
            opening=start,
            reasoning=reasoning,
            closing=close - end,
            answer=len(tokens) - start - reasoning - (close - end),
            text="".join(text or "" for text in texts[len(prompt_ids) :])[found.answer],
        )

    def _read_forced(self, key: Key, tokens: list[int], ended: bool) -> "_Reading":
        assert self.delimiters is not None
        assert key.cut is not None
        closing, natural = self.delimiters.closing, self.file.answers[key._replace(cut=None)]
        ids = [*closing, *tokens]
        texts = token_texts(self.questions.facts, ids)
        if ended:
            texts[-1] = None
        answer = self.finder.find(texts, len(closing), ids).answer  # the forced closing reads as that of a prompt
        return _Reading(
            opened=True,
            opening=len(self._opening(natural)),
            reasoning=len(self._kept(natural, key.cut)),
            closing=len(closing),
            answer=len(tokens),
            text="".join(text or "" for text in texts[len(closing) :])[answer],
        )


class _Reading(NamedTuple):
    """Token counts of an answer's sections, and the text of its answer section."""

    opened: bool
    opening: int
    reasoning: int
    closing: int
    answer: int
    text: str
