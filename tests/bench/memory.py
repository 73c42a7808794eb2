"""How much GPU memory does a stage take? Computed from a model's shape: python tests/bench/memory.py

Per parameter: fp32 weight 4 bytes, gradient 4, AdamW's two moments 8; a frozen second model (opsd.py's
teacher, rlvr.py's reference with --kl-coef) 4 more. Activations with --gradient-checkpointing: a layer's fp32
input for each token of a micro-batch, and one layer's inside while it is computed again. Logits: four chunks
of rollout.MAX_LOGITS floats. Keys and values of a token in bfloat16. Allocator waste and CUDA itself (1 to 3
GB) are not counted.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from rollout import MAX_LOGITS  # noqa: E402

SHAPES = {  # Qwen3: hidden, intermediate, layers, heads, tied embeddings
    "0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True), "8B": (4096, 12288, 36, 32, False), "tiny": (64, 128, 2, 8, True),
}  # fmt: skip
GB = 1e9


def make_config(name):
    hidden, inner, layers, heads, tied = SHAPES[name]
    return Qwen3Config(vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, head_dim=128,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=tied)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192,
        help="of a micro-batch, prompts and padding included")
    tokens = parser.parse_args().tokens
    print(f"GB, computed; micro-batches of {tokens} tokens, --gradient-checkpointing --dtype bfloat16\n")
    print("| Qwen3 | parameters | sft, rlvr | opsd | of which activations and logits "
        "| KV cache, per 1,000 tokens |")
    print("|---|---|---|---|---|---|")
    for name, (hidden, inner, layers, heads, _) in SHAPES.items():
        if name == "tiny":
            continue
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Qwen3ForCausalLM(make_config(name)).parameters())
        inside = tokens * (6 * hidden + 4 * inner + 2 * (heads + 16) * 128) * 4
        working = tokens * hidden * layers * 4 + inside + 4 * MAX_LOGITS * 4
        cache = 1000 * 2 * layers * 8 * 128 * 2
        print(f"| {name} | {parameters / 1e9:.2f} B | {(16 * parameters + working) / GB:.0f} | "
            f"{(20 * parameters + working) / GB:.0f} | {working / GB:.1f} | {cache / GB:.2f} |")


if __name__ == "__main__":
    main()
