"""Tokens per second of sampling and of training, share of the device's peak, memory: a GPU's benchmark.

    python tests/bench/bench_model.py --size 0.6B                  # Qwen3's shape, random weights, bfloat16
    python tests/bench/bench_model.py --size tiny --device cpu     # the same code in a few seconds

Model FLOPs: 2 a parameter and token forward, 6 with the backward pass, attention and recomputation not
counted; the share of the peak (MFU) is against --peak TFLOP/s (default 989, an H100's in bfloat16). Each is
run once to warm up, then timed. Training is a step of sft.py in two micro-batches: gradients, then AdamW. Its
peak of memory is printed beside what memory.py computes for these micro-batches.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from memory import GB, SHAPES, make_config, memory, total  # noqa: E402
from transformers import Qwen3ForCausalLM  # noqa: E402

import sft  # noqa: E402
from rollout import GPU_CHUNK, MAX_LOGITS, HFSampler  # noqa: E402

GROUP = 8  # responses to each prompt


def get_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--size", choices=SHAPES, default="0.6B")
    add("--rows", type=int, default=256, help="sequences sampled together, 8 of each prompt")
    add("--new-tokens", type=int, default=256)
    add("--prompt-tokens", type=int, default=128)
    add("--micro-batch-size", type=int, default=16, help="sequences trained on at a time, of twice as many")
    add("--device", default="cuda")
    add("--peak", type=float, default=989, help="TFLOP/s")
    add("--json", metavar="FILE", help="write the figures as json")
    return parser.parse_args()


def timed(function, device):
    """-> what the second of two calls returned, its seconds, its peak of memory in bytes (None on a CPU)."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    result = function()
    if device.type != "cuda":
        return result, time.perf_counter() - start, None
    torch.cuda.synchronize()
    return result, time.perf_counter() - start, torch.cuda.max_memory_allocated()


def measure(args):
    """-> {name: figure}."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    config = make_config(args.size)
    with device:
        model = Qwen3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = config.vocab_size  # no token: no response ends early
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parameters = sum(p.numel() for p in model.parameters())
    at_peak = args.peak * 1e12 / parameters  # tokens/s, if a token took one FLOP a parameter
    sampler = HFSampler(model, argparse.Namespace(eos_token_id=config.vocab_size))
    optimizer = sft.make_optimizer(model, argparse.Namespace(lr=1e-6, weight_decay=0.1))
    prompts = torch.randint(1000, (max(1, args.rows // GROUP), args.prompt_tokens)).tolist()

    def sample():
        return sampler.generate(prompts, GROUP, max_new_tokens=args.new_tokens)

    def train():
        sft.accumulate_gradients(model, batch, args.micro_batch_size)
        optimizer.step()
        optimizer.zero_grad()

    with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        rollouts, seconds, sampling_peak = timed(sample, device)
        sampling_speed = len(rollouts) * args.new_tokens / seconds
        batch = rollouts[: 2 * args.micro_batch_size]
        tokens = args.prompt_tokens + args.new_tokens
        _, seconds, training_peak = timed(train, device)
        training_speed = len(batch) * tokens / seconds
    chunk_logits = MAX_LOGITS * (GPU_CHUNK if device.type == "cuda" else 1)
    computed = total(memory(config, args.micro_batch_size * tokens, False, chunk_logits))
    return {
        "size": args.size, "parameters": parameters,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "sampling_tokens_per_second": sampling_speed, "sampling_mfu": 2 * sampling_speed / at_peak,
        "training_tokens_per_second": training_speed, "training_mfu": 6 * training_speed / at_peak,
        "sampling_peak_bytes": sampling_peak, "training_peak_bytes": training_peak,
        "training_computed_bytes": computed,
    }  # fmt: skip


def main():
    args = get_args()
    figures = measure(args)
    print(f"{args.size}: {figures['parameters'] / 1e9:.2f} B parameters, {figures['device']}")
    for what in ("sampling", "training"):
        speed, share = figures[f"{what}_tokens_per_second"], figures[f"{what}_mfu"]
        peak = figures[f"{what}_peak_bytes"]
        memory_said = f", peak memory {peak / GB:.1f} GB" if peak else ""
        print(f"{args.size}: {what} {speed:,.0f} tokens/s, MFU {share:.2%}{memory_said}")
    print(f"{args.size}: training, computed: {figures['training_computed_bytes'] / GB:.1f} GB")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
