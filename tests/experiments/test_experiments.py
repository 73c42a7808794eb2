"""The page of results is what the committed json gives: tables, numbers in the text, figure, commands."""

import fcntl
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import anatomy
import arms
import careful
import pages
import products
import pytest
import results
import run
import sft
from eval import first_results
from rollout import Problem, Rollout, load_problems

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
TITLES = [*results.TABLES, *results.HYPOTHESIS, results.HINDSIGHT, results.CONTRASTS, results.KEPT,
    results.EACH_SEED, results.EACH_PARITY, results.NEED, results.BY_HEART, results.EACH_BY_HEART,
    results.ANATOMY]


# ------------------------------------------------------------------------------------------------------------
# The page


@pytest.mark.parametrize("title", TITLES)
def test_a_table_is_what_the_committed_runs_give(title):
    """A number typed into the page by hand is a number that nobody can reproduce."""
    made = results.page_tables(results.load_runs())[title]
    assert f"<!-- table: {title} -->\n\n{made}\n\n<!-- end -->" in PAGE.read_text()


def test_numbers_of_the_text_stand_in_a_table():
    """`5.1 ± 0.8` in a sentence is a cell of some table, its sign aside: no table, no claim."""
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", PAGE.read_text(), flags=re.DOTALL)
    tables = "".join(results.page_tables(results.load_runs()).values())
    number = r"\d+\.\d ± \d+\.\d"
    claims = re.findall(number, text)
    assert len(claims) > 10
    assert set(claims) <= set(re.findall(number, tables))


def test_every_arm_of_a_table_has_a_command_that_can_be_run():
    """A row without its command cannot be checked; a command that starts from what nothing makes cannot be run."""
    commands = arms.commands()
    shown = {arm for _, names in results.TABLES.values() for arm in names}
    shown |= {f"{start}-{context}-{kept}" for start in results.HYPOTHESIS.values() for context in arms.CONTEXTS
        for kept in arms.FILTERS}
    shown |= {*results.CAREFUL, *results.PRODUCTS}
    shown |= {arm for pair in results.PAIRS for arm in pair} | {arm for arm, *_ in results.WHICH}
    assert shown <= commands.keys()
    assert commands["sft"] == "python sft.py" and commands["rlvr"] == "python rlvr.py --init ckpt/sft"
    assert commands["rlvr-15-answer-incorrect"] == ("python opsd.py --init ckpt/rlvr-15 --steps 20 --lr 4e-4 "
        "--eval-every 10 --context answer --only-incorrect --match-budget --out ckpt/rlvr-15-answer-incorrect")
    assert set(re.findall(r"--init ckpt/(\S+)", "\n".join(commands.values()))) <= commands.keys()


def test_the_page_shows_the_commands_of_every_arm():
    """As the blocks of the page have them, to be typed: none is lost, none is cut at a line's end."""
    page = PAGE.read_text().replace(" && \\\n  ", " && ")
    unrolled = [page.replace("$context", context) for context in arms.CONTEXTS]
    for command in arms.commands().values():
        assert any(command in text for text in unrolled)


# ------------------------------------------------------------------------------------------------------------
# Running


def test_a_command_for_one_seed():
    """Seeds that share a folder overwrite each other; a stage that gets no seed is seed 0 again."""
    assert run.for_seed("python sft.py", 3) == "python sft.py --out ckpt/seed3/sft --seed 3"
    assert run.for_seed("python opsd.py --init ckpt/rlvr --out ckpt/a", 1) == (
        "python opsd.py --init ckpt/seed1/rlvr --out ckpt/seed1/a --seed 1")


def test_arms_are_made_once_and_after_what_they_start_from(tmp_path, monkeypatch):
    """In any order of the list: b starts from a, which stands behind it. One that is done is left alone, one
    that another process makes is left to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arms, "GROUPS", {"all": """
        python opsd.py --init ckpt/a --out ckpt/b
        python opsd.py --init ckpt/sft --out ckpt/a
        python sft.py
        python rlvr.py --init ckpt/sft --out ckpt/theirs"""})
    made = []

    def finish(arm, seed=0):
        folder = Path("ckpt", f"seed{seed}", arm)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "eval.json").write_text("{}")

    def make(arm, command, seed):
        made.append(arm)
        finish(arm)

    Path("ckpt/seed0").mkdir(parents=True)
    lock = open("ckpt/seed0/.theirs.lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    monkeypatch.setattr(run, "make", make)
    monkeypatch.setattr(run.time, "sleep", lambda seconds: finish("theirs"))  # what we wait for
    run.work([0], ["all"])
    assert made == ["sft", "a", "b"]
    run.work([0], ["all"])
    assert made == ["sft", "a", "b"]


def test_an_arm_whose_start_nobody_makes_is_refused(tmp_path, monkeypatch, fails_with):
    """`--only only-correct` without `start` waited for ever, and said nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    fails_with(lambda: run.work([3], ["only-correct"]), "seed 3", "only-correct", "--init ckpt/rlvr")


def test_an_interrupted_arm_goes_on_from_its_save(tmp_path, monkeypatch):
    """Started anew, a stop costs what was trained; resumed with --init, a stage refuses. It is judged in the end,
    and counts as done only then."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def call(command):
        calls.append(command)
        if "--json" in command:
            Path(command.split()[-1]).write_text("{}")

    monkeypatch.setattr(run, "call", call)
    Path("ckpt/seed2/a").mkdir(parents=True)
    run.make("a", "python opsd.py --init ckpt/rlvr --out ckpt/a", 2)
    assert calls == ["python opsd.py --init ckpt/seed2/rlvr --out ckpt/seed2/a --seed 2 --overwrite",
        "python eval.py ckpt/seed2/a --json ckpt/seed2/a/eval.new"]
    assert run.done(Path("ckpt/seed2/a"))
    Path("ckpt/seed2/a/trainer_state.pt").touch()
    calls.clear()
    run.make("a", "python opsd.py --init ckpt/rlvr --out ckpt/a", 2)
    assert calls[0] == "python opsd.py --resume --out ckpt/seed2/a"


def test_each_arm_is_judged_on_the_problems_of_its_world(tmp_path, monkeypatch):
    """eval.py takes the data that a checkpoint was trained on. For the shortest responses that is a file of training
    problems: they are no test."""
    monkeypatch.chdir(tmp_path)
    judged = {}

    def call(command):
        if "--json" in command:
            path = Path(command.split()[-1])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
            judged[path.parent.name] = "--data arithmetic " in command

    monkeypatch.setattr(run, "call", call)
    for arm, command in arms.commands().items():
        run.make(arm, command, 0)
    assert judged.keys() == arms.commands().keys()
    assert [arm for arm, given in judged.items() if given] == ["shortest-sft"]


def test_links_commands_and_lines_of_the_page():
    assert pages.broken_links(PAGE) == []
    assert pages.unknown_commands(PAGE) == []
    assert pages.long_lines(PAGE) == []


def test_pages_finds_what_is_wrong(tmp_path):
    """Each kind of mistake once."""
    page = tmp_path / "page.md"
    lines = ["# One, two", "[a](#one-two) [b](#three) [c](gone.py) `--thinking` `--no-thinking` `--nothing`",
        "x" * 141, "```bash", "python sft.py --steps 3 --only-correct  # --comment", "X=1 python gone.py --a",
        "python opsd.py \\", "  --only-correct && python eval.py ckpt/a --jsno x", "y" * 200, "```"]
    page.write_text("\n".join(lines))
    assert pages.broken_links(page) == ["#three: no such heading", "gone.py: no such file"]
    assert pages.long_lines(page) == ["page.md:3 has 141 characters"]
    assert pages.unknown_commands(page) == ["sft.py has no --only-correct", "gone.py: no such file",
        "eval.py has no --jsno", "no script has --nothing"]


# ------------------------------------------------------------------------------------------------------------
# The cells


def test_the_interval_by_hand():
    """1 2 3 4 5: mean 3, s = sqrt(2.5) = 1.5811388, t(4) = 2.776: 2.776 * 1.5811388 / sqrt(5) = 1.9629."""
    mean, half = results.mean_and_half_width([1, 2, 3, 4, 5])
    assert mean == 3 and half == pytest.approx(1.9629, abs=1e-4)
    assert results.cell([1, 2, 3, 4, 5], "+") == "+3.0 ± 2.0"
    assert results.cell([1.26]) == "1.3"  # one seed has no interval


def test_changes_and_ranges_by_hand():
    """Two seeds, 50 -> 60 % and 60 -> 90 %: +10 and +30 points, mean +20. Lengths 40 -> 30 and 80 -> 40: -25
    and -50 %, mean -37.5 (and not 120 -> 70, -41.7 %). A third seed lacks the arm."""
    runs = [{"sft": {"accuracy": 0.5, "length": 40}, "rlvr": {"accuracy": 0.6, "length": 30}},
        {"sft": {"accuracy": 0.6, "length": 80}, "rlvr": {"accuracy": 0.9, "length": 40}},
        {"sft": {"accuracy": 0.7, "length": 80}}]
    pairs = results.pairs_of(runs, "rlvr", "sft")
    assert len(pairs) == 2
    assert results.range_cell(results.points(pairs), "+") == "+20.0 (+10.0 to +30.0)"
    assert results.range_cell(results.percents(pairs), "+") == "-37.5 (-50.0 to -25.0)"


def test_the_table_of_contexts_by_hand():
    """Two seeds. The start has 80 and 90 % at 60 tokens, and the entropy of the first step; trained on correct
    rollouts with the answer shown, 82 and 94 % at 30: +2 and +4 points, half the length. 1 and 3 of 100 first
    results are slips, of which 0 and 2 are checked: 0 and 66.7 %. An arm that a seed lacks leaves it out."""

    def row(accuracy, length, slips, mended, checked, entropy):
        found = {"first_results": 100, "slips": slips, "mended": mended, "checked": checked}
        measured = {"entropy_correct": entropy, "forks_correct": entropy / 2}
        return {"accuracy": accuracy, "length": length, "slips": found, "first": measured, "last_10": measured}

    runs = [
        {"a": row(0.8, 60, 1, 0, 0, 9), "a-solution-correct": row(0.8, 60, 1, 0, 0, 0.2),
            "a-answer-correct": row(0.82, 30, 1, 0, 0, 0.1), "a-answer-incorrect": row(0.79, 36, 1, 0, 0, 0.1)},
        {"a": row(0.9, 60, 0, 0, 0, 9), "a-solution-correct": row(0.9, 60, 0, 0, 0, 0.4),
            "a-answer-correct": row(0.94, 30, 3, 1, 1, 0.3)}]
    start, _, answer, incorrect = results.by_context(runs, "a").splitlines()[2:]
    assert start == "| the start |  | 85.0 ± 63.5 |  |  | 0.5 ± 6.4 | 0.0 | 0.300 | 15.0 |"
    assert answer == ("| answer | correct | 88.0 ± 76.2 | +3.0 ± 12.7 | -50.0 ± 0.0 | 2.0 ± 12.7 | 33.3 ± 423.5 "
        "| 0.200 | 10.0 |")
    assert incorrect.startswith("| answer | incorrect | 79.0 | -1.0 | -40.0 |")
    assert results.by_context([{}], "a") == results.NOT_RUN


def test_the_table_of_needed_checks_by_hand():
    """One seed: of 100 first results 20 are slips, of which 10 are mended and 6 checked: 80 %. Of the 80 right ones
    20 are checked: 25 %. After it half the slips, 1 of 10 checked, and 9 of the 90 right ones."""
    start = {"first_results": 100, "slips": 20, "mended": 10, "checked": 6, "right_checked": 20}
    after = {"first_results": 100, "slips": 10, "mended": 1, "checked": 0, "right_checked": 9}
    runs = [{"start": {"accuracy": 0.8, "length": 50, "slips": start},
        "arm": {"accuracy": 0.75, "length": 40, "slips": after}}]
    assert results.by_need(runs, "start", ["start", "arm", "absent"]).splitlines()[2:] == [
        "| start | 80.0 |  |  | 20.0 | 80.0 | 25.0 |", "| arm | 75.0 | -5.0 | -20.0 | 10.0 | 10.0 | 10.0 |"]
    assert results.by_need(runs, "start", ["absent"]) == results.NOT_RUN


def test_a_careful_writer_checks_where_slips_are():
    """2,000 chains of `5*4=20. 20+3=23.`: 30 % slips at the product, 3 % at the sum; 80 and 30 % are checked. A check
    is right: it mends. Told to be concise: slips as ever, 5 % checked. Told the solution: no slip."""
    problem = Problem("Compute 5*4+3.", "23", "5*4=20. 20+3=23.")

    def rates(context):
        rng = random.Random(0)
        texts = [careful.demonstrate(problem, rng, context) for _ in range(2000)]
        assert all("Wait" not in text or " ok." in text or " no." in text for text in texts)
        products, sums = zip(*[first_results(text, problem.problem)[:2] for text in texts])
        assert (True, "checked") not in products + sums
        return [(sum(slip for slip, _ in step) / 2000, sum(fate != "neither" for _, fate in step) / 2000)
            for step in (products, sums)]

    assert rates(None) == [pytest.approx((0.3, 0.8), abs=0.03), pytest.approx((0.03, 0.3), abs=0.03)]
    assert rates("concise") == [pytest.approx((0.3, 0.05), abs=0.03), pytest.approx((0.03, 0.05), abs=0.03)]
    assert rates("solution") == [pytest.approx((0, 0.05), abs=0.02), pytest.approx((0, 0.05), abs=0.02)]


def test_the_careful_writer_is_sft_s_only_while_it_runs(monkeypatch):
    """run.py trains all arms in one process: the next sft.py has its own writer again."""
    own, seen = sft.demonstrate_arithmetic, []
    monkeypatch.setattr(sft, "main", lambda: seen.append(sft.demonstrate_arithmetic))
    careful.main()
    assert seen == [careful.demonstrate] and sft.demonstrate_arithmetic is own


def test_the_table_with_pass_at_4_by_hand():
    """Two seeds, accuracy 50 -> 40 % and 60 -> 30 %: -10 and -30 points. pass@4 80 -> 84 and 90 -> 98 %: +4 and +8.
    t(1) = 12.706: half the interval is 12.706 times half the difference of the two."""
    runs = [{"start": {"accuracy": 0.5, "pass_at_k": 0.8}, "arm": {"accuracy": 0.4, "pass_at_k": 0.84}},
        {"start": {"accuracy": 0.6, "pass_at_k": 0.9}, "arm": {"accuracy": 0.3, "pass_at_k": 0.98}}]
    start, arm = results.with_pass_at_4(runs, "start", ["start", "arm", "absent"]).splitlines()[2:]
    assert start == "| start | 55.0 ± 63.5 |  | 85.0 ± 63.5 |  |"
    assert arm == "| arm | 35.0 ± 63.5 | -20.0 ± 127.1 | 91.0 ± 88.9 | +6.0 ± 25.4 |"
    assert results.with_pass_at_4(runs, "start", ["absent"]) == results.NOT_RUN


def test_products_are_right_and_the_same_each_time(tmp_path, monkeypatch):
    """The answer is what the problem's own text gives, and where the solution ends. Every seed trains on one file."""
    made = []
    for name in ["a", "b"]:
        path = tmp_path / name / "products.jsonl"
        monkeypatch.setattr("sys.argv", ["products.py", str(path)])
        products.main()
        made.append(path.read_text())
    assert made[0] == made[1]
    train, held_out = load_problems(str(path))
    assert len(train) > 10_000 and len(held_out) > 400
    for p in train[:100]:
        a, b, c = map(int, re.fullmatch(r"Compute (\d+)\*(\d+)\+(\d+)\.", p.problem).groups())
        assert p.answer == str(a * b + c) and p.solution == f"{a}*{b}={a * b}. {a * b}+{c}={p.answer}."
        assert a > 11 and b > 2


def test_an_arm_that_a_seed_lacks_is_no_row(tmp_path):
    """A mean over three seeds beside one over five compares seeds, not arms."""
    for seed, names in enumerate(["ab", "bc", "b"]):
        (tmp_path / f"seed{seed}.json").write_text(json.dumps({name: seed for name in names}))
    assert results.load_runs(tmp_path) == [{"b": 0}, {"b": 1}, {"b": 2}]


def test_a_seeds_folder_is_read(tmp_path, monkeypatch):
    """eval.json's figures, the path where training evaluated, the KL at the first step and the last ten."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    folder = tmp_path / "seed7" / "all"
    folder.mkdir(parents=True)
    keys = ["accuracy", "length", "think_length", "truncated", "doubt", "pass_at_k", "maj_at_k"]
    slips = {"first_results": 9, "slips": 1}
    (folder / "eval.json").write_text(json.dumps({"checkpoints": [dict.fromkeys(keys, 0.123456) | {"slips": slips}]}))
    log = [{"step": 0, "eval/accuracy": 0.5, "eval/len_mean": 70}]
    log += [{"step": step, "distill/kl": step, "distill/kept_frac": 1} for step in range(1, 21)]
    log[20] |= {"distill/kl_incorrect": 8, "eval/accuracy": 0.9, "eval/len_mean": 40}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, log)))
    results.collect(tmp_path / "seed7")
    (row,) = results.load_runs(tmp_path / "results")
    assert row["all"] == dict.fromkeys(keys, 0.12346) | {"slips": slips, "path": [[0, 70, 0.5], [20, 40, 0.9]],
        "first": {"kept_frac": 1, "kl": 1}, "last_10": {"kept_frac": 1, "kl": 15.5, "kl_incorrect": 8}}


def test_a_folder_without_runs_is_refused(tmp_path, monkeypatch, fails_with):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    fails_with(lambda: results.collect(tmp_path), tmp_path, "eval.json")
    fails_with(lambda: results.load_runs(tmp_path), tmp_path, "seedN.json")


def test_a_table_is_written_between_its_marks(tmp_path, monkeypatch, capsys):
    """What stands around it stays; a page without the mark stays as it is, and stderr says so."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: A -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    results.write(page, {"A": "| new |", "B": "| other |"})
    assert page.read_text() == ("before\n<!-- table: A -->\n\n| new |\n\n<!-- end -->\nafter <!-- end -->\n")
    assert "page.md has no <!-- table: B -->" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# The figure


def drawn(figure, name):
    """The points of a curve or of a panel's frame, in the coordinates of the .svg file, and its style."""
    (group,) = [g for g in figure.iter("{http://www.w3.org/2000/svg}g") if g.get("id") == name]
    (path,) = group.iter("{http://www.w3.org/2000/svg}path")
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]
    return points, path.get("style")


@pytest.mark.parametrize("title", results.PANELS)
def test_the_committed_figure_shows_the_committed_runs(title):
    """Each curve of results.svg, read back from its coordinates within its panel's frame: to 0.02 tokens and
    points. Bytes would differ with the version of matplotlib."""
    runs, figure = results.load_runs(), ElementTree.parse(HERE / "results.svg")
    start, names = results.PANELS[title]
    frame, _ = drawn(figure, f"panel-{start}")
    left, right = min(x for x, _ in frame), max(x for x, _ in frame)
    top, bottom = min(y for _, y in frame), max(y for _, y in frame)
    low, high = results.LENGTHS
    worst, best = results.ACCURACIES
    for arm, (_, colour, _, _) in zip(names, results.STYLES):
        if not any(arm in run for run in runs):
            continue
        curve, style = drawn(figure, arm)
        shown = [(low + (high - low) * (x - left) / (right - left),
            worst + (best - worst) * (bottom - y) / (bottom - top)) for x, y in curve]
        expected = results.mean_path(runs, arm)
        assert len(shown) == len(expected) >= 2
        for (length, accuracy), (expected_length, expected_accuracy) in zip(shown, expected):
            assert length == pytest.approx(expected_length, abs=0.02)
            assert accuracy == pytest.approx(expected_accuracy, abs=0.02)
        assert f"stroke: {colour.lower()}" in style
    assert len({colour for _, colour, _, _ in results.STYLES}) == 4


def test_a_curve_is_a_mean_over_the_seeds_that_have_the_arm():
    """Lengths 60 and 50 -> 55, accuracies 0.9 and 0.7 -> 80 %; the third seed lacks the arm."""
    one, two = [[0, 60, 0.9], [10, 40, 1.0]], [[0, 50, 0.7], [10, 30, 0.9]]
    runs = [{"a": {"path": one}}, {"a": {"path": two}}, {"b": {"path": two}}]
    assert results.mean_path(runs, "a") == [(55, pytest.approx(80)), (35, pytest.approx(95))]


# ------------------------------------------------------------------------------------------------------------
# The anatomy


def test_slips_and_checks_by_hand():
    """27+8=33 is a slip and is checked, 35*2=70 is right and is not, 70-1=69 is right and is."""
    text = "27+8=33. Wait, 27+8=35 no. 35*2=70. 70-1=69. Wait, 70-1=69 ok."
    assert anatomy.measure_habits([SimpleNamespace(text=text, problem=Problem("", ""))]) == {"slips": pytest.approx(1 / 3),
        "checked_after_a_slip": 1, "checked_after_a_right_result": 0.5}


def test_teachers_by_hand(tokenizer):
    """Two responses to one problem, the same whatever is shown, if anything: one is right; the other boxes 71
    after a chain that ends in 72. What is shown stands in the prompt."""
    problem = Problem("Compute 36*2.", "72", "36*2=72.")
    prompts = []

    def generate(given, n, **flags):
        prompts.extend(tokenizer.decode(ids) for ids in given)
        texts = [rf"<think>36*2=72.</think>\boxed{{{box}}}<|end|>" for box in (72, 71)]
        return [Rollout([], tokenizer.encode(text), [], True) for text in texts]

    found = anatomy.measure_teachers(SimpleNamespace(tokenizer=tokenizer, generate=generate), [problem], 2)
    length = len(tokenizer.encode(r"<think>36*2=72.</think>\boxed{72}<|end|>"))
    assert found == dict.fromkeys(["nothing", "solution", "answer", "concise"],
        {"accuracy": 0.5, "length": length, "contradictions": 0.5})
    assert ["36*2=72." in prompt for prompt in prompts] == [False, True, False, False]
    assert ["72" in prompt for prompt in prompts] == [False, True, True, False]


def test_problems_are_sorted_by_what_sft_gets_right():
    """Four responses to each of three problems: SFT has 4, 3 and 1 right. Before, the first problem has 2
    of 4 right at 10 tokens; after, all at 5."""

    def rollouts(right_counts, lengths, text="Wait"):
        made = []
        for right, length in zip(right_counts, lengths):
            for label in ["correct"] * right + ["incorrect"] * (4 - right):
                made.append(SimpleNamespace(label=label, response_ids=[0] * length, text=text))
        return made

    by_sft, by_before = rollouts([4, 3, 1], [1, 1, 1]), rollouts([2, 4, 0], [10, 20, 30])
    by_after = rollouts([4, 4, 1], [5, 10, 15], "no word")
    rows = anatomy.measure_difficulty(by_sft, by_before, by_after, 4)
    assert rows["all"] == {"problems": 1, "accuracy_before": 0.5, "length_before": 10, "doubt_before": 1,
        "accuracy_after": 1, "length_after": 5, "doubt_after": 0}
    assert rows["three quarters"]["length_before"] == 20 and rows["fewer"]["accuracy_after"] == 0.25
    assert rows["half"] == dict.fromkeys(rows["all"]) | {"problems": 0}  # no problem: nothing to average


def test_seeds_are_averaged_key_by_key():
    """A token that one seed hardly uses is left out; a figure that one seed lacks is the others' mean."""
    assert anatomy.merge([{"a": 1, "b": [1, 2], "c": 5}, {"a": 3, "b": [3, None]}]) == {"a": 2, "b": [2, 2]}
