import mmap
import time
from pathlib import Path

import pytest
import torch

from logitcache.student.training.timers import PARTS, Costs, PeakMemory
from tests.tiny import one_thread  # noqa: F401

CPU = torch.device("cpu")


def test_every_second_is_charged_to_one_part():
    costs = Costs(CPU)
    began = time.perf_counter()
    costs.switch("other")
    with costs.time("data"):
        time.sleep(0.02)
    costs.switch("backward")
    with costs.time("forward"):
        time.sleep(0.03)
    time.sleep(0.01)
    costs.switch("optimizer")
    costs.stop()
    whole = time.perf_counter() - began
    time.sleep(0.05)
    spent = costs.seconds
    assert list(spent) == list(PARTS)
    assert spent["data"] >= 0.02
    assert spent["forward"] >= 0.03
    assert spent["backward"] >= 0.01
    assert sum(spent.values()) == pytest.approx(whole, abs=0.02), "the forward is not in the backward too"


def test_costs_add_up_over_a_resume():
    first, second = Costs(CPU), Costs(CPU)
    with first.time("forward"):
        time.sleep(0.01)
    second.resume(first.seconds, first.peak_memory)
    with second.time("forward"):
        time.sleep(0.01)
    assert second.seconds["forward"] >= 0.02
    assert second.peak_memory >= first.peak_memory * 0.5


def test_peak_memory_on_a_cpu_is_growth_over_the_start_even_after_it_is_freed():
    kept = torch.ones(4 << 20)
    memory = PeakMemory(CPU)
    if memory.bytes() is None:
        pytest.skip("no /proc")
    before = memory.bytes()
    with mmap.mmap(-1, 64 << 20) as big:  # pages of its own: an allocator may hand out memory that is resident already
        big[:: mmap.PAGESIZE] = b"1" * (len(big) // mmap.PAGESIZE)
    assert memory.bytes() - before >= 60 << 20
    assert memory.bytes() < 100 << 20, "what was there before is not counted"
    assert len(kept) == 4 << 20


@pytest.mark.gpu
def test_on_a_gpu_the_devices_own_clock_is_read_and_nothing_waits():
    device = torch.device("cuda")
    costs = Costs(device)
    a = torch.randn(8192, 8192, device=device)
    a @ a
    torch.cuda.synchronize()
    began = time.perf_counter()
    costs.switch("other")
    with costs.time("forward"):
        for _ in range(20):
            a = a @ a * 1e-4
    costs.stop()
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    done = time.perf_counter() - began
    assert queued < 0.5 * done
    assert costs.seconds["forward"] == pytest.approx(done, rel=0.2)
    assert costs.peak_memory >= a.nbytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells")
def test_the_memory_of_an_evaluation_is_not_trainings():
    costs = Costs(CPU)
    if (reached := costs.peak_memory) is None or reached > 1 << 26:
        pytest.skip("this kernel does not let a process forget its peak")
    with costs.other_memory():
        torch.ones(1 << 26).sum()  # 256 MiB
    assert (costs.peak_memory or 0) < 1 << 27
    torch.ones(1 << 26).sum()
    assert (costs.peak_memory or 0) > 1 << 27
