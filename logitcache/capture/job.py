"""Options and identity of a cache that is filled, and the task that turns requests into traces."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

from logitcache.cache.workers import Worker
from logitcache.errors import InputError, ModelError
from logitcache.grading import verdicts
from logitcache.grading.verdicts import Verifier
from logitcache.identity import Identity
from logitcache.inference import model
from logitcache.inference.engine import Completion, Rows
from logitcache.inference.model import ModelFacts, ModelOptions, ModelSpec, Sampling
from logitcache.prompts import Columns, SourceCounts
from logitcache.runtime.options import Option, at_least, values_of
from logitcache.runtime.secrets import without_secrets
from logitcache.runtime.units import parse_bytes
from logitcache.sections import AnswerRegex, Markers, ReasoningMarkers
from logitcache.storage.location import Url, locate
from logitcache.trace import Trace

ROWS, SHARDS, CLUSTER = "Rows", "Shards and workers", "Cluster"  # groups of options


@dataclass(frozen=True, kw_only=True)
class CaptureOptions(ModelOptions):
    """Which teacher, which rows, which sections: the options of every command that captures log-probabilities.

    Raises: InputError for values that do not go together.
    """

    teacher: Annotated[str, Option("The teacher: a model folder or a hub id.")]
    top_k: Annotated[int, Option("Token ids stored per row, with their log-probabilities.")] = 64
    limit: Annotated[int | None, Option("Read only this many rows of the source.", default="all")] = None
    columns: Columns = field(default_factory=dict)
    verifier: Verifier = None
    prompt_logits: Annotated[
        bool, Option("Store rows of the prompt's tokens too, to supervise the prompt section.", ROWS)
    ] = False
    top_p: Annotated[
        float | None,
        Option(
            "Trim each row to the ids that hold this share of its mass; the rest joins the tail.", ROWS, default="off"
        ),
    ] = None
    min_k: Annotated[int, Option("Ids that a trimmed row keeps at least.", ROWS)] = 1
    pin_tokens: Annotated[
        str,
        Option(
            "Ids that every row stores whatever their rank: auto (end of sequence and section delimiters), none, or "
            "tokens and ids, comma-separated.",
            ROWS,
        ),
    ] = "auto"
    exact: Annotated[bool, Option("Store log-probabilities bit for bit, in about 12% more bytes.", ROWS)] = False
    reasoning_markers: ReasoningMarkers = None
    answer_regex: AnswerRegex = None
    unit_size: Annotated[
        int, Option("Traces per shard at most. A kill loses the finished traces of the shard that is open.", SHARDS)
    ] = 64
    unit_bytes: Annotated[
        str | int, Option("A shard of so many bytes takes no more traces.", SHARDS, metavar="BYTES")
    ] = "16MB"

    def __post_init__(self) -> None:
        for name in ("top_k", "min_k", "unit_size", "limit"):
            at_least(name, getattr(self, name), 1)
        _ = self.shard_bytes
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"`top_p` {self.top_p}: must lie in (0, 1]; it is the share of its mass that a row keeps")
        if self.min_k > self.top_k:
            raise InputError(f"`min_k` {self.min_k} is above `top_k` {self.top_k}")
        Markers(answer_regex=self.answer_regex)  # refuses a broken pattern
        if self.verifier is not None:
            verdicts.check(self.verifier)
        _ = self.spec

    @property
    def shard_bytes(self) -> int:
        """`unit_bytes` as a number."""
        return parse_bytes(str(self.unit_bytes), "unit_bytes")

    @property
    def spec(self) -> ModelSpec:
        """The teacher and how it is run."""
        return ModelSpec(model=self.teacher, option="teacher", **values_of(ModelOptions, self))


@dataclass(frozen=True, slots=True)
class Engines:
    """How many engines of a cluster to use."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least}-{self.most}"

    @classmethod
    def parse(cls, text: str) -> "Engines":
        """Parses N or LEAST-MOST.

        Raises: InputError.
        """
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        found = cls(int(match[1]), int(match[2] or match[1])) if match else cls(0, 0)
        if not 1 <= found.least <= found.most:
            raise InputError(f"`engines` {text!r}: write N or LEAST-MOST, such as 8 or 1-8")
        return found


@dataclass(frozen=True, kw_only=True)
class JobOptions(CaptureOptions):
    """Options of `generate` and `score`: where the cache is written, and this process's share of it."""

    out: Annotated[
        str | Path | Url,
        Option("The cache: a new directory, or one to resume. Also s3://, gs:// or az:// BUCKET/NAME.", metavar="PATH"),
    ]
    worker: Annotated[
        Worker | None,
        Option(
            "Be worker I (from 0) of N that fill one cache, each with its own share of the prompts.",
            SHARDS,
            metavar="I/N",
            default="the place in a Slurm job array, else 0/1",
        ),
    ] = None

    ray: Annotated[
        str | None,
        Option(
            "Run engines on a Ray cluster: auto, the cluster that this machine belongs to, or the HOST:PORT of its head. "
            "Alone: auto.",
            CLUSTER,
            metavar="[ADDRESS]",
            default="one engine, in this process",
            bare="auto",
            value_pattern=r"auto|ray://\S+|\S+:\d+",
        ),
    ] = None
    engines: Annotated[
        Engines | None,
        Option(
            "Engines on the cluster: N, or LEAST-MOST. MOST are asked for, which makes an autoscaler add machines; below LEAST "
            "a line says what is missing.",
            CLUSTER,
            metavar="N|LEAST-MOST",
            default="as many as the cluster holds now",
        ),
    ] = None
    nodes_per_engine: Annotated[
        int, Option("Machines that one engine spreads over, for a teacher that does not fit one.", CLUSTER)
    ] = 1
    cpus_per_engine: Annotated[
        int | None, Option("Run engines on CPUs, with so many cores each.", CLUSTER, default="engines run on GPUs")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "out", locate(self.out))
        for name in ("nodes_per_engine", "cpus_per_engine"):
            at_least(name, getattr(self, name), 1)
        if self.ray is None:
            for name, default in (("engines", None), ("nodes_per_engine", 1), ("cpus_per_engine", None)):
                if getattr(self, name) != default:
                    raise InputError(f"`{name}`: of the engines of a cluster; give `ray` too")
        if self.ray is not None and self.worker is not None and self.worker.count > 1:
            raise InputError("`worker`: with `ray`, engines share the job by themselves; leave it out")
        if self.ray is not None and self.gpus_per_engine % self.nodes_per_engine:
            raise InputError(
                f"`nodes_per_engine` {self.nodes_per_engine}: {self.gpus_per_engine} GPUs do not divide into as many nodes"
            )
        object.__setattr__(self, "worker", Worker() if self.ray is not None else self.worker or Worker.of_environment())

    @property
    def spec(self) -> ModelSpec:
        spec = super().spec
        if self.nodes_per_engine == 1:
            return spec
        return replace(spec, engine_args=spec.engine_args | {"distributed_executor_backend": "ray"})

    @property
    def gpus_per_engine(self) -> int:
        return self.tensor_parallel_size * int(self.engine_args.get("pipeline_parallel_size", 1))

    def task(self, *, reading: bool = True) -> "tuple[Task, Identity]":
        """The task, and the identity of the cache that it fills.

        Args:
            reading: False leaves the source unread: for an engine that is given its requests.
        Raises: InputError, ModelError.
        """
        raise NotImplementedError

    @property
    def place(self) -> Worker:
        """This process among the workers."""
        assert self.worker
        return self.worker

    @property
    def source(self) -> str:
        """Where the prompts or texts come from."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PromptOptions(CaptureOptions, Sampling):
    """The prompts, and how the teacher answers them."""

    prompts: Annotated[
        str,
        Option(
            "Files (.jsonl, .json, .parquet, .jsonl.gz, .jsonl.zst), a folder or a pattern of them, "
            "hf:OWNER/NAME?split=train for a dataset of the hub, or gym:NAME?size=100&seed=1 for a reasoning-gym task. "
            "Columns: `prompt` (text or messages), `messages` or `conversations`; optional `id`, `answer`, `tools`, "
            "`chat_template_kwargs`; others are kept as metadata.",
            positional=True,
        ),
    ]
    samples: Annotated[int, Option("Completions per prompt.")] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        Sampling.__post_init__(self)
        at_least("samples", self.samples, 1)
        if self.samples > 1 and self.temperature == 0:
            raise InputError(
                f"`samples` {self.samples} at `temperature` 0 would be {self.samples} copies of one completion; change one"
            )

    @property
    def drawn(self) -> Sampling:
        """How completions are sampled."""
        return Sampling(**values_of(Sampling, self))

    @property
    def source(self) -> str:
        return self.prompts


@dataclass(frozen=True, slots=True)
class Request:
    """A trace to be made."""

    trace_id: str
    prompt_id: str
    sample_index: int
    content: Any  # the task makes token ids of it


Context = Sequence[tuple[int, int]]


class Tokens(NamedTuple):
    """Input of the engine for a request: the prompt, or the whole text if it is scored.

    Attributes:
        context: [start, end) spans of tokens behind the prompt that are read and never supervised.
        remarks: what was left out, added or read otherwise than it looks; prompts are counted by it at the end.
    """

    ids: list[int]
    prompt_length: int
    context: Context = ()
    remarks: tuple[str, ...] = ()


class Task(Protocol):
    """A list of requests to the teacher, and the conversion of its completions into traces."""

    @property
    def options(self) -> JobOptions: ...

    @property
    def sampling(self) -> Sampling: ...

    @property
    def scored(self) -> bool:
        """Whether existing text is scored. Otherwise the teacher writes completions."""
        ...

    @property
    def counts(self) -> SourceCounts:
        """What was read of the source, once `requests` has yielded all."""
        ...

    def requests(self, identity: Identity) -> Iterable[Request]:
        """All requests of all workers; every call yields the same."""
        ...

    def tokens(self, request: Request) -> Tokens:
        """Raises: InputError if the teacher cannot take the request."""
        ...

    def trace(self, request: Request, completion: Completion, identity: Identity, context: Context) -> Trace:
        """The trace of a completion; ``context``: that of the request's `Tokens`."""
        ...


def identify(
    options: CaptureOptions, facts: ModelFacts, sampling: dict[str, Any], derived: tuple[str, ...] = ()
) -> Identity:
    """The identity of the cache that these options make.

    Raises: ModelError if the teacher has fewer tokens than ``top_k``, InputError for pinned tokens it does not have.
    """
    if options.top_k > facts.vocab_size:
        raise ModelError(f"`top_k` {options.top_k}: the teacher's vocabulary has {facts.vocab_size} tokens")
    markers = options.reasoning_markers or Markers.detect(facts.tokenizer.get_vocab(), facts.chat_template)
    return Identity(
        teacher=facts.name,
        teacher_revision=facts.revision,
        tokenizer_hash=facts.tokenizer_hash,
        chat_template_hash=facts.chat_template_hash,
        vocab_size=facts.vocab_size,
        top_k=options.top_k,
        top_p=options.top_p,
        min_k=options.min_k,
        prompt_logits=options.prompt_logits,
        sampling=without_secrets(sampling),
        reasoning_markers=markers.pair,
        answer_regex=options.answer_regex,
        dtype=facts.dtype,
        engine=model.engine_version(),
        engine_args=options.spec.identity_args(),
        pin_tokens=pinned_ids(options.pin_tokens, facts, markers, options.top_k),
        exact=options.exact,
        derived=list(derived),
    )


def rows_wanted(identity: Identity, scored: bool) -> Rows:
    """The log-probabilities to ask the engine for."""
    return Rows(identity.top_k, identity.prompt_logits, tuple(identity.pin_tokens), scored)


def pinned_ids(text: str, facts: ModelFacts, markers: Markers, top_k: int) -> list[int]:
    """The ids that every row stores, ascending.

    Args:
        text: "none", or comma-separated: "auto" (end-of-sequence ids, and the section delimiters that are one token), ids,
            tokens. A number is an id.
    Raises: InputError for a token that the vocabulary does not have.
    """
    if text == "none":
        return []
    vocabulary = facts.tokenizer.get_vocab()
    pinned: set[int] = set()
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item == "auto":
            found = {*facts.eos_ids, *(vocabulary[m] for m in (markers.opening, markers.closing) if m in vocabulary)}
            pinned |= {i for i in found if i < facts.vocab_size}
            continue
        token = int(item) if item.isdecimal() else vocabulary.get(item, -1)
        if not 0 <= token < facts.vocab_size:
            near = get_close_matches(item, vocabulary, n=1)
            raise InputError(
                f"`pin_tokens` {item!r}: not a token of the teacher's vocabulary of {facts.vocab_size}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        pinned.add(token)
    fits = len(pinned) < 256 and top_k + 2 * len(pinned) <= facts.vocab_size
    if text == "auto" and not fits:  # all ids, or nearly all, are stored anyway
        return []
    if not fits:
        raise InputError(f"`pin_tokens` {text!r}: {len(pinned)} ids besides the top {top_k} are too many; give fewer")
    return sorted(pinned)
