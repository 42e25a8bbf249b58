"""Hooks of mkdocs: the pages that are generated, and links that lead out of docs/.

README.md is the home page. Documents at the top of the repository have a page, and so has each file or folder that a
document links to: a reader of the site needs no other place.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import site_pages

ROOT = site_pages.ROOT
DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Documents outside of docs/, and their pages."""
GENERATED = {
    "worldlm_ray/config/schema.py": "reference/configuration.md",
    "worldlm_ray/config/names.py": "reference/rules.md",
    "worldlm_ray/cli/main.py": "reference/cli.md",
    "worldlm_ray/api/runs.py": "reference/api.md",
}
"""Sources of the reference, and the pages that are generated from them: a document links to the source, which is there
without the site, too."""
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)]*)?\))")


def page_of(path: str) -> str:
    """The page of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return DOCUMENTS.get(path) or GENERATED.get(path) or f"source/{path.rstrip('/')}.md"


def led(text: str, origin: str) -> tuple[str, set[str]]:
    """A document whose links lead to pages of the site.

    Args:
        text: Markdown.
        origin: the document's path in the repository.

    Returns:
        The text, and the files of the repository that need a page.
    """
    wanted: set[str] = set()
    start = posixpath.dirname(page_of(origin)) or "."

    def lead(match: re.Match[str]) -> str:
        target = match.group(2)
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        page = page_of(path)
        if page.startswith("source/"):
            wanted.add(path)
        return f"{match.group(1)}{posixpath.relpath(page, start)}{match.group(3)}"

    return LINK.sub(lead, text), wanted


def named(nav: Any) -> set[str]:
    """Pages that a part of the navigation names."""
    if isinstance(nav, str):
        return {nav}
    return set().union(*map(named, nav.values() if isinstance(nav, dict) else nav))


def on_config(config: Any) -> Any:
    """Put pages that the navigation does not name under `More`: a reader finds each page of docs/."""
    pages = {path.name for path in Path(config.docs_dir).glob("*.md")}
    if missing := sorted(pages - named(config.nav)):
        config.nav.append({"More": missing})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages, wanted = dict(site_pages.reference()), set()
    for origin in [*DOCUMENTS, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]:
        text, files_linked = led((ROOT / origin).read_text(encoding="utf-8"), origin)
        wanted |= files_linked
        if origin in DOCUMENTS:
            pages[DOCUMENTS[origin]] = text
    pages |= {page_of(path): site_pages.source(path) for path in sorted(wanted)}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead the links of a page of docs/ to pages of the site."""
    if page.file.generated_by:
        return markdown
    return led(markdown, f"docs/{page.file.src_uri}")[0]
