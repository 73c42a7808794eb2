"""The course kit: blanks the functions that students write, and restores them.

    python tests/course/course.py blank            # all eight exercises; `blank 3 6`: these only
    python tests/course/course.py restore          # the reference solutions, from .solutions/
    python tests/course/course.py list             # exercise, function, state

A blanked function keeps its signature and docstring; its body raises NotImplementedError. The solutions go to
.solutions/blanked.json: hand the folder out without .solutions, .git and __pycache__. What `restore` replaces is
kept there too.
"""

import argparse
import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXERCISES = {  # number -> file, function
    1: ("sft.py", "sft_loss"),
    2: ("rollout.py", "collate"),
    3: ("rlvr.py", "compute_group_normalized_rewards"),
    4: ("rlvr.py", "grpo_clip_loss"),
    5: ("rlvr.py", "sequence_weights"),
    6: ("opsd.py", "divergence"),
    7: ("opsd.py", "update_teacher"),
    8: ("opsd.py", "is_kept"),
}
TESTS = "python -m pytest tests/course/test_exercises.py -k exercise_"
BLANK = f'    raise NotImplementedError("exercise {{0}}: {TESTS}{{0}}")\n'


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def find(text, function):
    """-> the function's lines without signature and docstring: first, and one after the last, from 0."""
    try:
        functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    except SyntaxError as error:
        fail(f"the file of {function} is not valid Python (line {error.lineno}): mend it, or get it from git")
    node = functions.get(function)
    if node is None:
        fail(f"no function {function}: it was renamed or removed; restore the file from git")
    documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    start = node.body[0].end_lineno if documented else node.body[0].lineno - 1
    return start, node.end_lineno


def body_of(path, function):
    text = path.read_text(encoding="utf-8")
    start, end = find(text, function)
    return "".join(text.splitlines(keepends=True)[start:end])


def replace_body(path, function, body):
    text = path.read_text(encoding="utf-8")
    start, end = find(text, function)
    lines = text.splitlines(keepends=True)
    path.write_text("".join([*lines[:start], body, *lines[end:]]), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["blank", "restore", "list"])
    parser.add_argument("exercises", nargs="*", type=int, help="numbers; default: all")
    args = parser.parse_args()
    unknown = set(args.exercises) - EXERCISES.keys()
    if unknown:
        fail(f"no exercise {sorted(unknown)[0]}: there are 1 to {len(EXERCISES)}")
    saved = ROOT / ".solutions" / "blanked.json"
    solutions = json.loads(saved.read_text()) if saved.is_file() else {}
    if args.action == "restore" and not solutions:
        fail(f"nothing to restore: {saved.relative_to(ROOT)} is not there")
    kept = saved.parent / "replaced.jsonl"
    for number in args.exercises or EXERCISES:
        name, function = EXERCISES[number]
        body = body_of(ROOT / name, function)
        blank = BLANK.format(number)
        if args.action == "blank" and body != blank:
            if solutions.get(str(number), body) != body:
                fail(f"exercise {number} was blanked before, and {function} holds other work now: `restore` "
                    "first")
            solutions[str(number)] = body
            saved.parent.mkdir(exist_ok=True)
            saved.write_text(json.dumps(solutions, indent=1) + "\n")  # before the body goes
            replace_body(ROOT / name, function, blank)
        if args.action == "restore" and str(number) in solutions:
            if body not in (blank, solutions[str(number)]):
                with open(kept, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"exercise": number, "body": body}) + "\n")
                print(f"exercise {number}: what stood there is kept in {kept.relative_to(ROOT)}")
            replace_body(ROOT / name, function, solutions.pop(str(number)))
            saved.write_text(json.dumps(solutions, indent=1) + "\n")
        state = "blank" if body_of(ROOT / name, function) == blank else "filled in"
        print(f"exercise {number}: {name} {function}: {state}")


if __name__ == "__main__":
    main()
