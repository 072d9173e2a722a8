"""A GPU that is not there: tensors that say they are on cuda:0, compute on the CPU, and refuse what CUDA refuses.

    with pretended(monkeypatch) as gpu:
        torch.ones(2, device="cuda") + torch.ones(2)  # raises, as on a GPU
    gpu.waits  # what made the host wait for the device, and where in the repository

Values are real: a script that runs to its end here has done its work. What C++ does of itself below an operator is not
seen, nor is anything timed.
"""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
GETTERS = {getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "requires_grad", "layout", "is_leaf")}
GETTERS |= {Tensor.size, Tensor.dim, Tensor.stride, Tensor.element_size, Tensor.is_contiguous, Tensor.numel}
MOVES = {"to", "copy_", "type_as", "index", "__getitem__", "__setitem__"}  # may see tensors of two devices
# An operator that must know a value, or how many results there are
WAITS = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__repr__", "__format__",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose",
    "is_nonzero", "one_hot", "_local_scalar_dense",
}  # fmt: skip
NO_SCALARS = {"cat", "stack", "mm", "bmm", "matmul", "addmm", "linear", "gather", "scatter_", "index_select"}
NO_SCALARS |= {"embedding", "embedding_bag", "searchsorted", "index_add_", "index_copy_"}


class OnDevice(torch.Tensor):
    """A tensor that says where it is; `place` makes one."""

    where: torch.device

    def __array__(self, dtype: Any = None) -> Any:
        raise TypeError(f"can't convert {self.where} device type tensor to numpy")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise RuntimeError("a tensor of a device was pickled")


def place(tensor: Tensor, device: torch.device) -> Tensor:
    """The same memory, said to be on a device."""
    if isinstance(tensor, OnDevice) and tensor.where == device:
        return tensor
    with torch._C.DisableTorchFunction():
        found = tensor.as_subclass(OnDevice)
        found.where = device
        if getattr(tensor, "_is_param", False) or isinstance(tensor, torch.nn.Parameter):
            found._is_param = True
    return found


def device_of(tensor: Tensor) -> torch.device:
    return tensor.where if isinstance(tensor, OnDevice) else CPU


@cache
def in_repository(filename: str) -> str | None:
    """The path of a script or a module of the package below the repository's root."""
    path = Path(filename).absolute()
    is_ours = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv")
    return str(path.relative_to(ROOT)) if is_ours else None


def line() -> str:
    """The line of the repository, outside its tests, that is being run."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if (path := in_repository(frame.f_code.co_filename)) is not None:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class PretendedDevice(TorchFunctionMode):
    """What `pretended` gives.

    Attributes:
        waits: how often the host waited for a device, by (operator, line of the repository).
        operators: calls on tensors of a device, by name.
    """

    def __init__(self, kind: str, count: int):
        super().__init__()
        self.kind, self.count = kind, count
        self.waits: Counter[tuple[str, str]] = Counter()
        self.operators: Counter[str] = Counter()

    def wait(self, why: str) -> None:
        self.waits[why, line()] += 1

    def device(self, given: Any) -> torch.device | None:
        """The device that an argument names, None if it names none or that of another kind."""
        found = torch.device(given) if isinstance(given, (str, torch.device)) else None
        if found is None or found.type != self.kind:
            return None
        if (found.index or 0) >= self.count:
            raise RuntimeError(f"CUDA error: invalid device ordinal: {found}")
        return torch.device(self.kind, found.index or 0)

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in GETTERS:
            return self.run(func, args, kwargs)
        name = getattr(func, "__name__", resolve_name(func) or "")
        if name == "__get__":
            return self.attribute(func, args)
        if special := getattr(self, f"_{name}", None):
            return special(func, args, kwargs)
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        placed = [x for x in tensors if isinstance(x, OnDevice)]
        target = placed[0].where if placed else None
        if kwargs.get("device") is not None:
            target = self.device(kwargs["device"])
            kwargs = kwargs | ({} if target is None else {"device": CPU})
        if placed:
            self.operators[name] += 1
            self.check(name, tensors, placed)
        self.count_waits(name, args, placed, target)
        if target is not None and kwargs.get("generator") is not None:
            raise RuntimeError(f"Expected a '{self.kind}' device type for generator but found 'cpu' at {line()}")
        pinned = kwargs.get("pin_memory")
        found = self.placed(self.run(func, args, {k: v for k, v in kwargs.items() if k != "pin_memory"}), target)
        if pinned:
            found.is_in_pinned_memory = True
        return found

    # ---- rules ----

    def check(self, name: str, tensors: list[Tensor], placed: list[OnDevice]) -> None:
        """Raise RuntimeError where CUDA would refuse the mix of devices."""
        if name in MOVES:
            return
        where = {x.where for x in placed}
        elsewhere = [x for x in tensors if not isinstance(x, OnDevice) and (x.ndim > 0 or name in NO_SCALARS)]
        if len(where) > 1 or elsewhere:
            found = ", ".join(sorted({str(device_of(x)) for x in tensors}))
            raise RuntimeError(f"Expected all tensors to be on the same device, found {found} in {name} at {line()}")

    def count_waits(self, name: str, args: Any, placed: list[OnDevice], target: torch.device | None) -> None:
        if not placed and target is not None and name in ("tensor", "as_tensor", "asarray"):
            self.wait(f"{name} from the host")
        takes_counts = name == "repeat_interleave" and any(isinstance(x, Tensor) for x in args[1:])
        if placed and (name in WAITS or takes_counts or (name == "where" and len(args) == 1)):
            self.wait(name)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return func(*args, **kwargs)

    def placed(self, found: Any, target: torch.device | None) -> Any:
        """Results on the device where they are; those in place keep their identity."""
        if target is None:
            return found

        def put(x: Any) -> Any:
            if not isinstance(x, Tensor) or isinstance(x, OnDevice):
                return x
            if self.kind == "mps" and x.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype at {line()}")
            return place(x, target)

        return tree_map(put, found)

    def attribute(self, func: Any, args: Any) -> Any:
        (tensor,), name = args[:1], func.__self__.__name__
        if isinstance(tensor, OnDevice):
            if name == "device":
                return tensor.where
            if name in ("is_cuda", "is_cpu", "is_mps"):
                return name == f"is_{tensor.where.type}"
            return self.placed(self.run(func, args, {}), tensor.where)
        return self.run(func, args, {})

    # ---- functions with rules of their own, by name ----

    def move(self, tensor: Tensor, to: torch.device, non_blocking: bool) -> None:
        """Record what a copy from here to there waits for."""
        start = device_of(tensor)
        if start == to or start.type == to.type == self.kind:
            return
        if to.type == self.kind and non_blocking and getattr(tensor, "is_in_pinned_memory", False):
            return
        if to.type == "cpu" and non_blocking:
            raise RuntimeError(f"a copy to the host was not waited for at {line()}: it may be read before it is there")
        self.wait("copy to the host" if to.type == "cpu" else "copy from pageable memory")

    def _to(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, rest = args[0], list(args[1:])
        named = [x for x in (*rest, kwargs.get("device")) if isinstance(x, (str, torch.device))]
        if tensor.is_meta or any(torch.device(x).type == "meta" for x in named):
            return self.run(func, args, kwargs)
        start = target = device_of(tensor)
        for i, x in enumerate(rest):
            if isinstance(x, (str, torch.device)):
                target, rest[i] = self.device(x) or torch.device(x), CPU
            elif isinstance(x, Tensor):
                target = device_of(x)
        if kwargs.get("device") is not None:
            target = self.device(kwargs["device"]) or torch.device(kwargs["device"])
            kwargs = kwargs | {"device": CPU}
        self.move(tensor, target, kwargs.get("non_blocking", False))
        found = self.run(func, (tensor, *rest), kwargs)
        if start != target and found is tensor:
            with torch._C.DisableTorchFunction():
                found = tensor.clone()
        return self._plain(found) if target == CPU else self.placed(found, target)

    def _plain(self, tensor: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return tensor.as_subclass(torch.Tensor)

    def _cpu(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._to(Tensor.to, (args[0], CPU), {})

    def _cuda(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._to(Tensor.to, (args[0], self.device(self.kind)), {})

    def _type_as(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._to(Tensor.to, (args[0],), {"device": device_of(args[1]), "dtype": args[1].dtype})

    def _copy_(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, source = args[:2]
        non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
        self.move(source, device_of(target), non_blocking)
        return self.run(func, args, kwargs)

    def _pin_memory(self, func: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(args[0], OnDevice):
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
        found = self.run(Tensor.clone, args[:1], {})
        found.is_in_pinned_memory = True
        return found

    def _is_pinned(self, func: Any, args: Any, kwargs: Any) -> bool:
        return getattr(args[0], "is_in_pinned_memory", False)

    def _numpy(self, func: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(args[0], OnDevice):
            raise TypeError(f"can't convert {args[0].where} device type tensor to numpy at {line()}")
        return self.run(func, args, kwargs)

    def _index_rules(self, tensor: Tensor, index: Any) -> None:
        for x in tree_flatten(index)[0]:
            if not isinstance(x, Tensor):
                continue
            if isinstance(x, OnDevice) and device_of(tensor) != x.where:
                found = f"{device_of(tensor)} indexed by {x.where}"
                raise RuntimeError(f"indices should be either on cpu or on the same device: {found} at {line()}")
            if isinstance(tensor, OnDevice):
                if x.dtype in (torch.bool, torch.uint8):
                    self.wait("index by a mask")
                elif not isinstance(x, OnDevice):
                    self.wait("index from the host" if x.ndim else "__index__")
            if isinstance(x, OnDevice) and x.ndim == 0 and x.dtype != torch.bool:
                self.wait("__index__")

    def ___getitem__(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, index = args
        self._index_rules(tensor, index)
        found = self.run(func, args, kwargs)
        return self.placed(found, tensor.where) if isinstance(tensor, OnDevice) else self._plain(found)

    def ___setitem__(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, index, value = args
        self._index_rules(tensor, index)
        if isinstance(value, Tensor) and device_of(value) != device_of(tensor) and value.ndim:
            indexed = any(isinstance(x, Tensor) for x in tree_flatten(index)[0])
            if indexed:
                raise RuntimeError(f"Expected all tensors to be on the same device in index_put_ at {line()}")
            self.move(value, device_of(tensor), False)
        self.run(func, args, kwargs)


class Stream:
    """A queue of a device, in which everything has been done as soon as it is asked for."""

    def __init__(self, device: Any = None):
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        """The device waits, not the host."""


def _grouped(by_device: Any) -> Any:
    """PyTorch's grouping of an optimizer's tensors, which it does in C++, with the device that they say they are on."""

    def group(lists: Any, *rest: Any) -> Any:
        found = by_device(lists, *rest)
        placed = {device_of(x) for each in lists for x in each if isinstance(x, OnDevice)}
        assert len(placed) <= 1
        return {(next(iter(placed), device), dtype): group for (device, dtype), group in found.items()}

    return group


@contextmanager
def pretended(monkeypatch: Any, kind: str = "cuda", count: int = 1) -> Iterator[PretendedDevice]:
    """Pretend that there are so many GPUs; yields what happens on them.

    They are of an age for which there are no Triton kernels: all that runs is PyTorch's.
    """
    device = PretendedDevice(kind, count)
    if kind == "cuda":
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: count,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "_lazy_init": lambda: None,
            "is_bf16_supported": lambda including_emulation=True: True,
            "mem_get_info": lambda device=None: (80 * 10**9, 80 * 10**9),
            "get_device_capability": lambda device=None: (7, 5),
            "get_device_name": lambda device=None: "a pretended GPU",
            "synchronize": lambda device=None: device.wait("synchronize"),
            "empty_cache": lambda: None,
            "manual_seed_all": lambda seed: None,
            "Stream": Stream,
            "stream": lambda stream: nullcontext(),
            "current_stream": Stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    else:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads do not share what is pretended
    of_optimizers = torch._C._group_tensors_by_device_and_dtype
    monkeypatch.setattr(torch._C, "_group_tensors_by_device_and_dtype", _grouped(of_optimizers))
    with device:
        yield device
