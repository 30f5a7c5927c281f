"""An engine without a model, for the logic around it; test_engine.py runs the same through real vLLM."""

import os
import signal
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np

from logitcache.errors import InputError
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
    """Puts a slow engine in place of vLLM, in a process of a cluster. Environment variables make it fail:

    FAKE_DIES_AT: before or after its first shard is published, once for the file FAKE_DIED.
    FAKE_POISON: a word; the process dies when it is in a prompt.
    FAKE_REFUSES: the engine refuses its settings.
    FAKE_REVISION: what this machine's teacher is.
    """
    from logitcache.capture.filling import Filling
    from logitcache.inference import session

    class Slow(FakeEngine):
        def __init__(self, *args) -> None:
            if why := os.environ.get("FAKE_REFUSES"):
                raise InputError(why)
            super().__init__(*args)

        def submit(self, key, prompt_ids, *rest) -> None:
            if (word := os.environ.get("FAKE_POISON")) and token_id(word) in prompt_ids:
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL)
            super().submit(key, prompt_ids, *rest)

        def step(self) -> list[Completion]:
            time.sleep(0.02)
            return super().step()

    class Dying(Filling):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            ask = self.ask

            def asked(method, *rest):
                if method == "commit":
                    die_once("before")
                    answer = ask(method, *rest)
                    die_once("after")
                    return answer
                return ask(method, *rest)

            self.ask = asked

    def die_once(when: str) -> None:
        if os.environ.get("FAKE_DIES_AT") == when:
            with suppress(FileExistsError):
                os.close(os.open(os.environ["FAKE_DIED"], os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)

    from logitcache.capture import actors

    actors.Filling = Dying  # type: ignore[misc]
    session.Engine = Slow  # type: ignore[misc]
    revision = os.environ.get("FAKE_REVISION", "r1")
    model.inspect_model = lambda spec: replace(facts(spec), revision=revision)
    model.engine_version = lambda: "fake 1"


def install(monkeypatch) -> type[FakeEngine]:
    """A fresh engine class in place of vLLM."""
    from logitcache.inference import session

    engine = type("Engine", (FakeEngine,), {})
    monkeypatch.setattr(session, "Engine", engine)
    monkeypatch.setattr(model, "inspect_model", facts)
    monkeypatch.setattr(model, "engine_version", lambda: "fake 1")
    return engine
