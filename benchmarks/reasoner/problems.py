"""Problems with worked reasoning: question, reasoning and answer, made from a seed.

    redundant       add d4+3c8+7b2+5a1+9    one column per step, the sum; then each column checked from the top, the sum again
    incremental     sum e3f7g2h9            the sum modulo ten, by a running total that keeps its last digit
    incompressible  mul b4a7*y6x8           long multiplication: one row per digit of the multiplier, then their sum

Each digit has a letter, which names its place (a is the units) or its item, so that a step finds its digits by name. The sum of a
redundant trace is just before the middle of its reasoning; the rest only checks it.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from logitcache.runtime.files import publish

LETTERS = "abcdefghijkl"
MULTIPLIERS = "xyzw"  # names of the multiplier's digits, units first
FAMILIES = ("redundant", "incremental", "incompressible")
SIDES = ("train", "test")
TEST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its reasoning. derived: characters of the reasoning up to the answer."""

    family: str
    question: str
    reasoning: str
    answer: str
    size: str
    steps: int
    derived: int

    @property
    def id(self) -> str:
        return f"{self.family}-{_hash(self.question):016x}"

    @property
    def side(self) -> str:
        return side(self.question)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Sizes of the problems of each family."""

    digits: tuple[int, ...]  # of each summand
    terms: tuple[int, ...]  # of a running total
    factors: tuple[tuple[int, int], ...]  # digits of multiplicand and multiplier


def side(question: str) -> str:
    """`train` or `test`, by a hash of the question alone, so that no question is on both sides."""
    return "test" if _hash(question) < TEST_SHARE * 2**64 else "train"


def problems(family: str, ranges: Ranges, which: str, seed: int) -> Iterator[Problem]:
    """Yields problems of one side forever, each a function of the seed and its index; questions may repeat."""
    make, rng = _MAKERS[family], random.Random(f"{family} {which} {seed}")
    while True:
        if (problem := make(ranges, rng)).side == which:
            yield problem


def distinct(family: str, ranges: Ranges, which: str, seed: int, count: int) -> list[Problem]:
    """The first `count` different problems.

    Raises: ValueError if there are too few.
    """
    found: dict[str, Problem] = {}
    for tried, problem in enumerate(problems(family, ranges, which, seed)):
        found.setdefault(problem.question, problem)
        if len(found) == count:
            break
        if tried > 20 * count + 1000:
            raise ValueError(
                f"{family}: {len(found)} different {which} problems in {tried} draws; ask for fewer than {count}"
            )
    return list(found.values())


def write_prompts(path: Path, chosen: Sequence[Problem]) -> None:
    """Writes prompts for `logitcache generate`: id, messages, answer; family, size, steps, reasoning, derived as metadata."""
    lines = []
    for p in chosen:
        row = {"id": p.id, "messages": p.messages, "answer": p.answer, "family": p.family, "size": p.size}
        row |= {"steps": p.steps, "reasoning": p.reasoning, "derived": p.derived}
        lines.append(json.dumps(row) + "\n")
    publish(path, "".join(lines).encode())


def _redundant(ranges: Ranges, rng: random.Random) -> Problem:
    n = rng.choice(ranges.digits)
    top = rng.choice([(x, y) for x in range(1, 8) for y in range(1, 8) if x + y < 9])  # the sum has n digits
    columns = [*((rng.randrange(10), rng.randrange(10)) for _ in range(n - 1)), top]
    steps, digits = _column_sums(columns)
    total = named(digits)
    checks, carry = [], 0
    for letter, (x, y), z in zip(LETTERS, columns, digits, strict=False):
        checks.append(f"{letter}:{(s := x + y + carry):02}-{y}-{carry}={x};")
        carry, digit = divmod(s, 10)
        assert digit == z
    first = "".join(steps) + f"so {total};"
    question = "add " + "".join(f"{LETTERS[i]}{x}+{y}" for i, (x, y) in reversed(list(enumerate(columns))))
    reasoning = first + "".join(reversed(checks)) + f"ok {total}"
    return Problem("redundant", question, reasoning, plain(digits), str(n), 2 * n, len(first))


def _incremental(ranges: Ranges, rng: random.Random) -> Problem:
    n = rng.choice(ranges.terms)
    first = rng.randrange(len(LETTERS) - n + 1)  # so that all letters are equally frequent
    items = [(c, rng.randrange(10)) for c in LETTERS[first : first + n]]
    total, steps = 0, []
    for letter, x in items:
        steps.append(f"{letter}{x}+{total}={x + total:02};")
        total = (x + total) % 10
    reasoning = "".join(steps)
    question = "sum " + "".join(f"{c}{x}" for c, x in items)
    return Problem("incremental", question, reasoning, str(total), str(n), n, len(reasoning))


def _incompressible(ranges: Ranges, rng: random.Random) -> Problem:
    n, m = rng.choice(ranges.factors)
    while True:  # products of full length, so that no answer begins with 0
        one, two = (rng.randrange(10 ** (k - 1), 10**k) for k in (n, m))
        if one * two >= 10 ** (n + m - 1):
            break
    x, y = ([int(d) for d in reversed(str(v))] for v in (one, two))
    parts, rows, count = [], [], n * m
    for place, (name, factor) in enumerate(zip(MULTIPLIERS, y, strict=False)):
        carry, row = 0, []
        parts.append(f"{name}{factor}:")
        for letter, digit in zip(LETTERS, x, strict=False):
            product = digit * factor
            parts.append(f"{letter}{digit}*{factor}={product:02}+{carry}={product + carry:02};")
            carry, last = divmod(product + carry, 10)
            row.append(last)
        row.append(carry)
        parts.append(f"so {named(row, place)}" + (";" if m > 1 else ""))
        rows.append([0] * place + row)
    for i in range(1, len(rows)):  # one row after the other is added to the sum so far
        width = len(rows[i])
        above = rows[0] + [0] * (width - len(rows[0]))
        steps, rows[0] = _column_sums(list(zip(above, rows[i], strict=True)))
        count += len(steps)
        parts += [*steps, f"so {named(rows[0])}" + (";" if i < len(rows) - 1 else "")]
    question = f"mul {named(x)}*{named(y, letters=MULTIPLIERS)}"
    reasoning = "".join(parts)
    return Problem("incompressible", question, reasoning, plain(rows[0]), f"{n}x{m}", count, len(reasoning))


_MAKERS: dict[str, Callable[[Ranges, random.Random], Problem]] = {
    "redundant": _redundant,
    "incremental": _incremental,
    "incompressible": _incompressible,
}


def _column_sums(columns: Sequence[tuple[int, int]]) -> tuple[list[str], list[int]]:
    """The step of each column, units first, and the digits of the sum; the last column must not carry."""
    carry, steps, digits = 0, [], []
    for letter, (x, y) in zip(LETTERS, columns, strict=False):
        total = x + y + carry
        steps.append(f"{letter}{x}+{y}+{carry}={total:02};")
        carry, digit = divmod(total, 10)
        digits.append(digit)
    assert carry == 0
    return steps, digits


def named(digits: Sequence[int], place: int = 0, letters: str = LETTERS) -> str:
    """Digits, given units first, in reading order, each after its letter: [0, 8, 5] is c5b8a0, and d5c8b0 at place 1."""
    return "".join(letters[place + i] + str(digit) for i, digit in reversed(list(enumerate(digits))))


def plain(digits: Sequence[int]) -> str:
    return "".join(map(str, reversed(digits)))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
