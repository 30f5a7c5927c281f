"""A smaller student cut out of a teacher."""

import re
from pathlib import Path

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from logitcache.errors import StudentError


def prune_layers(model: str | Path, out: str | Path, every: int = 3) -> PreTrainedModel:
    """Writes a copy of `model` with every `every`-th decoder layer to the directory `out`, with its tokenizer.

    Layers 0, every, 2 * every ... are kept; all else is copied, in its dtype.
    Raises: StudentError for a model without exactly one stack of as many layers as its config says.
    """
    teacher = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    fields = teacher.config.to_dict()
    depth: int = fields.get("num_hidden_layers") or 0
    stacks = [n for n, m in teacher.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if every < 1 or depth < 1 or len(stacks) != 1:
        raise StudentError(
            f"{model}: cannot keep every {every}-th layer: it has {len(stacks)} stacks of {depth} layers"
        )
    kept = range(0, depth, every)
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == depth:  # layer_types and the like
            fields[name] = [value[i] for i in kept]
    student = AutoModelForCausalLM.from_config(
        type(teacher.config).from_dict(fields | {"num_hidden_layers": len(kept)}), dtype=teacher.dtype
    )
    place = {str(old): new for new, old in enumerate(kept)}
    layer = re.compile(rf"{re.escape(stacks[0])}\.(\d+)\.(.*)")
    weights = {}
    for name, weight in teacher.state_dict().items():
        if found := layer.fullmatch(name):
            if found[1] not in place:
                continue
            name = f"{stacks[0]}.{place[found[1]]}.{found[2]}"
        weights[name] = weight
    student.load_state_dict(weights)
    student.generation_config = teacher.generation_config
    student.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return student
