"""Times of calls by CUDA's clock where there is a GPU, the memory they took there, and how fast the device is."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.accounting import Speeds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARM_UP, REPEATS = 3, 20
COPY_BYTES = 2**31


def seconds(call: Callable[[], Any]) -> float:
    """Median time of a call on the device, after a warm-up."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        if DEVICE.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        else:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
    return statistics.median(times[WARM_UP:])


def wall() -> float:
    """The time, once the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def speeds() -> Speeds:
    """Bandwidth of a long copy and rates of large products."""
    source = torch.empty(COPY_BYTES if DEVICE.type == "cuda" else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    side = 8192 if DEVICE.type == "cuda" else 128
    rates = []
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(side, side, device=DEVICE).to(dtype)
        rates.append(2 * side**3 / seconds(lambda a=a: a @ a))
    found = Speeds(2 * len(source) / seconds(lambda: target.copy_(source)), *rates)
    print(f"  {found.bandwidth / 1e12:.2f} TB/s, products at {' and '.join(f'{r / 1e12:.3g}' for r in rates)} TFLOP/s")
    return found


def peak() -> int:
    """The most bytes that were on the device since the last call, 0 on a CPU."""
    if DEVICE.type != "cuda":
        return 0
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found
