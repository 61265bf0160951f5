"""The project's own files agree with each other: pins, versions, links, commands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from lint_workflow import ALLOWED, findings
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "config" / "README.md"])
LINK = re.compile(r"\]\((?P<target>[^)#\s]+)(?:#[^)]*)?\)")


def _pins() -> dict[str, str]:
    lines = (ROOT / "envs" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    return dict(
        (canonicalize_name(name), version)
        for name, version in (line.split("==") for line in lines if not line.startswith("#"))
    )


def test_pins_are_plain_versions() -> None:
    pins = _pins()
    assert pins["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins.values())


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"]]
    for extra in ("workflow", "eval", "data", "dev"):
        wanted += extras[extra]
    pins = _pins()
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in envs/cpu.txt"
        assert version in requirement.specifier, f"{requirement} is pinned to {version}"


def test_versions_agree() -> None:
    version = PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [match["target"] for match in LINK.finditer(page.read_text(encoding="utf-8"))]
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_documented_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md", "docs/install.md", "docs/resume.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        used = set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, flags=re.MULTILINE))
        assert used <= targets, page


def test_lint_output_is_read() -> None:
    text = """Lints for rule a (line 5, Snakefile):
    * No log directive defined:
      Without a log directive, all output will be printed to the terminal:
    * Specify a conda environment or container for each rule.:
      This way, the used software is documented.

Lints for snakefile rules/b.smk:
    * Absolute path "/x" in line 3:
      Do not define absolute paths.
"""
    found = findings(text)
    assert [title for _, title in found if title not in ALLOWED] == [
        "No log directive defined",
        'Absolute path "/x" in line 3',
    ]
    assert len(found) == 3
    assert found[-1][0] == "snakefile rules/b.smk"
