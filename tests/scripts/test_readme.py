"""What the README shows works, and its tables are those of the results."""

import re
from pathlib import Path

import torch

from benchmarks import tables
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import Metadata, save_sae

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_notebook_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    section = README.read_text().split("## In a notebook")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    sae = SparseAutoencoder(256, 512, 8)
    sae.initialize(torch.randn(100, 256), seed=0)
    save_sae(
        tmp_path / "runs/standin/sae", sae, Metadata("standin", "blocks.2.hook_resid_post", 2, True, 256, "stdlib")
    )
    monkeypatch.chdir(tmp_path)

    names: dict = {}
    exec(code, names)

    assert names["x_hat"].shape == names["x"].shape
    torch.testing.assert_close(names["x_hat"], sae(names["x"]))
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == names["tokens"].shape[1] - 1
    assert "self" in printed


def test_the_tables_are_made_from_the_committed_results():
    text = README.read_text()
    assert tables.filled(text) == text, "run python -m benchmarks.tables"
