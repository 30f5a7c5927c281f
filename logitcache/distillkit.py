"""Captures that DistillKit published -> a cache, as far as they hold numbers; what was fitted is never made up.

DistillKit (github.com/arcee-ai/DistillKit, read at a61c2e7) scores given text and writes one Parquet row a text, or a few
texts packed into one. Row j of a text is the teacher's distribution of token j + 1: the first token has none. Of a row's k
ids, sorted by falling log-probability, the first exact_k have theirs as floats; the others share the coefficients of a
curve, with quantised residuals perhaps. Three layouts, told apart by their columns:

    compressed_logprobs   bytes: exact_k floats, coefficients, residuals; as differences from the one before with delta_encoding
    bytepacked_indices    bytes: k ids of ceil(log2 d) bits, most significant bit first

    exact_values, coeffs  floats, of logits or of log-probabilities: only the second can be read, the first have no log-sum-exp
    packed_indices        64-bit words of 64 // bits ids each, least significant first

    token_ids, top_values ids and floats, all of them exact
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from logitcache.errors import CacheError, InputError, first_line
from logitcache.manifest import Identity, text_hash, tokenizer_hash
from logitcache.schema import Trace
from logitcache.sections import Sections
from logitcache.topk import MASS_SLACK, SparseRows, _log_power_sum, from_topk
from logitcache.writer import new_cache

# R rows, L tokens, K ids of a row, E of them with exact values, V vocabulary.

CONFIG = "compression_config.yaml"  # what DistillKit's capture leaves beside its shards
UNKNOWN = "unknown"
_LAYOUTS = {
    "packed": ("compressed_logprobs", "bytepacked_indices"),
    "legacy": ("exact_values", "coeffs", "packed_indices"),
    "raw": ("token_ids", "top_values"),
}
_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}
_ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}  # relative, at worst
_ALIGNMENT_ROWS = 1000
_ABOVE_ZERO = 1e-3  # nats: further than rounding lifts a log-probability


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What came over, and what did not."""

    texts: int
    tokens: int
    rows: int
    kept: int  # ids of a row
    fitted: int  # ids of a row whose values were a curve: dropped, their mass is in the tail
    unseen: int  # realised tokens outside the kept ids: their log-probability is unknown, NaN in the cache
    skipped: int  # texts of one token, which have no rows
    shards: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of a capture are written."""

    kind: str  # one of _LAYOUTS
    vocab_size: int
    k: int
    exact_k: int
    dtype: str  # of the exact values
    deltas: bool
    row_bytes: int  # of compressed_logprobs

    @property
    def id_bits(self) -> int:
        return max(1, (self.vocab_size - 1).bit_length())

    def decode(self, cells: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [R, K] and the log-probabilities of the first of them, float64 [R, E].

        Args:
            cells: the layout's columns of one text, [R, width of a row].
        Raises: CacheError where they are not of this layout.
        """
        if self.kind == "raw":
            _expect("top_values", cells["top_values"].shape[1], self.k)
            _expect("token_ids", cells["token_ids"].shape[1], self.k)
            return cells["token_ids"].astype(np.int64), cells["top_values"].astype(np.float64)
        if self.kind == "legacy":
            words, per_word = cells["packed_indices"].astype(np.uint64), 64 // self.id_bits
            _expect("packed_indices", words.shape[1], -(-self.k // per_word))
            _expect("exact_values", cells["exact_values"].shape[1], self.exact_k)
            shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(self.id_bits)
            ids = (words[:, :, None] >> shifts) & np.uint64((1 << self.id_bits) - 1)
            values = cells["exact_values"].astype(np.float64)
            return ids.reshape(len(words), -1)[:, : self.k].astype(np.int64), values
        packed, values = (_bytes(cells[name]) for name in ("bytepacked_indices", "compressed_logprobs"))
        _expect("bytepacked_indices", packed.shape[1], -(-self.k * self.id_bits // 8))
        _expect("compressed_logprobs", values.shape[1], self.row_bytes)
        bits = np.unpackbits(packed, axis=1)[:, : self.k * self.id_bits].reshape(-1, self.k, self.id_bits)
        ids = np.zeros(bits.shape[:2], np.int64)
        for bit in range(self.id_bits):
            ids = ids << 1 | bits[:, :, bit]
        size = np.dtype(_DTYPES[self.dtype]).itemsize
        exact = np.ascontiguousarray(values[:, : self.exact_k * size]).view(_DTYPES[self.dtype])
        if self.dtype == "bfloat16":
            exact = (exact.astype(np.uint32) << 16).view(np.float32)
        exact = exact.astype(np.float64)
        return ids, np.cumsum(exact, axis=1) if self.deltas else exact


def import_distillkit(
    source: Path,
    out: Path,
    *,
    tokenizer: str,
    teacher: str = UNKNOWN,
    config: Path | None = None,
    vocab_size: int | None = None,
    exact_part_only: bool = False,
    traces_per_shard: int = 64,
) -> ImportReport:
    """Makes a cache of the Parquet shards of a DistillKit capture.

    Each text becomes a trace; a packed row becomes as many as it holds. DistillKit trains on all of a text, so all of it
    is the answer, but for what `labels` mask, where the capture has them: up to their last masked stretch it is the
    prompt. The last row of a text that was cut belongs to a token that is not there, and is dropped, as is the padding
    token that the capture appends to have one more row. Sampling, engine and dtype are not recorded, and stay "unknown".
    Of a realised token outside the kept ids the log-probability is NaN; outside the capture's k its rank is 0.

    Half-precision values are off by up to 2^-8 of themselves, so their mass misses 1 by as much: each row is normalised,
    its tail is 1 - sum where that is larger than the doubt, and inside the doubt the estimate of ``topk.log_tail``.

    Args:
        source: a directory of .parquet files, at any depth, or one of them.
        tokenizer: the teacher's, a hub id or a folder.
        teacher: hub id; the capture does not say.
        config: YAML with the settings of the capture; None looks for compression_config.yaml beside the files.
        vocab_size: columns of the teacher's logits where they are more than the capture's settings say: padding.
        exact_part_only: keep the exact values and fold the fitted ones into the tail, instead of refusing.
    Raises: InputError where the capture cannot be decoded, with the file and row; NotACacheError where ``out`` holds
        something.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"), key=_natural)
    if not files:
        raise InputError(f"{source}: no .parquet files in it; give the directory of a DistillKit capture")
    loaded = _load_tokenizer(tokenizer)
    settings = _settings(config or _beside(files[0], source))
    layout = _layout(files[0], settings, vocab_size or len(loaded))
    if layout.exact_k == 0:
        raise InputError(
            f"{source}: every log-probability is a fitted curve, none is a number; nothing can be imported"
        )
    fitted = layout.k - layout.exact_k
    if fitted and not exact_part_only:
        raise InputError(
            f"{source}: a row holds {layout.exact_k} log-probabilities as numbers and {fitted} as a fitted curve, which is up "
            "to nats off; --exact-part-only keeps the numbers and leaves the rest to the tail"
        )
    identity = Identity(
        teacher=teacher,
        teacher_revision=UNKNOWN,
        tokenizer_hash=tokenizer_hash(loaded),
        chat_template_hash=text_hash(getattr(loaded, "chat_template", None)),
        vocab_size=vocab_size or layout.vocab_size,
        top_k=layout.exact_k,
        top_p=None,
        min_k=1,
        prompt_logits=True,
        sampling={},
        reasoning_markers=None,
        answer_regex=None,
        dtype=UNKNOWN,
        engine=f"DistillKit, {UNKNOWN} version",
        engine_args={"distillkit": settings} if settings else {},
        derived=["import --from distillkit" + (" --exact-part-only" if fitted else "")],
    )
    reader = _Reader(source, layout, identity, loaded)
    with new_cache(out, identity, f"DistillKit: {source.name}", traces_per_shard) as writer:
        for path in files:
            for trace in reader.traces(path):
                writer.add(trace)
        reader.check_alignment()
        if not reader.rows:
            raise InputError(f"{source}: no text of two tokens or more in it")
    return ImportReport(
        texts=writer.traces,
        tokens=reader.tokens,
        rows=reader.rows,
        kept=layout.exact_k,
        fitted=fitted,
        unseen=reader.unseen,
        skipped=reader.skipped,
        shards=writer.shards,
    )


class _Reader:
    """Source rows -> traces, with the counts of a report."""

    def __init__(self, source: Path, layout: Layout, identity: Identity, tokenizer: Any) -> None:
        self.source, self.layout, self.identity, self.tokenizer = source, layout, identity, tokenizer
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.padding = pad if pad is not None and pad != eos else None  # an EOS at the end may well be the text's own
        self.tokens = self.rows = self.unseen = self.skipped = self.probed = 0
        self.hits = np.zeros(
            3, np.int64
        )  # realised tokens among a row's ids, were it of the token before, its own, the next

    def traces(self, path: Path) -> Iterator[Trace]:
        """Raises: InputError naming the file and its row."""
        number = 0
        name = path.name if path == self.source else path.relative_to(self.source).as_posix()
        for batch in pq.ParquetFile(path).iter_batches(batch_size=8):  # a packed row takes megabytes
            for i in range(batch.num_rows):
                try:
                    yield from self._row(batch.slice(i, 1), f"{name}:{number}")
                except CacheError as e:
                    raise InputError(f"{path}, row {number}: {e}") from e
                number += 1

    def _row(self, row: pa.RecordBatch, name: str) -> Iterator[Trace]:
        tokens = _vector(row, "input_ids").astype(np.int64)
        if len(tokens) < 2:
            self.skipped += 1
            return
        ids_RK, exact_RE = self.layout.decode({c: _matrix(row, c) for c in _LAYOUTS[self.layout.kind]})
        spans = list(_texts(row, len(tokens), len(ids_RK)))
        labels = _vector(row, "labels") if "labels" in row.schema.names else None
        extra = {
            field.name: row.column(field.name)[0].as_py()
            for field in row.schema
            if not pa.types.is_nested(field.type) and field.name != "text"
        }
        for part, (start, stop) in enumerate(spans):
            if stop - start > 1 and tokens[stop - 1] == self.padding:
                stop -= 1
            if stop - start < 2:
                self.skipped += 1
                continue
            rows = slice(start, stop - 1)
            yield self._trace(
                f"{name}.{part}" if len(spans) > 1 else name,
                tokens[start:stop],
                ids_RK[rows],
                exact_RE[rows],
                0 if labels is None else _prompt_end(labels[start:stop]),
                extra,
            )

    def _trace(
        self,
        name: str,
        tokens: np.ndarray,
        ids_RK: np.ndarray,
        exact_RE: np.ndarray,
        prompt_end: int,
        extra: dict[str, Any],
    ) -> Trace:
        if not 0 <= tokens.min() <= tokens.max() < min(self.identity.vocab_size, 1 << self.layout.id_bits):
            raise CacheError(
                f"token ids up to {tokens.max()}, the capture's settings say {self.identity.vocab_size} and "
                f"{self.layout.id_bits} bits an id: they are not its settings, or its ids wrapped"
            )
        E = self.layout.exact_k
        rows = _rows(ids_RK[:, :E], exact_RE, self.identity.vocab_size, _ROUNDING[self.layout.dtype])
        match_RK = ids_RK == tokens[1:, None]
        rank_R = np.where(match_RK.any(axis=1), match_RK.argmax(axis=1) + 1, 0)
        known_R = (rank_R > 0) & (rank_R <= E)
        logprob_R = np.full(len(rows), np.nan, np.float32)
        logprob_R[known_R] = rows.logprobs.reshape(-1, E)[known_R, rank_R[known_R] - 1]
        self.tokens += len(tokens)
        self.rows += len(rows)
        self.unseen += int(np.count_nonzero(~known_R))
        self._align(tokens, ids_RK)
        return Trace(
            trace_id=self.identity.trace_id(name, hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest(), 0),
            prompt_id=name,
            sample_index=0,
            token_ids=tokens.astype(np.int32),
            sections=Sections(prompt_end, prompt_end, prompt_end, prompt_end, len(tokens)),
            row_start=1,
            rows=rows,
            token_logprob=logprob_R,
            token_rank=rank_R.astype(np.int32),
            text=self.tokenizer.decode(tokens[prompt_end:].tolist()),
            finish_reason=UNKNOWN,
            metadata=extra,
        )

    def _align(self, tokens: np.ndarray, ids_RK: np.ndarray) -> None:
        """Counts where realised tokens are found, until that tells whose rows these are."""
        if self.probed >= _ALIGNMENT_ROWS or len(tokens) < 3:
            return
        inner_RK = ids_RK[:-1]  # of tokens that have one after them
        for shift in range(3):
            self.hits[shift] += np.count_nonzero(inner_RK == tokens[shift : shift + len(inner_RK), None])
        self.probed += len(inner_RK)
        if self.probed >= _ALIGNMENT_ROWS:
            self.check_alignment()

    def check_alignment(self) -> None:
        """Raises: InputError for a capture whose rows fit another token better than their own."""
        before, own, after = self.hits.tolist()
        if (
            max(before, after) > 1.1 * own + 50
        ):  # in text the own token is nearly always there, its neighbours by chance
            place = "before" if before > after else "after"
            raise InputError(
                f"{self.source}: the rows fit the token {place} the one they belong to ({max(before, after):,} realised tokens "
                f"found, against {own:,}): they are off by one; DistillKit writes the row of token j + 1 at j"
            )


def _rows(ids_RE: np.ndarray, exact_RE: np.ndarray, vocab_size: int, rounding: float) -> SparseRows:
    """Rows of E entries each, normalised within the doubt that the rounding of their values leaves.

    Args:
        exact_RE: float64, log-probabilities in nats, each off by up to ``rounding`` of itself.
    Raises: CacheError for values that are no log-probabilities.
    """
    if not np.isfinite(exact_RE).all() or (np.diff(exact_RE, axis=1) > 0).any():
        raise CacheError("its values are not finite and falling; these are not the settings of its capture")
    if exact_RE.max() > _ABOVE_ZERO:
        raise CacheError(
            f"a value of {exact_RE.max():.3g}, no log-probability but a logit: without its log-sum-exp the mass outside the kept "
            "ids is lost, and the row cannot be read"
        )
    R, E = exact_RE.shape
    probs_RE = np.exp(exact_RE)
    mass_R = probs_RE.sum(axis=1)
    entropy_R = -(probs_RE * exact_RE).sum(axis=1)
    # Errors of p log p follow from those of log p; the rest is what a float32 log-softmax leaves, as in topk.log_tail.
    doubt_R = 2.0**-22 + (2.0**-22 + rounding) * entropy_R
    with np.errstate(divide="ignore", invalid="ignore"):
        cap_R = exact_RE[:, -1] + np.log(float(vocab_size - E))  # no id left out beats the last kept one
        floor_R = np.log(np.maximum(1 - mass_R - doubt_R, 0))
        ceiling_R = np.minimum(np.log(np.clip(1 - mass_R + doubt_R, doubt_R, 1)), cap_R)
        decay_R = (exact_RE[:, E // 2 - 1] - exact_RE[:, -1]) / np.log(E / (E // 2)) if E > 1 else np.ones(R)
        guess_R = exact_RE[:, -1] + np.log(E) + _log_power_sum(1 - decay_R, np.log(vocab_size / E))
    wrong_R = (mass_R > 1 + MASS_SLACK + doubt_R) | (np.exp(floor_R) > np.exp(cap_R) + MASS_SLACK)
    if wrong_R.any():
        row = int(wrong_R.argmax())
        raise CacheError(
            f"the {E} largest probabilities of its row {row} sum to {mass_R[row]:.6f}: no distribution at temperature 1; these "
            "are not the settings of its capture"
        )
    tail_R = np.minimum(np.maximum(guess_R, floor_R), ceiling_R)
    exact_RE = exact_RE + (np.log1p(-np.exp(tail_R)) - np.log(mass_R))[:, None]
    rows = from_topk(ids_RE, exact_RE.astype(np.float32), vocab_size)
    return replace(rows, log_tail=tail_R.astype(np.float32))


def _texts(row: pa.RecordBatch, L: int, R: int) -> Iterator[tuple[int, int]]:
    """Where the texts of a source row begin and end: one, or those that packing numbered in its attention mask."""
    if R not in (L - 1, L):
        raise CacheError(f"{R} rows for {L} tokens, expected one fewer, or as many where texts were cut and packed")
    if "attention_mask" not in row.schema.names:
        if R == L:
            raise CacheError("its texts were packed, and no column attention_mask tells them apart")
        yield 0, L
        return
    mask = _vector(row, "attention_mask")
    if len(mask) != L:
        raise CacheError(f"column attention_mask: {len(mask)} values for {L} tokens")
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), L]
    yield from ((a, b) for a, b in pairwise(edges) if mask[a] > 0)


def _prompt_end(labels: np.ndarray) -> int:
    """Where the last stretch of tokens that are trained on begins."""
    masked = labels < 0
    if masked.all():
        return len(labels)
    last = len(labels) - 1 - int(masked[::-1].argmin())
    before = np.flatnonzero(masked[:last])
    return int(before[-1]) + 1 if len(before) else 0


def _vector(row: pa.RecordBatch, name: str) -> np.ndarray:
    """The list of numbers in column ``name``."""
    if name not in row.schema.names:
        raise CacheError(f"no column {name}")
    values = row.column(name)[0].values
    if values is None or values.null_count:
        raise CacheError(f"column {name}: null")
    return values.to_numpy(zero_copy_only=False)


def _matrix(row: pa.RecordBatch, name: str) -> np.ndarray:
    """The lists of numbers in column ``name``, [R, width]."""
    if name not in row.schema.names:
        raise CacheError(f"no column {name}")
    lists = row.column(name)[0].values
    widths = [] if lists is None else lists.value_lengths().unique().to_pylist()
    if lists is None or len(widths) != 1 or widths[0] is None:
        raise CacheError(f"column {name}: rows of widths {widths}, expected rows of one width")
    values = lists.flatten()
    if values.null_count:
        raise CacheError(f"column {name}: null")
    return values.to_numpy(zero_copy_only=False).reshape(len(lists), widths[0])


def _bytes(values: np.ndarray) -> np.ndarray:
    if values.dtype != np.uint8 and values.size and not 0 <= values.min() <= values.max() <= 255:
        raise CacheError(f"bytes from {values.min()} to {values.max()}")
    return values.astype(np.uint8)


def _expect(column: str, found: int, width: int) -> None:
    if found != width:
        raise CacheError(
            f"column {column}: {found} numbers a row, the capture's settings give {width}: they are not its settings"
        )


def _layout(path: Path, settings: dict[str, Any], vocab_size: int) -> Layout:
    """The layout of a capture, from the columns of its first file and its settings.

    Raises: InputError where the columns are none of DistillKit's, or the settings are missing or others.
    """
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    kind = next((kind for kind, columns in _LAYOUTS.items() if {*columns, "input_ids"} <= {*names}), None)
    if kind is None:
        raise InputError(f"{path}: columns {', '.join(names)} are none that DistillKit writes")
    if kind == "raw":
        first = next(file.iter_batches(batch_size=1, columns=["top_values"]), None)
        k = _matrix(first, "top_values").shape[1] if first else 1
        return Layout(kind, vocab_size, k, k, "float32", False, 0)
    if not settings:
        raise InputError(f"{path}: no {CONFIG} beside it; give --config, a YAML file with the settings of the capture")
    try:
        if kind == "legacy":
            exact_k = int(settings["exact_k"])
            return Layout(kind, int(settings["vocab_size"]), int(settings["k"]), exact_k, "float16", False, 0)
        dtype, exact_k = settings.get("exact_dtype", "float32"), int(settings["exact_k"])
        size = {name: np.dtype(code).itemsize for name, code in _DTYPES.items()}
        terms = len(settings.get("polynomial_terms") or []) * size[settings.get("term_dtype", "float32")]
        bins = sum(
            size[b["scale_dtype"]] + -(-b["num_elements"] * b["element_bits"] // 8) for b in settings["residual_bins"]
        )
        deltas = bool(settings.get("delta_encoding", True))
        row_bytes = exact_k * size[dtype] + terms + bins
        return Layout(kind, int(settings["d"]), int(settings["k"]), exact_k, dtype, deltas, row_bytes)
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(
            f"{path}: the settings of its capture lack or mistake {e}; give --config another file"
        ) from None


def _beside(path: Path, source: Path) -> Path | None:
    """DistillKit's settings in the directory of a file, or in one above it up to ``source``."""
    places = [p for p in path.parents if p == source or source in p.parents] or [path.parent]
    return next((p / CONFIG for p in places if (p / CONFIG).is_file()), None)


def _settings(path: Path | None) -> dict[str, Any]:
    """The settings of a compressor, on their own or inside a training run's file; none for no file."""
    if path is None:
        return {}
    import yaml  # of transformers, which the tokenizer needs anyway

    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise InputError(f"{path}: cannot be read as YAML ({first_line(e)})") from None
    for name in ("teacher", "logprob_compressor", "legacy_logit_compression"):
        if isinstance(found, dict):
            found = found.get(name) or found
    if not isinstance(found, dict) or "k" not in found:
        raise InputError(f"{path}: holds no settings of a DistillKit capture (d, k, exact_k, ...)")
    return found


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise InputError(f"--tokenizer {name}: cannot be read as a folder or a hub id ({first_line(e)})") from None


def _natural(path: Path) -> list[Any]:
    """data_10 after data_2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(path))]
