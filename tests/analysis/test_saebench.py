"""The figures of benchmarks.saebench on planted cases: a feature that is absorbed, in part, and not at all."""

import pytest
import torch

from benchmarks.saebench import absorption, accuracy
from mistral_sae.analysis.codes import Sparse
from mistral_sae.sae.autoencoder import SparseAutoencoder

D = 4
HALF = 0.5**0.5
ROWS = torch.tensor([[1.0, 0, 0, 0], [HALF, HALF, 0, 0], [0, 0, 1, 0]])  # the concept's, one that absorbs it, another


@pytest.mark.parametrize(
    ("values", "full", "part"),
    [
        ([1.0, 0.0, 1.0], 0.0, 0.0),  # the concept's own speaks
        ([0.0, 1.0, 0.0], 1.0, 1.0),  # another speaks for it
        ([0.5, HALF, 0.0], 0.0, 0.5),  # both, half and half
        ([0.0, 0.0, 1.0], 0.0, 0.0),  # none of them
    ],
)
def test_absorption_is_what_other_features_say_of_a_concept(values, full, part):
    sae = SparseAutoencoder(D, 3, 3).requires_grad_(False)
    sae.W_dec.copy_(ROWS)
    values_NK = torch.tensor([values])
    sae.b_dec.fill_(0.1)
    z_ND = values_NK @ ROWS + sae.b_dec
    code = Sparse(values_NK, torch.tensor([[0, 1, 2]]), 3)
    found = absorption(code, sae, z_ND, torch.tensor([0]), [0], torch.tensor([2.0, 0, 0, 0]))
    assert found == pytest.approx((full, part))


def test_accuracy_is_of_as_many_tokens_of_the_concept_as_others():
    labels = torch.tensor([[True], [False], [False], [False]])
    assert accuracy(labels.float() - 0.5, labels) == 1
    assert accuracy(torch.full((4, 1), -1.0), labels) == 0.5
