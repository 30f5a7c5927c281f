"""What a cache contains, from its indexes alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from logitcache.cache.shard import ShardIndex
from logitcache.identity import Identity
from logitcache.sections import SPANS
from logitcache.storage.location import Location


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """Identity, counts and sizes of a cache."""

    path: Location
    identity: Identity
    shards: int
    traces: int
    prompts: int
    tokens: int  # prompts included
    section_tokens: dict[str, int]  # by span, as in sections.SPANS
    rows: int  # tokens with the teacher's distribution
    bytes: int  # of the shards' Arrow files
    bytes_per_row: float
    block_bytes_per_row: float  # of the top-k blocks alone
    mean_support: float  # stored ids per row
    mean_tail_mass: float  # probability mass outside them
    verdicts: dict[str, int]  # traces "correct" and "incorrect"
    compacted: int = 0  # shards whose index was read from a compacted index

    @classmethod
    def of(cls, path: Location, identity: Identity, shards: Sequence[ShardIndex]) -> "CacheInfo":
        rows = sum(s.row_count for s in shards)
        return cls(
            path=path,
            identity=identity,
            shards=len(shards),
            compacted=sum(s.compacted for s in shards),
            traces=sum(s.trace_count for s in shards),
            prompts=len({prompt for s in shards for prompt in s.prompt_ids}),
            tokens=sum(sum(s.token_lengths) for s in shards),
            section_tokens={name: sum(s.section_tokens[name] for s in shards) for name in SPANS},
            rows=rows,
            bytes=sum(s.bytes for s in shards),
            bytes_per_row=sum(s.bytes for s in shards) / (rows or 1),
            block_bytes_per_row=sum(s.block_bytes for s in shards) / (rows or 1),
            mean_support=sum(s.entries for s in shards) / (rows or 1),
            mean_tail_mass=sum(s.tail_mass for s in shards) / (rows or 1),
            verdicts={name: sum(s.verdicts[name] for s in shards) for name in ("correct", "incorrect")},
        )

    def to_json(self) -> dict[str, Any]:
        """What ``logitcache info --json`` prints."""
        return {
            "path": str(self.path),
            "identity": asdict(self.identity),
            "shards": self.shards,
            "traces": self.traces,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "section_tokens": self.section_tokens,
            "taught_rows": self.rows,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes_per_row,
            "block_bytes_per_token": self.block_bytes_per_row,
            "mean_support": self.mean_support,
            "mean_tail_mass": self.mean_tail_mass,
            "verdicts": self.verdicts,
            "compacted": self.compacted,
        }
