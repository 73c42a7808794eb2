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
    got = opsd.token_values(model, teacher, rollouts, args)
    expected = []
    for r, prompt in zip(rollouts, TEACHER_PROMPTS):
        s = full_log_probs(model, r.prompt_ids, r.response_ids, 0.7)
        t = full_log_probs(teacher, prompt, r.response_ids, 0.7)
        divergences = plain_divergence(s, t, kind, beta, torch.tensor(r.label == "correct"))
        log_probs = s[range(len(r.response_ids)), r.response_ids]
        expected.append(torch.stack([divergences.float(), -(s.exp() * s).sum(-1), log_probs]))
    assert all(len(values) == sum(len(r.response_ids) for r in rollouts) for values in got)
    torch.testing.assert_close(torch.stack(got), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    assert [values.requires_grad for values in got] == [True, False, False]


def test_a_teacher_who_reads_the_same_says_the_same(any_model, rollouts, args_of):
    """Same weights, same prompts: any divergence left is a mistake of position, mask or padding."""
    for r in rollouts:
        r.teacher_prompt_ids = r.prompt_ids
    got, _, _ = opsd.token_values(any_model, copy.deepcopy(any_model), rollouts, args_of(opsd))
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
    assert all(r.token_values.shape == (3, len(r.response_ids)) for r in rollouts)
    assert sum(r.token_values[0].mean().item() for r in rollouts) / 8 == pytest.approx(got, abs=1e-5)


def test_without_a_gradient_it_only_measures(model, teacher, rollouts, args_of):
    """opsd.py measures rollouts that it does not train on: a gradient that they leave behind would train on them."""
    args = args_of(opsd, "--micro-batch-size", 3)
    loss = opsd.accumulate_gradients(model, teacher, rollouts, args)
    expected = [r.token_values for r in rollouts]
    take_gradient(model)
    with torch.no_grad():
        assert opsd.accumulate_gradients(model, teacher, rollouts, args) == pytest.approx(loss, abs=1e-6)
    assert all(torch.allclose(r.token_values, e, atol=1e-6) for r, e in zip(rollouts, expected))
    assert not take_gradient(model).any()


def test_token_clip_counts_a_token_no_more_than_the_cap(model, teacher, rollouts, args_of):
    """Clipped before the sum over the vocabulary it is no divergence; clipped in the log, nobody sees what was
    clipped. L = mean over rollouts of 1/|y| sum_t min(KL_t, cap), and what is measured is KL_t."""
    args = args_of(opsd, "--micro-batch-size", 3)
    opsd.accumulate_gradients(model, teacher, rollouts, args)
    take_gradient(model)
    measured = [r.token_values for r in rollouts]
    args.token_clip = torch.cat(measured, 1)[0].median().item() + 1e-4  # half of the tokens are above
    loss = 0
    for r, prompt in zip(rollouts, TEACHER_PROMPTS):
        s = full_log_probs(model, r.prompt_ids, r.response_ids)
        t = full_log_probs(teacher, prompt, r.response_ids).detach()
        for value in plain_divergence(s, t, "reverse", 0.5, torch.tensor(True)):
            counted = value if value < args.token_clip else args.token_clip  # a number: no gradient
            loss = loss + counted / len(r.response_ids) / 8
    loss.backward()
    expected = take_gradient(model)
    assert opsd.accumulate_gradients(model, teacher, rollouts, args) == pytest.approx(loss.item(), abs=1e-5)
    assert_same_gradient(take_gradient(model), expected)
    assert all(torch.allclose(r.token_values, m, atol=1e-6) for r, m in zip(rollouts, measured))


def test_a_token_above_the_cap_has_no_gradient(model, teacher, rollouts, args_of):
    """Scaled down to the cap instead of cut off, a token would go on pulling. All are above it here."""
    args = args_of(opsd, "--token-clip", 1e-6)
    assert opsd.accumulate_gradients(model, teacher, rollouts, args) == pytest.approx(1e-6)
    assert min(r.token_values[0].min() for r in rollouts) > 1e-6 and not take_gradient(model).any()


def test_without_a_cap_or_below_it_not_a_bit_differs(model, teacher, rollouts, args_of):
    """A flag that is off, or never met, must leave the paper's loss: the mean as it stands, bit for bit."""
    longest_first = sorted(rollouts, key=opsd.teacher_length, reverse=True)  # as in a micro-batch
    values = opsd.token_values(model, teacher, longest_first, args_of(opsd))[0]
    loss = sum(v.sum() / len(v) for v in values.split([len(r.response_ids) for r in longest_first])) / 8
    loss.backward()
    expected = take_gradient(model)
    for flags in ([], ["--token-clip", 1e6]):
        assert opsd.accumulate_gradients(model, teacher, rollouts, args_of(opsd, *flags)) == loss.item()
        assert torch.equal(take_gradient(model), expected)


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
    log_probs, ids = (head(hidden) / 0.7).log_softmax(-1), torch.arange(31) % VOCAB
    monkeypatch.setattr(rollout, "MAX_LOGITS", tokens_a_chunk * VOCAB)
    chunked, entropies, log_probs_of_ids = opsd.chunked_values(
        hidden, teacher_hidden, head, teacher_head, ids, is_correct, kind, beta, 0.7)  # fmt: skip
    torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropies, -(log_probs.exp() * log_probs).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_probs_of_ids, log_probs[range(31), ids], rtol=1e-4, atol=1e-5)
    (chunked * weights).sum().backward()
    got = (hidden.grad, *(p.grad for p in head.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert teacher_hidden.grad is None and teacher_head.weight.grad is None


def test_what_is_measured_by_label_and_position():
    """The paper finds the divergence at the front: thirds of the padded width would find it there anyway.

    Correct: 6 5 | 4 3 | 2 1, mean 3.5. Truncated: 9 | 8 | 7, mean 8. Thirds: 20/3, 15/3, 10/3.
    Entropies: 3 of 6 are above half a nat, sum 3; and 1 of 3, sum 1.2. A mean of two responses' shares would
    be another one: 1/2 and 1 of the correct, 3 of 6 and 1 of 1, is 3/4, and of tokens 4/7.
    """
    values = lambda *rows: torch.tensor([[*map(float, row)] for row in rows])  # noqa: E731
    entropies, log_probs = [0.6, 0, 0.9, 0.49, 1, 0.01], [-1] * 6
    measured = [
        Rollout([], [], [], True, label="correct", token_values=values(range(6, 0, -1), entropies, log_probs)),
        Rollout([], [], [], False, label="truncated", token_values=values([9, 8, 7], [0.1, 0.2, 0.9], [-2] * 3)),
        Rollout([], [], [], False, label="incorrect"),  # not measured
    ]
    expected = {
        "distill/kl_correct": 3.5, "distill/kl_truncated": 8.0,
        "distill/kl_first": 20 / 3, "distill/kl_middle": 5.0, "distill/kl_last": 10 / 3,
        "distill/entropy_correct": 0.5, "distill/entropy_truncated": 0.4,
        "distill/forks_correct": 1 / 2, "distill/forks_truncated": 1 / 3,
    }  # fmt: skip
    assert opsd.summarize_tokens(measured) == pytest.approx(expected)
    measured.append(Rollout([], [], [], True, label="correct", token_values=values([0], [2], [-1])))
    assert opsd.summarize_tokens(measured)["distill/forks_correct"] == pytest.approx(4 / 7)
    assert opsd.summarize_tokens([]) == {}


def test_entropy_and_log_prob_by_hand():
    """Of the student and not of the teacher, in nats and not in bits, at the temperature of the sampler.

    S = 1/2 1/4 1/4: entropy .5 ln 2 + .5 ln 4 = 1.5 ln 2 = 1.0397208, and ln(1/4) = -1.3862944 of the second. The
    second position is certain of the first token: entropy 0, log-prob 0. Logits at temperature 1/2 are half as large.
    """
    head = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(head.weight)
    logits = torch.tensor([[math.log(2), 0, 0], [100, 0, 0]])
    teacher, ids = torch.tensor([[0.0, 5, 9], [0, 7, 0]]), torch.tensor([1, 0])
    _, entropies, log_probs = opsd.chunked_values(
        logits / 2, teacher, head, head, ids, torch.tensor([True, False]), "reverse", 0.5, temperature=0.5)
    assert entropies.tolist() == pytest.approx([1.0397208, 0], abs=1e-6)
    assert log_probs.tolist() == pytest.approx([-1.3862944, 0], abs=1e-6)


def test_the_samplers_mismatch_by_hand():
    """The check that sampler and trainer are one model. Read off what the training pass measured, it must still be the
    sampler's log-probs against the student's: a row of entropies, or the sampler's own, would pass or fail for ever.

    The student gives one token of three half of what the sampler gave: k3 = 1/2 - 1 + ln 2 = .1931472, a third of it.
    """
    student = [torch.tensor([[9.0, 9], [5, 5], [-1, -1 - math.log(2)]]), torch.tensor([[9.0], [5], [-3]])]
    said = [Rollout([1], [2, 3], [-1.0, -1], True, token_values=student[0]),
        Rollout([1], [2], [-3.0], True, token_values=student[1])]  # fmt: skip
    assert opsd.sampler_mismatch(said) == pytest.approx(0.1931472 / 3, abs=1e-6)
    assert opsd.sampler_mismatch(said[1:]) == pytest.approx(0, abs=1e-7)


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
    state = {"cursor": 0, "kept_frac": 1.0}
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

    Four of the 8 problems are answered right, one of them in the first batch of 4. Without the flag, this is what
    there is; with it three more batches give the rest, with other luck. A hopeless model ends after
    1 + --max-refills batches.
    """
    script = lambda text, j, call: box(gold(text) if gold(text) % 2 else 99)  # noqa: E731
    flags = ["--only-correct", "--batch-size", 4]
    for more, calls, batches in [([], 1, 1), (["--match-budget"], 2, 4)]:
        sampler, state = scripted_sampler(tokenizer, script), {"cursor": 0, "kept_frac": 1.0}
        everything, kept = opsd.sample_rollouts(sampler, PROBLEMS, state, args_of(opsd, *flags, *more))
        assert len(sampler.calls) == calls and len(everything) == state["cursor"] == 4 * batches
        assert all(r.label == "correct" for r in kept)
        assert len(kept) == (4 if more else 1)
    assert sampler.calls[0].seed != sampler.calls[1].seed
    assert len({r.problem.answer for r in kept}) == 4
    hopeless = scripted_sampler(tokenizer, lambda text, j, call: box(99))
    args = args_of(opsd, *flags, "--match-budget", "--max-refills", 3)
    everything, kept = opsd.sample_rollouts(hopeless, PROBLEMS, {"cursor": 0, "kept_frac": 1.0}, args)
    assert [len(call.prompts) for call in hopeless.calls] == [4, 12] and len(everything) == 16 and kept == []


MANY = [Problem(f"What is {n}?", str(n), f"It is {n}, clearly.") for n in range(50)]


def test_refills_are_drawn_several_batches_at_once(tokenizer, args_of):
    """A batch at a time, an arm that keeps one in ten samples ten times in a row with a few rows each.

    1 of the first 4 is right: 3 more, at that rate, are 3 batches. They come in one call. All are right then, and of
    the 13 the first 4 that were drawn are kept. Of 8, with 2 to a prompt, 2 right ones: 6 more are 3 batches, too.
    """
    first = rollout.draw(MANY, 0, 4, 0)[0].problem
    for group_size in (1, 2):
        sampler = scripted_sampler(
            tokenizer, lambda text, j, call: box(gold(text) if call or text == first else 99))
        args = args_of(opsd, "--only-correct", "--match-budget", "--batch-size", 4, "--group-size", group_size)
        state = {"cursor": 0, "kept_frac": 1.0}
        everything, kept = opsd.sample_rollouts(sampler, MANY, state, args)
        assert [len(call.prompts) for call in sampler.calls] == [4, 12] and state["cursor"] == 16
        assert len(everything) == 16 * group_size and len(kept) == 4 * group_size
        right = [r for r in everything if r.label == "correct"]
        assert len(right) == 13 * group_size and all(r is s for r, s in zip(kept, right))
        for r, problem in zip(everything[::group_size], rollout.draw(MANY, 0, 16, 0), strict=True):
            assert r.problem is problem and problem.solution in tokenizer.decode(r.teacher_prompt_ids)


@pytest.mark.parametrize("one_in", [1, 2, 3, 7, 25, 1000])
def test_refills_skip_no_problem_and_end(tokenizer, args_of, one_in):
    """Refills that start past what was drawn, or count their batches wrong, leave problems out and hide it: step after
    step, what was asked is the stream of `draw`, whole and in order, whatever the rate. The budget is met to the
    rollout, or all refills were used, never one more."""
    sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text) if gold(text) % one_in == 0 else 99))
    args = args_of(opsd, "--only-correct", "--match-budget", "--batch-size", 4, "--max-refills", 9)
    state, asked, short = {"cursor": 0, "kept_frac": 1.0}, [], 0
    for _ in range(5):
        before, calls = state["cursor"], len(sampler.calls)
        first = 4 * min(10, math.ceil(1 / state["kept_frac"]))  # as many as the step before would have taken
        everything, kept = opsd.sample_rollouts(sampler, MANY, state, args)
        sizes = [len(call.prompts) for call in sampler.calls[calls:]]
        asked += [prompt for call in sampler.calls[calls:] for prompt in call.prompts]
        assert sizes[0] == first and all(size % 4 == 0 for size in sizes)
        assert sum(sizes) == len(everything) == state["cursor"] - before <= 40
        assert all(r.label == "correct" for r in kept)
        assert len(kept) == 4 or len(kept) < 4 and sum(sizes) == 40
        short += len(kept) < 4
    stream = rollout.draw(MANY, 0, state["cursor"], args.seed)
    assert asked == [rollout.render_prompt(tokenizer, problem) for problem in stream]
    assert short == (5 if one_in >= 25 else 0)
    seeds = [call.seed for call in sampler.calls]
    assert len(set(seeds)) == len(seeds)


def test_match_budget_never_exceeds_the_budget(tokenizer, args_of):
    """Three of each four are right: the second batch has three to give, and one is taken."""
    sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text) if j else 99))
    args = args_of(opsd, "--only-correct", "--batch-size", 2, "--group-size", 4, "--match-budget")
    everything, kept = opsd.sample_rollouts(sampler, PROBLEMS, {"cursor": 0, "kept_frac": 1.0}, args)
    assert len(sampler.calls) == 2 and len(everything) == 16 and len(kept) == 8
    assert len({id(r) for r in kept}) == 8


def test_another_seed_has_other_problems_and_other_luck(tokenizer, args_of):
    """Runs with three seeds that sample alike are one run, and the spread between them says nothing."""
    calls = []
    for seed in (0, 1):
        sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text)))
        opsd.sample_rollouts(sampler, PROBLEMS, {"cursor": 0, "kept_frac": 1.0}, args_of(opsd, "--batch-size", 4, "--seed", seed))
        calls += sampler.calls
    assert calls[0].prompts != calls[1].prompts and calls[0].seed != calls[1].seed


# ------------------------------------------------------------------------------------------------------------
# What the teacher is shown


def teacher_prompts(tokenizer, args, script, problems=PROBLEMS):
    sampler = scripted_sampler(tokenizer, script)
    return opsd.sample_rollouts(sampler, problems, {"cursor": 0, "kept_frac": 1.0}, args)[0]


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


def test_another_problems_solution_is_shown_whole_and_is_not_the_gold(tokenizer, args_of):
    """A control that sometimes shows the problem's own solution, or one that ends in the same answer, controls for
    nothing: 0 and 1, 2 and 3 and so on have one answer here, said in two ways."""
    said = [f"{n // 2}.0" if n % 2 else str(n // 2) for n in range(8)]
    problems = [Problem(f"What is {n}?", said[n], f"Number {n} it is.") for n in range(8)]
    args = args_of(opsd, "--context", "other-solution", "--batch-size", 8)
    sources = []
    for r in teacher_prompts(tokenizer, args, lambda text, j, call: box(99), problems):
        text = tokenizer.decode(r.teacher_prompt_ids)
        shown = int(text.split("A correct solution: Number ")[1].split(" it is.\n")[0])
        assert text.startswith(f"<|user|>{r.problem.problem}") and text.count("it is.") == 1
        assert shown // 2 != problems.index(r.problem) // 2
        sources.append(shown)
    assert len(set(sources)) > 4  # of the next one in the batch, not of one for all
    same = [Problem("What is 1?", "5", "Five it is."), Problem("What is 2?", "5.0", "Five it is.")]
    args = args_of(opsd, "--context", "other-solution", "--batch-size", 2)
    for r in teacher_prompts(tokenizer, args, lambda text, j, call: box(99), same):
        assert "A correct solution: \n" in tokenizer.decode(r.teacher_prompt_ids)


def test_another_problem_is_found_at_once(tokenizer, args_of, monkeypatch):
    """A verdict takes milliseconds. Each problem compared with its whole batch, forty refills in one call were an
    hour of verdicts: here 50 problems with an answer each take 50."""
    asked, verify_batch = [], opsd.verify_batch
    monkeypatch.setattr(opsd, "verify_batch", lambda texts, golds: asked.extend(texts) or verify_batch(texts, golds))
    args = args_of(opsd, "--context", "other-solution", "--batch-size", 50)
    teacher_prompts(tokenizer, args, lambda text, j, call: box(99), MANY)
    assert len(asked) == 50


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
    _, kept = opsd.sample_rollouts(scripted_sampler(tokenizer, script), PROBLEMS, {"cursor": 0, "kept_frac": 1.0}, args)
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
    _, kept = opsd.sample_rollouts(sampler, PROBLEMS, {"cursor": 0, "kept_frac": 1.0}, args)
    assert [r.teacher_prompt_ids for r in kept] == [r.prompt_ids for r in kept] and len(kept) == 8
    loss = opsd.accumulate_gradients(student, copy.deepcopy(student), kept, args)
    assert abs(loss) < 1e-9 and take_gradient(student).abs().max() < 1e-8
    shown = opsd.sample_rollouts(sampler, PROBLEMS, {"cursor": 0, "kept_frac": 1.0}, args_of(opsd, *flags))[1]
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


def test_a_cap_is_in_the_loss_and_not_in_what_is_measured(run_opsd):
    """distill/kl is the loss, so it has the cap in it; distill/kl_* say how far apart the two are, with a cap or
    without. Clipped as well, they would fall the moment that the flag is given."""
    _, _, plain = run_opsd()
    cap = plain[0]["distill/kl"] / 2
    _, _, capped = run_opsd("--token-clip", cap, "--overwrite")
    assert 0 < capped[0]["distill/kl"] <= cap < plain[0]["distill/kl"]
    measured = [key for key in plain[0] if key.startswith(("distill/kl_", "distill/entropy_", "distill/forks_"))]
    assert {"distill/kl_first", "distill/kl_last"} < set(measured)
    assert all(capped[0][key] == plain[0][key] for key in measured)
