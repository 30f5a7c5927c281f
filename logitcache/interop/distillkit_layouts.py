"""Decodes DistillKit's files: their columns, their settings, and the numbers of a row.

The k ids of a row are sorted by descending log-probability. Those of the first exact_k are stored as floats, the others as
the coefficients of a curve, in some captures with quantised residuals. There are three layouts, with different columns:

    compressed_logprobs   bytes: exact_k floats, coefficients, residuals; with delta_encoding, floats are differences
    bytepacked_indices    bytes: k ids of ceil(log2 d) bits, most significant bit first

    exact_values, coeffs  floats: log-probabilities, or logits in captures that cannot be imported
    packed_indices        64-bit words of 64 // bits ids each, least significant bits first

    token_ids, top_values ids and floats, all exact
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from logitcache.errors import CacheError, InputError, first_line
from logitcache.runtime.yaml_files import construct, place_of, read_yaml, reason_of

# R rows; K ids per row, E of them with exact values.

CONFIG = "compression_config.yaml"  # DistillKit writes it beside its shards
LAYOUTS = {
    "packed": ("compressed_logprobs", "bytepacked_indices"),
    "legacy": ("exact_values", "coeffs", "packed_indices"),
    "raw": ("token_ids", "top_values"),
}
_FLOATS = {"exact_values", "coeffs", "top_values"}  # columns of floats; all others are integers
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}
ROUNDING = {
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float32": 2.0**-24,
    "float64": 2.0**-53,
}  # largest relative error


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of a capture are stored."""

    kind: str  # one of LAYOUTS
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
        """Decodes ids, int64 [R, K], and the log-probabilities of the first E, float64 [R, E].

        Args:
            cells: the layout's columns of one text, [R, width of a row].
        Raises: CacheError if they do not fit this layout.
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


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a Parquet file.

    Raises: InputError if it cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{path}: cannot be read as Parquet ({first_line(e)})") from None


def _cell(row: pa.RecordBatch, name: str, depth: int) -> pa.Array | None:
    """The flat values of the list in column ``name`` of a batch of one row; None for null.

    Raises: CacheError if the column is missing, or is not of lists of numbers nested ``depth`` deep.
    """
    if name not in row.schema.names:
        raise CacheError(f"no column {name}")
    kind = inner = row.schema.field(name).type
    for _ in range(depth):
        inner = inner.value_type if any(is_list(inner) for is_list in _LISTS) else pa.null()
    if not (pa.types.is_integer(inner) or (name in _FLOATS and pa.types.is_floating(inner))):
        numbers = "numbers" if name in _FLOATS else "whole numbers"
        raise CacheError(f"column {name}: {kind}, expected {'lists of ' * depth}{numbers}")
    return row.column(name)[0].values


def vector(row: pa.RecordBatch, name: str) -> np.ndarray:
    """The list of numbers in column ``name`` of a batch of one row.

    Raises: CacheError if there is none.
    """
    values = _cell(row, name, 1)
    if values is None or values.null_count:
        raise CacheError(f"column {name}: null")
    return values.to_numpy(zero_copy_only=False)


def matrix(row: pa.RecordBatch, name: str) -> np.ndarray:
    """The lists of numbers in column ``name`` of a batch of one row, [R, width].

    Raises: CacheError if there are none, or if their widths differ.
    """
    lists = _cell(row, name, 2)
    widths = [] if lists is None else pc.call_function("list_value_length", [lists]).unique().to_pylist()
    if lists is None or len(widths) != 1 or widths[0] is None:
        raise CacheError(f"column {name}: rows of widths {widths}, expected rows of one width")
    values = lists.flatten()
    if values.null_count:
        raise CacheError(f"column {name}: null")
    return values.to_numpy(zero_copy_only=False).reshape(len(lists), widths[0])


def _bytes(values: np.ndarray) -> np.ndarray:
    if values.dtype != np.uint8 and values.size and not 0 <= values.min() <= values.max() <= 255:
        raise CacheError(f"values from {values.min()} to {values.max()}, expected bytes")
    return values.astype(np.uint8)


def _expect(column: str, found: int, width: int) -> None:
    if found != width:
        raise CacheError(
            f"column {column}: {found} numbers per row, the settings give {width}; they are not those of this capture"
        )


def read_layout(path: Path, settings: dict[str, Any], vocab_size: int) -> Layout:
    """Determines the layout of a capture from the columns of its first file and its settings.

    Raises: InputError if DistillKit does not write such columns, or if settings are missing or invalid.
    """
    file = open_parquet(path)
    names = file.schema_arrow.names
    kind = next((kind for kind, columns in LAYOUTS.items() if {*columns, "input_ids"} <= {*names}), None)
    if kind is None:
        raise InputError(f"{path}: columns {', '.join(names)} are not those of a DistillKit capture")
    if kind == "raw":
        try:
            first = next(file.iter_batches(batch_size=1, columns=["top_values"]), None)
            k = matrix(first, "top_values").shape[1] if first else 1
        except (CacheError, pa.ArrowException, OSError) as e:
            raise InputError(f"{path}, row 0: {str(e).strip()}") from e
        half = "halffloat" in str(file.schema_arrow.field("top_values").type)
        return Layout(kind, vocab_size, k, k, "float16" if half else "float32", False, 0)
    if not settings:
        raise InputError(
            f"{path}: no {CONFIG} beside it; give `settings`, a YAML file with the settings of the capture"
        )
    try:
        if kind == "legacy":
            exact_k = int(settings["exact_k"])
            return _checked(Layout(kind, int(settings["vocab_size"]), int(settings["k"]), exact_k, "float16", False, 0))
        dtype, exact_k = settings.get("exact_dtype", "float32"), int(settings["exact_k"])
        size = {name: np.dtype(code).itemsize for name, code in _DTYPES.items()}
        terms = len(settings.get("polynomial_terms") or []) * size[settings.get("term_dtype", "float32")]
        bins = sum(
            size[b["scale_dtype"]] + -(-b["num_elements"] * b["element_bits"] // 8) for b in settings["residual_bins"]
        )
        deltas = bool(settings.get("delta_encoding", True))
        row_bytes = exact_k * size[dtype] + terms + bins
        return _checked(Layout(kind, int(settings["d"]), int(settings["k"]), exact_k, dtype, deltas, row_bytes))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as e:
        raise InputError(f"{path}: in its settings {e} is missing or wrong; give another file as `settings`") from None


def _checked(layout: Layout) -> Layout:
    """Raises: ValueError for numbers that no capture has."""
    vocab_size, k, exact_k = layout.vocab_size, layout.k, layout.exact_k
    if not 0 <= exact_k <= k <= vocab_size <= 1 << 31 or k < 1:
        raise ValueError(f"vocabulary {vocab_size}, k {k} or exact_k {exact_k}")
    return layout


def find_settings(path: Path, source: Path) -> Path | None:
    """Finds DistillKit's settings in the directory of a file, or in a parent up to ``source``; None if there are none."""
    places = [p for p in path.parents if p == source or source in p.parents] or [path.parent]
    return next((p / CONFIG for p in places if (p / CONFIG).is_file()), None)


def read_settings(path: Path | None) -> dict[str, Any]:
    """Reads the settings of a compressor, from a file of their own or from that of a training run; {} for None.

    Raises: InputError for a file without such settings.
    """
    if path is None:
        return {}
    import yaml

    if not path.is_file():
        raise InputError(f"{path}: not a file; give `settings` a YAML file")
    node, loader = read_yaml(path)
    try:
        found = None if node is None else construct(node, loader)
        json.dumps(found, allow_nan=False)  # the identity of the cache holds them
    except (TypeError, ValueError, yaml.YAMLError) as e:
        raise InputError(f"{path}{place_of(e)}: cannot be read as settings ({reason_of(e)})") from None
    for name in ("teacher", "logprob_compressor", "legacy_logit_compression"):
        if isinstance(found, dict):
            found = found.get(name) or found
    if not isinstance(found, dict) or "k" not in found:
        raise InputError(f"{path}: contains no settings of a DistillKit capture (d, k, exact_k, ...)")
    return found
