"""The course's exercises 1 to 13, from a prompt to a live teacher. tests/course/README.md has the page.

    python -m pytest tests/course/test_exercises.py -k exercise_3_

The last _ matters: without it, exercise_1 means 10 to 13 too. Every expected number is worked out by hand in
the test's docstring; tolerance 1e-5. Tests reach the code through tests/course/adapters.py.
"""

import math
from types import SimpleNamespace

import adapters
import pytest
import torch
import weak_verifier

import rollout
from verify import extract_answer, verify


def close(tensor, expected):
    return torch.as_tensor(tensor).flatten().tolist() == pytest.approx(expected, abs=1e-5)


# 1. The privileged prompt -----------------------------------------------------------------------------------


class Letters:
    """Stands in for a tokenizer with a chat template: a token is a character, its id the character's code."""

    def apply_chat_template(
        self, messages, add_generation_prompt=False, enable_thinking=True, return_dict=True, **others
    ):
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        if add_generation_prompt:
            text += "<assistant>" + ("" if enable_thinking else "<think></think>")
        ids = [ord(character) for character in text]
        return {"input_ids": ids} if return_dict else ids

    def decode(self, ids):
        return "".join(map(chr, ids))


ASKED = rollout.INSTRUCTION + "<assistant>"
SOLUTION = rollout.PRIVILEGED["solution"].replace("{}", "2+3=5, so \\boxed{5}.")


@pytest.mark.parametrize("context, privileged, thinking, expected", [
    (None, "", True, f"<user>Compute 2+3.{ASKED}"),  # the student's
    ("solution", "2+3=5, so \\boxed{5}.", True, f"<user>Compute 2+3.{SOLUTION}{ASKED}"),  # the teacher's
    ("concise", "", True, f"<user>Compute 2+3.{rollout.PRIVILEGED['concise']}{ASKED}"),  # no text
    (None, "", False, f"<user>Compute 2+3.{ASKED}<think></think>"),
    ("solution", "2+3=5, so \\boxed{5}.", False, f"<user>Compute 2+3.{SOLUTION}{ASKED}<think></think>"),
])  # fmt: skip
def test_exercise_1_privileged_prompt(context, privileged, thinking, expected):
    """Student and teacher are asked the same, end in the same tokens, and differ in what stands between.

    Braces are usual in mathematics: neither those of the solution nor those of INSTRUCTION may be filled in.
    """
    problem, tokenizer = rollout.Problem("Compute 2+3.", "5", "2+3=5, so \\boxed{5}."), Letters()
    ids = adapters.run_render_prompt(tokenizer, problem, context, privileged, thinking)
    assert tokenizer.decode(ids) == expected


# 2. Inverse-CDF sampling ------------------------------------------------------------------------------------


def test_exercise_2_shares_of_the_unit_interval():
    """p = .2 .3 .5 cumulates to .2 .5 1: of ten numbers spread evenly over [0, 1), 2 fall to the first id,
    3 to the second, 5 to the third."""
    uniforms = torch.arange(10, dtype=torch.float64) / 10 + 0.05
    ids = adapters.run_sample_ids(torch.tensor([[0.2, 0.3, 0.5]] * 10).log(), uniforms)
    assert ids.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_exercise_2_each_row_has_its_own_number():
    """Two rows, p = .9 .1 and .1 .9, and u = .5 for both: ids 0 and 1."""
    log_probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
    uniforms = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert adapters.run_sample_ids(log_probs, uniforms).tolist() == [0, 1]


@pytest.mark.parametrize("probs, uniform, expected", [
    ([0.0, 0.5, 0.5], 0.0, 1),  # 0 does not exceed 0: an id of probability 0 is never drawn
    ([0.25, 0.25, 0.25, 0.25], 0.5, 2),  # .5 does not exceed .5: the third id owns [.5, .75)
])  # fmt: skip
def test_exercise_2_on_the_border(probs, uniform, expected):
    """The first id whose cumulated probability *exceeds* u."""
    ids = adapters.run_sample_ids(torch.tensor([probs]).log(), torch.tensor([uniform], dtype=torch.float64))
    assert ids.tolist() == [expected]


def test_exercise_2_the_total_need_not_be_one():
    """In float32 a vocabulary's probabilities sum to 1 up to rounding; here, for the eye, to .9.

    p = .45 .45 0, u = .95. u times the total is .855, which .9 exceeds first: id 1. Without the total nothing
    exceeds .95, and what is drawn is whatever stands last, here an id of probability 0.
    """
    log_probs = torch.tensor([[0.45, 0.45, 0.0]]).log()
    assert adapters.run_sample_ids(log_probs, torch.tensor([0.95], dtype=torch.float64)).tolist() == [1]


# 3. Masks come from lengths ---------------------------------------------------------------------------------


def test_exercise_3_masks_from_lengths():
    """Here 0 is both padding and EOS, as in many tokenizers. EOS is trained, padding and prompt are not.

    Widths 2 + 2 and 1 + 4: T = 5. Row 1: 5 6 | 7 0 | pad; row 2: 8 | 9 9 9 0.
    """
    input_ids, mask = adapters.run_collate([[5, 6], [8]], [[7, 0], [9, 9, 9, 0]])
    assert input_ids.tolist() == [[5, 6, 7, 0, 0], [8, 9, 9, 9, 0]]
    assert mask.tolist() == [[False, False, True, True, False], [False, True, True, True, True]]
    assert mask.dtype == torch.bool and input_ids.dtype == torch.long


# 4. The shift -----------------------------------------------------------------------------------------------


class Places(torch.nn.Module):
    """A stand-in for a model: the hidden state of row b at position t is weight * (10 b + t), so H = 1."""

    is_gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def base_model(self, input_ids, **others):
        rows, width = input_ids.shape
        places = 10.0 * torch.arange(rows)[:, None] + torch.arange(width)
        return SimpleNamespace(last_hidden_state=self.weight * places[:, :, None])


def test_exercise_4_shift():
    """What the model puts out at position t predicts the token at t + 1.

    Row 0: prompt at 0 1, response at 2 3, padding at 4: predicted at 1 2. Row 1: prompt at 0, response at 1
    to 4: predicted at 10 11 12 13. Their sum, 1 + 2 + 10 + 11 + 12 + 13 = 49, is the weight's gradient.
    """
    mask = torch.tensor([[False, False, True, True, False], [False, True, True, True, True]])
    model = Places()
    hidden = adapters.run_response_hidden_states(model, torch.zeros(2, 5, dtype=torch.long), mask)
    assert hidden.shape == (6, 1) and close(hidden.detach(), [1, 2, 10, 11, 12, 13])
    hidden.sum().backward()
    assert close(model.weight.grad, [49])


# 5. A masked mean -------------------------------------------------------------------------------------------


def test_exercise_5_masked_mean():
    """Only response tokens count, and the mean is over the number it is told, not over what the tensor holds.

    Log-probs -1 -2 -4 | -8 -16 -32, mask 0 1 1 | 0 0 1: (2 + 4 + 32) / 10 = 3.8. The 10 is the whole batch's
    count: this is one of its micro-batches. The gradient is -mask / 10.
    """
    log_probs = torch.tensor([[-1.0, -2, -4], [-8, -16, -32]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    loss = adapters.run_sft_loss(log_probs, mask, 10)
    assert close(loss.detach(), [3.8])
    loss.backward()
    assert close(log_probs.grad, [0, -0.1, -0.1, 0, 0, -0.1])


# 6. Fooling a verifier --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", weak_verifier.WEAK)
def test_exercise_6_fooling_a_verifier(name):
    """An answer is given, the weak verifier accepts the response, and verify.verify refuses it."""
    response = adapters.run_fool()[name]
    assert extract_answer(response) is not None, f"{name}: {response!r} gives no answer"
    assert weak_verifier.WEAK[name](response, weak_verifier.GOLD), f"{name} refuses {response!r}"
    assert not verify(response, weak_verifier.GOLD), f"{response!r} is right: verify.verify accepts it too"


# 7. Advantages within a group -------------------------------------------------------------------------------


def test_exercise_7_advantages():
    """Rewards 1 1 0 1 | 0 0 0 0, groups of 4. First mean .75, population std sqrt(.75 * .25) = .4330127:
    .25 / .4330127 = .5773503 and -.75 / .4330127 = -1.7320508. Second: no variance, no signal: 0, no NaN."""
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0])
    got = adapters.run_compute_group_normalized_rewards(rewards, 4)
    assert close(got, [0.5773503, 0.5773503, -1.7320508, 0.5773503, 0, 0, 0, 0])


def test_exercise_7_without_std():
    """Dr. GRPO leaves the std out: .25 .25 -.75 .25 and zeros."""
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0])
    got = adapters.run_compute_group_normalized_rewards(rewards, 4, use_std=False)
    assert close(got, [0.25, 0.25, -0.75, 0.25, 0, 0, 0, 0])


# 8. Clip higher ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, advantage, loss, gradient, clipped", [
    (1.0, 3.0, -3.0, -3.0, False),  # on policy: the loss is -A, and so is its gradient
    (1.25, 2.0, -2.5, -2.5, False),  # between 1 + .2 and 1 + .28: a symmetric clip would have stopped it
    (1.4, 2.0, -2.56, 0.0, True),  # 1.28 * 2: no further up
    (0.7, 2.0, -1.4, -1.4, False),  # below the range, but A > 0 wants it up: the min keeps the gradient
    (0.7, -1.0, 0.8, 0.0, True),  # (1 - .2) * 1: no further down
    (1.4, -1.0, 1.4, 1.4, False),  # above the range, A < 0 wants it down
    (5.0, -1.0, 3.0, 0.0, False),  # ... and there the cap of 3 on the ratio is the only limit
])  # fmt: skip
def test_exercise_8_clip_higher(ratio, advantage, loss, gradient, clipped):
    """-min(r A, clip(r, 1 - .2, 1 + .28) A); d/d log pi of -r A is -r A."""
    policy = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    old, advantages = torch.tensor([[-1.0]]), torch.tensor([[advantage]])
    token_loss, took = adapters.run_grpo_clip_loss(policy, old, advantages, 0.2, 0.28, 3.0)
    token_loss.sum().backward()
    assert close(token_loss.detach(), [loss]) and close(policy.grad, [gradient])
    assert took.tolist() == [[clipped]]


# 9. Length normalization ------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization, expected", [
    ("token", [0.1, 0.1]),  # 1 / (2 + 8)
    ("sequence", [0.25, 0.0625]),  # 1 / (2 * 2), 1 / (2 * 8): the short one's tokens weigh 4 times as much
    ("constant", [0.03125, 0.03125]),  # 1 / (2 * 16)
])  # fmt: skip
def test_exercise_9_length_normalization(normalization, expected):
    """Two responses of 2 and 8 tokens, at most 16 allowed."""
    assert close(adapters.run_sequence_weights(torch.tensor([2.0, 8.0]), normalization, 16), expected)


# 10. k3 -----------------------------------------------------------------------------------------------------


def test_exercise_10_k3():
    """p .8 .5 .3, q .5 .2 .3. r = .625: .625 - 1 - ln .625 = -.375 + .4700036; r = .4: -.6 + .9162907;
    r = 1: 0. The gradient by log p is 1 - r: .375, .6, 0."""
    p_log_probs = torch.tensor([0.8, 0.5, 0.3]).log().requires_grad_()
    value = adapters.run_k3_kl(p_log_probs, torch.tensor([0.5, 0.2, 0.3]).log())
    assert close(value.detach(), [0.0950036, 0.3162907, 0])
    value.sum().backward()
    assert close(p_log_probs.grad, [0.375, 0.6, 0])


def test_exercise_10_its_mean_is_the_kl():
    """P = .8 .2, Q = .5 .5: r = .625 and 2.5, k3 = .0950036 and 1.5 - .9162907 = .5837093. In the mean over
    tokens drawn from P: .8 * .0950036 + .2 * .5837093 = .1927448, which is KL(P || Q), as in exercise 11. And
    it is never negative, as -log r can be (.4700036 and -.9162907)."""
    p_log_probs, q_log_probs = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.5, 0.5]).log()
    value = adapters.run_k3_kl(p_log_probs, q_log_probs)
    assert close((torch.tensor([0.8, 0.2]) * value).sum(), [0.1927448])
    assert (value >= 0).all()


# 11. Reverse and forward KL ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, expected, gradient", [
    # .8 ln(.8/.5) + .2 ln(.2/.5) = .3760029 - .1832581; gradient S (ln(S/T) - KL) = .8 (.4700036 - .1927448)
    ("reverse", 0.1927448, 0.2218071),
    # .5 ln(.5/.8) + .5 ln(.5/.2) = -.2350018 + .4581454; gradient S - T = .3
    ("forward", 0.2231436, 0.3),
])  # fmt: skip
def test_exercise_11_reverse_and_forward(kind, expected, gradient):
    """S = .8 .2, T = .5 .5. Student first in both calls: only the direction differs. Logits are log-probs
    plus a constant, which a softmax does not see."""
    student = (torch.tensor([[0.8, 0.2]]).log() + 7).requires_grad_()
    value = adapters.run_divergence(student, torch.tensor([[0.5, 0.5]]).log() - 2, kind)
    value.sum().backward()
    assert close(value.detach(), [expected]) and close(student.grad, [gradient, -gradient])


def test_exercise_11_jsd():
    """M = .65 .35. KL(T||M) = .5 ln(.5/.65) + .5 ln(.5/.35) = -.1311821 + .1783375 = .0471554,
    KL(S||M) = .8 ln(.8/.65) + .2 ln(.2/.35) = .1661115 - .1119232 = .0541883; half of each: .0506718."""
    student, teacher = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert close(adapters.run_divergence(student, teacher, "jsd"), [0.0506718])


def test_exercise_11_jsd_with_another_beta():
    """beta = .25 weighs the teacher: M = .725 .275, KL(T||M) = .1131367, KL(S||M) = .0150613,
    .25 * .1131367 + .75 * .0150613 = .0395802. The weights swapped would give .0368936."""
    student, teacher = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert close(adapters.run_divergence(student, teacher, "jsd", 0.25), [0.0395802])


def test_exercise_11_split():
    """Reverse where the response is correct, forward where it is not: the numbers of the first test."""
    student, teacher = torch.tensor([[0.8, 0.2]] * 2).log(), torch.tensor([[0.5, 0.5]] * 2).log()
    is_correct = torch.tensor([True, False])
    got = adapters.run_divergence(student, teacher, "split", is_correct=is_correct)
    assert close(got, [0.1927448, 0.2231436])


# 12. Which rollouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, kept", [
    ("", "correct incorrect truncated"),
    ("only_correct", "correct"),
    ("only_incorrect", "incorrect truncated"),  # the paper's code counts what is cut off as incorrect
    ("drop", "correct incorrect"),
    ("only_incorrect drop", "incorrect"),
    ("only_correct correct", "correct truncated"),
])  # fmt: skip
def test_exercise_12_which_rollouts(flags, kept):
    """The filter that the paper is about."""
    words = flags.split()
    args = SimpleNamespace(only_correct="only_correct" in words, only_incorrect="only_incorrect" in words)
    args.truncated = next((word for word in ("drop", "correct") if word in words), "incorrect")
    labels = ["correct", "incorrect", "truncated"]
    assert [x for x in labels if adapters.run_is_kept(SimpleNamespace(label=x), args)] == kept.split()


# 13. A live teacher -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, step, expected", [
    ("frozen", 4, 1.0),
    ("refresh", 3, 1.0),  # not yet: every 2 steps
    ("refresh", 4, 5.0),
    ("ema", 3, 1.4),  # .9 * 1 + .1 * 5
])  # fmt: skip
def test_exercise_13_a_live_teacher(mode, step, expected):
    """Teacher 1, student 5. The student must stay what it is, also when the teacher is changed afterwards."""
    teacher, student = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for model, value in (teacher, 1.0), (student, 5.0):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, value)
    args = SimpleNamespace(teacher=mode, refresh_every=2, ema_decay=0.9)
    adapters.run_update_teacher(step, teacher, student, args)
    assert close(teacher.weight.detach(), [expected]) and close(teacher.bias.detach(), [expected])
    assert close(student.weight.detach(), [5.0])
    torch.nn.init.constant_(teacher.weight, 0.0)
    assert close(student.weight.detach(), [5.0])
