"""What explain.py and demo.py begin with: an autoencoder, and the model that it was trained on."""

from pathlib import Path

from mistral_sae.files import SAEError
from mistral_sae.model.language_model import STANDIN, LanguageModel, device_and_dtype, inspect, load_model
from mistral_sae.sae.checkpoint import LoadedSAE, check_model, load_sae


def open_both(
    *,
    sae_path: str | None,
    run_dir: str,
    hook_name: str | None,
    model_path: str | None,
    device: str | None,
    dtype: str | None,
) -> tuple[LoadedSAE, LanguageModel]:
    """The autoencoder and the whole model, which fit each other. Prints what they are before the model is loaded.

    Args:
        sae_path: folder or hub name of the autoencoder; None for the one that train.py left in `run_dir`.
        hook_name: where the autoencoder belongs, if its folder says something else.
        model_path: the model's folder; None for the bundled stand-in.
        device, dtype: as `load_model` takes them.

    Raises SAEError and ModelError.
    """
    source = where_it_is(sae_path, run_dir)
    spec = inspect(model_path or STANDIN)
    loaded = load_sae(source, hook_name=hook_name, device=device_and_dtype(device, dtype)[0])
    check_model(loaded, spec)
    metadata = loaded.metadata
    print(f"layer     {metadata.residual_layer} of 0 to {spec.n_layers - 1} ({metadata.hook_name})")
    print(f"features  {loaded.sae.n_features:,} of {source}")
    if metadata.model_name and _last_part(metadata.model_name) != _last_part(spec.name):
        print(
            f"warning: the autoencoder was trained on {metadata.model_name}, by its label, and the model is {spec.name}"
        )
    return loaded, load_model(model_path, device=device, dtype=dtype)


def where_it_is(sae_path: str | None, run_dir: str) -> str | Path:
    """Folder or hub name of the autoencoder. Raises SAEError if it is to be in `run_dir` and is not."""
    source = sae_path or Path(run_dir) / "sae"
    if sae_path is None and not Path(source, "cfg.json").is_file():
        raise SAEError(f"found no autoencoder in {source}: run train.py first, or set SAE_PATH or RUN_DIR")
    return source


def _last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()
