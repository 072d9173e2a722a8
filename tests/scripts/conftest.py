"""Runs of explain.py for all files of its tests; those of other scripts have their own by the same names."""

import json
import keyword
import random
import shutil

import pytest
from explain_runs import SETTINGS, Ran, openai, reply, write_sae
from forks import Fork, in_a_new_process
from openai_server import Server


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 120 documents of some words that come again and again: lines of JSON, and a text file."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    documents = [" ".join(chance.choices(keyword.kwlist, k=60)) for _ in range(120)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    (folder / "b.txt").write_text("A plain text. " * 20)
    return folder


@pytest.fixture(scope="session")
def arguments(mistral_folder, corpus):
    """NAME=value of a run of a second, changed by keywords."""

    def of(run_dir, **changed):
        constants = {"MISTRAL_MODEL_PATH": mistral_folder, "DATA_PATH": corpus, "RUN_DIR": run_dir}
        return [f"{name}={value}" for name, value in (constants | SETTINGS | changed).items()]

    return of


@pytest.fixture
def here(run_script, quick_retries):
    """Run explain.py in this process."""
    return lambda arguments: Ran(*run_script("explain.py", arguments))


@pytest.fixture(scope="session")
def finished(arguments, tmp_path_factory):
    """The folder and the output of an offline run."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    write_sae(run_dir / "sae")
    return run_dir, Ran(*in_a_new_process("explain", arguments(run_dir)))


@pytest.fixture
def run_dir(finished, tmp_path):
    """A folder with the autoencoder and the examples of the finished run, and no labels."""
    folder = shutil.copytree(finished[0], tmp_path / "run")
    (folder / "explanations.jsonl").unlink()
    (folder / "report.html").unlink()
    return folder


@pytest.fixture(scope="session")
def served(finished, arguments, tmp_path_factory):
    """The folder, the output and the number of requests of a run against a server without faults."""
    folder = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(finished[0], folder)
    with Server(reply) as server:
        ran = Ran(*Fork("explain", arguments(folder, **openai(server))).ended())
    return folder, ran, len(server.log)
