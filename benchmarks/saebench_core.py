"""SAEBench's own core evaluation of the stand-in's autoencoder, beside ours of the same rows.

    pip install --no-deps sae-bench==0.6.0 tabulate     whose requirement of numpy below 2 is not followed
    python -m benchmarks.saebench_core [RUN_DIR]        after train.py

SAEBench takes autoencoders that SAE Lens loads, and so ours as they are, and models that TransformerLens has. A model
that it has not is made from ours by `in_transformer_lens`. Its other evaluations want data sets of the hub, or a judge.
"""

import sys
from types import SimpleNamespace
from typing import Any

import sae_lens
import torch
from sae_bench.evals.core.main import CoreEvalConfig, run_evals
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_mistral_weights

import config
from benchmarks.machine import save
from mistral_sae.data.tokens import Corpus
from mistral_sae.model.language_model import LanguageModel, load_model
from mistral_sae.sae.checkpoint import load_sae
from mistral_sae.sae.evaluate import Evaluator

ROWS, AT_ONCE = 16, 8


def in_transformer_lens(model: LanguageModel, length: int) -> HookedTransformer:
    """The same model, which runs in transformers, in TransformerLens, for rows of a length; it has no tokenizer."""
    hugging_face: Any = model._engine.model
    c = hugging_face.config
    described = HookedTransformerConfig(
        n_layers=c.num_hidden_layers, d_model=c.hidden_size, n_ctx=length, d_head=c.head_dim, d_mlp=c.intermediate_size,
        n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads, d_vocab=c.vocab_size, act_fn="silu",
        normalization_type="RMS", final_rms=True, gated_mlp=True, eps=c.rms_norm_eps,
        positional_embedding_type="rotary", rotary_dim=c.head_dim, rotary_adjacent_pairs=False,
        rotary_base=int(c.rope_parameters["rope_theta"]),
        original_architecture="MistralForCausalLM", model_name=model.name, device="cpu",
    )  # fmt: skip
    made = HookedTransformer(described)
    made.load_state_dict(convert_mistral_weights(hugging_face, described), strict=False)  # all but masks
    ids = model.tokenizer
    made.tokenizer = SimpleNamespace(
        bos_token_id=ids.bos_id, eos_token_id=ids.eos_id, pad_token_id=ids.eos_id, padding_side="right"
    )
    return made


class Rows:
    """Rows of tokens in the place of SAE Lens's ActivationsStore, as far as SAEBench asks."""

    normalize_activations = "none"

    def __init__(self, tokens_RT: Tensor):
        self.tokens_RT, self.next, self.context_size = tokens_RT, 0, tokens_RT.shape[1]
        self.store_batch_size_prompts = AT_ONCE

    def get_batch_tokens(self, n: int = AT_ONCE) -> Tensor:
        """The next rows, from the first one again at the end."""
        self.next += n
        return self.tokens_RT[torch.arange(self.next - n, self.next) % len(self.tokens_RT)]

    def reset_input_dataset(self) -> None:
        """Begin again with the first row."""
        self.next = 0


def main() -> None:
    """Evaluate with both and save the figures."""
    folder = sys.argv[1] if sys.argv[1:] else "runs/standin"
    loaded, model = load_sae(folder), load_model(None, engine="transformers", device="cpu")
    tokens_RT = Corpus.of(config).held_out_rows(model.tokenizer, ROWS, config.EVALUATION_STRIDE)
    hooked = in_transformer_lens(model, tokens_RT.shape[1])
    with torch.no_grad():
        difference = float((hooked(tokens_RT[:2]) - model.forward(tokens_RT[:2])).abs().max())
    _, sae, _ = load_and_format_sae("ours", sae_lens.SAE.load_from_disk(f"{folder}/sae", device="cpu"), "cpu")
    settings = CoreEvalConfig(
        model_name=model.name, batch_size_prompts=AT_ONCE, n_eval_reconstruction_batches=ROWS // AT_ONCE,
        n_eval_sparsity_variance_batches=ROWS // AT_ONCE, exclude_special_tokens_from_reconstruction=True,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, llm_dtype="float32", context_size=tokens_RT.shape[1],
    )  # fmt: skip
    special = {model.tokenizer.bos_id, model.tokenizer.eos_id}
    theirs, _ = run_evals(sae, Rows(tokens_RT), hooked, settings, ignore_tokens=special)
    ours = Evaluator(model, tokens_RT, loaded.metadata.residual_layer, AT_ONCE)(loaded.sae)
    for name, figures in (("SAEBench", theirs), ("mistral-sae", ours)):
        print(name, figures)
    save("saebench_core", {"logits differ by": difference, "SAEBench": theirs, "mistral-sae": ours})


if __name__ == "__main__":
    main()
