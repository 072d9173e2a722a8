"""How the training step's cost grows with the number of features and with the number of active ones.

    python -m benchmarks.growth

Beside each median stands the float32 floor of benchmarks.step, which grows in proportion to F and does not depend on K.
What leaves that line is the sparse work: selection, gathered rows and sums over bags, in proportion to B * K.
"""

import statistics

import torch

from benchmarks.machine import save
from benchmarks.step import THREADS, Size, floor, ours, seconds

D, B = 512, 1024
F_AT_FIXED_K = [Size(D, F, 32, B, 0.0) for F in (4096, 8192, 16384, 32768, 65536, 131072)]
K_AT_FIXED_F = [Size(D, 16384, K, B, 0.0) for K in (8, 16, 32, 64, 128, 256)]
ROUNDS = 5


def measure(sizes: list[Size]) -> list[dict[str, float]]:
    """Median milliseconds of the step and of the floor at each size."""
    rows = []
    for size in sizes:
        x = torch.randn(size.B, size.D, generator=torch.Generator().manual_seed(0))
        step, lowest = ours(size), floor(size)
        times, floors = [], []
        for _ in range(ROUNDS + 1):
            times.append(seconds(lambda step=step, x=x: step(x)))
            floors.append(lowest())
        median, low = (1000 * statistics.median(values[1:]) for values in (times, floors))
        rows.append({"F": size.F, "K": size.K, "milliseconds": median, "float32_floor_milliseconds": low})
        print(
            f"F={size.F:6} K={size.K:3}  {median:8.1f} ms   float32 floor {low:8.1f} ms   {median / low:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Both tables."""
    torch.set_num_threads(THREADS)
    save("growth", {"over F": measure(F_AT_FIXED_K), "over K": measure(K_AT_FIXED_F)})


if __name__ == "__main__":
    main()
