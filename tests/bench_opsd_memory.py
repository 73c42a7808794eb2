"""How much memory does OPSD's loss take, forward and backward, at a real vocabulary? In chunks, and the plain way.

    python tests/bench_opsd_memory.py            # V = 151,936 (Qwen3's), 2,048 tokens: the plain way takes about 9 GB

The plain way makes the logits of all tokens, (T, V) for student and teacher, and differentiates through them. Each way
runs in a process of its own, which reports how far its peak rose above what it held before the loss, and writes loss
and gradient to a file, so that it can be seen that both computed the same.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import opsd  # noqa: E402


def get_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--divergence", default="reverse", choices=["reverse", "forward", "jsd", "split"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--way", choices=["chunked", "plain"], help=argparse.SUPPRESS)  # a child process: only this way
    parser.add_argument("--to", help=argparse.SUPPRESS)
    return parser.parse_args()


def peak(device):
    """The most memory this process has held so far, in bytes."""
    if device == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return torch.cuda.max_memory_allocated()


def measure(args):
    """One way, in this process."""
    torch.manual_seed(0)
    make_head = lambda: torch.nn.Linear(args.hidden, args.vocab, bias=False, device=args.device)  # noqa: E731
    student_head, teacher_head = make_head(), make_head().requires_grad_(False)
    student_hidden = torch.randn(args.tokens, args.hidden, device=args.device, requires_grad=True)
    teacher_hidden = torch.randn(args.tokens, args.hidden, device=args.device)
    is_correct = torch.arange(args.tokens, device=args.device) % 3 > 0
    baseline, start = peak(args.device), time.time()
    if args.way == "chunked":
        values = opsd.chunked_divergence(
            student_hidden, teacher_hidden, student_head, teacher_head, is_correct, args.divergence, 0.5
        )
    else:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden)
        values = opsd.divergence(student_head(student_hidden), teacher_logits, args.divergence, 0.5, is_correct)
    values.mean().backward()
    risen, seconds = peak(args.device) - baseline, time.time() - start
    result = {"risen": risen, "seconds": seconds, "loss": values.detach(), "hidden gradient": student_hidden.grad}
    torch.save(result | {"head gradient": student_head.weight.grad}, args.to)


def main():
    args = get_args()
    if args.way:
        return measure(args)
    print(f"V = {args.vocab:,}, {args.tokens:,} tokens, hidden size {args.hidden}, {args.divergence}, {args.device}; "
          f"one (T, V) tensor in fp32 is {4e-9 * args.vocab * args.tokens:.2f} GB")  # fmt: skip
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("chunked", "plain"):
            file = os.path.join(folder, way)
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way, "--to", file], check=True)
            results[way] = torch.load(file, map_location="cpu")
            print(f"{way:8} peak {results[way]['risen'] / 1e9:6.2f} GB above the start, {results[way]['seconds']:5.1f} s")
    ours, theirs = results["chunked"], results["plain"]
    print(f"memory: {ours['risen'] / theirs['risen']:.3f} of the plain way's; the gradient of the head, which both ways "
          f"hold, is {4e-9 * args.vocab * args.hidden:.2f} GB of it")  # fmt: skip
    for name in ("loss", "hidden gradient", "head gradient"):
        difference = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()
        print(f"{name}: greatest difference {difference:.1e} of its largest value")


if __name__ == "__main__":
    main()
