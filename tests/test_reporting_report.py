"""The whole report: files, self-containedness, reproducible bytes, no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from reporting_fixture import small_study, write_results

from rad.reporting import build_report, outputs
from rad.reporting.report import inline_svg
from rad.study import Study

BUILD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from types import SimpleNamespace
from reporting_fixture import small_study
from rad.reporting import build_report, outputs
study = small_study()
outputs(study)
early = [name for name in ("torch", "transformers", "matplotlib") if name in sys.modules]
build_report(study, Path({root!r}), Path({output!r}))
print(early, "torch" in sys.modules, "transformers" in sys.modules)
"""


@pytest.fixture(scope="module")
def study() -> Study:
    return small_study()


@pytest.fixture(scope="module")
def built(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report") / "nano"
    write_results(study, root)
    build_report(study, root)
    return root


class Tags(HTMLParser):
    """Collects elements, and checks that they are closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_all_announced_files_exist_and_no_others(study: Study, built: Path) -> None:
    announced = {name for names in outputs(study).values() for name in names}
    written = {
        str(path.relative_to(built))
        for folder in ("tables", "figures")
        for path in (built / folder).iterdir()
    }
    assert written | {"report.html"} == announced
    assert all((built / name).stat().st_size > 0 for name in announced)


def test_the_page_needs_no_network(built: Path) -> None:
    page = (built / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    for tag, name, value in tags.attributes:
        if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"https?://", page)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "<script" not in page


def test_references_inside_the_page_resolve(built: Path) -> None:
    tags = Tags()
    tags.feed((built / "report.html").read_text(encoding="utf-8"))
    identities = [value for _, name, value in tags.attributes if name == "id"]
    targets = {value[1:] for _, name, value in tags.attributes if name == "href"}
    for _, _, value in tags.attributes:
        targets |= set(re.findall(r"url\(#([^)]*)\)", value))
    assert targets <= set(identities)
    sections = [identity for identity in identities if "-" not in identity]
    assert len(sections) == len(set(sections))


def test_the_page_names_what_was_compared(study: Study, built: Path) -> None:
    page = (built / "report.html").read_text(encoding="utf-8")
    for run in study.run_table.values():
        assert run.id in page
        assert run.selector in page
        assert f"teacher: {run.teacher}" in page or run.teacher == "medium"
    for name in ("RAD self-distillation", "no attention kept", "torch", "2.13.0", "lm-eval"):
        assert name in page
    assert "A &lt;small&gt; study &amp; more" in page
    assert page.count("<svg") == len(outputs(study)["figures"]) // 2


def test_bytes_repeat_and_torch_is_not_imported(study: Study, built: Path, tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    code = BUILD.format(tests=tests, root=str(built), output=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False False"
    for names in outputs(study).values():
        for name in names:
            assert (tmp_path / name).read_bytes() == (built / name).read_bytes(), name


def test_inlined_figures_have_ids_of_their_own() -> None:
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://www.w3.org/2000/svg" width="4pt">'
        '<metadata>x</metadata><path id="p"/><use xlink:href="#p" clip-path="url(#c)"/></svg>'
    )
    assert inline_svg(svg, "scores") == (
        '<svg role="img" aria-label="Scores with 95 % intervals per family, teacher and selector" '
        'width="4pt"><path id="scores-p"/><use href="#scores-p" clip-path="url(#scores-c)"/></svg>'
    )


@pytest.mark.parametrize("name", ["workflow", "tables", "figures"])
def test_captions_for_snakemake_are_valid(name: str) -> None:
    docutils = pytest.importorskip("docutils.core")
    path = Path(__file__).parents[1] / "workflow" / "report" / f"{name}.rst"
    snakemake = SimpleNamespace(config={"name": "nano", "title": ""})
    text = jinja2.Template(path.read_text(encoding="utf-8")).render(snakemake=snakemake)
    # level 2 is a warning: a caption that docutils repairs is still wrong
    strict = {"halt_level": 2, "report_level": 5}
    assert docutils.publish_parts(text, writer="html", settings_overrides=strict)["body"]


def test_captions_describe_every_table_and_figure(study: Study) -> None:
    for kind in ("tables", "figures"):
        path = Path(__file__).parents[1] / "workflow" / "report" / f"{kind}.rst"
        caption = path.read_text(encoding="utf-8")
        for name in outputs(study)[kind]:
            assert Path(name).stem in caption
