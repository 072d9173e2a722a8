"""Pages from templates: each one file with its style, script and data, and a policy that forbids everything else.

Everything that comes from a corpus or a model reaches a page through an autoescaped template or as text in the browser,
never as markup.
"""

import base64
import gzip
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mistral_sae.explain import figures

TEMPLATES = Path(__file__).parent / "templates"


def render(
    name: str, files: Sequence[str], context: Mapping[str, Any], more: Path = TEMPLATES, policy: str = ""
) -> str:
    """Return the page of a template, with its style and its script, each of which is some files one after the other.

    Args:
        name: of the template, without its .html.
        files: names of .css and .js files, of TEMPLATES or the folder `more`.
        policy: what the page may do beside running these: directives of a Content-Security-Policy, each with its ";".
    """
    loader = FileSystemLoader([TEMPLATES, more])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": figures.percent, "fixed": fixed, "svg": figures.svg}
    style, script = (
        "".join(loader.get_source(environment, file)[0] for file in files if file.endswith(kind))
        for kind in (".css", ".js")
    )
    allowed = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; {policy}"
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    template = environment.get_template(f"{name}.html")
    html = template.render(context, page=name, style=style, script=script, policy=allowed)
    return html.encode("utf-8", "replace").decode()  # a path may hold bytes that are not UTF-8


def compressed(value: Any) -> str:
    """Return base64 of gzip of JSON: characters that need no escaping anywhere in HTML."""
    return base64.b64encode(gzip.compress(as_json(value), compresslevel=6, mtime=0)).decode()


def as_json(value: Any) -> bytes:
    """Return JSON, of the digits that a page shows."""
    text = json.dumps(rounded(value), separators=(",", ":"), allow_nan=False)  # ASCII: lone surrogates pass too
    return text.encode("ascii")


def rounded(value: Any) -> Any:
    """Return the same with the three digits that a page shows, and None for what is not finite: JSON has no NaN."""
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def fixed(value: float | None, digits: int) -> str:
    """Return a number with so many decimals and with thousands separated."""
    return "none" if value is None else f"{round(value, digits) + 0.0:,.{digits}f}"  # not -0.00


def _hash(content: str) -> str:
    """What a Content-Security-Policy calls an inline script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
