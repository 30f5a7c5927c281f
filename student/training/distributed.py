"""What the processes of one command do together, and how they part."""

import contextlib
import gc
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # DDP imports it, and imported after a group began its defaults hold that for ever

from logitcache.errors import LogitcacheError, TrainingError


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """What one rank alone does: where it fails all leave, since the others would wait for it for ever."""
    failure: LogitcacheError | OSError | None = None
    try:
        yield
    except (LogitcacheError, OSError) as e:
        failure = e
    if dist.is_initialized():
        fine = torch.tensor([failure is None], dtype=torch.int32, device=device)
        dist.all_reduce(fine, dist.ReduceOp.MIN)
        if not fine.item() and failure is None:
            raise TrainingError("another process of this run has failed, and says why")
    if failure is not None:
        raise failure


def leave() -> None:
    """Ends the process group, if there is one and nothing uses it any more, once all ranks are through.

    A thread of gloo's that outlives it with work left aborts the process at its end (pytorch/pytorch#190489).
    """
    if dist.is_initialized():
        nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.accelerator.current_device_index()] if nccl else None)
        gc.collect()  # a model among ranks holds the group, and cycles hold the model
        dist.destroy_process_group()
