"""Who may talk to the server, and what its answers tell a browser to forbid."""

import json
import secrets
from collections.abc import Collection
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "mistral_sae_token"  # a name of its own: all servers of a host share their cookies
# The page has a policy for its own script and style; this holds for whatever else a browser is shown
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def json_of(value: Any, status: int = 200) -> Response:
    """A response of JSON; half a character, as a damaged text may have, is escaped in it."""
    return Response(json.dumps(value, allow_nan=False), status, media_type="application/json")


def error_of(status: int, message: str) -> dict[str, Any]:
    """An error in the form that OpenAI's clients read."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


def refused(status: int, message: str) -> Response:
    """The answer to a request that gets no other."""
    return json_of(error_of(status, message), status)


class Guard:
    """Lets through requests that name this server and come from its own page or from no page at all.

    Args:
        hosts: what a Host header may be, as "127.0.0.1:8000", so that no other name that leads here is answered; None
            is any, for which there has to be a token.
        token: what a request has to bring, as a bearer or in the cookie that an address with ?token= sets, if anything.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, token: str | None):
        self._app, self._hosts, self._token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        answer = self._refusal(scope) or self._app
        await answer(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and host not in self._hosts:
            return refused(403, f"found Host {host[:100]!r}: expected {' or '.join(sorted(self._hosts))}")
        if origin is not None and origin.partition("://")[2] != host:
            return refused(403, f"found a request of the page {origin[:100]}: expected one of this server's own")
        if self._token is None:
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if self._is_token(given) and scope["path"] == "/":
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, given, httponly=True, samesite="strict")
            return answer
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE)
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(bearer) or (cookie is not None and self._is_token(cookie)):
            return None
        return refused(401, "found no token: expected the address that demo.py printed, or the token as the API key")

    def _is_token(self, given: str) -> bool:
        return self._token is not None and secrets.compare_digest(given.encode(), self._token.encode())
