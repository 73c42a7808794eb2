"""sft.py: the likelihood of demonstrations, which tokens it counts, and the order of the data."""

import copy
import random
import re

import pytest
import torch
from conftest import EOS, assert_same_gradient, make_tiny, plain_log_probs, scripted_sampler, take_gradient

import opsd
import rollout
import sft
from rollout import sequence_length
from sft import Example


@pytest.fixture
def examples(rollouts):
    return [Example(r.prompt_ids, r.response_ids) for r in rollouts]


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
    n = sum(len(e.response_ids) for e in examples)
    loss = -sum(plain_log_probs(any_model, e.prompt_ids, e.response_ids).sum() for e in examples) / n
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
    cut = Example([3, 4, 5], [6, 7])
    loss = sft.accumulate_gradients(model, [cut], 8)
    expected = take_gradient(model)
    assert loss == pytest.approx(-plain_log_probs(model, cut.prompt_ids, cut.response_ids).mean().item(), abs=1e-5)
    beside_an_empty_one = sft.accumulate_gradients(model, [cut, Example([8, 9, 1, 2, 3, 4], [])], 8)
    assert beside_an_empty_one == pytest.approx(loss, abs=1e-5)
    assert_same_gradient(take_gradient(model), expected)


@pytest.mark.parametrize("size", [1, 2])
def test_training_teaches_to_stop(model, size):
    """With EOS outside the mask all else is learned and no response ever ends. EOS is the pad id here."""
    examples = [Example([3, 4], [6, 7, EOS]), Example([5], [8, EOS])]
    p_stop = lambda: plain_log_probs(model, [3, 4], [6, 7, EOS])[-1].exp().item()  # noqa: E731
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
    pairs = [(e.prompt_ids, e.response_ids) for e in examples]
    input_ids, response_mask = rollout.collate(*zip(*pairs))
    for (prompt, response), row, mask in zip(pairs, input_ids, response_mask):
        assert response[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in response[:-1]
        assert row[mask].tolist() == response
        assert row[: len(prompt)].tolist() == prompt and mask.nonzero()[0] == len(prompt)


def test_an_example_is_what_sampling_will_see(tokenizer, problems, args_of):
    """A prompt rendered by other code than the sampler's, or a response merged with its prompt by the
    tokenizer, is trained on and never met again."""
    args = args_of(sft, "--privileged-frac", 0)
    for problem in problems:
        example = sft.build_example(tokenizer, problem, random.Random(0), args)
        response = example.response_ids
        assert example.prompt_ids == rollout.render_prompt(tokenizer, problem)
        text = tokenizer.decode(response, skip_special_tokens=True)
        assert text.startswith("<think>") and text[-1] == "}"
        assert response[:-1] == tokenizer.encode(text, add_special_tokens=False)


WRITTEN = [  # solutions of your own data: bare steps, and a whole response
    rollout.Problem("1+1?", "2", "One and one."),
    rollout.Problem("1+2?", "3", "<think>\nOne and two.\n</think>\n\nIt is \\boxed{3}"),
]


@pytest.mark.parametrize("thinking", ["--thinking", "--no-thinking"])
@pytest.mark.parametrize("context", sft.CONTEXTS)
def test_the_privileged_prompt_is_the_one_opsds_teacher_reads(tokenizer, problems, args_of, context, thinking):
    """Shown other words, the teacher has never learned to use what it is shown: a blank line more, what another
    thought along with what it said. With --context rollout the sibling answers as the demonstrations do."""
    problems = problems + WRITTEN
    group = ["--batch-size", len(problems), "--group-size", 2]
    args, opsd_args = args_of(sft, thinking), args_of(opsd, "--context", context, thinking, *group)
    of_text = {problem.problem: problem for problem in problems}

    def write(text, j, call):
        problem = of_text[text]
        return sft.render_response(problem.solution, problem.answer, args.thinking)

    everything, _ = opsd.sample_rollouts(
        scripted_sampler(tokenizer, write), problems, {"cursor": 0, "kept_frac": 1.0}, opsd_args)
    assert {r.problem.problem for r in everything} == set(of_text)
    for r in everything:
        prompt = sft.demonstration_prompt(tokenizer, r.problem, context, args)
        assert tokenizer.decode(prompt) == tokenizer.decode(r.teacher_prompt_ids)
        assert prompt == r.teacher_prompt_ids != r.prompt_ids


def test_an_example_is_of_one_context_prompt_and_response(tokenizer, problems, args_of, monkeypatch):
    """A solution in the prompt before the response of a writer who had none teaches opsd.py's teacher to slip,
    solution in hand. Each context comes as often as CONTEXTS says, in --privileged-frac of all."""
    monkeypatch.setattr(sft, "demonstrate_arithmetic", lambda problem, rng, context, think: str(context))
    monkeypatch.setattr(sft, "MISTOLD", 0.0)
    rng, args, seen = random.Random(0), args_of(sft, "--privileged-frac", 0.8), []
    for i in range(700):
        problem = problems[i % 6]
        example = sft.build_example(tokenizer, problem, rng, args)
        told = tokenizer.decode(example.response_ids, skip_special_tokens=True)
        context = None if told == "None" else told
        assert example.prompt_ids == sft.demonstration_prompt(tokenizer, problem, context, args)
        seen.append(context)
    assert set(seen) == {None, *sft.CONTEXTS}
    assert abs(seen.count(None) - 140) < 25
    assert all(abs(seen.count(context) - 80 * often) < 25 for context, often in sft.CONTEXTS.items())


@pytest.mark.parametrize("data, right", [("arithmetic", 0.505), ("arithmetic:parity", 0.75)])
def test_half_of_the_told_answers_are_random_ones_and_every_one_is_boxed(tokenizer, args_of, monkeypatch, data, right):
    """If what is told is always right, a model whose chains are right need not look at it. One of a hundred random
    numbers is right by chance, one of two for parity. The chain is still that of the problem."""
    monkeypatch.setattr(sft, "CONTEXTS", {"answer": 1})
    args, rng = args_of(sft, "--data", data, "--privileged-frac", 1), random.Random(0)
    many, told_right = rollout.load_problems(data)[0][:1000], 0
    for problem in many:
        example = sft.build_example(tokenizer, problem, rng, args)
        prompt, response = tokenizer.decode(example.prompt_ids), tokenizer.decode(example.response_ids)
        told = re.search(r"The correct answer: ?(\w+)", prompt)[1]
        assert response.endswith(f"\\boxed{{{told}}}{tokenizer.eos_token}")
        assert response.startswith("<think>" + problem.solution.partition("=")[0])
        told_right += told == problem.answer
    assert abs(told_right / len(many) - right) < 0.05


@pytest.mark.parametrize("thinking", ["--thinking", "--no-thinking"])
def test_the_longest_of_all_contexts_must_fit(tokenizer, problems, args_of, thinking):
    """What another wrote is longer than the solution by a box, an answer can be longer than its solution: measured
    by the solution alone, a problem that was let in ends the run, hours later."""
    args = args_of(sft, "--privileged-frac", 1, thinking)
    short = rollout.Problem("Which?", "\\frac{123456789}{987654321}", "See there.")
    for problem in [*problems, *WRITTEN, short]:
        prompts = [sft.demonstration_prompt(tokenizer, problem, context, args) for context in sft.CONTEXTS]
        response = sft.render_response(problem.solution, problem.answer, args.thinking)
        tokens = max(map(len, prompts)) + len(tokenizer.encode(response, add_special_tokens=False)) + 1
        assert sft.demonstration_length(tokenizer, problem, args) == tokens


def test_without_thinking_an_example_has_neither_tag_nor_check(tokenizer, world, args_of):
    """--no-thinking closes the thought in the prompt: a response that opens another is one that thinks twice."""
    args = args_of(sft, "--no-thinking", "--privileged-frac", 0)
    for i, problem in enumerate(world[0][:30]):
        example = sft.build_example(tokenizer, problem, random.Random(i), args)
        assert example.prompt_ids == rollout.render_prompt(tokenizer, problem, thinking=False)
        text = tokenizer.decode(example.response_ids)
        assert "think>" not in text and "Wait" not in text and "\\boxed{" in text


def test_an_example_of_your_own_data_is_its_solution(tokenizer, args_of, write_jsonl):
    """The world's demonstrations must not leak into other data: there the solution is what is taught."""
    path = write_jsonl([{"problem": "1/3 + 1/6?", "answer": "1/2", "solution": "2/6 + 1/6."}])
    args = args_of(sft, "--data", path, "--privileged-frac", 0)
    example = sft.build_example(tokenizer, rollout.read_problems(path)[0], random.Random(0), args)
    assert tokenizer.decode(example.response_ids) == "<think>2/6 + 1/6.</think>\\boxed{1/2}<|end|>"


@pytest.mark.parametrize("solution", ["1+1=2.", "1+1=2.</think>\\boxed{2}",
    "<think>1+1=2.</think>\\boxed{2}", "<think>\n1+1=2.</think>\\boxed{2}"])  # fmt: skip
def test_a_template_that_opens_thinking_is_not_opened_twice(thinker, args_of, write_jsonl, solution):
    """R1-Distill's and QwQ's prompts end in `<think>`: a demonstration that opens another teaches
    `<think><think>`. Prompt and response together say the same whoever opens it; bare steps, and whole
    responses."""
    rows = [{"problem": "1+1?", "answer": "2", "solution": solution}]
    args = args_of(sft, "--data", write_jsonl(rows), "--privileged-frac", 0)
    example = sft.build_example(thinker, rollout.Problem("1+1?", "2", solution), random.Random(0), args)
    prompt, response = thinker.decode(example.prompt_ids), thinker.decode(example.response_ids)
    assert prompt == thinker.decode(rollout.render_prompt(thinker, rollout.Problem("1+1?", "2", solution)))
    assert response.endswith("1+1=2.</think>\\boxed{2}<|end|>")
    assert not thinker.opens or response.startswith("1+1=2.")
    begun = not solution.startswith("1+1=2.<")  # else nobody has opened it but perhaps the template
    assert (prompt + response).count("<think>") == (1 if thinker.opens or begun else 0)
    assert response.startswith("<think>") == (begun and not thinker.opens)
    assert len(example.prompt_ids + example.response_ids) <= sft.demonstration_length(
        thinker, rollout.Problem("1+1?", "2", solution), args)  # fmt: skip


def test_the_worlds_demonstration_starts_inside_a_thought_that_is_open(thinker, world, args_of):
    """The same for the built-in world; without thinking there is no tag in the response, whatever the
    template."""
    for flag in ("--thinking", "--no-thinking"):
        args = args_of(sft, flag, "--privileged-frac", 0)
        for i, problem in enumerate(world[0][:5]):
            example = sft.build_example(thinker, problem, random.Random(i), args)
            both = thinker.decode(example.prompt_ids + example.response_ids)
            assert both.count("<think>") == both.count("</think>") == 1, both
            if flag == "--no-thinking":
                assert "think>" not in thinker.decode(example.response_ids)


def test_batches_depend_on_the_seed_and_the_window_alone(tokenizer, world, args_of):
    """A data loader that starts anew on --resume trains twice on the same and never on the rest."""
    args, model = args_of(sft, "--batch-size", 2), make_tiny(context=1024)
    drawn = [sft.draw_batches(window, model, tokenizer, world[0][:50], args) for window in (0, 1, 2)]
    assert sft.draw_batches(1, model, tokenizer, world[0][:50], args) == drawn[1]
    assert drawn[0] != drawn[1] and drawn[1] != drawn[2]
    assert all(len(batches) == sft.WINDOW and all(len(batch) == 2 for batch in batches) for batches in drawn)
    args.seed = 1
    assert sft.draw_batches(1, model, tokenizer, world[0][:50], args) != drawn[1]


def test_batches_show_every_problem_once_an_epoch(tokenizer, world, args_of):
    """Sorted by length and cut, a window can lose its remainder: the longest problems, every time."""
    args = args_of(sft, "--batch-size", 2, "--privileged-frac", 0)
    some = list({p.problem: p for p in world[0]}.values())[:64]  # one window of 32 batches is one epoch
    batches = sft.draw_batches(0, make_tiny(context=1024), tokenizer, some, args)
    seen = sorted(example.prompt_ids for batch in batches for example in batch)
    assert seen == sorted(rollout.render_prompt(tokenizer, p) for p in some)


def test_windows_do_not_overlap(tokenizer, world, args_of):
    """Two windows of 32 batches are one epoch here: a window that begins before the last one's end shows most problems
    many times, and the others late."""
    args = args_of(sft, "--batch-size", 2, "--privileged-frac", 0)
    some = list({p.problem: p for p in world[0]}.values())[:128]
    windows = [sft.draw_batches(w, make_tiny(context=1024), tokenizer, some, args) for w in (0, 1)]
    seen = sorted(example.prompt_ids for batches in windows for batch in batches for example in batch)
    assert seen == sorted(rollout.render_prompt(tokenizer, p) for p in some)


def test_each_window_has_its_own_luck(tokenizer, world, args_of):
    """With one seed for all windows the same places get the privileged prompt, and the same slips, for ever. One problem
    alone: what differs between the windows is luck."""
    args, model = args_of(sft, "--batch-size", 2), make_tiny(context=1024)
    assert sft.draw_batches(0, model, tokenizer, world[0][:1], args) != (
        sft.draw_batches(1, model, tokenizer, world[0][:1], args))


def test_a_batch_is_of_like_length(tokenizer, world, args_of):
    """Drawn as they come, short and long ones share a batch, and half of what is computed is padding. And sorted
    over the whole run, the first steps would see only short ones."""
    args = args_of(sft, "--batch-size", 8)
    batches = sft.draw_batches(0, make_tiny(context=1024), tokenizer, world[0], args)
    spans = [(min(map(sequence_length, b)), max(map(sequence_length, b))) for b in batches]
    assert sum(high - low for low, high in spans) / len(spans) < 0.2 * max(high for _, high in spans)
    assert spans != sorted(spans)


def test_a_new_model_knows_its_tokenizers_special_tokens(args_of, world):
    """A model whose config names another EOS than its tokenizer stops nowhere, or everywhere."""
    model, tokenizer = sft.new_model(world[0][:20], args_of(sft))
    assert model.config.vocab_size == len(tokenizer)
    assert rollout.HFSampler(model, tokenizer).stop_ids == {tokenizer.eos_token_id}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, *tokenizer.encode("<think></think>")}) == 4


def test_a_new_models_tokenizer_has_the_words_of_every_prompt(args_of, world):
    """A prompt spelled letter by letter is long, and slow to learn: each word that a teacher is told is a token."""
    _, tokenizer = sft.new_model(world[0][:20], args_of(sft))
    for told in rollout.PRIVILEGED.values():
        for word in re.findall(r" [a-z]+", told + rollout.INSTRUCTION):
            assert len(tokenizer.encode(word)) == 1, word
