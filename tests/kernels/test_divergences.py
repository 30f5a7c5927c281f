import subprocess
import sys

import pytest
import torch

from logitcache.kernels.divergences import DIVERGENCES, divergences_with

# By hand for P = (3/4, 1/4), Q = (1/2, 1/2): L, and Q dL/dQ of the two buckets; beta 1/2, alpha 1/5.
BY_HAND = {
    "forward_kl": (0.130812, [-0.75, -0.25]),  # 3/4 log 3/2 + 1/4 log 1/2
    "reverse_kl": (0.143841, [0.297267, 0.846574]),  # 1/2 log 2/3 + 1/2 log 2
    "jsd": (0.033822, [-0.055786, 0.071921]),  # M = (5/8, 3/8)
    "skewed_forward_kl": (0.085669, [-0.545455, -0.222222]),  # M = (11/20, 9/20)
    "skewed_reverse_kl": (0.087177, [0.260335, 0.588746]),  # M = (7/10, 3/10)
    "tv": (0.25, [-0.25, 0.25]),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_loss_and_slope_have_the_values_computed_by_hand(name):
    divergence = DIVERGENCES[name]
    mix = {"beta": 0.5, "alpha": 0.2, None: 0.5}[divergence.parameter]
    log_p, log_q = torch.tensor([0.75, 0.25]).log(), torch.tensor([0.5, 0.5]).log()
    value, slope = BY_HAND[name]
    assert divergence.loss(log_p, log_q, mix).sum().item() == pytest.approx(value, abs=1e-6)
    assert divergence.slope(log_p, log_q, mix).tolist() == pytest.approx(slope, abs=1e-6)


def test_the_table_says_which_divergence_reads_which_parameter():
    assert divergences_with("beta") == ["jsd"]
    assert divergences_with("alpha") == ["skewed_forward_kl", "skewed_reverse_kl"]


def test_the_table_can_be_read_without_torch():
    script = "import sys, logitcache.kernels.divergences; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"
