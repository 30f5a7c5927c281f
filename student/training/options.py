"""The options of one training run. Light: nothing here imports torch, so that command help is quick."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from logitcache.errors import StudentError
from logitcache.kernels.divergences import ALPHA, BETA, DIVERGENCES, TAILS, divergences_with
from logitcache.runtime.options import Option
from logitcache.sections import SECTIONS
from logitcache.storage.location import Location, locate


def _any_of(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One call of ``logitcache train``; defaults of DistillConfig's fields of the same name are taken from here."""

    caches: Annotated[
        list[str | Location],
        Option(
            "Caches to learn from: directories, or URLs such as s3://bucket/cache. A trace in several of them counts once.",
            metavar="CACHE",
            positional=True,
        ),
    ] = field(default_factory=list)
    student: Annotated[str, Option("Model folder or hub id. The ids that traces hold must be the same tokens to it.")]
    out: Annotated[Path, Option("Directory of the run: a new one, or one to resume.")]
    mix: Annotated[
        dict[str, float],
        Option(
            "Mix caches by their share of the tokens, such as a=0.7. Repeatable, instead of CACHE.", "Which traces",
            metavar="CACHE=SHARE",
        ),
    ] = field(default_factory=dict)  # fmt: skip
    view: Annotated[
        str, Option("Which tokens of a trace are input, and which are supervised: see the table above.")
    ] = "full"
    sections: Annotated[
        tuple[str, ...], Option("Sections to supervise: any of prompt,reasoning,answer.")
    ] = tuple(SECTIONS)  # fmt: skip
    where: Annotated[
        str | None,
        Option(
            "Train only on traces that match, such as 'correct and tokens<=8192'. Held-out traces are not filtered.",
            "Which traces", default="all",
        ),
    ] = None  # fmt: skip
    top_k: Annotated[
        int | None,
        Option("Token ids used per row; the rest of the row joins its tail.", "Which traces", default="all stored ids"),
    ] = None
    shuffle: Annotated[
        str,
        Option(
            "Order of the traces. full: all are mixed; shards: 64 shards at a time, in a random order, so that each is "
            "read once an epoch; shards:N: N at a time; auto: full, but shards for a cache behind a URL that is larger "
            "than its local mirror. A run is resumed in its own order.",
            "Which traces",
        ),
    ] = "auto"
    held_out: Annotated[
        float, Option("Share of the prompts held out for evaluation. No prompt is on both sides.", "Which traces")
    ] = 0.05
    divergence: Annotated[str, Option(f"{_any_of(DIVERGENCES)}.", "Loss")] = "forward_kl"
    tail: Annotated[
        str,
        Option(
            "How to treat the probability mass outside a row's ids: "
            + "; ".join(f"{name}: {text}" for name, text in TAILS.items()) + ".",
            "Loss",
        ),
    ] = "bucket"  # fmt: skip
    beta: Annotated[
        float | None,
        Option(
            f"The teacher's share of the mixture, for {_any_of(divergences_with('beta'))}.", "Loss", default=f"{BETA:g}"
        ),
    ] = None
    alpha: Annotated[
        float | None,
        Option(f"Skew, for {_any_of(divergences_with('alpha'))}.", "Loss", default=f"{ALPHA:g}"),
    ] = None  # fmt: skip
    temperature: Annotated[
        float, Option("Softmax temperature of teacher and student. Other than 1 only with tail support.", "Loss")
    ] = 1.0
    ce_weight: Annotated[
        float, Option("Weight of an added cross-entropy with the teacher's sampled tokens.", "Loss")
    ] = 0.0
    section_weights: Annotated[
        dict[str, float],
        Option(
            "Weight of the loss in a section, such as answer=2. The mean is still over all supervised tokens. Repeatable.",
            "Loss", flag="--section-weight", metavar="SECTION=WEIGHT", default="1",
        ),
    ] = field(default_factory=dict)  # fmt: skip
    epochs: Annotated[float, Option("Passes over the training traces.")] = 3.0
    max_steps: Annotated[
        int | None, Option("Stop after this many optimizer steps; overrides the number of epochs.", default="off")
    ] = None
    learning_rate: Annotated[float, Option("Peak learning rate.", alias="--lr")] = 1e-4
    lora_rank: Annotated[
        int | None, Option("Train a LoRA adapter of this rank (needs peft).", default="train all weights")
    ] = None
    lora_alpha: Annotated[float | None, Option("Scale of the LoRA adapter.", default="twice the rank")] = None
    seed: Annotated[int, Option("Seed of the order of traces.")] = 0
    tokens_per_batch: Annotated[
        int, Option("Tokens per device and micro-batch, counted on whole traces whatever the view.", "Speed and memory")
    ] = 4096
    dtype: Annotated[
        Literal["bf16", "fp32"] | None,
        Option("bf16: float32 weights, bfloat16 arithmetic.", "Speed and memory", default="bf16 on CUDA, else fp32"),
    ] = None
    attention: Annotated[
        str | None,
        Option(
            "Attention implementation, as transformers names it, such as flash_attention_2.", "Speed and memory",
            default="the model's",
        ),
    ] = None  # fmt: skip
    packing: Annotated[
        bool | None,
        Option(
            "Concatenate traces instead of padding them.", "Speed and memory", default="with flash or flex attention"
        ),
    ] = None
    gradient_checkpointing: Annotated[
        bool, Option("Save memory: compute each layer's activations again in the backward.", "Speed and memory")
    ] = False
    compile: Annotated[bool, Option("Use torch.compile on the student, except its head.", "Speed and memory")] = False
    teacher_tokenizer: Annotated[
        str | None,
        Option(
            "Folder or hub id of the teacher's tokenizer, to compare ids with a student that has another.",
            "More",
            default="looked for on this machine",
        ),
    ] = None
    report_to: Annotated[
        tuple[str, ...],
        Option(
            "Where to log: wandb, tensorboard, trackio or others that transformers knows.", "Output", default="none"
        ),
    ] = ()
    set: Annotated[
        dict[str, Any],
        Option(
            "Any other training argument of transformers, such as weight_decay=0.1. Repeatable.", "More",
            metavar="KEY=VALUE",
        ),
    ] = field(default_factory=dict)  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))  # a script may give text

    @property
    def shares(self) -> dict[Location, float | None]:
        """Each cache with its share of the tokens; None where every trace counts once.

        Raises: StudentError without a cache, and for a cache without a share beside others that have one; InputError for a
            URL that names no cache.
        """
        if not self.mix:
            if not self.caches:
                raise StudentError("give `caches` to learn from, one or several, or `mix` CACHE=SHARE")
            return dict.fromkeys(map(locate, self.caches))
        shares: dict[Location, float | None] = {locate(name): share for name, share in self.mix.items()}
        for path in map(str, self.caches):  # `--mix a=0.7 b=0.3` gives b=0.3 as a cache
            name, _, share = path.rpartition("=")
            try:
                shares[locate(name)] = float(share)
            except ValueError:
                raise StudentError(f"`mix` with {path}: give it a share too, such as {path}=0.5") from None
        return shares
