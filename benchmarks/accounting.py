"""Bytes and operations of what torch does in a block, on tensors without data and a GPU that need not be there.

An operator reads its inputs and writes its outputs, each once. A gather reads each row that an index asks for, though
caches answer some of them; top-k and sort read their input as often as torch's radix algorithms do. Our own kernels are
counted by formulas, which tests compare with the loads and stores of Triton's interpreter.
"""

import math
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mistral_sae.sae.kernels import devices

CAPABILITY = (9, 0)


class Speeds(NamedTuple):
    """What a device does in a second."""

    bandwidth: float  # bytes
    bfloat16: float  # operations in a product of such matrices
    float32: float


H100 = Speeds(0.85 * 3.35e12, 0.7 * 989e12, 0.7 * 67e12)  # SXM, dense: shares that long copies and large products reach


class Cost(NamedTuple):
    """Bytes, operations of products and reckoned seconds."""

    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: tuple) -> "Cost":
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


# ---- bytes of an operator ----


def size(*tensors: Tensor | None) -> int:
    """Bytes of tensors, without what is there by expansion only."""
    return sum(
        t.itemsize * math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
        for t in tensors
        if t is not None
    )


def gathered(rows: Tensor, indices: Tensor) -> int:
    """Bytes of rows (N, D) read once an index, and of the indices."""
    return indices.numel() * rows.shape[1] * rows.itemsize + size(indices)


def inner_products(args: tuple, out: Tensor) -> int:
    """`fused.inner_products`: a program reads its token's vector, its indices and their rows."""
    from mistral_sae.sae.kernels import fused

    x, indices, rows = args
    programs = math.ceil(indices.shape[1] / fused.ROWS)
    return programs * size(x) + gathered(rows, indices) + size(out)


def gradient(tensors: list[Tensor], parts: int = 1) -> int:
    """`fused.gradient_of`: the terms of each feature, and the rows that come on top."""
    offsets, vectors, owners, weights, *top = tensors
    n_features = len(offsets) - 1
    scalars = parts * (2 * n_features * offsets.itemsize + size(owners, weights, *top[:1]))
    return scalars + owners.numel() * vectors.shape[1] * vectors.itemsize + size(*top[1:])


def row_squares(args: tuple, out: tuple[Tensor, Tensor]) -> int:
    """`fused.squares_kernel`: the gradient, some columns at a time, and with rows these, too."""
    tensors, rows = args
    return gradient(tensors, parts=out[1].shape[1]) + size(rows, *out)


def adam_rows(args: tuple, out: None) -> int:
    """`fused.adam_rows_kernel`: the gradient; parameter and moments read and written, the copy written."""
    (parameter, first, second, *copy), tensors, along, rates, _ = args
    scalars = size(along) + len(parameter) * (3 + (first.dtype == torch.bfloat16)) * rates.itemsize
    return 2 * size(parameter, first, second) + size(*copy) + gradient(tensors) + scalars


def embedding_bag(args: tuple, out: tuple) -> int:
    """Its rows once an index, with their weights."""
    weight, indices, offsets = args[:3]
    return gathered(weight, indices) + size(offsets, args[6]) + size(out[0])


def topk(args: tuple, out: tuple) -> int:
    """torch's radix selection: a reading for each eight bits, and one to gather."""
    return (args[0].itemsize + 1) * size(args[0]) + size(*out)


def sort(args: tuple, out: tuple) -> int:
    """Its radix sort: keys and places read and written for each eight bits of a key."""
    return 2 * out[0].itemsize * size(*out)


SPECIAL: dict[str, Callable[[tuple, Any], int]] = {
    "mistral_sae::inner_products": inner_products,
    "mistral_sae::row_squares": row_squares,
    "mistral_sae::adam_rows": adam_rows,
    "aten::_embedding_bag": embedding_bag,
    "aten::_embedding_bag_forward_only": embedding_bag,
    "aten::topk": topk,
    "aten::sort.stable": sort,
    "aten::sort": sort,
    "aten::index_select": lambda args, out: size(args[2]) + 2 * size(out),
    "aten::index.Tensor": lambda args, out: size(*args[1]) + 2 * size(out),
    "aten::take": lambda args, out: size(args[1]) + 2 * size(out),
    "aten::gather": lambda args, out: size(args[2]) + 2 * size(out),
    "aten::index_add_": lambda args, out: size(args[2]) + 3 * size(args[3]),
    "aten::scatter_.src": lambda args, out: size(args[2]) + 2 * size(args[3]),
    "aten::scatter_add_": lambda args, out: size(args[2]) + 3 * size(args[3]),
    "aten::scatter_reduce_.two": lambda args, out: size(args[2]) + 3 * size(args[3]),
    "aten::copy_": lambda args, out: size(args[1]) + size(args[0]),
    "aten::zero_": lambda args, out: size(out),
    "aten::fill_.Scalar": lambda args, out: size(out),
    "aten::_fused_adam_": lambda args, out: 7 * size(*args[0]),
    "aten::searchsorted.Tensor": lambda args, out: size(args[1]) + 2 * size(out),
    "sparsify::embedding_bag": lambda args, out: gathered(args[1], args[0]) + size(args[2], out),
    # A row of the matrix and of its gradient a feature, and the vector of each term
    "sparsify::embedding_bag_backward": lambda args, out: gathered(args[3], args[0]) + size(*args[1:3], *out),
}
NOTHING = {"aten::detach", "aten::lift_fresh", "aten::_unsafe_view", "prim::device"}
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}


def moved(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes that an operator reads and writes."""
    name = func.name()
    if name in SPECIAL:
        return SPECIAL[name](args, out)
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    if is_view or name in NOTHING or name.startswith(("aten::empty", "aten::new_empty")):
        return 0
    return size(*tensors_of((args, kwargs)), *tensors_of(out))


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ---- a step's operators ----


class Count(TorchDispatchMode):
    """Costs by term, peak memory, operators that make the host wait, and operators on the host."""

    def __init__(
        self,
        terms: dict[str, str],
        by_operator: dict[tuple[str, str], str],
        device: str = "cuda",
        speeds: Speeds = H100,
    ):
        super().__init__()
        self.speeds = speeds
        self.device = device  # whose operators count
        self.terms = terms  # by the name of a function: the innermost counts, but all of AuxK is AuxK
        self.by_operator = by_operator  # by operator and term
        self.start()
        self._live: dict[int, int] = {}
        self._now = self.peak = 0

    def start(self) -> None:
        """Forget all costs; what is on the device stays."""
        self.costs: dict[str, Cost] = {}
        self.waits: list[str] = []
        self.on_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors, name = tensors_of((args, kwargs, out)), func.name()
        for tensor in tensors:
            self._hold(tensor)
        if not any(t.device.type == self.device for t in tensors):
            self.on_host += [name] if tensors else []
            return out
        if name in WAITS or (name == "aten::_to_copy" and out.device.type != self.device):
            self.waits.append(name)
        flops = 0
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        count = moved(func, args, kwargs, out)
        is_bf16 = any(t.dtype == torch.bfloat16 for t in tensors)
        term = self._term(sys._getframe(1))
        term = self.by_operator.get((name, term), term)
        seconds = max(count / self.speeds.bandwidth, flops / (self.speeds.bfloat16 if is_bf16 else self.speeds.float32))
        self.costs[term] = self.costs.get(term, Cost()) + Cost(count, flops, seconds)
        return out

    def _term(self, frame: FrameType | None) -> str:
        found = None
        while frame is not None:
            term, frame = self.terms.get(frame.f_code.co_name), frame.f_back
            if found is None or term == "AuxK":
                found = term
        return found or "the rest"

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == self.device and key not in self._live:
            self._live[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self._now -= self._live.pop(key)


class Indexing(TorchFunctionMode):
    """Indexing and copies as operators: the C++ of a build without CUDA would look for a device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not args or not isinstance(args[0], Tensor) or args[0].device.type != "cuda":
            return func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__:
            return self._index(*args)
        if func is Tensor.__invert__:
            return torch.logical_not(args[0])
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _index(x: Tensor, keys: Any) -> Tensor:
        for dim, key in enumerate(keys if isinstance(keys, tuple) else (keys,)):
            if key is None:
                x = x.unsqueeze(dim)
            elif isinstance(key, slice):
                x = torch.ops.aten.slice(x, dim, key.start, key.stop, key.step or 1)
            elif isinstance(key, Tensor) and dim == 0:
                x = torch.ops.aten.index(x, [key])
            else:
                raise NotImplementedError(f"an index of {type(key).__name__} in dimension {dim}")
        return x


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """A block in which tensors have no data and may be on a GPU, which is said to be a Hopper."""
    devices.operations.cache_clear()
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.get_device_capability", return_value=CAPABILITY))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Indexing())
        devices.operations(torch.empty(0, device="cuda").device)  # which tries them, once
        yield
    devices.operations.cache_clear()
