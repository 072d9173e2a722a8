"""What a result has to say about where it comes from, and how results are written."""

import datetime
import json
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "sae-lens",
    "eai-sparsify",
    "dictionary-learning",
    "sae-bench",
    "transformers",
    "mistral-inference",
)


def describe() -> dict[str, Any]:
    """Processor or GPU, threads, versions, date and command."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "date": datetime.date.today().isoformat(),
        "command": _model() + shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def save(name: str, results: Any) -> None:
    """Write `results` and what `describe` says to results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(describe() | {"results": results}, indent=1) + "\n")
    print(f"written to {path.relative_to(RESULTS.parent.parent)}")


def peak_megabytes() -> float:
    """What this process needed at most until now; Linux alone tells (getrusage counts the parent's, too)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _model() -> str:
    """The one variable of the environment that changes what is measured, as a shell sets it, or nothing."""
    value = os.environ.get("MISTRAL_MODEL_PATH")
    return f"MISTRAL_MODEL_PATH={shlex.quote(value)} " if value else ""


def _processor() -> str:
    """The processor's name and what of it matters here."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    family = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    return f"{fields.get('model name', platform.machine())} ({family}; {', '.join(known)})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
