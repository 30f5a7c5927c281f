import pytest
import torch

from logitcache.kernels.reference import sparse_divergence
from logitcache.kernels.targets import SparseTargets


def teacher(logp_NV: torch.Tensor, sizes: list[int], labels: bool = True) -> SparseTargets:
    """The top `sizes[r]` ids of each row of a dense teacher, exact tails, and the second id or the rarest as label."""
    vocab = logp_NV.shape[1]
    order_NV = logp_NV.argsort(dim=1, descending=True)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    ids = torch.cat([row[:k] for row, k in zip(order_NV, sizes, strict=True)])
    logp = torch.cat([row[i[:k]] for row, i, k in zip(logp_NV, order_NV, sizes, strict=True)])
    tails = [row[i[k:]].logsumexp(0) for row, i, k in zip(logp_NV, order_NV, sizes, strict=True)]
    label_N = order_NV[range(len(sizes)), [min(1, vocab - 1) if r % 2 else vocab - 1 for r in range(len(sizes))]]
    return SparseTargets(offsets, ids, logp, torch.stack(tails), label_N if labels else None)


def rows(n: int, vocab: int, scale: float = 1.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher log-probabilities and student logits [n, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    teacher_NV, student_NV = scale * torch.randn(2, n, vocab, generator=generator, dtype=torch.float64)
    return teacher_NV.log_softmax(dim=1), student_NV


def test_padding_ids_change_nothing():
    logp_NV, logits_NV = rows(2, 33)
    plain = teacher(logp_NV, [3, 3], labels=False)
    gaps = [0, 1, 3, 5, 6, 7]
    ids, logprobs = torch.full((8,), -1), torch.zeros(8, dtype=torch.float64)
    ids[gaps], logprobs[gaps] = plain.ids, plain.logprobs
    padded = SparseTargets(torch.tensor([0, 4, 8]), ids.int(), logprobs, plain.log_tail)
    for tail in ("bucket", "support"):
        a_N, b_N = (sparse_divergence(logits_NV, targets, tail=tail) for targets in (plain, padded))
        torch.testing.assert_close(a_N, b_N, rtol=0, atol=0)


def test_rows_of_targets_share_their_entries():
    logp_NV, logits_NV = rows(5, 33)
    targets = teacher(logp_NV, [3, 0, 7, 2, 9])
    whole_N = sparse_divergence(logits_NV, targets)
    torch.testing.assert_close(sparse_divergence(logits_NV[1:4], targets.rows(1, 4)), whole_N[1:4])
    assert targets.rows(1, 4).ids is targets.ids
    assert len(targets.to("cpu").rows(2, 2)) == 0


def broken(**changes) -> SparseTargets:
    good = {
        "offsets": torch.tensor([0, 2, 3]),
        "ids": torch.tensor([4, 1, 4]),
        "logprobs": torch.tensor([-1.0, -2.0, -1.0]),
        "log_tail": torch.tensor([-0.7, -0.5]),
        "labels": torch.tensor([4, -100]),
    }
    return SparseTargets(**{**good, **changes})


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (broken(ids=torch.tensor([4, 4, 1])), "row 0 has an id twice"),
        (broken(ids=torch.tensor([4, 9, 1])), "ids contain 9, the student's head has 9 rows"),
        (broken(labels=torch.tensor([9, 1])), "labels contain 9, the student's head has 9 rows"),
        (broken(offsets=torch.tensor([0, 2])), r"offsets \[3\]"),
        (broken(logprobs=torch.zeros(2)), r"logprobs \[3\]"),
        (broken(offsets=torch.tensor([0, 2, 4])), r"ascend within \[0, 3\]"),
        (broken(offsets=torch.tensor([2, 0, 3])), r"ascend within \[0, 3\]"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        sparse_divergence(torch.zeros(2, 9), targets)


def test_padding_twice_in_a_row_is_no_duplicate():
    broken(ids=torch.tensor([-1, -1, 4])).check(9)


@pytest.mark.parametrize("wrong", [{"ce_weight": 1.0}, {"tail": "sampled"}])
def test_what_needs_the_sampled_token_says_so(wrong):
    with pytest.raises(ValueError, match=r"needs targets\.labels"):
        sparse_divergence(torch.zeros(2, 9), broken(labels=None), **wrong)


def test_logits_of_other_rows_than_the_targets_are_refused():
    with pytest.raises(ValueError, match="3 rows, targets 2"):
        sparse_divergence(torch.zeros(3, 9), broken())


def test_two_ways_to_weigh_the_cross_entropy_are_refused():
    with pytest.raises(ValueError, match="not both"):
        sparse_divergence(torch.zeros(2, 9), broken(), ce_weight=1.0, ce_weights_N=torch.ones(2))
