"""opsd.py: the divergence and its gradient, teacher and student token by token, which rollouts are kept."""

import copy
import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB, assert_same_gradient, full_log_probs, make_tiny, scripted_sampler, take_gradient

import opsd
import rollout
from rollout import Problem, Rollout
from verify import verify

KINDS = [("reverse", 0.5), ("forward", 0.5), ("jsd", 0.5), ("jsd", 0.3), ("split", 0.5)]
# Privileged prompts of the eight rollouts of conftest: other widths than the students', in no common order.
TEACHER_PROMPTS = [
    [(7 * i + 3 * j) % VOCAB for j in range(width)] for i, width in enumerate([9, 12, 4, 15, 8, 3, 11, 10])
]


@pytest.fixture
def rollouts(rollouts):
    """The eight rollouts of conftest, each with a prompt for the teacher."""
    for r, prompt in zip(rollouts, TEACHER_PROMPTS):
        r.teacher_prompt_ids = prompt
    return rollouts


@pytest.fixture
def teacher():
    """Other weights than the student's, and free to take a gradient, should one reach it."""
    return make_tiny(seed=1)


def plain_divergence(student, teacher, kind, beta, is_correct):
    """By the textbook, from log-probs in float64: sum over the vocabulary of p log(p / q)."""
    s, t = student.double().exp(), teacher.double().exp()
    kl = lambda p, q: (p * (p / q).log()).sum(-1)  # noqa: E731
    mixture = beta * t + (1 - beta) * s
    reverse, forward = kl(s, t), kl(t, s)
    jsd = beta * kl(t, mixture) + (1 - beta) * kl(s, mixture)
    split = torch.where(is_correct, reverse, forward)
    return {"reverse": reverse, "forward": forward, "jsd": jsd, "split": split}[kind]


# ------------------------------------------------------------------------------------------------------------
# The divergence


@pytest.mark.parametrize(
    "kind, beta, value",
    [
        ("reverse", 0.5, 0.1438410),  # .5 ln(.5/.25) + .5 ln(.5/.75)   = .3465736 - .2027326
        ("forward", 0.5, 0.1308120),  # .25 ln(.25/.5) + .75 ln(.75/.5) = -.1732868 + .3040988
        # M = .375 .625. KL(T||M) = .25 ln(2/3) + .75 ln 1.2 = .0353749,
        # KL(S||M) = .5 ln(4/3) + .5 ln .8 = .0322693, and half of each
        ("jsd", 0.5, 0.0338221),
        # M = .3 T + .7 S = .425 .575. KL(T||M) = .25 ln(10/17) + .75 ln(30/23) = .0666202,
        # KL(S||M) = .5 ln(20/17) + .5 ln(20/23) = .0113784, .3 * .0666202 + .7 * .0113784
        ("jsd", 0.3, 0.0279510),
    ],
)
def test_divergence_by_hand(kind, beta, value):
    """Swapped arguments give a divergence that is >= 0 too, and 0 at equality too: only numbers tell.

    S = 1/2 1/2, T = 1/4 3/4. Logits are given up to a constant, which must not matter.
    """
    student, teacher = torch.tensor([[3.0, 3.0]]), torch.tensor([[0.25, 0.75]]).log() - 5
    assert opsd.divergence(student, teacher, kind, beta).item() == pytest.approx(value, abs=1e-5)


def test_split_is_reverse_on_correct_and_forward_on_the_others():
    """The two directions swapped is the opposite experiment under the same name."""
    student, teacher = torch.zeros(3, 2), torch.tensor([0.25, 0.75]).log().expand(3, 2)
    values = opsd.divergence(student, teacher, "split", is_correct=torch.tensor([True, False, True]))
    assert values.tolist() == pytest.approx([0.1438410, 0.1308120, 0.1438410], abs=1e-5)


def test_the_gradient_by_hand():
    """Taken for an advantage, a full-vocabulary KL has a gradient of 0 in expectation; as a loss it has this.

    S = 1/2 1/2, T = 1/4 3/4. Forward: S - T = .25 -.25.
    Reverse: S (ln(S/T) - KL) = .5 (.6931472 - .1438410) = .2746531, and its opposite.
    """
    for kind, expected in [("forward", 0.25), ("reverse", 0.2746531)]:
        student = torch.zeros(1, 2, requires_grad=True)
        opsd.divergence(student, torch.tensor([[0.25, 0.75]]).log(), kind).sum().backward()
        assert student.grad[0].tolist() == pytest.approx([expected, -expected], abs=1e-5)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_the_gradient_is_the_slope(kind, beta):
    """A detached factor, such as p in p log(p/q), leaves the value right and the gradient wrong. Against
    differences of the textbook formula in float64."""
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(4, 5), 2 * torch.randn(4, 5)
    is_correct = torch.tensor([True, False, False, True])
    student.requires_grad_()
    opsd.divergence(student, teacher, kind, beta, is_correct).sum().backward()

    def value(logits):
        s, t = logits.log_softmax(-1), teacher.double().log_softmax(-1)
        return plain_divergence(s, t, kind, beta, is_correct).sum().item()

    point, h = student.detach().double(), 1e-5
    for step, gradient in zip(h * torch.eye(20, dtype=torch.float64), student.grad.view(-1)):
        slope = (value(point + step.view(4, 5)) - value(point - step.view(4, 5))) / (2 * h)
        assert gradient.item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize("kind, beta", KINDS)
def test_the_divergence_is_never_negative_and_zero_at_equality(kind, beta):
    """Clipped per vocabulary entry before the sum, a `KL` goes below 0: the loss finds its minimum there."""
    torch.manual_seed(0)
    student, teacher, is_correct = *(3 * torch.randn(2, 500, 30)), torch.arange(500) % 2 == 0
    assert (opsd.divergence(student, teacher, kind, beta, is_correct) > 0).all()
    assert opsd.divergence(student, student + 7, kind, beta, is_correct).abs().max() < 1e-5
    far = opsd.divergence(100 * student, -100 * student, kind, beta, is_correct)
    assert far.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# Token by token


@pytest.mark.parametrize("kind, beta", KINDS)
def test_teacher_and_student_meet_at_the_same_token(model, teacher, rollouts, args_of, kind, beta):
    """Sliced by the batch-wide prompt width, teacher and student are compared at different tokens as soon as
    prompts differ in width: a loss that falls and teaches nothing. Here each row is computed alone, EOS
    included."""
    args = args_of(opsd, "--divergence", kind, "--beta", beta, "--temperature", 0.7)
    got = opsd.token_divergence(model, teacher, rollouts, args)
    expected = []
    for r, prompt in zip(rollouts, TEACHER_PROMPTS):
        s = full_log_probs(model, r.prompt_ids, r.response_ids, 0.7)
        t = full_log_probs(teacher, prompt, r.response_ids, 0.7)
        expected.append(plain_divergence(s, t, kind, beta, torch.tensor(r.label == "correct")))
    assert len(got) == sum(len(r.response_ids) for r in rollouts)
    torch.testing.assert_close(got, torch.cat(expected).float(), rtol=1e-4, atol=1e-4)


def test_a_teacher_who_reads_the_same_says_the_same(any_model, rollouts, args_of):
    """Same weights, same prompts: any divergence left is a mistake of position, mask or padding."""
    for r in rollouts:
        r.teacher_prompt_ids = r.prompt_ids
    got = opsd.token_divergence(any_model, copy.deepcopy(any_model), rollouts, args_of(opsd))
    assert got.abs().max() < 1e-9


@pytest.mark.parametrize("kind, beta", KINDS)
def test_loss_and_gradient_are_those_of_the_formula(model, teacher, rollouts, args_of, kind, beta):
    """L = mean over rollouts of the mean over |y|; in a mean over all tokens the long responses rule."""
    loss = 0
    for r, prompt in zip(rollouts, TEACHER_PROMPTS):
        s = full_log_probs(model, r.prompt_ids, r.response_ids)
        t = full_log_probs(teacher, prompt, r.response_ids).detach()
        loss += plain_divergence(s, t, kind, beta, torch.tensor(r.label == "correct")).mean() / 8
    loss.backward()
    expected = take_gradient(model)
    args = args_of(opsd, "--divergence", kind, "--beta", beta, "--micro-batch-size", 3)
    got = opsd.accumulate_gradients(model, teacher, rollouts, args)
    assert got == pytest.approx(loss.item(), abs=1e-5)
    assert_same_gradient(take_gradient(model), expected)
    assert all(r.divergences.shape == (len(r.response_ids),) for r in rollouts)
    assert sum(r.divergences.mean().item() for r in rollouts) / 8 == pytest.approx(got, abs=1e-5)


def test_without_a_gradient_it_only_measures(model, teacher, rollouts, args_of):
    """opsd.py measures rollouts that it does not train on: a gradient that they leave behind would train on them."""
    args = args_of(opsd, "--micro-batch-size", 3)
    loss = opsd.accumulate_gradients(model, teacher, rollouts, args)
    expected = [r.divergences for r in rollouts]
    take_gradient(model)
    with torch.no_grad():
        assert opsd.accumulate_gradients(model, teacher, rollouts, args) == pytest.approx(loss, abs=1e-6)
    assert all(torch.allclose(r.divergences, e, atol=1e-6) for r, e in zip(rollouts, expected))
    assert not take_gradient(model).any()


@pytest.mark.parametrize("kind, beta", KINDS)
def test_the_gradient_does_not_depend_on_the_micro_batch(model, teacher, rollouts, args_of, kind, beta):
    """A mean of micro-batch means weighs a smaller last one more. Sizes that divide 8, and 3."""
    results = []
    for size in (8, 4, 3, 2, 1):
        args = args_of(opsd, "--divergence", kind, "--beta", beta, "--micro-batch-size", size)
        loss = opsd.accumulate_gradients(model, teacher, rollouts, args)
        results.append((loss, take_gradient(model)))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], abs=1e-5)
        assert_same_gradient(gradient, results[0][1])


def test_no_gradient_reaches_the_teacher(model, teacher, rollouts, args_of):
    """A teacher that is pulled toward the student meets it half-way, where nothing has been learned. With
    --teacher ema or refresh its weights are trainable ones; here they all are."""
    assert all(p.requires_grad for p in teacher.parameters())
    opsd.accumulate_gradients(model, teacher, rollouts, args_of(opsd))
    assert all(p.grad is None for p in teacher.parameters())
    assert take_gradient(model).abs().max() > 1e-3


def test_a_model_can_be_its_own_teacher(model, rollouts, args_of):
    """The same object on both sides: the gradient is the student's alone, not that of both roles."""
    args, frozen = args_of(opsd), copy.deepcopy(model)
    loss = opsd.accumulate_gradients(model, frozen, rollouts, args)
    expected = take_gradient(model)
    again = opsd.accumulate_gradients(model, model, rollouts, args)
    assert again == pytest.approx(loss, abs=1e-6)
    assert_same_gradient(take_gradient(model), expected)


@pytest.mark.parametrize("kind, beta", KINDS)
@pytest.mark.parametrize("tokens_a_chunk", [1, 4, 30])
def test_chunks_change_neither_value_nor_gradient(monkeypatch, kind, beta, tokens_a_chunk):
    """Chunks are computed twice, forward and backward: one that is lost, doubled or paired with another
    chunk's teacher shows here. 31 tokens, so that the last chunk is a short one."""
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(31, 8, requires_grad=True), torch.randn(31, 8, requires_grad=True)
    head, teacher_head = torch.nn.Linear(8, VOCAB), torch.nn.Linear(8, VOCAB)
    is_correct, weights = torch.arange(31) % 3 == 0, torch.linspace(-1, 1, 31)
    teacher_logits = teacher_head(teacher_hidden).detach()
    plain = opsd.divergence(head(hidden) / 0.7, teacher_logits / 0.7, kind, beta, is_correct)
    expected = torch.autograd.grad((plain * weights).sum(), [hidden, *head.parameters()])
    monkeypatch.setattr(rollout, "MAX_LOGITS", tokens_a_chunk * VOCAB)
    chunked = opsd.chunked_divergence(hidden, teacher_hidden, head, teacher_head, is_correct, kind, beta, 0.7)
    torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-5)
    (chunked * weights).sum().backward()
    got = (hidden.grad, *(p.grad for p in head.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert teacher_hidden.grad is None and teacher_head.weight.grad is None


def test_what_is_measured_by_label_and_position():
    """The paper finds the divergence at the front: thirds of the padded width would find it there anyway.

    Correct: 6 5 | 4 3 | 2 1, mean 3.5. Truncated: 9 | 8 | 7, mean 8. Thirds: 20/3, 15/3, 10/3.
    """
    measured = [
        Rollout([], [], [], True, label="correct", divergences=torch.tensor([6.0, 5, 4, 3, 2, 1])),
        Rollout([], [], [], False, label="truncated", divergences=torch.tensor([9.0, 8, 7])),
        Rollout([], [], [], False, label="incorrect"),  # not measured
    ]
    assert opsd.by_label_and_position(measured) == pytest.approx({
        "distill/kl_correct": 3.5, "distill/kl_truncated": 8.0,
        "distill/kl_first": 20 / 3, "distill/kl_middle": 5.0, "distill/kl_last": 10 / 3,
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Which rollouts are kept


@pytest.mark.parametrize(
    "mode, truncated, kept",
    [
        ([], "incorrect", {"correct", "incorrect", "truncated"}),
        ([], "correct", {"correct", "incorrect", "truncated"}),
        ([], "drop", {"correct", "incorrect"}),
        (["--only-correct"], "incorrect", {"correct"}),
        (["--only-correct"], "correct", {"correct", "truncated"}),
        (["--only-correct"], "drop", {"correct"}),
        (["--only-incorrect"], "incorrect", {"incorrect", "truncated"}),
        (["--only-incorrect"], "correct", {"incorrect"}),
        (["--only-incorrect"], "drop", {"incorrect"}),
    ],
)
def test_which_rollouts_are_kept(args_of, mode, truncated, kept):
    """The paper's claim is about this filter: with truncated responses on its wrong side, it is another."""
    args = args_of(opsd, *mode, "--truncated", truncated)
    said = [Rollout([1], [2], [-1.0], True, label=label) for label in ("correct", "incorrect", "truncated")]
    assert {r.label for r in said if opsd.is_kept(r, args)} == kept


PROBLEMS = [Problem(f"What is {n}?", str(n), f"It is {n}, clearly.") for n in range(8)]


def box(n):
    return f"<think>{n}</think>\\boxed{{{n}}}"


def gold(problem_text):
    return int(problem_text.removeprefix("What is ").removesuffix("?"))


def test_only_correct_keeps_the_correct_ones_with_their_own_prompts(tokenizer, args_of):
    """A filter that is applied to rollouts and not to their prompts shifts every teacher by one."""
    sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text) if gold(text) % 2 else 99))
    args = args_of(opsd, "--only-correct", "--batch-size", 8)
    state = {"cursor": 0}
    everything, kept = opsd.sample_rollouts(sampler, PROBLEMS, state, args)
    assert len(everything) == 8 and state["cursor"] == 8 and len(sampler.calls) == 1
    assert {r.problem.answer for r in kept} == {"1", "3", "5", "7"}
    for r in everything:
        n, asked = r.problem.answer, tokenizer.decode(r.prompt_ids)
        shown = tokenizer.decode(r.teacher_prompt_ids)
        assert f"What is {n}?" in asked and "clearly" not in asked
        assert f"What is {n}?" in shown and f"It is {n}, clearly." in shown
        assert tokenizer.decode(r.response_ids, skip_special_tokens=True) == r.text


def test_match_budget_samples_until_the_budget_is_met(tokenizer, args_of):
    """Arms that keep different numbers of rollouts differ in batch size too, and cannot be compared.

    Four of the 8 problems are answered right. Without the flag, one batch of 4 gives what it gives; with it
    both batches give their 4, with other luck; a hopeless model ends after 1 + --max-refills batches.
    """
    script = lambda text, j, call: box(gold(text) if gold(text) % 2 else 99)  # noqa: E731
    flags = ["--only-correct", "--batch-size", 4]
    for more, batches in [([], 1), (["--match-budget"], 2)]:
        sampler, state = scripted_sampler(tokenizer, script), {"cursor": 0}
        everything, kept = opsd.sample_rollouts(sampler, PROBLEMS, state, args_of(opsd, *flags, *more))
        assert len(sampler.calls) == batches and len(everything) == state["cursor"] == 4 * batches
        assert all(r.label == "correct" for r in kept)
        assert len(kept) == (4 if more else sum(int(r.problem.answer) % 2 for r in everything))
    assert sampler.calls[0].seed != sampler.calls[1].seed
    assert len({r.problem.answer for r in kept}) == 4
    hopeless = scripted_sampler(tokenizer, lambda text, j, call: box(99))
    args = args_of(opsd, *flags, "--match-budget", "--max-refills", 3)
    everything, kept = opsd.sample_rollouts(hopeless, PROBLEMS, {"cursor": 0}, args)
    assert len(hopeless.calls) == 4 and len(everything) == 16 and kept == []


def test_match_budget_never_exceeds_the_budget(tokenizer, args_of):
    """Three of each four are right: the second batch has three to give, and one is taken."""
    sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text) if j else 99))
    args = args_of(opsd, "--only-correct", "--batch-size", 2, "--group-size", 4, "--match-budget")
    everything, kept = opsd.sample_rollouts(sampler, PROBLEMS, {"cursor": 0}, args)
    assert len(sampler.calls) == 2 and len(everything) == 16 and len(kept) == 8
    assert len({id(r) for r in kept}) == 8


def test_another_seed_has_other_problems_and_other_luck(tokenizer, args_of):
    """Runs with three seeds that sample alike are one run, and the spread between them says nothing."""
    calls = []
    for seed in (0, 1):
        sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text)))
        opsd.sample_rollouts(sampler, PROBLEMS, {"cursor": 0}, args_of(opsd, "--batch-size", 4, "--seed", seed))
        calls += sampler.calls
    assert calls[0].prompts != calls[1].prompts and calls[0].seed != calls[1].seed


# ------------------------------------------------------------------------------------------------------------
# What the teacher is shown


def teacher_prompts(tokenizer, args, script, problems=PROBLEMS):
    sampler = scripted_sampler(tokenizer, script)
    return opsd.sample_rollouts(sampler, problems, {"cursor": 0}, args)[0]


@pytest.mark.parametrize(
    "context, shown",
    [
        ("solution", "It is {}, clearly."),
        ("answer", "The correct answer: {}\n"),
        ("concise", "without needless steps"),
    ],
)
def test_the_teacher_is_shown_the_context(tokenizer, args_of, context, shown):
    """A context that is dropped on the way is the control with no context, under another name."""
    args = args_of(opsd, "--context", context, "--batch-size", 8)
    for r in teacher_prompts(tokenizer, args, lambda text, j, call: box(99)):
        prompt = r.teacher_prompt_ids
        text = tokenizer.decode(prompt)
        assert shown.format(r.problem.answer) in text and text.startswith(f"<|user|>{r.problem.problem}")
        assert text.endswith("<|assistant|>") and prompt[-1] == r.prompt_ids[-1]  # both are asked in one way
        assert ("clearly" in text) == (context == "solution")


def test_a_wrong_answer_is_never_the_gold(tokenizer, args_of):
    """A control that sometimes shows the right answer controls for nothing. Here many share an answer."""
    problems = [Problem(f"What is {n}?", str(n // 3)) for n in range(8)]
    args = args_of(opsd, "--context", "wrong-answer", "--batch-size", 8)
    for r in teacher_prompts(tokenizer, args, lambda text, j, call: box(99), problems):
        shown = tokenizer.decode(r.teacher_prompt_ids).split("The correct answer: ")[1].split("\n")[0]
        assert shown != r.problem.answer and not verify(f"\\boxed{{{shown}}}", r.problem.answer)
    same = [Problem("What is 1?", "5"), Problem("What is 2?", "5")]
    args = args_of(opsd, "--context", "wrong-answer", "--batch-size", 2)
    for r in teacher_prompts(tokenizer, args, lambda text, j, call: box(99), same):
        assert "The correct answer: 5\n" not in tokenizer.decode(r.teacher_prompt_ids)


def test_a_wrong_answer_is_not_the_gold_in_other_words(tokenizer, args_of):
    """1/2 and 0.50 are two texts and one answer: compared as texts, the control shows the truth."""
    problems = [Problem(f"What is {a}?", a) for a in ("1/2", "0.50", "\\frac{1}{2}")]
    args = args_of(opsd, "--context", "wrong-answer", "--batch-size", 3)
    for r in teacher_prompts(tokenizer, args, lambda text, j, call: box(99), problems):
        shown = tokenizer.decode(r.teacher_prompt_ids).split("The correct answer: ")[1].split("\n")[0]
        assert not verify(f"\\boxed{{{shown}}}", r.problem.answer)


def test_a_rollout_is_shown_a_correct_sibling_and_never_itself(tokenizer, args_of):
    """Shown its own answer, a teacher confirms whatever the student said. Each text here says who it is.

    Of three responses to even problems the first and last are right; to odd ones only the second is.
    """

    def script(text, j, call):
        right = j != 1 if gold(text) % 2 == 0 else j == 1
        return f"<think>hidden {j}</think>sibling {j}: \\boxed{{{gold(text) if right else 99}}}"

    args = args_of(opsd, "--context", "rollout", "--group-size", 3, "--batch-size", 8)
    everything = teacher_prompts(tokenizer, args, script)
    assert len(everything) == 24
    for i, r in enumerate(everything):
        prompt = r.teacher_prompt_ids
        even, j = int(r.problem.answer) % 2 == 0, i % 3
        expected = (2 if j == 0 else 0) if even else None if j == 1 else 1
        if expected is None:
            assert prompt is None  # the only one that is right has nobody to learn from
        else:
            text = tokenizer.decode(prompt)
            assert f"sibling {expected}: \\boxed{{{r.problem.answer}}}" in text and text.count("sibling") == 1
            assert "hidden" not in text and r.problem.problem in text
    _, kept = opsd.sample_rollouts(scripted_sampler(tokenizer, script), PROBLEMS, {"cursor": 0}, args)
    assert len(kept) == 20 and all(r.teacher_prompt_ids is not None for r in kept)


@pytest.mark.parametrize("kind", ["reverse", "forward", "split"])
def test_no_context_is_a_no_op(tokenizer, args_of, kind):
    """The control that finds most mistakes at once: the frozen teacher reads what the student reads, so at
    step 0 the loss and its gradient are 0. A rise of accuracy under --context none is not distillation."""
    student = make_tiny(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id, context=256)
    flags = ["--divergence", kind, "--batch-size", 8, "--micro-batch-size", 3]
    args = args_of(opsd, "--context", "none", *flags)
    cut = ("<think>1 2 3", False)
    sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text)) if gold(text) % 2 else cut)
    _, kept = opsd.sample_rollouts(sampler, PROBLEMS, {"cursor": 0}, args)
    assert [r.teacher_prompt_ids for r in kept] == [r.prompt_ids for r in kept] and len(kept) == 8
    loss = opsd.accumulate_gradients(student, copy.deepcopy(student), kept, args)
    assert abs(loss) < 1e-9 and take_gradient(student).abs().max() < 1e-8
    shown = opsd.sample_rollouts(sampler, PROBLEMS, {"cursor": 0}, args_of(opsd, *flags))[1]
    loss = opsd.accumulate_gradients(student, copy.deepcopy(student), shown, args)
    assert loss > 1e-3 and take_gradient(student).abs().max() > 1e-3  # and with a context it is not


# ------------------------------------------------------------------------------------------------------------
# The teacher's weights, and whole runs


def test_a_frozen_teacher_stays(model, teacher, args_of):
    """The default is the weights of step 0: a teacher that follows at every step collapses."""
    before = copy.deepcopy(teacher.state_dict())
    for step in (1, 50, 100):
        opsd.update_teacher(step, teacher, model, args_of(opsd))
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_a_refreshed_teacher_is_a_copy_and_not_the_student(model, teacher, args_of):
    """Made the same tensors, the teacher is the student from then on, and the loss is 0 for ever."""
    args = args_of(opsd, "--teacher", "refresh", "--refresh-every", 3)
    refreshed = []
    for step in range(1, 8):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01
        opsd.update_teacher(step, teacher, model, args)
        refreshed.append(all(map(torch.equal, teacher.parameters(), model.parameters())))
    assert refreshed == [False, False, True, False, False, True, False]


def test_the_moving_average_by_hand(args_of):
    """The decay on the wrong side makes a teacher that is the student's copy after one step.

    Decay .9, teacher 1, student 2 and then 4: .9 * 1 + .1 * 2 = 1.1, then .9 * 1.1 + .1 * 4 = 1.39.
    """
    args = args_of(opsd, "--teacher", "ema", "--ema-decay", 0.9)
    teacher, student = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    teacher.weight.data.fill_(1), student.weight.data.fill_(2)
    opsd.update_teacher(1, teacher, student, args)
    assert teacher.weight.item() == pytest.approx(1.1, abs=1e-5) and student.weight.item() == 2
    student.weight.data.fill_(4)
    opsd.update_teacher(2, teacher, student, args)
    assert teacher.weight.item() == pytest.approx(1.39, abs=1e-5)


@pytest.fixture
def run_opsd(tokenizer, set_flags, write_jsonl, tmp_path):
    """run_opsd(flags...) -> weights before and after, and metrics, of two steps of a random model."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(*flags):
        start = make_tiny(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id, context=256)
        start.save_pretrained(tmp_path / "init")
        tokenizer.save_pretrained(tmp_path / "init")
        data = [{"problem": f"What is {n}?", "answer": "no one knows", "solution": "?"} for n in range(30)]
        common = ["--init", tmp_path / "init", "--data", write_jsonl(data), "--steps", 2, "--batch-size", 3]
        set_flags(*common, "--max-new-tokens", 4, "--eval-problems", 1, "--lr", 1e-2, *flags)
        opsd.main()
        end, _ = rollout.load_model(str(tmp_path / "out"))
        rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
        return start.state_dict(), end.state_dict(), [row for row in rows if "distill/kept_frac" in row]

    yield run
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
        signal.signal(number, handler)


@pytest.mark.parametrize("flags", [["--only-correct"], ["--context", "rollout", "--group-size", "2"]])
def test_a_batch_with_nothing_to_keep_is_a_skipped_step(run_opsd, capsys, flags):
    """All wrong under --only-correct (or no correct sibling to show): no update, no NaN, no crash; the run
    says so. AdamW would move on a gradient of zero as well, by its momentum and its decay."""
    start, end, rows = run_opsd(*flags, "--weight-decay", 0.1)
    assert all(torch.equal(start[key], end[key]) for key in start)
    assert [row["distill/kept_frac"] for row in rows] == [0, 0]
    assert not any(key in row for row in rows for key in ("grad_norm", "distill/kl"))
    assert "2 of 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["frozen", "refresh", "ema"])
def test_the_teacher_in_a_run(run_opsd, monkeypatch, mode):
    """The teacher was the student's own tensors once: updated with it, and no loss ever more than 0."""
    seen, accumulate = [], opsd.accumulate_gradients
    weights = lambda m: torch.cat([p.detach().view(-1).clone() for p in m.parameters()])  # noqa: E731

    def watched(student, teacher, *rest):
        assert not any(p.requires_grad for p in teacher.parameters())
        if torch.is_grad_enabled():  # without, it measures what was not kept
            seen.append(SimpleNamespace(student=weights(student), teacher=weights(teacher)))
        return accumulate(student, teacher, *rest)

    monkeypatch.setattr(opsd, "accumulate_gradients", watched)
    start, end, rows = run_opsd("--teacher", mode, "--refresh-every", 1, "--ema-decay", 0.5)
    first, second = seen
    assert torch.equal(first.teacher, first.student) and not torch.equal(second.student, first.student)
    expected = {"frozen": first.teacher, "refresh": second.student, "ema": (first.teacher + second.student) / 2}
    torch.testing.assert_close(second.teacher, expected[mode], rtol=0, atol=1e-6 if mode == "ema" else 0)
    assert all(math.isfinite(row["distill/kl"]) and row["distill/kl"] > 0 for row in rows)
    assert not all(torch.equal(start[key], end[key]) for key in start)
