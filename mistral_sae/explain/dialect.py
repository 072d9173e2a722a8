"""How one OpenAI-compatible server wants to be asked: which format, which name for the length, which sampling."""

import re
from typing import Any

from mistral_sae.explain.prompts import fold_system
from mistral_sae.explain.replies import FORMAT, SYSTEM_ROLE
from mistral_sae.explain.types import Request

FORMATS = ("json_schema", "json_object", "text")  # each is tried once the server has rejected the one before


class Dialect:
    """What a server takes, found out from what it rejects.

    Attributes:
        sampling: the fields of the body that it is sent besides, such as temperature.
        notes: what was changed for it, a line each, for the run's user.
    """

    def __init__(self, model: str, sampling: dict[str, Any]):
        self.sampling = dict(sampling)
        self.notes: list[str] = []
        self._model = model
        self._format = 0  # into FORMATS
        self._length = "max_tokens"
        self._has_system_role = True
        self._proven: set[str] = set()  # formats that were part of a completed request

    def body(self, request: Request, max_tokens: int) -> dict[str, Any]:
        """The arguments of `chat.completions.create`."""
        body = {
            "model": self._model,
            "messages": request.messages if self._has_system_role else fold_system(request.messages),
            self._length: max_tokens,
            "stream": False,  # which some servers do unless told
            "extra_body": dict(self.sampling),
        }
        if request.schema is not None and FORMATS[self._format] == "json_schema":
            schema = {"name": "reply", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif request.schema is not None and FORMATS[self._format] == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body

    def accepted(self, sent: dict[str, Any]) -> None:
        """Note that a body was answered: where another in its format is rejected, the format is not the reason."""
        if "response_format" in sent:
            self._proven.add(sent["response_format"]["type"])

    def adapt(self, sent: dict[str, Any], words: str) -> bool:
        """Whether a body that was rejected with these words is worth sending anew, as `body` makes it from now on.

        Of many requests that are rejected together the first makes the change, and the others follow it.
        """
        if "max_tokens" in sent and "max_completion_tokens" in words:
            if self._length == "max_tokens":
                self._length = "max_completion_tokens"
                self.notes.append("the server takes max_completion_tokens, not max_tokens")
            return True
        for name in sent["extra_body"]:
            if re.search(rf"\b{re.escape(name)}\b", words):
                if self.sampling.pop(name, None) is not None:
                    self.notes.append(f"the server does not take {name}: it uses its own")
                return True
        if sent["messages"][0]["role"] == "system" and SYSTEM_ROLE.search(words):
            if self._has_system_role:
                self._has_system_role = False
                self.notes.append("the server takes no system message: its text begins the first of the user's")
            return True
        if "response_format" in sent:
            rejected = FORMATS.index(sent["response_format"]["type"])
            if FORMATS[rejected] in self._proven and not FORMAT.search(words):
                return False
            if self._format == rejected:
                self._format += 1
                self.notes.append(f"the server does not take {FORMATS[rejected]}: asking for {FORMATS[rejected + 1]}")
            return True
        return False
