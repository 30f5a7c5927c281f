"""Tiny models, tokenizers and caches, made in milliseconds: random, but valid, and learnable."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from logitcache.cache import manifest, shard
from logitcache.cache.reader import Cache
from logitcache.identity import Identity
from logitcache.identity import tokenizer_hash as hash_of_tokenizer
from logitcache.kernels.targets import SparseTargets
from logitcache.sections import Sections
from logitcache.sparse_rows import from_topk
from logitcache.student.data.views import UNSUPERVISED, SupervisedTrace, View
from logitcache.trace import Trace

VOCAB = 64


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of this size gain nothing from threads, and lose much beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokenizer(vocab: int = VOCAB, prefix: str = "w") -> PreTrainedTokenizerFast:
    """One token a word: ``w0 w1 ...``; ids 0, 1, 2 are <unk>, <s>, </s>."""
    words = ["<unk>", "<s>", "</s>", *(f"{prefix}{i}" for i in range(3, vocab))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def model(vocab: int = VOCAB, seed: int = 0, layers: int = 2, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    options = sizes | {
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, num_hidden_layers=layers, **options | config)).eval()


def save_model(path: Path, vocab: int = VOCAB, prefix: str = "w", **options) -> Path:
    model(vocab, **options).save_pretrained(path)
    tokenizer(vocab, prefix).save_pretrained(path)
    return path


def identity() -> Identity:
    return Identity(
        teacher="tiny",
        teacher_revision="0",
        tokenizer_hash=hash_of_tokenizer(tokenizer()),
        chat_template_hash=None,
        vocab_size=VOCAB,
        top_k=8,
        top_p=None,
        min_k=1,
        prompt_logits=True,
        sampling={"temperature": 1.0},
        reasoning_markers=["<think>", "</think>"],
        answer_regex=None,
        dtype="float32",
        engine="tiny 0",
        engine_args={},
    )


def bigram(vocab: int = VOCAB) -> np.ndarray:
    """float64 [V, V], log-probabilities of a teacher whose next token depends on the last one only."""
    logits_VV = np.random.default_rng(1234).normal(size=(vocab, vocab)) * 3
    return logits_VV - np.log(np.exp(logits_VV).sum(axis=1, keepdims=True))


def trace(
    i: int, tokens: list[int], logp_RV: np.ndarray, *, prompts: int = 1, top_k: int = 8, row_start: int = 1
) -> Trace:
    """Trace i with the teacher's log-probabilities of tokens row_start and on; five sections if it is long enough."""
    length, vocab = len(tokens), logp_RV.shape[1]
    ids_RK = np.argsort(-logp_RV, axis=1, kind="stable")[:, :top_k]
    rows = from_topk(ids_RK, np.take_along_axis(logp_RV, ids_RK, axis=1).astype(np.float32), vocab)
    return Trace(
        trace_id=f"{i:032x}",
        prompt_id=f"p{i % prompts}",
        sample_index=i // prompts,
        token_ids=np.array(tokens, np.int32),
        sections=Sections(length // 5, length * 2 // 5, length * 3 // 5, length * 4 // 5, length),
        row_start=row_start,
        rows=rows,
        token_logprob=logp_RV[np.arange(len(rows)), tokens[row_start:]].astype(np.float32),
        token_rank=1 + (logp_RV > logp_RV[np.arange(len(rows)), tokens[row_start:], None]).sum(axis=1, dtype=np.int32),
        text=" ".join(f"w{t}" for t in tokens),
        finish_reason="stop",
    )


def traces(count: int, prompts: int, lengths: tuple[int, int] = (12, 40), seed: int = 0, **options) -> list[Trace]:
    """What the bigram teacher says."""
    rng, logp_VV, made = np.random.default_rng(seed), bigram(), []
    for i in range(count):
        tokens = [int(rng.integers(3, VOCAB))]
        for _ in range(int(rng.integers(*lengths)) - 1):
            tokens.append(int(rng.choice(VOCAB, p=np.exp(logp_VV[tokens[-1]]))))
        made.append(trace(i, tokens, logp_VV[tokens[:-1]], prompts=prompts, **options))
    return made


@torch.no_grad()
def traces_of(teacher: PreTrainedModel, count: int, prompts: int, **options) -> list[Trace]:
    """What `teacher` says of random tokens."""
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        tokens = rng.integers(3, VOCAB, size=int(rng.integers(12, 40))).tolist()
        logp_RV = teacher(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(dim=-1).numpy()
        made.append(trace(i, tokens, logp_RV, prompts=prompts, **options))
    return made


def write_cache(path: Path, made: list[Trace] | None = None, *, shards: int = 2, **fields: Any) -> Cache:
    """A cache of those traces, 24 of 12 prompts by default, in that many shards, its identity with other `fields`."""
    made, mine = made or traces(24, 12), replace(identity(), **fields)
    manifest.create_or_match(path, mine)
    for number in range(shards):
        part = made[number * len(made) // shards : (number + 1) * len(made) // shards]
        shard.write(path / shard.DIRECTORY, number, [shard.EncodedTrace.of(t, mine) for t in part], mine, {})
    return Cache.open(path)


def sparse_targets(logp_NV: torch.Tensor, k: int) -> SparseTargets:
    """The k likeliest ids of each row, and the rest as its tail."""
    logp_NK, ids_NK = logp_NV.topk(k, dim=1)
    offsets, rest_N = torch.arange(len(logp_NV) + 1) * k, 1 - logp_NK.exp().sum(dim=1)
    return SparseTargets(offsets, ids_NK.flatten(), logp_NK.flatten(), rest_N.log())


@dataclass(frozen=True)
class Shifted:
    """A view off by one, as two published systems train: each position gets the row of the token before."""

    view: View

    def __call__(self, trace: Trace, epoch: int = 0) -> SupervisedTrace:
        supervised = self.view(trace, epoch)
        kept = supervised.row > 0
        row, target = (np.where(kept, of, UNSUPERVISED) for of in (supervised.row - 1, supervised.target))
        return replace(supervised, row=row, target=target, kd=supervised.kd * kept, ce=supervised.ce * kept)
