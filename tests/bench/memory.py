"""How much GPU memory does a stage take? Computed from a model's shape: python tests/bench/memory.py

With --dtype bfloat16 --gradient-checkpointing, n tokens in a micro-batch, hidden size H, intermediate size I,
L layers, vocabulary V. Bytes:

    weights         4 a parameter (fp32)
    gradients       4 a parameter
    AdamW           8 a parameter: two moments; fused, it takes nothing more in its step
    second model    4 a parameter: opsd.py's teacher, rlvr.py's reference with --kl-coef
    layer inputs    4 n H L: what gradient checkpointing keeps
    then the larger of two, which follow one another in the backward pass:
    one layer       computed again: n (34 H + 11 I + 10 (query heads + key heads) head size), and its weights
                    in bfloat16
    head            the hidden states around it, 24 n H; and the larger of two again: 6 V H (the gradient of
                    one chunk in bfloat16 and in fp32), or 2 V H (the weights in bfloat16) and the logits of a
                    chunk in fp32, 3 times (sft, rlvr) or 6 times (opsd)

tests/bench/test_bench.py compares this with the live tensors of a real step, counted on a CPU. Not counted:
what CUDA itself takes (1 to 3 GB) and what the allocator cannot use.

While a stage samples there are no gradients and no activations. Keys and values of one token: 2 (one key, one
value) x L x key heads x head size x 2 bytes.

Several GPUs (torchrun; --gpus prints that table): each of N holds an Nth of weights, gradients, moments and
second model. FSDP2 puts together what is at work:

    root            embeddings, head and last norm: 4 bytes a parameter, whole, and so is their gradient; the
                    second model's too, without a gradient
    layers          one at work and the next: 4 bytes a parameter each, and as much for the gradient of one
                    and what is sent of it

--sampler hf puts the whole model together while it samples: 4 bytes a parameter, beside the Nth of all else.
--sampler vllm holds it in bfloat16, 2 bytes a parameter, in main memory while the trainer works; while it
gets new weights, the largest one is whole in fp32. Main memory, while a model is loaded: 4 bytes a parameter
for each GPU.

A checkpoint on disk: 4 bytes of weight and 8 of AdamW's moments a parameter. A save writes the new one beside
the old one, so for a moment there are two.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from rollout import GPU_CHUNK, MAX_LOGITS  # noqa: E402

SHAPES = {  # Qwen3: hidden, intermediate, layers, heads, tied embeddings
    "0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True), "8B": (4096, 12288, 36, 32, False), "tiny": (64, 128, 2, 8, True),
}  # fmt: skip
GB = 1e9


def make_config(name):
    hidden, inner, layers, heads, tied = SHAPES[name]
    return Qwen3Config(vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, head_dim=128,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=tied)


def memory(config, tokens, second_model, chunk_logits=GPU_CHUNK * MAX_LOGITS):
    """{part: bytes} of a training step in micro-batches of so many tokens; the docstring's formulas."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    layer_parameters = sum(p.numel() for p in model.model.layers[0].parameters())
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    head = hidden * vocab
    chunk = min(tokens * vocab, max(chunk_logits, vocab)) * 4
    one_layer = tokens * (34 * hidden + 11 * inner + 10 * heads) + 2 * layer_parameters
    around_head = 24 * tokens * hidden
    at_head = around_head + max(6 * head, 2 * head + (6 if second_model else 3) * chunk)
    return {
        "parameters": parameters,
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "AdamW": 8 * parameters,
        "second model": 4 * parameters if second_model else 0,
        "layer inputs": 4 * tokens * hidden * config.num_hidden_layers,
        "one layer or head": max(one_layer, at_head),
    }


def total(parts):
    """Bytes of a training step at its peak."""
    return sum(size for name, size in parts.items() if name != "parameters")


def per_gpu(config, tokens, second_model, count):
    """Bytes on each of `count` GPUs: a training step at its peak; sampling with hf, cache not counted."""
    parts = memory(config, tokens, second_model)
    pieces = parts["weights"] + parts["gradients"] + parts["AdamW"] + parts["second model"]
    training = pieces / count + parts["layer inputs"] + parts["one layer or head"]
    resting = (pieces - parts["gradients"]) / count
    sampling = resting + parts["weights"]
    if count == 1:
        return training, resting
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    root = parts["parameters"] - layer * config.num_hidden_layers
    training += 4 * root * (3 if second_model else 2) + 4 * layer * 4
    return training, sampling


def print_several_gpus(tokens):
    print(f"GB on each GPU, computed; micro-batches of {tokens} tokens, --gradient-checkpointing "
        "--dtype bfloat16\n")
    print("| Qwen3 | GPUs | sft, rlvr: training | opsd: training | opsd: sampling, hf "
        "| main memory, all: loading | main memory, all: vLLM's weights |")
    print("|---" * 7 + "|")
    for name in ("1.7B", "4B", "8B"):
        config = make_config(name)
        weights = memory(config, tokens, False)["weights"]
        for count in (1, 2, 4, 8, 16):
            one, _ = per_gpu(config, tokens, False, count)
            two, sampling = per_gpu(config, tokens, True, count)
            print(f"| {name} | {count} | {one / GB:.0f} | {two / GB:.0f} | {sampling / GB:.0f} "
                f"| {count * weights / GB:.0f} | {count * weights / 2 / GB:.0f} |")


def cache_bytes(config):
    """Bytes of one token's keys and values in bfloat16, in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=9216,
        help="of a micro-batch, prompts and padding included")
    parser.add_argument("--gpus", action="store_true", help="memory of each of several GPUs")
    args = parser.parse_args()
    tokens = args.tokens
    if args.gpus:
        print_several_gpus(tokens)
        return
    print(f"GB, computed; micro-batches of {tokens} tokens, --gradient-checkpointing --dtype bfloat16\n")
    print("| Qwen3 | parameters | weights | gradients | AdamW | layer inputs | one layer or head (opsd) "
        "| sft, rlvr: in all | second model | opsd: in all | KV cache, 1,000 tokens | on disk |")
    print("|---" * 12 + "|")
    for name in SHAPES:
        if name == "tiny":
            continue
        config = make_config(name)
        one, two = memory(config, tokens, False), memory(config, tokens, True)
        gb = {part: f"{size / GB:.1f}" for part, size in one.items()}
        print(f"| {name} | {one['parameters'] / 1e9:.2f} B | {gb['weights']} | {gb['gradients']} "
            f"| {gb['AdamW']} | {gb['layer inputs']} "
            f"| {gb['one layer or head']} ({two['one layer or head'] / GB:.1f}) | {total(one) / GB:.0f} "
            f"| {two['second model'] / GB:.1f} | {total(two) / GB:.0f} "
            f"| {1000 * cache_bytes(config) / GB:.2f} | {12 * one['parameters'] / GB:.0f} |")


if __name__ == "__main__":
    main()
