"""Tokens per second of sampling and of training, and the share of the device's peak: a GPU's benchmark.

    python tests/bench/bench_model.py --size 0.6B                  # Qwen3's shape, random weights, bfloat16
    python tests/bench/bench_model.py --size tiny --device cpu     # the same code in a few seconds

Model FLOPs: 2 a parameter and token forward, 6 with the backward pass, attention and recomputation not
counted; the share of the peak (MFU) is against --peak TFLOP/s (default 989, an H100's in bfloat16).
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from memory import SHAPES, make_config  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402

from rollout import HFSampler, collate, token_log_probs  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=SHAPES, default="0.6B")
    add("--rows", type=int, default=256, help="sequences sampled together, 8 of each prompt")
    add("--new-tokens", type=int, default=256)
    add("--prompt-tokens", type=int, default=128)
    add("--device", default="cuda")
    add("--peak", type=float, default=989, help="TFLOP/s")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(make_config(args.size)).to(args.device).eval()
    model.generation_config.eos_token_id = None  # every response is as long as it may be
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = sum(p.numel() for p in model.parameters())
    sampler = HFSampler(model, argparse.Namespace(eos_token_id=None))
    prompts = torch.randint(1000, (max(1, args.rows // 8), args.prompt_tokens)).tolist()

    def timed(function, tokens, flops_per_token):
        function()  # once to warm up
        start = time.time()
        out = function()
        rate = tokens / (time.time() - start)
        return out, rate, rate * flops_per_token * parameters / (args.peak * 1e12)

    def train():
        prompts, responses = [r.prompt_ids for r in some], [r.response_ids for r in some]
        input_ids, response_mask = collate(prompts, responses, args.device)
        token_log_probs(model, input_ids, response_mask)[0].sum().backward()
        return model.zero_grad(set_to_none=True)

    with torch.autocast(torch.device(args.device).type, torch.bfloat16, cache_enabled=False):
        rollouts, rate, mfu = timed(lambda: sampler.generate(prompts, 8, max_new_tokens=args.new_tokens),
            len(prompts) * 8 * args.new_tokens, 2)
        print(f"{args.size}: {parameters / 1e9:.2f} B parameters")
        print(f"{args.size}: sampling {rate:,.0f} tokens/s, MFU {mfu:.2%}")
        some = rollouts[:16]
        _, rate, mfu = timed(train, sum(len(r.prompt_ids) + len(r.response_ids) for r in some), 6)
        print(f"{args.size}: training {rate:,.0f} tokens/s, MFU {mfu:.2%}", end="")
    if args.device != "cpu":
        print(f"; peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", end="")
    print()


if __name__ == "__main__":
    main()
