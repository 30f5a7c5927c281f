import json
import os
from array import array
from pathlib import Path

import pytest

from logitcache.accuracy.answer_file import Answer, AnswerFile
from logitcache.errors import ShardCorruptError, WriteError

ANSWER = Answer("p", 0, None, "d", True, 1, 2, 1, 3, "stop", True, "text\x1b", array("i", [1, 2]))


def write(path: Path) -> None:
    file = AnswerFile(path)
    file.add(ANSWER)
    file.close()


@pytest.mark.parametrize("stand", ["link", "link to nothing", "fifo", "directory"])
def test_answers_are_read_from_and_added_to_a_regular_file_only(tmp_path: Path, stand: str) -> None:
    write(tmp_path / "real")
    before, path = (tmp_path / "real").read_bytes(), tmp_path / "answers.jsonl"
    made = {"link": lambda: path.symlink_to("real"), "link to nothing": lambda: path.symlink_to("nothing")}
    (made | {"fifo": lambda: os.mkfifo(path), "directory": path.mkdir})[stand]()
    with pytest.raises(ShardCorruptError, match=r"answers\.jsonl: is "):
        AnswerFile(path)
    assert (tmp_path / "real").read_bytes() == before
    assert not (tmp_path / "nothing").exists()


def test_a_link_that_comes_later_is_not_written_through(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "answers.jsonl").symlink_to("mine")
    with pytest.raises(WriteError, match="is a link"):
        file.add(ANSWER)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"reasoning": "2"}, {"reasoning": True}, {"correct": 1}, {"tokens": [1 << 40]}, {"tokens": "ab"}, {"tokens": 3},
        {"finish": None}, {"cut": 1.5}, {"prompt_id": ["p"]}, {"more": 1}, {"tokens": [1.5]},
    ],
)  # fmt: skip
def test_an_answer_of_other_types_is_named_by_its_line(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "answers.jsonl"
    write(path)
    line = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ShardCorruptError, match=r"answers\.jsonl:2: not an answer of this version"):
        AnswerFile(path)


@pytest.mark.parametrize("line", ["[" * 100_000, "[]", "3", '"x"', "{}", "\x00"])
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, line: str) -> None:
    write(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text() + line + "\n")
    with pytest.raises(ShardCorruptError, match=r"a\.jsonl:2: not an answer"):
        AnswerFile(tmp_path / "a.jsonl")
