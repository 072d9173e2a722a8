"""What the tests of explain.py share: a run on a small random model, what it leaves, and what a local server replies.

The server's replies are functions of the messages, so that a label says which prompt it is of.
"""

import json
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from mistral_sae.explain.labels import read_labels
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import Metadata, save_sae

ROOT = Path(__file__).parent.parent.parent
FEATURES = 64
CHOSEN = [3, 11, 17, 29, 40, 58]
SETTINGS = {
    "DEVICE": "cpu",
    "CONTEXT_LENGTH": 32,
    "HELD_OUT_FRACTION": 0.1,
    "EXPLAIN_TOKENS": 3100,
    "EXPLAIN_STRIDE": 1,
    "TOKENS_BEFORE": 8,
    "TOKENS_AFTER": 3,
    "ROWS_PER_FORWARD": 8,
    "SELECT": str(CHOSEN),
}
BAR = re.compile(r"((explaining|scoring|report): +)?\d+%\|")


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def problems(self):
        """What there is on the error stream besides progress bars."""
        pieces = [piece.strip() for piece in re.split(r"[\r\n]", self.err)]
        return [piece for piece in pieces if piece and not BAR.match(piece)]


def contents_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_refused(ran, said, code=2):
    assert ran.code == code
    assert len(ran.problems) == 1, ran.err
    assert ran.problems[0].startswith("error: ")
    assert said in ran.problems[0]
    assert "Traceback" not in ran.out


def write_sae(folder, d_model=32, layer=1, seed=0):
    """An autoencoder as it begins: random, and alive all over."""
    sae = SparseAutoencoder(d_model, FEATURES, 4)
    sae.initialize(torch.randn(256, d_model, generator=torch.Generator().manual_seed(seed)), seed)
    save_sae(folder, sae, Metadata("tiny", f"blocks.{layer}.hook_resid_post", layer, True, 32, None))
    return folder


def labels_of(run_dir):
    return list(read_labels(run_dir / "explanations.jsonl").values())


def journal_of(run_dir):
    return [json.loads(line) for line in (run_dir / "completions.jsonl").read_bytes().splitlines(keepends=False)]


def reply(messages):
    """An explanation that names its prompt, and verdicts by a rule of its own on each passage."""
    asked = messages[1]["content"]
    if '"pattern"' in asked:
        listed = " ".join(line for line in asked.splitlines() if line.startswith("   active: "))
        _, token = max((int(level), token) for token, level in re.findall(r'"((?:[^"\\]|\\.)*)" (\d+)', listed))
        return json.dumps({"pattern": "…", "explanation": f"{name_of(messages)}: the token {token.strip()}"})
    explanation = json.loads(re.search(r'of the feature: (".*")$', asked, re.MULTILINE)[1])
    token = explanation.split("the token ")[1].strip('" ')
    if "one token a line" in asked:
        positions = [int(n) for n, text in re.findall(r'^(\d+) "(.*)"$', asked, re.MULTILINE) if text.strip() == token]
        return json.dumps({"active": [{"position": n, "activation": 10} for n in positions]})
    passages = re.findall(r'^([a-z]{3}): "(.*)"$', asked, re.MULTILINE)
    held = [(id, f"«{token}" in text.replace("« ", "«") if "«" in text else token in text) for id, text in passages]
    return json.dumps({"answers": [{"id": id, "answer": answer} for id, answer in held]})


def name_of(messages):
    return f"prompt {zlib.crc32(messages[1]['content'].encode()):08x}"


def openai(server, **changed):
    """Settings of a run that asks the server."""
    url = server if isinstance(server, str) else server.url
    fixed = {"OPENAI_MODEL": "test-model", "REQUEST_TIMEOUT": 20, "CONCURRENCY": 8}
    fixed |= {"PROMPT_DOLLARS": 0.15, "COMPLETION_DOLLARS": 0.6}
    return {"OPENAI_BASE_URL": url, "SCORERS": "detection fuzzing simulation"} | fixed | changed
