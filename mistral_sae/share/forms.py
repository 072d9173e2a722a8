"""An autoencoder, its features and a feature's direction in the forms of other tools.

sparsify's folder; SAE Dashboard's batch-0.json and so on, from which Neuronpedia's uploads are made; llama.cpp's
control vector; the file of lm-eval's model "steered".

Shapes: D model width, F features.
"""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mistral_sae.cli import UserError
from mistral_sae.explain.types import BINS, Example, Feature, Label
from mistral_sae.files import write_atomically, write_text
from mistral_sae.sae.cfg import Metadata
from mistral_sae.sae.checkpoint import LoadedSAE
from mistral_sae.steer.steering import Edit, Subject

BATCH = 128  # features of a file of SAE Dashboard
NOT_MEASURED = (  # of SAE Dashboard's fields of a feature
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "decoder_weights_dist", "vector",
)  # fmt: skip
PARTS = 5  # of a feature's range, from which passages are shown: a whole number of the histogram's bins each


# ---- sparsify ----


@torch.no_grad()
def write_sparsify(folder: Path, loaded: LoadedSAE) -> Path:
    """Write sparsify's folder of a hookpoint below a folder, and return it.

    sparsify does not normalize. An autoencoder that does is written as what it is for normalized residuals, and
    cfg.json says so under a key that sparsify passes over and `load_sae` reads. Raises UserError unless it is TopK.
    """
    sae, metadata = loaded.sae, loaded.metadata
    if sae.activation != "topk":
        raise UserError(f"found an autoencoder with {sae.activation}: expected topk, as sparsify has no other")
    hookpoint = folder / f"layers.{metadata.residual_layer}"
    cfg = {
        "activation": "topk",
        "d_in": sae.d_model,
        "num_latents": sae.n_features,
        "expansion_factor": max(1, sae.n_features // sae.d_model),
        "k": sae.k,
        "normalize_decoder": True,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "normalize_activations": sae.normalize,
    }
    weights = {
        "encoder.weight": sae.W_enc.T,
        "encoder.bias": sae.b_enc if sae.center else sae.b_enc + sae.b_dec @ sae.W_enc,  # sparsify subtracts b_dec
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    run = {"model": metadata.model_name, "dataset": metadata.dataset_path, "ctx_len": metadata.context_size}
    write_text(folder / "config.json", json.dumps(run, indent=2) + "\n")
    write_atomically(hookpoint / "sae.safetensors", partial(save_file, {n: t.detach() for n, t in weights.items()}))
    write_text(hookpoint / "cfg.json", json.dumps(cfg, indent=2) + "\n")
    return hookpoint


# ---- SAE Dashboard and Neuronpedia ----


def write_dashboards(
    folder: Path,
    features: Iterable[Feature],
    labels: Mapping[int, Label],
    metadata: Metadata,
    *,
    n_features: int,
    corpus: tuple[str, int, int],
) -> list[Path]:
    """Write the files of SAE Dashboard, BATCH features each, and explanations.jsonl beside them; returns all.

    `corpus` is its name, and its rows and their tokens. A line of explanations.jsonl is Neuronpedia's record of an
    explanation, but for its author. What is not measured here (correlations, alignment with neurons) is left empty.
    """
    width = f"{n_features // 1024}k" if n_features >= 1024 else str(n_features)
    source = {"model_id": metadata.model_name, "layer": metadata.residual_layer, "sae_set": f"res-{width}"}
    paths, lines, remaining = [], [], iter(features)
    for number in count():
        batch = list(islice(remaining, BATCH))
        if not batch:
            break
        records = [dashboard(feature, *corpus) for feature in batch]
        paths.append(folder / f"batch-{number}.json")
        write_text(paths[-1], json.dumps({**source, "sae_id_suffix": None, "features": records}))
        explained = (labels[each.feature] for each in batch if each.feature in labels)
        lines += [explanation(label, source) for label in explained if label.explanation]
    for earlier in folder.glob("batch-*.json"):  # of an export of more features
        if earlier.stem[6:].isdecimal() and int(earlier.stem[6:]) >= len(paths):
            earlier.unlink()
    paths.append(folder / "explanations.jsonl")
    write_text(paths[-1], "".join(json.dumps(line) + "\n" for line in lines))
    return paths


def dashboard(feature: Feature, corpus: str, rows: int, row_tokens: int) -> dict[str, Any]:
    """SAE Dashboard's record of a feature."""
    width = feature.maximum / BINS
    return {
        "feature_index": feature.feature,
        **{name: [] for name in NOT_MEASURED},
        "neg_str": [token for token, _ in feature.suppressed],
        "neg_values": [round(logit, 3) for _, logit in feature.suppressed],
        "pos_str": [token for token, _ in feature.promoted],
        "pos_values": [round(logit, 3) for _, logit in feature.promoted],
        "frac_nonzero": feature.density,
        "freq_hist_data_bar_values": [round((i + 0.5) * width, 3) for i in range(BINS)],
        "freq_hist_data_bar_heights": list(feature.histogram),
        "n_prompts_total": rows,
        "n_tokens_in_prompt": row_tokens,
        "dataset": corpus,
        "activations": [
            *(passage(example, -1, feature.maximum, -1) for example in feature.top),
            *(passage(example, *part_of(example, feature)) for example in feature.spread),
        ],
    }


def part_of(example: Example, feature: Feature) -> tuple[float, float, float]:
    """The part of a feature's range that a passage is from: its ends, and its share of the feature's activations."""
    part = min(PARTS - 1, int(PARTS * example.strength / feature.maximum))
    bins = feature.histogram[part * BINS // PARTS : (part + 1) * BINS // PARTS]
    low, high = (feature.maximum * end / PARTS for end in (part, part + 1))
    return round(low, 3), round(high, 3), sum(bins) / sum(feature.histogram)


def passage(example: Example, low: float, high: float, share: float) -> dict[str, Any]:
    """SAE Dashboard's record of a passage; -1 are the ends and the share of the strongest ones."""
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": list(example.tokens),
        "values": [round(value, 3) for value in example.activations],
        "qualifying_token_index": example.peak,
    }


def explanation(label: Label, source: Mapping[str, Any]) -> dict[str, Any]:
    """Neuronpedia's record of an explanation; its author is whoever uploads it."""
    scores = (f"{name} {score.value:.2f}" for name, score in label.scores.items() if score.value is not None)
    return {
        "modelId": source["model_id"],
        "layer": f"{source['layer']}-{source['sae_set']}",
        "index": str(label.feature),
        "description": label.explanation,
        "explanationModelName": label.explainer,
        "notes": ", ".join(scores) or None,
    }


# ---- a feature's direction ----


@torch.no_grad()
def steering_vector(subject: Subject, edit: Edit, prompt: str) -> Tensor:
    """What a clamp adds to residuals (D) where its features are silent, at their median deviation over a prompt."""
    model, sae, layer = subject.model, subject.loaded.sae, subject.loaded.metadata.residual_layer
    _, _, std_T1 = sae.standardize(model.residuals([model.encode(prompt)], layer)[0, 1:])
    if not len(std_T1):
        raise UserError("found PROMPT '': expected some text, over which a clamp is measured")
    clamped = edit.in_units_of_steer(subject)
    activations_S = torch.tensor([float(c or 0) for c in clamped.values()], device=sae.W_dec.device)
    return (float(std_T1.median()) * activations_S @ sae.W_dec[list(clamped)]).cpu()


def write_control_vector(path: Path, vector_D: Tensor, layer: int) -> None:
    """Write llama.cpp's control vector, for --control-vector and --control-vector-scaled.

    llama.cpp adds direction.N to the output of layer N, at all positions. Raises UserError for layer 0, for which it
    has no direction.
    """
    import gguf  # slow to import, and of use here only

    if layer == 0:
        raise UserError("found an autoencoder of layer 0: expected a later one, as llama.cpp steers from layer 1 on")

    def write(partial_path: Path) -> None:
        writer = gguf.GGUFWriter(partial_path, "controlvector")
        writer.add_string("controlvector.model_hint", "llama")
        writer.add_uint32("controlvector.layer_count", 1)
        writer.add_tensor(f"direction.{layer}", vector_D.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_atomically(path, write)


def write_steered(path: Path, vector_D: Tensor, layer: int) -> None:
    """Write the file that lm-eval's model "steered" takes as steer_path; it adds the vector at all positions.

    lm-eval wants PyTorch's own format, and reads it with weights_only.
    """
    added = {"steering_vector": vector_D.clone(), "steering_coefficient": 1.0, "action": "add", "bias": None}
    write_atomically(path, partial(torch.save, {f"layers.{layer}": added}))
