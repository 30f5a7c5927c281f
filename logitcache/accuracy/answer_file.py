"""Answers on disk: a file of JSON lines, appended as answers finish."""

import hashlib
import json
import os
from array import array
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from logitcache.errors import ShardCorruptError, WriteError
from logitcache.prompts import Prompt
from logitcache.runtime.regular_files import descriptor_of, open_regular

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
        whole, newline, _ = _read(path).rpartition(b"\n")
        self._length, self._file = len(whole + newline), None
        for number, line in enumerate(whole.split(b"\n") if newline else [], 1):
            try:
                found = json.loads(line)
                answer = Answer(**found | {"tokens": array("i", found["tokens"])})
                _check(answer)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as e:
                raise ShardCorruptError(
                    f"{path}:{number}: not an answer of this version ({e}); remove the line to have it made again"
                ) from None
            self.answers[answer.key] = answer

    def add(self, answer: Answer) -> None:
        """Raises: WriteError."""
        found = asdict(answer) | {"tokens": answer.tokens.tolist()}
        line: bytes = (json.dumps(found, separators=(",", ":")) + "\n").encode()
        try:
            if self._file is None:
                self._file = FileIO(descriptor_of(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a")
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


def _read(path: Path) -> bytes:
    """The bytes of the file; none if there is no file yet. Raises: ShardCorruptError for a link, and for what is no file."""
    if not os.path.lexists(path):
        return b""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as e:
        raise ShardCorruptError(f"{path}: {e.strerror}; put the file itself there, or move it away") from e


def _check(answer: Answer) -> None:
    """Raises: TypeError for a field of another type."""
    for field in fields(Answer):
        value, kind = getattr(answer, field.name), field.type
        assert not isinstance(kind, str)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise TypeError(f"{field.name} is {value!r}")
