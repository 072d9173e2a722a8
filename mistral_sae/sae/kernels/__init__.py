"""The sparse forward and backward of the TopK step: `step` has the algorithm, `portable` its operations."""

from mistral_sae.sae.kernels.portable import decode, inner_products, topk
from mistral_sae.sae.kernels.step import CHUNK_BYTES, bf16_pays, encode, topk_step
from mistral_sae.sae.kernels.types import AuxK, MatrixGradient, Step, Used, Weights

__all__ = [
    "CHUNK_BYTES",
    "AuxK",
    "MatrixGradient",
    "Step",
    "Used",
    "Weights",
    "bf16_pays",
    "decode",
    "encode",
    "inner_products",
    "topk",
    "topk_step",
]
