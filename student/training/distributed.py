"""Errors and the end of a command that runs as several processes."""

import contextlib
import gc
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

# DDP imports it; imported after a group exists, its default arguments would keep that group alive.
import torch.distributed.nn.functional

from logitcache.errors import LogitcacheError, TrainingError

T = TypeVar("T")


@contextlib.contextmanager
def fail_together(device: torch.device) -> Iterator[None]:
    """For a block that one rank may fail in: then all ranks raise, instead of waiting for it."""
    failure: LogitcacheError | OSError | None = None
    try:
        yield
    except (LogitcacheError, OSError) as e:
        failure = e
    if dist.is_initialized():
        ok = torch.tensor([failure is None], dtype=torch.int32, device=device)
        dist.all_reduce(ok, dist.ReduceOp.MIN)
        if not ok.item() and failure is None:
            raise TrainingError("another process of this run has failed: see its message")
    if failure is not None:
        raise failure


def agreed(value: T, device: torch.device) -> T:
    """The value of the first rank, on all ranks."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, device=device)
    return values[0]


def end_process_group() -> None:
    """Waits for all ranks and destroys the process group, if there is one. Nothing may use it any more.

    Otherwise a gloo thread that still has work aborts the process at its end (pytorch/pytorch#190489).
    """
    if dist.is_initialized():
        nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.accelerator.current_device_index()] if nccl else None)
        gc.collect()  # a wrapped model refers to the group, and reference cycles keep the model
        dist.destroy_process_group()
