"""Rows of text that exists; test_engine.py holds them against those of generate, through the real engine."""

import json
from pathlib import Path

import numpy as np
import pytest

from logitcache.cache import Cache
from logitcache.errors import IdentityError, InputError, PromptsError
from logitcache.generate import GenerateOptions, generate
from logitcache.score import Crop, ScoreOptions, score
from logitcache.teacher import TeacherSpec
from logitcache.verify import verify
from tests import fake_engine


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    return fake_engine.install(monkeypatch)


@pytest.fixture
def texts(tmp_path) -> Path:
    rows = [
        {"id": f"p{i // 2}", "prompt": f"question {i // 2}", "completion": f"<think> w{i} </think> w{i}", "level": i}
        for i in range(6)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "t.jsonl"


def options(source, out: Path, **changes) -> ScoreOptions:
    spec = TeacherSpec("fake", top_k=8, prompt_logits=changes.pop("prompt_logits", False))
    return ScoreOptions(str(source), out, spec, **{"unit_size": 2, **changes})


def test_text_becomes_traces_with_rows_of_the_completion(texts, tmp_path) -> None:
    assert score(options(texts, tmp_path / "c")).made == 6
    cache = Cache.open(tmp_path / "c")
    assert sorted((t.prompt_id, t.sample_index) for t in cache) == [(f"p{i}", s) for i in range(3) for s in range(2)]
    for trace in cache:
        assert trace.sections.prompt_end == trace.row_start == 2
        assert trace.token_ids[-1] == fake_engine.VOCAB - 1, "what stopped ends with the end of sequence"
        assert trace.sections.sizes()["reasoning"] == trace.sections.sizes()["answer"] - 1 == 1
        assert len(trace.rows) == len(trace.token_ids) - 2 == len(trace.token_logprob)
        assert trace.metadata == {"level": 2 * int(trace.prompt_id[1:]) + trace.sample_index}
        assert trace.finish_reason == "stop"
    assert cache.identity.derived == ["score"]
    assert cache.identity.sampling == {}, "nothing was sampled from this teacher"
    assert verify(tmp_path / "c", workers=1) == []
    assert score(options(texts, tmp_path / "c")).made == 0


def test_rows_of_the_prompt_and_text_without_an_end(texts, tmp_path) -> None:
    score(options(texts, tmp_path / "c", prompt_logits=True, eos=False))
    for trace in Cache.open(tmp_path / "c"):
        assert trace.row_start == 1
        assert trace.token_ids[-1] != fake_engine.VOCAB - 1


def test_a_row_without_a_completion_is_named(tmp_path) -> None:
    (tmp_path / "t.jsonl").write_text('{"prompt": "question"}')
    with pytest.raises(PromptsError, match=r"t\.jsonl.*`completion` is a NoneType, expected text"):
        score(options(tmp_path / "t.jsonl", tmp_path / "c"))
    assert not (tmp_path / "c" / "shards").exists()


@pytest.fixture
def generated(tmp_path) -> Path:
    (tmp_path / "p.jsonl").write_text("\n".join(f'{{"id": "p{i}", "prompt": "question {i}"}}' for i in range(7)))
    generate(GenerateOptions(str(tmp_path / "p.jsonl"), tmp_path / "g", TeacherSpec("fake", top_k=8), samples=2))
    return tmp_path / "g"


def test_the_tokens_of_another_cache_keep_their_sections_and_get_new_rows(generated, tmp_path) -> None:
    assert score(options(generated, tmp_path / "c")).made == 14
    there = {(t.prompt_id, t.sample_index): t for t in Cache.open(generated)}
    for trace in Cache.open(tmp_path / "c"):
        source = there[trace.prompt_id, trace.sample_index]
        np.testing.assert_array_equal(trace.token_ids, source.token_ids)
        assert (trace.sections, trace.text, trace.row_start) == (source.sections, source.text, source.row_start)
        assert trace.trace_id != source.trace_id
    assert verify(tmp_path / "c", workers=1) == []


def test_a_crop_is_scored_without_what_it_leaves_out(generated, tmp_path) -> None:
    score(options(generated, tmp_path / "c", crop=Crop("right", 0.5)))
    there = {(t.prompt_id, t.sample_index): t for t in Cache.open(generated)}
    cache = Cache.open(tmp_path / "c")
    assert cache.identity.derived == ["score --crop right:0.5"]
    for trace in cache:
        source = there[trace.prompt_id, trace.sample_index]
        cut = len(source.token_ids) - len(trace.token_ids)
        assert len(trace.token_ids) == len(source.token_ids) // 2
        np.testing.assert_array_equal(trace.token_ids, source.token_ids[cut:])
        assert trace.sections.bounds() == tuple(max(0, b - cut) for b in source.sections.bounds())
        assert trace.row_start == max(1, trace.sections.prompt_end), "nothing predicts the first token of a crop"
        assert source.text.endswith(trace.text)
    assert verify(tmp_path / "c", workers=1) == []
    with pytest.raises(IdentityError, match=r"holds traces score --crop right:0.5, this run would add traces score;"):
        score(options(generated, tmp_path / "c"))


@pytest.mark.parametrize(
    ("crop", "length", "span"),
    [
        ("left:0.5", 9, (0, 4)),
        ("middle:0.5", 9, (2, 6)),
        ("right:0.5", 9, (5, 9)),
        ("right:0.01", 9, (8, 9)),
        ("left:1", 3, (0, 3)),
    ],
)
def test_a_crop_is_a_span_of_tokens(crop, length, span) -> None:
    assert Crop.parse(crop).span(length) == slice(*span)


@pytest.mark.parametrize("text", ["right", "right:0", "right:1.5", "top:0.5", "right:half", ""])
def test_a_crop_that_is_none_is_refused(text) -> None:
    with pytest.raises(InputError, match="write left:SHARE, middle:SHARE or right:SHARE"):
        Crop.parse(text)


def test_a_crop_of_one_token_is_passed_by(generated, tmp_path) -> None:
    summary = score(options(generated, tmp_path / "c", crop=Crop("right", 0.01)))
    assert summary.made == 0
    assert "1 tokens, the teacher takes 2 to" in next(iter(summary.skipped.values()))


def test_sources_that_cannot_be_scored_are_refused(generated, texts, tmp_path, monkeypatch) -> None:
    with pytest.raises(InputError, match="--crop cuts the traces of a cache"):
        score(options(texts, tmp_path / "c", crop=Crop("left", 0.5)))
    with pytest.raises(InputError, match="is a directory and no cache"):
        score(options(tmp_path, tmp_path / "c"))
    with pytest.raises(InputError, match="is the cache to score"):
        score(options(generated, generated))
    from dataclasses import replace

    from logitcache import teacher

    monkeypatch.setattr(teacher, "inspect", lambda spec: replace(fake_engine.facts(spec), tokenizer_hash="other"))
    with pytest.raises(InputError, match="its token ids mean other tokens; score the text instead"):
        score(options(generated, tmp_path / "c"))
