"""What explain.py and demo.py begin with: an autoencoder, and the model that it was trained on."""

from pathlib import Path
from typing import Any

from mistral_sae.files import SAEError
from mistral_sae.model.language_model import LanguageModel, ModelSpec, device_and_dtype, load_model
from mistral_sae.sae.checkpoint import LoadedSAE, check_model, load_sae


def load_pair(constants: Any, spec: ModelSpec) -> tuple[LoadedSAE, LanguageModel]:
    """The autoencoder and the whole model that constants such as config.py's name; prints what they are.

    `spec` is of that model, and `constants` has SAE_PATH, RUN_DIR, HOOK_NAME, MISTRAL_MODEL_PATH, ENGINE,
    EXCLUDE_TOKENS, DEVICE and DTYPE.
    Raises SAEError and ModelError, also where the two do not fit each other, before the model is loaded.
    """
    source, path = sae_source(constants), constants.MISTRAL_MODEL_PATH
    device, dtype = device_and_dtype(constants.DEVICE, constants.DTYPE)
    loaded = load_sae(source, hook_name=constants.HOOK_NAME, device=device)
    check_model(loaded, spec.name, spec.d_model, spec.n_layers)
    metadata = loaded.metadata
    print(f"engine    {spec.run_by()}")
    print(f"layer     {metadata.residual_layer} of 0 to {spec.n_layers - 1} ({metadata.hook_name})")
    print(f"features  {loaded.sae.n_features:,} of {source}")
    engine, excluded = constants.ENGINE, constants.EXCLUDE_TOKENS
    model = load_model(path, device=device, dtype=dtype, engine=engine, exclude_tokens=excluded)
    named = metadata.model_name or "a model without a name"
    if metadata.model_fingerprint and constants.HOOK_NAME is None:  # which is of the layers up to the labelled one
        if metadata.model_fingerprint != model.fingerprint(metadata.residual_layer):
            print(f"warning: the autoencoder was trained on {named}, of other weights than those of {spec.name} here")
    elif metadata.model_name and _last_part(named) != _last_part(spec.name):
        print(f"warning: the autoencoder was trained on {named}, by its label, and the model is {spec.name}")
    return loaded, model


def sae_source(constants: Any) -> str | Path:
    """Folder or hub name of the autoencoder: SAE_PATH, or `sae` in RUN_DIR. Raises SAEError if RUN_DIR has none."""
    source = constants.SAE_PATH or Path(constants.RUN_DIR) / "sae"
    if constants.SAE_PATH is None and not Path(source, "cfg.json").is_file():
        raise SAEError(f"found no autoencoder in {source}: run train.py first, or set SAE_PATH or RUN_DIR")
    return source


def _last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()
