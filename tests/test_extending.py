"""docs/extending.md, followed: each recipe is run as it is written, and what it adds works everywhere."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache import prompts
from logitcache.errors import InputError
from logitcache.grading import verdicts
from logitcache.interop import formats
from logitcache.kernels import divergences
from logitcache.kernels.reference import sparse_divergence
from logitcache.student.data import token_masks
from logitcache.student.data.views import View
from tests import tiny

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
TABLES = [(token_masks, "STEPS"), (divergences, "DIVERGENCES"), (verdicts, "GRADERS"), (formats, "EXPORTERS")]


@pytest.fixture
def follow(monkeypatch):
    """Runs the recipe under a heading as a module; the tables are put back afterwards."""
    before = [(getattr(module, name), dict(getattr(module, name))) for module, name in TABLES]
    monkeypatch.setattr(prompts, "SOURCES", prompts.SOURCES)

    def run(heading: str) -> types.ModuleType:
        code = re.search(rf"## {heading}\n.*?```python\n(.*?)```", PAGE, re.S)
        assert code, heading
        assert code[1].count("\n") < 40, "under a screen"
        module = types.ModuleType("recipe")
        monkeypatch.setitem(sys.modules, "recipe", module)
        exec(code[1], module.__dict__)
        return module

    yield run
    for table, entries in before:
        table.clear()
        table.update(entries)


def test_a_view_can_be_added(follow) -> None:
    follow("A view")
    trace = tiny.traces(1, 1, (30, 31))[0]
    whole, last = View("full")(trace), View("last:0.25")(trace)
    rows, kept = whole.row[whole.row >= 0], last.row[last.row >= 0]
    np.testing.assert_array_equal(kept, rows[-(len(rows) // 4) :])
    assert str(View("lsp:0.50+last:0.25")) == "lsp:0.5+last:0.25"
    assert any("last:P" in line for line in token_masks.view_table())


def test_a_divergence_can_be_added(follow) -> None:
    follow("A divergence")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = tiny.sparse_targets(torch.randn(3, 20, generator=generator).log_softmax(-1), 4)
    loss = sparse_divergence(logits, targets, divergence="hellinger")
    logp = torch.cat([logits.log_softmax(-1).gather(1, targets.ids.view(3, 4)), torch.zeros(3, 1)], 1)
    kept = logp[:, :4]
    q = torch.cat([kept.exp(), 1 - kept.exp().sum(1, keepdim=True)], 1)
    p = torch.cat([targets.logprobs.view(3, 4).exp(), targets.log_tail.exp()[:, None]], 1)
    want = (p.sqrt() - q.sqrt()).square().sum(1) / 2
    torch.testing.assert_close(loss, want.double(), atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(want.sum(), logits)
    torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-6)


def test_a_grader_can_be_added(follow) -> None:
    follow("A grader")
    assert verdicts.verdict("choice", "Not A. The answer is (C).", "C", {}) is True
    assert verdicts.verdict("choice", "B", "C", {}) is False
    verdicts.check("choice")
    with pytest.raises(InputError, match="choice"):
        verdicts.check("choise")


def test_a_prompt_source_can_be_added(follow, tmp_path) -> None:
    follow("A prompt source")
    (tmp_path / "p.csv").write_text("id,prompt,answer,level\na,What is 1+1?,2,easy\n")
    (prompt,) = prompts.load(str(tmp_path / "p.csv"))
    assert (prompt.id, prompt.content, prompt.answer, prompt.metadata) == ("a", "What is 1+1?", "2", {"level": "easy"})


def test_a_format_can_be_added(follow, tmp_path) -> None:
    follow("A format")
    cache = tiny.write_cache(tmp_path / "c")
    report = formats.export(tmp_path / "c", tmp_path / "out", format="texts")
    assert (report.files, report.traces) == (1, len(cache))
    assert (tmp_path / "out" / "texts.jsonl").read_text().count("\n") == len(cache)
