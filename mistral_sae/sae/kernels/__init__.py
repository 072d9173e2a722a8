"""The TopK step and its kernels: `step` has the algorithm, `portable` and `fused` what differs by device."""
