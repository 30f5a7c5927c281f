"""What the processes of one command do together, and how they part."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

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
    """Ends the process group, if there is one, once all ranks are through.

    DDP and FSDP keep gloo's threads beyond the group. A thread with work still in it aborts the process when the
    interpreter ends (pytorch/pytorch#190489); a barrier waits for all of it.
    """
    if dist.is_initialized():
        nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.accelerator.current_device_index()] if nccl else None)
        dist.destroy_process_group()
