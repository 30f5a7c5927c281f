"""A model's answers, natural and with the reasoning cut: a line each in a file, and one engine's life over what lacks."""

import hashlib
import json
import os
import secrets
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from logitcache import sections
from logitcache.errors import EngineError, InputError, ShardCorruptError, WriteError
from logitcache.grading import verdicts
from logitcache.inference import model
from logitcache.inference.engine import Engine, cause_in
from logitcache.inference.model import ModelFacts, ModelSpec
from logitcache.prompts import Prompt
from logitcache.runtime.console import Progress, Stop, chatter_to
from logitcache.runtime.files import LOGS
from logitcache.sections import Markers

NO_ROOM = "no room"  # finish of an answer that was never asked for: the model takes no longer texts
_BACKLOG = 64  # answers that may wait for their verdicts


class Key(NamedTuple):
    """Which answer: of a prompt, of its sample, with so many tokens of the sample's reasoning; None: nothing is cut."""

    prompt_id: str
    sample: int
    cut: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request. The four counts are of all tokens after the prompt, in their order."""

    prompt_id: str
    sample: int
    cut: int | None
    digest: str  # of the prompt, see `digest_of`
    opened: bool  # an opening delimiter stands there, in the prompt or after it
    opening: int
    reasoning: int
    closing: int
    answer: int  # an end of sequence counts here
    finish: str  # stop, length, NO_ROOM
    correct: bool | None  # None: its scoring failed
    text: str  # of the answer
    tokens: array  # "i"; what the model wrote: its completion, or what followed the closing delimiter that was forced

    @property
    def key(self) -> Key:
        return Key(self.prompt_id, self.sample, self.cut)


class AnswerFile:
    """Answers by key, appended to a file of JSON lines. A last line that a kill cut short is as if it were not there.

    Raises: ShardCorruptError for any other line that is none.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.answers = path, dict[Key, Answer]()
        whole, newline, _ = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
        self._length, self._file = len(whole + newline), None
        for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
            try:
                fields = json.loads(line)
                answer = Answer(**fields | {"tokens": array("i", fields["tokens"])})
            except (ValueError, TypeError, KeyError) as e:
                raise ShardCorruptError(
                    f"{path}:{number}: no answer of this version ({e}); remove the line, and it is asked for again"
                ) from None
            self.answers[answer.key] = answer

    def add(self, answer: Answer) -> None:
        """Raises: WriteError."""
        fields = asdict(answer) | {"tokens": answer.tokens.tolist()}
        line: bytes = (json.dumps(fields, separators=(",", ":")) + "\n").encode()
        try:
            if self._file is None:
                self._file = FileIO(self.path, "a")
                self._file.truncate(self._length)
            while line:
                line = line[self._file.write(line) or 0 :]
        except OSError as e:
            raise self._refused(e) from e
        self.answers[answer.key] = answer

    def close(self) -> None:
        """Raises: WriteError."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as e:
                raise self._refused(e) from e
            finally:
                self._file.close()

    def _refused(self, error: OSError) -> WriteError:
        return WriteError(f"{self.path}: {error.strerror}; mend that and run the same command again")


@dataclass(frozen=True, slots=True)
class Delimiters:
    """The token ids that open and close a reasoning where the model does not do so itself."""

    opening: list[int]
    closing: list[int]

    @classmethod
    def of(cls, answers: Iterable[Answer], facts: ModelFacts, markers: Markers) -> "Delimiters":
        """As the model writes them most often in natural answers; the markers' own tokens where it never does.

        A form with more in its tokens than marker and white space is none. A model that closes without having opened
        needs no opening.
        """
        tokenizer: Any = facts.tokenizer
        openings, closings = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
        for a in answers:
            start = a.opening + a.reasoning
            openings[tuple(a.tokens[: a.opening])] += a.opening > 0 or (a.closing > 0 and not a.opened)
            closings[tuple(a.tokens[start : start + a.closing])] += 1

        def usual(marker: str | None, forms: Counter[tuple[int, ...]], allowed: tuple[str | None, ...]) -> list[int]:
            for form, count in forms.most_common():
                if count and tokenizer.decode(list(form)).strip() in allowed:
                    return list(form)
            return tokenizer(marker, add_special_tokens=False)["input_ids"]

        return cls(
            usual(markers.opening, openings, (markers.opening, "")),
            usual(markers.closing, closings, (markers.closing,)),
        )


@dataclass(frozen=True)
class Questions:
    """What a model is asked, and how its answers are read."""

    spec: ModelSpec  # max_tokens is of natural completions
    facts: ModelFacts
    markers: Markers
    prompts: dict[str, Prompt]  # by id
    samples: int
    cuts: Callable[[int], set[int]]  # where a reasoning of so many tokens is cut
    answer_tokens: int  # at most, after a forced closing
    verifier: str

    def natural(self) -> list[Key]:
        return [Key(prompt_id, i, None) for prompt_id in self.prompts for i in range(self.samples)]

    def forced(self, answers: dict[Key, Answer]) -> list[Key]:
        """The cuts of each natural answer, which must be there; those of one sample follow each other."""
        return [key._replace(cut=cut) for key in self.natural() for cut in sorted(self.cuts(answers[key].reasoning))]

    def missing(self, answers: dict[Key, Answer]) -> list[Key]:
        """What is to be asked next: natural answers, and when all are there the others."""
        lacks = [key for key in self.natural() if key not in answers]
        return lacks or [key for key in self.forced(answers) if key not in answers]


class Run:
    """One engine's life over what is missing. What was answered is in the file, whatever ends it.

    Args:
        delimiters: None: decided by the natural answers, once all are there.
        publish: called with them when the engine stands, and again when they are decided.
        out: the log goes into its ``logs``.
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
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self.log = out / LOGS / f"eval-{stamp}-{secrets.token_hex(3)}-{os.getpid()}.log"
        self.prompt_ids: dict[str, list[int]] = {}
        self.backlog: deque[Future[None]] = deque()
        self.finisher = ThreadPoolExecutor(1, thread_name_prefix="verdicts")

    def work(self) -> str | None:
        """Asks for all that is missing; returns the name of the signal that ended it early.

        Raises: InputError before anything is asked, EngineError and WriteError, after which another run goes on.
        """
        asked, answers = self.questions, self.file.answers
        for prompt in asked.prompts.values():
            self.prompt_ids[prompt.id] = self._render(prompt)
        with ExitStack() as stack:
            terminal = stack.enter_context(chatter_to(self.log))
            stop = stack.enter_context(Stop())
            print(f"loading {asked.facts.name} (log: {self.log})", file=terminal)
            try:
                engine = Engine(replace(asked.spec, dtype=asked.facts.dtype), self._seed())
            except EngineError as e:
                raise self._explain(e) from e
            stack.callback(engine.close)
            for prompt_id, ids in self.prompt_ids.items():
                if not 0 < len(ids) < engine.max_model_len:
                    raise InputError(
                        f"prompt {prompt_id!r}: {len(ids)} tokens, the model takes 1 to {engine.max_model_len - 1}; "
                        f"`engine_args` max_model_len={len(ids) + 1} may take it, else leave it out"
                    )
            self.publish(self.delimiters)  # not before: a setting that the engine refuses leaves nothing behind
            stop.patient = True
            stack.callback(self.finisher.shutdown)
            try:
                while (missing := asked.missing(answers)) and not stop.signal:
                    natural = missing[0].cut is None
                    if not natural and self.delimiters is None:
                        self.delimiters = Delimiters.of(
                            map(answers.__getitem__, asked.natural()), asked.facts, asked.markers
                        )
                        self.publish(self.delimiters)
                    what = "completions" if natural else "answers after a cut"
                    with Progress(terminal, len(missing), what) as progress:
                        self._drive(engine, missing, stop, progress)
            except EngineError as e:
                if not stop.signal:  # a Ctrl-C reaches the engine's processes too
                    raise self._explain(e) from e
            return stop.signal if asked.missing(answers) else None

    def _render(self, prompt: Prompt) -> list[int]:
        asked = self.questions
        ids = model.render(asked.facts, prompt, asked.spec.template_args)
        spans = sections.find(model.pieces(asked.facts, ids), len(ids), asked.markers)
        if spans.reasoning_end < spans.answer_start and asked.cuts(0):
            raise InputError(
                f"prompt {prompt.id!r}: the chat template closes the reasoning before it began, so there is none to cut; "
                "switch it on by `template_args`, or give `budgets` none"
            )
        return ids

    def _seed(self) -> int:
        """As for caches: an engine begins its sampler anew, and one seed for two would repeat the answers."""
        key = f"{self.questions.spec.seed} {list(self.questions.missing(self.file.answers)[0])}"
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") >> 1

    def _drive(self, engine: Engine, missing: list[Key], stop: Stop, progress: Progress) -> None:
        window = engine.max_num_seqs + max(8, engine.max_num_seqs // 4)
        queue, flying = deque(missing), dict[str, Key]()
        try:
            while not stop.signal:
                while queue and len(flying) < window and not stop.signal:
                    key = queue.popleft()
                    ids = self._ids(key)
                    if len(ids) >= engine.max_model_len:
                        self._later(self._keep, key, [], NO_ROOM)
                        progress.add(1, 0)
                        continue
                    flying[name := str(list(key))] = key
                    asked = self.questions
                    engine.submit(name, ids, asked.spec.max_tokens if key.cut is None else asked.answer_tokens)
                if not flying:
                    return
                for completion in engine.step():
                    tokens = completion.token_ids[completion.prompt_length :].tolist()
                    self._later(self._keep, flying.pop(completion.key), tokens, completion.finish_reason)
                    progress.add(1, len(tokens))
                progress.tick()
        finally:
            while self.backlog:
                self.backlog.popleft().result()

    def _ids(self, key: Key) -> list[int]:
        """What the model continues: the prompt, or with it the reasoning up to the cut and a closing delimiter."""
        prompt_ids = self.prompt_ids[key.prompt_id]
        if key.cut is None:
            return prompt_ids
        assert self.delimiters is not None
        natural = self.file.answers[key._replace(cut=None)]
        opening = self._opening(natural)
        return [*prompt_ids, *opening, *natural.tokens[natural.opening :][: key.cut], *self.delimiters.closing]

    def _opening(self, natural: Answer) -> list[int]:
        """The sample's own; the model's usual one where it wrote no delimiter at all."""
        if natural.opened or natural.closing:
            return natural.tokens[: natural.opening].tolist()
        assert self.delimiters is not None
        return self.delimiters.opening

    def _later(self, work: Callable[..., None], *args: Any) -> None:
        """Hands work to the finisher, for verdicts may take seconds; what failed there fails here."""
        while self.backlog and (self.backlog[0].done() or len(self.backlog) > _BACKLOG):
            self.backlog.popleft().result()
        self.backlog.append(self.finisher.submit(work, *args))

    def _keep(self, key: Key, tokens: list[int], finish: str) -> None:
        """Reads a finished answer's sections, judges it, and puts it into the file."""
        asked, prompt = self.questions, self.questions.prompts[key.prompt_id]
        ended = bool(tokens) and tokens[-1] in asked.facts.eos_ids
        if key.cut is None:
            prompt_ids = self.prompt_ids[prompt.id]
            pieces = model.pieces(asked.facts, [*prompt_ids, *tokens])
            spans = sections.find(pieces, len(prompt_ids), asked.markers)
            said = pieces[spans.answer_start : len(pieces) - ended]
            opened = spans.prompt_end < spans.reasoning_start
            # What the template put into the prompt counts as prompt.
            _, start, end, close, length = (max(0, bound - len(prompt_ids)) for bound in spans.bounds())
            # Of an answer that ended in its reasoning, the end of sequence is no reasoning.
            opening, reasoning, closing = start, end - start - (ended and start < end == length), close - end
        else:
            assert self.delimiters is not None
            natural = self.file.answers[key._replace(cut=None)]
            forced = self.delimiters.closing
            said = model.pieces(asked.facts, [*forced, *tokens])[len(forced) : len(forced) + len(tokens) - ended]
            opened, opening = True, len(self._opening(natural))
            reasoning, closing = key.cut, len(forced)
        text = "".join(piece or "" for piece in said)
        correct = verdicts.verdict(asked.verifier, text, prompt.answer, prompt.metadata)
        answer = len(tokens) - (opening + reasoning + closing if key.cut is None else 0)
        counts = opening, reasoning, closing, answer
        self.file.add(Answer(*key, digest_of(prompt), opened, *counts, finish, correct, text, array("i", tokens)))

    def _explain(self, error: EngineError) -> EngineError:
        what = ": ".join(filter(None, (str(error), cause_in(self.log))))
        return EngineError(f"{what}; every answer is safe: mend that and run the same command again ({self.log})")


def digest_of(prompt: Prompt) -> str:
    """Hash of a prompt with all that a verdict reads."""
    judged = json.dumps([prompt.digest(), prompt.answer, prompt.metadata.get("gym")], sort_keys=True)
    return hashlib.blake2b(judged.encode(), digest_size=16).hexdigest()
