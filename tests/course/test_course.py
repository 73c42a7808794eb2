"""The course kit works on a copy: what is blanked fails its named tests, what is restored is as it was."""

import re
import shutil
import subprocess
import sys

import course
import pytest
from conftest import ROOT


@pytest.fixture
def copy(tmp_path):
    """The repository's own files in another folder."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "tests").glob("**/*.py")]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    return tmp_path


def python(copy, *command):
    process = subprocess.run([sys.executable, *command], cwd=copy, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


def failed(copy):
    """-> exercises with a failed test, exercises with a passed one."""
    flags = ["-v", "--tb=line", "-p", "no:cacheprovider"]
    _, out, _ = python(copy, "-m", "pytest", *flags, "tests/course/test_exercises.py")
    found = re.findall(r"::test_exercise_(\d)[^\n]*? (PASSED|FAILED)", out)
    assert found, out
    return [{int(n) for n, verdict in found if verdict == word} for word in ("FAILED", "PASSED")]


def test_blank_all_and_restore(copy):
    """Every named test fails on a blank, each for that reason, and a restored file is the same to the byte."""
    everything = set(course.EXERCISES)
    before = {path.name: path.read_bytes() for path in copy.glob("*.py")}
    status, out, err = python(copy, "tests/course/course.py", "blank")
    assert status == 0 and out.count(": blank") == len(everything), err
    assert failed(copy) == [everything, set()]
    for number, (name, function) in course.EXERCISES.items():
        assert f"exercise {number}" in course.body_of(copy / name, function)
    assert python(copy, "tests/course/course.py", "blank")[0] == 0  # twice is harmless: the solutions stay
    assert python(copy, "tests/course/course.py", "restore")[0] == 0
    assert {path.name: path.read_bytes() for path in copy.glob("*.py")} == before
    assert failed(copy) == [set(), everything]


def test_blank_one_and_what_a_student_wrote_is_kept(copy):
    """Only that exercise fails; restoring keeps the student's body in a file; blanking it again is refused."""
    assert python(copy, "tests/course/course.py", "blank", "5")[0] == 0
    assert failed(copy)[0] == {5}
    course.replace_body(copy / "rlvr.py", "sequence_weights", "    return lengths\n")
    status, _, err = python(copy, "tests/course/course.py", "blank", "5")
    assert status == 2 and "other work" in err
    status, out, _ = python(copy, "tests/course/course.py", "restore")
    assert status == 0 and "return lengths" in (copy / ".solutions" / "replaced.jsonl").read_text()
    assert (copy / "rlvr.py").read_bytes() == (ROOT / "rlvr.py").read_bytes()
    course.replace_body(copy / "rlvr.py", "sequence_weights", "    return 1 / lengths\n")  # the reference changes
    assert python(copy, "tests/course/course.py", "blank", "5")[0] == python(copy, "tests/course/course.py", "restore")[0] == 0
    assert "return 1 / lengths" in course.body_of(copy / "rlvr.py", "sequence_weights")


def test_bad_use_is_one_line(copy):
    """A student's file that does not parse must not end the instructor's command in a traceback."""
    (copy / "opsd.py").write_text("def divergence(:\n")
    uses = {"blank 6": "not valid Python (line 1)", "restore": "nothing to restore", "blank 9": "there are 1 to 8"}
    for command, says in uses.items():
        status, _, err = python(copy, "tests/course/course.py", *command.split())
        assert status == 2 and says in err and len(err.splitlines()) == 1


def test_every_exercise_has_tests_and_an_adapter():
    """A listed function without a named test could be left blank, and nobody would see it."""
    tests = (ROOT / "tests" / "course" / "test_exercises.py").read_text()
    adapters = (ROOT / "tests" / "course" / "adapters.py").read_text()
    for number, (name, function) in course.EXERCISES.items():
        assert f"def test_exercise_{number}_" in tests and f"run_{function}(" in tests
        assert f"def run_{function}(" in adapters and f"{name.removesuffix('.py')}.{function}(" in adapters
