"""Seconds a step and memory of 1, 2, ... processes of one thread each: python tests/bench/bench_scale.py

Each number of processes trains the same model on the same batch, as sft.py does, and samples from it, as
rlvr.py does. 0 is one process without torchrun. Weights, gradients and moments that a process holds are
counted from their tensors, after a step; pages that are shared or freed do not blur it. Nothing else should
run meanwhile: with more processes than cores, they share them.

    python tests/bench/bench_scale.py --processes 0 1 2 --size 0.39
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

import rollout  # noqa: E402
import sft  # noqa: E402

SHAPES = {"0.39": (96, 288, 3), "14": (384, 1152, 8)}  # million parameters: hidden, intermediate, layers
VOCAB, SEQUENCES, PROMPT, RESPONSE, STEPS = 512, 32, 40, 80, 3


def held(tensors):
    """Bytes of this process's pieces."""
    pieces = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
    return sum(piece.nbytes for piece in pieces)


def measure(size):
    """One line: processes, seconds of a training step, seconds of sampling, MB that process 0 holds."""
    torch.set_num_threads(1)
    rollout.join_processes("cpu")
    hidden, inner, layers = SHAPES[size]
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32,
        head_dim=32, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
        pad_token_id=0))  # fmt: skip
    model = rollout.shard(model, "cpu")
    args = SimpleNamespace(lr=1e-4, weight_decay=0.0, min_lr_ratio=1.0, warmup_steps=0, steps=100,
        grad_clip=1.0)
    optimizer = sft.make_optimizer(model, args)
    ids = torch.randint(1, VOCAB, (SEQUENCES, PROMPT + RESPONSE)).tolist()
    examples = [sft.Example(row[:PROMPT], row[PROMPT:]) for row in ids]
    sampler = rollout.HFSampler(model, SimpleNamespace(eos_token_id=0))
    training, sampling = [], []
    for step in range(STEPS + 1):
        start = time.time()
        loss = sft.accumulate_gradients(model, examples, SEQUENCES // 8)
        sft.optimizer_step(step + 1, model, optimizer, loss, args)
        training.append(time.time() - start)
        start = time.time()
        sampler.generate([row[:PROMPT] for row in ids], 1, max_new_tokens=RESPONSE)
        sampling.append(time.time() - start)
    sft.accumulate_gradients(model, examples, SEQUENCES // 8)  # for gradients to count
    rollout.reshard(model)
    weights = list(model.parameters())
    moments = [x for state in optimizer.state.values() for x in state.values()]
    mb = held(weights) + held([w.grad for w in weights]) + held(moments)
    whole = sum(w.nbytes for w in weights)
    count = rollout.processes() if "LOCAL_RANK" in os.environ else 0
    print(f"| {count or 'none (no torchrun)'} | {min(training[1:]):.2f} | {min(sampling[1:]):.2f} "
        f"| {mb / 1e6:.1f} of {4 * whole / 1e6:.1f} |", flush=True)
    rollout.meet()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", choices=SHAPES, default="14", help="million parameters")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args.size)
        return
    print("| processes | training, s a step | sampling, s | weights, gradients, moments in each, MB |")
    print("|---|---|---|---|", flush=True)
    for count in args.processes:
        launcher = []
        if count:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        subprocess.run([sys.executable, *launcher, __file__, "--child", "--size", args.size], check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


if __name__ == "__main__":
    main()
