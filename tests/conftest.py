"""Small random models, each as a mistral-inference and a Hugging Face folder of the same weights; scripts run here."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import config
from mistral_sae.cli import override
from mistral_sae.model.folder import shapes_of_params
from mistral_sae.model.language_model import STANDIN
from tools.weights import to_hf

KINDS = ("gqa", "sliding_window", "moe")
WINDOW = 5  # shorter than the rows of the tests
PARAMS = {
    "dim": 32,
    "n_layers": 3,
    "head_dim": 8,
    "hidden_dim": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": 4096,
    "rope_theta": 10000.0,
}
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role') }}{% endif %}{% endfor %}"
)


class Folders(NamedTuple):
    mistral: Path
    hugging_face: Path

    def reference(self):
        """The model of the same weights in transformers, loaded without this project's code."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.hugging_face, dtype=torch.float32).eval()


def params_of(kind: str) -> dict:
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    extra = {"gqa": {}, "sliding_window": {"sliding_window": WINDOW}, "moe": {"moe": experts}}
    return PARAMS | extra[kind]


def random_weights(params: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes_of_params(params, None).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * shape[1] ** -0.5
    return weights


def write_mistral_folder(path: Path, params: dict, weights: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    (path / "params.json").write_text(json.dumps(params))
    save_file(weights, path / "consolidated.safetensors")
    shutil.copy(STANDIN / "tekken.json", path)
    return path


def write_hugging_face_folder(path: Path, params: dict, weights: dict[str, torch.Tensor]) -> Path:
    from transformers import MistralConfig, MixtralConfig

    path.mkdir(parents=True)
    sizes = {
        "vocab_size": params["vocab_size"],
        "hidden_size": params["dim"],
        "intermediate_size": params["hidden_dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "head_dim": params["head_dim"],
        "rms_norm_eps": params["norm_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": params["rope_theta"]},
        "sliding_window": params.get("sliding_window"),
    }
    if moe := params.get("moe"):
        config = MixtralConfig(
            **sizes, num_local_experts=moe["num_experts"], num_experts_per_tok=moe["num_experts_per_tok"]
        )
    else:
        config = MistralConfig(**sizes)
    config.architectures = ["MixtralForCausalLM" if moe else "MistralForCausalLM"]
    config.save_pretrained(path)
    save_file(to_hf(weights, params["head_dim"]), path / "model.safetensors", {"format": "pt"})
    write_byte_tokenizer(path)
    return path


def write_byte_tokenizer(path: Path) -> None:
    """A byte-level tokenizer with a chat template, as transformers stores one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[AddedToken(name, special=True) for name in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def f(x): return x + 1"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(path)


@pytest.fixture(scope="session", params=KINDS)
def folders(request, tmp_path_factory) -> Folders:
    """One random model of each kind: dense with grouped queries, sliding window, mixture of experts."""
    root = tmp_path_factory.mktemp(request.param)
    params = params_of(request.param)
    weights = random_weights(params)
    return Folders(
        write_mistral_folder(root / "mistral", params, weights),
        write_hugging_face_folder(root / "hugging_face", params, weights),
    )


@pytest.fixture(scope="session")
def mistral_folder(tmp_path_factory) -> Path:
    """A small random dense model in mistral-inference's layout."""
    root = tmp_path_factory.mktemp("dense")
    return write_mistral_folder(root / "tiny", PARAMS, random_weights(PARAMS))


@pytest.fixture(scope="session")
def hugging_face_folder(tmp_path_factory) -> Path:
    """A small random dense model in Hugging Face's layout, of the weights of `mistral_folder`."""
    root = tmp_path_factory.mktemp("dense")
    return write_hugging_face_folder(root / "tiny-hf", PARAMS, random_weights(PARAMS))


@pytest.fixture
def tokens_BT() -> torch.Tensor:
    return torch.randint(20, 4096, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script of the repository in this process, which spares it the imports: exit code, output, error stream."""
    root = Path(__file__).parent.parent
    monkeypatch.chdir(root)
    for name in ("MISTRAL_MODEL_PATH", "OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which it replaces

    def run(script: str, arguments: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    yield run
    override([], config)


@pytest.fixture
def journal(tmp_path):
    """An empty journal of completions."""
    from mistral_sae.explain.journal import Journal

    return Journal(tmp_path / "completions.jsonl")


@pytest.fixture
def quick_retries(monkeypatch):
    """Shorten the pauses before requests are sent again."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("mistral_sae.explain.client.PAUSE", 0.05)
