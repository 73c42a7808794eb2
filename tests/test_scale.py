"""Several processes give the numbers, the rollouts and the files of one: tests on CPUs, with gloo.

A process of a test is forked from a server that has imported everything already, so it starts at once. It sees
what torchrun would tell it. `torchrun` itself runs in the last tests.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import EOS, VOCAB, make_tiny
from torch.distributed.tensor import DTensor

import opsd
import rlvr
import rollout
import sft
from rollout import HFSampler, Problem, Rollout

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["conftest", "test_scale"])


# ------------------------------------------------------------------------------------------------------------
# Processes


def child(function, args, rank, count, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    for descriptor, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(f"{folder}/{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    rollout.join_processes("cpu")
    result = function(*args)
    torch.save(result, f"{folder}/result.{rank}")
    sys.stdout.flush()


def start_processes(count, folder, function, *args):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's part
    started = [SERVER.Process(target=child, args=(function, args, rank, count, store.port, str(folder)))
        for rank in range(count)]  # fmt: skip
    for process in started:
        process.start()
        process.store = store  # which lives as long as they do
    return started


def in_processes(count, folder, function, *args):
    """function(*args) in each of so many processes -> what each returned. 0: here, without torchrun."""
    if count == 0:
        return [function(*args)]
    started = start_processes(count, folder, function, *args)
    for process in started:
        process.join(60)
    errors = [(folder / f"stderr.{rank}").read_text() for rank in range(count)]
    assert [process.exitcode for process in started] == [0] * count, "".join(errors)
    return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(count)]


# ------------------------------------------------------------------------------------------------------------
# Gradients


def make_rollouts(count=8):
    """Prompts of 1 to 9 tokens, responses of 1 to 7. Sorted and cut into threes: no two micro-batches alike."""
    rng, made = random.Random(7), []
    for i in range(count):
        response = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(7))] + [EOS]
        prompt, label = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))], ["correct", "incorrect"][i % 2]
        made.append(Rollout(prompt, response, [rng.uniform(-4.5, -1.5) for _ in response], True,
            Problem(f"problem {i}", str(i)), label=label, advantage=rng.uniform(-1, 1),
            teacher_prompt_ids=prompt + [5] * rng.randint(1, 6)))  # fmt: skip
    return made


STAGES = ["sft", "rlvr", "opsd"]
CASES = list(itertools.product(STAGES, ["tied", "untied"], ["checkpointing", ""], [1, 3, 8]))


def gradient(stage, tied, checkpointing, micro_batch_size, average=False):
    """-> metrics, {weight: gradient}, the norm before clipping."""
    kinds = {"tied": "qwen3", "untied": "qwen3-untied"}
    models = [make_tiny(kinds[tied], seed) for seed in (0, 1)]
    if checkpointing:
        models[0].gradient_checkpointing_enable({"use_reentrant": False})
    model, other = [rollout.shard(model, "cpu") for model in models]
    other.requires_grad_(False)
    for part in rollout.sharded_parts(model) if average else []:  # FSDP2's default
        part.set_gradient_divide_factor(float(dist.get_world_size()))
    args = SimpleNamespace(micro_batch_size=micro_batch_size, loss_normalization="token", max_new_tokens=7,
        temperature=0.8, clip_low=0.2, clip_high=0.28, ratio_cap=3.0, kl_coef=0.1, divergence="reverse", beta=0.5)
    rollouts, divergences = make_rollouts(), []
    if stage == "sft":
        metrics = {"loss": sft.accumulate_gradients(model, rollouts, micro_batch_size)}
    elif stage == "rlvr":
        metrics = rlvr.accumulate_gradients(model, other, rollouts, args)
    else:
        metrics = {"loss": opsd.accumulate_gradients(model, other, rollouts, args)}
        divergences = [r.divergences for r in rollouts]
    whole = lambda x: (x.full_tensor() if isinstance(x, DTensor) else x).clone()  # noqa: E731
    rollout.reshard(model)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    return metrics, gradients, rollout.clip_gradients(model, 0.1), divergences


def all_gradients(chunk):
    rollout.MAX_LOGITS = VOCAB * chunk
    return {case: gradient(*case) for case in CASES}


def in_chunks_of(chunk, count, folder):
    before = rollout.MAX_LOGITS
    results = in_processes(count, folder, all_gradients, chunk)
    rollout.MAX_LOGITS = before
    return results


@pytest.fixture(scope="module")
def expected():
    return in_chunks_of(3, 0, None)[0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_are_those_of_one_process(count, tmp_path, expected):
    """8 rollouts in micro-batches of 1, 3 and 8: 8, 3 and 1 of them, dealt to 1, 2 and 3 processes. Chunks of 3 tokens:
    the processes call their heads a different number of times, and a filler once."""
    for result in in_chunks_of(3, count, tmp_path):
        for case in CASES:
            metrics, gradients, norm, divergences = result[case]
            metrics_of_one, gradients_of_one, norm_of_one, divergences_of_one = expected[case]
            assert metrics == pytest.approx(metrics_of_one, abs=1e-6), case
            assert norm == pytest.approx(norm_of_one, rel=1e-6), case
            assert gradients.keys() == gradients_of_one.keys()
            largest = max(g.abs().max() for g in gradients_of_one.values())
            assert largest > 1e-3
            for name, of_one in gradients_of_one.items():
                assert (gradients[name] - of_one).abs().max() < 1e-6 * max(1, largest), (case, name)
            for ours, theirs in zip(divergences, divergences_of_one, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
