"""The state of a trainer on disk: one file of each shard, which a run on any other mesh can go on from.

The first shard's file has the name that the only one's would have, and is written when the others are whole: where it
is, all are. A file per shard needs no rank to hold what others have, and keeps the checksums and formats of one; all
ranks have to see the same folder.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_sae.files import SAEError, load_metadata, load_state, opened, save_state
from mistral_sae.sae.trainer import Trainer


def part_of(path: Path, shard: int, shards: int) -> Path:
    """The file of a shard of a checkpoint."""
    return path.with_name(f"{path.stem}.{shard}-of-{shards}{path.suffix}") if shard else path


def files_of(path: Path, n_features: int) -> list[Path]:
    """The files of a checkpoint of so many features: `path` alone, or those of all shards. Raises SAEError."""
    with opened(path) as file:
        width = (*file.get_slice("b_enc").get_shape(), 0)[0] if "b_enc" in file.keys() else 0  # noqa: SIM118
    shards = n_features // width if n_features and width and not n_features % width else 1
    return [part_of(path, shard, shards) for shard in range(shards)]


def save_trainer(path: Path, trainer: Trainer, metadata: dict[str, Any]) -> None:
    """Write a trainer's state, of the first replica; all ranks have to. May raise Failed."""
    mesh = trainer.mesh
    if mesh.shards.rank and not mesh.replicas.rank:
        save_state(part_of(path, mesh.shards.rank, mesh.shards.size), trainer.state(), {})
    mesh.ranks.wait()
    if not mesh.ranks.rank:
        save_state(path, trainer.state(), metadata)


def load_trainer(path: Path, trainer: Trainer, kind: Any) -> tuple[dict[str, Tensor], Any]:
    """This rank's part of the state that `save_trainer` wrote on any mesh, on the CPU, and the metadata.

    All ranks have to. Raises SAEError on all of them if what any of them needs is missing or damaged.
    """
    error, found = None, {}
    try:
        found, metadata = _part(path, trainer), load_metadata(path, kind)
        trainer.check(found, path)
    except SAEError as raised:
        error = raised
    if trainer.mesh.ranks.total(trainer.dead.new_tensor(error is not None, dtype=torch.int64)):
        raise error or SAEError(f"found a damaged part of {path}, expected what was saved: remove the file")
    return found, metadata


def _part(path: Path, trainer: Trainer) -> dict[str, Tensor]:
    n_features, held = trainer.config.d_hidden, len(trainer.sae.b_enc)
    files = files_of(path, n_features)
    if not all(file.exists() for file in files):
        return load_state(path)[0]  # of another size, as the check will say
    width, start = n_features // len(files), trainer.mesh.shards.rank * held
    parts = []
    for shard in range(start // width, -(-(start + held) // width)):
        rows = slice(max(0, start - shard * width), start + held - shard * width)
        tensors = load_state(files[shard])[0]
        parts.append(
            {name: tensor[rows] if _is_of_features(name, tensor) else tensor for name, tensor in tensors.items()}
        )
    if len(parts) == 1:
        return parts[0]
    return {
        name: torch.cat([p[name] for p in parts]) if _is_of_features(name, x) else x for name, x in parts[0].items()
    }


def _is_of_features(name: str, tensor: Tensor) -> bool:
    """Whether each feature has a row of a tensor."""
    return tensor.ndim > 0 and not name.endswith("b_dec")
