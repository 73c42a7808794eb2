"""What verify.py makes of real golds, rewritten and mutated: python tests/bench/fuzz_verify.py

    python tests/bench/fuzz_verify.py                          # golds of the tests' pairs
    python tests/bench/fuzz_verify.py --golds answers.jsonl    # one a line, under the key "answer"
    python tests/bench/fuzz_verify.py --solutions train.jsonl test.jsonl --against old/verify.py

1. Each gold as it is, written in the ways that models write it (REWRITES), and with one integer n in it as
   \\frac{2n}{2}: how many are accepted.
2. With --against, the verdicts that another version of verify.py decides the other way, on the same texts,
   on GSM8K's golds in their own solutions, and on the tests' pairs.
3. --mutations of the golds, one to three changed characters or pieces each: how many, and the slowest, in seconds of the CPU.
"""

import argparse
import importlib.util
import json
import random
import re
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # tests/, and the top

from test_verify import PAIRS  # noqa: E402

import verify  # noqa: E402

REWRITES = {
    "as it is": lambda gold: gold,
    "dfrac": lambda gold: gold.replace(r"\frac", r"\dfrac"),
    "tfrac": lambda gold: gold.replace(r"\frac", r"\tfrac"),
    "a/b": lambda gold: re.sub(r"^\\frac\{(\d+)\}\{(\d+)\}$", r"\1/\2", gold),
    "a decimal of halves, fourths, fifths": lambda gold: re.sub(r"^\\frac\{(\d+)\}\{([2458])\}$",
        lambda m: str(int(m[1]) / int(m[2])), gold),
    "\\left \\right": lambda gold: re.sub(r"(?<!\\left)(?<!\\right)([()\[\]])", lambda m: (
        r"\left" if m[1] in "([" else r"\right") + m[1], gold) if gold[0] in "([" else gold,
    "without \\left \\right": lambda gold: gold.replace(r"\left", "").replace(r"\right", ""),
    "a period": lambda gold: gold + ".",
    "spaces": lambda gold: re.sub(r"([,+=])", r" \1 ", gold),
    "no spaces": lambda gold: gold if "text" in gold or re.search(r"\\[a-z]+ [a-z]|\d \\frac", gold)
        else gold.replace(" ", ""),
    "math mode": lambda gold: f"${gold}$",
    "display mode": lambda gold: rf"\[{gold}\]",
    "\\displaystyle": lambda gold: rf"\displaystyle {gold}",
    "thin spaces": lambda gold: gold.replace(",", r",\,") if not re.search(r",\\!|\d,\d", gold) else gold,
    "\\text around a word": lambda gold: rf"\text{{{gold}}}" if gold.isalpha() and len(gold) > 1 else gold,
    "no \\text": lambda gold: re.sub(r"\\text\{(\w+)\}", r"\1", gold),
    "^{\\circ}": lambda gold: gold.replace(r"^\circ", r"^{\circ}"),
    "degree sign": lambda gold: gold.replace(r"^\circ", "°"),
    "the word degrees": lambda gold: gold.replace(r"^\circ", r" \text{ degrees}"),
    "no degrees": lambda gold: gold.replace(r"^\circ", ""),
    "thousands": lambda gold: f"{int(gold):,}" if gold.isdigit() else gold,
    "TeX thousands": lambda gold: f"{int(gold):,}".replace(",", "{,}") if gold.isdigit() else gold,
    "spaced thousands": lambda gold: f"{int(gold):,}".replace(",", r",\!") if gold.isdigit() else gold,
    "a unit": lambda gold: rf"{gold}\text{{ cm}}" if re.fullmatch(r"[\d.]+|\\frac\{\d+\}\{\d+\}", gold) else gold,
    "a square unit": lambda gold: rf"{gold} \text{{ cm}}^2" if re.fullmatch(r"[\d.]+|.*\\pi", gold) else gold,
    "a unit in words": lambda gold: rf"{gold} \text{{ square units}}" if re.fullmatch(r"[\d.]+", gold) else gold,
    "money": lambda gold: rf"\${gold}" if re.fullmatch(r"[\d.]+", gold) else gold,
    "dollars": lambda gold: f"{gold} dollars" if re.fullmatch(r"[\d.]+", gold) else gold,
    "x =": lambda gold: f"x = {gold}" if re.fullmatch(r"-?[\d.]+|\\frac\{\d+\}\{\d+\}|.*\\sqrt.*", gold)
        and "," not in gold and r"\pm" not in gold else gold,
    "\\cdot": lambda gold: re.sub(r"(\d) ?(\\sqrt|\\pi)", r"\1 \\cdot \2", gold),
    "plain text": lambda gold: re.sub(r"(\d) ?\\sqrt\{(\d+)\}", r"\1*sqrt(\2)", gold).replace(r"\pi", "pi")
        if not re.search(r"frac|pm|\\left", gold) else gold,
    "sqrt2": lambda gold: re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", gold),
    "\\sqrt{2}": lambda gold: re.sub(r"\\sqrt(\d)", r"\\sqrt{\1}", gold),
    "bmatrix": lambda gold: gold.replace("pmatrix", "bmatrix"),
    "terms the other way": lambda gold: re.sub(r"^([\da-z]+) ?\+ ?([\da-z]+)$", r"\2+\1", gold),
    "another order": lambda gold: ",".join(reversed(gold.split(",")))
        if re.fullmatch(r"-?\d+(, ?-?\d+)+", gold) and not re.search(r"\d,\d{3}", gold) else gold,
    "-\\frac inside": lambda gold: re.sub(r"^-\\frac\{", r"\\frac{-", gold),
    "zeros": lambda gold: gold + ".0" if re.fullmatch(r"-?\d+", gold) else gold,
    "(C) as C": lambda gold: re.sub(r"^\\text\{\((\w)\)\}$", r"\1", gold),
    "bold": lambda gold: rf"\mathbf{{{gold}}}" if gold.isdigit() else gold,
    "x in": lambda gold: rf"x \in {gold}" if re.fullmatch(r"[\[(](?=.*infty|.*\]$).*[\])]", gold) else gold,
}
FRACTION = re.compile(r"(?<![\d.,_a-z!}])\d+(?![\d.,]|\s*\\frac|\\!)")


def rewritten(gold):
    """-> [(name of the rewrite, text)], each that changes something; the gold first"""
    texts = {}
    for name, rewrite in REWRITES.items():
        texts.setdefault(rewrite(gold), name)
    return [(name, text) for text, name in texts.items()]


def with_fraction(gold, rng):
    """One integer n of the gold as \\frac{2n}{2}; None if it has none that stands for itself"""
    places = [m for m in FRACTION.finditer(gold) if gold[: m.start()].rstrip()[-5:] not in (r"\sqrt",
        r"\frac") or gold[m.start() - 1] == "{"]
    if not places:
        return None
    place = rng.choice(places)
    return gold[: place.start()] + r"\frac{%d}{2}" % (2 * int(place[0])) + gold[place.end() :]


PIECES = [*"0123456789xyn+-*/^_=<>(){}[],.!%|&$ ", r"\frac", r"\sqrt", r"\pi", r"\cup", r"\pm", "^{", "_{",
    r"\sin", r"\ln", "e^", r"\infty", r"\text{", "cm", "^9", "^{x", r"\\", r"\cdot", " or ", r"\in", "9" * 30]


def mutated(gold, rng):
    """One to three of: a character dropped, doubled, exchanged for another, a piece put in, a part repeated"""
    text = list(gold)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            text[at : at + 1] = []
        elif kind == 1:
            text[at:at] = [rng.choice(PIECES)]
        elif kind == 2:
            text[at : at + 1] = [rng.choice(PIECES)]
        else:
            start = rng.randrange(at + 1)
            text[at:at] = text[start:at] * rng.choice((1, 1, 3))
    return "".join(text)


def load(path):
    spec = importlib.util.spec_from_file_location("other_verify", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(pairs, other):
    """pairs: (kind, response, gold). Prints the verdicts that the other version has and we have not."""
    lost = [pair for pair in pairs if other.verify(*pair[1:]) and not verify.verify(*pair[1:])]
    gained = [pair for pair in pairs if verify.verify(*pair[1:]) and not other.verify(*pair[1:])]
    accepted = sum(other.verify(*pair[1:]) for pair in pairs)
    print(f"  of {len(pairs)} the other accepts {accepted}; lost {len(lost)}, gained {len(gained)}")
    for word, some in ("lost", lost), ("gained", gained):
        for kind, response, gold in some[:40]:
            print(f"    {word}: {response[-90:]}  for  {gold}   ({kind})")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golds", help="json lines with a key answer; without it, the tests' golds")
    parser.add_argument("--solutions", nargs="*", default=[], help="GSM8K's files, for solutions that end in a gold")
    parser.add_argument("--against", help="another verify.py")
    parser.add_argument("--mutations", type=int, default=100_000)
    args = parser.parse_args()
    golds = [b for _, _, b, equal in PAIRS if equal]
    if args.golds:
        golds = [json.loads(line)["answer"] for line in Path(args.golds).read_text().splitlines()]
    rng = random.Random(0)
    written = [(name, f"\\boxed{{{text}}}", gold) for gold in golds for name, text in rewritten(gold)]
    fractions = [(text, gold) for gold in golds if (text := with_fraction(gold, rng))]
    fractions = [("fraction", f"\\boxed{{{text}}}", gold) for text, gold in fractions]
    for name, pairs in ("as models write them", written), (r"with \frac{2n}{2}", fractions):
        equal = [verify.verify(*pair[1:]) for pair in pairs]
        print(f"{len(golds)} golds {name}: {sum(equal)} of {len(pairs)} accepted ({sum(equal) / len(pairs):.2%})")
        for (kind, response, gold), right in zip(pairs, equal):
            if not right:
                print(f"    refused: {response}  for  {gold}   ({kind})")
    solved = []
    for path in args.solutions:
        answers = [json.loads(line)["answer"] for line in Path(path).read_text().splitlines()]
        solved += [("GSM8K", answer, answer.rpartition("#### ")[2]) for answer in answers]
    if solved:
        print(f"GSM8K: {sum(verify.verify(*pair[1:]) for pair in solved)} of {len(solved)} accepted")
    if args.against:
        other = load(args.against)
        tests = [(kind, f"\\boxed{{{a}}}", b) for kind, a, b, _ in PAIRS]
        for name, pairs in ("rewritten", written), ("fractions", fractions), ("GSM8K", solved), ("tests", tests):
            print(f"{name}, against {args.against}")
            differences(pairs, other)
    seconds, accepted = [], 0
    slowest = (0, "")
    for _ in range(args.mutations):
        gold = rng.choice(golds)
        text = f"\\boxed{{{mutated(gold, rng)}}}"
        start = time.thread_time()
        accepted += verify.verify(text, gold)
        seconds.append(time.thread_time() - start)  # other work may share the machine
        slowest = max(slowest, (seconds[-1], text))
    if seconds:
        cut = statistics.quantiles(seconds, n=1000)
        print(f"{len(seconds)} mutations: slowest {slowest[0] * 1e3:.1f} ms, median {cut[499] * 1e3:.2f} ms, "
            f"99.9th percentile {cut[998] * 1e3:.1f} ms; {accepted} are accepted; the slowest: {slowest[1]}")


if __name__ == "__main__":
    main()
