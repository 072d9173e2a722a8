"""A text to train on."""

import pytest


@pytest.fixture
def text(tmp_path):
    """A folder of sixty short files."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        words = " ".join(f"def f{number}_{i}(x): return x + {i * number}" for i in range(12))
        (folder / f"{number}.txt").write_text(words)
    return folder
