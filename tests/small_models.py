"""Small random models, each as a mistral-inference and a Hugging Face folder of the same weights."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from mistral_sae.model.language_model import STANDIN, LanguageModel, Row, choose_token
from mistral_sae.model.params import shapes_of_params
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


def without_cache(model: LanguageModel, prompt_ids: list[int], max_tokens: int, row: Row | None = None) -> list[int]:
    """What `generate` gives, from a forward over all of the text for each token."""
    row, ids = row or Row.of(prompt_ids, 0.0, 0), list[int]()
    while len(ids) < max_tokens:
        id = choose_token(model.forward(torch.tensor([[*prompt_ids, *ids]]))[0, -1].cpu(), row)
        if id == model.tokenizer.eos_id:
            break
        ids.append(id)
    return ids


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
