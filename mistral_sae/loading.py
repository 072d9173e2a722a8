"""What explain.py and demo.py begin with: an autoencoder, the model that it was trained on, and what is said of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mistral_sae.cli import UserError, room_for
from mistral_sae.explain import cache
from mistral_sae.explain.labels import read_labels
from mistral_sae.explain.types import Label
from mistral_sae.files import SAEError
from mistral_sae.model.language_model import LanguageModel, ModelSpec, device_and_dtype, load_model
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import LoadedSAE, check_model, hash_of_sae, load_sae
from mistral_sae.sae.memory import Needs, free_memory
from mistral_sae.sae.resume import read_points
from mistral_sae.steer.steering import Explanation

# Told the autoencoder, the last layer of the model and its dtype: what a run with them needs
Needed = Callable[[SparseAutoencoder, int | None, torch.dtype], Needs]


def load_pair(
    constants: Any, spec: ModelSpec, *, whole: bool = True, needed: Needed | None = None, advice: str = ""
) -> tuple[LoadedSAE, LanguageModel]:
    """The autoencoder and the model that constants such as config.py's name; prints what they are.

    `spec` is of that model, and `constants` has SAE_PATH, RUN_DIR, HOOK_NAME, MISTRAL_MODEL_PATH, ENGINE,
    EXCLUDE_TOKENS, DEVICE, SAE_DEVICE and DTYPE. The model is all there, or unless `whole` up to the autoencoder's
    layer with its head. Before it is loaded, prints the plan of what is `needed`.

    Raises SAEError and ModelError, also where the two do not fit each other, and UserError, with `advice`, where there
    is no room for what is needed, before the model is loaded.
    """
    source = sae_source(constants)
    device, dtype = device_and_dtype(constants.DEVICE, constants.DTYPE)
    sae_device = sae_device_of(constants)
    free = {str(each): free_memory(str(each)) for each in (device, sae_device)}
    with room_for("the autoencoder", "use another SAE_DEVICE"):
        loaded = load_sae(source, hook_name=constants.HOOK_NAME, device=sae_device)
    check_model(loaded, spec.name, spec.d_model, spec.n_layers)
    metadata = loaded.metadata
    print(f"engine    {spec.run_by()}")
    print(f"layer     {metadata.residual_layer} of 0 to {spec.n_layers - 1} ({metadata.hook_name})")
    print(f"features  {loaded.sae.n_features:,} of {source}")
    last_layer = None if whole else metadata.residual_layer
    if needed is not None:
        plan = needed(loaded.sae, last_layer, dtype).plans(str(device), str(sae_device), free)
        print(plan)
        if not plan.fits:
            raise UserError(f"the run needs more memory than is free: {advice}, or use another DEVICE or SAE_DEVICE")
    with room_for("the language model", "use another DEVICE, or DTYPE=bfloat16"):
        model = load_model(
            constants.MISTRAL_MODEL_PATH,
            last_layer=last_layer,
            device=device,
            dtype=dtype,
            engine=constants.ENGINE,
            exclude_tokens=constants.EXCLUDE_TOKENS,
            head=True,
        )
    named = metadata.model_name or "a model without a name"
    if metadata.model_fingerprint and constants.HOOK_NAME is None:  # which is of the layers up to the labelled one
        if metadata.model_fingerprint != model.fingerprint(metadata.residual_layer):
            print(f"warning: the autoencoder was trained on {named}, of other weights than those of {spec.name} here")
    elif metadata.model_name and _last_part(named) != _last_part(spec.name):
        print(f"warning: the autoencoder was trained on {named}, by its label, and the model is {spec.name}")
    return loaded, model


def read_explanations(loaded: LoadedSAE, run_dir: Path) -> tuple[dict[int, Label], dict[int, Explanation]]:
    """The labels in RUN_DIR by feature, and what is said of those that have an explanation.

    None if they are of another autoencoder, which is printed. Raises SAEError for a damaged file.
    """
    labels = read_labels(run_dir / "explanations.jsonl")
    if labels and not cache.is_of(run_dir / cache.FOLDER, hash_of_sae(loaded.sae)):
        print(f"the explanations in {run_dir} are of another autoencoder: not used")
        return {}, {}
    explained = {f: label for f, label in labels.items() if label.explanation}
    return labels, {f: Explanation(label.explanation, _source_of(label)) for f, label in explained.items()}


def _source_of(label: Label) -> str:
    """Who explained a feature, and how well the explanation did."""
    detection = label.scores.get("detection")
    if detection is None or detection.value is None:
        return label.explainer
    return f"{label.explainer}, detection {detection.value:.2f}"


def sae_device_of(constants: Any) -> torch.device:
    """The autoencoder's device: SAE_DEVICE, or the model's. Raises ModelError."""
    return device_and_dtype(constants.SAE_DEVICE or constants.DEVICE, constants.DTYPE)[0]


def sae_source(constants: Any) -> str | Path:
    """Folder or hub name of the autoencoder: SAE_PATH, or `sae` in RUN_DIR. Raises SAEError if RUN_DIR has none."""
    if constants.SAE_PATH is None and (points := read_points(Path(constants.RUN_DIR))):
        one, *others = [point.name for point in points]
        named = f"choose one by RUN_DIR={Path(constants.RUN_DIR, one)}, {', '.join(others)}"
        raise SAEError(f"found a grid of {len(points)} autoencoders in {constants.RUN_DIR}, expected one: {named}")
    source = constants.SAE_PATH or Path(constants.RUN_DIR) / "sae"
    if constants.SAE_PATH is None and not Path(source, "cfg.json").is_file():
        raise SAEError(f"found no autoencoder in {source}: run train.py first, or set SAE_PATH or RUN_DIR")
    return source


def _last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()
