"""Where training time goes, and peak memory."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PARTS = ("data", "forward", "backward", "optimizer", "other")


class PeakMemory:
    """Peak memory since its creation, in bytes.

    On CUDA the most that the allocator has handed out, weights included. On a Linux CPU the growth of the resident set: its
    peak (VmHWM) minus its size at the start (VmRSS). Where a process may not reset its peak (/proc/self/clear_refs), an
    earlier peak may be included. None elsewhere.
    """

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.reset()
        self.before = _resident("VmRSS")

    def reset(self) -> None:
        """Resets the peak, not the size at the start."""
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
    """Seconds in each of PARTS, and peak memory, of one process. Both continue over resumes.

    The clock is in one part at a time: a `time` inside another is not counted twice. On CUDA it reads the device's clock
    through events and waits for them only when `seconds` is read; "data" is then the time the device was idle.
    """

    def __init__(self, device: torch.device):
        self.device, self.memory = device, PeakMemory(device)
        self._spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._peak = 0
        self._part: str | None = None
        self._since: Any = None
        self._laps: list[tuple[str, Any, Any]] = []  # their events may not have happened yet

    def stop(self) -> None:
        self.switch(None)

    def switch(self, part: str | None) -> str | None:
        """Charges the time until now to the current part, which is returned, and starts `part`; None stops the clock."""
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
        """Seconds in each part so far. On CUDA it waits for the device: read it when logging."""
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
        """Memory used inside is not counted."""
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
