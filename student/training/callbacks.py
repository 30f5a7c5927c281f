"""Progress of a training run on the terminal."""

import sys
from typing import Any

from transformers import TrainerCallback

from logitcache.runtime.console import Progress
from logitcache.student.training.shuffle import describe_order
from logitcache.student.training.trainer import DistillTrainer


class ShowProgress(TrainerCallback):
    """Shows steps, speed and losses. Trainer's log dictionaries go to its history only."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer, self.input_tokens = trainer, 0
        self.progress: Any = None

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        self.input_tokens = self.trainer.counts.input_tokens
        self.progress = Progress(sys.stderr, state.max_steps - state.global_step, "steps").__enter__()
        data, held, done = self.trainer.train_dataset, self.trainer.eval_dataset, state.global_step
        self.progress.print(
            f"{len(data)} training traces, {len(held)} held out; {state.max_steps} steps of about "
            f"{args.tokens_per_step:,} tokens" + (f", {done} of them done" if done else "")
        )
        for line in describe_order(args.shuffle_window, [part.cache for part in data.parts]):
            self.progress.print(line)

    def on_log(self, args, state, control, **found: Any) -> None:
        if self.progress is not None and "loss" in found["logs"]:
            self.progress.what = f"steps, loss {found['logs']['loss']:.3f}"

    def on_step_end(self, args, state, control, **_: Any) -> None:
        tokens = self.trainer.counts.input_tokens
        self.progress.add(1, tokens - self.input_tokens)
        self.input_tokens = tokens

    def on_evaluate(self, args, state, control, **found: Any) -> None:
        metrics = found["metrics"]
        if self.progress is not None and metrics.get("eval_kl") is not None:
            self.progress.print(
                f"epoch {state.epoch:.2g}, step {state.global_step}: held-out KL {metrics['eval_kl']:.4f} nats per row, "
                f"top-1 {metrics['eval_top1']:.1%}"
            )

    def on_train_end(self, args, state, control, **_: Any) -> None:
        self.progress.__exit__(None, None, None)
