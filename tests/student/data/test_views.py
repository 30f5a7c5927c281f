import hashlib
import itertools
import pickle
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitcache import cli
from logitcache.capture.score import Crop
from logitcache.errors import StudentError
from logitcache.sections import SECTIONS, Sections
from logitcache.student.data.token_masks import STEPS, view_table
from logitcache.student.data.views import UNSUPERVISED, SupervisedTrace, View, section_of, tenth_of
from tests import tiny

# Bounds of the sections of eleven tokens 10, 11, ..., 20.
FIVE = (3, 4, 8, 9)  # prompt 10-12, <think> 13, reasoning 14-17, </think> 18, answer 19-20
NO_REASONING = (3, 3, 3, 3)
NO_ANSWER = (3, 4, 8, 11)  # it ends with a closing of three tokens
NEVER_CLOSED = (3, 4, 11, 11)
NO_MARKERS = (3, 3, 8, 8)  # as an answer's pattern tells them apart


TOKENS = list(range(10, 50))
WHOLE = tiny.trace(0, TOKENS, tiny.bigram()[TOKENS[:-1]])


def made(bounds=FIVE, *, row_start: int = 1, length: int = 11, rows: int | None = None, number: int = 0):
    """A trace of tokens 10, 11, ... with those sections, and that many rows."""
    kept = slice(row_start - 1, length - 1)
    return replace(
        WHOLE,
        trace_id=f"{number:032x}",
        token_ids=WHOLE.token_ids[:length],
        sections=Sections(*bounds, length),
        row_start=row_start,
        rows=WHOLE.rows[kept][:rows],
        token_logprob=WHOLE.token_logprob[kept][:rows],
        token_rank=WHOLE.token_rank[kept][:rows],
    )


def spelled(supervised: SupervisedTrace) -> str:
    """A word per position: the input token, then ``>target:row`` for a row, ``>target*`` for cross-entropy alone."""
    assert [a.dtype for a in (supervised.input_ids, supervised.target, supervised.row)] == [np.int64] * 3
    assert supervised.kd.dtype == supervised.ce.dtype == np.float32
    words = []
    for token, target, row, *weights in zip(
        supervised.input_ids, supervised.target, supervised.row, supervised.kd, supervised.ce, strict=True
    ):
        if target == UNSUPERVISED:
            assert (row, *weights) == (UNSUPERVISED, 0, 0)
            words.append(f"{token}")
        elif row == UNSUPERVISED:
            assert weights == [0, 1]
            words.append(f"{token}>{target}*")
        else:
            assert weights == [1, 0]
            words.append(f"{token}>{target}:{row}")
    return " ".join(words)


ALL = "10>1:0 11>2:1 12>3:2 13>4:3 14>5:4 15>6:5 16>7:6 17>8:7 18>9:8 19>10:9"
COMPLETION = "10 11 12>3:0 13>4:1 14>5:2 15>6:3 16>7:4 17>8:5 18>9:6 19>10:7"  # without rows of the prompt


@pytest.mark.parametrize("view", ["full", "left:0.5", "middle:0.5", "right:0.5", "reasoning-lsp:1", "random-mask:1"])
def test_the_full_view_supervises_with_every_row_one_position_before_its_token(view):
    assert spelled(View(view)(made())) == ALL
    assert spelled(View(view)(made(row_start=3))) == COMPLETION
    assert spelled(View(view)(made(NO_REASONING))) == ALL
    assert spelled(View(view)(made(NEVER_CLOSED))) == ALL
    assert spelled(View(view)(made((1, 2, 3, 4), length=5))) == "10>1:0 11>2:1 12>3:2 13>4:3"


def test_rows_that_were_sliced_away_are_not_supervised():
    assert spelled(View()(made(rows=7))) == "10>1:0 11>2:1 12>3:2 13>4:3 14>5:4 15>6:5 16>7:6"
    assert spelled(View("trsd:0.5")(made(rows=7))) == ""


def test_lsp_takes_the_first_part_of_all_tokens():
    assert spelled(View("lsp:0.5")(made())) == "10>1:0 11>2:1 12>3:2 13>4:3"
    assert spelled(View("lsp:0.5")(made(row_start=3))) == "10 11 12>3:0 13>4:1"
    assert spelled(View("lsp:0.19")(made())) == "10>1:0", "two tokens"
    assert spelled(View("lsp:0.01")(made())) == "", "the first token is kept, and nothing predicts it"
    assert spelled(View("lsp:1")(made(NO_REASONING))) == ALL


def test_reasoning_lsp_supervises_the_reasoning_up_to_the_cut_and_the_answer_by_its_tokens():
    cut = "10>1:0 11>2:1 12>3:2 13>4:3 14>5:4 15 18>9* 19>10*"
    assert spelled(View("reasoning-lsp:0.5")(made())) == cut
    assert spelled(View("reasoning-lsp:0.01")(made())) == "10>1:0 11>2:1 12>3:2 13>4:3 14 18>9* 19>10*"
    assert spelled(View("reasoning-lsp:0.5")(made(row_start=3))) == "10 11 12>3:0 13>4:1 14>5:2 15 18>9* 19>10*"
    assert spelled(View("reasoning-lsp:0.5")(made(NO_ANSWER))) == "10>1:0 11>2:1 12>3:2 13>4:3 14>5:4"
    assert spelled(View("reasoning-lsp:0.5")(made(NEVER_CLOSED))) == "10>1:0 11>2:1 12>3:2 13>4:3 14>5:4 15>6:5"
    no_markers = "10>1:0 11>2:1 12>3:2 13>4:3 14>8* 18>9* 19>10*"
    assert spelled(View("reasoning-lsp:0.5")(made(NO_MARKERS))) == no_markers
    assert spelled(View("reasoning-lsp:0.5")(made(rows=2))) == "10>1:0 11>2:1 12 13 14 15 18>9* 19>10*"


def test_reasoning_that_cannot_be_cut_leaves_the_answer_its_rows():
    assert spelled(View("reasoning-lsp:0.5")(made(NO_REASONING))) == ALL
    assert spelled(View("reasoning-lsp:0.5")(made((1, 2, 3, 4), length=5))) == "10>1:0 11>2:1 12>3:2 13>4:3"


def test_trsd_supervises_with_the_rows_of_the_answer_after_a_part_of_the_reasoning():
    assert spelled(View("trsd:0.5")(made())) == "10 11 12 13 14 15 18>9:8 19>10:9"
    assert spelled(View("trsd:0.5")(made(row_start=3))) == "10 11 12 13 14 15 18>9:6 19>10:7"
    assert spelled(View("trsd:1")(made())) == "10 11 12 13 14 15 16 17 18>9:8 19>10:9"
    assert spelled(View("trsd:0.01")(made())) == "10 11 12 13 14 18>9:8 19>10:9"
    assert spelled(View("trsd:0.5")(made(NO_MARKERS))) == "10 11 12 13 14>8:7 18>9:8 19>10:9"
    assert spelled(View("trsd:0.5")(made(NO_REASONING))) == "10 11 " + ALL.split(" ", 2)[2]
    assert spelled(View("trsd:0.5")(made((1, 2, 3, 4), length=5))) == "10 11 12 13>4:3"


def test_anchored_trsd_supervises_with_the_rows_before_the_cut_too_but_never_to_end_there():
    assert spelled(View("trsd-anchored:0.5")(made())) == "10>1:0 11>2:1 12>3:2 13>4:3 14>5:4 15 18>9:8 19>10:9"
    assert spelled(View("trsd-anchored:0.5")(made(row_start=3))) == "10 11 12>3:0 13>4:1 14>5:2 15 18>9:6 19>10:7"
    assert spelled(View("trsd-anchored:1")(made())) == ALL
    assert spelled(View("trsd-anchored:0.5")(made(NO_REASONING))) == ALL
    assert spelled(View("trsd-anchored:0.5")(made(NEVER_CLOSED))) == "10>1:0 11>2:1 12>3:2 13>4:3 14>5:4 15>6:5"
    for epoch in range(3):  # it draws what trsd draws
        inputs = [View(f"{name}:0.1-0.9")(wide(100), epoch).input_ids.tolist() for name in ("trsd", "trsd-anchored")]
        assert inputs[0] == inputs[1]


@pytest.mark.parametrize("bounds", [NO_ANSWER, NEVER_CLOSED])
def test_trsd_supervises_nothing_where_there_is_no_answer(bounds):
    assert spelled(View("trsd:0.1-0.9")(made(bounds))) == ""


def test_both_ends_takes_all_tokens_and_supervises_with_the_first_and_last_rows():
    assert spelled(View("both-ends:0.5")(made())) == "10>1:0 11>2:1 12>3:2 13 14 15 16 17 18>9:8 19>10:9"
    assert spelled(View("both-ends:0.5")(made(row_start=3))) == "10 11 12>3:0 13>4:1 14 15 16 17 18>9:6 19>10:7"
    assert spelled(View("both-ends:0.01")(made())) == "10>1:0"
    assert spelled(View("both-ends:1")(made())) == ALL


def test_random_mask_takes_a_share_of_the_rows_chosen_by_the_trace_id():
    assert spelled(View("random-mask:0.3")(made())) == "10 11>2:1 12 13 14 15 16>7:6 17 18 19>10:9"
    assert spelled(View("random-mask:0.3")(made(number=1))) == "10 11 12>3:2 13>4:3 14 15 16>7:6"
    smaller, larger = (View(f"random-mask:{r}")(made(number=7)).row for r in (0.3, 0.7))
    assert set(smaller) < set(larger)


def test_token_matched_takes_as_many_rows_of_every_section_as_the_smallest():
    assert spelled(View("token-matched")(made())) == "10>1:0 11>2:1 12>3:2 13 14 15 16>7:6 17 18>9:8 19>10:9"
    reasoning, answer = (View("token-matched", (s,))(made(row_start=3)) for s in ("reasoning", "answer"))
    assert spelled(answer) == "10 11 12 13 14 15 16 17 18>9:6 19>10:7"
    assert reasoning.kd.sum() == answer.kd.sum() == 2
    assert spelled(View("token-matched")(made(NO_ANSWER, row_start=3))) == COMPLETION, "one section only"
    assert View("token-matched")(made((1, 2, 3, 4), length=5)).kd.sum() == 2, "one of the reasoning, one of the answer"


def test_both_delimiters_are_supervised_with_the_reasoning():
    supervised = View(sections=("reasoning",))(made())
    assert spelled(supervised) == "10 11 12>3:2 13>4:3 14>5:4 15>6:5 16>7:6 17>8:7", "the input ends there"


def test_the_answer_is_supervised_from_its_first_token_with_all_before_it_as_context():
    assert spelled(View(sections=("answer",))(made())) == "10 11 12 13 14 15 16 17 18>9:8 19>10:9"


def test_a_section_without_rows_gives_no_input():
    assert spelled(View(sections=("prompt",))(made(row_start=3))) == ""
    assert spelled(View(sections=("answer",))(made(NEVER_CLOSED))) == ""


def test_a_trace_of_one_token_gives_no_input():
    for step in STEPS.values():
        assert spelled(View(step.example)(made((1, 1, 1, 1), length=1))) == ""


def test_steps_apply_from_left_to_right_and_sections_last():
    assert spelled(View("lsp:0.7", ("reasoning",))(made())) == "10 11 12>3:2 13>4:3 14>5:4 15>6:5"
    assert spelled(View("reasoning-lsp:0.5", ("answer",))(made())) == "10 11 12 13 14 15 18>9* 19>10*"
    assert spelled(View("lsp:0.7+both-ends:0.5")(made())) == "10>1:0 11>2:1 12 13 14 15>6:5"
    assert spelled(View("reasoning-lsp:0.5+both-ends:0.5")(made())) == "10>1:0 11>2:1 12 13 14 15 18 19>10*"
    assert spelled(View("both-ends:0.4", ("answer",))(made())) == "10 11 12 13 14 15 16 17 18>9:8 19>10:9"
    twice = View("both-ends:0.5+token-matched")(made())
    assert twice.kd.sum() == 3, "both ends leave two rows of the prompt, one of the reasoning and two of the answer"
    assert View("random-mask:0.5+random-mask:0.4")(made()).kd.sum() == 2


def test_draws_are_those_of_shake_128_of_the_trace_id():
    trace = made()
    assert trace.trace_id == "0" * 32
    draws = np.frombuffer(hashlib.shake_128(b"random-mask\0" + b"0" * 32).digest(8 * 11), "<u8")
    assert draws.argsort().tolist() == [7, 0, 2, 10, 1, 5, 3, 6, 4, 8, 9]  # the first token is never supervised
    assert spelled(View("random-mask:0.5")(trace)) == "10>1:0 11>2:1 12 13 14>5:4 15 16>7:6 17 18 19>10:9"


def test_a_view_depends_on_the_epoch_only_where_trsd_draws():
    trace = made((3, 4, 34, 35), length=40)
    for step in STEPS.values():
        first, later = (spelled(View(step.example)(trace, epoch)) for epoch in (0, 1))
        assert (first == later) == (not step.name.startswith("trsd")), step.name
    assert spelled(View("trsd:0.5")(trace, 0)) == spelled(View("trsd:0.5")(trace, 1)), "nothing is drawn"


def wide(reasoning: int):
    """One token of a prompt, an opening, that much reasoning, a closing and an answer of two tokens."""
    length = reasoning + 5
    trace = tiny.trace(0, [3] * length, tiny.bigram()[[3] * (length - 1)])
    return replace(trace, sections=Sections(1, 2, reasoning + 2, reasoning + 3, length))


def supervised_traces(view: str, reasoning: int, epoch: int = 0) -> list[SupervisedTrace]:
    """Of one trace under 2,000 ids."""
    trace = wide(reasoning)
    return [View(view)(replace(trace, trace_id=f"{i:032x}"), epoch) for i in range(2000)]


def kept(view: str, epoch: int = 0) -> np.ndarray:
    """Tokens that are left of a hundred of reasoning, for 2,000 trace ids."""
    return np.array([len(supervised.input_ids) - 4 for supervised in supervised_traces(view, 100, epoch)])


@pytest.mark.slow
def test_draws_from_a_range_are_uniform_and_new_in_each_epoch():
    first, second = kept("trsd:0.1-0.9", 0), kept("trsd:0.1-0.9", 1)
    for drawn in (first, second):
        assert (drawn.min(), drawn.max()) == (10, 89)
        below = np.searchsorted(np.sort(drawn), np.arange(10, 91), side="left") / len(drawn)
        assert abs(below - np.linspace(0, 1, 81)).max() < 0.05  # 0.044 is exceeded once in a thousand
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


@pytest.mark.slow
def test_draws_from_a_list_take_each_share_alike():
    drawn, counts = np.unique(kept("trsd:0.25,0.5,1"), return_counts=True)
    assert drawn.tolist() == [25, 50, 100]
    assert abs(counts - 2000 / 3).max() < 5 * np.sqrt(2000 * 2 / 9)


@pytest.mark.slow
def test_a_random_mask_favours_no_row_and_no_neighbour():
    supervised_NT = np.zeros((2000, 24))
    for supervised_T, supervised in zip(supervised_NT, supervised_traces("random-mask:0.5", 20), strict=True):
        supervised_T[: len(supervised.kd)] = supervised.kd
    assert (supervised_NT.sum(axis=1) == 12).all()
    assert abs(supervised_NT.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(2000)
    correlation = np.corrcoef(supervised_NT.T) - np.eye(24)
    assert abs(correlation + (1 - np.eye(24)) / 23).max() < 5 / np.sqrt(2000), "twelve of 24: -1/23 between any two"


def test_equal_views_are_spelled_alike_and_survive_pickling():
    for text, canonical in {
        "full": "full",
        "lsp:0.50": "lsp:0.5",
        "lsp:1.0": "lsp:1",
        "lsp:.00001": "lsp:0.00001",
        "trsd:.25,0.50,1.": "trsd:0.25,0.5,1",
        "trsd:0.10-0.9": "trsd:0.1-0.9",
        " lsp:0.5 + token-matched ": "lsp:0.5+token-matched",
        "full+both-ends:0.5+full": "both-ends:0.5",
    }.items():
        view = View(text, ("answer", "prompt"))
        assert str(view) == canonical
        assert view == View(str(view), ("prompt", "answer"))
        assert pickle.loads(pickle.dumps(view)) == view
        assert hash(view) == hash(View(canonical, ("prompt", "answer")))
        assert spelled(pickle.loads(pickle.dumps(view))(made())) == spelled(view(made()))
    assert View("lsp:0.5") != View("lsp:0.4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fulll", "unknown view 'fulll' in 'fulll': did you mean 'full'?"),
        ("lps:0.5", "unknown view 'lps' in 'lps:0.5': did you mean 'lsp:0.5'?"),
        ("random_mask:0.5", "did you mean 'random-mask:0.5'?"),
        ("lsp=0.5", "did you mean 'lsp:0.5'?"),
        ("sections:answer", "use `sections` to choose sections"),
        ("lsp:0.5+", "unknown view '' in 'lsp:0.5+'"),
        ("", "unknown view '' in '': did you mean 'full'?"),
        ("lsp", "view 'lsp': lsp takes a share P, 0 < P <= 1; write lsp:0.5"),
        ("lsp:", "lsp takes a share P"),
        ("lsp:0", "lsp takes a share P"),
        ("lsp:1.01", "lsp takes a share P"),
        ("lsp:-0.5", "lsp takes a share P"),
        ("lsp:50%", "lsp takes a share P"),
        ("lsp:nan", "lsp takes a share P"),
        ("lsp:1e-1", "lsp takes a share P"),
        ("lsp:0.25,0.5", "lsp takes a share P"),
        ("random-mask:half", "random-mask takes a share P, 0 < P <= 1; write random-mask:0.5"),
        ("trsd", "trsd takes shares above 0 and at most 1: one as in 0.5, some"),
        ("trsd:0.9-0.1", "a range as in 0.1-0.9; write trsd:0.1-0.9"),
        ("trsd:0.1-0.2-0.3", "trsd takes shares"),
        ("trsd:0.5,", "trsd takes shares"),
        ("trsd:0-1", "trsd takes shares"),
        ("trsd:r~0.5", "trsd takes shares"),
        ("full:0.5", "view 'full:0.5': full takes no argument; write full"),
        ("lsp:0.5+token-matched:3", "token-matched takes no argument"),
        ("lsp:0.5+trsd:1", "lsp and trsd both cut the trace; use one of them"),
        ("right:0.5+random-mask:0.5+lsp:0.5", "right and lsp both cut"),
        ("random-mask:0.50+lsp:0.5", "lsp cuts the trace and must come first: write lsp:0.5+random-mask:0.5"),
    ],
)
def test_a_view_that_does_not_parse_says_what_to_write(text, message):
    with pytest.raises(StudentError, match=re.escape(message)) as error:
        View(text)
    assert "\n" not in str(error.value)


def test_an_unknown_section_names_the_nearest():
    with pytest.raises(StudentError, match="unknown section 'anwser' in `sections`: did you mean 'answer'"):
        View(sections=("anwser",))
    with pytest.raises(StudentError, match="`sections` is empty"):
        View(sections=())


def test_every_step_has_a_line_of_help_and_an_example_that_works():
    for step, line in zip(STEPS.values(), view_table(), strict=True):
        assert line.split()[0] == step.usage
        assert str(View(step.example)) == step.example


def scored(*crops: str, then: tuple[str, ...] = ()):
    """The identity of a cache that `logitcache score` made of the one before, as often as there are crops."""
    derived = [
        f"score --from-cache 0123 --crop {Crop.parse(crop)}" if crop else "score --from-cache 0123" for crop in crops
    ]
    return replace(tiny.identity(), derived=[*derived, *then])


@pytest.mark.parametrize("where", ["left", "middle", "right"])
def test_a_crop_is_supervised_from_a_cache_that_was_scored_on_it(where):
    for spelling, other in itertools.product(("0.5", "0.50", ".5"), ("0.5", "0.500")):
        View(f"{where}:{spelling}").check(scored(f"{where}:{other}"), "cache")
    View(f"{where}:0.29").check(scored("right:0.9", f"{where}:0.29"), "cache")
    View(f"{where}:0.29").check(scored(f"{where}:0.29", "", then=("slice --top-k 8", "split 0-0.9")), "cache")
    View("lsp:0.5+random-mask:0.5").check(scored(f"{where}:0.5"), "cache")


@pytest.mark.parametrize("where", ["left", "middle", "right"])
def test_a_crop_that_is_missing_names_the_command_that_makes_it(where):
    with pytest.raises(StudentError) as error:
        View(f"{where}:0.50").check(tiny.identity(), "my-cache/")
    command = f"logitcache score --from-cache my-cache --crop {where}:0.5 --teacher tiny --out my-cache-{where}"
    assert f"`{command}`" in str(error.value)
    assert ("view lsp:0.5, which is the same" in str(error.value)) == (where == "left")
    with pytest.raises(StudentError, match=rf"made from whole traces.* --crop {where}:0\.3 "):
        View(f"{where}:0.3").check(scored(""), "cache")


def test_another_crop_is_refused_and_the_whole_cache_asked_for():
    with pytest.raises(
        StudentError, match=r"made from the crop left:0\.5; .*--from-cache WHOLE --crop right:0\.5 .*WHOLE is"
    ):
        View("right:0.5").check(scored("left:0.5"), "cache")
    with pytest.raises(StudentError, match=r"made from the crop right:0\.25;"):
        View("right:0.5").check(scored("right:0.5", "right:0.25"), "cache")


def test_the_command_survives_a_path_with_a_space():
    with pytest.raises(StudentError) as error:
        View("right:0.5").check(tiny.identity(), "my cache")
    words = shlex.split(str(error.value).split("`")[1])
    assert words[words.index("--from-cache") + 1] == "my cache"
    assert words[-1] == "my cache-right"


@pytest.mark.parametrize("view", ["reasoning-lsp:0.5", "trsd:0.5", "trsd-anchored:0.5"])
def test_cutting_the_reasoning_of_a_cache_without_any_is_refused(view):
    View(view).check(tiny.identity(), "cache")
    View(view).check(replace(tiny.identity(), reasoning_markers=None, answer_regex="Answer:"), "cache")
    with pytest.raises(
        StudentError, match="generate PROMPTS --teacher tiny --reasoning-markers '<think>,</think>' --out"
    ):
        View(view).check(replace(tiny.identity(), reasoning_markers=None), "cache")
    View("lsp:0.5").check(replace(tiny.identity(), reasoning_markers=None), "cache")


def test_sections_and_tenths_go_by_the_token():
    trace, tokens = made(FIVE, row_start=3), np.array([*range(11), UNSUPERVISED])
    assert section_of(trace, tokens).tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, UNSUPERVISED]
    assert tenth_of(trace, tokens).tolist() == [-1, -1, -1, 0, 1, 2, 3, 5, 6, 7, 8, -1]
    assert tenth_of(made((1, 1, 1, 1)), np.arange(11)).tolist() == [-1, *range(10)]
    assert tenth_of(made((11, 11, 11, 11)), tokens).tolist() == [-1] * 12
    assert tenth_of(wide(100), np.arange(1, 105)).tolist() == [i * 10 // 104 for i in range(104)]


SHARES = st.sampled_from(["0.01", "0.29", "0.5", "0.75", "1"])
TRSD = ("trsd:{}", "trsd:0.1-0.9", "trsd:0.25,0.5,1", "trsd-anchored:{}", "trsd-anchored:0.25,0.5,1")
CUTS = st.sampled_from(["full", "lsp:{}", "reasoning-lsp:{}", *TRSD, "right:{}"])
CHOICES = st.sampled_from(["both-ends:{}", "random-mask:{}", "token-matched"])


@st.composite
def some_view(draw) -> View:
    steps = [draw(CUTS), *draw(st.lists(CHOICES, max_size=2))]
    sections = draw(st.just(list(SECTIONS)) | st.lists(st.sampled_from(list(SECTIONS)), min_size=1))
    return View("+".join(step.format(draw(SHARES)) for step in steps), tuple(sections))


@st.composite
def some_trace(draw):
    """With sections of 0 to 6 tokens, 1 in all at least, and rows that begin and end somewhere."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=5, max_size=5).filter(any))
    *bounds, length = itertools.accumulate(sizes)
    row_start = draw(st.sampled_from([1, min(max(1, bounds[0]), length)]) | st.integers(1, length))
    return made(bounds, row_start=row_start, length=length, rows=draw(st.none() | st.integers(0, length)))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(some_view(), some_trace(), st.integers(0, 3))
def test_a_view_never_uses_a_row_whose_context_the_student_does_not_see(view, trace, epoch):
    supervised, text, answer = view(trace, epoch), str(view), trace.sections.answer_start
    words, tokens = spelled(supervised), trace.token_ids.tolist()
    assert not words or ">" in words.split()[-1], "the input ends at the last supervised position"
    assert [t for t in tokens if t in supervised.input_ids] == supervised.input_ids.tolist(), "in order, none made up"
    for position in (supervised.target != UNSUPERVISED).nonzero()[0]:
        target, row = int(supervised.target[position]), int(supervised.row[position])
        assert list(SECTIONS)[section_of(trace, np.array([target]))[0]] in view.sections
        if position + 1 < len(supervised.input_ids):
            assert supervised.input_ids[position + 1] == tokens[target], "the next input is what was to be predicted"
        if row == UNSUPERVISED:
            assert text.startswith("reasoning-lsp")
            assert target >= answer
            continue
        assert target == trace.row_start + row
        if text.startswith("trsd:"):
            assert target >= answer
        if not text.startswith("trsd") or target < answer:
            assert supervised.input_ids[: position + 1].tolist() == tokens[: trace.row_start + row]


def test_a_shifted_view_gives_each_position_the_row_before():
    assert spelled(tiny.Shifted(View())(made((1, 2, 3, 4), length=5))) == "10 11>2:0 12>3:1 13>4:2"


def test_the_command_line_explains_every_step():
    text = cli.load("train").help
    assert all(line in text for line in view_table())
