"""Rows of text that exists; test_engine.py holds them against those of generate, through the real engine."""

import json
from pathlib import Path

import numpy as np
import pytest

from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.capture.generate import GenerateOptions, generate
from logitcache.capture.score import Crop, ScoreOptions, score
from logitcache.errors import IdentityError, InputError, NotACacheError, PromptsError
from logitcache.inference import session
from logitcache.inference.engine import Completion
from logitcache.sections import Markers
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


def options(source: Path, out: Path, **changes) -> ScoreOptions:
    where = {"from_cache": source} if source.is_dir() else {"traces": str(source)}
    return ScoreOptions(out=out, **where, **{"teacher": "fake", "top_k": 8, "unit_size": 2, **changes})


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
    with pytest.raises(PromptsError, match=r"t\.jsonl.*no `completion`, and no assistant turn"):
        score(options(tmp_path / "t.jsonl", tmp_path / "c"))
    assert not (tmp_path / "c" / "shards").exists()


@pytest.fixture
def generated(tmp_path) -> Path:
    (tmp_path / "p.jsonl").write_text("\n".join(f'{{"id": "p{i}", "prompt": "question {i}"}}' for i in range(7)))
    generate(GenerateOptions(prompts=str(tmp_path / "p.jsonl"), out=tmp_path / "g", teacher="fake", top_k=8, samples=2))
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
    assert cache.identity.derived == [f"score --from-cache {Cache.open(generated).identity.digest} --crop right:0.5"]
    for trace in cache:
        source = there[trace.prompt_id, trace.sample_index]
        cut = len(source.token_ids) - len(trace.token_ids)
        assert len(trace.token_ids) == len(source.token_ids) // 2
        np.testing.assert_array_equal(trace.token_ids, source.token_ids[cut:])
        assert trace.sections.bounds() == tuple(max(0, b - cut) for b in source.sections.bounds())
        assert trace.row_start == max(1, trace.sections.prompt_end), "nothing predicts the first token of a crop"
        start = max(trace.sections.prompt_end, 0)
        assert trace.text == "".join(fake_engine.WORDS[i] for i in trace.token_ids[start:-1])
    assert verify(tmp_path / "c", workers=1) == []
    with pytest.raises(IdentityError, match=r"holds traces score --from-cache \w+ --crop right:0.5, this run would"):
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
    with pytest.raises(InputError, match="`crop` cuts the traces of a cache"):
        score(options(texts, tmp_path / "c", crop=Crop("left", 0.5)))
    with pytest.raises(NotACacheError, match="no manifest.json in it"):
        score(options(tmp_path, tmp_path / "c"))
    with pytest.raises(InputError, match="`eos`: `from_cache` takes tokens as they are"):
        score(options(generated, tmp_path / "c", eos=False))
    with pytest.raises(InputError, match="`answer_regex`: `from_cache` takes tokens and sections as they are"):
        score(options(generated, tmp_path / "c", answer_regex="x"))
    with pytest.raises(InputError, match="is the cache to score"):
        score(options(generated, generated))
    from dataclasses import replace

    from logitcache.inference import model

    monkeypatch.setattr(model, "inspect_model", lambda spec: replace(fake_engine.facts(spec), tokenizer_hash="other"))
    with pytest.raises(InputError, match="its token ids mean other tokens; score the text instead"):
        score(options(generated, tmp_path / "c"))


@pytest.fixture
def captured(monkeypatch, engine) -> dict[str, Completion]:
    """What the engine gave, by trace id."""
    seen: dict[str, Completion] = {}

    class Spy(engine):
        def step(self):
            made = super().step()
            seen.update({c.key: c for c in made})
            return made

    monkeypatch.setattr(session, "Engine", Spy)
    return seen


@pytest.mark.parametrize(
    "crop", [None, Crop("left", 0.5), Crop("middle", 0.5), Crop("right", 0.6), Crop("right", 0.99)]
)
@pytest.mark.parametrize("prompt_logits", [False, True])
def test_each_row_is_the_engines_row_of_its_token(generated, tmp_path, captured, crop, prompt_logits) -> None:
    score(options(generated, tmp_path / "c", crop=crop, prompt_logits=prompt_logits, exact=True, pin_tokens="none"))
    cache = Cache.open(tmp_path / "c")
    assert len(cache) == 14
    for trace in cache:
        given = captured[trace.trace_id]  # rows of tokens 1, 2, ...
        assert trace.row_start == (1 if prompt_logits else max(1, trace.sections.prompt_end))
        np.testing.assert_array_equal(given.token_ids, trace.token_ids)
        np.testing.assert_array_equal(trace.ids, given.ids_RK[trace.row_start - 1 :].ravel())
        np.testing.assert_array_equal(trace.logprobs, given.logprobs_RK[trace.row_start - 1 :].ravel())
        np.testing.assert_array_equal(trace.token_logprob, given.token_logprob[trace.row_start - 1 :])
        np.testing.assert_array_equal(trace.token_rank, given.token_rank[trace.row_start - 1 :])


def test_a_verifier_without_any_gold_answer_is_refused(tmp_path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "question 1", "completion": "w1", "solution": "w1"}))
    with pytest.raises(InputError, match=r"t\.jsonl has an `answer`.*solution; give `columns` answer=solution"):
        score(
            ScoreOptions(
                teacher="fake", top_k=8, traces=str(tmp_path / "t.jsonl"), out=tmp_path / "c", verifier="exact"
            )
        )
    generate(GenerateOptions(teacher="fake", prompts=str(tmp_path / "t.jsonl"), out=tmp_path / "g", top_k=8))
    with pytest.raises(InputError, match=r"no prompt of .*g has an `answer`"):
        score(options(tmp_path / "g", tmp_path / "c", verifier="exact"))
    assert not (tmp_path / "c").exists()


def test_an_answer_is_graded_and_sections_stay_those_of_the_source(tmp_path) -> None:
    rows = [{"id": f"p{i}", "prompt": f"question {i}", "answer": "w1"} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"teacher": "fake", "top_k": 8, "reasoning_markers": Markers()}
    generate(GenerateOptions(prompts=str(tmp_path / "p.jsonl"), out=tmp_path / "g", **given))
    score(options(tmp_path / "g", tmp_path / "c", verifier="exact"))
    cache = Cache.open(tmp_path / "c")
    assert cache.identity.reasoning_markers is None
    assert all(t.correct is not None for t in cache)


def lines(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_a_text_put_above_others_leaves_their_traces_alone(tmp_path) -> None:
    first = {"id": "p", "prompt": "question", "completion": "w1"}
    second = {"id": "p", "prompt": "question", "completion": "w2"}
    score(options(lines(tmp_path / "t.jsonl", first, first), tmp_path / "c"))
    assert score(options(lines(tmp_path / "t.jsonl", second, first, first), tmp_path / "c")).made == 1
    other = {"id": "p", "prompt": "another question", "completion": "w2"}
    with pytest.raises(PromptsError, match="id 'p' is used by another prompt above"):
        score(options(lines(tmp_path / "t.jsonl", first, other), tmp_path / "c"))


def test_what_was_cut_short_gets_no_end_and_what_has_one_no_other(tmp_path) -> None:
    texts = [
        {"id": "cut", "prompt": "question", "completion": "w1", "finish_reason": "length"},
        {"id": "ended", "prompt": "question", "completion": "w1 <eos>"},
        {"id": "null", "prompt": "question", "completion": "w1", "finish_reason": None},
    ]
    source, eos = lines(tmp_path / "t.jsonl", *texts), fake_engine.VOCAB - 1
    score(options(source, tmp_path / "c"))
    ends = {t.prompt_id: (t.token_ids[1:].tolist().count(eos), t.finish_reason) for t in Cache.open(tmp_path / "c")}
    assert ends == {"cut": (0, "length"), "ended": (1, "stop"), "null": (1, "stop")}
    with pytest.raises(IdentityError, match="score --no-eos"):
        score(options(source, tmp_path / "c", eos=False))


def test_a_limit_reads_so_many_rows(generated, texts, tmp_path) -> None:
    assert score(options(texts, tmp_path / "c", limit=2)).made == 2
    assert score(options(generated, tmp_path / "d", limit=3)).made == 3


def test_an_empty_source_leaves_nothing_behind(tmp_path) -> None:
    with pytest.raises(InputError, match="holds nothing to ask"):
        score(options(lines(tmp_path / "t.jsonl"), tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_a_share_is_kept_to_the_last_digit() -> None:
    assert str(Crop.parse("right:0.4999999")) == "right:0.4999999"
    assert Crop.parse("left:0.29").span(100) == slice(0, 29)
