"""Eight exercises, from a masked mean to which rollouts to learn from. The README has the course's page.

    python -m pytest tests/course/test_exercises.py -k exercise_3

Every expected number is worked out by hand in the docstring; tolerance 1e-5. Tests reach the code through
tests/course/adapters.py.
"""

import math
from types import SimpleNamespace

import adapters
import pytest
import torch


def close(tensor, expected):
    return torch.as_tensor(tensor).flatten().tolist() == pytest.approx(expected, abs=1e-5)


# 1. A masked mean ---------------------------------------------------------------------------------------------


def test_exercise_1_masked_mean():
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


# 2. Masks come from lengths -----------------------------------------------------------------------------------


def test_exercise_2_masks_from_lengths():
    """Here 0 is both padding and EOS, as in many tokenizers. EOS is trained, padding and prompt are not.

    Widths 2 + 2 and 1 + 4: T = 5. Row 1: 5 6 | 7 0 | pad; row 2: 8 | 9 9 9 0.
    """
    input_ids, mask = adapters.run_collate([[5, 6], [8]], [[7, 0], [9, 9, 9, 0]])
    assert input_ids.tolist() == [[5, 6, 7, 0, 0], [8, 9, 9, 9, 0]]
    assert mask.tolist() == [[False, False, True, True, False], [False, True, True, True, True]]
    assert mask.dtype == torch.bool and input_ids.dtype == torch.long


# 3. Advantages within a group ---------------------------------------------------------------------------------


def test_exercise_3_advantages():
    """Rewards 1 1 0 1 | 0 0 0 0, groups of 4. First mean .75, population std sqrt(.75 * .25) = .4330127:
    .25 / .4330127 = .5773503 and -.75 / .4330127 = -1.7320508. Second: no variance, no signal, zeros, no NaN."""
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0])
    got = adapters.run_compute_group_normalized_rewards(rewards, 4)
    assert close(got, [0.5773503, 0.5773503, -1.7320508, 0.5773503, 0, 0, 0, 0])


def test_exercise_3_without_std():
    """Dr. GRPO leaves the std out: .25 .25 -.75 .25 and zeros."""
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0])
    got = adapters.run_compute_group_normalized_rewards(rewards, 4, use_std=False)
    assert close(got, [0.25, 0.25, -0.75, 0.25, 0, 0, 0, 0])


# 4. Clip higher -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, advantage, loss, gradient, clipped", [
    (1.0, 3.0, -3.0, -3.0, False),  # on policy: the loss is -A, and so is its gradient
    (1.25, 2.0, -2.5, -2.5, False),  # between 1 + .2 and 1 + .28: a symmetric clip would have stopped it
    (1.4, 2.0, -2.56, 0.0, True),  # 1.28 * 2: no further up
    (0.7, 2.0, -1.4, -1.4, False),  # below the range, but A > 0 wants it up: the min keeps the gradient
    (0.7, -1.0, 0.8, 0.0, True),  # (1 - .2) * 1: no further down
    (1.4, -1.0, 1.4, 1.4, False),  # above the range, A < 0 wants it down
    (5.0, -1.0, 3.0, 0.0, False),  # ... and there the cap of 3 on the ratio is the only limit
])  # fmt: skip
def test_exercise_4_clip_higher(ratio, advantage, loss, gradient, clipped):
    """-min(r A, clip(r, 1 - .2, 1 + .28) A); d/d log pi of -r A is -r A."""
    policy = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
    old, advantages = torch.tensor([[-1.0]]), torch.tensor([[advantage]])
    token_loss, took = adapters.run_grpo_clip_loss(policy, old, advantages, 0.2, 0.28, 3.0)
    token_loss.sum().backward()
    assert close(token_loss.detach(), [loss]) and close(policy.grad, [gradient])
    assert took.tolist() == [[clipped]]


# 5. Length normalization --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization, expected", [
    ("token", [0.1, 0.1]),  # 1 / (2 + 8)
    ("sequence", [0.25, 0.0625]),  # 1 / (2 * 2), 1 / (2 * 8): the short one's tokens weigh 4 times as much
    ("constant", [0.03125, 0.03125]),  # 1 / (2 * 16)
])  # fmt: skip
def test_exercise_5_length_normalization(normalization, expected):
    """Two responses of 2 and 8 tokens, at most 16 allowed."""
    assert close(adapters.run_sequence_weights(torch.tensor([2.0, 8.0]), normalization, 16), expected)


# 6. Reverse and forward KL ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, expected, gradient", [
    # .8 ln(.8/.5) + .2 ln(.2/.5) = .3760029 - .1832581; gradient S (ln(S/T) - KL) = .8 (.4700036 - .1927448)
    ("reverse", 0.1927448, 0.2218071),
    # .5 ln(.5/.8) + .5 ln(.5/.2) = -.2350018 + .4581454; gradient S - T = .3
    ("forward", 0.2231436, 0.3),
])  # fmt: skip
def test_exercise_6_reverse_and_forward(kind, expected, gradient):
    """S = .8 .2, T = .5 .5. Student first in both calls: only the direction differs. Logits are log-probs plus
    a constant, which a softmax does not see."""
    student = (torch.tensor([[0.8, 0.2]]).log() + 7).requires_grad_()
    value = adapters.run_divergence(student, torch.tensor([[0.5, 0.5]]).log() - 2, kind)
    value.sum().backward()
    assert close(value.detach(), [expected]) and close(student.grad, [gradient, -gradient])


def test_exercise_6_jsd():
    """M = .65 .35. KL(T||M) = .5 ln(.5/.65) + .5 ln(.5/.35) = -.1311821 + .1783375 = .0471554,
    KL(S||M) = .8 ln(.8/.65) + .2 ln(.2/.35) = .1661115 - .1119232 = .0541883; half of each: .0506718."""
    student, teacher = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert close(adapters.run_divergence(student, teacher, "jsd"), [0.0506718])


def test_exercise_6_jsd_with_another_beta():
    """beta = .25 weighs the teacher: M = .725 .275, KL(T||M) = .1131367, KL(S||M) = .0150613,
    .25 * .1131367 + .75 * .0150613 = .0395802. The weights swapped would give .0368936."""
    student, teacher = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert close(adapters.run_divergence(student, teacher, "jsd", 0.25), [0.0395802])


def test_exercise_6_split():
    """Reverse where the response is correct, forward where it is not: the numbers of the first test."""
    student, teacher = torch.tensor([[0.8, 0.2]] * 2).log(), torch.tensor([[0.5, 0.5]] * 2).log()
    is_correct = torch.tensor([True, False])
    got = adapters.run_divergence(student, teacher, "split", is_correct=is_correct)
    assert close(got, [0.1927448, 0.2231436])


# 7. A live teacher --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode, step, expected", [
    ("frozen", 4, 1.0),
    ("refresh", 3, 1.0),  # not yet: every 2 steps
    ("refresh", 4, 5.0),
    ("ema", 3, 1.4),  # .9 * 1 + .1 * 5
])  # fmt: skip
def test_exercise_7_a_live_teacher(mode, step, expected):
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


# 8. Which rollouts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, kept", [
    ("", "correct incorrect truncated"),
    ("only_correct", "correct"),
    ("only_incorrect", "incorrect truncated"),  # the paper's code counts what is cut off as incorrect
    ("drop", "correct incorrect"),
    ("only_incorrect drop", "incorrect"),
    ("only_correct correct", "correct truncated"),
])  # fmt: skip
def test_exercise_8_which_rollouts(flags, kept):
    """The filter that the paper is about."""
    words = flags.split()
    args = SimpleNamespace(only_correct="only_correct" in words, only_incorrect="only_incorrect" in words)
    args.truncated = next((word for word in ("drop", "correct") if word in words), "incorrect")
    labels = ["correct", "incorrect", "truncated"]
    assert [x for x in labels if adapters.run_is_kept(SimpleNamespace(label=x), args)] == kept.split()
