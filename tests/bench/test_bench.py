"""The page of benchmarks: its computed tables are what their commands print; links, commands, lines."""

import sys
from pathlib import Path

import hours
import memory
import pages
import pytest

PAGE = Path(__file__).resolve().parent / "README.md"


@pytest.mark.parametrize("script", [memory, hours], ids=["memory.py", "hours.py"])
def test_a_table_is_what_its_command_prints(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    script.main()
    printed = capsys.readouterr().out
    table = printed[printed.index("| ") :].strip()
    assert table.count("\n") == 5
    assert f"<!-- table: {script.__name__}.py -->\n\n{table}\n\n<!-- end -->" in PAGE.read_text()


def test_memory_by_hand(monkeypatch, capsys):
    """Qwen3-0.6B, one token: 596,049,920 parameters (tied) at 16 and 20 bytes are 9.54 and 11.92 GB, four
    chunks of 2^24 floats 0.27 GB. Keys, values: 1000 * 2 * 28 layers * 8 heads * 128 * 2 bytes = 0.11 GB."""
    monkeypatch.setattr(sys, "argv", ["memory.py", "--tokens", "1"])
    memory.main()
    assert "| 0.6B | 0.60 B | 10 | 12 | 0.3 | 0.11 |" in capsys.readouterr().out


def test_links_commands_and_lines_of_the_page():
    assert pages.broken_links(PAGE) == []
    assert pages.unknown_commands(PAGE) == []
    assert pages.long_lines(PAGE) == []
