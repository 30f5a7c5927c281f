"""Golden captures were written by DistillKit's own compressor, Parquet writer and packing (a61c2e7) from rows of
``tiny.bigram()``: texts of 14, 9, 6 and 11 tokens, ids of 7 bits (d = 65)."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from logitcache.cache.reader import Cache
from logitcache.cache.verify import verify
from logitcache.errors import InputError, NotACacheError
from logitcache.interop.distillkit import _rows, import_distillkit
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "distillkit"
LOGP_VV = tiny.bigram()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def top(tokens: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [R, k] and float64 log-probabilities [R, k] of the tokens after the first."""
    logp_RV = LOGP_VV[tokens[:-1]]
    ids_RK = np.argsort(-logp_RV, axis=1, kind="stable")[:, :k]
    return ids_RK, np.take_along_axis(logp_RV, ids_RK, axis=1)


def by_id(ids_RK: np.ndarray, logp_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row in the order of its ids: values that are equal on the cache's grid change places."""
    order_RK = np.argsort(ids_RK, axis=1)
    return np.take_along_axis(ids_RK, order_RK, axis=1), np.take_along_axis(logp_RK, order_RK, axis=1)


def bits(ids_RK: np.ndarray, width: int) -> list[list[int]]:
    """Ids as bytes, most significant bit first."""
    places = np.arange(width - 1, -1, -1)
    bits_RN = (ids_RK[:, :, None] >> places & 1).reshape(len(ids_RK), ids_RK.shape[1] * width)
    return np.packbits(bits_RN.astype(np.uint8), axis=1).tolist()


def write_capture(path: Path, texts: list[list[int]], k: int = 12, shift: int = 0, **columns: list) -> Path:
    """All k values exact in float32; rows of the token ``shift`` places on, where a capture is off."""
    path.mkdir()
    settings = {"d": 65, "k": k, "exact_k": k, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}
    (path / "compression_config.yaml").write_text(yaml.safe_dump(settings))
    rows = [top(np.roll(np.array(text), -shift), k) for text in texts]
    table = {
        "input_ids": pa.array(texts, pa.list_(pa.uint64())),
        "compressed_logprobs": pa.array(
            [[np.frombuffer(r.astype("<f4").tobytes(), np.uint8).tolist() for r in logp] for _, logp in rows],
            pa.list_(pa.list_(pa.uint8())),
        ),
        "bytepacked_indices": pa.array([bits(ids, 7) for ids, _ in rows], pa.list_(pa.list_(pa.uint8()))),
    }
    pq.write_table(pa.table(table | columns), path / "data_0.parquet")
    return path


def texts(count: int, length: int = 30) -> list[list[int]]:
    return [t.token_ids.tolist() for t in tiny.traces(count, count, lengths=(length, length + 1))]


def settle(path: Path, **changes) -> None:
    file = path / "compression_config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "kept", "fitted", "error"),
    [("bfloat16", 8, 16, 2.0**-8), ("deltas", 10, 6, 1e-5), ("legacy", 7, 5, 2.0**-11)],
)
def test_a_capture_of_distillkit_is_read_as_the_teacher_computed_it(
    tmp_path, tokenizer, name, kept, fitted, error
) -> None:
    report = import_distillkit(
        GOLDEN / name, tmp_path / "c", tokenizer=tokenizer, exact_part_only=True, teacher="bigram"
    )
    assert (report.texts, report.tokens, report.rows, report.kept, report.fitted) == (4, 40, 36, kept, fitted)
    cache = Cache.open(tmp_path / "c")
    assert verify(tmp_path / "c", workers=1) == []
    assert [len(t.token_ids) for t in cache] == [14, 9, 6, 11]
    for trace in cache:
        ids_RK, logp_RK = by_id(*top(trace.token_ids, kept))
        found_RK, value_RK = by_id(trace.ids.reshape(-1, kept), trace.logprobs.reshape(-1, kept))
        assert trace.row_start == 1
        assert np.array_equal(found_RK, ids_RK)
        # To their own precision, and to the grid of the cache.
        assert np.abs(value_RK - logp_RK).max() < np.abs(logp_RK).max() * error * 2 + 2.0**-6
        mass_R = np.exp(logp_RK).sum(axis=1)
        doubt_R = error * -(np.exp(logp_RK) * logp_RK).sum(axis=1) + 1e-3
        assert (np.abs(np.exp(trace.log_tail) - (1 - mass_R)) < 2 * doubt_R).all()
    identity = cache.identity
    assert (identity.teacher, identity.engine, identity.dtype) == ("bigram", "DistillKit, unknown version", "unknown")
    assert identity.derived == ["import --from distillkit --exact-part-only"]
    assert (identity.top_k, identity.vocab_size, identity.sampling) == (kept, 65, {})


def test_packed_texts_come_apart_and_their_last_rows_go(tmp_path, tokenizer) -> None:
    report = import_distillkit(GOLDEN / "packed", tmp_path / "c", tokenizer=tokenizer)
    cache = Cache.open(tmp_path / "c")
    # Packing had cut the last token of each text, and the rest of two.
    assert [len(t.token_ids) for t in cache] == [13, 3, 10, 6]
    assert [len(t.rows) for t in cache] == [12, 2, 9, 5]
    assert (report.rows, report.fitted) == (28, 0)
    assert cache.prompt_ids == [f"data_0.parquet:{i}.{part}" for i in (0, 1) for part in (0, 1)]
    for trace in cache:
        assert np.array_equal(np.sort(trace.ids.reshape(-1, 12)), np.sort(top(trace.token_ids, 12)[0]))
    assert cache.identity.derived == ["import --from distillkit"]


def test_sampled_tokens_have_their_rank_and_where_it_is_kept_their_value(tmp_path, tokenizer) -> None:
    report = import_distillkit(GOLDEN / "bfloat16", tmp_path / "c", tokenizer=tokenizer, exact_part_only=True)
    unseen = 0
    for trace in Cache.open(tmp_path / "c"):
        logp_RV = LOGP_VV[trace.token_ids[:-1]]
        true_R = logp_RV[np.arange(len(logp_RV)), trace.token_ids[1:]]
        rank_R = (logp_RV > true_R[:, None]).sum(axis=1) + 1
        assert np.array_equal(trace.token_rank, np.where(rank_R <= 24, rank_R, 0))
        known_R = rank_R <= 8
        assert np.array_equal(np.isnan(trace.token_logprob), ~known_R)
        assert np.allclose(trace.token_logprob[known_R], true_R[known_R], rtol=2.0**-7, atol=0.02)
        unseen += (~known_R).sum()
    assert report.unknown == unseen > 0


def test_fitted_values_are_refused_unless_they_are_left_to_the_tail(tmp_path, tokenizer) -> None:
    with pytest.raises(InputError, match="8 log-probabilities as numbers and 16 as a fitted curve.*`exact_part_only`"):
        import_distillkit(GOLDEN / "bfloat16", tmp_path / "c", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_raw_rows_of_ids_and_log_probabilities_are_read(tmp_path, tokenizer) -> None:
    (tmp_path / "s").mkdir()
    made = texts(3)
    ids, values = zip(*(top(np.array(t), 6) for t in made), strict=True)
    table = {"input_ids": made, "token_ids": [i.tolist() for i in ids], "top_values": [v.tolist() for v in values]}
    pq.write_table(pa.table(table), tmp_path / "s" / "train-0.parquet")
    assert import_distillkit(tmp_path / "s", tmp_path / "c", tokenizer=tokenizer).kept == 6
    assert [t.token_ids.tolist() for t in Cache.open(tmp_path / "c")] == made
    logits = [(v + 9).tolist() for v in values]
    pq.write_table(pa.table(table | {"top_values": logits}), tmp_path / "s" / "train-0.parquet")
    with pytest.raises(InputError, match="train-0.parquet, row 0: .* not a log-probability but a logit"):
        import_distillkit(tmp_path / "s", tmp_path / "d", tokenizer=tokenizer)


def test_labels_tell_the_prompt_and_other_columns_are_kept(tmp_path, tokenizer) -> None:
    made = texts(2)
    labels = [[-100] * 10 + t[10:] for t in made]
    source = write_capture(tmp_path / "s", made, labels=pa.array(labels), topic=pa.array(["a", "b"]))
    import_distillkit(source, tmp_path / "c", tokenizer=tokenizer)
    trace = Cache.open(tmp_path / "c")[1]
    assert (trace.sections.prompt_end, trace.sections.sizes()["answer"]) == (10, 20)
    assert trace.text == tiny.tokenizer().decode(made[1][10:])
    assert trace.metadata == {"topic": "b"}


def test_the_padding_token_of_the_capture_is_no_part_of_a_text(tmp_path) -> None:
    padded = tiny.tokenizer()
    padded.pad_token = "<unk>"
    padded.save_pretrained(tmp_path / "t")
    source = write_capture(tmp_path / "s", [[*texts(1)[0], 0]])
    import_distillkit(source, tmp_path / "c", tokenizer=str(tmp_path / "t"))
    assert Cache.open(tmp_path / "c")[0].token_ids.tolist() == texts(1)[0]


@pytest.mark.parametrize(("shift", "place"), [(1, "after"), (-1, "before")])
def test_a_capture_that_is_off_by_one_is_refused(tmp_path, tokenizer, shift, place) -> None:
    source = write_capture(tmp_path / "s", texts(12), shift=shift)
    with pytest.raises(InputError, match=f"the rows fit the token {place} the one they belong to"):
        import_distillkit(source, tmp_path / "c", tokenizer=tokenizer)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"k": 16, "exact_k": 16}, "column bytepacked_indices: 11 numbers per row, the settings give 14"),
        ({"d": 129}, "column bytepacked_indices: 11 numbers per row, the settings give 12"),
        ({"exact_dtype": "bfloat16"}, "column compressed_logprobs: 48 numbers per row, the settings give 24"),
        ({"delta_encoding": True}, "not a distribution at temperature 1"),
        ({"exact_dtype": "int8"}, "in its settings 'int8' is missing or wrong"),
    ],
)
def test_settings_of_another_capture_are_refused(tmp_path, tokenizer, changes, what) -> None:
    source = write_capture(tmp_path / "s", texts(2))
    settle(source, **changes)
    with pytest.raises(InputError, match=what):
        import_distillkit(source, tmp_path / "c", tokenizer=tokenizer)


def test_settings_that_are_missing_are_asked_for_and_found_in_a_training_run(tmp_path, tokenizer) -> None:
    source = write_capture(tmp_path / "s", texts(2))
    settings = yaml.safe_load((source / "compression_config.yaml").read_text())
    (source / "compression_config.yaml").unlink()
    with pytest.raises(InputError, match="no compression_config.yaml beside it; give `settings`"):
        import_distillkit(source, tmp_path / "c", tokenizer=tokenizer)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"teacher": {"kind": "dataset", "logprob_compressor": settings}}))
    assert import_distillkit(source, tmp_path / "c", tokenizer=tokenizer, settings=tmp_path / "run.yaml").texts == 2


def test_packed_texts_that_nothing_tells_apart_are_refused(tmp_path, tokenizer) -> None:
    source = write_capture(tmp_path / "s", texts(2))
    table = pq.read_table(source / "data_0.parquet")
    cut = pa.array([ids[:-1] for ids in table["input_ids"].to_pylist()], pa.list_(pa.uint64()))
    pq.write_table(table.set_column(0, "input_ids", cut), source / "data_0.parquet")
    with pytest.raises(
        InputError, match="data_0.parquet, row 0: its texts were packed, and there is no column attention_mask"
    ):
        import_distillkit(source, tmp_path / "c", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "values", "what"),
    [
        ("input_ids", pa.array(["w3 w4"]), "column input_ids: string, expected lists of whole numbers"),
        ("input_ids", pa.array([7]), "column input_ids: int64, expected lists of whole numbers"),
        ("input_ids", pa.array([[3.5] * 30]), "column input_ids: list<.*: double>, expected lists of whole numbers"),
        ("labels", pa.array(["w3 w4"]), "column labels: string, expected lists of whole numbers"),
        ("labels", pa.array([-100]), "column labels: int64, expected lists of whole numbers"),
        ("labels", pa.array([[-100] * 29]), "column labels: 29 values for 30 tokens"),
        ("bytepacked_indices", pa.array([[1] * 29]), "expected lists of lists of whole numbers"),
        ("bytepacked_indices", pa.array([[[1] * 11] * 28]), "29 rows of values for 28 rows of ids"),
        ("bytepacked_indices", pa.array([[[1.5] * 11] * 29]), "expected lists of lists of whole numbers"),
    ],
)
def test_columns_of_another_kind_or_length_are_refused(tmp_path, tokenizer, name, values, what) -> None:
    source = write_capture(tmp_path / "s", texts(1))
    table = pq.read_table(source / "data_0.parquet")
    table = table.drop([name] if name in table.column_names else []).append_column(name, values)
    pq.write_table(table, source / "data_0.parquet")
    with pytest.raises(InputError, match=f"data_0.parquet, row 0: .*{what}"):
        import_distillkit(source, tmp_path / "c", tokenizer=tokenizer)


def test_raw_columns_of_another_kind_are_refused_and_lists_of_a_fixed_size_are_read(tmp_path, tokenizer) -> None:
    (tmp_path / "s").mkdir()
    file, made = tmp_path / "s" / "a.parquet", np.array(texts(1)[0])
    ids, values = top(made, 6)
    table = {"input_ids": [made], "token_ids": [ids.tolist()], "top_values": pa.array(["text"])}
    pq.write_table(pa.table(table), file)
    with pytest.raises(InputError, match="a.parquet, row 0: column top_values: string, expected lists of lists of num"):
        import_distillkit(tmp_path / "s", tmp_path / "c", tokenizer=tokenizer)
    sized = pa.array([values.tolist()], pa.list_(pa.list_(pa.float32(), 6)))
    pq.write_table(pa.table(table | {"top_values": sized}), file)
    assert import_distillkit(tmp_path / "s", tmp_path / "c", tokenizer=tokenizer).kept == 6


def test_what_is_not_a_capture_is_refused(tmp_path, tokenizer) -> None:
    with pytest.raises(InputError, match="contains no .parquet files"):
        import_distillkit(tmp_path, tmp_path / "c", tokenizer=tokenizer)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="columns text are not those of a DistillKit capture"):
        import_distillkit(tmp_path, tmp_path / "c", tokenizer=tokenizer)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="a.parquet: cannot be read as Parquet"):
        import_distillkit(tmp_path / "a.parquet", tmp_path / "c", tokenizer=tokenizer)
    source = write_capture(tmp_path / "s", [[5]] * 2)
    with pytest.raises(InputError, match="contains no text of two tokens or more"):
        import_distillkit(source, tmp_path / "c", tokenizer=tokenizer)
    with pytest.raises(NotACacheError, match="is not an empty directory"):
        import_distillkit(write_capture(tmp_path / "w", texts(1)), tmp_path / "s", tokenizer=tokenizer)


def test_half_precision_tails_stay_within_their_doubt() -> None:
    rng = np.random.default_rng(3)
    logits_RV = rng.normal(size=(400, 5000)) * rng.uniform(1, 6, size=(400, 1))
    logp_RV = np.sort(logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True)), axis=1)[:, ::-1]
    exact_RE = logp_RV[:, :16]
    half = (np.ascontiguousarray(exact_RE, "<f4").view(np.uint32) + 0x8000 & 0xFFFF0000).view(np.float32)
    rows = _rows(np.tile(np.arange(16), (400, 1)), half.astype(np.float64), 5000, 2.0**-8)
    truth_R = 1 - np.exp(exact_RE).sum(axis=1)
    doubt_R = 2.0**-8 * -(np.exp(exact_RE) * exact_RE).sum(axis=1)
    assert (np.abs(np.exp(rows.log_tail) - truth_R) <= 2 * doubt_R + 1e-6).all()
    mass_R = np.exp(rows.logprobs.astype(np.float64)).reshape(400, 16).sum(axis=1)
    assert np.abs(mass_R + np.exp(rows.log_tail) - 1).max() < 1e-6


def test_the_user_s_own_files_may_be_links_and_a_fifo_is_refused(tmp_path, tokenizer) -> None:
    real = write_capture(tmp_path / "real", texts(2))
    (tmp_path / "linked").mkdir()
    for name in ("data_0.parquet", "compression_config.yaml"):
        (tmp_path / "linked" / name).symlink_to(real / name)
    (tmp_path / "linked" / "folder.parquet").mkdir()
    assert import_distillkit(tmp_path / "linked", tmp_path / "out", tokenizer=tokenizer).texts == 2
    os.mkfifo(tmp_path / "linked" / "data_1.parquet")
    with pytest.raises(InputError, match=r"data_1\.parquet: not a file"):
        import_distillkit(tmp_path / "linked", tmp_path / "two", tokenizer=tokenizer)
    os.mkfifo(tmp_path / "settings.yaml")
    with pytest.raises(InputError, match=r"settings\.yaml: not a file"):
        import_distillkit(real, tmp_path / "two", tokenizer=tokenizer, settings=tmp_path / "settings.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]\nk: 3",
        "k: .inf\nd: 65\nexact_k: 12\nexact_dtype: float32\nresidual_bins: []",
        "k: -1\nd: 65\nexact_k: 12\nexact_dtype: float32\nresidual_bins: []",
        "k: 12\nd: 1180591620717411303424\nexact_k: 12\nexact_dtype: float32\nresidual_bins: []",
        "k: 12\nd: 65\nexact_k: 13\nexact_dtype: float32\nresidual_bins: []",
        "k: 12\nd: 65\nexact_k: 12\nexact_dtype: float32\nresidual_bins: bins",
        "k: 12\nd: 65\nexact_k: 12\nexact_dtype: [float32]\nresidual_bins: []",
        "k: 12\nd: 65\nexact_k: 12\nexact_dtype: float32\nresidual_bins: [3]",
        "k: 12\nd: 65\nexact_k: 12\nresidual_bins: []\nmade: 2024-01-01",
        "k: 12\nd: 65\nexact_k: 12\nresidual_bins: []\nmade: .nan",
        "k: 12\n? [a]\n: 3",
        "k: " + "[" * 3000,
        "!!python/object/apply:os.system [x]",
        "- k",
    ],
)
def test_settings_that_no_capture_has_are_one_line(tmp_path, tokenizer, text) -> None:
    source = write_capture(tmp_path / "capture", texts(2))
    (source / "compression_config.yaml").write_text(text)
    with pytest.raises(InputError) as found:
        import_distillkit(source, tmp_path / "out", tokenizer=tokenizer)
    assert "\n" not in str(found.value)
    assert [p.name for p in tmp_path.iterdir()] == ["capture"]
