"""What analyse.py leaves in analysis.json, as far as the report shows it."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from mistral_sae.files import SAEError
from mistral_sae.sae.autoencoder import SparseAutoencoder
from mistral_sae.sae.checkpoint import hash_of_sae
from mistral_sae.schema import Index, Schema, Words, read

FAINT = 0.03  # F1 below which a cell of the matrix is left empty
QUESTIONS = {  # by the names of their answers
    "monosemantic": "Do features stand for single concepts?",
    "superposed": "Are they in superposition?",
    "causal": "Does the model use them?",
}


class Answer(Schema):
    """An answer in words: yes, no or how far, with its number and its controls."""

    sentence: Words


class Concept(Schema):
    """A concept and the feature that tells it best."""

    concept: Words
    feature: Index


class Concepts(Answer):
    """Which features tell which concepts."""

    concepts: list[Concept]
    matrix: list[list[float]]  # F1 with which the feature of a column's concept tells a row's

    @model_validator(mode="after")
    def _is_square(self) -> "Concepts":
        size = len(self.concepts)
        if len(self.matrix) != size or any(len(row) != size for row in self.matrix):
            raise ValueError("a matrix of another size", "a row and a column for each concept")
        return self


class Answers(Schema):
    """The answers, and of what autoencoder they are."""

    autoencoder: str
    limits: Words
    monosemantic: Concepts
    superposed: Answer
    causal: Answer | None = None


def read_answers(path: Path, sae: SparseAutoencoder) -> Answers | None:
    """Return the answers in a file, if they are of this autoencoder. Raises SAEError for a damaged file."""
    found = read(Answers, path, "delete it or run analyse.py again", SAEError) if path.exists() else None
    return found if found and found.autoencoder == hash_of_sae(sae) else None


def shown(answers: Answers | None) -> dict[str, Any] | None:
    """Return what the template shows of answers; the concepts that a feature tells best come first."""
    if answers is None:
        return None
    asked = [(question, getattr(answers, name)) for name, question in QUESTIONS.items()]
    concepts, matrix = answers.monosemantic.concepts, answers.monosemantic.matrix
    order = sorted(range(len(concepts)), key=lambda i: -matrix[i][i])
    cells = [[(at, matrix[i][j]) for at, j in enumerate(order) if matrix[i][j] >= FAINT] for i in order]
    return {
        "sentences": [(question, answer.sentence) for question, answer in asked if answer],
        "limits": answers.limits,
        "rows": [{"concept": concepts[i].concept, "cells": row} for i, row in zip(order, cells, strict=True)],
        "features": [concepts[i].feature for i in order],
    }
