"""The documents: what they link to, and what the code cites of METHOD, is there."""

import pathlib
import re

import pytest

from tests.test_style import ROOT, python_files

DOCUMENTS = (
    *("README.md", "METHOD.md", "RESULTS.md"),
    *("results/TRAININGS.md", "results/SPEED.md"),
)


def headings(document: pathlib.Path) -> list[str]:
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    return re.findall(r"^#+ (.*)$", text, re.MULTILINE)


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text())
    assert links
    broken = []
    for link in links:
        path, _, place = link.partition("#")
        there = (ROOT / name).parent / path if path else ROOT / name
        if path.startswith("https://"):
            continue
        if not there.exists() or (place and place not in map(anchor, headings(there))):
            broken.append(link)
    assert not broken


def test_cited_sections_of_the_method_exist():
    sections = {heading.split(".")[0] for heading in headings(ROOT / "METHOD.md")}
    cited = {n for path in python_files() for n in re.findall(r"METHOD (\d+)", path.read_text())}
    assert cited and cited <= sections
