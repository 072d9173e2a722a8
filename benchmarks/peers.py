"""The training of peers, for the benchmarks that measure it."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad_norm_


def sparsify_step(coder: Any, optimizer: Any, x: Tensor, **forward: Any) -> None:
    """A step of sparsify's trainer, whose gradients are clipped, as the others' are, and whose optimizer is Adam."""
    coder.set_decoder_norm_to_unit_norm()
    out = coder(x, **forward)
    (out.fvu + out.auxk_loss / 32).backward()
    clip_grad_norm_(coder.parameters(), 1.0)
    coder.remove_gradient_parallel_to_decoder_directions()
    optimizer.step()
    optimizer.zero_grad()


def sae_lens_trainer(
    architecture: str, d_in: int, d_sae: int, sparsity: float, data: Iterator[Tensor], **rates: Any
) -> Any:
    """SAE Lens's trainer of an architecture under our name for it; `sparsity` is K, or the penalty's coefficient.

    `rates` are fields of its SAETrainerConfig. What else it can be told is as it is by default, but for what a short
    run needs: its threshold of BatchTopK follows over ten steps, as ours does, and not over a hundred, and the penalty
    grows over the first twentieth of the steps.
    """
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    cfg = SAETrainerConfig(**rates)
    sizes, growing = {"d_in": d_in, "d_sae": d_sae}, cfg.total_training_steps // 20
    batch = {**sizes, "k": sparsity, "topk_threshold_lr": 0.1}
    widths = [d_sae >> level for level in reversed(range(5))]
    sae: Any
    match architecture:
        case "topk":
            sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**sizes, k=int(sparsity)))
        case "batchtopk":
            sae = saes.BatchTopKTrainingSAE(saes.BatchTopKTrainingSAEConfig(**batch))
        case "matryoshka":
            options = saes.MatryoshkaBatchTopKTrainingSAEConfig(**batch, matryoshka_widths=widths)
            sae = saes.MatryoshkaBatchTopKTrainingSAE(options)
        case "relu":
            options = saes.StandardTrainingSAEConfig(**sizes, l1_coefficient=sparsity, l1_warm_up_steps=growing)
            sae = saes.StandardTrainingSAE(options)
        case "jumprelu":
            options = saes.JumpReLUTrainingSAEConfig(**sizes, l0_coefficient=sparsity, l0_warm_up_steps=growing)
            sae = saes.JumpReLUTrainingSAE(options)
    return SAETrainer(cfg, sae, data)
