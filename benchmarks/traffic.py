"""What a training step of full size reads and writes on a GPU, and the time reckoned from it: no GPU needed.

    python -m benchmarks.traffic

The step runs at the sizes of Mistral 7B with tensors that have no data, and every operator is counted
(benchmarks/accounting.py). Times are reckoned, not measured: each operator takes the longer of its bytes and its
products at an H100's rates; starting it takes nothing. sparsify's step, where it is installed, is counted by the same
rules. Nothing in here knows how a cache behaves, how well a kernel fills the device, or what features that fire
everywhere do to it.
"""

import json
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.accounting import H100, Cost, Count, Speeds, pretended_gpu
from benchmarks.machine import RESULTS, save
from mistral_sae.sae.trainer import TrainConfig, Trainer


class Sizes(NamedTuple):
    """One step."""

    B: int = 4096
    D: int = 4096
    F: int = 131_072
    K: int = 128
    dead: int = 0
    moments: str = "bfloat16"


OURS = {
    "standardize": "standardise",
    "encode": "encoder product",
    "topk": "top-k",
    "decode": "decode",
    "gradients": "sort by feature",
    "auxk_loss": "AuxK",
    "squares": "norm of the encoder's gradient",
    "adam_rows": "gradients, projection, Adam, rounding, rows",
    "topk_step": "losses, gradients of biases",
    "step": "biases, what fired",
}
OURS_BY_OPERATOR = {
    ("mistral_sae::inner_products", "encoder product"): "exact values of candidates",
    ("mistral_sae::row_squares", "sort by feature"): "gradient of activations, norm of the decoder's",
}
SPARSIFYS = {
    "forward": "losses",
    "backward": "gradient of the encoder",
    "set_decoder_norm_to_unit_norm": "rows",
    "clip_grad_norm_": "norm of the gradient, clipping",
    "remove_gradient_parallel_to_decoder_directions": "projection",
    "adam": "Adam",
}
SPARSIFYS_BY_OPERATOR = {
    ("aten::addmm", "losses"): "encoder product",
    ("aten::relu", "losses"): "encoder product",
    ("aten::_to_copy", "losses"): "W_enc to bfloat16",
    ("aten::topk", "losses"): "top-k",
    ("sparsify::embedding_bag", "losses"): "decode",
    ("sparsify::embedding_bag_backward", "gradient of the encoder"): "gradients of activations and decoder",
}


def config_of(sizes: Sizes) -> TrainConfig:
    """A training of these sizes, with what mistral_sae/defaults.py makes of them."""
    return TrainConfig(
        sizes.D, sizes.F, sizes.K,
        batch_size=sizes.B, k_aux=sizes.D // 2, auxk_features=8192, moments_dtype=sizes.moments, buffer_tokens=0,
    )  # fmt: skip


def our_step(sizes: Sizes, speeds: Speeds = H100) -> Count:
    """Ours, with the number of dead features that the sizes say."""
    count = Count(OURS, OURS_BY_OPERATOR, speeds=speeds)
    with pretended_gpu(), count, patch.object(Trainer, "find_dead"):  # which waits, between the steps
        trainer = Trainer(config_of(sizes), "cuda", bf16=True)
        trainer.dead = torch.empty(sizes.dead, dtype=torch.int64, device="cuda")
        x = torch.empty(sizes.B, sizes.D, dtype=torch.bfloat16, device="cuda")
        count.start()
        trainer.step(x, 1e-4)
    return count


@torch.library.custom_op("sparsify::embedding_bag", mutates_args=())
def sparsify_bag(indices: Tensor, weight: Tensor, per_sample_weights: Tensor) -> Tensor:
    """In place of sparsify's kernel, which wants real tensors."""
    raise NotImplementedError


@torch.library.custom_op("sparsify::embedding_bag_backward", mutates_args=())
def sparsify_bag_backward(
    indices: Tensor, weight: Tensor, per_sample_weights: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """In place of sparsify's kernel, which wants real tensors."""
    raise NotImplementedError


@sparsify_bag.register_fake
def _(indices: Tensor, weight: Tensor, per_sample_weights: Tensor) -> Tensor:
    return weight.new_empty(len(indices), weight.shape[1])


@sparsify_bag_backward.register_fake
def _(indices: Tensor, weight: Tensor, per_sample_weights: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(per_sample_weights)


def sparsifys_step(sizes: Sizes) -> Count:
    """The step of sparsify's trainer, with clipping and with Adam in place of its default SignSGD.

    Its gradients are autograd's, which wants a GPU for tensors on one: so they say that they are on the CPU.
    """
    from sparsify import SparseCoder, SparseCoderConfig, xformers

    count = Count(SPARSIFYS, SPARSIFYS_BY_OPERATOR, "cpu")
    with ExitStack() as stack:
        stack.enter_context(patch.object(xformers, "embedding_bag_triton", sparsify_bag))
        stack.enter_context(patch.object(xformers, "embedding_bag_bw_rev_indices", sparsify_bag_backward))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(count)
        coder = SparseCoder(sizes.D, SparseCoderConfig(num_latents=sizes.F, k=sizes.K), "cpu", torch.float32)
        optimizer = torch.optim.Adam(coder.parameters(), fused=True)
        x = torch.empty(sizes.B, sizes.D)
        for _ in range(2):  # Adam makes its moments in the first
            count.start()
            coder.set_decoder_norm_to_unit_norm()
            with torch.autocast("cpu", torch.bfloat16):
                out = coder(x)
            (out.fvu + out.auxk_loss / 32).backward()
            torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
            coder.remove_gradient_parallel_to_decoder_directions()
            optimizer.step()
            optimizer.zero_grad()
    return count


def floor(sizes: Sizes, speeds: Speeds = H100) -> Cost:
    """What no step avoids: the encoder product, and parameters and moments read and written."""
    flops = 2 * sizes.B * sizes.D * sizes.F
    count = 2 * sizes.D * sizes.F * 2 * (4 + 2 * getattr(torch, sizes.moments).itemsize)
    return Cost(count, flops, flops / speeds.bfloat16 + count / speeds.bandwidth)


def as_json(count: Count) -> dict[str, Any]:
    """What is saved of a step."""
    costs = dict(sorted(count.costs.items(), key=lambda item: -item[1].bytes))
    found = {"all": sum(costs.values(), Cost())._asdict(), "terms": {name: c._asdict() for name, c in costs.items()}}
    return found | {"peak_bytes": count.peak, "waits": count.waits, "on_host": count.on_host}


def main() -> None:
    """Count, print and save."""
    sizes = Sizes()
    steps = {
        "mistral-sae": our_step(sizes),
        "mistral-sae, 8,192 features dead": our_step(sizes._replace(dead=8192)),
        "mistral-sae, moments in float32": our_step(sizes._replace(moments="float32")),
    }
    saved = {}
    if find_spec("sparsify") is not None:
        steps["sparsify"] = sparsifys_step(sizes)
    else:
        print("sparsify is not installed (pip install -r benchmarks/requirements.txt): its step is as counted before")
        saved = {"sparsify": json.loads((RESULTS / "traffic.json").read_text())["results"]["steps"]["sparsify"]}
    results = {"sizes": sizes._asdict(), "floor": floor(sizes)._asdict()}
    results |= {"steps": {name: as_json(count) for name, count in steps.items()} | saved}
    for name, found in results["steps"].items():
        print(f"\n{name}: {shown(found['all'])}, peak memory {found['peak_bytes'] / 1e9:.1f} GB")
        print(f"  waits for the device: {len(found['waits'])}, operators on the host: {len(found['on_host'])}")
        for term, cost in found["terms"].items():
            print(f"  {term:48}{shown(cost)}")
    print(f"\nthe floor: {shown(results['floor'])}")
    save("traffic", results)


def shown(cost: dict[str, float]) -> str:
    """Bytes and reckoned time."""
    return f"{cost['bytes'] / 1e9:6.1f} GB {1000 * cost['seconds']:6.1f} ms"


if __name__ == "__main__":
    main()
