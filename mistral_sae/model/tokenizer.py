"""A model's own tokenizer, through mistral-common or transformers. Text in, token ids out, and back."""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mistral_sae.cli import one_line
from mistral_sae.files import hash_of
from mistral_sae.model.folder import CONFIG, ModelFolder
from mistral_sae.model.source import ModelError, quiet_transformers

LONGEST_TOKEN = 1000  # characters that are shown and sent; those of real vocabularies have some hundred at most


class Tokenizer(ABC):
    """What both kinds of tokenizer have; `load_tokenizer` makes one.

    A sentencepiece tokenizer (tokenizer.model.*, or the Hugging Face form of one) puts one space before a text: its
    first token's bytes begin with a space that the text does not have, and `decode` takes it away again.
    """

    bos_id: int
    eos_id: int
    pad_id: int | None
    vocab_size: int  # ids, those of special tokens included

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids without BOS and EOS; what looks like a special token is encoded as the text it is."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of token ids without special tokens; bytes that are not UTF-8 become U+FFFD."""

    def decode_continuation(self, prompt_ids: list[int], ids: list[int]) -> str:
        """The text of token ids that continue a prompt; alone, `decode` would take their first space away."""
        return self.decode([*prompt_ids, *ids])[len(self.decode(prompt_ids)) :]

    def special_ids(self, more: Sequence[int | str] = ()) -> list[int]:
        """Ids of BOS, EOS and padding, and of `more` tokens, ids or names. Raises ModelError for what is no token."""
        ids = {id for id in (self.bos_id, self.eos_id, self.pad_id) if id is not None and id >= 0}
        return sorted(ids | {self._id_of(token) for token in more})

    def _id_of(self, token: int | str) -> int:
        if isinstance(token, int):
            self.token_bytes(token)
            return token
        name = token.encode()
        for id in range(self.vocab_size):
            if self.token_bytes(id) == name:
                return id
        raise ModelError(f"the tokenizer has no token {token!r}: expected one such as '</s>', or an id")

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, which join to the text's; a special token's name. Raises ModelError."""
        if not 0 <= id < self.vocab_size:
            raise ModelError(f"found token id {id}: expected 0 to {self.vocab_size - 1}, the tokenizer's vocabulary")
        return self._token_bytes(id)

    def fingerprint(self) -> str:
        """A hash of the bytes of all tokens."""
        return hash_of([self.token_bytes(id) for id in range(self.vocab_size)], {})[:16]

    def strings(self, ids: list[int]) -> list[str]:
        """The text of each token, which join to the text of all; special tokens by their names."""
        return texts_of(map(self.token_bytes, ids))

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids, BOS included, of {"role", "content"} messages in the model's own chat format.

        After a user's message they are the prompt of a reply, after an assistant's a whole conversation. Raises
        ModelError if the tokenizer has no such format or refuses the messages.
        """
        try:
            return self._chat(messages)
        except Exception as error:  # each library has its own kinds, jinja2's and pydantic's among them
            raise ModelError(f"this tokenizer's chat format does not take these messages: {one_line(error)}") from error

    @abstractmethod
    def _token_bytes(self, id: int) -> bytes: ...

    @abstractmethod
    def _chat(self, messages: list[dict[str, str]]) -> list[int]: ...


def texts_of(pieces: Iterable[bytes]) -> list[str]:
    """The text of each token's bytes.

    A character whose bytes are spread over several tokens belongs to the last of them, the others are empty; bytes that
    are not UTF-8 become U+FFFD. Of a token longer than LONGEST_TOKEN only the beginning is given.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(piece) for piece in pieces]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return [text if len(text) <= LONGEST_TOKEN else text[:LONGEST_TOKEN] + "…" for text in texts]


def load_tokenizer(folder: ModelFolder) -> Tokenizer:
    """The tokenizer in a model's folder. Raises ModelError where it is missing, broken or another model's."""
    try:
        tokenizer = _read(folder.path, folder.described_by == CONFIG)
        tokenizer.decode(tokenizer.encode("what cannot be used fails here, and not in the middle of a run"))
    except ModelError:
        raise
    except Exception as error:  # json, sentencepiece and tokenizers each raise their own
        raise ModelError(f"the tokenizer in {folder.path} cannot be read ({one_line(error)}): get it again") from error
    if (n_ids := tokenizer.vocab_size) > (rows := folder.spec.vocab_size):
        expected = f"expected at most {rows - 1}, as the embedding has {rows} rows"
        raise ModelError(
            f"the tokenizer in {folder.path} has ids up to {n_ids - 1}: {expected}; "
            "take the one that the model was trained with, or the model that these tokens were added to"
        )
    return tokenizer


def _read(path: Path, hugging_face: bool) -> Tokenizer:
    if hugging_face and (path / "tokenizer.json").is_file():
        return _from_transformers(path)
    mistral = [*path.glob("tekken.json"), *sorted(path.glob("tokenizer.model.v*"), reverse=True)]
    if mistral := [*mistral, *path.glob("tokenizer.model")]:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        return _MistralCommon(MistralTokenizer.from_file(str(mistral[0])))
    wanted = "tokenizer.json" if hugging_face else "tekken.json or tokenizer.model.v3"
    raise ModelError(f"{path} has no tokenizer: expected {wanted} beside the weights")


def _from_transformers(path: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    options = {"fix_mistral_regex": True} if _splits_otherwise(path / "tokenizer.json") else {}
    with quiet_transformers():
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, **options)
    wraps = type(tokenizer).__name__ == "MistralCommonBackend"  # a tokenizer of mistral-common
    return _MistralCommon(tokenizer.tokenizer) if wraps else _Transformers(tokenizer)


def _splits_otherwise(path: Path) -> bool:
    """Whether a tokenizer.json splits text by tiktoken's pattern, which transformers gave Mistral's tekken too once."""
    pre_tokenizer = json.loads(path.read_text(encoding="utf-8")).get("pre_tokenizer") or {}
    first = (pre_tokenizer.get("pretokenizers") or [pre_tokenizer])[0]
    return first.get("type") == "Split" and first["pattern"].get("Regex", "").startswith("(?i:'s|'t|")


class _MistralCommon(Tokenizer):
    def __init__(self, tokenizer: Any):
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        self._instruct = tokenizer
        self._base = tokenizer.instruct_tokenizer.tokenizer
        self._is_tekken = isinstance(self._base, Tekkenizer)
        self._policy = SpecialTokenPolicy
        self.bos_id, self.eos_id, self.vocab_size = self._base.bos_id, self._base.eos_id, self._base.n_words
        self.pad_id = self._base.pad_id

    def encode(self, text: str) -> list[int]:
        return self._base.encode(text, bos=False, eos=False)

    def decode(self, ids: list[int]) -> str:
        return self._base.decode(ids, special_token_policy=self._policy.IGNORE)

    def _token_bytes(self, id: int) -> bytes:
        if self._is_tekken:
            return self._base.id_to_byte_piece(id, self._policy.KEEP)
        piece = self._base.id_to_piece(id)
        return piece.encode() if self._base.is_special(id) else _sentencepiece_bytes(piece)

    def _chat(self, messages: list[dict[str, str]]) -> list[int]:
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        request: Any = ChatCompletionRequest.model_validate({"messages": messages})
        instruct = self._of_whole_conversations if messages[-1]["role"] == "assistant" else self._instruct
        return instruct.encode_chat_completion(request).tokens

    @cached_property
    def _of_whole_conversations(self) -> Any:
        from mistral_common.protocol.instruct.validator import ValidationMode

        return type(self._instruct).from_file(self._base.file_path, mode=ValidationMode.finetuning)


class _Transformers(Tokenizer):
    def __init__(self, tokenizer: Any):
        self._hf = tokenizer
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.pad_id = tokenizer.pad_token_id
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        if self.bos_id is None or self.eos_id is None:
            raise ValueError("it names no BOS or no EOS token")
        added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        self._names = {id: tokenizer.convert_ids_to_tokens(id) for id in tokenizer.all_special_ids} | added
        self._bytes_of: dict[str, int] | None = None
        if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
            from transformers.convert_slow_tokenizer import bytes_to_unicode

            self._bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def encode(self, text: str) -> list[int]:
        return self._hf(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self._hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _token_bytes(self, id: int) -> bytes:
        if id in self._names:
            return self._names[id].encode()
        piece = self._hf.convert_ids_to_tokens(id)
        if self._bytes_of is None:
            return _sentencepiece_bytes(piece)
        return bytes(self._bytes_of[character] for character in piece)

    def _chat(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._hf.chat_template:
            raise ValueError("it has no chat template; use an instruct model")
        is_prompt = messages[-1]["role"] != "assistant"
        return self._hf.apply_chat_template(messages, add_generation_prompt=is_prompt, return_dict=False)


def _sentencepiece_bytes(piece: str) -> bytes:
    """A byte piece like <0x0A>, or text with U+2581 for spaces."""
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(match[1], 16)])
    return piece.replace("\u2581", " ").encode()
