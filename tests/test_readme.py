"""The README's promises that can rot: links to lines, and the results table."""

import re
import sys
from pathlib import Path

import memory
import pytest
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


@pytest.mark.parametrize("title", [*results.TABLES, results.CONTRASTS, results.ANATOMY])
def test_the_results_tables_are_what_the_committed_runs_give(title):
    """A number typed into the README by hand is a number that nobody can reproduce."""
    assert results.all_tables(results.load_runs())[title] in README


def test_the_interval_by_hand():
    """1 2 3 4 5: mean 3, s = sqrt(2.5) = 1.5811388, t(4) = 2.776: 2.776 * 1.5811388 / sqrt(5) = 1.9629."""
    mean, half = results.mean_and_half_width([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(1.9629, abs=1e-4)


def test_every_arm_has_a_command_that_the_seed_script_runs():
    """A row without its command cannot be checked; a command with a flag that is gone cannot be run."""
    commands = results.commands()
    arms = {arm for _, arms in results.TABLES.values() for arm in arms}
    assert arms <= commands.keys()
    assert commands["sft"] == "python sft.py" and commands["rlvr"] == "python rlvr.py --init ckpt/sft"
    assert commands["incorrect-matched"] == ("python opsd.py --init ckpt/rlvr --only-incorrect --match-budget "
        "--max-refills 40 --out ckpt/incorrect-matched")
    made = {re.search(r"--out (\S+)|$", command)[1] for command in commands.values()} | {"ckpt/sft", "ckpt/rlvr"}
    assert {re.search(r"--init (\S+)|$", command)[1] for command in commands.values()} - {None} <= made


def test_the_memory_table_is_what_its_command_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    memory.main()
    table = capsys.readouterr().out.strip().split("\n\n")[1]
    assert table in README and table.count("\n") == 5


def test_flags_in_the_readme_exist():
    """A command in the README with a flag that was renamed fails on the reader's first try."""
    files = [*ROOT.glob("*.py"), ROOT / "tests/experiments/results.py", ROOT / "tests/bench/bench_model.py"]
    code = "".join(file.read_text() for file in files)
    flags = set(re.findall(r"`?(--[a-z][a-z-]+)", README)) - {"--help", "--no-deps", "--index-url"}
    defined = set(re.findall(r'"(--[a-z-]+)"', code))
    assert not {flag for flag in flags if flag not in defined and flag.replace("--no-", "--") not in defined}
