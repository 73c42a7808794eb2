"""rlvr.py: advantages, the clipped loss and its gradient, normalisation, and which reward goes to whom."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, assert_same_gradient, full_log_probs, make_tiny, plain_log_probs, scripted_sampler
from conftest import take_gradient

import rlvr
import rollout
from rollout import HFSampler, Problem, Rollout

ADVANTAGES = [1.0, -0.5, 0.0, -1.5, 0.75, 2.0, -1.0, 0.25]  # of the eight rollouts of conftest
NORMALIZATIONS = ["token", "sequence", "constant"]


@pytest.fixture
def on_policy(model, rollouts):
    """The eight rollouts with the log-probs that this very model gives them, as after sampling."""
    for r in rollouts:
        r.log_probs = plain_log_probs(model, r.prompt_ids, r.response_ids).tolist()
    return rollouts


def with_advantages(rollouts, advantages):
    for r, advantage in zip(rollouts, advantages, strict=True):
        r.advantage = advantage
    return rollouts


# ------------------------------------------------------------------------------------------------------------
# Advantages


def test_advantages_by_hand():
    """Normalised over the batch, or over the wrong axis, easy prompts pay for hard ones.

    1 0 0 1: mean .5, std .5: +1 -1 -1 +1.  All equal: 0, not 0/0.
    1 0 0 0: mean .25, std sqrt(3)/4 = .4330127: .75/.4330127 = 1.7320508, -.25/.4330127 = -.5773503.
    """
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    got = rlvr.compute_group_normalized_rewards(rewards, 4)
    expected = [1, -1, -1, 1, 0, 0, 0, 0, 1.7320508, -0.5773503, -0.5773503, -0.5773503, 0, 0, 0, 0]
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    got = rlvr.compute_group_normalized_rewards(rewards, 4, use_std=False)
    expected = [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, 0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize(
    "advantage, ratio, value, gradient, clipped",
    [
        (2.0, 1.1, -2.2, -2.2, False),  # inside: -r A, and d/d log pi of it is -r A again
        (2.0, 1.5, -2.56, 0.0, True),  # -1.28 * 2: high enough, no further
        (2.0, 0.5, -1.0, -1.0, False),  # min(1, 1.6): below the range and A > 0: still raised
        (-1.0, 1.1, 1.1, 1.1, False),
        (-1.0, 0.5, 0.8, 0.0, True),  # 0.8: low enough, no further
        (-1.0, 1.5, 1.5, 1.5, False),  # min(-1.5, -1.28): above the range and A < 0: still lowered
        (-1.0, 5.0, 3.0, 0.0, False),  # the cap
        (2.0, 5.0, -2.56, 0.0, True),
        (0.0, 1.5, 0.0, 0.0, False),
        (2.0, 1.25, -2.5, -2.5, False),  # between 1.2 and 1.28: the upper clip is the higher one
        (2.0, 0.75, -1.5, -1.5, False),
        (-1.0, 0.75, 0.8, 0.0, True),  # between 0.72 and 0.8: the lower clip is 0.2
    ],
)
def test_grpo_clip_loss_by_hand(advantage, ratio, value, gradient, clipped):
    """A flipped sign, a max for the min, or swapped clips: the loss stays near 0, only the reward would tell.

    Clips at 1 - .2 and 1 + .28, ratio capped at 3. The token stands between two whose ratio is 1.
    """
    old = torch.tensor([[-1.0, -2.0, -3.0]])
    policy = (old + torch.tensor([[0.0, math.log(ratio), 0.0]])).requires_grad_()
    loss, took = rlvr.grpo_clip_loss(policy, old, torch.tensor([[advantage]]), 0.2, 0.28, ratio_cap=3.0)
    loss.sum().backward()
    assert loss[0].tolist() == pytest.approx([-advantage, value, -advantage], abs=1e-5)
    assert policy.grad[0].tolist() == pytest.approx([-advantage, gradient, -advantage], abs=1e-5)
    assert took[0].tolist() == [False, clipped, False]


def test_without_a_cap_a_mismatched_token_rules_the_step():
    """What the cap is for: A = -1 and a ratio of 100 make a loss of 100 with a gradient of 100."""
    policy = torch.tensor([[math.log(100.0)]], requires_grad=True)
    loss, _ = rlvr.grpo_clip_loss(policy, torch.zeros(1, 1), torch.tensor([[-1.0]]), 0.2, 0.28)
    loss.sum().backward()
    assert loss.item() == pytest.approx(100, rel=1e-5) and policy.grad.item() == pytest.approx(100, rel=1e-5)


def test_sequence_weights_by_hand():
    """A mean of means, or a normaliser over what was left after a mask, silently favours short or long
    answers.

    Lengths 2, 1, 5 with a limit of 10. token: 1/8 each. sequence: 1/(3*2), 1/3, 1/(3*5). constant: 1/(3*10)
    each.
    """
    weights = lambda kind: rlvr.sequence_weights(torch.tensor([2.0, 1, 5]), kind, 10).tolist()  # noqa: E731
    assert weights("token") == pytest.approx([0.125] * 3, abs=1e-7)
    assert weights("sequence") == pytest.approx([1 / 6, 1 / 3, 1 / 15], abs=1e-7)
    assert weights("constant") == pytest.approx([1 / 30] * 3, abs=1e-7)


# ------------------------------------------------------------------------------------------------------------
# accumulate_gradients


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_loss_on_policy_by_hand(model, on_policy, args_of, normalization):
    """With ratios of 1 a token's loss is -A, so the loss is -sum A_i |y_i| w_i whatever the model.

    A |y| = 7, -.5, 0, -7.5, 1.5, 12, -4, .75, sum 9.25. token: 9.25/31 = .2983871. constant (L = 10): 9.25/80
    = .115625. sequence: mean of A = 1/8 = .125. (So prompt tokens, padding and batch order show.)
    """
    expected = {"token": 0.2983871, "constant": 0.115625, "sequence": 0.125}[normalization]
    flags = ["--loss-normalization", normalization, "--max-new-tokens", 10, "--micro-batch-size", 3]
    args = args_of(rlvr, *flags)
    metrics = rlvr.accumulate_gradients(model, None, with_advantages(on_policy, ADVANTAGES), args)
    assert metrics["loss"] == pytest.approx(-expected, abs=1e-5)
    assert metrics["kl/sample_train"] == pytest.approx(0, abs=1e-6) and metrics["ratio/clip_frac"] == 0
    entropies = [full_log_probs(model, r.prompt_ids, r.response_ids) for r in on_policy]
    entropy = -sum((full.exp() * full).sum().item() for full in entropies) / 31
    assert metrics["entropy"] == pytest.approx(entropy, abs=1e-4)


def plain_rlvr_loss(model, rollouts, args):
    """The formula, one response at a time and one token at a time."""
    n, b, loss = sum(len(r.response_ids) for r in rollouts), len(rollouts), 0
    for r, a in zip(rollouts, ADVANTAGES):
        weights = {"token": 1 / n, "sequence": 1 / (b * len(r.response_ids)), "constant": 1 / (b * 10)}
        log_probs = plain_log_probs(model, r.prompt_ids, r.response_ids, args.temperature)
        for new, old in zip(log_probs, r.log_probs):
            rho = (new - old).exp().clamp(max=args.ratio_cap)
            bounded = rho.clamp(1 - args.clip_low, 1 + args.clip_high)
            loss -= torch.minimum(rho * a, bounded * a) * weights[args.loss_normalization]
    return loss


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_loss_and_gradient_are_those_of_the_formula(any_model, rollouts, args_of, normalization):
    """Off policy, ratios on both sides of both clips: finds old log-probs of another token or row, a lost
    mask, a weight or advantage that went to another rollout when the batch was sorted."""
    args = args_of(rlvr, "--loss-normalization", normalization, "--temperature", 0.7, "--max-new-tokens", 10)
    loss = plain_rlvr_loss(any_model, rollouts, args)
    loss.backward()
    expected = take_gradient(any_model)
    metrics = rlvr.accumulate_gradients(any_model, None, with_advantages(rollouts, ADVANTAGES), args)
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert 0 < metrics["ratio/clip_frac"] < 1 and metrics["kl/sample_train"] > 0.1
    assert_same_gradient(take_gradient(any_model), expected)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_gradient_does_not_depend_on_the_micro_batch(model, rollouts, args_of, normalization):
    """N counted within a micro-batch makes --micro-batch-size, a memory setting, a learning-rate setting."""
    reference, results = make_tiny(seed=1), []
    for size in (8, 4, 3, 2, 1):
        flags = ["--loss-normalization", normalization, "--micro-batch-size", size, "--kl-coef", 0.3]
        args = args_of(rlvr, *flags)
        metrics = rlvr.accumulate_gradients(model, reference, with_advantages(rollouts, ADVANTAGES), args)
        results.append((metrics, take_gradient(model)))
    for metrics, gradient in results[1:]:
        assert metrics == pytest.approx(results[0][0], abs=1e-5)
        assert_same_gradient(gradient, results[0][1])


def test_one_step_raises_what_was_rewarded_and_lowers_the_other(model, args_of):
    """The sign, end to end: with it flipped, training runs just as smoothly, downhill."""
    said = [Rollout([3, 4], [6, 7, 0], [], True), Rollout([3, 4], [8, 9, 2, 0], [], True)]
    for r in said:
        r.log_probs = plain_log_probs(model, r.prompt_ids, r.response_ids).tolist()
    before = [sum(r.log_probs) for r in said]
    advantages = rlvr.compute_group_normalized_rewards(torch.tensor([0.0, 1.0]), 2).tolist()
    rlvr.accumulate_gradients(model, None, with_advantages(said, advantages), args_of(rlvr))
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    after = [plain_log_probs(model, r.prompt_ids, r.response_ids).sum().item() for r in said]
    assert after[0] < before[0] - 1e-3 and after[1] > before[1] + 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_was_sampled_has_a_ratio_of_one(model, args_of, temperature):
    """Sampled at T = .7 and scored at T = 1, the ratio is off at every token, and clipped at most of them."""
    sampler = HFSampler(model, SimpleNamespace(eos_token_id=EOS))
    said = sampler.generate([[3, 4, 5], [6], [7, 8]], 4, max_new_tokens=12, temperature=temperature)
    args = args_of(rlvr, "--temperature", temperature)
    metrics = rlvr.accumulate_gradients(model, None, with_advantages(said, [1.0] * 12), args)
    assert metrics["kl/sample_train"] == pytest.approx(0, abs=1e-7) and metrics["ratio/clip_frac"] == 0
    assert metrics["loss"] == pytest.approx(-1, abs=1e-5)


def test_the_kl_term_by_hand(model, on_policy, args_of):
    """--kl-coef adds coef * mean k3 over response tokens: 0 against itself, never training the reference."""
    args = args_of(rlvr, "--kl-coef", 0.5)
    reference = make_tiny(seed=1)
    score = lambda m, r: plain_log_probs(m, r.prompt_ids, r.response_ids)  # noqa: E731
    log_ratio = torch.cat([score(reference, r) - score(model, r) for r in on_policy])
    mean = (log_ratio.exp() - 1 - log_ratio).mean()
    mean.backward()
    take_gradient(reference)
    expected = 0.5 * take_gradient(model)
    metrics = rlvr.accumulate_gradients(model, reference, with_advantages(on_policy, [0.0] * 8), args)  # the KL alone
    assert metrics["kl/ref"] == pytest.approx(mean.item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(0.5 * mean.item(), rel=1e-4)
    assert_same_gradient(take_gradient(model), expected)
    assert all(p.grad is None or not p.grad.any() for p in reference.parameters())
    metrics = rlvr.accumulate_gradients(model, copy.deepcopy(model), with_advantages(on_policy, [0.0] * 8), args)
    assert metrics["kl/ref"] == metrics["loss"] == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Groups: which reward goes to whom, and which group teaches nothing

PROBLEMS = [Problem(f"What is {n}?", str(n)) for n in range(8)]
FLAGS = ["--batch-size", 8, "--group-size", 4]


def box(n):
    return f"<think></think>\\boxed{{{n}}}"


def gold(problem_text):
    return int(problem_text.removeprefix("What is ").removesuffix("?"))


def sample_groups(sampler, args):
    return rlvr.sample_groups(sampler, PROBLEMS, {"cursor": 0}, args)


def test_a_reward_goes_to_the_completion_that_earned_it(tokenizer, args_of):
    """With rewards transposed (P x G read as G x P), every curve looks as usual and nothing is learned.

    To problem n the j-th of four responses is right if j = n mod 4: elsewhere in each group.
    """
    script = lambda text, j, call: box(gold(text) if j == gold(text) % 4 else 99)  # noqa: E731
    sampler = scripted_sampler(tokenizer, script)
    everything, kept, uniform = sample_groups(sampler, args_of(rlvr, *FLAGS))
    assert len(everything) == len(kept) == 32 and uniform == 0
    for r in kept:
        right = r.text == box(int(r.problem.answer))
        assert r.label == ("correct" if right else "incorrect")
        assert r.advantage == pytest.approx(1.7320508 if right else -0.5773503, abs=1e-5)
        assert tokenizer.decode(r.prompt_ids).startswith(f"<|user|>{r.problem.problem}")
    assert {r.problem.problem for r in kept} == {p.problem for p in PROBLEMS}
    _, kept, _ = sample_groups(sampler, args_of(rlvr, "--no-std", *FLAGS))
    assert {(r.label, r.advantage) for r in kept} == {("correct", 0.75), ("incorrect", -0.25)}


def test_a_users_reward_is_asked_of_finished_responses_only():
    """A reward that likes brevity must not like what was cut off; without a function the label decides."""
    problem = Problem("1+1?", "2")
    score = lambda response, gold: len(response) + float(gold)  # noqa: E731
    for finished, label, expected in [(True, "incorrect", 6.0), (True, "correct", 6.0), (False, "truncated", 0.0)]:
        said = Rollout([1], [2], [-1.0], finished, problem, text="four", label=label)
        assert rlvr.reward_of(said, score) == expected
        assert rlvr.reward_of(said, None) == float(label == "correct")


def test_sampled_ids_reach_the_trainer_as_they_are(tokenizer, args_of):
    """Decoded and encoded again, a response may be split into other tokens than those that were sampled."""
    sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text)) if j else box(99))
    _, kept, _ = sample_groups(sampler, args_of(rlvr, *FLAGS))
    for r in kept:
        again = tokenizer.encode(r.text, add_special_tokens=False)
        assert r.response_ids[:-1] != again and len(r.log_probs) == len(r.response_ids)
        assert tokenizer.decode(r.response_ids[:-1]) == r.text


def test_groups_without_variance_are_dropped(tokenizer, args_of):
    """All right or all wrong, a group has no gradient but counts in N, and so shrinks the others' step.

    Problems 0 to 2 are always right, 3 to 5 never, 6 and 7 sometimes.
    """

    def script(text, j, call):
        n = gold(text)
        return box(n if n < 3 or n > 5 and j else 99)

    sampler, state = scripted_sampler(tokenizer, script), {"cursor": 0}
    everything, kept, uniform = rlvr.sample_groups(sampler, PROBLEMS, state, args_of(rlvr, *FLAGS))
    assert len(everything) == 32 and uniform == 6 / 8 and len(kept) == 8
    assert {r.problem.answer for r in kept} == {"6", "7"}
    assert len(sampler.calls) == 1 and state["cursor"] == 8


def test_all_groups_without_variance_is_nothing_to_train_on(tokenizer, args_of):
    """An empty batch must come out as empty, and not as a division by its size."""
    sampler = scripted_sampler(tokenizer, lambda text, j, call: box(99))
    everything, kept, uniform = sample_groups(sampler, args_of(rlvr, *FLAGS))
    assert len(everything) == 32 and kept == [] and uniform == 1


def test_refill_replaces_dropped_groups_and_stops_in_time(tokenizer, args_of):
    """Dynamic sampling that never gives up hangs on a hopeless data set.

    Only odd problems' groups vary. Of 8 problems in two batches of four that is four groups: a third batch is
    not asked for. The refill is sampled from the next problems and with fresh luck.
    """
    script = lambda text, j, call: box(gold(text) if j and gold(text) % 2 else 99)  # noqa: E731
    sampler = scripted_sampler(tokenizer, script)
    args, state = args_of(rlvr, "--batch-size", 4, "--group-size", 2, "--refill", 5), {"cursor": 0}
    everything, kept, uniform = rlvr.sample_groups(sampler, PROBLEMS, state, args)
    assert len(sampler.calls) == 2 and state["cursor"] == 8 and len(everything) == 16
    assert uniform == 4 / 8 and len(kept) == 8
    assert sorted({r.problem.answer for r in kept}) == ["1", "3", "5", "7"]
    assert sampler.calls[0].seed != sampler.calls[1].seed
    hopeless = scripted_sampler(tokenizer, lambda text, j, call: box(99))
    everything, kept, uniform = sample_groups(hopeless, args)
    assert len(hopeless.calls) == 6 and len(everything) == 48 and not kept and uniform == 1


def test_refill_never_exceeds_the_batch(tokenizer, args_of):
    """Three groups, then more than one: the fourth fills the batch, and what is over is not trained on. But a good
    group that is over is not a uniform one: of 8 groups 1 is (a count of what was left out gave 4)."""
    dull = rollout.draw(PROBLEMS, 0, 1, seed=0)[0].problem  # of the first batch; the other seven groups vary
    script = lambda text, j, call: box(gold(text) if j and text != dull else 99)  # noqa: E731
    sampler = scripted_sampler(tokenizer, script)
    args = args_of(rlvr, "--batch-size", 4, "--group-size", 2, "--refill", 3)
    everything, kept, uniform = sample_groups(sampler, args)
    assert len(everything) == 16 and len(kept) == 8 and uniform == 1 / 8


def test_truncated_is_penalised_or_masked(tokenizer, args_of):
    """A cut-off response that is masked gives no gradient, yet its 0 still stands in its group's mean.

    Of four responses one is right, two wrong, one cut off (though it says the right thing): rewards 1 0 0 0.
    """
    say = lambda text, j, call: [box(gold(text)), box(99), (box(gold(text)), False), box(98)][j]  # noqa: E731
    for choice, labels in [("penalize", 32), ("mask", 24)]:
        sampler = scripted_sampler(tokenizer, say)
        args = args_of(rlvr, *FLAGS, "--truncated", choice)
        everything, kept, uniform = sample_groups(sampler, args)
        assert uniform == 0 and len(everything) == 32 and len(kept) == labels
        for r in kept:
            assert r.advantage == pytest.approx(1.7320508 if r.label == "correct" else -0.5773503, abs=1e-5)
        assert any(r.label == "truncated" for r in kept) == (choice == "penalize")


def test_each_step_has_its_own_problems_and_luck(tokenizer, args_of):
    """With one seed for all steps, the k-th rollout of every batch has the same luck."""
    sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text) if j else 99))
    state, args = {"cursor": 0}, args_of(rlvr, "--batch-size", 4, "--group-size", 2, "--temperature", 0.7)
    for _ in range(2):
        rlvr.sample_groups(sampler, PROBLEMS, state, args)
    first, second = sampler.calls
    prompts = [rollout.render_prompt(tokenizer, p) for p in PROBLEMS]
    assert sorted(first.prompts + second.prompts) == sorted(prompts)
    assert first.seed != second.seed and first.temperature == second.temperature == 0.7


def test_another_seed_has_other_problems_and_other_luck(tokenizer, args_of):
    """Runs with three seeds that sample alike are one run, and the spread between them says nothing."""
    calls = []
    for seed in (0, 1):
        sampler = scripted_sampler(tokenizer, lambda text, j, call: box(gold(text) if j else 99))
        sample_groups(sampler, args_of(rlvr, "--batch-size", 4, "--group-size", 2, "--seed", seed))
        calls += sampler.calls
    assert calls[0].prompts != calls[1].prompts and calls[0].seed != calls[1].seed


@pytest.mark.parametrize("truncated", ["penalize", "mask"])
def test_a_group_of_one_that_ended_is_not_uniform(tokenizer, args_of, truncated):
    """One is right, three are cut off: rewards 1 0 0 0, whatever is masked. Judged by those that ended, the group would
    be dropped, and with it all that a model which is cut off most of the time can learn from."""
    say = lambda text, j, call: (box(gold(text)), not j)  # noqa: E731
    args = args_of(rlvr, *FLAGS, "--truncated", truncated)
    _, kept, uniform = sample_groups(scripted_sampler(tokenizer, say), args)
    assert uniform == 0 and len(kept) == (32 if truncated == "penalize" else 8)


def test_a_group_whose_first_reward_is_the_mean_is_not_uniform(tokenizer, args_of):
    """--reward may give .5, 0, 1: the first advantage is 0, and the others' are not."""
    sampler = scripted_sampler(tokenizer, lambda text, j, call: box([5, 0, 10][j]))
    args, score = args_of(rlvr, "--batch-size", 8, "--group-size", 3), lambda text, gold: int(text[22:-1]) / 10
    _, kept, uniform = rlvr.sample_groups(sampler, PROBLEMS, {"cursor": 0}, args, score)
    assert uniform == 0 and len(kept) == 24
    assert {round(r.advantage, 3) for r in kept} == {0.0, -1.225, 1.225}


def test_the_reference_has_the_samplers_temperature(model, on_policy, args_of):
    """At another temperature than the policy's, even its own copy is at a distance."""
    args = args_of(rlvr, "--kl-coef", 0.5, "--temperature", 0.7)
    metrics = rlvr.accumulate_gradients(model, copy.deepcopy(model), with_advantages(on_policy, [0.0] * 8), args)
    assert metrics["kl/ref"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("size", [3, 8])
def test_the_entropy_is_the_mean_over_tokens(model, rollouts, args_of, size):
    """A mean of micro-batches' means weighs a token by its neighbours; over padding it would be near 0."""
    full = torch.cat([full_log_probs(model, r.prompt_ids, r.response_ids) for r in rollouts])
    args = args_of(rlvr, "--micro-batch-size", size)
    metrics = rlvr.accumulate_gradients(model, None, with_advantages(rollouts, [1.0] * 8), args)
    assert metrics["entropy"] == pytest.approx(-(full.exp() * full).sum(-1).mean().item(), rel=1e-4)


def test_a_masked_response_is_not_refilled(tokenizer, args_of):
    """--refill replaces groups. Counted in responses, a batch in which some are masked is never full, and each step
    samples --refill batches more, to no end."""
    say = lambda text, j, call: [box(gold(text)), box(99), (box(99), False), box(98)][j]  # noqa: E731
    sampler = scripted_sampler(tokenizer, say)
    _, kept, _ = sample_groups(sampler, args_of(rlvr, *FLAGS, "--truncated", "mask", "--refill", 3))
    assert len(sampler.calls) == 1 and len(kept) == 24
