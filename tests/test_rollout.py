"""rollout.py: the world and the data, tokenizer and prompts, the sampler, labels, collation and log-probs."""

import copy
import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import CONTEXT, EOS, VOCAB, encode_by_character, full_log_probs, make_tiny, plain_log_probs
from transformers.cache_utils import DynamicLayer

import rollout
import sft
from rollout import HFSampler, Problem, Rollout
from verify import verify

# ------------------------------------------------------------------------------------------------------------
# The arithmetic world


def test_a_problem_means_what_its_answer_says():
    """`2+3*4` written for (2+3)*4: the gold is 20, Python and a good model say 14, and reward is noise."""
    rng = random.Random(11)
    for _ in range(500):
        problem = rollout.make_arithmetic(rng)
        expression = re.fullmatch(r"Compute ([-+*()\d]+)\.", problem.problem)[1]
        assert eval(expression) == int(problem.answer)
        assert 3 <= len(re.findall(r"\d+", expression)) <= 6


def test_a_solution_is_a_chain_of_true_steps_within_0_to_99():
    """A solution that drifts from its problem, or a negative value, would teach what no verifier rewards."""
    rng = random.Random(12)
    for _ in range(500):
        problem = rollout.make_arithmetic(rng)
        steps = re.findall(r"(\d+)([-+*])(\d+)=(\d+)\.", problem.solution)
        assert " ".join("{}{}{}={}.".format(*step) for step in steps) == problem.solution
        for left, op, right, result in steps:
            assert eval(left + op + right) == int(result) and 0 <= int(result) <= 99
        for before, after in zip(steps, steps[1:]):
            assert before[3] == after[0]
        assert steps[-1][3] == problem.answer


def test_no_heldout_problem_is_trained_on(world):
    """Problems repeat in the world: split by position, a held-out problem's twin is trained on."""
    train, heldout = ({p.problem for p in side} for side in world)
    assert not train & heldout
    assert 0.03 < len(heldout) / len(train | heldout) < 0.07


def test_the_world_is_the_same_in_every_process(world, write_jsonl):
    """hash() is salted: split by it, every process holds out other problems. So the split is spelled out."""
    assert rollout.load_problems("arithmetic") == world
    names = [f"problem {i}" for i in range(40)]
    for order in (names, names[::-1], sorted(names)):
        train, heldout = rollout.load_problems(write_jsonl([{"problem": n, "answer": "1"} for n in order]))
        held = {"problem 16", "problem 12", "problem 5"}  # the smallest three of the 40 by zlib.crc32
        assert [p.problem for p in heldout] == [n for n in order if n in held]
        assert [p.problem for p in train] == [n for n in order if n not in held]


def read_demonstration(text):
    """-> steps, slips, checks, the chain's last value after checks, what is in the box."""
    steps = re.findall(r"(-?\d+[-+*]\d+)=(-?\d+)\.", text)  # a check has no full stop after its number
    slips = sum(eval(left) != int(result) for left, result in steps)
    checks = re.findall(r"Wait, (-?\d+[-+*]\d+)=(-?\d+) (?:ok|no)\.", text)
    assert all(eval(left) == int(result) for left, result in checks)
    last = re.findall(r"=(-?\d+)[ .]", text)[-1]
    return len(steps), slips, len(checks), last, re.search(r"\\boxed\{(-?\d+)\}$", text)[1]


@pytest.mark.parametrize("think", [True, False])
@pytest.mark.parametrize("context", [None, *sft.CONTEXTS])
def test_what_a_writer_is_told_decides_slips_checks_and_box(context, think):
    """Each context teaches opsd.py's teacher what it is worth. Who has a solution, or what another wrote, is never
    wrong: a single slip there teaches it to ignore what it is shown. Who has the answer alone slips as everyone
    does, and yet the box is right. Who is told to be concise is wrong more often than who checks. The ordinary writer
    must be fallible and long, or there is nothing left to improve. Without thinking nobody checks.

    A check at a rate of 1/2, again and again, is 1 for each result; at 1/20 it is 1/19 = 0.053.
    """
    rng, seen, right, box_of_another = random.Random(13), [0, 0, 0], 0, 0
    for _ in range(400):
        problem = rollout.make_arithmetic(rng)
        text = sft.demonstrate_arithmetic(problem, rng, context, think)
        form = r"<think>[^<>]+</think>" if think else r"(-?\d+[-+*]\d+=-?\d+\. )+"  # a slip may lead below 0
        assert re.fullmatch(form + r"\\boxed\{-?\d+\}", text)
        *counts, last, box = read_demonstration(text)
        seen = [a + b for a, b in zip(seen, counts)]
        right += verify(text, problem.answer)
        box_of_another += box != last
    steps, slips, checks = seen
    if context in ("solution", "rollout"):
        assert slips == 0 and right == 400
    else:
        assert 0.105 < slips / steps < 0.155
    if not think:
        assert checks == 0
    else:
        assert (0.9 < checks / steps < 1.1) if context is None else (0.03 < checks / steps < 0.08)
    if context == "answer":
        assert right == 400 and box_of_another > 80
    else:
        assert box_of_another == 0
    if context in (None, "concise"):  # 0.87 to the power of 2 to 5 is 0.62; half of the slips are mended, or few
        low, high = (285, 345) if context is None and think else (210, 290)
        assert low < right < high


@pytest.mark.parametrize("context", sft.CONTEXTS)
def test_who_is_told_anything_is_brief(context):
    """What opsd.py's teacher has to give is short thinking: its demonstrations are, whatever it is told."""
    problems = [rollout.make_arithmetic(random.Random(i)) for i in range(200)]
    length = lambda told: sum(len(sft.demonstrate_arithmetic(p, random.Random(0), told)) for p in problems)  # noqa: E731
    assert length(context) < 0.8 * length(None)


def test_parity_asks_of_the_same_chains_whether_they_end_in_an_even_number():
    """Two answers only, both of them often. A slip of 2 or 10 would leave the answer right, and the rollout counted as
    correct: every slip is off by 1. Each response is true to its own chain, but for who is told the answer."""
    world, parity = rollout.load_problems("arithmetic"), rollout.load_problems("arithmetic:parity")
    assert 19_000 < len(parity[0]) and len(parity[0]) + len(parity[1]) == len(world[0]) + len(world[1]) == 21_000
    problems, rng, against = parity[1][:400], random.Random(5), 0
    assert 0.3 < sum(p.answer == "yes" for p in problems) / 400 < 0.7
    for problem in problems:
        value = eval(re.fullmatch(r"Is (.+) even\?", problem.problem)[1])
        assert problem.answer == ("yes" if value % 2 == 0 else "no") and problem.solution.endswith(f"={value}.")
        for context in (None, *sft.CONTEXTS):
            text = sft.demonstrate_arithmetic(problem, rng, context)
            steps = re.findall(r"(-?\d+[-+*]\d+)=(-?\d+)\.", text)
            assert all(abs(eval(left) - int(result)) <= 1 for left, result in steps)
            last, box = re.findall(r"=(-?\d+)[ .]", text)[-1], re.search(r"\\boxed\{(yes|no)\}$", text)[1]
            assert context == "answer" or box == ("yes" if int(last) % 2 == 0 else "no")
            if context == "answer":
                against += box != ("yes" if int(last) % 2 == 0 else "no")
            if context in ("answer", "solution", "rollout"):
                assert verify(text, problem.answer)
    assert against > 80


# ------------------------------------------------------------------------------------------------------------
# Data from a file


def test_a_jsonl_file(write_jsonl):
    """Its own form; blank lines; a separator that is no end of a line."""
    path = write_jsonl([
        {"problem": "1+1", "answer": 2},
        "",
        {"problem": "1/3?", "answer": "\\frac13", "solution": "One third."},
        {"problem": "a line\u2028separator", "answer": "-7"},
    ])  # fmt: skip
    assert rollout.read_problems(path) == [
        Problem("1+1", "2", ""),
        Problem("1/3?", "\\frac13", "One third."),
        Problem("a line\u2028separator", "-7", ""),
    ]


def test_a_null_solution_is_none(write_jsonl):
    """Many data sets write null where there is nothing: as str(None), that is a solution to learn from."""
    path = write_jsonl([{"problem": "1+1", "answer": "2", "solution": None}])
    assert rollout.read_problems(path) == [Problem("1+1", "2", "")]


def test_a_bad_line_is_named_and_the_run_ends(write_jsonl, fails_with, tmp_path):
    """A file with one bad line ends in a traceback that does not say which, or is trained on for hours."""
    good = {"problem": "1+1", "answer": "2"}
    read = lambda *rows: rollout.read_problems(write_jsonl(rows))  # noqa: E731
    fails_with(lambda: read(good, "{broken"), "data.jsonl:2", "not JSON")
    fails_with(lambda: read("[1, 2]"), "data.jsonl:1")
    fails_with(lambda: rollout.load_problems(str(tmp_path / "none.jsonl")), "none.jsonl", "no such file")
    fails_with(lambda: rollout.load_problems(write_jsonl([good, good])), "1 distinct")
    fails_with(lambda: rollout.require_solutions([Problem("1+1", "2")], "data.jsonl", "x"), "1+1", "solution")


def test_draw_goes_through_every_epoch_exactly_once():
    """Drawn with replacement, or with a shuffle that restarts at a batch's edge, problems are skipped."""
    items = list("abcdefg")
    drawn = rollout.draw(items, 0, 4 * 7, seed=0)
    epochs = [drawn[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == items for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1  # each in its own order
    assert drawn != rollout.draw(items, 0, 28, seed=1)


def test_draw_depends_on_position_and_seed_alone():
    """Drawn from a generator whose state nobody saved, a resumed run sees other data than it would have."""
    items = list(range(10))
    whole = rollout.draw(items, 0, 60, seed=5)
    assert [x for start in range(0, 60, 4) for x in rollout.draw(items, start, 4, seed=5)] == whole
    rollout.draw(items, 0, 60, seed=6)
    assert rollout.draw(items, 37, 9, seed=5) == whole[37:46]


# ------------------------------------------------------------------------------------------------------------
# Tokenizer and prompts


def test_pad_is_not_eos_and_digits_stand_alone(tokenizer):
    """Merged digits give 12 and 120 unrelated tokens, and arithmetic has to be learned number by number."""
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("Compute 123+45*678.")]
    assert all(len(piece) == 1 for piece in pieces if re.search(r"\d", piece)), pieces
    assert [p for p in pieces if p.isdigit()] == list("12345678")


def test_what_is_encoded_is_decoded_again(tokenizer):
    """A decoder that tidies up spaces, or drops <think> as special, shows the verifier another text."""
    for text in ["<think>2+3=5. Wait , 5 ok .</think>\\boxed{5}", "  two\n\ttab", "é ≤ 日本 🙂", "don 't"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert len(tokenizer.encode("<think></think>")) == 2


def test_the_prompt_word_for_word(tokenizer):
    """A turn that the template opens on one side only: trained on one prompt, sampled from another."""
    problem = Problem("Compute 1+2.", "3", "1+2=3.")
    ask = "Compute 1+2.{}\nReason step by step; put the answer in \\boxed{{}}."
    shown = "\nA correct solution: 1+2=3.\nSolve the problem yourself, without needless steps."
    prompt = rollout.render_prompt(tokenizer, problem)
    assert tokenizer.decode(prompt) == f"<|user|>{ask.format('')}<|assistant|>"
    assert tokenizer.decode(prompt[-1:]) == "<|assistant|>"
    prompt = rollout.render_prompt(tokenizer, problem, "solution", problem.solution)
    assert tokenizer.decode(prompt) == f"<|user|>{ask.format(shown)}<|assistant|>"
    prompt = rollout.render_prompt(tokenizer, problem, thinking=False)
    assert tokenizer.decode(prompt) == f"<|user|>{ask.format('')}<|assistant|><think></think>"


def test_a_prompt_of_a_problem_with_braces(tokenizer):
    """str.format over a text that holds LaTeX raises, or eats its braces."""
    problem = Problem("What is \\frac{1}{2}?", "0.5", "It is {x}.")
    text = tokenizer.decode(rollout.render_prompt(tokenizer, problem, "solution", problem.solution))
    assert "What is \\frac{1}{2}?" in text and "A correct solution: It is {x}." in text


def test_a_model_is_loaded_in_fp32_with_dropout_off(tokenizer, tmp_path):
    """from_pretrained keeps the checkpoint's dtype; AdamW at 1e-6 in bfloat16 changes nothing at all."""
    saved = make_tiny("gpt2", vocab_size=len(tokenizer)).to(torch.bfloat16)
    saved.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded, its_tokenizer = rollout.load_model(str(tmp_path / "model"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and not loaded.training
    problem = Problem("Compute 1+2.", "3")
    assert rollout.render_prompt(its_tokenizer, problem) == rollout.render_prompt(tokenizer, problem)
    assert its_tokenizer.eos_token_id == tokenizer.eos_token_id


def test_a_missing_checkpoint_is_one_line(fails_with, tmp_path):
    """Taken for a name on the Hub, a missing folder makes an error that speaks of tokens and access."""
    fails_with(lambda: rollout.load_model(str(tmp_path / "none")), "none", "no checkpoint")


# ------------------------------------------------------------------------------------------------------------
# The sampler

PROMPTS = [[3, 9, 4, 17, 2, 8, 1], [5], [11, 2, 23], [6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6], [12, 13, 14], [7, 1]]


def make_sampler(model, **options):
    """Three ids of 24 stop, so that lengths differ: the tokenizer's EOS and two of the model's own config."""
    model.generation_config.eos_token_id = [5, 7]
    return HFSampler(model, SimpleNamespace(eos_token_id=EOS), **options)


def say(rollouts):
    return [(r.response_ids, r.finished) for r in rollouts]


def assert_same_rollouts(got, expected):
    assert say(got) == say(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(torch.tensor(a.log_probs), torch.tensor(b.log_probs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree_on_every_log_prob(any_model, temperature):
    """The ratio starts at 1 only if both compute the same policy. Mistaken positions under left padding, a
    cache that was shuffled when rows left, or a temperature used on one side only, all show here and nowhere
    else."""
    rollouts = make_sampler(any_model).generate(PROMPTS, 3, max_new_tokens=14, temperature=temperature)
    assert len({len(r.response_ids) for r in rollouts}) > 3
    batch = rollout.collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    with torch.no_grad():
        log_probs, _ = rollout.token_log_probs(any_model, *batch, temperature)
    for r, row, mask in zip(rollouts, log_probs, batch[1]):
        torch.testing.assert_close(torch.tensor(r.log_probs), row[mask], rtol=0, atol=1e-4)


def test_a_prompt_says_the_same_alone_and_in_a_batch(any_model):
    """Left padding that is not masked, or positions that count it, change what short prompts say: accuracy
    then depends on the batch size. The first rollout's luck is the same however many follow it."""
    for i in range(len(PROMPTS)):
        together = make_sampler(any_model).generate(PROMPTS[i:] + PROMPTS[:i], max_new_tokens=14, seed=i)
        alone = make_sampler(any_model).generate(PROMPTS[i : i + 1], max_new_tokens=14, seed=i)
        assert_same_rollouts(together[:1], alone)


@pytest.mark.parametrize("max_rows", [1, 3, 7])
def test_chunks_of_any_size_say_the_same(model, max_rows):
    """A memory setting must not change results, as it does where each chunk starts its luck anew."""
    whole = make_sampler(model).generate(PROMPTS, 3, max_new_tokens=14)
    sampler = make_sampler(model, max_rows=max_rows)
    rows, sample_chunk = [], sampler._generate_chunk
    sampler._generate_chunk = lambda prompts, group_size, *rest: (
        rows.append(len(prompts) * group_size) or sample_chunk(prompts, group_size, *rest))
    assert_same_rollouts(sampler.generate(PROMPTS, 3, max_new_tokens=14), whole)
    assert max(rows) <= max_rows  # a group larger than that is sampled in parts


def test_a_group_belongs_to_its_prompt(model):
    """Prompts are sorted by length inside: handed back in that order, rewards go to other problems."""
    rollouts = make_sampler(model).generate(PROMPTS, 4, max_new_tokens=14)
    assert [r.prompt_ids for r in rollouts] == [p for p in PROMPTS for _ in range(4)]
    for r in rollouts:  # and each says what it says after its own prompt, not after another's
        own = plain_log_probs(model, r.prompt_ids, r.response_ids)
        torch.testing.assert_close(torch.tensor(r.log_probs), own.detach(), rtol=0, atol=1e-4)


def test_the_members_of_a_group_differ(model):
    """With one stream of luck a prompt, groups are uniform: no variance, no advantage, nothing learned."""
    rollouts = make_sampler(model).generate(PROMPTS, 8, max_new_tokens=14)
    for start in range(0, len(rollouts), 8):
        assert len({r.response_ids[0] for r in rollouts[start : start + 8]}) > 1


def test_a_seed_fixes_what_is_said(model):
    """Seeded by the global generator, no run can be repeated, and an evaluation changes the training."""
    torch.manual_seed(1)
    first = make_sampler(model).generate(PROMPTS, 2, max_new_tokens=14, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_same_rollouts(make_sampler(model).generate(PROMPTS, 2, max_new_tokens=14, seed=3), first)
    assert say(make_sampler(model).generate(PROMPTS, 2, max_new_tokens=14, seed=4)) != say(first)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_says_what_transformers_generate_says(any_model):
    """An independent yardstick for the whole loop: cache, positions, stopping."""
    rollouts = make_sampler(any_model).generate(PROMPTS, max_new_tokens=14, temperature=0)
    for r in rollouts:
        ids = any_model.generate(
            torch.tensor([r.prompt_ids]), attention_mask=torch.ones(1, len(r.prompt_ids)), do_sample=False,
            max_new_tokens=14, eos_token_id=[EOS, 5, 7], pad_token_id=EOS,
        )  # fmt: skip
        assert r.response_ids == ids[0, len(r.prompt_ids) :].tolist()


def test_a_response_ends_at_eos_or_is_cut_off(model):
    """A response that runs on behind EOS is trained on garbage; one that was cut off and counts as finished
    teaches the model never to stop."""
    rollouts = make_sampler(model).generate(PROMPTS, 4, max_new_tokens=9)
    assert {r.finished for r in rollouts} == {True, False}
    for r in rollouts:
        assert not {EOS, 5, 7} & set(r.response_ids[:-1])
        assert r.finished == (r.response_ids[-1] in {EOS, 5, 7})
        assert len(r.log_probs) == len(r.response_ids) and (r.finished or len(r.response_ids) == 9)


def test_eos_as_the_last_token_there_is_room_for_is_an_end(model):
    """`length == limit` taken for `cut off` calls a response that did end truncated, and pays it nothing."""
    sampler = make_sampler(model)
    sampler.stop_ids = set(range(VOCAB))
    rollouts = sampler.generate(PROMPTS, 2, max_new_tokens=1)
    assert all(r.finished and len(r.response_ids) == 1 for r in rollouts)


def test_the_sampler_draws_from_the_models_distribution(model):
    """A temperature, top-k or top-p that slips in between is another policy than the one the loss scores.

    4000 first tokens after one prompt at T = 0.7: a share's standard error is at most sqrt(.25/4000) = 0.008.
    """
    rollouts = make_sampler(model).generate([[3, 9, 4]], 4000, max_new_tokens=1, temperature=0.7)
    share = torch.bincount(torch.tensor([r.response_ids[0] for r in rollouts]), minlength=VOCAB) / 4000
    expected = full_log_probs(model, [3, 9, 4], [1], temperature=0.7)[0].exp()
    torch.testing.assert_close(share, expected.detach(), rtol=0, atol=4 * 0.008)
    log_probs = torch.tensor([r.log_probs[0] for r in rollouts])
    ids = torch.tensor([r.response_ids[0] for r in rollouts])
    torch.testing.assert_close(log_probs, expected.log()[ids].detach(), rtol=0, atol=1e-4)


def test_sample_ids_by_hand():
    """Off by one in the inverse CDF draws the neighbour. Probabilities 1/2, 0, 1/4, 1/4: the cumulative sum
    is .5 .5 .75 1, so u < .5 is id 0, then u < .75 is id 2, then id 3; id 1 is never drawn."""
    log_probs = torch.tensor([0.5, 0, 0.25, 0.25]).log()
    u = torch.tensor([0, 0.25, 0.499, 0.501, 0.6, 0.749, 0.751, 1 - 2**-53], dtype=torch.float64)
    assert rollout.sample_ids(log_probs.expand(8, 4), u).tolist() == [0, 0, 0, 2, 2, 2, 3, 3]
    edges = torch.tensor([[0, 1.0, 0]]).log().expand(2, 3)  # ids without probability at both ends
    assert rollout.sample_ids(edges, torch.tensor([0, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1]


def test_sample_ids_frequencies():
    """On an even grid of u the shares are the probabilities, to one point of the grid."""
    torch.manual_seed(0)
    log_probs = torch.log_softmax(3 * torch.randn(50), -1)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = torch.bincount(rollout.sample_ids(log_probs.expand(10_000, 50), u), minlength=50)
    torch.testing.assert_close(counts / 10_000, log_probs.exp(), rtol=0, atol=1.1e-4)


def test_roomy_layer_is_dynamic_layer():
    """A buffer that is still written to after its rows were selected, or that overflows, corrupts the cache
    in silence. 200 tokens: the first room of 64 is used up more than once."""
    torch.manual_seed(0)
    layers = rollout.RoomyLayer(), DynamicLayer()
    state = lambda rows, length: torch.randn(2, rows, 2, length, 4)  # noqa: E731  keys and values
    prefill = state(3, 5)
    for layer in layers:
        layer.update(*prefill)
        layer.batch_repeat_interleave(4)
    rows = 12
    for t in range(200):
        if t in (1, 30, 31, 150):
            keep = torch.arange(rows)[torch.rand(rows) < 0.8]
            rows = len(keep)
            for layer in layers:
                layer.batch_select_indices(keep)
        new = state(rows, 1)
        for ours, theirs in zip(*(layer.update(*new) for layer in layers)):
            assert torch.equal(ours, theirs)
        assert layers[0].get_seq_length() == layers[1].get_seq_length() == 6 + t
    assert rows < 12


def test_the_sampler_says_the_same_with_dynamic_cache(model, monkeypatch):
    """The faster cache is an optimisation: it must not be seen in any result."""
    roomy = make_sampler(model).generate(PROMPTS, 3, max_new_tokens=40)
    monkeypatch.setattr(rollout, "RoomyLayer", DynamicLayer)
    assert_same_rollouts(make_sampler(model).generate(PROMPTS, 3, max_new_tokens=40), roomy)


def test_a_prompt_beyond_the_context_ends_the_run(model, fails_with):
    """Cut to fit, a prompt loses its instruction or its solution, and the run goes on with it."""
    sampler = make_sampler(model)
    long = [3] * (CONTEXT - 4)
    sampler.generate([[3], long], max_new_tokens=4)
    fails_with(lambda: sampler.generate([[3], long], max_new_tokens=5), CONTEXT, CONTEXT - 4, "context")


def test_training_goes_on_from_what_was_sampled(model):
    """Weights that were touched in inference mode cannot be trained; nor may the sampler keep old weights."""
    sampler = make_sampler(model)
    before = sampler.generate(PROMPTS, max_new_tokens=14)
    batch = rollout.collate([r.prompt_ids for r in before], [r.response_ids for r in before])
    rollout.token_log_probs(model, *batch)[0].sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    sampler.sync(model)
    after = sampler.generate(PROMPTS, max_new_tokens=14)
    assert_same_rollouts(after, make_sampler(model).generate(PROMPTS, max_new_tokens=14))
    assert say(after) != say(before)


# ------------------------------------------------------------------------------------------------------------
# Labels


def make_said(tokenizer, text, finished=True):
    ids = encode_by_character(tokenizer, text) + [tokenizer.eos_token_id] * finished
    return Rollout([1], ids, [-1.0] * len(ids), finished)


def test_a_label_goes_to_the_rollout_that_earned_it(tokenizer):
    """Grouped the other way round (rollout i to problem i mod P) everything runs, and reward is noise.

    Two problems, answers 3 and 7, with three responses each: 3 7 3 | 7 7 3.
    """
    problems = [Problem("a", "3"), Problem("b", "7")]
    rollouts = [make_said(tokenizer, f"<think></think>\\boxed{{{n}}}") for n in (3, 7, 3, 7, 7, 3)]
    ids = [list(r.response_ids) for r in rollouts]
    labelled = rollout.label_rollouts(rollouts, problems, tokenizer)
    right = [True, False, True, True, True, False]
    assert [r.label for r in labelled] == ["correct" if x else "incorrect" for x in right]
    assert [r.problem.problem for r in labelled] == list("aaabbb")
    assert [r.response_ids for r in labelled] == ids  # as they were sampled, though another spelling exists
    assert labelled[1].text == "<think></think>\\boxed{7}"


def test_what_was_cut_off_is_truncated_whatever_it_says(tokenizer):
    """Some count it as incorrect, others as correct once a box was seen: here it is a label of its own."""
    said = [make_said(tokenizer, "\\boxed{3} and", finished=False), make_said(tokenizer, "\\boxed{3}")]
    labelled = rollout.label_rollouts(said, [Problem("a", "3")] * 2, tokenizer)
    assert [r.label for r in labelled] == ["truncated", "correct"]


ENDINGS = [  # what is said, and whether it counts: the answer stands after a thinking that ends
    ("<think>1+2</think>\\boxed{3}", True), ("<think>So \\boxed{3}</think>\\boxed{4}", False),
    ("<think>So \\boxed{3}", False), ("<think></think>\\boxed{3}<think>or", False),
    ("<think>\\boxed{4}</think>a</think>\\boxed{3}", True), ("<think>\\boxed{3}</think>", False)]  # fmt: skip


def said_after(thinker, text):
    """`text` said after the thinker's own prompt, without the <think> that the prompt has opened."""
    text = text.removeprefix("<think>") if thinker.opens else text
    ids = thinker.encode(text, add_special_tokens=False) + [thinker.eos_token_id]
    return Rollout(rollout.render_prompt(thinker, Problem("a", "3")), ids, [-1.0] * len(ids), True)


@pytest.mark.parametrize("text, right", ENDINGS)
def test_an_answer_in_a_thinking_that_does_not_end_is_none(thinker, text, right):
    """A box in the thinking was judged where the tags are special tokens, which decoding leaves out, and
    where the prompt opened the thinking, so that the response alone does not show it."""
    labelled = rollout.label_rollouts([said_after(thinker, text)], [Problem("a", "3")], thinker)[0]
    assert labelled.label == ("correct" if right else "incorrect")
    assert labelled.text == text.replace("<think>", "<think>\n" if thinker.opens else "<think>", 1)


def test_without_thinking_a_bare_answer_counts(thinker):
    """--no-thinking closes what the template opens: then the response needs no tag."""
    ids = thinker.encode("\\boxed{3}", add_special_tokens=False) + [thinker.eos_token_id]
    prompt = rollout.render_prompt(thinker, Problem("a", "3"), thinking=False)
    said = Rollout(prompt, ids, [-1.0] * len(ids), True)
    rollout.label_rollouts([said], [Problem("a", "3")], thinker)
    assert (said.label, said.text) == ("correct", "\\boxed{3}")


def test_other_special_tokens_are_left_out_of_a_text(tokenizer):
    """As decoding leaves them out, wherever they stand: samples.jsonl is for people."""
    rng, special = random.Random(5), tokenizer.convert_tokens_to_ids(["<|pad|>", "<|user|>", "<|end|>"])
    ids = [rng.choice([*special, rng.randrange(len(tokenizer))]) for _ in range(200)]
    said = rollout.label_rollouts([Rollout([1], ids, [-1.0] * 200, True)], [Problem("a", "3")], tokenizer)[0]
    assert said.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_summarize_by_hand(rollouts):
    """Lengths 7 1 3 5 2 6 4 3, mean 31/8 = 3.875; correct are 7, 5 and 2, mean 14/3; truncated are 2 of 8."""
    summary = rollout.summarize(rollouts)
    assert summary["accuracy"] == 3 / 8 and summary["response/truncated"] == 2 / 8
    assert summary["response/len_mean"] == 3.875 and summary["response/len_correct"] == pytest.approx(14 / 3)
    assert rollout.summarize(rollouts[1:3])["response/len_correct"] is None
    json.dumps(summary)


def test_evaluate_asks_every_problem_n_times(tokenizer, problems):
    """Through the real sampler: n responses to each problem, after the prompt that the stages train on."""
    model = make_tiny(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id, context=256)
    sampler = HFSampler(model, tokenizer)
    rollouts = rollout.evaluate(sampler, problems, max_new_tokens=4, n=2)
    assert [r.problem for r in rollouts] == [p for p in problems for _ in range(2)]
    assert all(r.prompt_ids == rollout.render_prompt(tokenizer, r.problem) for r in rollouts)
    assert all(r.label for r in rollouts)


# ------------------------------------------------------------------------------------------------------------
# Collation and log-probs


def test_collate_by_hand():
    """EOS is token 0 here, and so is padding: with a mask made from the pad id no model learns to stop.

    Rows: prompt 8 9, response 5 0 | prompt 0 (a token like any other), response 6 7 4, cut off | no response.
    """
    input_ids, response_mask = rollout.collate([[8, 9], [0], [3, 3, 3]], [[5, 0], [6, 7, 4], []])
    assert input_ids.tolist() == [[8, 9, 5, 0], [0, 6, 7, 4], [3, 3, 3, 0]]
    assert response_mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_micro_batches_keep_every_item_and_start_with_the_longest():
    """A remainder that is dropped is data that is never trained on."""
    items = ["aa", "aaaaa", "a", "aaaa", "aaa"]
    assert rollout.micro_batches(items, 2, len) == [["aaaaa", "aaaa"], ["aaa", "aa"], ["a"]]


def test_hidden_states_are_those_that_predict_the_response(any_model, rollouts):
    """Without the shift each state is scored on the token it has just read. The logits of these states must
    be the plain ones, row after row, whatever each prompt's width."""
    batch = rollout.collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    hidden = rollout.response_hidden_states(any_model, *batch)
    assert len(hidden) == sum(len(r.response_ids) for r in rollouts)
    got = any_model.get_output_embeddings()(hidden).log_softmax(-1)
    expected = torch.cat([full_log_probs(any_model, r.prompt_ids, r.response_ids) for r in rollouts])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs_are_the_plain_ones(any_model, rollouts, temperature):
    """Against one sequence at a time, all logits at once: shift, padding, order and temperature. Zero
    elsewhere, so that a sum over the row is a sum over the response."""
    batch = rollout.collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    log_probs, entropy = rollout.token_log_probs(any_model, *batch, temperature)
    assert log_probs.shape == entropy.shape == batch[0].shape
    assert not log_probs[~batch[1]].any() and not entropy[~batch[1]].any()
    for i, r in enumerate(rollouts):
        full = full_log_probs(any_model, r.prompt_ids, r.response_ids, temperature)
        plain = full[torch.arange(len(full)), r.response_ids]
        torch.testing.assert_close(log_probs[i, batch[1][i]], plain, rtol=0, atol=1e-4)
        torch.testing.assert_close(entropy[i, batch[1][i]], -(full.exp() * full).sum(-1), rtol=0, atol=1e-4)


def test_gradient_checkpointing_recomputes(model, rollouts):
    """Asked for in eval mode it does nothing, silently, and memory is as before: a layer runs twice."""
    runs = []
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(model.training))
    input_ids, response_mask = rollout.collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    rollout.token_log_probs(model, input_ids, response_mask)[0].sum().backward()
    assert runs == [True, True]


def test_a_loaded_model_has_no_dropout_in_train_mode(tokenizer, tmp_path):
    """Its sampler has none: with dropout the policy that is trained is not the one that sampled. GPT-2 has three
    kinds of it."""
    saved = make_tiny("gpt2", vocab_size=len(tokenizer), dropout=0.1)
    saved.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, _ = rollout.load_model(str(tmp_path / "model"))
    batch = rollout.collate([[3, 4, 5]], [[6, 7, 8, 9]])
    expected = rollout.token_log_probs(model, *batch)[0]
    assert torch.equal(rollout.token_log_probs(model.train(), *batch)[0], expected)


def test_rows_that_fit_a_gpu(model, monkeypatch):
    """512 rows of 9,000 tokens of an 8B model are 1.3 TB of cache: fewer at once, and the same rollouts.

    Here a token takes 2 (a key, a value) * 2 layers * 1 head * 16 * 4 bytes = 256, a row of 10 takes 2,560.
    """
    sampler = make_sampler(model)
    assert sampler.rows_that_fit(10) == 512
    assert sampler.bytes_per_token() == 256
    sampler.model, sampler.bytes_per_token = SimpleNamespace(device=torch.device("cuda")), lambda: 256
    for name, value in {"mem_get_info": (64_000, 0), "memory_reserved": 5_000, "memory_allocated": 5_000}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert sampler.rows_that_fit(10) == 64_000 / 2.5 / 2_560 == 10
    assert sampler.rows_that_fit(10_000) == 1 and sampler.rows_that_fit(0.1) == 512


def test_token_log_probs_of_a_model_that_knows_nothing(model, rollouts):
    """Weights of zero give equal logits: every log-prob is -ln 24 = -3.1780538, every entropy ln 24."""
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    batch = rollout.collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    for values, expected in zip(rollout.token_log_probs(model, *batch), (-3.1780538, 3.1780538)):
        torch.testing.assert_close(values, expected * batch[1], rtol=0, atol=1e-5)


def test_chunks_change_neither_log_probs_nor_gradient(model, rollouts, monkeypatch):
    """Chunks are computed again in the backward pass: one that is lost there shows in the gradient only."""
    batch = rollout.collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    results = []
    for tokens_a_chunk in (1000, 3, 1):
        monkeypatch.setattr(rollout, "MAX_LOGITS", tokens_a_chunk * VOCAB)
        twin = copy.deepcopy(model)
        log_probs, entropy = rollout.token_log_probs(twin, *batch)
        (log_probs * torch.linspace(-1, 1, log_probs.numel()).view(log_probs.shape)).sum().backward()
        results.append([log_probs.detach(), entropy, *(p.grad for p in twin.parameters())])
    for chunked in results[1:]:
        torch.testing.assert_close(chunked, results[0], rtol=1e-4, atol=1e-5)


def test_a_response_without_tokens_is_no_nan(model):
    """A row without a response token made 0/0 once; here it is a row of zeros and takes part in nothing."""
    log_probs, entropy = rollout.token_log_probs(model, *rollout.collate([[3, 4], [5]], [[], [6, 0]]))
    assert log_probs.isfinite().all() and not log_probs[0].any() and not entropy[0].any()
    log_probs.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    alone, _ = rollout.token_log_probs(model, *rollout.collate([[3, 4]], [[]]))
    assert not alone.any()


def test_k3_by_hand():
    """k3 with the ratio upside down is >= 0 too, and it is another divergence.

    q twice p: 2 - 1 - ln 2 = .3068528; half of it: .5 - 1 + ln 2 = .1931472; equal: 0.
    In expectation over p it is KL(p || q). p = 1/2 1/4 1/4, q = 1/8 3/8 1/2:
    .5 ln 4 + .25 ln(2/3) + .25 ln(1/2) = .6931472 - .1013663 - .1732868 = .4184941.
    """
    p = torch.tensor([-1.0, -1.0, -1.0])
    q = p + torch.tensor([math.log(2), -math.log(2), 0])
    assert rollout.k3_kl(p, q).tolist() == pytest.approx([0.3068528, 0.1931472, 0], abs=1e-5)
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.125, 0.375, 0.5])
    assert (p * rollout.k3_kl(p.log(), q.log())).sum().item() == pytest.approx(0.4184941, abs=1e-5)
    torch.manual_seed(0)
    assert (rollout.k3_kl(torch.randn(1000), torch.randn(1000)) > -1e-6).all()


def test_the_samplers_log_probs_stand_where_the_trainers_do(rollouts):
    """Old log-probs of another token or row make every ratio wrong, and no metric says so."""
    _, mask = rollout.collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts])
    got = rollout.sampler_log_probs(rollouts, mask)
    for r, row, row_mask in zip(rollouts, got, mask):
        assert row[row_mask].tolist() == pytest.approx(r.log_probs) and not row[~row_mask].any()
