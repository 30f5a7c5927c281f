"""Makes a reasoner's folder: prompts, teacher, student, and the accuracy of both. Parts that exist are not made again."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.reasoner import tokenizer as tok
from benchmarks.reasoner.problems import FAMILIES, Problem, Ranges, distinct, write_prompts
from benchmarks.reasoner.train import Schedule, Shape, accuracy, again, exact_traces, fit, new_model, train_stream
from logitcache.runtime.files import atomic_directory, is_occupied, publish

Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """Size of the problems and of the models, and length of their training.

    easy: problems of the teacher's first steps, with few digits and terms, on which it learns to find a digit by its letter.
    warm_traces: traces per family for the student's warm-up, all that it sees before distillation.
    """

    ranges: Ranges
    easy: Ranges
    teacher: Shape
    easy_steps: Schedule
    steps: Schedule
    student: Shape
    warm_steps: Schedule
    warm_traces: int = 100
    train_prompts: int = 2000  # of each family
    test_prompts: int = 200  # of each family


SIZES = {
    "cpu": Size(
        ranges=Ranges(digits=(3, 4), terms=tuple(range(5, 12)), factors=((3, 1), (4, 1), (2, 2))),
        easy=Ranges(digits=(1, 2), terms=tuple(range(2, 7)), factors=((1, 1), (2, 1))),
        teacher=Shape(layers=3, hidden=128, heads=4, head_dim=32, intermediate=384),
        easy_steps=Schedule(steps=300, traces=36, rate=2.5e-3),
        steps=Schedule(steps=2500, traces=24, rate=2e-3),
        student=Shape(layers=3, hidden=128, heads=4, head_dim=32, intermediate=384),
        warm_steps=Schedule(steps=250, traces=24, rate=2e-3, warmup=20),
        warm_traces=150,
    ),
    "gpu": Size(
        ranges=Ranges(digits=tuple(range(4, 9)), terms=tuple(range(6, 13)), factors=((3, 2), (4, 1), (3, 3), (4, 2))),
        easy=Ranges(digits=(1, 2, 3), terms=tuple(range(2, 9)), factors=((1, 1), (2, 1), (2, 2))),
        teacher=Shape(layers=8, hidden=512, heads=8, head_dim=64, intermediate=1536),
        easy_steps=Schedule(steps=400, traces=512, rate=1e-3),
        steps=Schedule(steps=4000, traces=512, rate=1e-3, warmup=300),
        student=Shape(layers=4, hidden=256, heads=4, head_dim=64, intermediate=768),
        warm_steps=Schedule(steps=400, traces=96, rate=1e-3),
        train_prompts=20_000,
        test_prompts=500,
    ),
}


def make(size: Size, out: Path, seed: int = 0, say: Say = print) -> dict[str, Any]:
    """Makes the missing ones of prompts-train.jsonl, prompts-test.jsonl, teacher/, student/ and reasoner.json in `out`.

    Returns: the content of reasoner.json: for each model its parameters, seconds of training, and accuracies by family.
    Raises: SystemExit if `out` was made with another size or seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = _record(out, size, seed)
    _write(out, record)
    sets = {side: _prompts(size, out, side, seed) for side in ("train", "test")}
    record["prompts"] = {side: len(chosen) for side, chosen in sets.items()}
    record["reasoning_tokens"] = _lengths(sets["test"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, work in (("teacher", _teacher), ("student", _student)):
        found = record.setdefault(name, {})
        if "seconds" not in found or not (out / name).exists():
            if is_occupied(out / name):
                raise SystemExit(f"{out / name} is not of this record; move it away")
            found.clear()
            model = work(size, seed, device, found, lambda line, name=name: say(f"{name}: {line}"), sets["test"][:192])
            _write(out, record)
            _save(model, out / name)
        if "sampled" not in found:
            model = AutoModelForCausalLM.from_pretrained(out / name)
            model.to(device)  # pyright: ignore[reportArgumentType]
            torch.manual_seed(seed)
            found["greedy"], found["sampled"] = (accuracy(model, sets["test"], t) for t in (0.0, 1.0))
            _write(out, record)
        say(f"{name}: {found['parameters']:,} parameters, {found['seconds'] / 60:.1f} minutes; exact answers")
        for how in ("greedy", "sampled"):
            say(f"  {how:<8}" + "".join(f"  {family} {share:.1%}" for family, share in found[how].items()))
    return record


def _teacher(
    size: Size, seed: int, device: str, found: dict[str, Any], say: Say, test: list[Problem]
) -> PreTrainedModel:
    model = new_model(size.teacher, seed, device)
    watch = _watch(model, test, say)
    seconds = fit(model, train_stream(size.easy, seed), size.easy_steps, watch)
    seconds += fit(model, train_stream(size.ranges, seed), size.steps, watch)
    found |= {"parameters": model.num_parameters(), "seconds": seconds}
    return model


def _student(
    size: Size, seed: int, device: str, found: dict[str, Any], say: Say, test: list[Problem]
) -> PreTrainedModel:
    model = new_model(size.student, seed + 1, device)
    few = _in_turn(size.ranges, "train", seed + 1, size.warm_traces)
    seconds = fit(model, again(few, seed), size.warm_steps, _watch(model, test, say))
    found |= {"parameters": model.num_parameters(), "seconds": seconds, "traces": len(few)}
    return model


def _watch(model: PreTrainedModel, test: list[Problem], say: Say) -> Callable[[int, float], None]:
    began = time.monotonic()

    def watch(step: int, loss: float) -> None:
        shares = ", ".join(f"{family} {share:.0%}" for family, share in exact_traces(model, test).items())
        say(f"step {step}, {time.monotonic() - began:.0f} s, loss {loss:.3f}, whole traces exact: {shares}")

    return watch


def _in_turn(ranges: Ranges, side: str, seed: int, count: int) -> list[Problem]:
    """`count` different problems of each family, interleaved by family, so that the first n are a fair sample."""
    return list(chain.from_iterable(zip(*(distinct(f, ranges, side, seed, count) for f in FAMILIES), strict=True)))


def _prompts(size: Size, out: Path, side: str, seed: int) -> list[Problem]:
    chosen = _in_turn(size.ranges, side, seed, size.train_prompts if side == "train" else size.test_prompts)
    if not (path := out / f"prompts-{side}.jsonl").exists():
        write_prompts(path, chosen)
    return chosen


def _lengths(chosen: list[Problem]) -> dict[str, dict[str, float]]:
    """Tokens of the reasoning by family: minimum, mean, maximum; and the share after which the answer is known."""
    found = {}
    for family in FAMILIES:
        some = [p for p in chosen if p.family == family]
        tokens = [len(tok.encode(p.reasoning)) for p in some]
        derived = [len(tok.encode(p.reasoning[: p.derived])) for p in some]
        found[family] = {"least": min(tokens), "mean": mean(tokens), "most": max(tokens)}
        found[family]["derived"] = mean(d / t for d, t in zip(derived, tokens, strict=True))
    return found


def _save(model: PreTrainedModel, path: Path) -> None:
    with atomic_directory(path) as part:
        model.save_pretrained(part)
        tok.make().save_pretrained(part)


def _record(out: Path, size: Size, seed: int) -> dict[str, Any]:
    wanted = json.loads(json.dumps({"seed": seed, "size": asdict(size)}))
    if not (path := out / "reasoner.json").exists():
        return wanted
    record = json.loads(path.read_text())
    for key, value in wanted.items():
        if record[key] != value:
            raise SystemExit(f"{out} was made with another {key}: {record[key]}, not {value}; choose another --out")
    return record


def _write(out: Path, record: dict[str, Any]) -> None:
    publish(out / "reasoner.json", (json.dumps(record, indent=1) + "\n").encode())
