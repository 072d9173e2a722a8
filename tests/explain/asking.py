"""What the client's tests share: requests, a server, and asking it."""

import asyncio
import json

import openai_server as fake

from mistral_sae.explain.client import Client
from mistral_sae.explain.journal import Budget
from mistral_sae.explain.server import Server
from mistral_sae.explain.types import Request

KEY = "sk-test-0123456789abcdef"
MODEL = "test-model"
SCHEMA = {"type": "object", "properties": {"description": {"type": "string"}}}
QUICK = {"timeout": 20.0, "deadline": 60.0}


def reply(messages):
    return f"about {messages[-1]['content']}"


def serve(fault=None, **settings):
    """A server that answers "first" whatever its faults are."""
    return fake.Server(reply, lambda asked: fault and asked.content != "first" and fault(asked), **settings)


def request(content, schema=SCHEMA, max_tokens=100):
    messages = [{"role": "system", "content": "Describe."}, {"role": "user", "content": content}]
    return Request(messages, schema, max_tokens)


def opened(server, journal, budget=None, **settings):
    """A client of a server, or of a URL."""
    url = server if isinstance(server, str) else server.url
    settings = {"model": MODEL, "base_url": url, "key": KEY} | QUICK | settings
    return Client(Server(**settings), journal, budget or Budget(journal))


def ask(server, journal, *requests, after_first=False, **settings):
    """The completions, or exceptions, of requests made at once (strings stand for `request`s), and the client.

    With `after_first` the server has completed a request before, which is not among them.
    """

    async def main():
        async with opened(server, journal, **settings) as client:
            if after_first:
                assert (await client.complete(request("first"))).status == "ok"
            made = [request(r) if isinstance(r, str) else r for r in requests]
            return await asyncio.gather(*map(client.complete, made), return_exceptions=True), client

    return asyncio.run(main())


def first(*faults):
    """A rule: the first attempts have these faults, the others none."""
    return lambda asked: faults[asked.attempt] if asked.attempt < len(faults) else None


def lines(journal):
    return [json.loads(line) for line in journal.path.read_text().splitlines()] if journal.path.exists() else []
