"""Trains small reasoners from scratch, and measures how many of their answers are exact."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.reasoner import tokenizer as tok
from benchmarks.reasoner.problems import FAMILIES, Problem, Ranges, problems

# B sequences, T tokens each.

PAD, END = tok.VOCABULARY.index("<|pad|>"), tok.VOCABULARY.index("<|end|>")
GROUPS = 3  # of similar length per step; a single group would be a third padding


@dataclass(frozen=True)
class Shape:
    """A Qwen3. vLLM's CPU engine needs a head_dim of 32, 64, 80, 96, 112 or 128."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    intermediate: int


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and cosine decay to 2% of the rate."""

    steps: int
    traces: int  # per step
    rate: float
    warmup: int = 100


def new_model(shape: Shape, seed: int, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tok.VOCABULARY),
            num_hidden_layers=shape.layers,
            hidden_size=shape.hidden,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate,
            max_position_embeddings=tok.LONGEST,
            tie_word_embeddings=False,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
        )
    )
    model.to(device)  # pyright: ignore[reportArgumentType]
    return model


def train_stream(ranges: Ranges, seed: int) -> Iterator[Problem]:
    """Yields training problems forever, interleaved by family."""
    sources = [problems(family, ranges, "train", seed) for family in FAMILIES]
    while True:
        yield from map(next, sources)


def again(chosen: Sequence[Problem], seed: int) -> Iterator[Problem]:
    """Yields the same problems forever, each epoch in another order."""
    rng, order = Random(seed), list(chosen)
    while True:
        rng.shuffle(order)
        yield from order


def steps(source: Iterator[Problem], traces: int) -> Iterator[list[torch.Tensor]]:
    """Yields the next `traces` traces for each step, in groups of similar length: int64 [B, T], right-padded."""
    while True:
        rows = sorted((tok.encode(tok.text(p)) for p in islice(source, traces)), key=len)
        size = math.ceil(traces / GROUPS)
        yield [_padded(rows[i : i + size]) for i in range(0, traces, size)]


def _padded(rows: list[list[int]], left: bool = False) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[PAD] * (width - len(r)) + r if left else r + [PAD] * (width - len(r)) for r in rows])


def fit(
    model: PreTrainedModel,
    source: Iterator[Problem],
    schedule: Schedule,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Trains with cross-entropy on whole traces. Padding is on the right, so no mask is needed.

    A step takes traces in order, so all families are in every step. In short runs, steps with traces of one length, so
    mostly of one family, learned far more slowly to find a digit by its letter.

    Returns: seconds, including reports.
    """
    began, device, every = time.monotonic(), model.device, max(1, schedule.steps // 10)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, schedule))
    model.train()
    recent = []
    for step, groups in enumerate(islice(steps(source, schedule.traces), schedule.steps), 1):
        tokens, total = sum(int((ids_BT[:, 1:] != PAD).sum()) for ids_BT in groups), torch.zeros((), device=device)
        for ids_BT in (group.to(device) for group in groups):
            with _autocast(device):
                logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
            loss = _summed(logits_BTV, ids_BT) / tokens
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        recent.append(total)
        if step % every == 0 or step == schedule.steps:
            report(step, torch.stack(recent).mean().item())
            recent = []
    model.eval()
    return time.monotonic() - began


def _summed(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
    wanted_BT = ids_BT[:, 1:]
    return cross_entropy(logits_BTV.flatten(0, 1).float(), wanted_BT.flatten(), ignore_index=PAD, reduction="sum")


def _rate(step: int, schedule: Schedule) -> float:
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / schedule.steps))
    return min(1.0, (step + 1) / schedule.warmup) * (0.02 + 0.98 * cosine)


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    before = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(before)


def exact_traces(model: PreTrainedModel, chosen: Sequence[Problem]) -> dict[str, float]:
    """Share of traces, by family, that greedy decoding would reproduce exactly: one forward pass, no decoding."""
    right, count = Counter(), Counter(p.family for p in chosen)
    with evaluating(model):
        for some in _chunks(chosen, 128):
            ids_BT = _padded([tok.encode(tok.text(p)) for p in some]).to(model.device)
            start_B = torch.tensor([len(tok.encode(tok.prompt(p))) for p in some], device=model.device)
            said_BT, wanted_BT = model(input_ids=ids_BT[:, :-1], use_cache=False).logits.argmax(-1), ids_BT[:, 1:]
            ours_BT = torch.arange(1, ids_BT.shape[1], device=model.device) >= start_B[:, None]
            wrong_BT = (said_BT != wanted_BT) & ours_BT & (wanted_BT != PAD)
            right.update(p.family for p, wrong in zip(some, wrong_BT.any(1).tolist(), strict=True) if not wrong)
    return {family: right[family] / count[family] for family in count}


def completions(model: PreTrainedModel, chosen: Sequence[Problem], temperature: float = 0.0) -> list[str]:
    """The completion of each prompt, greedy or sampled, without the end token; cut at twice the known length."""
    place, written = {id(p): i for i, p in enumerate(chosen)}, [""] * len(chosen)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with evaluating(model):
        for some in _chunks(sorted(chosen, key=lambda p: len(p.question + 2 * p.reasoning)), 256):
            ids = _padded([tok.encode(tok.prompt(p)) for p in some], left=True).to(model.device)
            limit = 2 * max(len(tok.encode(p.reasoning)) for p in some)
            out = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=limit, **sampling)  # pyright: ignore
            for p, row in zip(some, out[:, ids.shape[1] :].tolist(), strict=True):
                ended = row[: row.index(END)] if END in row else row
                written[place[id(p)]] = "".join(tok.VOCABULARY[i] for i in ended)
    return written


def accuracy(model: PreTrainedModel, chosen: Sequence[Problem], temperature: float = 0.0) -> dict[str, float]:
    """Share of exact answers by family."""
    right, count = Counter(), Counter(p.family for p in chosen)
    for p, text in zip(chosen, completions(model, chosen, temperature), strict=True):
        right[p.family] += text.partition("</think>")[2] == p.answer
    return {family: right[family] / count[family] for family in count}


def _chunks(chosen: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    return (chosen[i : i + size] for i in range(0, len(chosen), size))
