import numpy as np
import pytest

from logitcache import sparse_rows
from logitcache.errors import CacheError
from logitcache.sparse_rows import SparseRows

# R rows, K kept ids, V vocabulary.
V = 151_936


def shapes_of_teachers():
    """Logits [R, V]: normal, power laws, and either with one winner up to 30 nats above the rest; float32 and bf16."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(V) * spread for spread in (0.5, 4, 8)]
    for slope, lead in ((1, 0), (1, 10), (1, 20), (1.5, 10), (2, 20), (3, 0), (6, 20)):
        rows.append(-slope * np.log(np.arange(1, V + 1)))
        rows[-1][0] += lead
    for lead in (5, 14, 20, 30):
        rows.append(rng.standard_normal(V) * 1.5)
        rows[-1][7] += lead
    logits_RV = np.array(rows, np.float32)
    bf16_RV = ((logits_RV.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
    return np.concatenate([logits_RV, bf16_RV])


@pytest.fixture(scope="module")
def teacher():
    """What an engine returns, log-softmax in float32, the 64 largest; and true log tails at k, in float64."""
    descending_RV = -np.sort(-shapes_of_teachers(), axis=1)
    shifted_RV = descending_RV - descending_RV[:, :1]
    log_sum_R = np.log(np.exp(shifted_RV).sum(axis=1, dtype=np.float32))
    probs_RV = np.exp(shifted_RV.astype(np.float64))
    true = {k: np.log(probs_RV[:, k:].sum(axis=1)) - np.log(probs_RV.sum(axis=1)) for k in (1, 16, 64)}
    return (shifted_RV - log_sum_R[:, None])[:, :64], true


def rows_of(*logprobs, log_tail=None):
    counts = [len(row) for row in logprobs]
    flat = np.concatenate([np.asarray(row, np.float32) for row in logprobs])
    if log_tail is None:
        log_tail = [np.log(max(1 - np.exp(np.asarray(row, np.float64)).sum(), 1e-9)) for row in logprobs]
    ids = np.concatenate([np.arange(n) * 3 for n in counts]).astype(np.int32)
    return SparseRows(np.concatenate([[0], np.cumsum(counts)]), ids, flat, np.asarray(log_tail, np.float32))


def random_rows(R=50, K=40, vocab_size=1000, seed=0):
    rng = np.random.default_rng(seed)
    logits_RV = rng.standard_normal((R, vocab_size)) * rng.uniform(0.5, 6, (R, 1))
    logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
    ids_RK = np.argsort(-logprobs_RV, axis=1)[:, :K]
    return sparse_rows.from_topk(ids_RK, np.take_along_axis(logprobs_RV, ids_RK, axis=1), vocab_size)


@pytest.mark.parametrize("k", [1, 16, 64])
def test_the_tail_agrees_with_a_full_softmax_in_float64(teacher, k):
    logprobs_RK, true_R = teacher[0][:, :k], teacher[1][k]
    tail_R = sparse_rows.log_tail(logprobs_RK, V).astype(np.float64)
    assert np.isfinite(tail_R).all()
    assert np.abs(np.exp(tail_R) - np.exp(true_R)).max() < 2e-6
    assert (np.exp(true_R) * (tail_R - true_R) ** 2 / 2).max() < 1e-7  # what the error costs in KL
    assert np.abs(tail_R - true_R)[true_R > np.log(1e-4)].max() < 5e-3
    if k > 1:  # below what float32 resolves, the decay of the ranks still gives it to a factor of 3
        assert np.abs(tail_R - true_R).max() < np.log(3)


def test_one_minus_the_sum_alone_would_lose_peaked_tails(teacher):
    logprobs_RK, true = teacher
    naive_R = 1 - np.exp(logprobs_RK.astype(np.float64)).sum(axis=1)
    assert (naive_R <= 0).any()
    assert np.abs(naive_R / np.exp(true[64]) - 1).max() > 100


@pytest.mark.parametrize("k", [1, 16, 64])
def test_the_tail_never_exceeds_what_the_ids_left_out_can_hold(teacher, k):
    cap_R = teacher[0][:, k - 1].astype(np.float64) + np.log(V - k)
    assert (sparse_rows.log_tail(teacher[0][:, :k], V) <= cap_R + 1e-6).all()


def test_rounding_that_fakes_a_tail_is_held_to_the_smallest_kept_id():
    # 1 - sum says 3e-7, but the two ids left out hold e^-30 each at most
    assert sparse_rows.log_tail(np.array([[-3e-7, -30.0]]), 4)[0] <= np.log(2) - 30 + 1e-6


def test_the_tail_is_minus_infinity_only_for_a_complete_row():
    complete = np.log(np.array([[0.5, 0.3, 0.2]]))
    assert np.isneginf(sparse_rows.log_tail(complete, 3)).all()
    assert np.isfinite(sparse_rows.log_tail(np.array([[0.0, -20.0, -40.0]]), 4)).all()


def test_rows_are_sorted_and_ties_keep_the_engines_order():
    rows = sparse_rows.from_topk([[5, 9, 1, 7]], [[-2.0, -1.0, -2.0, -1.5]], 100)
    assert rows.ids.tolist() == [9, 7, 5, 1]
    assert rows.logprobs.tolist() == [-1.0, -1.5, -2.0, -2.0]
    assert (rows.ids.dtype, rows.logprobs.dtype, rows.offsets.dtype) == (np.int32, np.float32, np.int64)


def test_entries_of_probability_zero_are_dropped():
    rows = sparse_rows.from_topk([[1, 2, 3], [4, 5, 6]], np.log([[0.75, 0.25, 1e-30], [0.5, 0.3, 0.1]]), 100)
    zero = sparse_rows.from_topk(
        [[1, 2, 3], [4, 5, 6]], [[np.log(0.75), np.log(0.25), -np.inf], [-0.7, -1.2, -2.3]], 100
    )
    assert rows.counts.tolist() == [3, 3]
    assert zero.counts.tolist() == [2, 3]
    assert np.isneginf(zero.log_tail[0])
    assert np.isfinite(zero.log_tail[1])


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([[1, 100]], [[-1.0, -2.0]], "outside 0..99"),
        ([[-1, 2]], [[-1.0, -2.0]], "outside 0..99"),
        ([[3, 3]], [[-1.0, -2.0]], "row 0 contains an id twice"),
        ([[1, 2]], [[-1.0, np.nan]], "NaN"),
        ([[1, 2]], [[-0.1, -0.2]], "sum to 1.7"),
        ([[1, 2]], [[-5.0, -12.0]], "not a distribution"),
    ],
)
def test_what_no_teacher_gives_is_refused(ids, logprobs, message):
    with pytest.raises(CacheError, match=message):
        sparse_rows.from_topk(ids, logprobs, 100)


def test_no_rows_are_rows_too():
    assert len(sparse_rows.from_topk(np.empty((0, 4), np.int32), np.empty((0, 4), np.float32), 10)) == 0
    assert len(SparseRows.concatenate([])) == 0


def test_slices_put_together_again_are_the_rows():
    rows = sparse_rows.trim(random_rows(), top_p=0.9)
    parts = [rows[:7], rows[7:7], rows[7:31], rows[31:]]
    again = SparseRows.concatenate(parts)
    assert [len(part) for part in parts] == [7, 0, 24, 19]
    for name in ("offsets", "ids", "logprobs", "log_tail"):
        assert np.array_equal(getattr(again, name), getattr(rows, name))
    with pytest.raises(ValueError, match="step 1"):
        rows[::2]


def test_trim_keeps_the_smallest_prefix_that_reaches_the_mass():
    rows = random_rows()
    cut = sparse_rows.trim(rows, top_p=0.8)
    for r in range(len(rows)):
        probs = np.exp(rows[r : r + 1].logprobs.astype(np.float64))
        reached = np.flatnonzero(np.cumsum(probs) >= 0.8)
        n = reached[0] + 1 if len(reached) else len(probs)
        kept = cut[r : r + 1]
        assert kept.ids.tolist() == rows[r : r + 1].ids[:n].tolist()
        total = np.exp(kept.logprobs.astype(np.float64)).sum() + np.exp(kept.log_tail[0].astype(np.float64))
        assert total == pytest.approx(1, abs=1e-6)


def test_trim_keeps_min_k_entries_and_pinned_ids_whatever_their_rank():
    rows = rows_of([-0.01, -6.0, -7.0, -8.0], [-1.0, -1.2, -3.0, -4.0])
    assert sparse_rows.trim(rows, top_p=0.5).counts.tolist() == [1, 2]
    assert sparse_rows.trim(rows, top_p=0.5, min_k=3).counts.tolist() == [3, 3]
    assert sparse_rows.trim(rows, top_p=0.5, min_k=9).counts.tolist() == [4, 4]
    pinned = sparse_rows.trim(rows, top_p=0.5, pinned_ids=[9, 77])
    assert pinned.ids.tolist() == [0, 9, 0, 3, 9]
    assert sparse_rows.trim(rows, top_p=None) is rows


def test_the_cut_mass_joins_the_tail_exactly():
    rows = rows_of([-0.01, -20.0, -25.0], log_tail=[-30.0])
    expected = np.log(np.exp(-20.0) + np.exp(-25.0) + np.exp(-30.0))
    assert sparse_rows.trim(rows, top_p=0.5).log_tail[0] == np.float32(expected)


def test_a_fold_is_what_a_capture_at_that_k_gives(teacher):
    logprobs_RK = teacher[0]
    ids_RK = np.broadcast_to(np.arange(64), logprobs_RK.shape)
    rows = sparse_rows.from_topk(ids_RK, logprobs_RK, V)
    folded = sparse_rows.fold(rows, 16)
    captured = sparse_rows.from_topk(ids_RK[:, :16], logprobs_RK[:, :16], V)
    assert np.array_equal(folded.ids, captured.ids)
    assert np.abs(np.exp(folded.log_tail) - np.exp(captured.log_tail)).max() < 2e-6
    assert np.allclose(sparse_rows.fold(sparse_rows.fold(rows, 32), 16).log_tail, folded.log_tail, rtol=0, atol=2e-6)
    assert sparse_rows.fold(rows, 64) is rows


def test_bucketed_kl_is_the_kl_over_support_and_tail_in_any_order_of_ids():
    rows = random_rows()
    ids, logprobs = (a.reshape(len(rows), -1)[:, ::-1].ravel() for a in (rows.ids, rows.logprobs))
    mirrored = SparseRows(rows.offsets, ids, logprobs, rows.log_tail)
    assert not np.array_equal(mirrored.ids, rows.ids)
    assert np.array_equal(sparse_rows.bucketed_kl(rows, mirrored), np.zeros(len(rows)))
    p, q = rows_of(np.log([0.5, 0.3])), rows_of(np.log([0.4, 0.25]))
    # 0.5 ln(0.5 / 0.4) + 0.3 ln(0.3 / 0.25) + 0.2 ln(0.2 / 0.35)
    assert sparse_rows.bucketed_kl(p, q)[0] == pytest.approx(0.0543451, abs=1e-6)
    with pytest.raises(ValueError, match="ids"):
        sparse_rows.bucketed_kl(rows, SparseRows(rows.offsets, rows.ids + 1, rows.logprobs, rows.log_tail))


def test_bucketed_kl_sees_mass_that_went_missing():
    p = rows_of(np.log([0.5, 0.3]))
    lost = SparseRows(p.offsets, p.ids, p.logprobs, np.array([-np.inf], np.float32))
    assert np.isposinf(sparse_rows.bucketed_kl(p, lost)[0])
    assert sparse_rows.bucketed_kl(lost, p)[0] == pytest.approx(0.2, abs=1e-6)
    assert sparse_rows.bucketed_kl(lost, lost)[0] == 0


def test_pinned_ids_stay_whatever_their_rank_and_the_tail_is_what_is_left() -> None:
    rng, V, k, pinned = np.random.default_rng(3), 500, 8, [7, 250]
    logits_RV = rng.normal(0, 3, (60, V))
    logits_RV[:20, 7] = 30  # all but certain
    logits_RV[20:40, 250] = -40  # all but impossible
    logp_RV = logits_RV - np.logaddexp.reduce(logits_RV, axis=1, keepdims=True)
    order_RV = np.argsort(-logp_RV, axis=1, kind="stable")
    top_RK = order_RV[:, : k + len(pinned)]
    values_RK = np.take_along_axis(logp_RV, top_RK, axis=1).astype(np.float32)
    rows = sparse_rows.pin(
        sparse_rows.from_topk(top_RK, values_RK, V), k, pinned, logp_RV[:, pinned].astype(np.float32)
    )
    for r in range(len(rows)):
        span = slice(*rows.offsets[r : r + 2])
        others = [i for i in order_RV[r].tolist() if i not in pinned][:k]
        assert set(rows.ids[span].tolist()) == {*others, *pinned}
        np.testing.assert_allclose(rows.logprobs[span], logp_RV[r, rows.ids[span]], rtol=0, atol=1e-5)
        assert (np.diff(rows.logprobs[span]) <= 0).all()
        rest = np.exp(np.delete(logp_RV[r], [*others, *pinned])).sum()
        assert np.exp(rows.log_tail[r]) == pytest.approx(rest, rel=1e-4, abs=2e-6)
    assert (sparse_rows.fold(rows, 3, pinned).counts == 3 + 2).all()
    trimmed = sparse_rows.trim(rows, top_p=0.5, min_k=2, pinned_ids=pinned)
    assert trimmed.counts.min() == 2 + 2
    assert all((trimmed.ids == p).sum() == len(rows) for p in pinned)


def test_a_fold_of_pinned_rows_is_a_capture_at_fewer_ids() -> None:
    rng, V, pinned = np.random.default_rng(4), 300, [5, 9]
    logits_RV = rng.normal(0, 4, (40, V))
    logp_RV = (logits_RV - np.logaddexp.reduce(logits_RV, axis=1, keepdims=True)).astype(np.float32)
    order_RV = np.argsort(-logp_RV, axis=1, kind="stable")

    def capture(k: int) -> SparseRows:
        ids_RK = order_RV[:, : k + 2]
        rows = sparse_rows.from_topk(ids_RK, np.take_along_axis(logp_RV, ids_RK, axis=1), V)
        return sparse_rows.pin(rows, k, pinned, logp_RV[:, pinned])

    folded, fewer = sparse_rows.fold(capture(32), 8, pinned), capture(8)
    np.testing.assert_array_equal(folded.ids, fewer.ids)
    np.testing.assert_array_equal(folded.logprobs, fewer.logprobs)
    np.testing.assert_allclose(np.exp(folded.log_tail), np.exp(fewer.log_tail), rtol=0, atol=3e-6)
