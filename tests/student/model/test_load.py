from dataclasses import replace

import pytest
from transformers import (
    LlamaModel,
)

from logitcache.errors import StudentError
from logitcache.student.data.dataset import TraceDataset
from logitcache.student.model.load import load_student
from tests import tiny
from tests.tiny import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return TraceDataset(tiny.write_cache(tmp_path_factory.mktemp("cache") / "cache"))


def test_a_student_with_another_tokenizer_is_refused_with_both_hashes(tmp_path):
    path = tiny.save_model(tmp_path, prefix="other")
    with pytest.raises(StudentError, match=f"tokenizer .* {tiny.identity().tokenizer_hash}.*family"):
        load_student(path, tiny.identity())


def test_a_student_with_fewer_rows_than_ids_is_refused_with_the_way_out(tmp_path):
    tiny.model(vocab=60).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=r"has 60 rows, the cache's ids go up to 63.*resize_token_embeddings\(64\)"):
        load_student(tmp_path, tiny.identity())


def test_a_teacher_with_padded_logits_may_teach_a_student_without(tmp_path):
    load_student(tiny.save_model(tmp_path), replace(tiny.identity(), vocab_size=128))


def test_a_missing_model_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "does not exist: give `student`"), ("empty", "is not a causal language model")):
        with pytest.raises(StudentError, match=message) as error:
            load_student(tmp_path / name, tiny.identity())
        assert "\n" not in str(error.value)


def test_a_model_without_its_head_is_refused(tmp_path):
    config = tiny.model(tie_word_embeddings=False).config
    LlamaModel(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=r"1 weights of LlamaForCausalLM are missing, such as lm_head\.weight"):
        load_student(tmp_path, tiny.identity())
