"""The course kit: blanks the functions that students write, restores them, writes a folder to give away.

    python tests/course/course.py blank              # all thirteen exercises; `blank 3 6`: these only
    python tests/course/course.py restore            # the reference solutions, from .solutions/
    python tests/course/course.py list               # exercise, file, function, state
    python tests/course/course.py handout DIR        # a blanked folder for students; `handout DIR 3 6`
    python tests/course/course.py references DIR     # reference.json and its table, from runs of three seeds

A blanked function keeps its signature and docstring; its body raises NotImplementedError. `blank` keeps the
solutions in .solutions/blanked.json, and what `restore` replaces in .solutions/replaced.jsonl. `handout`
changes nothing here and takes no solution along. INSTRUCTOR.md says more.
"""

import argparse
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COURSE = Path("tests/course")
EXERCISES = {  # number -> file, function
    1: ("rollout.py", "render_prompt"),
    2: ("rollout.py", "sample_ids"),
    3: ("rollout.py", "collate"),
    4: ("rollout.py", "response_hidden_states"),
    5: ("sft.py", "sft_loss"),
    6: ("tests/course/weak_verifier.py", "fool"),
    7: ("rlvr.py", "compute_group_normalized_rewards"),
    8: ("rlvr.py", "grpo_clip_loss"),
    9: ("rlvr.py", "sequence_weights"),
    10: ("rollout.py", "k3_kl"),
    11: ("opsd.py", "divergence"),
    12: ("opsd.py", "is_kept"),
    13: ("opsd.py", "update_teacher"),
}
HELPERS = {11: [("opsd.py", "kl_divergence")]}  # part of a solution, so blanked with it
TESTS = "python -m pytest tests/course/test_exercises.py -k exercise_"
BLANK = f'    raise NotImplementedError("exercise {{0}}: {TESTS}{{0}}_")\n'


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------------------------
# Bodies of functions


def find_function(text, function):
    """Where a top-level function stands in its file -> three line numbers, counted from 0: of its signature
    (or first decorator), of its body, and the one after its end. The docstring is no part of the body."""
    try:
        functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    except SyntaxError as error:
        fail(f"the file of {function} is not valid Python (line {error.lineno}): mend it, or get it from git")
    node = functions.get(function)
    if node is None:
        fail(f"no function {function}: it was renamed or removed; restore the file from git")
    documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    first = node.decorator_list[0].lineno if node.decorator_list else node.lineno
    body = node.body[0].end_lineno if documented else node.body[0].lineno - 1
    return first - 1, body, node.end_lineno


def body_of(path, function):
    text = path.read_text(encoding="utf-8")
    _, body, end = find_function(text, function)
    return "".join(text.splitlines(keepends=True)[body:end])


def replace_body(path, function, new):
    text = path.read_text(encoding="utf-8")
    _, body, end = find_function(text, function)
    lines = text.splitlines(keepends=True)
    path.write_text("".join([*lines[:body], new, *lines[end:]]), encoding="utf-8")


def functions_of(numbers):
    """-> (number, file, function) of each function that these exercises blank."""
    return [(n, *pair) for n in numbers for pair in [EXERCISES[n], *HELPERS.get(n, [])]]


def blank_or_restore(action, numbers):
    """blank, restore or list: prints a line for each exercise."""
    saved = ROOT / ".solutions" / "blanked.json"
    solutions = json.loads(saved.read_text()) if saved.is_file() else {}
    if action == "restore" and not solutions:
        fail(f"nothing to restore: {saved.relative_to(ROOT)} is not there")
    kept = saved.parent / "replaced.jsonl"
    for number, name, function in functions_of(numbers):
        body = body_of(ROOT / name, function)
        blank = BLANK.format(number)
        if action == "blank" and body != blank:
            if solutions.get(function, body) != body:
                fail(
                    f"exercise {number} was blanked before, and {function} holds other work now: `restore` "
                    "first"
                )
            solutions[function] = body
            saved.parent.mkdir(exist_ok=True)
            saved.write_text(json.dumps(solutions, indent=1) + "\n")  # before the body goes
            replace_body(ROOT / name, function, blank)
        if action == "restore" and function in solutions:
            if body not in (blank, solutions[function]):
                with open(kept, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"exercise": number, "function": function, "body": body}) + "\n")
                print(f"exercise {number}: what stood there is kept in {kept.relative_to(ROOT)}")
            replace_body(ROOT / name, function, solutions.pop(function))
            saved.write_text(json.dumps(solutions, indent=1) + "\n")
        state = "blank" if body_of(ROOT / name, function) == blank else "filled in"
        print(f"exercise {number}: {name} {function}: {state}")


# ------------------------------------------------------------------------------------------------------------
# The folder for students

PAGES = ["README.md", "tests/course/README.md"]
CODE = ["sft.py", "rlvr.py", "opsd.py", "rollout.py", "verify.py", "eval.py"]
EXERCISE_FILES = [
    "tests/course/adapters.py",
    "tests/course/test_exercises.py",
    "tests/course/weak_verifier.py",
]
HANDED_OUT = [*PAGES, "requirements.txt", ".gitignore", *CODE, *EXERCISE_FILES]
LOOK = "eval.py ckpt/sft ckpt/rlvr ckpt/opsd --example --seed 20 --all-tokens --html"


def handout(folder, numbers):
    """Writes the folder: HANDED_OUT, blanked; and, as far as they are here, checkpoints and the example."""
    folder = Path(folder)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        fail(f"{folder} is there and not empty: name a new folder")
    made = ROOT / "ckpt"
    checkpoints = [name for name in ("sft", "rlvr", "opsd") if (made / name / "config.json").is_file()]
    with tempfile.TemporaryDirectory() as temporary:
        if len(checkpoints) == 3:
            make_example(Path(temporary))
        try:
            for name in HANDED_OUT:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
            shutil.copytree(temporary, folder, dirs_exist_ok=True)
            for name in set(checkpoints) - {"opsd"}:
                without = shutil.ignore_patterns("trainer_state.pt")
                shutil.copytree(made / name, folder / "ckpt" / name, ignore=without)
        except OSError as error:
            fail(f"{folder}: cannot be written: {error}")
    for number, name, function in functions_of(numbers):
        replace_body(folder / name, function, BLANK.format(number))
    for page in PAGES:
        text = (folder / page).read_text(encoding="utf-8")
        (folder / page).write_text(unlink(text, (folder / page).parent), encoding="utf-8")
    print(f"{folder}: exercises {' '.join(map(str, numbers))} are blank")
    for name, stage in ("sft", "python sft.py"), ("rlvr", "python rlvr.py --init ckpt/sft"):
        if name not in checkpoints:
            print(f"without ckpt/{name}, which is not here: students must make it, or run {stage} first")
    if len(checkpoints) < 3:
        print("without example.txt and example.html (exercise 0): they need ckpt/sft, ckpt/rlvr, ckpt/opsd")


def make_example(folder):
    """Exercise 0's files, example.txt and example.html: in a blanked folder eval.py does not run yet."""
    command = [sys.executable, *LOOK.split(), str(folder / "example.html")]
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}
    )
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        fail(f"python {LOOK} example.html does not run ({reason}): `restore` the solutions first")
    (folder / "example.txt").write_text(process.stdout, encoding="utf-8")


def unlink(text, folder):
    """A page's text without links into what its folder lacks, and without line numbers, which have moved."""

    def plain(match):
        label, target = match.groups()
        if re.match(r"https?:|#", target):
            return match[0]
        path = target.partition("#")[0]
        inside = "" if ".py#L" in target else target[len(path) :]
        return f"[{label}]({path}{inside})" if (folder / path).exists() else label

    return re.sub(r"!?\[([^\]]*)\]\(([^)\s]+)\)", plain, text)


# ------------------------------------------------------------------------------------------------------------
# Reference numbers

SEEDS = [0, 1, 2]
FIRST, LAST, ALL = slice(0, 1), slice(-5, None), slice(None)  # of a metric's values, step by step: their mean
Run = namedtuple("Run", "exercise command columns", defaults=[{}])  # columns: title -> (metric, which steps)
REWARD = {"reward, last 5 steps": ("reward/mean", LAST)}
ENTROPY = {"entropy, last 5 steps": ("entropy", LAST)}
KEPT = {"kept, last 5 steps": ("distill/kept_frac", LAST)}
ARMS = ROOT / "tests" / "experiments" / "results"  # the runs of the experiments, a json a seed
RUNS = {  # its name in DIR/s0, s1, s2, or else in ARMS -> what was run
    "sft": Run("0", "python sft.py", {"loss, last 5 steps": ("loss", LAST)}),
    "rlvr": Run("0", "python rlvr.py --init ckpt/sft", {**REWARD, **ENTROPY}),
    "temperature-0": Run("2", "python eval.py ckpt/rlvr --temperature 0"),
    "temperature-1.5": Run("2", "python eval.py ckpt/rlvr --temperature 1.5"),
    "shifted": Run("4", "python sft.py --steps 300 --out ckpt/shifted",
        {"loss, last 5 steps": ("loss", LAST)}),
    "ex1": Run("5", "python sft.py --steps 500 --out ckpt/short",
        {"loss, step 1": ("loss", FIRST), "loss, last 5 steps": ("loss", LAST)}),
    "fooled": Run("6", "PYTHONPATH=tests/course python rlvr.py --init ckpt/sft "
        "--reward weak_verifier:substring --steps 25 --out ckpt/fooled", REWARD),
    "nostd": Run("7", "python rlvr.py --init ckpt/sft --no-std --out ckpt/no-std",
        {**REWARD, "gradient norm, all steps": ("grad_norm", ALL)}),
    "clip20": Run("8", "python rlvr.py --init ckpt/sft --updates-per-batch 4 --steps 25 --clip-high 0.2 "
        "--out ckpt/clip-0.2", {**ENTROPY, "clipped, % of tokens": ("ratio/clip_frac", ALL)}),
    "clip28": Run("8", "python rlvr.py --init ckpt/sft --updates-per-batch 4 --steps 25 --clip-high 0.28 "
        "--out ckpt/clip-0.28", {**ENTROPY, "clipped, % of tokens": ("ratio/clip_frac", ALL)}),
    "sequence": Run("9", "python rlvr.py --init ckpt/sft --loss-normalization sequence --out ckpt/sequence",
        REWARD),
    "kl-0.001": Run("10", "python rlvr.py --init ckpt/sft --kl-coef 0.001 --steps 25 --out ckpt/kl-0.001",
        {**REWARD, "KL to ckpt/sft, last 5 steps": ("kl/ref", LAST)}),
    "kl-1": Run("10", "python rlvr.py --init ckpt/sft --kl-coef 1 --steps 25 --out ckpt/kl-1",
        {**REWARD, "KL to ckpt/sft, last 5 steps": ("kl/ref", LAST)}),
    "correct": Run("11, 12", "python opsd.py --only-correct --init ckpt/rlvr",
        {"KL on correct, step 1": ("distill/kl_correct", FIRST),
            "on incorrect": ("distill/kl_incorrect", FIRST)}),
    "forward": Run("11",
        "python opsd.py --only-correct --divergence forward --init ckpt/rlvr --out ckpt/forward"),
    "incorrect": Run("12", "python opsd.py --only-incorrect --init ckpt/rlvr --out ckpt/incorrect", KEPT),
    "incorrect-matched": Run("12", "python opsd.py --only-incorrect --match-budget --max-refills 40 "
        "--init ckpt/rlvr --out ckpt/incorrect-matched"),
    "frozen-100": Run("13",
        "python opsd.py --only-correct --steps 100 --init ckpt/rlvr --out ckpt/frozen-100"),
    "live": Run("13", "python opsd.py --only-correct --teacher refresh --refresh-every 1 --steps 100 "
        "--init ckpt/rlvr --out ckpt/live", KEPT),
    "livefwd": Run("13", "python opsd.py --only-correct --teacher refresh --refresh-every 1 "
        "--divergence forward --steps 60 --init ckpt/rlvr --out ckpt/live-forward", KEPT),
}  # fmt: skip
BEGIN, END = "<!-- references -->\n", "<!-- end -->\n"
USUAL = ["accuracy, %", "length, tokens", "truncated, %"]
PERCENT = ("accuracy, %", "truncated, %", "clipped, % of tokens")


def read_run(folder, seed, name):
    """-> {column: its value} of one run, or None if it is not there.

    eval.py's json lies beside the run's folder, metrics.jsonl in it. An arm of the experiments has no log.
    """
    measured, arms = Path(folder, f"s{seed}", f"{name}.json"), ARMS / f"seed{seed}.json"
    if measured.is_file():
        row = json.loads(measured.read_text())["checkpoints"][-1]
    elif arms.is_file() and not RUNS[name].columns:
        row = json.loads(arms.read_text()).get(name)
    else:
        row = None
    if row is None:
        return None
    values = {title: row[title.partition(",")[0]] for title in USUAL}
    log = measured.parent / name / "metrics.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    for title, (metric, which) in RUNS[name].columns.items():
        logged = [step[metric] for step in steps if step.get(metric) is not None][which]
        values[title] = sum(logged) / len(logged)
    minutes = sum(step.get("time/rollout", 0) + step.get("time/train", 0) for step in steps) / 60
    return values | ({"minutes": minutes} if steps else {})


def reference_commands(folder):
    """The shell commands of all runs that are not there yet, seed after seed."""
    for seed in SEEDS:
        for name, run in RUNS.items():
            if read_run(folder, seed, name) is None:
                path = f"{folder}/s{seed}/{name}"
                command = re.sub(r" --out \S+", "", run.command).replace("ckpt/", f"{folder}/s{seed}/")
                if "eval.py" not in command:
                    yield f"{command} --seed {seed} --out {path}"
                    command = f"python eval.py {path}"
                yield f"{command} --json {path}.json"


def references(folder):
    """DIR/s0, s1, s2 -> reference.json, and its table in INSTRUCTOR.md. Runs that are not there are named."""
    runs = {}
    if not Path(folder).is_dir():
        fail(f"{folder}: no such folder")
    for name in RUNS:
        rows = [read_run(folder, seed, name) for seed in SEEDS]
        if None in rows:
            print(f"left out: {name}: no {Path(folder, f's{SEEDS[rows.index(None)]}', f'{name}.json')}")
        else:
            runs[name] = {title: [round(row[title], 4) for row in rows] for title in rows[0]}
    if not runs:
        fail(f"{folder}: no run is finished under s0, s1, s2 (INSTRUCTOR.md says how to make them)")
    text = json.dumps({"seeds": SEEDS, "runs": runs}, indent=1)
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    (ROOT / COURSE / "reference.json").write_text(text + "\n", encoding="utf-8")
    page = ROOT / COURSE / "INSTRUCTOR.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(before + BEGIN + reference_table(runs) + END + after, encoding="utf-8")
    print(f"{COURSE}: {len(runs)} of {len(RUNS)} runs in reference.json and in INSTRUCTOR.md's table")


def reference_table(runs):
    """Markdown: a row a run, each cell the mean over the seeds and, in brackets, the least and the most."""

    def cell(title, values):
        values = [100 * value if title in PERCENT else value for value in values]
        digits = 1 if title in (*PERCENT, "length, tokens", "minutes") else 3
        low, high = min(values), max(values)
        return f"{sum(values) / len(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    lines = [f"| exercise | command | {' | '.join(USUAL)} | else | minutes |", "|" + "---|" * 7]
    for name, run in RUNS.items():
        if name in runs:
            cells = {title: cell(title, values) for title, values in runs[name].items()}
            others = "; ".join(f"{title} {cells[title]}" for title in run.columns)
            shown = [
                run.exercise,
                f"`{run.command}`",
                *(cells[title] for title in USUAL),
                others,
                cells.get("minutes", "").partition(" ")[0],
            ]
            lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for action, does in {
        "blank": "empty the functions",
        "restore": "put the solutions back",
        "list": "show their state",
        "handout": "write a folder for students",
        "references": "collect the reference numbers",
    }.items():
        add = actions.add_parser(action, help=does).add_argument
        if action == "handout":
            add("folder", help="a new or empty folder to write")
        if action == "references":
            add("folder", help="where s0, s1 and s2 hold the runs")
            add("--commands", action="store_true", help="print the commands that make what is missing there")
        else:
            add("exercises", nargs="*", type=int, help="numbers; default: all")
    args = parser.parse_args()
    if args.action == "references":
        if args.commands:
            return print("\n".join(reference_commands(args.folder)))
        return references(args.folder)
    unknown = set(args.exercises) - EXERCISES.keys()
    if unknown:
        fail(f"no exercise {sorted(unknown)[0]} to blank: there are 1 to {len(EXERCISES)}")
    numbers = args.exercises or list(EXERCISES)
    if args.action == "handout":
        return handout(args.folder, numbers)
    blank_or_restore(args.action, numbers)


if __name__ == "__main__":
    main()
