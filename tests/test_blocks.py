"""The stages stand alone, and what they repeat is the same in each."""

import ast
import re

import pytest
from conftest import ROOT

STAGES = ["sft", "rlvr", "opsd"]
OURS = {path.stem for path in ROOT.glob("*.py")}


def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def repeated_block(name):
    """From the line that announces it to the file's last lines."""
    block = re.search(
        r"^# The same, word for word.*?(?=^if __name__)", source(name), re.MULTILINE | re.DOTALL
    )
    assert block, f"{name}.py: no line that starts with '# The same, word for word'"
    return block[0]


@pytest.mark.parametrize("name", STAGES[1:])
def test_the_repeated_block_is_the_same_word_for_word(name):
    """A fix of save or resume was made in one file once, and the others went on losing runs."""
    expected, got = repeated_block("sft").splitlines(), repeated_block(name).splitlines()
    assert len(expected) > 100 and "def main():" in expected
    for number, (ours, theirs) in enumerate(zip(got, expected)):
        assert ours == theirs, f"line {number} of the block differs between sft.py and {name}.py"
    assert len(got) == len(expected)


@pytest.mark.parametrize(
    "name, allowed",
    [("verify", set()), ("rollout", {"verify"}), ("eval", {"rollout", "verify"})]
    + [(stage, {"rollout", "verify"}) for stage in STAGES],
)
def test_a_file_imports_only_what_it_may(name, allowed):
    """A stage that imports another cannot be read, changed or handed out alone."""
    imported = set()
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported & OURS <= allowed


@pytest.mark.parametrize("name", STAGES)
def test_what_is_imported_is_used(name):
    """The block that is repeated needs its imports in every file; what was left behind by an edit goes."""
    tree = ast.parse(source(name))
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= used, imported - used
