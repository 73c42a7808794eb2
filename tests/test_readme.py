"""The README's promises that can rot: links to lines, and the results table."""

import re
import sys
from pathlib import Path

import memory
import results

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_links_point_at_what_they_name():
    """`[name](file.py#L12)` sends the reader to the line where name is defined, also after the next edit."""
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 10
    for name, file, line in links:
        found = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b|{name} = ", found), f"{file}:{line} is {found!r}, not {name}"


def test_the_results_table_is_what_the_committed_runs_give():
    """A number typed into the README by hand is a number that nobody can reproduce."""
    assert results.table(results.load_runs()) in README


def test_the_memory_table_is_what_its_command_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    table = capsys.readouterr().out.strip().split("\n\n")[1]
    assert table in README and table.count("\n") == 5


def test_flags_in_the_readme_exist():
    """A command in the README with a flag that was renamed fails on the reader's first try."""
    files = [*ROOT.glob("*.py"), ROOT / "tests/results.py", ROOT / "tests/bench_model.py"]
    code = "".join(file.read_text() for file in files)
    flags = set(re.findall(r"`?(--[a-z][a-z-]+)", README)) - {"--help", "--no-deps"}
    defined = set(re.findall(r'"(--[a-z-]+)"', code))
    assert not {flag for flag in flags if flag not in defined and flag.replace("--no-", "--") not in defined}
