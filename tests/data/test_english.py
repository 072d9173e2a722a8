"""English prose from what is installed: what counts as prose, where it is found, and that it is collected once."""

import gzip
import json

import pytest

from mistral_sae.data import english
from mistral_sae.data.documents import check, documents, fingerprint, fits_in_memory

PROSE = "This is a sentence that one of us has written for the test, and it says what it is in plain words."


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with one package, one manual and one file of documentation; its cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    package, share = tmp_path / "packages", tmp_path / "share"
    monkeypatch.setattr(
        english.sysconfig, "get_path", lambda name: str(package if name == "purelib" else tmp_path / "lib")
    )
    monkeypatch.setattr(english, "SYSTEM", [share / "doc", share / "man"])
    monkeypatch.setattr(english, "_help_topics", lambda: iter(()))
    monkeypatch.setattr(english, "distributions", list)
    for path, text in {
        package / "thing/__init__.py": f'"""{PROSE}"""\n\n# {PROSE[:60]}\n# {PROSE[60:]}\nx = 1\n',
        package / "thing/nonsense.py": b"\xff\xfe",
        package / "thing/README.md": f"# Thing\n\n{PROSE.replace('sentence', 'paragraph')}\n\n    pip install thing\n",
        share / "doc/thing/notes.gz": gzip.compress(PROSE.replace("sentence", "note").encode()),
        share / "doc/thing/cut.gz": gzip.compress(PROSE.encode() * 9)[:60],
        share / "doc/thing/damaged.gz": gzip.compress(PROSE.encode())[:10] + b"\xff" * 60,
        share / "man/man1/thing.1": ".TH THING 1\n.SH NAME\n" + PROSE.replace("test", r"\fBmanual") + "\n.PP\n.B x\n",
        share / "man/de/man1/thing.1": PROSE.replace("sentence", "Satz"),
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "Too short to be a paragraph of the text.",
        "for i in range(10): x[i] = y[i] + z[i] * (a - b) / c; if x[i] > 0: print(x[i], y[i], z[i], a, b, c).",
        "Dies ist ein Satz, der auf Deutsch geschrieben wurde und deshalb nicht zu dem gehört, was hier gesucht wird.",
        "Parameters ---------- x : array of the values that are to be used in this and in all of the other functions.",
        PROSE.rstrip("."),
    ],
)
def test_what_is_no_english_prose_is_left_out(text):
    assert english.is_prose(PROSE)
    assert not english.is_prose(text)


def test_docstrings_comments_documentation_and_manuals_are_collected_and_each_paragraph_once(machine):
    found = {document.id: document.text for document in documents("english")}
    assert found == {
        "thing/README.md": PROSE.replace("sentence", "paragraph"),
        "thing/__init__.py": PROSE,
        "doc/thing/notes.gz": PROSE.replace("sentence", "note"),
        "man/man1/thing.1": PROSE.replace("test", "manual"),
    }


def test_it_is_collected_once_and_again_after_something_was_installed(machine, monkeypatch):
    file = english.english_file()
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [d.id for d in documents("english")]
    before, stamp = fingerprint("english"), file.stat().st_mtime_ns
    assert english.english_file().stat().st_mtime_ns == stamp
    assert fits_in_memory("english")
    assert check("english").startswith("English in the packages and manuals of this machine")

    monkeypatch.setattr(english.sysconfig, "get_python_version", lambda: "another")
    assert english.english_file() != file
    assert fingerprint("english") == before  # since the text is the same


def test_no_package_outweighs_the_others(machine, monkeypatch):
    monkeypatch.setattr(english, "MOST", 10)
    found = [document.id for document in documents("english")]
    assert found == ["thing/README.md", "doc/thing/notes.gz", "man/man1/thing.1"]
