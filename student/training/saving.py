"""A transformers Trainer whose checkpoints and models appear under their names when they are complete and on disk."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from logitcache.errors import TrainingError, WriteError, first_line
from logitcache.runtime.console import say
from logitcache.student.training.checkpoint_files import STATE_FILE, weights_damage
from logitcache.student.training.checkpoints import (
    WORK,
    checkpoint_to_resume,
    clear_work,
    publish_checkpoint,
    publish_model,
    rotate,
    set_aside,
)
from logitcache.student.training.distributed import fail_together


class SafeTrainer(Trainer):
    """Trainer writes and removes checkpoints in a hidden folder only; here they are published and rotated."""

    model: Any

    @property
    def _out(self) -> Path:
        return Path(self.args.output_dir or ".")

    def newest_checkpoint(self) -> str | None:
        """The newest undamaged checkpoint, the same for all ranks. Damaged ones after it are set aside, and named."""
        chosen: list[str | None] = [None]
        with fail_together(self.args.device):
            if self.args.should_save:
                clear_work(self._out)
                path, damaged = checkpoint_to_resume(self._out)
                for other, wrong in damaged.items():
                    aside = set_aside(other).name
                    say(f"{other} is damaged: {wrong}; renamed to {aside}, resuming from {path}", sys.stderr)
                chosen = [path and str(path)]
        if self.args.world_size > 1:
            dist.broadcast_object_list(chosen, device=self.args.device)
        return chosen[0]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._out / WORK)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        written = self._out / WORK / f"checkpoint-{self.state.global_step}"
        with self.writing(written):
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(self._out / written.name)
                if self.args.should_save:
                    self.state.save_to_json(str(written / STATE_FILE))
        with self.writing(written):  # by all ranks
            if self.args.should_save:
                publish_checkpoint(self._out, written)
                rotate(self._out, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(self._out / written.name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer calls this before the checkpoint is published."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self.writing(Path(output_dir)):
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        with self.writing(Path(output_dir)):
            super()._save_rng_state(output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer.save_model. An earlier model in the folder is replaced when all of the new one is on disk."""
        place = Path(output_dir or self._out)
        if _internal_call:
            with self.writing(place):
                super().save_model(str(place), _internal_call=True)
            return
        with self.writing(place):
            super().save_model(str(place / WORK / "model"), _internal_call=True)
            if self.args.should_save:
                publish_model(place, place / WORK / "model")
                clear_work(place)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _load_best_model(self) -> None:
        """Trainer would silently keep the last weights where the best are missing."""
        best = Path(self.state.best_model_checkpoint or "")
        if wrong := weights_damage(best):
            raise TrainingError(
                f"{best}, the best checkpoint, is damaged: {wrong}; restore it from a copy, or give `out` a new directory"
            )
        super()._load_best_model()

    @contextlib.contextmanager
    def writing(self, place: Path) -> Iterator[None]:
        """For a block that writes into `place` on some ranks.

        Raises: WriteError on the rank that cannot write, and TrainingError on the others. What is incomplete is removed.
        """
        with fail_together(self.args.device):
            try:
                yield
            except torch.OutOfMemoryError:
                raise
            except (OSError, SafetensorError, RuntimeError) as e:  # torch.save raises RuntimeError on a full disk
                found = self._write_error(place, e)
                clear_work(self._out) if self.args.should_save else None
                raise found from e

    def _write_error(self, place: Path, error: Exception) -> WriteError:
        name = place.relative_to(self._out / WORK) if place.is_relative_to(self._out / WORK) else place
        cause = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        if "inline_container" in cause or "PytorchStreamWriter" in cause:  # of torch.save, which does not say why
            cause = "a file was written in part only"
        free = shutil.disk_usage(self._out).free / 1e6
        return WriteError(
            f"{self._out / name}: not saved: {cause}, with {free:,.0f} MB free; earlier checkpoints are intact: free some "
            "space, or fix the cause, then run the same command to resume"
        )
