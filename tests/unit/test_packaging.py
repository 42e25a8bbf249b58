"""What an installation brings: our packages, and nothing that would take another's name."""

from __future__ import annotations

import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = SETTINGS["tool"]["setuptools"]["packages"]


def test_two_packages_are_installed_and_no_tests_or_examples() -> None:
    assert {name.split(".")[0] for name in PACKAGES} == {"worldlm_ray", "actors"}


def test_every_package_of_the_source_is_installed() -> None:
    places = SETTINGS["tool"]["setuptools"]["package-dir"]
    moved = {name for name in places if "." in name}
    real = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for top in ("worldlm_ray", "actors")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(PACKAGES) - moved == real
    assert all((ROOT / places[name]).is_dir() for name in moved)


def test_every_file_beside_the_code_travels() -> None:
    data = SETTINGS["tool"]["setuptools"]["package-data"]
    listed = subprocess.run(["git", "ls-files", "worldlm_ray", "actors"], cwd=ROOT, capture_output=True, text=True)
    beside = {path for path in listed.stdout.split() if not path.endswith(".py")}
    known = {f"{name.replace('.', '/')}/{pattern}" for name, patterns in data.items() for pattern in patterns}
    assert beside == {path for path in beside if any(fnmatch(path, pattern) for pattern in known)}
    assert "worldlm_ray/reports/dashboard.html" in beside


def test_the_licence_is_the_whole_text_and_travels() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
    assert SETTINGS["project"]["license-files"] == ["LICENSE"]


def test_a_citation_names_the_version_that_is_installed() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (cited["title"], cited["version"]) == (SETTINGS["project"]["name"], SETTINGS["project"]["version"])
    assert cited["license"] == SETTINGS["project"]["license"]


def test_issue_templates_have_what_the_form_needs() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= set(form), path
        asked = [part for part in form["body"] if part["type"] != "markdown"]
        assert asked, path
        assert all(part["id"] and part["attributes"]["label"] for part in asked), path
