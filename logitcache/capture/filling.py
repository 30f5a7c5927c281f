"""One engine of a job: it pulls requests from the ledger and publishes finished traces as shards.

A shard is closed by its number of traces or by its bytes, in the order in which traces finish, so that none waits for a
longer one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import logitcache
from logitcache.cache import shard
from logitcache.cache.place import Place
from logitcache.cache.shard import EncodedTrace
from logitcache.capture.job import JobOptions, Request, Task, Tokens, rows_wanted
from logitcache.capture.summary import Counts
from logitcache.errors import InputError, first_line
from logitcache.grading import verdicts
from logitcache.identity import Identity
from logitcache.inference.engine import Completion
from logitcache.inference.session import EngineRequest, Session
from logitcache.runtime.secrets import hide

# Calls a method of the `ledger.Ledger`, which may be in another process, for this engine: ask("take", 8).
Ask = Callable[..., Any]


@dataclass
class _OpenShard:
    """Finished traces that wait until they are a shard."""

    traces: list[EncodedTrace] = field(default_factory=list)
    bytes: int = 0
    counts: Counts = field(default_factory=Counts)


class Filling:
    """The requests that one engine has pulled."""

    def __init__(self, task: Task, identity: Identity, place: Place, ask: Ask, first: str, greeting: str) -> None:
        """
        Args:
            first: differs between the engines of a job and from those of earlier ones; see `Session`.
        """
        self.task, self.identity, self.place, self.ask = task, identity, place, ask
        self.options: JobOptions = task.options
        self.in_flight: dict[str, tuple[Request, Tokens]] = {}
        self.open = _OpenShard()  # belongs to the session's background thread
        self.tokens = 0
        self.skipped_prompts: set[str] = set()
        self.graded = verdicts.no_verdict.copy()
        self.session = Session(
            replace(self.options.spec, dtype=identity.dtype),
            task.sampling,
            rows=rows_wanted(identity, task.scored),
            out=place.directory,
            name="generate",
            first=first,
            kept="everything published",
            greeting=greeting,
        )

    def run(self, total: int) -> None:
        """Works until the ledger has no more requests. Finished traces are published even after an error or a signal.

        Raises: InputError for a setting that vLLM refuses, EngineError, WriteError.
        """
        with self.session:
            try:
                self.session.run(self._pull, self._finish, total=total, on_refused=self._refused, pulse=self._report)
            finally:
                self.session.finish([self._publish])

    def _pull(self, count: int) -> list[EngineRequest] | None:
        requests = self.ask("take", count)
        if requests == [] and not self.in_flight:  # what it may take depends on what it has finished and not published
            self.session.finish([self._publish])
            requests = self.ask("take", count)
        if requests is None:
            return None
        return [found for request in requests if (found := self._for_engine(request))]

    def _for_engine(self, request: Request) -> EngineRequest | None:
        """The token ids of a request; None if the teacher cannot take it."""
        try:
            tokens = self._tokens(request)
        except InputError as e:
            self._skip(request, e)
            return None
        self.in_flight[request.trace_id] = request, tokens
        return EngineRequest(request.trace_id, tokens.ids)

    def _tokens(self, request: Request) -> Tokens:
        tokens = self.task.tokens(request)
        least = 2 if self.task.scored else 1  # the first token of a text has no row
        most = self.session.max_model_len - 1
        if not least <= len(tokens.ids) <= most:
            more = f"; `engine_args` max_model_len={len(tokens.ids) + 1} takes it" if tokens.ids[most:] else ""
            raise InputError(f"{len(tokens.ids)} tokens, the teacher takes {least} to {most}{more}")
        return tokens

    def _skip(self, request: Request, error: InputError) -> None:
        progress = self.session.progress
        assert progress is not None
        if request.prompt_id not in self.skipped_prompts:
            progress.print(f"skipped {request.prompt_id}: {error}")
            self.skipped_prompts.add(request.prompt_id)
        self.ask("skip", request.trace_id, request.prompt_id, str(error))
        progress.drop()

    def _refused(self, trace_id: str, error: InputError) -> None:
        request, _ = self.in_flight.pop(trace_id)
        self._skip(request, error)

    def _report(self) -> None:
        if not self.ask("report", self.tokens):
            self.session.stop("the job's end")

    def _finish(self, completion: Completion) -> int:
        request, tokens = self.in_flight.pop(completion.key)
        if self.task.scored:
            first = 1 if self.identity.prompt_logits else max(1, tokens.prompt_length)
            completion = completion.split_at(tokens.prompt_length, first)
        made = len(completion.token_rank) if self.task.scored else completion.made
        self.tokens += made
        self.session.later(self._add, request, completion, tokens, made)
        return made

    def _add(self, request: Request, completion: Completion, tokens: Tokens, made: int) -> None:
        """Adds a trace to the open shard. If that fails, the ledger gets the reason, and other traces are not affected."""
        try:
            trace = self.task.trace(request, completion, self.identity, tokens.context)
            encoded = EncodedTrace.of(trace, self.identity)
        except Exception as e:  # a tokenizer or a grader may raise anything
            self.ask("fail", request.trace_id, f"{request.prompt_id}: {first_line(e)}")
            return
        self.open.traces.append(encoded)
        self.open.bytes += encoded.bytes
        counts = self.open.counts
        counts.traces += 1
        counts.tokens += made
        counts.sections.add(trace, self.identity.markers)
        counts.remark(tokens.remarks, request.prompt_id)
        if len(self.open.traces) >= self.options.unit_size or self.open.bytes >= self.options.shard_bytes:
            self._publish()

    def _publish(self) -> None:
        """Publishes the open shard, if it has traces."""
        ready, self.open = self.open, _OpenShard()
        if not ready.traces:
            return
        ready.counts.no_verdict, self.graded = verdicts.no_verdict - self.graded, verdicts.no_verdict.copy()
        provenance: dict[str, Any] = {
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "logitcache": logitcache.__version__,
            "source": hide(self.options.source),
            "log": self.session.log.name,
        }
        # Only now, so that a run which makes no trace leaves no identity behind.
        self.place.create_manifest(self.identity)
        data, index = shard.build(self.ask("number"), ready.traces, self.identity, provenance)
        while not self.place.create_data(index.name, data):  # what an engine of a killed job wrote meanwhile
            index = replace(index, name=shard.name_of(self.ask("number")))
        self.ask("commit", index, ready.counts)
