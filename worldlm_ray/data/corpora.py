"""Corpora by name: real text that every installation of this package already holds.

Nothing is downloaded. The corpora differ in kind (code of two languages, manuals, advertisements of packages,
docstrings, law), as federations by language or domain need them. Each is small and deterministic for given
versions of Python and the packages. Repeated paragraphs are dropped: otherwise licence headers would be
in both the training and the held-out part.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata, util
from os import walk
from pathlib import Path

from worldlm_ray.config import names
from worldlm_ray.config.registry import Registry
from worldlm_ray.errors import DataError

MAX_BYTES = 8_000_000
"""Largest size of a corpus, in bytes of UTF-8."""
MIN_PARAGRAPH_CHARS = 80
"""Shorter paragraphs may repeat: they are idioms, not copies."""
MAX_FILE_BYTES = 256_000
"""Larger source files are mostly generated tables."""
DOCSTRING_SOURCE_BYTES = 18_000_000
"""Bytes of Python source that the docstrings come from. Parsing it takes two to three seconds."""

_DOCUMENTED = ("torch", "numpy", "ray", "scipy", "pandas", "matplotlib", "networkx", "sympy")
_TESTS = {"test", "tests", "testing", "idle_test", "_test", "thirdparty_files", "_vendor", "__pycache__"}
_NOT_STDLIB = {
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "encodings",
    "turtledemo",
}
_GAP = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus that a configuration names."""

    name: str
    description: str
    """One line."""
    read: Callable[[], Iterator[str]]
    """Raw documents in a fixed order, repeats included."""
    packages: tuple[str, ...] | None = ()
    """Distributions that the text comes from, in addition to Python. None stands for all that are installed."""
    version: str = ""
    """What else the text depends on."""

    def documents(self, max_bytes: int = MAX_BYTES) -> Iterator[str]:
        """The documents in a fixed order, without repeated paragraphs.

        Args:
            max_bytes: of UTF-8. Documents end before the one that would exceed it.

        Raises:
            DataError: this installation does not hold the text.
        """
        total = 0
        for document in without_repeats(self.read()):
            total += len(document.encode())
            if total > max_bytes:
                return
            yield document
        if not total:
            raise DataError(f"corpus {self.name}: this installation holds none of its text; choose another corpus")

    def versions(self) -> str:
        """Everything that the text depends on. It is part of the key under which its tokens are cached."""
        installed = _distributions()
        wanted = sorted(installed) if self.packages is None else self.packages
        parts = [f"{name}=={installed[name].version if name in installed else 'absent'}" for name in wanted]
        more = [self.version] if self.version else []
        return " ".join([self.name, f"python=={platform.python_version()}", *parts, *more])


CORPORA: Registry[Corpus] = names.CORPORA
Read = Callable[[], Iterator[str]]


def corpus(name: str, *, packages: tuple[str, ...] | None = (), version: str = "") -> Callable[[Read], Read]:
    """Register a corpus: a function that gives its raw documents in a fixed order.

    The first line of its docstring describes the text, and `Source: ` says where it comes from.

    Args:
        name: what `data.corpus` calls it.
        packages: distributions that the text comes from, see `Corpus`.
        version: changes where the text changes with neither Python nor those: cached tokens are then made anew.
    """

    def register(read: Read) -> Read:
        description = (inspect.getdoc(read) or "").partition("\n")[0].rstrip(".")
        found = Corpus(name=name, description=description, read=read, packages=packages, version=version)
        CORPORA.add(name, found, read)
        return read

    return register


def without_repeats(documents: Iterable[str]) -> Iterator[str]:
    """Drop paragraphs that occurred before, and documents that are then empty.

    Paragraphs are separated by blank lines and compared without regard to white space.
    """
    seen: set[bytes] = set()
    for document in documents:
        kept: list[str] = []
        for paragraph in _GAP.split(document):
            normal = " ".join(paragraph.split())
            if len(normal) > MIN_PARAGRAPH_CHARS:
                digest = hashlib.blake2b(normal.encode(), digest_size=16).digest()
                if digest in seen:
                    continue
                seen.add(digest)
            if normal:
                kept.append(paragraph.rstrip())
        if kept:
            yield "\n\n".join(kept)


def evenly(files: Sequence[tuple[Path, int]], max_bytes: int) -> list[Path]:
    """Choose files of at most about `max_bytes` together, spread evenly over the whole list.

    Args:
        files: paths and their sizes in bytes.
        max_bytes: wanted total. The first files alone would be all of one package.
    """
    total = sum(size for _, size in files)
    if total <= max_bytes:
        return [path for path, _ in files]
    chosen, taken, passed = [], 0, 0
    for path, size in files:
        passed += size
        # Take the file if the total is then nearer to an even share of the files passed so far.
        if taken + size / 2 <= passed * max_bytes / total:
            chosen.append(path)
            taken += size
    return chosen


def _source_files(root: Path, *, suffixes: tuple[str, ...], without: set[str]) -> list[tuple[Path, int]]:
    found = []
    for folder, folders, inside in walk(root):
        folders[:] = sorted(name for name in folders if name not in without)
        for name in sorted(inside):
            path = Path(folder, name)
            if name.endswith(suffixes) and path.is_file():
                size = path.stat().st_size
                if 0 < size <= MAX_FILE_BYTES:
                    found.append((path, size))
    return found


def _text(path: Path) -> str:
    """The text of a file. It is empty if the file is not UTF-8: a few old sources are not."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        return ""


def _package_folder(name: str) -> Path | None:
    # find_spec of a top-level name only looks the package up: torch is not imported.
    spec = util.find_spec(name)
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]) if locations else None


@corpus("python_stdlib")
def python_stdlib() -> Iterator[str]:
    """Python code: the standard library without its tests.

    Source: this installation's Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = _source_files(root, suffixes=(".py",), without=_TESTS | _NOT_STDLIB)
    for path in evenly(files, MAX_BYTES):
        yield _text(path)


@corpus("cpp_headers", packages=("torch",))
def cpp_headers() -> Iterator[str]:
    """C++ code: the headers that torch ships.

    Source: the installed torch.
    """
    root = _package_folder("torch")
    if root is not None:
        # ATen/ops holds thousands of generated files that differ in a name only.
        files = _source_files(root / "include", suffixes=(".h", ".hpp", ".cuh"), without={"ops"})
        for path in evenly(files, MAX_BYTES):
            yield _text(path)


@corpus("python_reference")
def python_reference() -> Iterator[str]:
    """English reference prose: the Python language reference.

    Source: `pydoc_data` of this installation's Python.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship it separately
        return
    for name in sorted(topics):
        yield topics[name]


def _distributions() -> dict[str, metadata.Distribution]:
    """Installed distributions by normalised name, sorted; of doubles the one that is imported."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        # This package's own text changes with every edit, without a new version to key the cache.
        if name and _normalised(name) != "worldlm-ray":
            found.setdefault(_normalised(name), distribution)
    return dict(sorted(found.items()))


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@corpus("package_descriptions", packages=None)
def package_descriptions() -> Iterator[str]:
    """English prose and Markdown: long descriptions of the installed packages.

    Source: their metadata.
    """
    for distribution in _distributions().values():
        if "Description" in distribution.metadata:
            yield distribution.metadata["Description"]


@corpus("licenses", packages=None)
def licenses() -> Iterator[str]:
    """English legal prose: licences of the installed packages.

    Source: the files beside their metadata.
    """
    for name, distribution in _distributions().items():
        folder = re.sub(r"[-.]+", "[-_.]", name)
        root = Path(str(distribution.locate_file("")))
        pattern = re.compile(rf"{folder}-[^-]*\.dist-info", re.IGNORECASE)
        for info in sorted(path for path in root.glob("*.dist-info") if pattern.fullmatch(path.name)):
            for path in sorted(path for path in info.rglob("*") if _is_license(path)):
                yield _text(path)


def _is_license(path: Path) -> bool:
    return path.name.upper().startswith(("LICEN", "COPYING", "NOTICE")) and path.is_file()


@corpus("docstrings", packages=_DOCUMENTED)
def docstrings() -> Iterator[str]:
    """English technical prose: docstrings of eight installed packages.

    Source: torch, numpy, ray, scipy, pandas, matplotlib, networkx and sympy, as they are installed.
    """
    files: list[tuple[Path, int]] = []
    for name in _DOCUMENTED:
        root = _package_folder(name)
        if root is not None:
            files += _source_files(root, suffixes=(".py",), without=_TESTS)
    for path in evenly(files, DOCSTRING_SOURCE_BYTES):
        text = "\n\n".join(_docstrings_of(_text(path)))
        if text:
            yield text


def _docstrings_of(source: str) -> list[str]:
    """Docstrings of a module in the order of the source, without indentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in foreign sources
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates, and sources of other Python versions
            return []
    found: list[str] = []
    stack: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while stack:
        node = stack.pop()
        text = ast.get_docstring(node)
        if text and len(text) > MIN_PARAGRAPH_CHARS:
            found.append(text)
        inner = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        stack.extend(child for child in reversed(node.body) if isinstance(child, inner))
    return found
