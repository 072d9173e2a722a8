"""Mutated files and arguments, for every reader: nothing but the project's own errors comes of them."""

from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.fuzz import READERS, tried, valid_files
from tools.mutate import mutated

SLOW = {"config.json, run", "GGUF", "tekken.json", "tokenizer.json", "arguments"}
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.large_base_example]


@pytest.mark.parametrize("name", READERS)
def test_a_reader_raises_nothing_but_the_projects_own_errors(tmp_path, name):
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    whole.mkdir()
    folder.mkdir()
    valid = valid_files(READERS[name], whole)

    @settings(max_examples=5 if name in SLOW else 40, deadline=None, database=None, suppress_health_check=CHECKS)
    @given(st.randoms(use_true_random=False))
    def outcome_of(random):
        assert tried(READERS[name], folder, valid, random) in ("read", "error")

    outcome_of()


@pytest.mark.parametrize("name", READERS)
def test_every_reader_reads_what_is_valid(tmp_path, name):
    valid_files(READERS[name], tmp_path)
    READERS[name].read(tmp_path)


@given(st.binary(min_size=1, max_size=200), st.integers(0, 100))
@settings(max_examples=50, deadline=None, database=None)
def test_a_mutation_is_made_again_from_its_seed(content, seed):
    assert mutated(content, Random(seed)) == mutated(content, Random(seed))


def test_a_bug_is_told_from_an_error_of_the_projects_own(tmp_path):
    def broken(folder: Path) -> None:
        raise KeyError("n_layers")

    reader = READERS["state"]._replace(read=broken)
    assert tried(reader, tmp_path, {"a": b"{}"}, Random(0)).startswith("KeyError at")
