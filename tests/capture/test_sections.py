"""What `generate` and `score` say of sections, and spans that are never supervised."""

import json

import pytest

from logitcache.cache.reader import Cache
from logitcache.capture import score as module
from logitcache.capture.score import ScoreOptions, score
from logitcache.capture.summary import SectionCounts
from logitcache.commands.text_capture import describe_sections, describe_summary
from logitcache.sections import Markers
from logitcache.transform.slice import slice_cache
from tests import fake_engine


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    return fake_engine.install(monkeypatch)


@pytest.fixture
def scored(tmp_path):
    def run(*completions: str, **changes):
        rows = [{"id": f"p{i}", "prompt": f"w{i}", "completion": c, "answer": "w7"} for i, c in enumerate(completions)]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        given = {"teacher": "fake", "top_k": 8, "verifier": "exact"} | changes
        summary = score(ScoreOptions(traces=str(tmp_path / "t.jsonl"), out=tmp_path / "c", **given))
        return summary, {t.prompt_id: t for t in Cache.open(tmp_path / "c")}

    return run


def test_known_markers_that_nobody_asked_for_are_counted_and_the_option_is_named(scored, tmp_path) -> None:
    said = ("<think> w1 </think> w7", "<think> w2 </think> w7", "w7")
    summary, _ = scored(*said, reasoning_markers=Markers())
    assert summary.sections.unmarked == {"<think>,</think>": 2}
    text = describe_summary(summary, tmp_path / "c")
    assert "2 completions hold the markers <think>,</think>, but no markers were searched for" in text
    assert "`--reasoning-markers '<think>,</think>'`" in text


def test_another_pair_than_the_known_one_is_named(scored, tmp_path) -> None:
    summary, _ = scored("<think> w1 </think> w7", reasoning_markers=Markers("[THINK]", "[/THINK]"))
    text = describe_summary(summary, tmp_path / "c")
    assert "1 completions hold the markers <think>,</think>, but [THINK],[/THINK] were searched for" in text
    assert "have no reasoning" not in text, "said once"


def test_completions_without_reasoning_or_answer_are_counted(scored, tmp_path) -> None:
    summary, _ = scored("w7", "<think> w1", "<think> w1 </think> w7", eos=False)
    assert (summary.sections.without_reasoning, summary.sections.without_answer) == (1, 1)
    text = describe_summary(summary, tmp_path / "c")
    assert "1 completions have no reasoning: <think>,</think> are not in them" in text
    assert "1 completions ended before their answer" in text


def test_nothing_is_said_where_all_is_well(scored) -> None:
    summary, _ = scored("<think> w1 </think> w7")
    assert describe_sections(summary.sections) == []


def test_a_closing_spelled_with_other_tokens_is_counted() -> None:
    counts = SectionCounts()
    counts.spelled = 2
    assert "2 completions spell the closing marker with ordinary tokens" in describe_sections(counts)[0]


def test_spans_of_a_request_reach_the_trace_and_are_not_graded(scored, monkeypatch, tmp_path) -> None:
    original = module._Texts.tokens
    monkeypatch.setattr(
        module._Texts, "tokens", lambda self, request: original(self, request)._replace(context=[(3, 5)])
    )
    summary, traces = scored("w7 w1 w9 w7 w2", "<think> w1 w9 w9 </think> w7", reasoning_markers=Markers())
    assert [t.context_spans.tolist() for t in traces.values()] == [[[3, 5]]] * 2
    assert traces["p0"].answer_offset == len("w7 w1 w9 w7 ")
    assert traces["p0"].correct is False, "only w2, after the result of a tool"
    assert (summary.sections.with_context, summary.sections.context_tokens) == (2, 4)
    assert "4 tokens of 2 traces, such as results of tools, are never supervised" in describe_summary(summary, tmp_path)
    slice_cache(tmp_path / "c", tmp_path / "s", top_k=4, verifier="exact")
    again = {t.prompt_id: t.correct for t in Cache.open(tmp_path / "s")}
    assert again == {prompt: t.correct for prompt, t in traces.items()}, "the stored offset grades alike"


def test_a_crop_keeps_the_spans_inside_it(scored, monkeypatch, tmp_path) -> None:
    original = module._Texts.tokens
    monkeypatch.setattr(
        module._Texts, "tokens", lambda self, request: original(self, request)._replace(context=[(2, 4), (6, 7)])
    )
    scored("w1 w2 w3 w4 w5 w6 w7", eos=False, verifier=None)  # 8 tokens
    for crop, spans in (("left:0.5", [[2, 4]]), ("right:0.5", [[2, 3]]), ("middle:0.5", [[0, 2]])):
        out = tmp_path / crop[:3]
        given = {"teacher": "fake", "top_k": 8, "crop": module.Crop.parse(crop)}
        score(ScoreOptions(from_cache=tmp_path / "c", out=out, **given))
        (trace,) = Cache.open(out)
        assert trace.context_spans.tolist() == spans, crop
