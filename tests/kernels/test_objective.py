import pytest

from logitcache.kernels.objective import Objective


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"divergence": "foward_kl"}, "did you mean 'forward_kl'"),
        ({"tail": "buckets"}, "did you mean 'bucket'"),
        ({"temperature": 2.0}, "tail support, where any temperature is exact"),
        ({"temperature": 0.0, "tail": "support"}, "give a number above 0"),
        ({"divergence": "jsd", "beta": 1.0}, "0 < `beta` < 1"),
        ({"divergence": "skewed_forward_kl", "alpha": 0.0}, "0 < `alpha` < 1"),
        ({"divergence": "reverse_kl", "tail": "sampled"}, "unbiased for forward_kl only"),
        ({"softcap": 0.0}, "None for off"),
        ({"logit_scale": 0.0}, "other than 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Objective.of(**wrong)
