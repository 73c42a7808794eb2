"""On a CUDA device: what a CPU cannot show.

    python -m pytest tests/test_gpu.py                  # without a GPU all are skipped
    TEST_DEVICE=cpu python -m pytest tests/test_gpu.py  # a rehearsal of those that a CPU can run too
"""

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import memory
import pytest
import torch
from conftest import make_tiny
from test_bench import run_micro_batch
from test_chain import read_rows, run_stage
from transformers import Qwen3Config, Qwen3ForCausalLM

import eval as eval_stage
import opsd
import rlvr
import rollout
import sft
from rollout import HFSampler, collate, token_log_probs

ROOT = Path(__file__).resolve().parent.parent
DEVICE = os.environ.get("TEST_DEVICE", "cuda")
pytestmark = pytest.mark.gpu
COUNTS_MEMORY = pytest.mark.skipif(DEVICE == "cpu", reason="a CPU's allocator keeps no count")


@pytest.mark.parametrize("dtype, gap", [("float32", 1e-4), ("bfloat16", 0.15)])
def test_sampler_and_trainer_agree(tokenizer, problems, dtype, gap):
    """Other kernels run for one token with a cache than for a whole sequence: their log-probs must not part.
    In bfloat16 a CPU's differ by up to 0.04; a wrong position, mask or head gives differences of 1."""
    model = make_tiny(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id, context=512).to(DEVICE)
    prompts = [rollout.render_prompt(tokenizer, p) for p in problems]
    with torch.autocast(DEVICE, torch.bfloat16, dtype == "bfloat16", cache_enabled=False), torch.no_grad():
        rollouts = HFSampler(model, tokenizer).generate(prompts, 8, max_new_tokens=64)
        ids, mask = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], DEVICE)
        ours = token_log_probs(model, ids, mask)[0][mask].cpu()
    theirs = torch.tensor([log_prob for r in rollouts for log_prob in r.log_probs])
    assert (ours - theirs).abs().max() < gap


@pytest.mark.parametrize("tokens_a_chunk", [1000, 30])
def test_the_gradient_is_a_cpus(rollouts, tokens_a_chunk, monkeypatch):
    """In chunks, the backward pass runs within the backward pass: on a GPU in a thread of its own."""
    monkeypatch.setattr(rollout, "MAX_LOGITS", tokens_a_chunk * 24 // rollout.GPU_CHUNK)
    gradients = []
    for device in ("cpu", DEVICE):
        model = make_tiny().to(device)
        ids, mask = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], device)
        token_log_probs(model, ids, mask)[0].sum().backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4)


@COUNTS_MEMORY
@pytest.mark.parametrize("stage", [sft, rlvr, opsd], ids=lambda stage: stage.__name__)
def test_memory_is_as_computed(stage):
    """The figure of tests/bench/memory.py, for a second step of two micro-batches. The head is Qwen3-8B's:
    three copies of it instead of one and a half would be 3.7 GB more than 17."""
    config = Qwen3Config(vocab_size=151_936, hidden_size=4096, intermediate_size=1024, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)  # fmt: skip
    gc.collect()
    before = torch.cuda.memory_allocated()
    with torch.device(DEVICE):
        model = Qwen3ForCausalLM(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    teacher = copy.deepcopy(model).requires_grad_(False) if stage is opsd else None
    optimizer = stage.make_optimizer(model, SimpleNamespace(lr=1e-6, weight_decay=0.0))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        run_micro_batch(stage, model, teacher, 4096)
        run_micro_batch(stage, model, teacher, 4096)
        optimizer.step()
        optimizer.zero_grad()
    computed = memory.total(memory.memory(config, 4096, stage is opsd))
    assert 0.95 < computed / (torch.cuda.max_memory_allocated() - before) < 1.1


@COUNTS_MEMORY
@pytest.mark.parametrize("stage", [sft, rlvr, opsd], ids=lambda stage: stage.__name__)
def test_a_step_of_adamw_takes_no_memory(stage):
    """AdamW's default on CUDA takes 4 more bytes a parameter while it steps."""
    model = torch.nn.Linear(4096, 4096, device=DEVICE)
    optimizer = stage.make_optimizer(model, SimpleNamespace(lr=1e-6, weight_decay=0.1))
    for _ in range(2):  # the first step makes the moments
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 4096 * 4096


@COUNTS_MEMORY
def test_a_full_gpu_says_what_to_lower(tmp_path):
    """CUDA's own out-of-memory error, not a stand-in: one line, exit status 2. The process may use a
    thousandth of the memory, which is full at the first steps."""
    flags = "--steps 2 --batch-size 128 --micro-batch-size 128 --eval-problems 8 --out run"
    code = ("import sys, torch; torch.cuda.set_per_process_memory_fraction(0.001); import sft; "
        f"sys.argv[1:] = '{flags}'.split(); sft.main()")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: out of memory on cuda")


def test_the_chain(tmp_path, monkeypatch):
    """Every stage in bfloat16 with gradient checkpointing, each stopped after a step and resumed; then the
    table. An untrained model gets no answer right, so a reward that likes short responses stands in."""
    (tmp_path / "my_rewards.py").write_text("def score(response, gold): return 1 / (1 + len(response))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    tiny = "--steps 2 --batch-size 8 --eval-problems 8 --max-new-tokens 128 --dtype bfloat16"

    def run(stage, *flags):
        status, out, err = run_stage(stage, *flags, device=DEVICE)
        assert status == 0, err[-2000:]
        return out

    for stage, flags in {sft: "", rlvr: "--init ckpt/sft --reward my_rewards:score", opsd: "--init ckpt/rlvr"}.items():
        run(stage, flags, "--gradient-checkpointing --stop-after 1", tiny)
        run(stage, f"--resume --out ckpt/{stage.__name__}")
        rows = read_rows(f"ckpt/{stage.__name__}/metrics.jsonl")
        trained = [row for row in rows if "grad_norm" in row]
        assert len(trained) == 2 and all(row["grad_norm"] > 0 for row in trained), stage
        assert all(row.get("kl/sample_train", 0) < 0.01 for row in rows), stage
    said = run(eval_stage, "ckpt/sft ckpt/opsd --problems 8 --max-new-tokens 24")
    assert said.count("ckpt/opsd") == 3  # a row in each table
