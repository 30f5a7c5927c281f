"""Tasks of reasoning-gym as prompts."""

import json
from urllib.parse import parse_qsl

from logitcache.errors import PromptsError
from logitcache.prompts.files import Rows


def gym_rows(source: str) -> Rows:
    try:
        import reasoning_gym
    except ImportError:
        raise PromptsError(f"{source}: reasoning-gym is not installed; pip install 'logitcache[gym]'") from None
    name, _, query = source.removeprefix("gym:").partition("?")
    try:
        options = {key: json.loads(value) for key, value in parse_qsl(query, strict_parsing=bool(query))}
    except ValueError:
        raise PromptsError(f"{source}: cannot read the options; write gym:NAME?size=100&seed=1") from None
    try:
        dataset = reasoning_gym.create_dataset(name, **{"seed": 0} | options)
    except (ValueError, TypeError, AssertionError) as e:
        raise PromptsError(f"{source}: not accepted by reasoning-gym: {_nearest_task(name, str(e))}") from None
    # (task, options, seed, position) determines an entry, so they make a stable id.
    seed, others = dataset.seed, {k: v for k, v in sorted(options.items()) if k not in ("seed", "size")}
    prefix = name + (f"[{json.dumps(others, sort_keys=True)}]" if others else "") + f":{seed}"
    for i, entry in enumerate(dataset):
        row = {"id": f"{prefix}:{i}", "messages": [{"role": "user", "content": entry["question"]}]}
        gold = entry["answer"]
        yield (
            f"{source} entry {i}",
            row | {"answer": gold, "gym": json.loads(json.dumps(entry["metadata"], default=str))},
        )


def _nearest_task(name: str, reason: str) -> str:
    import difflib

    from reasoning_gym.factory import DATASETS

    if name in DATASETS:
        return reason
    near = difflib.get_close_matches(name, DATASETS, n=1)
    return f"no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
