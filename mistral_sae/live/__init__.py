"""A local page to look into the model and to steer it, and the same as an API (`python demo.py SERVE=1`)."""

from collections.abc import Mapping
from typing import Any

from mistral_sae.cli import UserError
from mistral_sae.explain.types import Label
from mistral_sae.steer.steering import Subject


def serve(constants: Any, subject: Subject, labels: Mapping[int, Label]) -> None:
    """Serve the page until Ctrl-C, with constants such as config.py's. Raises UserError where it cannot be served."""
    try:
        from mistral_sae.live import app, known
    except ModuleNotFoundError as missing:  # starlette and uvicorn, which nothing else needs
        raise UserError(f"found no {missing.name}, which SERVE needs: pip install starlette uvicorn") from None
    app.serve(known.known_of(constants, subject, labels), constants.HOST, constants.PORT)
