"""How long a verdict takes: python tests/bench/bench_verify.py

Over the pairs of tests/test_verify.py, each behind a paragraph of reasoning: the median and the 99th
percentile of the times of single calls, here and through verify_batch's worker. Where the package
math-verify is installed (pip install math-verify; nothing else needs it), it is timed on the same pairs in
the same run, turn by turn. What each gets right is printed too, but these pairs are our own tests.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # tests/, and the top

from test_verify import PAIRS  # noqa: E402

from verify import verify, verify_batch  # noqa: E402

try:
    import math_verify
except ImportError:
    math_verify = None


def other(response, gold):
    """Math-Verify as its README calls it: parse both, then verify(gold, answer)."""
    return math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(response))


PROSE = """The two conditions give $2a + 3b = 12$ and $a - b = 1$, so $a = 3$ and $b = 2$. We put this into
the expression and simplify. Checking the boundary cases shows that nothing else is possible.

The answer is """


def main():
    pairs = [(f"{PROSE} $\\boxed{{{a}}}$.", b, equal) for _, a, b, equal in PAIRS]
    checkers = {"verify": verify, "verify_batch": lambda response, gold: verify_batch([response], [gold])[0]}
    if math_verify:
        checkers["math-verify"] = other
    times = {name: [] for name in checkers}
    right = dict.fromkeys(checkers, 0)
    for checker in checkers.values():
        checker(*pairs[0][:2])  # imports, caches, the worker's start
    for response, gold, equal in pairs:
        for name, checker in checkers.items():
            start = time.perf_counter()
            right[name] += checker(response, gold) == equal
            times[name].append(time.perf_counter() - start)
    print(f"{len(pairs)} pairs               median       p99    right")
    for name, seconds in times.items():
        cut = statistics.quantiles(seconds, n=100)
        print(f"{name:20s} {statistics.median(seconds) * 1e3:9.2f} ms {cut[98] * 1e3:6.1f} ms   "
            f"{right[name] / len(pairs):.1%}")
    if math_verify:
        ratio = statistics.median(times["math-verify"]) / statistics.median(times["verify"])
        print(f"math-verify takes {ratio:.1f}x the time of verify, at the median")
    else:
        print("math-verify is not installed: no ratio")


if __name__ == "__main__":
    main()
