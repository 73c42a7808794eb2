"""The README's promises that can rot: links to lines, commands, its two tables, its length."""

import re
from pathlib import Path

import pages
import pytest
import results

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "README.md"


def test_links_point_at_what_they_name():
    """`[name](file.py#L12)` sends the reader to the line where name is defined, also after the next edit."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", PAGE.read_text())
    assert len(links) > 10
    for name, file, line in links:
        found = (ROOT / file).read_text().splitlines()[int(line) - 1]
        defines = re.match(rf"\s*(def|class) {name}\b|{name} = ", found)
        assert defines, f"{file}:{line} is {found!r}, not {name}"


def test_every_link_resolves():
    assert pages.broken_links(PAGE) == []


def test_commands_and_their_flags_exist():
    """A command with a flag that was renamed fails on the reader's first try."""
    assert len(pages.commands(PAGE)) > 10
    assert pages.unknown_commands(PAGE) == []


@pytest.mark.parametrize("title", [results.STAGES, results.ROLLOUTS])
def test_a_table_is_what_the_committed_runs_give(title):
    """A number typed into the README by hand is a number that nobody can reproduce."""
    made = results.readme_tables(results.load_runs())[title]
    assert f"<!-- table: {title} -->\n\n{made}\n\n<!-- end -->" in PAGE.read_text()


def test_it_can_be_read_in_one_go():
    """At most 330 lines, none over 140 characters outside code blocks and tables."""
    assert len(PAGE.read_text().splitlines()) <= 330
    assert pages.long_lines(PAGE) == []
