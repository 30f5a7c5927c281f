"""The definition of every divergence against autograd, finite differences, dense formulas and its limits."""

import dataclasses
import itertools
import math

import pytest
import torch

from logitcache.kernels.divergences import DIVERGENCES, TAILS
from logitcache.kernels.objective import Objective
from logitcache.kernels.reference import softmax_, sparse_divergence, sparse_divergence_, weighted
from logitcache.kernels.targets import SparseTargets

# pyright: reportArgumentType=false

# N rows, V vocabulary, K ids of a row. float64 unless a test says otherwise.

MODES = [(d, t) for d in DIVERGENCES for t in TAILS if t != "sampled" or DIVERGENCES[d].linear_in_p]
BETA, ALPHA = 0.3, 0.2


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


def dense(divergence: str, log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Textbook formulas over all columns."""
    p, q = log_p.exp(), log_q.exp()

    def kl(a, b):
        return (a * (a / b).log()).sum(dim=1)

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: BETA * kl(p, BETA * p + (1 - BETA) * q) + (1 - BETA) * kl(q, BETA * p + (1 - BETA) * q),
        "skewed_forward_kl": lambda: kl(p, ALPHA * p + (1 - ALPHA) * q),
        "skewed_reverse_kl": lambda: kl(q, (1 - ALPHA) * p + ALPHA * q),
        "tv": lambda: 0.5 * (p - q).abs().sum(dim=1),
    }[divergence]()


def rows(n: int, vocab: int, scale: float = 1.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Teacher log-probabilities and student logits [n, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    teacher_NV, student_NV = scale * torch.randn(2, n, vocab, generator=generator, dtype=torch.float64)
    return teacher_NV.log_softmax(dim=1), student_NV


def options(divergence: str, tail: str) -> dict:
    return {
        "divergence": divergence,
        "tail": tail,
        "beta": BETA,
        "alpha": ALPHA,
        "temperature": 2.0 if tail == "support" else 1.0,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("divergence", "tail"), MODES)
def test_the_gradient_agrees_with_finite_differences(divergence, tail):
    logp_NV, logits_NV = rows(4, 13)
    targets = teacher(logp_NV, [5, 0, 13, 1])

    def loss(logits_NV):
        return sparse_divergence(
            logits_NV, targets, ce_weight=0.7, softcap=3.0, logit_scale=0.8, **options(divergence, tail)
        )

    assert torch.autograd.gradcheck(loss, logits_NV.requires_grad_())


@pytest.mark.parametrize(("divergence", "tail"), MODES)
@pytest.mark.parametrize("ce", [False, True])
def test_the_gradient_by_hand_is_the_gradient_of_autograd(divergence, tail, ce):
    logp_NV, logits_NV = rows(6, 57)
    targets = teacher(logp_NV, [5, 0, 57, 1, 8, 56])
    extra = {"softcap": 4.0, "logit_scale": -0.5} if ce else {}
    weights_N, ce_weights_N = torch.rand(2, 6, dtype=torch.float64)
    ce_weights_N = ce_weights_N if ce else None
    logits_NV.requires_grad_()
    want_N = sparse_divergence(
        logits_NV, targets, weights_N=weights_N, ce_weights_N=ce_weights_N, **extra, **options(divergence, tail)
    )
    (want_NV,) = torch.autograd.grad(want_N.sum(), logits_NV)
    found_NV = logits_NV.detach().clone()
    objective = Objective.of(**options(divergence, tail), **extra)
    values = sparse_divergence_(found_NV, targets, objective, weights_N, ce_weights_N)
    total_N = values.divergence_N * weights_N + (values.ce_N * ce_weights_N if ce_weights_N is not None else 0)
    torch.testing.assert_close(total_N, want_N, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_NV, want_NV, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "support"])
def test_a_support_of_the_whole_vocabulary_is_the_dense_divergence(divergence, tail):
    logp_NV, logits_NV = rows(5, 33)
    found_N = sparse_divergence(
        logits_NV, teacher(logp_NV, [33] * 5), divergence=divergence, tail=tail, beta=BETA, alpha=ALPHA
    )
    torch.testing.assert_close(
        found_N, dense(divergence, logp_NV, logits_NV.log_softmax(dim=1)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_bucket_is_the_dense_divergence_of_the_merged_rows(divergence):
    logp_NV, logits_NV = rows(5, 33)
    targets = teacher(logp_NV, [7] * 5)
    order_NV = logp_NV.argsort(dim=1, descending=True)

    def merged(log_NV):
        sorted_NV = log_NV.gather(1, order_NV)
        return torch.cat([sorted_NV[:, :7], sorted_NV[:, 7:].logsumexp(dim=1, keepdim=True)], dim=1)

    want_N = dense(divergence, merged(logp_NV), merged(logits_NV.log_softmax(dim=1)))
    found_N = sparse_divergence(logits_NV, targets, divergence=divergence, beta=BETA, alpha=ALPHA)
    torch.testing.assert_close(found_N, want_N, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_folding_ids_into_the_bucket_never_raises_the_divergence(divergence):
    logp_NV, logits_NV = rows(16, 33)
    values = [
        sparse_divergence(logits_NV, teacher(logp_NV, [k] * 16), divergence=divergence) for k in (0, 1, 4, 16, 32, 33)
    ]
    assert values[0].abs().max() < 1e-12  # one bucket holds everything
    for fewer_N, more_N in itertools.pairwise(values):
        assert (fewer_N <= more_N + 1e-12).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "support"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_perfect_student_has_no_loss_and_no_gradient(divergence, tail, dtype):
    logp_NV, _ = rows(6, 57)
    targets = teacher(logp_NV, [8, 1, 57, 0, 20, 3])
    logits_NV = (logp_NV + 3.0).to(dtype).requires_grad_()
    loss_N = sparse_divergence(logits_NV, targets, **options(divergence, tail))
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert loss_N.abs().max() < tolerance
    assert grad_NV.abs().max() < tolerance


@pytest.mark.parametrize(("divergence", "tail"), MODES)
def test_a_row_without_a_support_has_no_divergence_and_no_gradient(divergence, tail):
    _, logits_NV = rows(3, 33)
    nothing, no_ids = torch.zeros(3), torch.zeros(0)
    targets = SparseTargets(torch.zeros(4).long(), no_ids.long(), no_ids, nothing, torch.full((3,), -100))
    found_NV = logits_NV.float()
    leaf_NV = found_NV.clone().requires_grad_()
    loss_N = sparse_divergence(leaf_NV, targets, **options(divergence, tail))
    values = sparse_divergence_(found_NV, targets, Objective.of(**options(divergence, tail)))
    for value_N in (loss_N, values.divergence_N):
        assert value_N.abs().max() <= 1e-7  # log(beta + 1 - beta), rounded
    for grad_NV in (torch.autograd.grad(loss_N.sum(), leaf_NV)[0], found_NV):
        assert grad_NV.abs().max() <= (1e-7 if grad_NV is not found_NV else 0.0)


@pytest.mark.parametrize(("divergence", "tail"), MODES)
@pytest.mark.parametrize("scale", [1.0, 0.8, -0.8])
def test_a_masked_id_keeps_no_probability_and_no_gradient_under_a_softcap(divergence, tail, scale):
    logp_NV, logits_NV = rows(3, 20)
    targets = teacher(logp_NV, [5, 0, 2])
    masked_NV = torch.ones(3, 33, dtype=torch.bool)
    masked_NV[:, :20] = False
    padded_NV = torch.nn.functional.pad(logits_NV, (0, 13), value=-math.inf).requires_grad_()
    more = {"softcap": 3.0, "logit_scale": scale, **options(divergence, tail)}
    loss_N = sparse_divergence(padded_NV, targets, ce_weight=0.5, **more)
    torch.testing.assert_close(loss_N, sparse_divergence(logits_NV, targets, ce_weight=0.5, **more))
    (want_NV,) = torch.autograd.grad(loss_N.sum(), padded_NV)
    found_NV = padded_NV.detach().clone()
    sparse_divergence_(found_NV, targets, Objective.of(**more), None, torch.full((3,), 0.5))
    torch.testing.assert_close(found_NV, want_NV, rtol=1e-12, atol=1e-12)
    assert (found_NV[masked_NV] == 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_squared_is_in_the_loss_and_in_the_gradient(divergence):
    logp_NV, logits_NV = rows(4, 33)
    targets, temperature = teacher(logp_NV, [6] * 4), 3.0
    logits_NV.requires_grad_()
    hot_N = sparse_divergence(logits_NV, targets, divergence=divergence, tail="support", temperature=temperature)
    cooled = SparseTargets(targets.offsets, targets.ids, targets.logprobs / temperature, targets.log_tail)
    plain_N = temperature**2 * sparse_divergence(logits_NV / temperature, cooled, divergence=divergence, tail="support")
    torch.testing.assert_close(hot_N, plain_N)
    by_hand_NV = logits_NV.detach().clone()
    objective = Objective.of(divergence, "support", temperature=temperature)
    sparse_divergence_(by_hand_NV, targets, objective)
    torch.testing.assert_close(by_hand_NV, torch.autograd.grad(plain_N.sum(), logits_NV)[0])


def test_the_sampled_tail_is_unbiased_for_the_dense_forward_kl():
    logp_NV, logits_NV = rows(1, 12)
    base = teacher(logp_NV, [4], labels=False)
    logits_NV.requires_grad_()
    dense_N = dense("forward_kl", logp_NV, logits_NV.log_softmax(dim=1))
    (want_NV,) = torch.autograd.grad(dense_N.sum(), logits_NV)
    mean_NV, mean = torch.zeros_like(want_NV), 0.0
    for label, p in enumerate(logp_NV[0].exp()):
        targets = SparseTargets(base.offsets, base.ids, base.logprobs, base.log_tail, torch.tensor([label]))
        loss_N = sparse_divergence(logits_NV, targets, tail="sampled")
        mean_NV += p * torch.autograd.grad(loss_N.sum(), logits_NV)[0]
        mean += float(p * loss_N.detach())
    torch.testing.assert_close(mean_NV, want_NV)
    tail_V = logp_NV[0].sort().values[:-4]
    assert mean == pytest.approx(float(dense_N.detach()) - float((tail_V.exp() * tail_V).sum()))


def test_cross_entropy_rides_along_and_ignores_rows_without_a_label():
    logp_NV, logits_NV = rows(3, 33)
    targets = teacher(logp_NV, [4] * 3)
    labels = torch.tensor([5, -100, 7])
    targets = SparseTargets(targets.offsets, targets.ids, targets.logprobs, targets.log_tail, labels)
    found_N = sparse_divergence(logits_NV, targets, ce_weight=0.5) - sparse_divergence(logits_NV, targets)
    want_N = 0.5 * torch.nn.functional.cross_entropy(logits_NV, labels, reduction="none")
    torch.testing.assert_close(found_N, want_N)


def test_the_student_learns_to_give_the_tail_its_mass():
    """Without a bucket a student may put all its mass outside the support; with it, both ways push the mass back."""
    logp_NV, _ = rows(1, 33)
    targets = teacher(logp_NV, [4])
    logits_NV = logp_NV.clone()
    logits_NV[0, targets.ids] -= 5.0
    for divergence in DIVERGENCES:
        by_hand_NV = logits_NV.clone()
        sparse_divergence_(by_hand_NV, targets, Objective.of(divergence))
        assert by_hand_NV[0, targets.ids].sum() < 0 < by_hand_NV[0].sum() - by_hand_NV[0, targets.ids].sum()


def test_a_tail_below_the_resolution_of_one_minus_sum_keeps_its_gradient():
    """1 - sum(Q) would be 0 in float32: the tail's log-sum-exp is taken directly."""
    logits_NV = torch.zeros(1, 1000)
    logits_NV[0, 0] = 40.0
    targets = SparseTargets(
        torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.5)])
    )
    by_hand_NV = logits_NV.clone()
    values = sparse_divergence_(by_hand_NV, targets, Objective.of())
    assert float(values.log_tail_N) == pytest.approx(math.log(999) - 40.0, abs=1e-5)
    assert float(values.divergence_N) == pytest.approx(0.5 * (40.0 - math.log(999)) - math.log(2), abs=1e-4)
    torch.testing.assert_close(by_hand_NV[0, 1:].sum(), torch.tensor(-0.5))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_students_stay_finite(divergence):
    logits_NV = torch.zeros(2, 50)
    logits_NV[0, 7], logits_NV[1, 3] = 300.0, -300.0
    targets = SparseTargets(
        torch.tensor([0, 2, 4]),
        torch.tensor([3, 5, 3, 5]),
        torch.tensor([-0.1, -20.0] * 2),
        torch.tensor([-2.4, -math.inf]),
    )
    by_hand_NV = logits_NV.clone()
    values = sparse_divergence_(by_hand_NV, targets, Objective.of(divergence))
    assert values.divergence_N.isfinite().all()
    assert by_hand_NV.isfinite().all()
    logits_NV.requires_grad_()
    (want_NV,) = torch.autograd.grad(sparse_divergence(logits_NV, targets, divergence=divergence).sum(), logits_NV)
    torch.testing.assert_close(by_hand_NV, want_NV, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab", [1000, 32003])
def test_float32_is_no_further_from_float64_than_autograd_is(divergence, vocab):
    logp_NV, logits_NV = rows(4, vocab, scale=3.0)
    targets = teacher(logp_NV, [8, 64, 1, 33])
    weak = SparseTargets(targets.offsets, targets.ids, targets.logprobs.float(), targets.log_tail.float())
    logits_NV = logits_NV.float()
    exact_NV = logits_NV.double().requires_grad_()
    exact_N = sparse_divergence(exact_NV, targets, divergence=divergence)
    (exact_grad_NV,) = torch.autograd.grad(exact_N.sum(), exact_NV)
    plain_NV = logits_NV.clone().requires_grad_()
    (plain_grad_NV,) = torch.autograd.grad(sparse_divergence(plain_NV, weak, divergence=divergence).sum(), plain_NV)
    found_NV = logits_NV.clone()
    values = sparse_divergence_(found_NV, weak, Objective.of(divergence))
    rows_E, slots_E = targets.padded()[2].nonzero(as_tuple=True)
    support_NV = torch.zeros_like(found_NV, dtype=torch.bool)
    support_NV[rows_E, targets.padded()[0][rows_E, slots_E]] = True
    for where in (support_NV, ~support_NV):
        error, plain = [(g - exact_grad_NV.float())[where].abs().max() for g in (found_NV, plain_grad_NV)]
        assert error <= plain + 1e-5
    torch.testing.assert_close(values.divergence_N, exact_N.detach().float(), atol=1e-5, rtol=1e-5)


def test_softmax_in_place_turns_a_row_of_nothing_into_zeros():
    z_NV = torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]])
    top_N, log_sum_N = softmax_(z_NV)
    torch.testing.assert_close(z_NV[0].sum(), torch.tensor(1.0))
    assert z_NV[1].tolist() == [0.0, 0.0]
    assert (top_N.tolist(), log_sum_N[1]) == ([1.0, -math.inf], -math.inf)


def by_hand(logits_NV, targets, weights_N, ce_weights_N, **choices) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted loss of each row and the gradient, from `sparse_divergence_`."""
    found_NV = logits_NV.clone()
    values = sparse_divergence_(found_NV, targets, Objective.of(**choices), weights_N, ce_weights_N)
    return weighted(values.divergence_N, weights_N) + weighted(values.ce_N, ce_weights_N), found_NV


def by_autograd(logits_NV, targets, weights_N, ce_weights_N, **choices) -> tuple[torch.Tensor, torch.Tensor]:
    leaf_NV = logits_NV.clone().requires_grad_()
    loss_N = sparse_divergence(leaf_NV, targets, weights_N=weights_N, ce_weights_N=ce_weights_N, **choices)
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), leaf_NV)[0]


@pytest.mark.parametrize("computed", [by_autograd, by_hand])
@pytest.mark.parametrize(("divergence", "tail"), MODES)
def test_a_shift_of_the_logits_changes_nothing(divergence, tail, computed):
    logp_NV, logits_NV = rows(6, 57)
    targets = teacher(logp_NV, [5, 0, 57, 1, 8, 56])
    logits_NV = (logits_NV * 64).round() / 64  # shifted float32 logits are exact
    for dtype, t, shift in [
        (torch.float64, None, 1e4),
        (torch.float64, None, -1e4),
        (torch.float32, None, 8192.0),
        (torch.float32, None, -8192.0),
        (torch.float64, 0.01, -150.0),
        (torch.float64, 0.01, 1e4),
    ]:
        choices = options(divergence, tail)
        if t is not None and tail == "support":
            choices["temperature"] = t
        rows_NV, weights = logits_NV.to(dtype), torch.ones(2, 6, dtype=dtype)
        want = computed(rows_NV, targets, *weights, **choices)
        found = computed(rows_NV + shift, targets, *weights, **choices)
        torch.testing.assert_close(found, want, rtol=1e-9 if dtype == torch.float64 else 1e-6, atol=1e-9)


@pytest.mark.parametrize("computed", [by_autograd, by_hand])
@pytest.mark.parametrize(("divergence", "tail"), MODES)
def test_masked_and_label_less_rows_are_those_of_logits_too_low_to_matter(divergence, tail, computed):
    """-inf is the limit of a logit that falls; float64 at -700 below the rest is that limit to rounding."""
    logp_NV, logits_NV = rows(8, 57)
    targets = teacher(logp_NV, [5, 0, 57, 1, 8, 56, 3, 3])
    label_N = targets.labels.clone()
    label_N[[0, 1, 6]] = -100
    targets = dataclasses.replace(targets, labels=label_N)
    ids_NK, _, valid_NK = targets.padded()
    logits_NV[:, 0] = -math.inf  # the id of a slot without an entry
    logits_NV[:, 40:] = -math.inf
    labelled_N = label_N >= 0
    logits_NV[labelled_N, label_N[labelled_N]] = 0.5  # the cross-entropy of a masked label is inf, and no mistake
    if DIVERGENCES[divergence].infinite_at_zero:  # so is the divergence of a masked id that the teacher kept
        support_NV = torch.zeros(8, 57, dtype=torch.bool)
        support_NV[valid_NK.nonzero()[:, 0], ids_NK[valid_NK]] = True
        logits_NV = torch.where(support_NV & (logits_NV == -math.inf), 0.25, logits_NV)
    elif tail == "support":  # without any of the teacher's ids there is nothing to renormalise over
        logits_NV[valid_NK.any(dim=1), ids_NK[valid_NK.any(dim=1), 0]] = 0.25
    weights = torch.rand(2, 8, dtype=torch.float64)
    found = computed(logits_NV, targets, *weights, **options(divergence, tail))
    low = computed(logits_NV.clamp(min=-700.0), targets, *weights, **options(divergence, tail))
    torch.testing.assert_close(found, low, rtol=1e-9, atol=1e-9)
    assert (found[1][logits_NV == -math.inf] == 0.0).all()


@pytest.mark.parametrize("computed", [by_autograd, by_hand])
def test_a_weight_of_0_makes_0_of_an_infinite_loss(computed):
    logp_NV, logits_NV = rows(1, 9)
    targets = teacher(logp_NV, [4])
    logits_NV[0, targets.ids[0]] = logits_NV[0, targets.labels[0]] = -math.inf
    loss_N, grad_NV = computed(logits_NV, targets, torch.zeros(1), torch.zeros(1))
    assert (loss_N.item(), grad_NV.abs().max()) == (0.0, 0.0)
