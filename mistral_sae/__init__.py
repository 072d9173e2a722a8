"""Sparse autoencoders for Mistral language models: train, explain, steer.

The names below are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral_sae.model.language_model import load_model
    from mistral_sae.sae.autoencoder import SparseAutoencoder
    from mistral_sae.sae.checkpoint import load_sae

__all__ = ["SparseAutoencoder", "load_model", "load_sae"]

_MODULES = {
    "SparseAutoencoder": "mistral_sae.sae.autoencoder",
    "load_model": "mistral_sae.model.language_model",
    "load_sae": "mistral_sae.sae.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
