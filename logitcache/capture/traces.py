"""Turns a finished completion into a trace."""

import numpy as np

from logitcache import sparse_rows
from logitcache.capture.job import Context, Request
from logitcache.grading import verdicts
from logitcache.identity import Identity
from logitcache.inference.engine import Completion
from logitcache.inference.model import ModelFacts
from logitcache.inference.token_texts import token_texts
from logitcache.prompts import Prompt
from logitcache.sections import Finder, Found, Markers, text_offset
from logitcache.sparse_rows import SparseRows
from logitcache.trace import Trace


def rows_of(completion: Completion, identity: Identity) -> SparseRows:
    """The rows of a completion as the cache stores them: sorted and trimmed, with tails and pinned ids.

    Raises: CacheError for a row that is not a distribution.
    """
    rows = sparse_rows.from_topk(completion.ids_RK, completion.logprobs_RK, identity.vocab_size)
    if identity.pin_tokens:
        rows = sparse_rows.pin(rows, identity.top_k, identity.pin_tokens, completion.pinned_RP)
    return sparse_rows.trim(rows, top_p=identity.top_p, min_k=identity.min_k, pinned_ids=identity.pin_tokens)


def trace_of(
    request: Request,
    prompt: Prompt,
    completion: Completion,
    identity: Identity,
    facts: ModelFacts,
    verifier: str | None,
    context: Context = (),
) -> Trace:
    """The trace of a completion: its sections, rows, text, and verdict if a verifier is given.

    Raises: CacheError for a row that is not a distribution.
    """
    token_ids, prompt_length = completion.token_ids, completion.prompt_length
    texts = token_texts(facts, token_ids.tolist())
    ended = len(token_ids) > prompt_length and int(token_ids[-1]) in facts.eos_ids
    if ended:
        texts[-1] = None
    found = Finder.of(facts.tokenizer, identity.markers).find(texts, prompt_length, token_ids.tolist(), context)
    text = "".join(piece or "" for piece in texts[prompt_length:])
    answer = text[found.answer]
    rows = rows_of(completion, identity)
    correct = verdicts.verdict(verifier, answer, prompt.answer, prompt.metadata) if verifier else None
    return Trace(
        trace_id=request.trace_id,
        prompt_id=prompt.id,
        sample_index=request.sample_index,
        token_ids=token_ids,
        sections=found.sections,
        row_start=len(token_ids) - len(rows),
        rows=rows,
        token_logprob=completion.token_logprob,
        token_rank=completion.token_rank,
        text=text,
        finish_reason=completion.finish_reason,
        answer=prompt.answer,
        correct=correct,
        metadata=prompt.metadata,
        context_spans=np.array(context, np.int32).reshape(-1, 2),
        answer_offset=offset_of(text, found, identity.markers),
    )


def offset_of(text: str, found: Found, markers: Markers) -> int | None:
    """Where the answer begins in the text; None where the text alone tells it, and where there is no answer."""
    start, told = found.answer.start, text_offset(text, markers)
    return start if found.sections.sizes()["answer"] and start != told else None
