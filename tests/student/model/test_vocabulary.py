"""Students whose vocabulary is not the teacher's: more tokens, fewer, padded, renumbered."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from logitcache.errors import StudentError
from logitcache.identity import tokenizer_hash
from logitcache.student.model import vocabulary
from logitcache.student.model.load import load_student
from logitcache.student.model.vocabulary import find_ids
from tests import tiny
from tests.tiny import one_thread  # noqa: F401

THINK = ["<think>", "</think>"]  # in the text that a tokenizer's hash is made of


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tiny.write_cache(tmp_path_factory.mktemp("c") / "cache")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A cache whose traces hold no id from 32 on, of a teacher with 64."""
    logp_VV = tiny.bigram(32)
    made = [tiny.trace(i, list(range(3, 31)), logp_VV[range(3, 30)], prompts=4) for i in range(8)]
    return tiny.write_cache(tmp_path_factory.mktemp("f") / "cache", made)


def words(tokens: dict[str, int]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def teachers(vocab: int = tiny.VOCAB) -> dict[str, int]:
    return dict(sorted(tiny.tokenizer(vocab).get_vocab().items(), key=lambda item: item[1]))


def save(path: Path, tokenizer: PreTrainedTokenizerFast, rows: int) -> Path:
    tiny.model(rows).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def load(student: Path, cache, **options):
    return load_student(student, cache.identity, traces=[(cache, np.arange(len(cache)))], **options)


@pytest.fixture
def teacher(tmp_path) -> str:
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_padded_rows_of_the_same_tokenizer_are_accepted(tmp_path, cache):
    load(save(tmp_path / "s", tiny.tokenizer(), 128), cache)


@pytest.mark.parametrize("added", [["<a>"], ["<a>", "<b>", "<c>"], THINK])
def test_added_tokens_are_accepted_without_the_teachers_tokenizer(tmp_path, cache, added):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(added)
    assert tokenizer_hash(tokenizer) != cache.identity.tokenizer_hash
    student = save(tmp_path / "s", tokenizer, 72)
    load(student, cache)
    load_student(student, cache.identity)


def test_added_special_tokens_are_accepted(tmp_path, cache):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": THINK})
    load(save(tmp_path / "s", tokenizer, 67), cache)


def test_an_added_token_on_a_held_id_of_a_padded_head_is_refused(tmp_path):
    logp_VV = tiny.bigram(66)  # two columns of the teacher's head are no tokens
    held = [tiny.trace(i, [3, 4, 5, 6, 7], logp_VV[[3, 4, 5, 6]], top_k=66) for i in range(4)]
    cache = tiny.write_cache(tmp_path / "cache", held, vocab_size=66, top_k=66)
    load(save(tmp_path / "same", tiny.tokenizer(), 64), cache)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<a>"])
    with pytest.raises(
        StudentError, match=r"1 ids .* in 4 traces, as 0 of their tokens and in 16 rows.* 64 \(no token .*'<a>'"
    ):
        load(save(tmp_path / "more", tokenizer, 65), cache)


def test_a_renamed_token_is_accepted_only_if_no_trace_holds_it(tmp_path, cache, few, teacher):
    renamed = {("<think>" if token == "w40" else token): id_ for token, id_ in teachers().items()}
    student = save(tmp_path / "s", words(renamed), 64)
    load(student, few, teacher_tokenizer=teacher)
    with pytest.raises(
        StudentError, match=r"1 ids that the traces hold.*40 \('w40' to the teacher, '<think>' to the student"
    ):
        load(student, cache, teacher_tokenizer=teacher)
    with pytest.raises(StudentError, match=r"tokenizer .*use a student of.*`teacher_tokenizer`"):
        load(student, few)


def test_a_pruned_vocabulary_is_accepted_only_if_no_trace_holds_what_is_missing(tmp_path, cache, few, teacher):
    student = save(tmp_path / "s", tiny.tokenizer(40), 40)
    load(student, few, teacher_tokenizer=teacher)
    with pytest.raises(
        StudentError,
        match=r"24 ids that the .* missing to it, in 24 traces.*'w\d+' to the teacher, no row.*resize_token_emb",
    ):
        load(student, cache, teacher_tokenizer=teacher)


def test_renumbered_ids_are_refused_with_examples(tmp_path, few, teacher):
    kept = [token for token in teachers() if token not in ("w5", "w9")]
    student = save(tmp_path / "s", words({token: i for i, token in enumerate(kept)}), 64)
    with pytest.raises(
        StudentError,
        match=r"27 ids .* other tokens to it, in 8 traces.*'w\d+' to the teacher, 'w\d+' to the student",
    ):
        load(student, few, teacher_tokenizer=teacher)


def test_rows_that_the_student_lacks_matter_only_if_traces_hold_their_ids(tmp_path, cache, few):
    student = save(tmp_path / "s", tiny.tokenizer(), 60)
    load(student, few)
    with pytest.raises(
        StudentError, match=r"embedding has 60 rows, .* up to 63, in \d+ traces.*resize_token_embeddings\(64\)"
    ):
        load(student, cache)


def test_another_teachers_tokenizer_is_refused(tmp_path, cache):
    student = save(tmp_path / "s", tiny.tokenizer(prefix="o"), 64)
    with pytest.raises(StudentError, match=r"`teacher_tokenizer` .* has hash .*give the tokenizer of tiny"):
        load(student, cache, teacher_tokenizer=str(student))
    with pytest.raises(StudentError, match="`teacher_tokenizer` nowhere/at-all: cannot be loaded"):
        load(student, cache, teacher_tokenizer="nowhere/at-all")


def test_control_characters_of_a_token_are_not_printed(tmp_path, cache, teacher):
    renamed = {("\x1b[2J\u202e" if token == "w40" else token): id_ for token, id_ in teachers().items()}
    with pytest.raises(StudentError) as error:
        load(save(tmp_path / "s", words(renamed), 64), cache, teacher_tokenizer=teacher)
    assert str(error.value).isprintable()


def test_ids_are_counted_as_tokens_and_in_rows(few):
    wanted_V = np.zeros(64, bool)
    wanted_V[30] = True
    found = find_ids(wanted_V, [(few, np.arange(4))])
    rows = sum((few[i].rows.ids == 30).sum() for i in range(4))
    assert (found.ids.tolist(), found.traces, found.tokens, found.rows) == ([30], 4, 4, rows)
    assert find_ids(np.zeros(64, bool), [(few, np.arange(4))]).traces == 0


def test_a_teacher_whose_files_are_here_need_not_be_named(few, monkeypatch):
    renamed = {("<think>" if token == "w40" else token): id_ for token, id_ in teachers().items()}
    local = replace(few.identity, teacher="org/teacher")
    monkeypatch.setattr(vocabulary.AutoTokenizer, "from_pretrained", lambda name, local_files_only: tiny.tokenizer())
    vocabulary.check_vocabulary(tiny.model(64), words(renamed), local, [(few, np.arange(8))])
