"""The columns of a shard, and conversion between its rows and traces. FORMAT.md specifies them."""

import json
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache.cache.validate import is_free
from logitcache.codec import decode
from logitcache.codec.frequency_table import FrequencyTable
from logitcache.errors import CacheError, ShardCorruptError
from logitcache.sections import Sections
from logitcache.trace import Trace

_METADATA_LEVELS = 64  # nested deeper, it could be read but not written again
SECTION_FIELDS = ("prompt_end", "reasoning_start", "reasoning_end", "answer_start")

SCHEMA = pa.schema(
    [
        pa.field("trace_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("sections", pa.struct([(name, pa.int32()) for name in SECTION_FIELDS]), nullable=False),
        pa.field("row_start", pa.int32(), nullable=False),
        pa.field("token_logprob", pa.list_(pa.float32()), nullable=False),
        pa.field("token_rank", pa.list_(pa.int32()), nullable=False),
        pa.field("topk", pa.large_binary(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("correct", pa.bool_()),
        pa.field("metadata", pa.string()),  # JSON object
    ]
)

# Columns that a shard has only if one of its traces has a value there.
OPTIONAL = (
    pa.field("context_spans", pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))),
    pa.field("answer_offset", pa.int32()),
)
ALL = pa.schema([*SCHEMA, *OPTIONAL])


def schema_of(names: Collection[str]) -> pa.Schema:
    """The columns of a shard whose traces have values in the optional columns ``names``."""
    return pa.schema([*SCHEMA, *(field for field in OPTIONAL if field.name in names)])


def accepts(schema: pa.Schema) -> bool:
    """Whether a shard may have this schema; its metadata may be anything."""
    return schema.equals(schema_of(schema.names))


def to_record(trace: Trace, block: bytes) -> dict[str, Any]:
    """Converts a trace to a record of a shard; ``block``: its encoded rows.

    Raises: CacheError for metadata that could not be read again.
    """
    if not is_free(trace.metadata, _METADATA_LEVELS):
        raise CacheError(f"metadata of more than {_METADATA_LEVELS} levels, or with text that is not Unicode")
    bounds = trace.sections.bounds()
    optional: dict[str, Any] = {}
    if len(trace.context_spans):
        optional["context_spans"] = [{"start": start, "end": end} for start, end in trace.context_spans.tolist()]
    if trace.answer_offset is not None:
        optional["answer_offset"] = trace.answer_offset
    return optional | {
        "trace_id": trace.trace_id,
        "prompt_id": trace.prompt_id,
        "sample_index": trace.sample_index,
        "token_ids": trace.token_ids,
        "sections": dict(zip(SECTION_FIELDS, bounds, strict=False)),
        "row_start": trace.row_start,
        "token_logprob": trace.token_logprob,
        "token_rank": trace.token_rank,
        "topk": block,
        "text": trace.text,
        "finish_reason": trace.finish_reason,
        "answer": trace.answer,
        "correct": trace.correct,
        "metadata": json.dumps(trace.metadata, ensure_ascii=False) if trace.metadata else None,
    }


def from_batch(batch: pa.RecordBatch, row: int, table: FrequencyTable | None) -> Trace:
    """The trace in record ``row`` of a shard; decodes that record's rows with the shard's frequency table.

    Raises: ShardCorruptError for a damaged block and for metadata that is not a JSON object.
    """

    def cell(name: str) -> Any:
        return batch.column(name)[row]

    optional: dict[str, Any] = {}
    if "context_spans" in batch.schema.names and (spans := cell("context_spans").values) is not None:
        starts_ends = [spans.field(name).to_numpy() for name in ("start", "end")]
        optional["context_spans"] = np.stack(starts_ends, axis=1)
    if "answer_offset" in batch.schema.names:
        optional["answer_offset"] = cell("answer_offset").as_py()
    token_ids = cell("token_ids").values.to_numpy()
    return Trace(
        trace_id=cell("trace_id").as_py(),
        prompt_id=cell("prompt_id").as_py(),
        sample_index=cell("sample_index").as_py(),
        token_ids=token_ids,
        sections=Sections(**cell("sections").as_py(), length=len(token_ids)),
        row_start=cell("row_start").as_py(),
        rows=decode(memoryview(cell("topk").as_buffer()), table=table),
        token_logprob=cell("token_logprob").values.to_numpy(),
        token_rank=cell("token_rank").values.to_numpy(),
        text=cell("text").as_py(),
        finish_reason=cell("finish_reason").as_py(),
        answer=cell("answer").as_py(),
        correct=cell("correct").as_py(),
        metadata=metadata_of(cell("metadata").as_py()),
        **optional,
    )


def metadata_of(text: str | None) -> dict[str, Any]:
    """The metadata of a trace from its column.

    Raises: ShardCorruptError if it is not a JSON object.
    """
    try:
        metadata = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict) or not is_free(metadata, _METADATA_LEVELS):
        raise ShardCorruptError("column metadata: not a JSON object")
    return metadata
