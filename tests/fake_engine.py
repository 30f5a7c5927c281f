"""An engine without a model, for the logic around it; test_engine.py runs the same through real vLLM."""

import time

import numpy as np

from logitcache.inference import model
from logitcache.inference.engine import Completion, Rows
from logitcache.inference.model import ModelFacts, ModelSpec, Sampling

VOCAB = 50
WORDS = [f"w{i} " for i in range(VOCAB - 3)] + ["<think>", "</think>", "<eos>"]


class Tokenizer:
    """One word, one token; ``backend_tokenizer`` is missing, as it is for slow tokenizers."""

    eos_token_id = VOCAB - 1
    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [token_id(w) for w in text.split()]}

    def decode(self, ids, **_):
        return "".join(WORDS[i] for i in ids)

    def get_vocab(self):
        return {w: i for i, w in enumerate(WORDS)}


def token_id(word: str) -> int:
    known = [w for w in (word, word + " ") if w in WORDS]
    return WORDS.index(known[0]) if known else hash_word(word)


def hash_word(word: str) -> int:
    return sum(word.encode()) % (VOCAB - 3)


class FakeEngine:
    """Answers each prompt with think, some words, think-end, words, eos; ``max_num_seqs`` at a time, ragged lengths."""

    max_model_len = 40
    max_num_seqs = 4
    started = 0
    seeds: tuple | list = ()
    steps_before_failure: int | None = None
    failure: BaseException | None = None
    most_in_flight = 0
    fewest_waiting_at_work: int

    def __init__(self, spec: ModelSpec, sampling: Sampling, seed: int, rows: Rows | None = None) -> None:
        type(self).started += 1
        type(self).seeds = [*type(self).seeds, seed]
        self.spec, self.sampling, self.waiting, self.running = spec, sampling, [], {}
        self.top_k, self.pinned, self.scored = (rows.top_k, list(rows.pinned), rows.scored) if rows else (1, [], False)
        self.steps, self.made, self.queue_at_step = 0, [], []
        type(self).last = self

    def submit(self, key: str, prompt_ids: list[int], max_tokens: int | None = None) -> None:
        if self.scored:
            rng = np.random.default_rng(sum(prompt_ids))
            self.waiting.append((key, prompt_ids[:1], prompt_ids[1:], rng))
            return
        rng = np.random.default_rng(sum(prompt_ids) + len(self.made))
        words = rng.integers(0, VOCAB - 3, rng.integers(2, 12)).tolist()
        self.waiting.append((key, prompt_ids, [VOCAB - 3, *words, VOCAB - 2, *words[:2], VOCAB - 1], rng))

    def step(self) -> list[Completion]:
        self.steps += 1
        if self.steps_before_failure is not None and self.steps > self.steps_before_failure:
            assert self.failure is not None
            raise self.failure
        while self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting.pop(0)
            self.running[request[0]] = [request, 0]
        self.queue_at_step.append((len(self.running), len(self.waiting)))
        out = []
        for key, state in list(self.running.items()):
            state[1] += 1
            if state[1] >= len(state[0][2]):
                del self.running[key]
                self.made.append(key)
                out.append(self._completion(*state[0]))
        return out

    def _completion(self, key, prompt_ids, answer, rng) -> Completion:
        R, K = len(answer), self.top_k + len(self.pinned)
        logits = rng.normal(0, 3, (R, VOCAB))
        logp = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
        order = np.argsort(-logp, axis=1, kind="stable")
        return Completion(
            key=key,
            token_ids=np.array([*prompt_ids, *answer], np.int32),
            prompt_length=len(prompt_ids) + self.scored * R,
            ids_RK=order[:, :K].astype(np.int32),
            logprobs_RK=np.take_along_axis(logp, order[:, :K], 1),
            pinned_RP=logp[:, self.pinned],
            token_logprob=logp[np.arange(R), answer],
            token_rank=(np.argmax(order == np.array(answer)[:, None], axis=1) + 1).astype(np.int32),
            finish_reason="stop",
        )

    def close(self) -> None:
        pass


def facts(spec: ModelSpec) -> ModelFacts:
    return ModelFacts("fake", "r1", "float32", VOCAB, Tokenizer(), "t", None, frozenset([VOCAB - 1]))  # type: ignore[arg-type]


def patch() -> None:
    """Puts a slow engine in place of vLLM, in a process that is not a test's."""
    from logitcache.inference import session

    session.Engine = type("Engine", (FakeEngine,), {"step": _slow_step})  # type: ignore[misc]
    model.inspect_model = facts
    model.engine_version = lambda: "fake 1"


def _slow_step(self) -> list[Completion]:
    time.sleep(0.02)
    return FakeEngine.step(self)


def install(monkeypatch) -> type[FakeEngine]:
    """A fresh engine class in place of vLLM."""
    from logitcache.inference import session

    engine = type("Engine", (FakeEngine,), {})
    monkeypatch.setattr(session, "Engine", engine)
    monkeypatch.setattr(model, "inspect_model", facts)
    monkeypatch.setattr(model, "engine_version", lambda: "fake 1")
    return engine
