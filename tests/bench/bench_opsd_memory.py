"""How much memory does OPSD's loss take, forward and backward, in chunks and the plain way?

    python tests/bench/bench_opsd_memory.py                              # Qwen3-0.6B's head: 11 GB
    python tests/bench/bench_opsd_memory.py --hidden 4096 --tokens 512   # Qwen3-8B's: 11 GB

At a real vocabulary, Qwen3's 151,936. The plain way makes the logits of all tokens, (T, V) for
student and teacher, and differentiates through them. Each way runs in a process of its own, which
reports how far its peak rose above what it held before the loss: weights, and the head's gradient
of an earlier micro-batch. It writes loss and gradients to a file, so that it can be seen that both
computed the same.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import opsd  # noqa: E402


def get_args():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--vocab", type=int, default=151_936)
    add("--tokens", type=int, default=2048)
    add("--hidden", type=int, default=1024)
    add("--divergence", default="reverse", choices=["reverse", "forward", "jsd", "split"])
    add("--device", default=device)
    add("--way", choices=["chunked", "plain"], help=argparse.SUPPRESS)  # in a child process
    add("--to", help=argparse.SUPPRESS)
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
    student_head = torch.nn.Linear(args.hidden, args.vocab, bias=False, device=args.device)
    teacher_head = torch.nn.Linear(args.hidden, args.vocab, bias=False, device=args.device)
    teacher_head.requires_grad_(False)
    # Filled, since a system gives memory that is only reserved at its first use.
    student_head.weight.grad = torch.empty_like(student_head.weight).fill_(0)
    student_hidden = torch.randn(args.tokens, args.hidden, device=args.device, requires_grad=True)
    teacher_hidden = torch.randn(args.tokens, args.hidden, device=args.device)
    is_correct = torch.arange(args.tokens, device=args.device) % 3 > 0
    ids = torch.arange(args.tokens, device=args.device) % args.vocab
    baseline, start = peak(args.device), time.time()
    if args.way == "chunked":
        values, _, _ = opsd.chunked_values(student_hidden, teacher_hidden, student_head,
            teacher_head, ids, is_correct, args.divergence, beta=0.5)
    else:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_hidden)
        values = opsd.divergence(student_head(student_hidden), teacher_logits, args.divergence,
            beta=0.5, is_correct=is_correct)
    values.mean().backward()
    gradients = {"hidden gradient": student_hidden.grad, "head gradient": student_head.weight.grad}
    figures = {"risen": peak(args.device) - baseline, "seconds": time.time() - start}
    torch.save({"loss": values.detach()} | gradients | figures, args.to)


def gigabytes(rows, columns):
    """The size of an fp32 tensor."""
    return f"{4 * rows * columns / 1e9:.2f} GB"


def main():
    args = get_args()
    if args.way:
        return measure(args)
    print(f"V = {args.vocab:,}, T = {args.tokens:,}, H = {args.hidden}, {args.divergence}, "
        f"{args.device}; logits (T, V): {gigabytes(args.tokens, args.vocab)}; the head (V, H): "
        f"{gigabytes(args.vocab, args.hidden)}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("chunked", "plain"):
            file = Path(folder, way)
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--to", file]
            subprocess.run(command, check=True)
            results[way] = torch.load(file, map_location="cpu")
            print(f"{way:8} peak {results[way]['risen'] / 1e9:5.2f} GB above the start, "
                f"{results[way]['seconds']:5.1f} s", flush=True)
    ours, theirs = results["chunked"], results["plain"]
    print(f"memory: {ours['risen'] / theirs['risen']:.3f} of the plain way's")
    for name in ("loss", "hidden gradient", "head gradient"):
        difference = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()
        print(f"{name}: greatest difference {difference:.1e} of its greatest value")


if __name__ == "__main__":
    main()
