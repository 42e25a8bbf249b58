"""Built-in corpora: there is enough text in each, in a fixed order, without repeats."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest

from worldlm_ray.config.schema import DataConfig
from worldlm_ray.data import check_sources
from worldlm_ray.data.corpora import CORPORA, Corpus, _docstrings_of, evenly, without_repeats
from worldlm_ray.errors import ConfigError, DataError

LICENCE = "# Licensed to everyone who wants it, under terms that are long enough to count as a paragraph of text."


def normal(paragraph: str) -> str:
    return " ".join(paragraph.split())


@pytest.mark.parametrize("name", sorted(set(CORPORA) - {"docstrings"}))
def test_every_corpus_has_text_without_repeats(name: str) -> None:
    documents = list(CORPORA.get(name).documents())
    assert 200_000 < sum(len(document.encode()) for document in documents) <= 8_000_000
    paragraphs = [normal(p) for document in documents for p in document.split("\n\n")]
    long = [paragraph for paragraph in paragraphs if len(paragraph) > 80]
    assert len(long) == len(set(long))
    assert list(islice(CORPORA.get(name).documents(), 20)) == documents[:20]
    assert CORPORA.get(name).description
    assert name in CORPORA.get(name).versions()


def test_docstrings_are_prose_of_other_packages_than_the_standard_library() -> None:
    first = list(islice(CORPORA.get("docstrings").documents(), 30))
    assert sum(map(len, first)) > 10_000
    stdlib = {normal(p) for d in CORPORA.get("python_stdlib").documents() for p in d.split("\n\n")}
    shared = [p for d in first for p in d.split("\n\n") if len(normal(p)) > 80 and normal(p) in stdlib]
    assert shared == []


def test_docstrings_are_taken_in_order_and_without_indentation() -> None:
    words = "words that make this long enough to be counted as prose rather than a label " * 2
    source = f'"""Module {words}"""\nclass A:\n    """Class {words}\n\n    Indented."""\n    def f(self):\n'
    source += f'        """Method {words}"""\n        return "no docstring {words}"\n'
    source += 'def g():\n    """Short."""\n'
    found = _docstrings_of(source)
    assert [text.split()[0] for text in found] == ["Module", "Class", "Method"]
    assert found[1].endswith("\n\nIndented.")
    assert _docstrings_of("def (:") == []
    assert _docstrings_of('x = "\\d"') == []  # would be a warning, and here an error


def test_repeated_paragraphs_are_dropped() -> None:
    again = LICENCE.replace(" ", "  ").replace("long", "\n# long").replace("# long", "long")
    documents = [
        f"{LICENCE}\n\nx = 1\n\n\n    y = 2",
        f"{again}\n\nx = 1",
        LICENCE,
        f"{LICENCE} Not the same.",
    ]
    assert list(without_repeats(documents)) == [
        f"{LICENCE}\n\nx = 1\n\n    y = 2",
        "x = 1",
        f"{LICENCE} Not the same.",
    ]


def test_files_are_chosen_evenly() -> None:
    files = [(Path(str(index)), 10) for index in range(100)]
    chosen = [int(path.name) for path in evenly(files, 250)]
    assert len(chosen) == 25
    assert {b - a for a, b in pairwise(chosen)} == {4}
    assert evenly(files, 1000) == [path for path, _ in files]


def test_a_corpus_that_is_not_installed_is_an_error() -> None:
    empty = Corpus(name="none", description="nothing", read=lambda: iter([""]), packages=("not-there",))
    assert "not-there==absent" in empty.versions()
    with pytest.raises(DataError, match="none"):
        list(empty.documents())


def test_the_version_of_a_corpus_is_part_of_what_its_text_depends_on() -> None:
    one, other = (Corpus(name="c", description="c", read=lambda: iter([""]), version=v) for v in ("", "2"))
    assert other.versions() == f"{one.versions()} 2"


def test_an_unknown_corpus_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^data\.corpus: got 'python_stdlb'; did you mean 'python_stdlib'\?"):
        check_sources(DataConfig(corpus="python_stdlb"), "data")


def test_max_bytes_limits_a_corpus() -> None:
    corpus = Corpus(name="c", description="c", read=lambda: iter(["abcd", "efgh", "ijkl"]))
    assert list(corpus.documents(9)) == ["abcd", "efgh"]


def test_reading_a_corpus_imports_no_heavy_package() -> None:
    program = (
        "import sys\n"
        "from worldlm_ray.data import CORPORA\n"
        "next(CORPORA.get('cpp_headers').documents()); next(CORPORA.get('docstrings').documents())\n"
        "print([m for m in ('torch', 'ray', 'pandas', 'pyarrow', 'tokenizers') if m in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
