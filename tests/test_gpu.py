"""On a CUDA device: what a CPU cannot show. Not run yet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny

import rollout
from rollout import HFSampler, collate, token_log_probs

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype, gap", [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_sampler_and_trainer_agree(tokenizer, problems, dtype, gap):
    """Other kernels run for one token with a cache than for a whole sequence: their log-probs must not part."""
    model = make_tiny(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id, context=512).cuda()
    prompts = [rollout.render_prompt(tokenizer, p) for p in problems]
    with torch.autocast("cuda", torch.bfloat16, dtype == "bfloat16", cache_enabled=False), torch.no_grad():
        rollouts = HFSampler(model, tokenizer).generate(prompts, 8, max_new_tokens=64)
        ids, mask = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], "cuda")
        ours = token_log_probs(model, ids, mask)[0][mask].cpu()
    theirs = torch.tensor(sum((r.log_probs for r in rollouts), []))
    assert (ours - theirs).abs().max() < gap


def test_a_full_gpu_says_what_to_lower(tmp_path):
    """CUDA's own out-of-memory error, not a stand-in: one line, exit status 2. The process may use a thousandth of
    the memory, which is full at the first steps."""
    code = ("import sys, torch; torch.cuda.set_per_process_memory_fraction(0.001); import sft; "
        "sys.argv[1:] = '--steps 2 --batch-size 512 --micro-batch-size 512 --eval-problems 8 --out run'.split(); "
        "sft.main()")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: out of memory on cuda")


def test_the_chain(tmp_path):
    """Every stage in bfloat16 with gradient checkpointing, then the table."""
    tiny = "--steps 2 --batch-size 8 --eval-problems 8 --max-new-tokens 24 --device cuda --dtype bfloat16".split()
    for command in (["sft.py", *tiny], ["rlvr.py", "--init", "ckpt/sft", "--gradient-checkpointing", *tiny],
            ["opsd.py", "--init", "ckpt/rlvr", "--gradient-checkpointing", *tiny],
            ["eval.py", "ckpt/sft", "ckpt/opsd", "--problems", "8", "--max-new-tokens", "24", "--device", "cuda"]):
        done = subprocess.run([sys.executable, ROOT / command[0], *command[1:]], cwd=tmp_path, capture_output=True,
            text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
