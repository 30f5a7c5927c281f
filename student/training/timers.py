"""Where training time goes, and peak memory."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PARTS = ("data", "forward", "backward", "optimizer", "other")


class PeakMemory:
    """Peak since it was made, in bytes.

    On CUDA what the allocator handed out at most, weights included. On a Linux CPU the growth of the resident set: the
    peak (VmHWM) over what was resident at the start (VmRSS); where the kernel does not let a process forget its earlier
    peak (/proc/self/clear_refs), that may be in it. None elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.reset()
        self.before = _resident("VmRSS")

    def reset(self) -> None:
        """Forgets the peak, not what was resident at the start."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device)
        peak = _resident("VmHWM")
        return None if peak is None or self.before is None else max(0, peak - self.before)


def _resident(name: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


class Costs:
    """Seconds of each of PARTS and peak memory of one process, adding up over resumes.

    A clock that is always in one part: inside `time` another `time` takes its share away. On CUDA it reads the device's
    own clock through events and waits for none of them before `seconds` is read: "data" is then what the device stood
    idle for.
    """

    def __init__(self, device: torch.device):
        self.device, self.memory = device, PeakMemory(device)
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._peak = 0
        self._part: str | None = None
        self._since: Any = None
        self._laps: list[tuple[str, Any, Any]] = []  # of events that may not have happened yet

    def stop(self) -> None:
        self.switch(None)

    def switch(self, part: str | None) -> str | None:
        """What ran until now is charged to the part before, which is returned; None halts the clock."""
        assert part is None or part in PARTS, part
        now, before = self._now(), self._part
        if before is not None:
            self._laps.append((before, self._since, now))
        self._part, self._since = part, now
        return before

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    @property
    def seconds(self) -> dict[str, float]:
        """Of each part so far. On CUDA it waits for the device: read it where you log."""
        for part, start, stop in self._laps:
            self._spent[part] += self._between(start, stop)
        self._laps.clear()
        return dict(self._spent)

    @property
    def peak_memory(self) -> int | None:
        now = self.memory.bytes()
        return None if now is None else max(now, self._peak)

    @contextlib.contextmanager
    def other_memory(self) -> Iterator[None]:
        """What is taken inside is not training's."""
        self._peak = self.peak_memory or 0
        try:
            yield
        finally:
            self.memory.reset()

    def resume(self, seconds: dict[str, float], peak_memory: int | None) -> None:
        """Continues from what an earlier process has counted; what this one has counted so far is dropped."""
        self._laps.clear()
        self._spent = {part: seconds.get(part, 0.0) for part in PARTS}
        self._peak = peak_memory or 0

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, stop: Any) -> float:
        if self.device.type != "cuda":
            return stop - start
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
