"""A run on the Hugging Face hub: its autoencoders, each in a folder of its own, with a model card."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mistral_sae.cli import Failed, UserError, one_line
from mistral_sae.files import SAEError
from mistral_sae.sae.cfg import CFG, WEIGHTS, Description, read_cfg
from mistral_sae.sae.checkpoint import SPARSITY
from mistral_sae.sae.resume import read_evaluation, read_points

ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
TEMPLATE = Path(__file__).with_name("card.md")
TAGS = ["saelens", "sparse-autoencoder", "mechanistic-interpretability", "mistral-sae"]  # the first is SAE Lens's
BESIDE = ("evaluation.json", "training.png", "explanations.jsonl")  # what of a run is shown and may be wanted


class Member(NamedTuple):
    """An autoencoder that is shared."""

    name: str  # of its folder on the hub
    folder: Path  # that holds it here
    described: Description
    figures: Mapping[str, Any]  # evaluation.json


def members_of(run_dir: Path) -> list[Member]:
    """The autoencoders of a RUN_DIR, one or those of a grid. Raises SAEError where there is none."""
    folders = {point.name: run_dir / point.name for point in read_points(run_dir) if not point.stopped} or {"": run_dir}
    found = []
    for name, folder in folders.items():
        described = read_cfg(folder / "sae", {}, None)
        if not (folder / "sae" / WEIGHTS).is_file():
            raise SAEError(f"found no {WEIGHTS} in {folder / 'sae'}, expected a finished run: go on with train.py")
        hook = described.metadata.hook_name or "sae"
        found.append(Member(name or hook, folder, described, read_evaluation(folder)))
    return found


def files_of(members: Sequence[Member]) -> dict[str, Path]:
    """What is sent, by its path on the hub."""
    found: dict[str, Path] = {}
    for member in members:
        paths = [*(member.folder / "sae" / name for name in (CFG, WEIGHTS, SPARSITY))]
        paths += [member.folder / name for name in BESIDE]
        found |= {f"{member.name}/{path.name}": path for path in paths if path.is_file()}
    return found


def card(repository: str, members: Sequence[Member], model: str | None) -> str:
    """The model card; `model` is what `load_model` takes for the model that they were trained on."""
    from huggingface_hub import ModelCard, ModelCardData

    described = members[0].described
    base, _, revision = (model or "").partition("@")
    is_on_hub = ON_HUB.fullmatch(base) and not Path(base).exists()
    name = base if is_on_hub else described.metadata.model_name or "a model without a name"
    text = described.metadata.dataset_path or "unknown text"
    data_set = re.split("[:@]", text)[0]  # without its configuration or revision
    data = ModelCardData(
        base_model=base if is_on_hub else None,
        library_name="saelens",
        tags=TAGS,
        datasets=[data_set] if ON_HUB.fullmatch(data_set) and not Path(data_set).exists() else None,
    )
    made = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=repository.rpartition("/")[2],
        members=members,
        model=name,
        revision=revision if is_on_hub else "",
        text=text,
        table=_table(members),
        normalize=described.normalize,
        repository=repository,
        first=members[0].name,
        load=model if is_on_hub or model is None else f"the folder of {name}",
        pictures=[f"{each.name}/training.png" for each in members if (each.folder / "training.png").is_file()],
    )
    return str(made).rstrip() + "\n"


def _table(members: Sequence[Member]) -> str:
    """Sizes and held-out figures, a row an autoencoder; what was not measured is left open."""
    columns = {
        "normalized MSE": ("normalized_mse", ".3f"),
        "active features a token": ("l0", ".1f"),
        "cross-entropy recovered": ("ce_loss_recovered", ".1%"),
        "dead features": ("dead_fraction", ".1%"),
        "held-out tokens": ("tokens", ",.0f"),
    }
    head = ["folder", "layer", "width", "features", "activation", *columns]
    rows = [head, ["---", *["---:"] * 3, "---", *["---:"] * len(columns)]]
    for name, _, each, figures in members:
        kind = f"topk, K={each.k}" if each.activation == "topk" else each.activation
        row = [f"`{name}`", str(each.metadata.residual_layer), f"{each.d_model:,}", f"{each.n_features:,}", kind]
        row += [format(figures[key], form) if key in figures else "" for key, form in columns.values()]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def push(repository: str, files: Mapping[str, Path], readme: str) -> str:
    """Send files and a card in one commit, and return its address; a new repository is private. Raises Failed."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    adds = [CommitOperationAdd("README.md", readme.encode()), *(CommitOperationAdd(n, p) for n, p in files.items())]
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return api.create_commit(repository, adds, commit_message="Autoencoders trained with mistral-sae").commit_url
    except (HTTPError, OSError, ValueError) as error:
        raise Failed(
            f"could not push to {repository} on the Hugging Face hub ({one_line(error)}), expected a repository that "
            "you may write: log in with a token that may (hf auth login, or HF_TOKEN)"
        ) from None


def check_repository(name: str) -> None:
    """Raise UserError unless a text can be a repository's name."""
    if not ON_HUB.fullmatch(name):
        raise UserError(f"PUSH_TO is {name!r}: expected owner/name, of the Hugging Face hub")
