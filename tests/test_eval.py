"""eval.py: the figures of a checkpoint and how sure they are."""

import itertools
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import encode_by_character, full_log_probs, make_tiny

import eval as evaluation  # the file is called eval.py, and the name is Python's own
from rollout import HFSampler, Problem, Rollout, label_rollouts, read_problems, render_prompt
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


def test_thinking_length(tokenizer):
    """Measured by the last character, or in characters, shorter thinking hides behind a longer answer."""
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    length = lambda text: evaluation.thinking_length(ids(text), tokenizer)  # noqa: E731
    assert length("<think></think>\\boxed{1}") == 2
    assert length("<think>1+2=3.</think>\\boxed{3}") == len(ids("<think>1+2=3.</think>"))
    assert length("<think>1+2=") == len(ids("<think>1+2="))  # cut off while thinking
    assert length("\\boxed{3}") == 0
    assert length("1+2=3.</think>\\boxed{3}") == len(ids("1+2=3.</think>"))  # opened by the prompt's template
    assert length("</think>a</think>") == 1


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

    def evaluate(sampler, problems, *, max_new_tokens, temperature, n, seed, thinking):
        assert (max_new_tokens, temperature, n, seed, thinking) == (50, 0.6, 4, 1, False)
        return label_rollouts(rollouts, problems, tokenizer)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    args = SimpleNamespace(n=4, k=2, max_new_tokens=50, temperature=0.6, seed=1, thinking=False)
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
    args = SimpleNamespace(n=2, k=1, max_new_tokens=6, temperature=1.0, seed=0, thinking=True)
    sampler = HFSampler(model, tokenizer)
    first, second = (evaluation.evaluate_checkpoint("x", sampler, problems, args) for _ in range(2))
    assert [r.response_ids for r in first[2]] == [r.response_ids for r in second[2]]
    change = evaluation.paired_change(second[1], first[1], seed=0)
    assert change["length_change_ci95"] == change["accuracy_change_ci95"] == [0, 0]


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


def test_wrap():
    """Nothing is lost, no line is wider than its column, a token is cut only where it fits no line."""
    pieces = [("abc", 1), (" de", 0), ("fghijklmnop", 2), ("q\nr", 0), ("", 0), (" st", 0)]
    lines = evaluation.wrap(pieces, 5)
    text = ["".join(part for part, _ in line) for line in lines]
    assert text == ["abc", " de", "fghij", "klmno", "pq", "r st"]
    assert [colour for _, colour in lines[2]] == [2]
    rng = random.Random(0)
    for _ in range(200):
        words = ["".join(rng.choice("ab \n") for _ in range(rng.randint(1, 9))) for _ in range(9)]
        width = rng.randint(1, 12)
        lines = evaluation.wrap([(word, 0) for word in words], width)
        text = ["".join(part for part, _ in line) for line in lines]
        assert max(map(len, text)) <= width and "".join(text) == "".join(words).replace("\n", "")


def test_red_is_what_distillation_would_remove(tokenizer, problems, monkeypatch, capsys):
    """Colours the wrong way round tell the opposite story. Student .4 .4 .4, teacher .1 .9 .5 on what was said:
    a quarter, red (41); over twice, green (42); hardly more, none."""
    said = [tokenizer.encode(text, add_special_tokens=False)[0] for text in ("1", "2", "3")]
    student = torch.full((3, len(tokenizer)), -20.0)
    teacher = student.clone()
    for t, (token, p) in enumerate(zip(said, (0.1, 0.9, 0.5))):
        student[t, token], student[t, 0] = math.log(0.4), math.log(0.6)
        teacher[t, token], teacher[t, 0] = math.log(p), math.log(1 - p)
    rollout = Rollout([1], said, [0.0] * 3, False, problems[0], label="truncated")
    sampler = SimpleNamespace(sync=lambda model: None)
    for name, value in {"load_model": (None, tokenizer), "make_sampler": sampler, "evaluate": [rollout],
            "teacher_gap": [student, teacher]}.items():  # fmt: skip
        monkeypatch.setattr(evaluation, name, lambda *args, value=value, **kwargs: value)
    monkeypatch.setattr(evaluation.sys.stdout, "isatty", lambda: True, raising=False)
    args = SimpleNamespace(checkpoints=["x"], device="cpu", sampler="hf", max_new_tokens=3, temperature=1.0, seed=0,
        thinking=True)  # fmt: skip
    evaluation.print_example(problems[0], args)
    assert "\033[41m1\033[0m\033[42m2\033[0m3" in capsys.readouterr().out
