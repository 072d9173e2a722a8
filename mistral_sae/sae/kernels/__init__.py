"""The TopK step and its kernels: `step` has the algorithm, `portable` and `fused` what differs by device."""

from mistral_sae.sae.kernels.devices import operations
from mistral_sae.sae.kernels.portable import decode, inner_products, normalize_rows, topk
from mistral_sae.sae.kernels.step import bf16_pays, chunk_bytes, encode, encode_shard, tokens_at_once, topk_step
from mistral_sae.sae.kernels.types import AuxK, MatrixGradient, Rates, RowState, Step, Weights

__all__ = [
    "AuxK",
    "MatrixGradient",
    "Rates",
    "RowState",
    "Step",
    "Weights",
    "bf16_pays",
    "chunk_bytes",
    "decode",
    "encode",
    "encode_shard",
    "inner_products",
    "normalize_rows",
    "operations",
    "tokens_at_once",
    "topk",
    "topk_step",
]
