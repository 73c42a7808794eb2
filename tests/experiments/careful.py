"""sft.py, with a writer who slips and checks mostly where a step is hard: at a multiplication.

    python tests/experiments/careful.py --init ckpt/sft --steps 500 --lr 1e-3 --out ckpt/careful-sft

The built-in writer checks any result alike, so a check says nothing of whether it was needed. Here a first check
after `*` finds a slip in 30 % of cases, one after `+` or `-` in 3 %. The flags are sft.py's; all else is as there.
"""

import re
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the stages are two folders up

import sft  # noqa: E402
from rollout import APPLY, answer_of  # noqa: E402

SLIP = {"*": 0.3, "+": 0.03, "-": 0.03}  # P(first result wrong)
CHECK = {"*": 0.8, "+": 0.3, "-": 0.3}  # P(check), then again and again; of who is told nothing


def demonstrate(problem, rng, context=None, think=True):
    """In place of sft.demonstrate_arithmetic, with its arguments: the chain worked aloud. Returns response text."""
    knows = context in ("solution", "rollout")
    thinking, value = [], None
    for first, op, b in re.findall(r"(\d+)([-+*])(\d+)=", problem.solution):
        value = int(first) if value is None else value
        right = written = APPLY[op](value, int(b))
        if not knows and rng.random() < SLIP[op]:
            written = max(0, right + rng.choice([-10, -2, -1, 1, 2, 10]))
        thinking.append(f"{value}{op}{b}={written}.")
        while think and rng.random() < (sft.TOLD_CHECK if context else CHECK[op]):
            thinking.append(f"Wait, {value}{op}{b}={right} {'ok' if written == right else 'no'}.")
            written = right
        value = written
    boxed = problem.answer if context == "answer" else answer_of(problem.problem, value)
    return sft.render_response(" ".join(thinking), boxed, think)


def main():
    with mock.patch.object(sft, "demonstrate_arithmetic", demonstrate):
        sft.main()


if __name__ == "__main__":
    main()
