"""The server: the page, its requests and OpenAI's, each answered by a job of one engine."""

import json
import os
import secrets
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route

from mistral_sae.cli import Failed, UserError, is_out_of_memory, one_line
from mistral_sae.explain import pages
from mistral_sae.live import api, asked, looking, writing
from mistral_sae.live.engine import Busy, Engine
from mistral_sae.live.guard import Guard, error_of, json_of, refused
from mistral_sae.live.known import Known
from mistral_sae.schema import parse

LOOPBACK, EVERYWHERE = ("127.0.0.1", "localhost", "::1"), ("0.0.0.0", "::")
FILES = ("report.css", "live.css", "page.js", "features.js", "tokens.js", "live.js", "steer.js")

K = TypeVar("K", bound=asked.Schema)
Handler = Callable[[Request], Awaitable[Response]]
Reply = Callable[[Request, Iterator[Any]], Awaitable[Response]]


def serve(known: Known, host: str, port: int) -> None:
    """Answer at an address of this machine until Ctrl-C. Raises Failed for a port that is not free.

    Where others can reach the address there is a token, which is printed.
    """
    listening = listen(host, port)
    port, is_local = listening.getsockname()[1], host in LOOPBACK
    token = None if is_local else secrets.token_urlsafe(24)
    named = socket.gethostname() if host in EVERYWHERE else f"[{host}]" if ":" in host else host
    address = f"http://{named}:{port}"
    print(f"page      {address}/{f'?token={token}' if token else ''}")
    print(f"API       {address}/v1, {f'its key is {token}' if token else 'any key'}; Ctrl-C ends it")
    engine = Engine()
    engine.prepare(looking.page(known, 0))
    edit = asked.Steer(features={"0": 0}, method="add")
    engine.prepare(writing.write(known, asked.Writing(prompt=".", steer=edit, max_tokens=1)))
    app = make_app(known, engine, hosts_of(port) if is_local else None, token)
    try:
        server_of(app).run([listening])
    finally:
        engine.close()


def server_of(app: Starlette) -> uvicorn.Server:
    """What runs the application; it does not print the errors that `status_of` prints."""
    return uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address of this machine; port 0 is any that is free. Raises Failed for one that is not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise Failed(f"cannot listen on {host}, port {port} ({why}): set another PORT or HOST") from None


def hosts_of(port: int) -> set[str]:
    """The Host headers of requests from this machine."""
    names = ("127.0.0.1", "localhost", "[::1]")
    return {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())  # which browsers leave out


def make_app(known: Known, engine: Engine, hosts: set[str] | None, token: str | None) -> Starlette:
    """The application; `hosts` and `token` as Guard has them."""
    html, listed = page_of(known), pages.as_json(known.listed)
    models = {"object": "list", "data": [{"id": known.name, "object": "model", "owned_by": "local"}]}
    gets: dict[str, Callable[[Request], Any]] = {
        "/": lambda _: HTMLResponse(html),
        "/features": lambda _: Response(listed, media_type="application/json"),
        "/features/{feature:int}": feature_of,
        "/v1/models": lambda _: json_of(models),
    }
    routes = [Route(path, handler) for path, handler in gets.items()]
    routes += [Route(path, handler, methods=["POST"]) for path, handler in POSTS.items()]
    errors: Any = dict.fromkeys((HTTPException, UserError, RuntimeError, MemoryError, Exception), answer_error)
    guard = Middleware(Guard, hosts=hosts, token=token)
    app = Starlette(routes=routes, middleware=[guard], exception_handlers=errors)
    app.state.known, app.state.engine = known, engine
    return app


def page_of(known: Known) -> str:
    """The page, which fetches from this server and from nowhere else."""
    layer, n_features = known.subject.loaded.metadata.residual_layer, known.subject.loaded.sae.n_features
    context = {"model": known.name, "layer": layer, "shown": n_features}
    context |= {"form": known.form, "is_instruct": known.is_instruct}
    folder = Path(__file__).parent / "templates"
    return pages.render("live", FILES, context, folder, "connect-src 'self'; ")


# ---- requests and answers ----


async def body(request: Request, kind: type[K]) -> K:
    """The body of a request, of at most asked.BODY bytes, as a type. Raises HTTPException and UserError."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected a body of Content-Type: application/json")
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > asked.BODY:
            raise HTTPException(413, f"found a body of more than {asked.BODY:,} bytes, expected less")
    return parse(kind, bytes(content), "the request", "correct it")


async def last(request: Request, job: Iterator[Any]) -> Response:
    """The last item of a job as JSON; a job whose asker is gone is given up."""
    found = None
    async with aclosing(request.app.state.engine.stream(job)) as items:
        async for item in items:
            found = item
            if await request.is_disconnected():
                break
    return json_of(found)


async def events(request: Request, job: Iterator[Any], end: str = "") -> Response:
    """The items of a job as server-sent events; what its first step raises is raised here."""
    items = request.app.state.engine.stream(job)
    first = await anext(items)

    async def lines() -> AsyncIterator[str]:
        async with aclosing(items):
            try:
                yield event_of(first)
                async for item in items:
                    yield event_of(item)
                yield end
            except Exception as error:
                yield event_of(error_of(*status_of(error)))

    return StreamingResponse(lines(), media_type="text/event-stream")


def event_of(item: Any) -> str:
    """Server-sent events of an item, or of each item of a list."""
    some = item if isinstance(item, list) else [item]
    return "".join(f"data: {json.dumps(each)}\n\n" for each in some)


def status_of(error: Exception) -> tuple[int, str]:
    """The status and the line that an error is answered with."""
    match error:
        case HTTPException():
            return error.status_code, error.detail
        case Busy():
            return 429, str(error)
        case UserError():
            return 400, str(error)
    if is_out_of_memory(error):
        return 503, "the device is out of memory for this request: ask for less"
    traceback.print_exception(error)  # a fault of ours, for whoever runs the server
    return 500, f"{type(error).__name__}: {one_line(error)}"


async def answer_error(request: Request, error: Exception) -> Response:
    """The answer to a request that failed."""
    return refused(*status_of(error))


# ---- what is answered ----


async def feature_of(request: Request) -> Response:
    """What the page of a feature shows."""
    known, wanted = request.app.state.known, request.path_params["feature"]
    if wanted >= (n := known.subject.loaded.sae.n_features):
        raise HTTPException(404, f"found feature {wanted}: expected 0 to {n - 1}")
    return await last(request, looking.page(known, wanted))


def answered(kind: type[K], job: Callable[[Known, K], Iterator[Any]], by: Reply) -> Handler:
    """The handler that answers with a job's last item (`last`), or with its items as they come (`events`)."""

    async def handler(request: Request) -> Response:
        return await by(request, job(request.app.state.known, await body(request, kind)))

    return handler


def completed(kind: type[K], answer_of: Callable[[Known, K], api.Answer]) -> Handler:
    """The handler that answers as OpenAI's server does."""

    async def handler(request: Request) -> Response:
        answer = answer_of(request.app.state.known, await body(request, kind))
        if answer.wanted.stream:
            return await events(request, answer.chunks(), end="data: [DONE]\n\n")
        return await last(request, answer.whole())

    return handler


POSTS = {
    "/activations": answered(asked.Reading, looking.read, last),
    "/effects": answered(asked.Effect, looking.effect, last),
    "/texts": answered(asked.Writing, writing.write, events),
    "/sweep": answered(asked.Sweep, looking.strengths, events),
    "/v1/completions": completed(asked.Completion, api.completion),
    "/v1/chat/completions": completed(asked.Chat, api.chat),
}
