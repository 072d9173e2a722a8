"""The ranks of a run: PyTorch's processes, each with a GPU or some cores, and what they send each other.

They form a mesh of replicas x shards. The shards of a replica each hold an equal part of the features; a replica has
all of them. One process alone is a mesh of 1 x 1, where every method gives back what it is given.
"""

import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mistral_sae.cli import Failed, UserError, quoted

STOP_EVERY = 10  # steps, after which ranks ask each other whether one is to stop: all have to at the same
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

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first rank end the block before the others begin it: what is fetched once is there for them."""
        if self.rank:
            self.wait()
        yield
        if not self.rank:
            self.wait()

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
    device: str | None = None  # this rank's GPU, where it has one of its own
    sizes: tuple[int, int] = (1, 1)  # numbers of replicas and shards

    def sum_tokens(self, x: Tensor) -> Tensor:
        """The sum over shards of a tensor whose first dimension are the batch's tokens; may overwrite it.

        A replica sums some of the tokens and gets the others' sums from the other replicas. So all have the same bits,
        and replicas never drift apart.
        """
        return self.replicas.gather(self.shards.sum_(self.replicas.part(x)))

    def agree(self, stopping: type[KeyboardInterrupt] | None, step: int, x: Tensor) -> type[KeyboardInterrupt] | None:
        """What all ranks are to be stopped by after a step, where some are; x is a tensor on this rank's device."""
        if self.ranks.size == 1:
            return stopping
        if step % STOP_EVERY:
            return None
        asked = self.ranks.total(x.new_tensor(stopping is not None, dtype=torch.int64))
        return (stopping or KeyboardInterrupt) if asked else None


ALONE = Mesh()


def sizes(mesh: str | None, n_ranks: int | None = None) -> tuple[int, int]:
    """The numbers of replicas and shards that a text such as "2x4" names; None are as many shards as ranks.

    Raises UserError unless they make up the ranks, where their number is given.
    """
    found = tuple(map(int, (mesh or f"1x{n_ranks}").split("x")))
    if n_ranks and math.prod(found) != n_ranks:
        raise UserError(
            f"MESH is {quoted(mesh)}: expected replicas x shards that make {n_ranks}, the number of processes, as in "
            f"'1x{n_ranks}': set it, or torchrun's --nproc-per-node and --nnodes"
        )
    replicas, shards = found
    return replicas, shards


@contextmanager
def joined(mesh: str | None, device_type: str, is_plan: bool = False) -> Iterator[Mesh]:
    """The mesh of the processes that torchrun started, until the block ends; `ALONE` if it started none.

    With `is_plan` it has nothing but the sizes, and needs no ranks. Raises Failed where another rank has ended:
    where one fails, torchrun ends all.
    """
    if is_plan or not dist.is_torchelastic_launched():
        yield ALONE._replace(sizes=sizes(mesh, None if is_plan and mesh else 1))
        return
    device = f"cuda:{os.environ['LOCAL_RANK']}" if device_type == "cuda" else None
    if device:
        torch.cuda.set_device(device)
    report = sys.excepthook
    # One may write residuals for days, or load a model, while the others wait: that a rank has ended torchrun sees
    dist.init_process_group("nccl" if device else "gloo", timeout=timedelta(days=100))
    sys.excepthook = report  # PyTorch's loses what a hook says that exits
    try:
        yield connect(mesh, device_type)._replace(device=device)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun sends it, and nothing is left to do
        raise Failed("another rank ended: its own line says why; the last checkpoint is whole") from None
    dist.destroy_process_group()


def connect(mesh: str | None, device_type: str) -> Mesh:
    """The mesh of all ranks of PyTorch's process group."""
    n_ranks = dist.get_world_size()
    shape = sizes(mesh, n_ranks)
    made = dist.init_device_mesh(device_type, shape, mesh_dim_names=("replicas", "shards"))
    replicas, shards = (Group(made.size(i), made.get_local_rank(i), made.get_group(i)) for i in range(2))
    return Mesh(Group(n_ranks, dist.get_rank(), dist.group.WORLD), replicas, shards, sizes=shape)
