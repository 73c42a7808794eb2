"""The stages stand alone, and what several of them have means the same in each."""

import argparse
import ast
import sys

import pytest
from conftest import ROOT

import opsd
import rlvr
import sft

STAGES = {"sft": sft, "rlvr": rlvr, "opsd": opsd}
OURS = {path.stem for path in ROOT.glob("*.py")}
OTHER_HELP = {  # flags whose help differs, and why
    "init": "sft.py can do without",
    "batch_size": "sft counts demonstrations, the others prompts",
    "group_size": "in rlvr a group is compared",
    "truncated": "it has another meaning, and other choices",
}


def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name, allowed",
    [("verify", set()), ("rollout", {"verify"}), ("eval", {"rollout", "verify"})]
    + [(stage, {"rollout", "verify"}) for stage in STAGES],
)
def test_a_file_imports_only_what_it_may(name, allowed):
    """A stage that imports another cannot be read, changed or handed out alone."""
    imported = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported & OURS <= allowed


@pytest.mark.parametrize("name", ["sft", "rlvr", "opsd", "eval", "rollout", "verify"])
def test_what_is_imported_is_used(name):
    """A name that an edit left behind sends a reader looking for it."""
    tree = tree_of(name)
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= used, imported - used


@pytest.fixture
def flags(monkeypatch):
    """{stage: {flag: argparse's action}}, with what get_args defines itself and what rollout.py adds."""
    found = {}

    def note(parser):
        found[current] = {action.dest: action for action in parser._actions}
        raise SystemExit

    for current, stage in STAGES.items():
        monkeypatch.setattr(sys, "argv", [f"{current}.py"])
        monkeypatch.setattr(stage, "parse_args", note)
        with pytest.raises(SystemExit):
            stage.get_args()
    return found


def test_a_flag_means_the_same_in_every_stage(flags):
    """The same name, the same help and the same check. Defaults are each stage's own."""
    shared = 0
    for dest in set.union(*map(set, flags.values())):
        actions = [of_stage[dest] for of_stage in flags.values() if dest in of_stage]
        shared += len(actions) > 1
        names = {tuple(action.option_strings) for action in actions}
        kinds = {(type(action), str(action.type and action.type.__name__)) for action in actions}
        assert len(names) == 1 and len(kinds) == 1, dest
        if dest in OTHER_HELP:
            continue
        assert len({action.help for action in actions}) == 1, [action.help for action in actions]
    assert shared > 20


def test_every_flag_has_a_help_and_a_default_that_passes_its_own_check(flags):
    """A default that its own flag would refuse is a value that nobody can type."""
    for of_stage in flags.values():
        for action in of_stage.values():
            assert action.help, action.dest
            if callable(action.type) and action.default not in (None, argparse.SUPPRESS):
                assert action.type(str(action.default)) == action.default
