"""The ranks of a run: PyTorch's processes, each with a GPU or some cores, and what they send each other.

They form a mesh of replicas x shards. The shards of a replica each hold an equal part of the features; a replica has
all of them. One process alone is a mesh of 1 x 1, where every method gives back what it is given.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mistral_sae.cli import Failed, UserError, quoted

# PyTorch 2.13 gave it another name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group(NamedTuple):
    """Ranks that work together; all of them call the same methods in the same order."""

    size: int = 1
    rank: int = 0  # of this process among them
    process_group: Any = None

    def gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """The tensors of all ranks, which have one shape, joined along a dimension."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size * len(x), *x.shape[1:])
        _all_gather(parts, x.contiguous(), group=self.process_group)
        return parts if dim == 0 else torch.cat(parts.chunk(self.size), dim=dim)

    def total(self, x: Tensor) -> Tensor:
        """The sum of a small tensor of each rank, in the order of the ranks: the same bits on all of them."""
        return x if self.size == 1 else self.gather(x.unsqueeze(0)).sum(dim=0)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum of a large tensor of each rank, in its place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.process_group)
        return x

    def wait(self) -> None:
        """Return when all ranks have called it."""
        if self.size > 1:
            dist.barrier(group=self.process_group)

    def part(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's of as many equal parts of a tensor as there are ranks."""
        if self.size == 1:
            return x
        width = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * width, width)


class Mesh(NamedTuple):
    """All ranks of a run, and this one's two groups: its replica's shards, and the replicas of its shard."""

    ranks: Group = Group()
    replicas: Group = Group()
    shards: Group = Group()

    def sum_tokens(self, x: Tensor) -> Tensor:
        """The sum over shards of a tensor whose first dimension are the batch's tokens; may overwrite it.

        A replica sums some of the tokens and gets the others' sums from the other replicas. So all have the same bits,
        and replicas never drift apart.
        """
        return self.replicas.gather(self.shards.sum_(self.replicas.part(x)))


ALONE = Mesh()


def sizes(mesh: str | None, n_ranks: int) -> tuple[int, int]:
    """The numbers of replicas and shards that a text such as "2x4" names; None are as many shards as ranks."""
    found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", mesh or f"1x{n_ranks}")
    replicas, shards = map(int, found.groups()) if found else (0, 0)
    if replicas * shards != n_ranks:
        raise UserError(
            f"MESH is {quoted(mesh)}: expected replicas x shards that make {n_ranks}, the number of processes, as in "
            f"'1x{n_ranks}': set it, or torchrun's --nproc-per-node and --nnodes"
        )
    return replicas, shards


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Be one of the processes that torchrun started, if it did, until the block ends.

    Raises Failed where another one ended before: torchrun then ends all of them, within half a minute.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL|connection", str(error), re.IGNORECASE):
            raise
        raise Failed("another rank ended: its line says why, and the last checkpoint is whole") from None
    dist.destroy_process_group()


def connect(mesh: str | None, device_type: str) -> Mesh:
    """The mesh of the ranks that PyTorch's process group has; `ALONE` without one."""
    if not dist.is_initialized():
        sizes(mesh, 1)
        return ALONE
    names = ("replicas", "shards")
    made = dist.init_device_mesh(device_type, sizes(mesh, dist.get_world_size()), mesh_dim_names=names)
    replicas, shards = (
        Group(made.size(i), made.get_local_rank(name), made.get_group(name)) for i, name in enumerate(names)
    )
    return Mesh(Group(dist.get_world_size(), dist.get_rank(), dist.group.WORLD), replicas, shards)
