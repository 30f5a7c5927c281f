"""Imports DistillKit captures as caches. Log-probabilities stored as numbers are imported, fitted curves are not.

DistillKit (github.com/arcee-ai/DistillKit, read at a61c2e7) scores given texts. It writes one Parquet row per text, or
packs several texts into one row. Row j of a text is the teacher's distribution of token j + 1; the first token has none.
The log-probabilities of a row's most likely ids are stored as numbers, those of the others as a fitted curve.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from logitcache.cache.writer import new_cache
from logitcache.errors import CacheError, InputError, first_line
from logitcache.identity import Identity, text_hash, tokenizer_hash
from logitcache.interop.distillkit_layouts import (
    LAYOUTS,
    ROUNDING,
    Layout,
    find_settings,
    matrix,
    open_parquet,
    read_layout,
    read_settings,
    vector,
)
from logitcache.interop.formats import ImportReport
from logitcache.sections import Sections
from logitcache.sparse_rows import MASS_SLACK, SparseRows, _log_power_sum, from_topk
from logitcache.trace import Trace

# R rows; L tokens; K ids per row, E of them with exact values; V vocabulary.

UNKNOWN = "unknown"
_PLAIN = (pa.types.is_string, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating)
_ALIGNMENT_ROWS = 1000
_ABOVE_ZERO = 1e-3  # nats; rounding raises no log-probability further above 0


def import_distillkit(
    source: Path,
    out: Path,
    *,
    tokenizer: str,
    teacher: str = UNKNOWN,
    settings: Path | None = None,
    vocab_size: int | None = None,
    exact_part_only: bool = False,
    traces_per_shard: int = 64,
) -> ImportReport:
    """Makes a cache of the Parquet shards of a DistillKit capture.

    Each text becomes a trace; a row with several packed texts becomes several traces. DistillKit trains on whole texts, so
    the whole text is the answer. If the capture has `labels`, the tokens up to the end of their last masked stretch are the
    prompt. The last row of a text that was cut belongs to a token that is not stored, and is dropped. So is the padding
    token that a capture appends to get one more row. Captures do not record sampling, engine and dtype: these are
    "unknown". A sampled token outside the kept ids has the log-probability NaN; outside the capture's k its rank is 0.

    Half-precision values have a relative error of up to 2^-8, which their sum inherits. So the tail is estimated from the
    decay of the row, as in ``sparse_rows.log_tail``, and clipped to 1 - sum within this error; then the row is normalised.
    Measured on a capture of SmolLM2-135M with 16 values in bfloat16: KL(true | imported) 7e-5 on average, 5e-3 at worst;
    with a tail of 1 - sum 1.1e-4 and 2.2e-2.

    Args:
        source: a directory with .parquet files at any depth, or one file.
        tokenizer: the teacher's tokenizer: hub id or folder.
        teacher: hub id of the teacher, which captures do not record.
        settings: YAML file with the settings of the capture; None looks for compression_config.yaml beside the files.
        vocab_size: columns of the teacher's logits, if padding makes them more than the capture's settings say.
        exact_part_only: keep the exact values and fold the fitted ones into the tail, instead of refusing them.
    Raises: InputError naming file and row if the capture cannot be decoded; NotACacheError if ``out`` is not empty.
    """
    files = [source] if source.is_file() else sorted(p for p in source.rglob("*.parquet") if not p.is_dir())
    if not files:
        raise InputError(f"{source}: contains no .parquet files; give the directory of a DistillKit capture")
    loaded = _load_tokenizer(tokenizer)
    facts = read_settings(settings or find_settings(files[0], source))
    layout = read_layout(files[0], facts, vocab_size or len(loaded))
    if layout.exact_k == 0:
        raise InputError(
            f"{source}: all log-probabilities are stored as fitted curves, none as numbers; nothing can be imported"
        )
    fitted = layout.k - layout.exact_k
    if fitted and not exact_part_only:
        raise InputError(
            f"{source}: a row stores {layout.exact_k} log-probabilities as numbers and {fitted} as a fitted curve, "
            "which can be wrong by several nats; `exact_part_only` keeps the numbers and folds the rest into the tail"
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
        engine_args={"distillkit": facts} if facts else {},
        derived=["import --from distillkit" + (" --exact-part-only" if fitted else "")],
    )
    reader = _Reader(source, layout, identity, loaded)
    with new_cache(out, identity, f"DistillKit: {source.name}", traces_per_shard) as writer:
        for path in files:
            for trace in reader.traces(path):
                writer.add(trace)
        reader.check_alignment()
        if not reader.rows:
            raise InputError(f"{source}: contains no text of two tokens or more")
    return ImportReport(
        out=out,
        texts=writer.traces,
        tokens=reader.tokens,
        rows=reader.rows,
        kept=layout.exact_k,
        fitted=fitted,
        unknown=reader.unknown,
        skipped=reader.skipped,
        shards=writer.shards,
    )


class _Reader:
    """Converts source rows to traces, and counts for the report."""

    def __init__(self, source: Path, layout: Layout, identity: Identity, tokenizer: Any) -> None:
        self.source, self.layout, self.identity, self.tokenizer = source, layout, identity, tokenizer
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        self.padding = pad if pad is not None and pad != eos else None  # an EOS at the end may belong to the text
        self.tokens = self.rows = self.unknown = self.skipped = self.probed = 0
        # How often the ids of a row contain the token before the row's own, its own, and the token after it.
        self.hits = np.zeros(3, np.int64)

    def traces(self, path: Path) -> Iterator[Trace]:
        """Raises: InputError naming the file and its row."""
        number = 0
        name = path.name if path == self.source else path.relative_to(self.source).as_posix()
        try:
            for batch in open_parquet(path).iter_batches(batch_size=8):  # a row of packed texts takes megabytes
                for i in range(batch.num_rows):
                    yield from self._row(batch.slice(i, 1), f"{name}:{number}")
                    number += 1
        except (CacheError, pa.ArrowException, OSError) as e:
            raise InputError(f"{path}, row {number}: {str(e).strip()}") from e

    def _row(self, row: pa.RecordBatch, name: str) -> Iterator[Trace]:
        tokens = vector(row, "input_ids").astype(np.int64)
        if len(tokens) < 2:
            self.skipped += 1
            return
        ids_RK, exact_RE = self.layout.decode({c: matrix(row, c) for c in LAYOUTS[self.layout.kind]})
        if len(exact_RE) != len(ids_RK):
            raise CacheError(f"{len(exact_RE)} rows of values for {len(ids_RK)} rows of ids")
        spans = list(_texts(row, len(tokens), len(ids_RK)))
        labels = vector(row, "labels") if "labels" in row.schema.names else None
        if labels is not None and len(labels) != len(tokens):
            raise CacheError(f"column labels: {len(labels)} values for {len(tokens)} tokens")
        extra = {
            field.name: row.column(field.name)[0].as_py()
            for field in row.schema
            if any(is_plain(field.type) for is_plain in _PLAIN) and field.name != "text"
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
                f"token ids up to {tokens.max()}, the settings give {self.identity.vocab_size} ids of "
                f"{self.layout.id_bits} bits: they are not those of this capture, or its ids overflowed"
            )
        E = self.layout.exact_k
        rows = _rows(ids_RK[:, :E], exact_RE, self.identity.vocab_size, ROUNDING[self.layout.dtype])
        match_RK = ids_RK == tokens[1:, None]
        rank_R = np.where(match_RK.any(axis=1), match_RK.argmax(axis=1) + 1, 0)
        known_R = (rank_R > 0) & (rank_R <= E)
        logprob_R = np.full(len(rows), np.nan, np.float32)
        logprob_R[known_R] = rows.logprobs.reshape(-1, E)[known_R, rank_R[known_R] - 1]
        self.tokens += len(tokens)
        self.rows += len(rows)
        self.unknown += int(np.count_nonzero(~known_R))
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
        """Counts which tokens the rows contain, until there are enough rows for ``check_alignment``."""
        if self.probed >= _ALIGNMENT_ROWS or len(tokens) < 3:
            return
        inner_RK = ids_RK[:-1]  # rows of tokens that are not the last
        for shift in range(3):
            self.hits[shift] += np.count_nonzero(inner_RK == tokens[shift : shift + len(inner_RK), None])
        self.probed += len(inner_RK)
        if self.probed >= _ALIGNMENT_ROWS:
            self.check_alignment()

    def check_alignment(self) -> None:
        """Raises: InputError for a capture whose rows fit a neighbouring token better than their own."""
        before, own, after = self.hits.tolist()
        if max(before, after) > 1.1 * own + 50:  # of 1,186 rows of a real capture at k = 64: 436, 1,109 and 591
            place = "before" if before > after else "after"
            raise InputError(
                f"{self.source}: the rows fit the token {place} the one they belong to ({max(before, after):,} sampled tokens "
                f"found, against {own:,}): they are off by one; DistillKit stores the row of token j + 1 at j"
            )


def _rows(ids_RE: np.ndarray, exact_RE: np.ndarray, vocab_size: int, rounding: float) -> SparseRows:
    """Makes rows of E entries each, normalised within the rounding error of their values.

    Args:
        exact_RE: float64 [R, E], log-probabilities in nats.
        rounding: largest relative error of a value.
    Raises: CacheError for values that are not log-probabilities.
    """
    if not np.isfinite(exact_RE).all() or (np.diff(exact_RE, axis=1) > 0).any():
        raise CacheError("its values are not finite and descending; the settings are not those of this capture")
    if exact_RE.max() > _ABOVE_ZERO:
        raise CacheError(
            f"a value of {exact_RE.max():.3g}, not a log-probability but a logit: without the log-sum-exp, the mass "
            "outside the kept ids is unknown, and the row cannot be imported"
        )
    R, E = exact_RE.shape
    probs_RE = np.exp(exact_RE)
    mass_R = probs_RE.sum(axis=1)
    entropy_R = -(probs_RE * exact_RE).sum(axis=1)
    # The error of a float32 log-softmax, as in sparse_rows.log_tail, plus that of rounding. The worst case adds all rounding
    # errors; the usual case adds half of each in quadrature, since they are independent.
    slack_R = 2.0**-22 * (1 + entropy_R)
    worst_R = slack_R + rounding * entropy_R
    doubt_R = slack_R + rounding / 2 * np.sqrt(((probs_RE * exact_RE) ** 2).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        cap_R = exact_RE[:, -1] + np.log(float(vocab_size - E))  # no other id is more likely than the last kept one
        floor_R = np.log(np.maximum(1 - mass_R - doubt_R, 0))
        ceiling_R = np.minimum(np.log(np.clip(1 - mass_R + doubt_R, doubt_R, 1)), cap_R)
        decay_R = (exact_RE[:, E // 2 - 1] - exact_RE[:, -1]) / np.log(E / (E // 2)) if E > 1 else np.ones(R)
        guess_R = exact_RE[:, -1] + np.log(E) + _log_power_sum(1 - decay_R, np.log(vocab_size / E))
    wrong_R = (mass_R > 1 + MASS_SLACK + worst_R) | (mass_R + np.exp(cap_R) < 1 - MASS_SLACK - worst_R)
    if wrong_R.any():
        row = int(wrong_R.argmax())
        raise CacheError(
            f"the {E} largest probabilities of its row {row} sum to {mass_R[row]:.6f}: not a distribution at temperature 1; the "
            "settings are not those of this capture"
        )
    tail_R = np.minimum(np.maximum(guess_R, floor_R), ceiling_R)
    exact_RE = exact_RE + (np.log1p(-np.exp(tail_R)) - np.log(mass_R))[:, None]
    rows = from_topk(ids_RE, exact_RE.astype(np.float32), vocab_size)
    return replace(rows, log_tail=tail_R.astype(np.float32))


def _texts(row: pa.RecordBatch, L: int, R: int) -> Iterator[tuple[int, int]]:
    """Start and end of each text of a source row: one text, or the packed texts that its attention mask numbers."""
    if R not in (L - 1, L):
        raise CacheError(f"{R} rows for {L} tokens, expected one less, or as many if texts were cut and packed")
    if "attention_mask" not in row.schema.names:
        if R == L:
            raise CacheError("its texts were packed, and there is no column attention_mask that separates them")
        yield 0, L
        return
    mask = vector(row, "attention_mask")
    if len(mask) != L:
        raise CacheError(f"column attention_mask: {len(mask)} values for {L} tokens")
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), L]
    yield from ((a, b) for a, b in pairwise(edges) if mask[a] > 0)


def _prompt_end(labels: np.ndarray) -> int:
    """Where the last stretch of supervised tokens begins."""
    masked = labels < 0
    if masked.all():
        return len(labels)
    last = len(labels) - 1 - int(masked[::-1].argmin())
    before = np.flatnonzero(masked[:last])
    return int(before[-1]) + 1 if len(before) else 0


def _load_tokenizer(name: str) -> Any:
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    except ImportError:
        raise InputError("reading a tokenizer needs transformers; `pip install transformers`") from None
    except (OSError, ValueError) as e:
        raise InputError(f"`tokenizer` {name}: cannot be read as a folder or a hub id ({first_line(e)})") from None
