import pytest

from logitcache.errors import StudentError
from logitcache.student.data.held_out import split


def prompts(count: int) -> list[str]:
    return [f"prompt {i}" for i in range(count)]


def test_no_prompt_is_on_both_sides_of_the_split():
    ids = prompts(5000) * 3
    training, held = split(ids, 0.1)
    assert sorted([*training, *held]) == list(range(15_000))
    assert not {ids[i] for i in training} & {ids[i] for i in held}
    assert len(held) == pytest.approx(1500, rel=0.15)


def test_a_prompt_keeps_its_side_as_the_cache_grows_and_in_any_order():
    few, many = prompts(100), prompts(1000)[::-1]
    held_few = {few[i] for i in split(few, 0.1)[1]}
    held_many = {many[i] for i in split(many, 0.1)[1]}
    assert held_few == held_many & set(few)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
def test_neither_side_is_ever_empty(count, fraction):
    assert all(len(side) for side in split(prompts(count), fraction))


def test_a_single_prompt_cannot_be_split():
    with pytest.raises(StudentError, match="has 1 prompt"):
        split(["a", "a"], 0.05)
    with pytest.raises(StudentError, match="between 0 and 1"):
        split(prompts(5), 1.0)
