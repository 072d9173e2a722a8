"""The text that the questions are asked of."""

import pytest

from mistral_sae.analysis import sample
from mistral_sae.analysis.concepts import Labelled
from mistral_sae.cli import UserError
from mistral_sae.data.documents import Document, Skipped
from mistral_sae.model.language_model import load_model

DOCUMENTS = [Labelled(Document(f"{i}.py", "x = 1\n" * 20), {"number": [(4, 5)]}) for i in range(20)]


def test_a_document_whose_tokens_do_not_join_to_its_text_is_left_out_and_counted(mistral_folder, monkeypatch):
    lm, labels_of, odd = load_model(mistral_folder, device="cpu"), sample.token_labels, {"3.py"}
    monkeypatch.setattr(
        sample, "token_labels", lambda each, *of: None if each.document.id in odd else labels_of(each, *of)
    )
    skipped = Skipped()
    texts = sample.read_texts(DOCUMENTS, ["number"], lm, 16, 1000, 4, skipped)
    assert set(texts.documents) == {each.document.id for each in DOCUMENTS} - odd
    assert skipped.summary() == "skipped 1 record: 3.py: its tokens do not join to its text"
    odd |= set(texts.documents)
    with pytest.raises(UserError, match=r"not one row of labelled text .*do not join to its text"):
        sample.read_texts(DOCUMENTS, ["number"], lm, 16, 1000, 4, Skipped())
