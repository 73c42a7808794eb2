"""sft.py: the likelihood of demonstrations, which tokens it counts, and the order of the data."""

import copy
import itertools
import random

import pytest
import torch
from conftest import EOS, assert_same_gradient, make_tiny, plain_log_probs, scripted_sampler, take_gradient

import opsd
import rollout
import sft


@pytest.fixture
def examples(rollouts):
    return [(r.prompt_ids, r.response_ids) for r in rollouts]


# ------------------------------------------------------------------------------------------------------------
# The loss


def test_sft_loss_by_hand():
    """A mean over all positions, padding included, makes the learning rate depend on how much there is.

    Response log-probs -1, -2 and -4 over N = 5 tokens of the whole batch: 7/5 = 1.4, gradient -1/5 each.
    """
    log_probs = torch.tensor([[-9.0, -1, -2, -9], [-9, -9, -4, -9]], requires_grad=True)
    response_mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]).bool()
    loss = sft.sft_loss(log_probs, response_mask, 5)
    assert loss.item() == pytest.approx(1.4, abs=1e-5)
    loss.backward()
    assert log_probs.grad.tolist() == pytest.approx(-response_mask.float() / 5)


def test_the_loss_of_a_model_that_knows_nothing_is_ln_24(model, examples):
    """Any prompt token or padding in the loss or its normaliser moves it: equal logits cost ln 24 = 3.1780538
    a response token, whatever the lengths."""
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert sft.accumulate_gradients(model, examples, 3) == pytest.approx(3.1780538, abs=1e-5)


def test_loss_and_gradient_are_those_of_the_formula(any_model, examples):
    """L = -1/N sum log pi(y_t | x, y_<t), one example at a time: finds prompt tokens in the loss, a lost
    shift, a mean of means, EOS left out (here EOS is the pad id)."""
    n = sum(len(response) for _, response in examples)
    loss = -sum(plain_log_probs(any_model, *example).sum() for example in examples) / n
    loss.backward()
    expected = take_gradient(any_model)
    assert sft.accumulate_gradients(any_model, examples, 8) == pytest.approx(loss.item(), abs=1e-5)
    assert_same_gradient(take_gradient(any_model), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_gradient_does_not_depend_on_the_micro_batch(model, examples, size):
    """A mean of micro-batch means weighs a token by the company it keeps: 8 x 1 is then not 1 x 8."""
    loss = sft.accumulate_gradients(model, examples, 8)
    expected = take_gradient(model)
    assert sft.accumulate_gradients(model, examples, size) == pytest.approx(loss, abs=1e-5)
    assert_same_gradient(take_gradient(model), expected)


def test_a_response_without_eos_and_one_without_tokens(model, examples):
    """A cut-off response trains what is there and no EOS; an empty one trains nothing, and is no NaN.

    (x, y) with an empty neighbour has the gradient of (x, y) alone, for it adds no token to N.
    """
    cut = ([3, 4, 5], [6, 7])
    loss = sft.accumulate_gradients(model, [cut], 8)
    expected = take_gradient(model)
    assert loss == pytest.approx(-plain_log_probs(model, *cut).mean().item(), abs=1e-5)
    beside_an_empty_one = sft.accumulate_gradients(model, [cut, ([8, 9, 1, 2, 3, 4], [])], 8)
    assert beside_an_empty_one == pytest.approx(loss, abs=1e-5)
    assert_same_gradient(take_gradient(model), expected)


@pytest.mark.parametrize("size", [1, 2])
def test_training_teaches_to_stop(model, size):
    """With EOS outside the mask all else is learned and no response ever ends. EOS is the pad id here."""
    examples = [([3, 4], [6, 7, EOS]), ([5], [8, EOS])]
    p_stop = lambda: plain_log_probs(model, *examples[0])[-1].exp().item()  # noqa: E731
    before, optimizer = p_stop(), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        sft.accumulate_gradients(model, examples, size)
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.2 and p_stop() > 0.5


# ------------------------------------------------------------------------------------------------------------
# The data


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_an_example_ends_in_eos_and_eos_is_trained(tokenizer, problems, args_of, pad_is_eos):
    """Many tokenizers pad with EOS. Whatever the pad, the mask covers the response, its EOS, nothing else."""
    tokenizer = copy.deepcopy(tokenizer)
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    args = args_of(sft)
    examples = [sft.build_example(tokenizer, p, random.Random(i), args) for i, p in enumerate(problems)]
    input_ids, response_mask = rollout.collate(*zip(*examples))
    for (prompt, response), row, mask in zip(examples, input_ids, response_mask):
        assert response[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in response[:-1]
        assert row[mask].tolist() == response
        assert row[: len(prompt)].tolist() == prompt and mask.nonzero()[0] == len(prompt)


def test_an_example_is_what_sampling_will_see(tokenizer, problems, args_of):
    """A prompt rendered by other code than the sampler's, or a response merged with its prompt by the
    tokenizer, is trained on and never met again."""
    args = args_of(sft, "--privileged-frac", 0)
    for problem in problems:
        prompt, response = sft.build_example(tokenizer, problem, random.Random(0), args)
        assert prompt == rollout.render_prompt(tokenizer, problem)
        text = tokenizer.decode(response, skip_special_tokens=True)
        assert text.startswith("<think>") and text[-1] == "}"
        assert response[:-1] == tokenizer.encode(text, add_special_tokens=False)


def test_the_privileged_prompt_is_the_one_opsds_teacher_reads(tokenizer, problems, args_of):
    """Shown other words, the teacher has never learned to use what it is shown."""
    args, opsd_args = args_of(sft, "--privileged-frac", 1), args_of(opsd, "--batch-size", len(problems))
    sampler = scripted_sampler(tokenizer, lambda text, j, call: "\\boxed{1}")
    everything, _ = opsd.sample_rollouts(sampler, problems, {"cursor": 0}, opsd_args)
    for r, teacher_prompt in everything:
        prompt, _ = sft.build_example(tokenizer, r.problem, random.Random(0), args)
        assert prompt == teacher_prompt != r.prompt_ids


def test_an_example_of_your_own_data_is_its_solution(tokenizer, args_of, write_jsonl):
    """The world's demonstrations must not leak into other data: there the solution is what is taught."""
    path = write_jsonl([{"problem": "1/3 + 1/6?", "answer": "1/2", "solution": "2/6 + 1/6."}])
    args = args_of(sft, "--data", path, "--privileged-frac", 0)
    _, response = sft.build_example(tokenizer, rollout.read_problems(path)[0], random.Random(0), args)
    assert tokenizer.decode(response) == "<think>2/6 + 1/6.</think>\\boxed{1/2}<|end|>"


def test_batches_can_be_entered_at_any_step(tokenizer, world, args_of):
    """A data loader that starts anew on --resume trains twice on the same and never on the rest. 32 batches
    make a window; steps 30 to 36 lie on both sides of its edge."""
    args = args_of(sft, "--batch-size", 2)
    model = make_tiny(context=1024)
    stream = lambda step: sft.batches(step, model, tokenizer, world[0][:50], args)  # noqa: E731
    whole = list(itertools.islice(stream(0), 37))
    for step in (0, 5, 30, 32, 36):
        assert list(itertools.islice(stream(step), 37 - step)) == whole[step:]
    assert all(len(batch) == 2 for batch in whole)


def test_batches_show_every_problem_once_an_epoch(tokenizer, world, args_of):
    """Sorted by length and cut, a window can lose its remainder: the longest problems, every time."""
    args = args_of(sft, "--batch-size", 2, "--privileged-frac", 0)
    some = list({p.problem: p for p in world[0]}.values())[:64]  # one window of 32 batches is one epoch
    batches = list(itertools.islice(sft.batches(0, make_tiny(context=1024), tokenizer, some, args), 32))
    seen = sorted(prompt for batch in batches for prompt, _ in batch)
    assert seen == sorted(rollout.render_prompt(tokenizer, p) for p in some)


def test_a_new_model_knows_its_tokenizers_special_tokens(args_of, world):
    """A model whose config names another EOS than its tokenizer stops nowhere, or everywhere."""
    model, tokenizer = sft.new_model(world[0][:20], args_of(sft))
    assert model.config.vocab_size == len(tokenizer)
    assert rollout.HFSampler(model, tokenizer).stop_ids == {tokenizer.eos_token_id}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.encode("<think></think>")}) == 4


# ------------------------------------------------------------------------------------------------------------
# The optimizer step (the same, word for word, in all stages)


def test_the_learning_rate_by_hand(model, args_of):
    """An off-by-one makes the first step's rate 0, or the last one's.

    10 steps, 2 of them warm-up, down to 0.1. Step 1: (.1 + .9 (1 + cos .1 pi)/2) / 2 = .4889877.
    Step 5: .1 + .9/2 = .55. Step 10: .1.
    """
    args = args_of(sft, "--steps", 10, "--lr", 1, "--min-lr-ratio", 0.1, "--warmup-steps", 2)
    for step, expected in [(1, 0.4889877), (5, 0.55), (10, 0.1)]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        metrics = sft.optimizer_step(step, model, optimizer, 1.0, args)
        assert metrics["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-5)


def test_a_step_clips_the_gradient_and_clears_it(model, examples, args_of):
    """A gradient that is carried over is momentum nobody asked for; unclipped, one batch can rule."""
    args = args_of(sft, "--lr", 1, "--min-lr-ratio", 1, "--warmup-steps", 0, "--grad-clip", 0.1)
    before = torch.cat([p.detach().view(-1).clone() for p in model.parameters()])
    sft.accumulate_gradients(model, examples, 8)
    metrics = sft.optimizer_step(1, model, torch.optim.SGD(model.parameters(), lr=1.0), 1.0, args)
    after = torch.cat([p.detach().view(-1) for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.1, abs=1e-5)  # SGD at rate 1: the clipped norm
    assert metrics["grad_norm"] > 0.1  # what is logged is the norm before
    assert not take_gradient(model).any()


def test_a_loss_that_is_not_finite_ends_the_run(model, examples, args_of, fails_with):
    """One NaN in the weights, saved over the last good checkpoint, and the run is lost."""
    args = args_of(sft)
    before = copy.deepcopy(model.state_dict())
    optimizer = sft.make_optimizer(model, args)
    sft.accumulate_gradients(model, examples, 8)
    fails_with(lambda: sft.optimizer_step(7, model, optimizer, float("nan"), args), "step 7", "not finite")
    next(model.parameters()).grad[0, 0] = float("inf")
    fails_with(lambda: sft.optimizer_step(7, model, optimizer, 1.0, args), "step 7", "not finite")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_weight_decay_is_for_matrices(args_of):
    """Decay on the gains of norms pulls them to 0, away from where they start, which is 1."""
    model = make_tiny()
    decayed, spared = sft.make_optimizer(model, args_of(sft, "--weight-decay", 0.1)).param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
