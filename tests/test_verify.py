"""What verify.py calls equal. A wrong checker trains a wrong model, and no loss curve shows it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import verify as verify_module
from verify import extract_answer, verify

ROOT = Path(__file__).resolve().parent.parent

EQUAL = [  # what stands in the box, and the gold answer
    ("42", "42"),
    (" 42 ", "42"),
    ("-7", "-7"),
    ("+7", "7"),
    ("−7", "-7"),  # U+2212, the minus that models copy from papers
    ("0.75", "3/4"),
    ("3/4", "0.75"),
    (".5", "1/2"),
    ("2.50", "2.5"),
    ("2.0", "2"),
    ("6/8", "3/4"),
    ("-3/4", "-0.75"),
    (r"\frac{3}{4}", "3/4"),
    (r"\dfrac{3}{4}", "0.75"),
    (r"\tfrac{3}{4}", "0.75"),
    (r"\frac34", "0.75"),
    (r"-\frac{3}{4}", "-3/4"),
    (r"\frac{-3}{4}", "-3/4"),
    ("3/4", r"\frac{3}{4}"),
    ("5%", "0.05"),
    (r"5\%", "1/20"),
    ("12.5%", "1/8"),
    ("$18", "18"),
    (r"\$18.50", "18.5"),
    ("1,234", "1234"),
    ("1,234,567.5", "1234567.5"),
    ("1{,}234", "1234"),
    ("$1,234", "1234"),
    (str(2**100), str(2**100)),
    ("1" + "0" * 50, "1" + "0" * 50 + "/1"),
    ("Thursday", "Thursday"),
    ("x + 1", "x+1"),
    ("(1, 2)", "(1,2)"),
]

UNEQUAL = [
    ("41", "42"),
    ("-7", "7"),
    ("0.3333", "1/3"),
    ("0.33333333333333333333", "1/3"),
    ("0.500000001", "1/2"),
    ("0.1", "1/10000000000000001"),
    (str(2**100), str(2**100 + 1)),  # the same float
    (f"1/{2**99}", f"1/{2**99 + 1}"),  # the same float
    (f"1/{2**99}", f"1/{2**98}"),
    ("1/2^99", "1/2^98"),
    ("5", r"5\%"),
    ("5%", "5"),
    ("12,34", "1234"),
    ("1,23", "123"),
    (r"\frac112", "1/12"),
    (r"\frac112", "12"),
    (r"-2\frac12", "-3/2"),
    ("1/0", "0"),
    ("5=6", "6"),
    ("3 or 4", "3"),
    (r"3\text{ is wrong}", "3"),
    ("A, B", "A"),
    ("[0,1]", "(0,1)"),
    ("2^{n+1}", "2^n+1"),
    ("1 2", "12"),
    ("1 1/2", "11/2"),
    ("Thursday", "Tuesday"),
    ("", "0"),
    ("", ""),
    ("__import__('os')", "4"),
]


@pytest.mark.parametrize("answer, gold", EQUAL)
def test_equal(answer, gold):
    """A right answer in another form that is called wrong teaches the model to mind the form."""
    assert verify(f"\\boxed{{{answer}}}", gold)


@pytest.mark.parametrize("answer, gold", UNEQUAL)
def test_unequal(answer, gold):
    """A wrong answer that is called right is a reward for a mistake."""
    assert not verify(f"\\boxed{{{answer}}}", gold)


EXTRACTED = {
    "a box": (r"The answer is \boxed{4}.", "4"),
    "the last box": (r"\boxed{3}, no, \boxed{4}", "4"),
    "nested braces": (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    "deeply nested": (r"\boxed{a{b{c}d}e} and {x}", "a{b{c}d}e"),
    "white space": (r"\boxed{ 4 }", "4"),
    "a box never closed": (r"\boxed{4", None),
    "GSM8K's form": ("She has 2+2 apples.\n#### 4", "4"),
    "the last mark": ("#### 3\n#### 4\n", "4"),
    "a box before a mark": ("\\boxed{4}\n#### 5", "4"),
    "after the thinking": (r"<think>\boxed{3}</think>\boxed{4}", "4"),
    "in the thinking only": (r"<think>\boxed{4}</think>I do not know.", None),
    "a mark in the thinking only": ("<think>#### 4</think>Four.", None),
    "thinking never closed": (r"<think>It is \boxed{4}", None),
    "thinking opened by the prompt": (r"It is \boxed{3}.</think>\boxed{4}", "4"),
    "thinking closed twice": (r"<think>\boxed{2}</think>\boxed{3}</think>\boxed{4}", "4"),
    "nothing": ("I do not know.", None),
    "empty": ("", None),
}


@pytest.mark.parametrize("response, answer", EXTRACTED.values(), ids=EXTRACTED)
def test_extract_answer(response, answer):
    """Where the answer stands: never in the thinking, and the last one counts."""
    assert extract_answer(response) == answer
    assert verify(response, "4") == (answer == "4")


NOT_TEXT = [(None, "4"), (r"\boxed{4}", None), (r"\boxed{4}", 4), (4, "4"), (b"4", "4")]


@pytest.mark.parametrize("response, gold", NOT_TEXT)
def test_not_text(response, gold):
    """Anything but text is not equal to anything; a training run must not die of it."""
    assert verify(response, gold) is False


LONG = 10**6
HOSTILE = {
    "boxes": "\\boxed{" * (LONG // 7),
    "boxes in boxes": "\\boxed{" * (LONG // 8) + "}" * (LONG // 8),
    "open braces": "\\boxed{" + "{" * LONG,
    "braces": "\\boxed{" + "{" * (LONG // 2) + "}" * (LONG // 2) + "}",
    "digits": "\\boxed{" + "9" * LONG + "}",
    "digits after the point": "\\boxed{0." + "3" * LONG + "}",
    "thousands": "\\boxed{1" + ",000" * (LONG // 4) + "}",
    "a long fraction": "\\boxed{" + "9" * (LONG // 2) + "/" + "7" * (LONG // 2) + "}",
    "fractions": "\\boxed{" + "\\frac{1}{" * (LONG // 10) + "2" + "}" * (LONG // 10) + "}",
    "a tower": "\\boxed{9^{9^{9^{9^{9}}}}}",
    "thinking": "<think>" * (LONG // 7),
    "thinking closed": "</think>" * (LONG // 8),
    "marks": "#" * LONG,
    "white space": "\\boxed{" + " " * LONG + "}",
    "backslashes": "\\" * LONG,
    "signs": "\\boxed{" + "-" * LONG + "4}",
    "null bytes": "\\boxed{" + "\0" * LONG + "}",
    "half a character": "\\boxed{\ud800}",
}


@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE)
def test_hostile_responses(response):
    """A model under reward writes anything: a million characters, wrong, in under a second."""
    start = time.process_time()
    assert verify(response, "4") is False
    assert verify("\\boxed{4}", response) is False
    assert time.process_time() - start < 1


# ---------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "words, status, says",
    [
        ([r"<think>so</think>\boxed{3/4}", "0.75"], 0, "equal"),
        ([r"\boxed{3/4}", "0.8"], 1, "not equal"),
        (["no answer", "4"], 1, "None"),
        ([r"\boxed{3/4}"], 2, "usage"),
        ([], 2, "usage"),
    ],
)
def test_command_line(words, status, says, monkeypatch, capsys):
    """0: equal, 1: not equal, 2: called wrongly; and it says what it has read."""
    monkeypatch.setattr(sys, "argv", ["verify.py", *words])
    with pytest.raises(SystemExit) as end:
        verify_module.main()
    assert end.value.code == status
    printed = capsys.readouterr()
    assert says in (printed.err if status == 2 else printed.out)


def test_command():
    """python verify.py, as the README has it."""
    command = [sys.executable, ROOT / "verify.py", r"\boxed{50\%}", "1/2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
