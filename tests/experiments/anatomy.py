"""What OPSD takes away, and where: KL by position, label and token, words lost, difficulty, checks.

    python tests/experiments/anatomy.py ckpt/sft ckpt/rlvr ckpt/opsd               # measures (a minute), prints tables
    python tests/experiments/anatomy.py                                            # prints those of tests/experiments/results again

On held-out problems of the built-in world. The KL is that of opsd.py's first step, KL(student || teacher), both
with the weights of the second checkpoint, at the tokens of its own responses. Of several seeds: their mean.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from eval import DOUBT, teacher_gap  # noqa: E402
from rollout import HFSampler, evaluate, load_model, load_problems  # noqa: E402

STEP = re.compile(r"(Wait, )?(\d+)([-+*])(\d+)=(\d+)")


def mean(values):
    return sum(values) / len(values) if values else None


def show(value, form=".1f", scale=100):
    return "–" if value is None else format(scale * value, form)


def checks(text):
    """A response -> a list of (was this first result a slip, was it checked), step by step."""
    steps = []
    for check, a, op, b, result in STEP.findall(text):
        if check:
            if steps:
                steps[-1][1] = True
        else:
            right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
            steps.append([int(result) != right, False])
    return steps


def measure(paths, count, n):
    """sft, before, after -> the figures of all tables."""
    problems = load_problems("arithmetic")[1][:count]
    models = [load_model(path) for path in paths]
    sampled = []  # of each checkpoint; the first with another luck than the rest: it only sorts the problems
    for k, (model, tokenizer) in enumerate(models):
        sampled.append(evaluate(
            HFSampler(model, tokenizer), problems, max_new_tokens=192, n=n, seed=int(k == 0)))
    (before, tokenizer), (after, _) = models[1:]

    by_label, by_position, by_token = defaultdict(list), defaultdict(list), defaultdict(list)
    p_before = p_after = 0.0
    for rollout in sampled[1]:
        student, teacher = teacher_gap(before, tokenizer, rollout, True)  # (|y|, V) each
        kl = (student.exp() * (student - teacher)).sum(-1).tolist()
        by_label[rollout.label] += kl
        for t, (value, i) in enumerate(zip(kl, rollout.response_ids)):
            by_position[10 * t // len(kl)].append(value)
            by_token[i].append(value)
        p_before = p_before + student.exp().sum(0)
        p_after = p_after + teacher_gap(after, tokenizer, rollout, True)[0].exp().sum(0)
    total = sum(map(sum, by_token.values()))
    name = lambda i: tokenizer.decode([int(i)])  # noqa: E731

    right = [sum(r.label == "correct" for r in sampled[0][i : i + n]) for i in range(0, len(sampled[0]), n)]
    bins = {"all": [n, n], "three quarters": [0.75 * n, n - 1], "half": [0.5 * n, 0.75 * n - 1],
        "fewer": [0, 0.5 * n - 1]}
    difficulty = {}
    for title, (low, high) in bins.items():
        chosen = [i for i, count in enumerate(right) if low <= count <= high]
        row = {"problems": len(chosen)}
        for when, rollouts in zip(("before", "after"), sampled[1:]):
            some = [r for i in chosen for r in rollouts[i * n : i * n + n]]
            row |= {f"accuracy_{when}": mean([r.label == "correct" for r in some]),
                f"length_{when}": mean([len(r.response_ids) for r in some]),
                f"doubt_{when}": mean([len(DOUBT.findall(r.text)) for r in some])}
        difficulty[title] = row
    habits = {}
    for when, rollouts in zip(("before", "after"), sampled[1:]):
        steps = [step for r in rollouts for step in checks(r.text)]
        habits[when] = {"slips": mean([slip for slip, _ in steps]),
            "checked_after_a_slip": mean([check for slip, check in steps if slip]),
            "checked_after_a_right_result": mean([check for slip, check in steps if not slip])}
    used = [i for i in range(len(p_before)) if p_before[i] > 0.001 * len(sampled[1])]
    return {
        "kl_by_label": {label: mean(by_label[label]) for label in sorted(by_label)},
        "kl_by_tenth": [mean(by_position[k]) for k in range(10)],
        "kl_by_token": {name(i): {"share": sum(by_token[i]) / total, "mean": mean(by_token[i])}
            for i in used if by_token[i]},
        "tokens_lost": {name(i): {"before": float(p_before[i]) / len(sampled[1]),
            "after": float(p_after[i]) / len(sampled[1])} for i in used},
        "difficulty": difficulty,
        "habits": habits,
    }


def top(rows, key, count=10):
    return sorted(rows.items(), key=lambda x: -key(x[1]))[:count]


def merge(parts):
    """Means over seeds, key by key; a key that some seed lacks (a token that it hardly uses) is left out."""
    if isinstance(parts[0], dict):
        return {key: merge([part[key] for part in parts]) for key in parts[0] if all(key in p for p in parts)}
    if isinstance(parts[0], list):
        return [merge(list(values)) for values in zip(*parts)]
    return mean([part for part in parts if part is not None])


def tables(found):
    """The figures as Markdown."""
    lines = ["KL a token, by label: " + ", ".join(f"{k} {v:.3f}" for k, v in found["kl_by_label"].items())
        + "; by tenth of the response: " + " ".join(f"{v:.3f}" for v in found["kl_by_tenth"]) + ".", ""]
    lines += ["| token | share of the KL, % | mean KL where it stands |", "|---|---|---|"]
    for token, row in top(found["kl_by_token"], lambda row: row["share"]):
        lines += [f"| `{token!r}` | {100 * row['share']:.1f} | {row['mean']:.3f} |"]
    lines += ["", "| token | expected uses, at the positions of the responses before | by the model after |",
        "|---|---|---|"]
    for token, row in top(found["tokens_lost"], lambda row: row["before"] - row["after"]):
        lines += [f"| `{token!r}` | {row['before']:.3f} | {row['after']:.3f} |"]
    lines += ["", "| SFT right at least | problems | accuracy before, % | after | length before | after "
        "| change, % | doubt before | after |", "|---|---|---|---|---|---|---|---|---|"]
    for title, row in found["difficulty"].items():
        a, b = row["length_before"], row["length_after"]
        cells = [show(row["accuracy_before"]), show(row["accuracy_after"]), show(a, scale=1), show(b, scale=1),
            show(b / a - 1 if a else None, "+.1f"), show(row["doubt_before"], ".2f", 1),
            show(row["doubt_after"], ".2f", 1)]
        lines += [f"| {title} | {row['problems']:.0f} | {' | '.join(cells)} |"]
    lines += ["", "| | first results that are slips, % | checked after a slip, % "
        "| checked after a right result, % |", "|---|---|---|---|"]
    for when, row in found["habits"].items():
        lines += [f"| {when} | " + " | ".join(show(row[key]) for key in row) + " |"]
    return "\n".join(lines)


def load(folder=ROOT / "tests" / "experiments" / "results"):
    """The committed figures of all seeds, averaged."""
    return merge([json.loads(path.read_text()) for path in sorted(folder.glob("anatomy*.json"))])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="*", help="three: after SFT, before OPSD, after OPSD")
    parser.add_argument("--problems", type=int, default=200, help="held-out problems")
    parser.add_argument("--n", type=int, default=8, help="responses to each")
    parser.add_argument("--json", help="write the figures")
    args = parser.parse_args()
    if args.checkpoints:
        if len(args.checkpoints) != 3:
            parser.error("three checkpoints are needed: after SFT, before OPSD, after OPSD")
        found = measure(args.checkpoints, args.problems, args.n)
        if args.json:
            Path(args.json).write_text(json.dumps(found) + "\n")
    else:
        found = load()
    print(tables(found))


if __name__ == "__main__":
    main()
