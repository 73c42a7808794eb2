"""Writes problems with a large product: `Compute 47*8+31.`

    python tests/experiments/products.py ckpt/products.jsonl

20,000 problems A*B+C, with A and C in 12..99 and B in 3..12. Their solutions are `47*8=376. 376+31=407.`, with no
slip and no check. The built-in world multiplies by 2 to 4 only, and has no value above 99: a model that was trained
there has to learn these products by heart.
"""

import argparse
import json
import random
from pathlib import Path


def make_product(rng):
    """One row: problem, answer and solution."""
    a, b, c = rng.randint(12, 99), rng.randint(3, 12), rng.randint(12, 99)
    product, total = a * b, a * b + c
    return {"problem": f"Compute {a}*{b}+{c}.", "answer": str(total),
        "solution": f"{a}*{b}={product}. {product}+{c}={total}."}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    rng = random.Random(0)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    args.file.write_text("".join(json.dumps(make_product(rng)) + "\n" for _ in range(20_000)))


if __name__ == "__main__":
    main()
