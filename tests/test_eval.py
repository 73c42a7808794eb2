"""eval.py: the figures of a checkpoint and how sure they are."""

import itertools
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import encode_by_character, full_log_probs, make_tiny
from test_chain import base_fixture, run_stage  # noqa: F401  (base_fixture: the pytest fixture base)

import eval as evaluation  # the file is called eval.py, and the name is Python's own
from rollout import HFSampler, Problem, Rollout, label_rollouts, load_problems, load_tokenizer, read_problems
from rollout import render_prompt
from sft import render_response


@pytest.mark.parametrize("n, k", [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3)])
def test_pass_at_k_is_the_share_of_all_subsets(n, k):
    """1 - (1 - c/n)^k is biased: it draws with replacement. Brute force over every choice of k among n."""
    for c in range(n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        share = sum(map(any, subsets)) / len(subsets)
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_majority_by_hand():
    """Votes without an answer must not win, and of equals the first seen does."""
    box, majority = "\\boxed{{{}}}".format, evaluation.majority_correct
    assert majority([box(3), box(7), box(7)], "7") == 1
    assert majority([box(3), box(7), box(7)], "3") == 0
    assert majority([box(3), box(7)], "3") == 1 and majority([box(7), box(3)], "3") == 0
    assert majority(["I give up", "so do I", box(3)], "3") == 1
    assert majority(["I give up"], "3") == 0 and majority([], "3") == 0
    assert majority([box("0.50")], "1/2") == 1


def test_mean_and_standard_error_by_hand():
    """1 0 1 0: mean .5, variance 4 * .25 / 3 = 1/3, standard error sqrt(1/3 / 4) = .2886751 (1/n in place of
    1/(n-1) would say .25). One problem has no error to speak of."""
    assert evaluation.mean_and_se([1, 0, 1, 0]) == pytest.approx((0.5, 0.2886751), abs=1e-7)
    assert evaluation.mean_and_se([2.0, 4.0, 9.0]) == pytest.approx((5, math.sqrt(13 / 3)), abs=1e-7)
    assert evaluation.mean_and_se([7]) == (7, 0)


def test_the_bootstrap_interval_is_reproducible_and_tight():
    """An interval that moves from call to call cannot be compared; constant values leave no doubt at all.

    400 coins, half of them heads: a standard error of .025, so .5 -+ 1.96 * .025 = .451 to .549.
    """
    coins = [0.0, 1.0] * 200
    interval = evaluation.bootstrap_interval(coins, seed=3)
    assert interval == evaluation.bootstrap_interval(coins, seed=3)
    assert interval != evaluation.bootstrap_interval(coins, seed=4)
    assert interval == pytest.approx([0.451, 0.549], abs=0.006)
    assert evaluation.bootstrap_interval([0.25] * 10, seed=0) == [0.25, 0.25]


def test_the_bootstrap_interval_covers_the_truth_19_times_in_20():
    """90 % and 95 % look alike in one table. 300 samples of 60 values with mean 0: with 95 % covered, a share
    of .95 -+ 3 sqrt(.95 * .05 / 300) = .91 to .99."""
    rng, covered = random.Random(0), 0
    for seed in range(300):
        low, high = evaluation.bootstrap_interval([rng.gauss(0, 1) for _ in range(60)], seed, resamples=500)
        covered += low <= 0 <= high
    assert 0.91 <= covered / 300 <= 0.99


def test_a_paired_change_by_hand():
    """Unpaired, what the problems have in common counts as noise twice, and a real change drowns in it.

    Accuracy .1 .5 .9 -> .2 .6 1.0: +.1 on every problem, so the interval is a point.
    Length 10 20 30 -> 8 16 24: -2, -4, -6 over the mean of 20 before: -.1, -.2, -.3, mean -.2.
    """
    before = {"accuracy": [0.1, 0.5, 0.9], "length": [10.0, 20.0, 30.0]}
    now = {"accuracy": [0.2, 0.6, 1.0], "length": [8.0, 16.0, 24.0]}
    change = evaluation.paired_change(now, before, seed=0)
    assert change["accuracy_change"] == pytest.approx(0.1)
    assert change["accuracy_change_ci95"] == pytest.approx([0.1, 0.1])
    assert change["length_change"] == pytest.approx(-0.2)
    assert change["length_change_ci95"] == pytest.approx([-0.3, -0.1])
    assert evaluation.paired_change(before, before, seed=0)["length_change_ci95"] == [0, 0]


def test_thinking_length(thinker):
    """Measured by the last character, or in characters, shorter thinking hides behind a longer answer. What
    the prompt opened, and what verify.py finds no answer after, is thinking here as well."""

    def ids(text):
        text = text.removeprefix("<think>") if thinker.opens else text
        return thinker.encode(text, add_special_tokens=False)

    def length(text, thinking=True):
        prompt = render_prompt(thinker, Problem("a", "3"), thinking=thinking)
        said = Rollout(prompt, ids(text), [-1.0] * len(ids(text)), finished=False)
        return evaluation.thinking_length(label_rollouts([said], [Problem("a", "3")], thinker)[0], thinker)

    assert length("<think></think>\\boxed{1}") == len(ids("<think></think>"))
    assert length("<think>1+2=3.</think>\\boxed{3}") == len(ids("<think>1+2=3.</think>"))
    assert length("<think>1+2=") == len(ids("<think>1+2="))  # cut off while thinking
    assert length("<think>a</think>b<think>c") == len(ids("<think>a</think>b<think>c"))  # it does not end
    assert length("<think>a</think>b</think>\\boxed{1}") == len(ids("<think>a</think>b</think>"))
    assert length("\\boxed{3}", thinking=False) == 0
    assert length("1+2=3.</think>\\boxed{3}") == len(ids("1+2=3.</think>"))


def test_the_figures_of_a_checkpoint_by_hand(tokenizer, monkeypatch):
    """The problem is the unit: responses to one problem are averaged first, or the error comes out too small.

    a (gold 3): 3 3 7 and a cut-off 3.  b (gold 7): 3 3 3 7, each with one `Wait`.
    Accuracy .5 and .25: mean .375, error .125. Truncated .25 and 0. pass@2: 1 - C(2,2)/C(4,2) = 5/6, and
    1 - C(3,2)/C(4,2) = 1/2: mean 2/3. Majority: a is right, b is wrong. Doubt: 0 and 1.
    """
    problems = [Problem("a", "3"), Problem("b", "7")]

    def said(answer, word="", finished=True):
        text = f"<think>{word}</think>\\boxed{{{answer}}}"
        ids = encode_by_character(tokenizer, text) + [tokenizer.eos_token_id] * finished
        return Rollout([1], ids, [-1.0] * len(ids), finished)

    rollouts = [said(3), said(3), said(7), said(3, finished=False)]
    rollouts += [said(n, " Wait, ") for n in (3, 3, 3, 7)]

    def evaluate(sampler, problems, *, max_new_tokens, temperature, n, seed, thinking, context):
        assert (max_new_tokens, temperature, n, seed, thinking, context) == (50, 0.6, 4, 1, False, "answer")
        return label_rollouts(rollouts, problems, tokenizer)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    args = SimpleNamespace(n=4, k=2, max_new_tokens=50, temperature=0.6, seed=1, thinking=False,
        context="answer")
    sampler = SimpleNamespace(tokenizer=tokenizer)
    row, per_problem, _ = evaluation.evaluate_checkpoint("ckpt/x", sampler, problems, args)
    assert per_problem["accuracy"] == [0.5, 0.25] and per_problem["truncated"] == [0.25, 0]
    assert (row["accuracy"], row["accuracy_se"]) == pytest.approx((0.375, 0.125))
    assert row["pass_at_k"] == pytest.approx(2 / 3) and per_problem["maj_at_k"] == [1, 0]
    assert per_problem["doubt"] == [0, 1]
    lengths = [len(r.response_ids) for r in rollouts]
    assert per_problem["length"] == [sum(lengths[:4]) / 4, sum(lengths[4:]) / 4]


def test_a_checkpoint_against_itself_does_not_change(tokenizer, problems):
    """Same problems, same luck: two identical checkpoints say the same, and the change is exactly 0."""
    model = make_tiny(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id, context=256)
    args = SimpleNamespace(n=2, k=1, max_new_tokens=6, temperature=1.0, seed=0, thinking=True, context=None)
    sampler = HFSampler(model, tokenizer)
    first, second = (evaluation.evaluate_checkpoint("x", sampler, problems, args) for _ in range(2))
    assert [r.response_ids for r in first[2]] == [r.response_ids for r in second[2]]
    change = evaluation.paired_change(second[1], first[1], seed=0)
    assert change["length_change_ci95"] == change["accuracy_change_ci95"] == [0, 0]


RIGHT, RIGHT_CHECKED = (False, "neither"), (False, "checked")
MENDED, CHECKED, NEITHER = (True, "mended"), (True, "checked"), (True, "neither")
FIRST_RESULTS = [
    ("27+8=33. Wait, 27+8=35 no. 35*2=70.</think>\\boxed{70}", [MENDED, RIGHT]),
    ("27+8=33. Wait, 27+8=35 no.</think>\\boxed{35}", [MENDED]),
    ("27+8=33. 33*2=66.</think>\\boxed{66}", [NEITHER, RIGHT]),  # it inherits a slip, and is none
    ("27+8=33. 35*2=70.</think>\\boxed{70}", [NEITHER, RIGHT]),  # right after all, but nobody checked
    ("27+8=33. Wait, 27+8=33 ok. 33*2=66.", [CHECKED, RIGHT]),  # a check that is wrong
    ("27+8=33. Wait, 27+8=33 ok. 35*2=70.", [CHECKED, RIGHT]),  # right after all, but by no check
    ("27+8=33. Wait, 27+8=35 no. 33*2=66.", [CHECKED, RIGHT]),  # it goes on from the slip
    ("27+8=33. Wait, 27+8=35 no.</think>\\boxed{33}", [CHECKED]),  # it ends with the slip
    ("27+8=33. Wait, 27+8=33 ok. Wait, 27+8=35 no. 35-1=34.", [MENDED, RIGHT]),
    ("27+8=33. Wait, 27+8=35 no. Wait, 27+8=35 ok. 35-1=34.", [MENDED, RIGHT]),
    ("27+8=33. Wait, 27+8=35 no. Wait, 27+8=33 no. 33-1=32.", [CHECKED, RIGHT]),
    ("27+8=35. Wait, 27+8=35 ok. Wait, 27+8=35 ok. 35*2=70.", [RIGHT_CHECKED, RIGHT]),
    ("27+8=35. Wait, 27+8=33 no. 33*2=66.", [RIGHT_CHECKED, RIGHT]),
    ("27+8=33. 33*2=70. Wait, 33*2=66 no. 66-1=65.", [NEITHER, MENDED, RIGHT]),  # of the second step only
    ("Wait, 1+1=2 ok. 27+8=33.", [NEITHER]),  # a check at the start is of nothing
    ("27+8=33. Wait, 27+8=35 no. 35*", [MENDED]),  # cut off
    ("27+8=33. Wait, 27+8=3", [NEITHER]),  # the check may have become 35
    ("27+8=35. 35*2=7", [RIGHT]),  # the result may have become 70
    ("27+8=33. Wait, 27+8=35 no.", [MENDED]),
    ("97*14=1358. 1358-999=359. 9*0=0.", [RIGHT, RIGHT, RIGHT]),
    ("1-3=-2. -2+5=3. 0-7=7. Wait, 0-7=-7 no. -7*2=-14.", [RIGHT, RIGHT, MENDED, RIGHT]),  # below zero
    ("1+1=" + "2" * 5000 + ". 1+1=2.", [RIGHT]),  # int() refuses it
    ("so it is 35", []), ("", []),
]  # fmt: skip


@pytest.mark.parametrize("text, found", FIRST_RESULTS)
def test_what_becomes_of_a_slip(text, found):
    """27+8=35. Whoever calls every slip with a `Wait` after it mended reports a checker that mends nothing as
    a perfect one; whoever looks at the answer only calls a step that goes on from a slip a slip as well."""
    assert evaluation.first_results(text) == found
    assert evaluation.first_results("<think>" + text) == found
    assert evaluation.first_results(text.replace("</think>", " ")) == found  # as of --no-thinking


def test_slips_are_counted_over_all_responses(capsys):
    """Twelve first results, eight of them slips: one mended, two checked, five neither. Of the four right ones
    three are checked. Shares of what is not there are no zeros: who never slips has not failed to mend."""
    texts = ["27+8=33. Wait, 27+8=35 no."] + 2 * ["27+8=33. Wait, 27+8=33 ok."] + 5 * ["27+8=33. 33-3="]
    texts += 3 * ["4+4=8. Wait, 4+4=8 ok."] + ["4+4=8. Wait"]
    counts = evaluation.count_slips([SimpleNamespace(text=text, problem=Problem("", "")) for text in texts])
    assert counts == {"first_results": 12, "slips": 8, "mended": 1, "checked": 2, "neither": 5,
        "right_checked": 3, "responses": 12, "contradictions": 0}  # fmt: skip
    figures = """accuracy accuracy_se length length_se think_length truncated doubt pass_at_k maj_at_k k n
        accuracy_change length_change""".split()
    intervals = dict.fromkeys(["accuracy_change_ci95", "length_change_ci95"], [0, 0])
    row = {"checkpoint": "ckpt/x", **dict.fromkeys(figures, 1), **intervals}
    none = evaluation.count_slips([])
    evaluation.print_table([row | {"slips": counts}, row | {"slips": none}])
    table = capsys.readouterr().out.split("what became of slips")[1].splitlines()
    assert table[1].split() == ["ckpt/x", "12", "66.7", "12.5", "25.0", "62.5", "75.0", "0.0"]
    assert table[2].split() == ["ckpt/x", "0", *6 * ["-"]]
    assert len({len(line) for line in table[1:]}) == 1  # columns
    evaluation.print_table([row])
    assert "slips" not in capsys.readouterr().out


@pytest.mark.parametrize("text, problem, contradicts", [
    ("1+1=2.</think>\\boxed{2}", "Compute 1+1.", False),
    ("1+1=3.</think>\\boxed{2}", "Compute 1+1.", True),  # right, and not by its chain
    ("1+1=3. Wait, 1+1=2 no.</think>\\boxed{2}", "Compute 1+1.", False),  # the check is the last word
    ("1+1=3.</think>\\boxed{yes}", "Is 1+1 even?", True), ("1+1=3.</think>\\boxed{no}", "Is 1+1 even?", False),
    ("1+1=3.", "Compute 1+1.", False), ("</think>\\boxed{3}", "Compute 1+1.", False),  # one of the two is missing
])  # fmt: skip
def test_a_response_that_contradicts_its_own_chain(text, problem, contradicts):
    """What a student learns from teachers who know the answer and not the steps. The gold plays no part."""
    assert evaluation.box_contradicts(text, problem) == contradicts


def test_a_slip_of_parity_is_mended_if_the_answer_says_so():
    """The answer is no number: compared with the check's result, no last slip would ever be mended."""
    text = "27+8=34. Wait, 27+8=35 no.</think>\\boxed{%s}"
    assert evaluation.first_results(text % "no", "Is 27+8 even?") == [MENDED]
    assert evaluation.first_results(text % "yes", "Is 27+8 even?") == [CHECKED]


def test_only_the_built_in_world_has_slips(base):
    """In another data set `2+3=5` may be anything. Without --data it is that of the first checkpoint."""
    own = Path(shutil.copytree(base / "sft", "own"))
    saved = json.loads((own / "args.json").read_text())
    (own / "args.json").write_text(json.dumps(saved | {"data": "arithmetic", "columns": ""}))
    flags = "--problems 2 --n 1 --max-new-tokens 4 --json result.json"
    for path, data, has_slips in [(own, [], True), (own, ["--data", base / "problems.jsonl"], False),
            (base / "sft", [], False), (base / "sft", ["--data arithmetic"], True)]:  # fmt: skip
        status, out, err = run_stage(evaluation, path, flags, *data)
        assert status == 0, err
        assert ("what became of slips" in out) == has_slips
        row = json.loads(Path("result.json").read_text())["checkpoints"][0]
        assert ("slips" in row) == has_slips


def test_the_shortest_correct_response_becomes_data(tokenizer, tmp_path):
    """A wrong or cut-off response that is shorter must not win, and a problem never solved gives no row.

    a (gold 3): the wrong 7 and the cut-off 3 are shorter than both correct ones. b (gold 9): never right.
    """
    texts = ["<think></think>\\boxed{7}", "<think>so it is long</think>\\boxed{3}", "<think>so</think>\\boxed{3}",
        "\\boxed{3}", "\\boxed{1}", "\\boxed{2}", "\\boxed{3}", "\\boxed{4}"]  # fmt: skip
    rollouts = []
    for i, text in enumerate(texts):
        ids = encode_by_character(tokenizer, text) + [tokenizer.eos_token_id] * (i != 3)
        rollouts.append(Rollout([1], ids, [-1.0] * len(ids), finished=i != 3))
    label_rollouts(rollouts, [Problem("a", "3"), Problem("b", "9")], tokenizer)
    path = tmp_path / "shortest.jsonl"
    evaluation.write_shortest(rollouts, SimpleNamespace(n=4, shortest=str(path), checkpoints=["ckpt/rlvr"]))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"problem": "a", "answer": "3", "solution": texts[2]}]
    problem = read_problems(str(path))[0]
    assert render_response(problem.solution, problem.answer) == texts[2]  # sft.py teaches it as it was said


def test_the_gap_is_the_same_weights_with_and_without_the_solution(tokenizer, problems):
    """Student and teacher read the same response ids; one of the two prompts holds the solution. An off-by-one
    shows the doubt of the token before."""
    model = make_tiny(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id, context=256)
    problem = problems[0]
    prompt = render_prompt(tokenizer, problem)
    rollout = Rollout(prompt, [5, 9, 30, tokenizer.eos_token_id], [0.0] * 4, True, problem)
    student, teacher = evaluation.teacher_gap(model, tokenizer, rollout, thinking=True)
    shown = render_prompt(tokenizer, problem, "solution", problem.solution)
    with torch.no_grad():
        torch.testing.assert_close(student, full_log_probs(model, prompt, rollout.response_ids))
        torch.testing.assert_close(teacher, full_log_probs(model, shown, rollout.response_ids))
    assert (student - teacher).abs().max() > 0.01


@pytest.mark.parametrize("context", ["solution", "answer", "concise"])
def test_a_checkpoint_is_judged_as_a_teacher(base, monkeypatch, context):
    """With --context it reads what opsd.py's teacher reads. A problem that fits without it may not fit with it."""
    asked, generate, lengths = [], HFSampler.generate, []

    def spy(self, prompts, *args, **kwargs):
        asked.extend(prompts)
        return generate(self, prompts, *args, **kwargs)

    def count(problems, model, tokenizer, args, *context):
        lengths.append(context)
        return problems

    monkeypatch.setattr(HFSampler, "generate", spy)
    monkeypatch.setattr(evaluation, "fitting_prompts", count)
    flags = "--data arithmetic --problems 3 --n 1 --max-new-tokens 4 --json r.json --context"
    status, out, err = run_stage(evaluation, base / "sft", flags, context)
    assert status == 0, err
    assert f"1 responses to each; --context {context})" in out and lengths == [(context,)]
    assert json.loads(Path("r.json").read_text())["checkpoints"][0]["context"] == context
    tokenizer = load_tokenizer(str(base / "sft"))
    problems = load_problems("arithmetic")[1][:3]
    shown = {"solution": "A correct solution: {}", "answer": "The correct answer: {}", "concise": "without needless"}
    for problem, prompt in zip(problems, asked[-3:], strict=True):  # before them the check at start
        assert prompt == render_prompt(tokenizer, problem, context, getattr(problem, context, ""))
        assert shown[context].format(getattr(problem, context, "")) in tokenizer.decode(prompt)


def test_a_teacher_needs_a_solution_to_be_shown(base):
    Path("bare.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    status, _, err = run_stage(evaluation, base / "sft", "--data bare.jsonl --context solution")
    assert status == 2 and err.count("\n") == 1 and "'1+1?' has no `solution`" in err, err


# ------------------------------------------------------------------------------------------------------------
# One problem, token by token


def toy_gap(tokenizer, student, teacher):
    """Two lists of {text: probability}, one for each response token -> log-probs (|y|, V) of both. What is
    left of each row goes to token 0."""
    log_probs = []
    for rows in (student, teacher):
        table = torch.full((len(rows), len(tokenizer)), 1e-12)
        for row, probabilities in zip(table, rows):
            for text, p in probabilities.items():
                row[tokenizer.encode(text, add_special_tokens=False)[0]] = p
            row[0] = max(1e-12, 1 - sum(probabilities.values()))
        log_probs.append(table.log())
    return log_probs


@pytest.fixture(name="toy")
def toy_fixture(tokenizer, problems, monkeypatch):
    """toy(said, student, teacher) -> args of show_example, which now gets this response and these two."""

    def make(said, student, teacher):
        ids = [tokenizer.encode(text, add_special_tokens=False)[0] for text in said]
        rollout = Rollout([1], ids, [0.0] * len(ids), False, problems[0], label="truncated")
        sampler = SimpleNamespace(model=None, tokenizer=tokenizer)
        returned = {"load_model": (make_tiny(), tokenizer), "make_sampler": sampler, "evaluate": [rollout],
            "teacher_gap": toy_gap(tokenizer, student, teacher)}  # fmt: skip
        for name, value in returned.items():
            monkeypatch.setattr(evaluation, name, lambda *args, value=value, **kwargs: value)
        return SimpleNamespace(checkpoints=["x"], device="cpu", sampler="hf", max_new_tokens=3,
            temperature=1.0, seed=0, thinking=True, html=None, all_tokens=False, context=None)  # fmt: skip

    return make


def test_the_tokens_of_an_example_by_hand(tokenizer, problems, monkeypatch):
    """KL the wrong way round looks plausible.

    Student .5 .25 .25, teacher .25 .25 .5: ln 2 * (.5 - .25) = .1733. Student .9 .1, teacher .1 .9:
    .8 ln 9 = 1.7578. Student .5 .5, teacher .9 .1: .5 ln(.25 / .09) = .5108, the other way round .3681.
    """
    student = [{"1": 0.5, "2": 0.25}, {"1": 0.9, "2": 0.1}, {"1": 0.5, "2": 0.5}]
    teacher = [{"1": 0.25, "2": 0.25}, {"1": 0.1, "2": 0.9}, {"1": 0.9, "2": 0.1}]
    gap = toy_gap(tokenizer, student, teacher)
    monkeypatch.setattr(evaluation, "teacher_gap", lambda *args: gap)
    said = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ("1", "2", "1")]
    rollout = Rollout([1], said, [0.0] * 3, False, problems[0])
    tokens = evaluation.measure_tokens(None, tokenizer, rollout, thinking=True)
    assert [token["kl"] for token in tokens] == pytest.approx([0.1733, 1.7578, 0.5108], abs=1e-4)
    assert [token["student"] for token in tokens] == pytest.approx([0.5, 0.1, 0.5])
    assert [token["teacher"] for token in tokens] == pytest.approx([0.25, 0.9, 0.9])
    assert [(token["position"], token["text"]) for token in tokens] == [(0, "1"), (1, "2"), (2, "1")]
    assert [text for text, _ in tokens[1]["student_top"][:2]] == ["1", "2"]
    assert [text for text, _ in tokens[1]["teacher_top"][:2]] == ["2", "1"]
    assert [p for _, p in tokens[1]["teacher_top"][:2]] == pytest.approx([0.9, 0.1])
    assert all(len(token[name]) == 5 for token in tokens for name in ("student_top", "teacher_top"))


def test_red_is_what_distillation_would_remove(toy, problems, monkeypatch, capsys):
    """Colours the wrong way round tell the opposite story. Student .4 .4 .4, teacher .1 .9 .5 on what was
    said: a quarter, red (31); over twice, green (32); hardly more, none. In a file, no colour at all."""
    args = toy("123", [{"1": 0.4}, {"2": 0.4}, {"3": 0.4}], [{"1": 0.1}, {"2": 0.9}, {"3": 0.5}])
    evaluation.show_example(problems[0], args)
    assert "\033" not in capsys.readouterr().out
    monkeypatch.setattr(evaluation.sys.stdout, "isatty", lambda: True, raising=False)
    evaluation.show_example(problems[0], args)
    rows = capsys.readouterr().out.splitlines()[-3:]
    assert [row[:5] for row in rows] == ["\033[31m", "\033[32m", "     "]
    assert [row.endswith("\033[0m") for row in rows] == [True, True, False]


def test_five_tokens_or_all(toy, problems, capsys):
    """Without --all-tokens: the five of largest KL, in the order said. The student gives each token .5; the
    teacher, in turn, .4 .1 .5 .2 .3 .01 .02: tokens 0 and 2 are the closest."""
    said, teacher = "1234567", [0.4, 0.1, 0.5, 0.2, 0.3, 0.01, 0.02]
    args = toy(said, [{text: 0.5} for text in said], [{text: p} for text, p in zip(said, teacher)])

    def positions():
        evaluation.show_example(problems[0], args)
        table = capsys.readouterr().out.split("the teacher would say\n")[1]
        return [int(row.split()[0]) for row in table.splitlines()]

    assert positions() == [1, 3, 4, 5, 6]
    args.all_tokens = True
    assert positions() == list(range(7))


def test_columns_lose_nothing(problems, monkeypatch, capsys):
    """Responses of different length side by side: every word is there, no line is wider than the terminal."""
    monkeypatch.setenv("COLUMNS", "60")
    texts = [" ".join(f"{name}{i}" for i in range(count)) for name, count in [("left", 9), ("right", 30)]]
    texts[0] += "\n\n" + "long" * 20
    examples = [{"title": "t", "tokens": [{"text": text}]} for text in texts]
    evaluation.print_responses(problems[0], examples)
    lines = capsys.readouterr().out.split("answer:")[1].splitlines()[2:]
    assert max(map(len, lines)) <= 60
    for k, text in enumerate(texts):
        column = "".join(line[30 * k : 30 * k + 28] for line in lines)
        assert "".join(column.split()) == "t" + "".join(text.split())


# ------------------------------------------------------------------------------------------------------------
# --html

EVIL = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(2)>", "</think>"]
EVIL += ["a  b\nc", " ", "&amp;", "\n\n"]
TAGS = """html meta title style h1 pre p b span main section h2 div code table tr th td wbr""".split()


class Page(HTMLParser):
    """Reads a page as a browser does: the tags that are there, every token's text without its card."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.words, self.text, self.open = [], [], [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "div":
            self.open.append(dict(attrs)["class"])
            if self.open[-1] == "shade":
                self.words.append("")

    def handle_endtag(self, tag):
        if tag == "div":
            self.open.pop()

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "shade":
            self.words[-1] += data


def evil_page():
    tops = [(text, 0.2) for text in EVIL[:5]]
    tokens = [{"position": t, "text": text, "kl": 0.3 * t, "student": 0.5, "teacher": 0.25,
        "student_top": tops, "teacher_top": tops[::-1]} for t, text in enumerate(EVIL)]  # fmt: skip
    example = {"title": EVIL[0], "path": EVIL[1], "tokens": tokens, "mean_kl": 0.5}
    return evaluation.example_page(Problem(EVIL[0] + "?", EVIL[1], EVIL[2]), [example, example])


def test_a_page_escapes_what_a_model_says():
    """A model, a data set or a folder's name must not write the page: no script, no picture."""
    page = evil_page()
    assert "<script" not in page and "<img" not in page and "</think>" not in page
    read = Page(page)
    assert set(read.tags) <= set(TAGS)
    harmless = "lang charset name content class tabindex style colspan".split()
    assert {name for name, _ in read.attributes} <= set(harmless)
    assert {value for name, value in read.attributes if name == "class"} == {"shade", "response", "card"}
    assert all(text in read.text for text in EVIL[:3])  # and yet it can be read


def test_a_page_shows_every_token_as_it_is():
    """Blanks are kept, a line break is one and can be seen, and the card names the token as Python would."""
    read = Page(evil_page())
    assert read.words == [text.replace("\n", "↵\n") for text in EVIL] * 2
    assert all(repr(text) in read.text for text in EVIL)
    shades = [float(value.removeprefix("--kl:")) for name, value in read.attributes if name == "style"]
    scale, tokens = [0, 0.5, 1], [0, 0.3, 0.6, 0.9, 1, 1, 1]
    assert shades == pytest.approx(scale + 2 * tokens)
    assert read.attributes.count(("tabindex", "0")) == 2 * len(EVIL)  # for keyboards and taps


def test_a_page_needs_no_network():
    """It is opened from a mail, or offline: nothing in it loads anything."""
    page = evaluation.example_page(Problem("1+1?", "2", "1+1=2."), [])
    assert not re.search(r"https?:|//|url\(|@import|src=|href=", page)


def test_an_example_as_a_page(base):
    """From the command line: each checkpoint's response, whole, beside what the terminal shows."""
    flags = "--example --max-new-tokens 12 --data arithmetic --html page.html"
    status, out, err = run_stage(evaluation, base / "sft", base / "sft", flags)
    assert status == 0 and "the teacher would say" in out, err
    words = Page(Path("page.html").read_text(encoding="utf-8")).words
    assert 2 <= len(words) <= 24 and words[: len(words) // 2] == words[len(words) // 2 :]
    problem = out.split("problem:  ")[1].split("\n")[0]
    assert problem in Page(Path("page.html").read_text(encoding="utf-8")).text


# ------------------------------------------------------------------------------------------------------------
# --curves


def write_run(folder, points, name="metrics.jsonl", eval_problems=128):
    """A run's folder without a model: a log with training steps between, and its flags."""
    folder.mkdir(parents=True)
    rows = [{"step": 1, "loss": 0.5, "lr": 0.1}]
    rows += [{"step": step, "eval/accuracy": a, "eval/len_mean": n} for step, a, n in points]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "args.json").write_text(json.dumps({"eval_problems": eval_problems}))
    return folder


@pytest.fixture(name="runs")
def runs_fixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("load_model", "load_problems", "make_sampler", "evaluate", "require_device"):
        monkeypatch.setattr(evaluation, name, None)  # a call would raise: curves only read logs
    return [write_run(tmp_path / "ckpt" / "sft", [(0, 0, 150), (1000, 0.4, 90), (2000, 0.7, 70)]),
        write_run(tmp_path / "ckpt" / "rlvr", [(0, 0.7, 70), (50, 0.9, 68)])]  # fmt: skip


def test_the_curves_are_the_logs(runs, monkeypatch):
    """Two panels a stage, each with its own steps; percent and tokens; nothing of the training lines."""
    drawn = []
    monkeypatch.setattr(evaluation.Figure, "savefig", lambda *args, **more: drawn.append(args))
    assert run_stage(evaluation, *runs, "--curves c.svg")[0] == 0
    (figure, path), panels = drawn[0], drawn[0][0].axes
    assert path == "c.svg" and [panel.get_title() for panel in panels] == ["sft", "rlvr", "", ""]
    assert [panel.get_ylabel() for panel in panels] == ["accuracy (%)", "", "response length (tokens)", ""]
    lines = [panel.lines[0].get_xydata().tolist() for panel in panels]
    assert lines[0] == [[0, 0], [1000, 40], [2000, 70]] and lines[1] == [[0, 70], [50, 90]]
    assert lines[2] == [[0, 150], [1000, 90], [2000, 70]] and lines[3] == [[0, 70], [50, 68]]
    assert [panel.texts[0].get_text() for panel in panels] == ["70", "90", "70", "68"]
    assert "128 held-out problems" in figure.get_supxlabel()
    assert all(len({panel.lines[0].get_color() for panel in row}) == 1 for row in (panels[:2], panels[2:]))
    assert panels[0].lines[0].get_color() != panels[2].lines[0].get_color()
    assert panels[0].get_ylim()[1] > 100 and panels[2].get_ylim()[1] > 150  # nothing is cut off


def test_curves_of_runs_measured_on_different_problems(runs, tmp_path, monkeypatch):
    """The figure must not say 128 of a stage that was measured on 16."""
    drawn = []
    monkeypatch.setattr(evaluation.Figure, "savefig", lambda figure, *rest, **more: drawn.append(figure))
    few = write_run(tmp_path / "few", [(0, 0.5, 9)], eval_problems=16)
    assert run_stage(evaluation, *runs, few, "--curves c.png")[0] == 0
    assert "128, 128, 16 held-out problems" in drawn[0].get_supxlabel()


def test_the_same_logs_give_the_same_file(runs):
    """A figure in a repository that changes at every run hides what did change."""
    for name in ("a.svg", "b.svg", "c.png"):
        assert run_stage(evaluation, *runs, "--curves", name)[0] == 0
    svg = Path("a.svg").read_bytes()
    assert svg == Path("b.svg").read_bytes() and b"<dc:date>" not in svg
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("log, says", [(None, "metrics.jsonl: no such file"), ("", "eval/accuracy"),
    ('{"step": 1, "loss": 2.0}\n', "eval/accuracy"), ('{"step": 0, "eval/acc', "not a log")])
def test_no_curves_without_a_log(runs, tmp_path, log, says):
    """A checkpoint from elsewhere, a run that has measured nothing yet, a log that was cut off."""
    bare = tmp_path / "bare"
    bare.mkdir()
    if log is not None:
        (bare / "metrics.jsonl").write_text(log)
    status, _, err = run_stage(evaluation, *runs, bare, "--curves c.svg")
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ")
    assert says in err and "bare" in err
    assert not Path("c.svg").exists()


# ------------------------------------------------------------------------------------------------------------
# Flags

REFUSED = {
    "--temperature nan": "--temperature: nan",
    "--temperature -1": "--temperature: -1",
    "--temperature inf": "--temperature: inf",
    "--seed -1": "--seed: -1",
    "--seed 99999999999999999999": "--seed: 9",
    "--n -1": "--n: -1",
    "--k 0": "--k: 0",
    "--max-new-tokens 0": "--max-new-tokens: 0",
    "--problems 0": "--problems: 0",
    "--vllm-memory nan": "--vllm-memory: nan",
    "--html p.html": "add --example",
    "--all-tokens": "add --example",
    "--example --plot f.svg": "--example",
    "--example --samples s.jsonl": "--example",
    "--example --shortest s.jsonl": "--example",
    "--example --curves c.svg": "--example",
    "--example --html p.html --json r.json": "leave out --json\n",
    "--example --context answer": "leave out --context",
    "--context answer --shortest s.jsonl": "leave out --context",
    "--curves c.svg --context answer": "leave out --context",
    "--curves c.svg --json r.json": "leave out --json\n",
    "--curves c.svg --html p.html": "--html",
    "--curves c.pdf": "--curves c.pdf",
    "--example --html nowhere/p.html": "--html nowhere/p.html",
    "--json .": "--json .: must name a file",
    "--json /proc/x": "--json /proc/x: must name a file that can be written",
    "--samples /proc/x": "--samples /proc/x: must name a file that can be written",
}


def test_trying_a_file_leaves_it_as_it_was(base, monkeypatch):
    """A result of yesterday is there until there is another; a new file is not there before."""
    Path("old.json").write_text("yesterday's")
    flags = ["--json", "old.json", "--samples", "new.jsonl"]
    monkeypatch.setattr("sys.argv", ["eval.py", str(base / "sft"), *flags])
    evaluation.get_args()
    assert Path("old.json").read_text() == "yesterday's" and not Path("new.jsonl").exists()


@pytest.mark.parametrize("flags, says", REFUSED.items())
def test_flags_that_cannot_work(base, monkeypatch, flags, says):
    """Said in one line, before anything is loaded; nothing is written."""
    monkeypatch.setattr(evaluation, "load_model", None)  # a call would raise
    status, _, err = run_stage(evaluation, base / "sft", flags)
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ") and says in err, err
    assert not list(Path().iterdir())
