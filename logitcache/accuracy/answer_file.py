"""Answers on disk: a file of JSON lines, appended as answers finish."""

import hashlib
import json
import os
from array import array
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from logitcache.errors import ShardCorruptError, WriteError
from logitcache.prompts import Prompt

NO_ROOM = "no room"  # finish of an answer that was not requested, since it would exceed the model's context


class Key(NamedTuple):
    """Identifies an answer: prompt, sample, and the number of tokens its reasoning is cut to; None: not cut."""

    prompt_id: str
    sample: int
    cut: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one request. The four counts cover all tokens after the prompt, in this order."""

    prompt_id: str
    sample: int
    cut: int | None
    digest: str  # of the prompt, see `digest_of`
    opened: bool  # there is an opening delimiter, in the prompt or after it
    opening: int
    reasoning: int
    closing: int
    answer: int  # an end of sequence counts here
    finish: str  # stop, length, NO_ROOM
    correct: bool | None  # None: grading it failed
    text: str  # of the answer
    tokens: array  # "i"; what the model wrote: its completion, or what followed the closing delimiter that was forced

    @property
    def key(self) -> Key:
        return Key(self.prompt_id, self.sample, self.cut)


class AnswerFile:
    """Answers by key, appended to a file of JSON lines. A last line that a kill cut short is ignored.

    Raises: ShardCorruptError for any other line that is not an answer.
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
                    f"{path}:{number}: not an answer of this version ({e}); remove the line to have it made again"
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
        return WriteError(f"{self.path}: {error.strerror}; fix that, then run the same command to resume")


def digest_of(prompt: Prompt) -> str:
    """Hash of a prompt with everything that grading reads."""
    graded = json.dumps([prompt.digest(), prompt.answer, prompt.metadata.get("gym")], sort_keys=True)
    return hashlib.blake2b(graded.encode(), digest_size=16).hexdigest()
