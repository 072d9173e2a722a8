"""One run, and one server of it, for all tests of the page."""

import httpx2
import pytest
from live_runs import known_in, serving, write_run


@pytest.fixture(scope="session")
def live_run(tmp_path_factory):
    """The folder of a run, its model and its autoencoder."""
    folder = tmp_path_factory.mktemp("live") / "run"
    return folder, *write_run(folder)


@pytest.fixture(scope="session")
def known(live_run):
    return known_in(*live_run)


@pytest.fixture(scope="session")
def live(known):
    """A server: its address, its engine and what it knows."""
    with serving(known) as server:
        yield server


@pytest.fixture
def client(live):
    with httpx2.Client(base_url=live.address, timeout=20) as client:
        yield client
