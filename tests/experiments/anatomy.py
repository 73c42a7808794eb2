"""What OPSD takes away, and where: KL by position, label and token, words lost, difficulty, checks, teachers.

    python tests/experiments/anatomy.py ckpt/sft ckpt/rlvr ckpt/opsd     # measures (minutes), prints tables
    python tests/experiments/anatomy.py                                  # prints the committed tables again

On held-out problems of the built-in world. The KL is that of opsd.py's first step: KL(student || teacher),
both with the weights of the second checkpoint, at the tokens of its own responses. Several seeds: their mean.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # eval.py and rollout.py are two folders up

from eval import DOUBT, box_contradicts, first_results, teacher_gap  # noqa: E402
from rollout import HFSampler, evaluate, load_model, load_problems  # noqa: E402


def mean(values):
    return sum(values) / len(values) if values else None


def measure(paths, count, n):
    """Folders of three checkpoints (SFT, before OPSD, after OPSD) -> the figures of all tables.

    count: held-out problems; n: responses to each.
    """
    problems = load_problems("arithmetic")[1][:count]
    (sft, sft_tokenizer), (before, tokenizer), (after, _) = [load_model(path) for path in paths]

    def sample(model, tokenizer, seed):
        sampler = HFSampler(model, tokenizer)
        return evaluate(sampler, problems, max_new_tokens=192, n=n, seed=seed)

    by_sft = sample(sft, sft_tokenizer, 1)  # another seed than the rest: it only sorts the problems
    by_before = sample(before, tokenizer, 0)
    by_after = sample(after, tokenizer, 0)
    return {
        **measure_kl(before, after, tokenizer, by_before),
        "difficulty": measure_difficulty(by_sft, by_before, by_after, n),
        "habits": {"before": measure_habits(by_before), "after": measure_habits(by_after)},
        "teachers": measure_teachers(HFSampler(before, tokenizer), problems, n),
    }


def measure_kl(before, after, tokenizer, rollouts):
    """The rollouts of the model `before` -> its KL to its teacher by label, tenth of the response and token,
    and how often each token is expected at the rollouts' positions: by this model, and by the one after."""
    by_label, by_tenth, by_token = defaultdict(list), defaultdict(list), defaultdict(list)
    uses_before = uses_after = 0.0  # (V,): probabilities, summed over all positions
    for rollout in rollouts:
        student, teacher = teacher_gap(before, tokenizer, rollout, True)  # log-probs, (|y|, V) each
        kl = (student.exp() * (student - teacher)).sum(-1).tolist()  # |y| numbers
        by_label[rollout.label] += kl
        for t, (value, token) in enumerate(zip(kl, rollout.response_ids)):
            by_tenth[10 * t // len(kl)].append(value)
            by_token[token].append(value)
        student_after, _ = teacher_gap(after, tokenizer, rollout, True)
        uses_before = uses_before + student.exp().sum(0)
        uses_after = uses_after + student_after.exp().sum(0)

    total = sum(sum(values) for values in by_token.values())
    kl_by_token, tokens_lost = {}, {}
    for token in range(len(uses_before)):
        if uses_before[token] <= 0.001 * len(rollouts):
            continue  # hardly ever used
        name = tokenizer.decode([token])
        if by_token[token]:
            kl_by_token[name] = {"share": sum(by_token[token]) / total, "mean": mean(by_token[token])}
        tokens_lost[name] = {"before": float(uses_before[token]) / len(rollouts),
            "after": float(uses_after[token]) / len(rollouts)}
    return {
        "kl_by_label": {label: mean(by_label[label]) for label in sorted(by_label)},
        "kl_by_tenth": [mean(by_tenth[tenth]) for tenth in range(10)],
        "kl_by_token": kl_by_token,
        "tokens_lost": tokens_lost,
    }


def measure_difficulty(by_sft, by_before, by_after, n):
    """Three lists of rollouts, n to a problem -> accuracy, length and doubt, before and after, of problems
    that SFT gets right always, in at least three quarters of its responses, in at least half, in fewer."""
    right = []  # of each problem: how many of SFT's n responses are correct
    for start in range(0, len(by_sft), n):
        right.append(sum(r.label == "correct" for r in by_sft[start : start + n]))
    bins = {"all": (n, n), "three quarters": (0.75 * n, n - 1), "half": (0.5 * n, 0.75 * n - 1),
        "fewer": (0, 0.5 * n - 1)}
    difficulty = {}
    for title, (low, high) in bins.items():
        chosen = [i for i, count in enumerate(right) if low <= count <= high]
        row = {"problems": len(chosen)}
        for when, rollouts in ("before", by_before), ("after", by_after):
            some = [r for i in chosen for r in rollouts[i * n : i * n + n]]
            row[f"accuracy_{when}"] = mean([r.label == "correct" for r in some])
            row[f"length_{when}"] = mean([len(r.response_ids) for r in some])
            row[f"doubt_{when}"] = mean([len(DOUBT.findall(r.text)) for r in some])
        difficulty[title] = row
    return difficulty


def measure_habits(rollouts):
    """How often a first result is a slip, and how often each kind of first result is checked."""
    steps = [step for r in rollouts for step in first_results(r.text, r.problem.problem)]
    return {
        "slips": mean([slip for slip, _ in steps]),
        "checked_after_a_slip": mean([fate != "neither" for slip, fate in steps if slip]),
        "checked_after_a_right_result": mean([fate != "neither" for slip, fate in steps if not slip]),
    }


def measure_teachers(sampler, problems, n):
    """What a model does that is shown nothing, or each context, when it responds itself: to the latter OPSD
    pulls its student."""
    found = {}
    for context in None, "solution", "answer", "concise":
        rollouts = evaluate(sampler, problems, max_new_tokens=192, n=n, context=context)
        found[context or "nothing"] = {
            "accuracy": mean([r.label == "correct" for r in rollouts]),
            "length": mean([len(r.response_ids) for r in rollouts]),
            "contradictions": mean([box_contradicts(r.text, r.problem.problem) for r in rollouts]),
        }
    return found


def merge(parts):
    """Means over seeds, key by key; a key that some seed lacks (a token that it hardly uses) is left out."""
    if isinstance(parts[0], dict):
        shared = [key for key in parts[0] if all(key in part for part in parts)]
        return {key: merge([part[key] for part in parts]) for key in shared}
    if isinstance(parts[0], list):
        return [merge(list(values)) for values in zip(*parts)]
    return mean([part for part in parts if part is not None])


def load(folder=HERE / "results"):
    """The committed figures of all seeds, averaged."""
    return merge([json.loads(path.read_text()) for path in sorted(folder.glob("anatomy*.json"))])


def show(value, digits=1):
    return "–" if value is None else f"{value:.{digits}f}"


def show_percent(share):
    return "–" if share is None else f"{100 * share:.1f}"


def show_change(before, after):
    return f"{100 * (after / before - 1):+.1f}" if before else "–"


def share_of_kl(item):
    token, row = item
    return row["share"]


def uses_lost(item):
    token, row = item
    return row["before"] - row["after"]


def ten_largest(rows, by):
    return sorted(rows.items(), key=by, reverse=True)[:10]


def tables(found):
    """The figures as Markdown."""
    labels = ", ".join(f"{label} {value:.3f}" for label, value in found["kl_by_label"].items())
    tenths = " ".join(f"{value:.3f}" for value in found["kl_by_tenth"])
    lines = [f"KL a token, by label: {labels};", f"by tenth of the response: {tenths}."]

    lines += ["", "| token | share of the KL, % | mean KL where it stands |", "|---|---|---|"]
    for token, row in ten_largest(found["kl_by_token"], share_of_kl):
        lines.append(f"| `{token!r}` | {100 * row['share']:.1f} | {row['mean']:.3f} |")

    lines += ["", "| token | expected uses, at the positions of the responses before | by the model after |",
        "|---|---|---|"]
    for token, row in ten_largest(found["tokens_lost"], uses_lost):
        lines.append(f"| `{token!r}` | {row['before']:.3f} | {row['after']:.3f} |")

    lines += ["", "| SFT right at least | problems | accuracy before, % | after | length before | after "
        "| change, % | doubt before | after |", "|---|---|---|---|---|---|---|---|---|"]
    for title, row in found["difficulty"].items():
        accuracies = f"{show_percent(row['accuracy_before'])} | {show_percent(row['accuracy_after'])}"
        lengths = f"{show(row['length_before'])} | {show(row['length_after'])}"
        change = show_change(row["length_before"], row["length_after"])
        doubts = f"{show(row['doubt_before'], 2)} | {show(row['doubt_after'], 2)}"
        lines.append(f"| {title} | {row['problems']:.0f} | {accuracies} | {lengths} | {change} | {doubts} |")

    lines += ["", "| | first results that are slips, % | checked after a slip, % "
        "| checked after a right result, % |", "|---|---|---|---|"]
    for when, row in found["habits"].items():
        cells = " | ".join(show_percent(share) for share in row.values())
        lines.append(f"| {when} | {cells} |")

    lines += ["", "| the teacher is shown | its own responses right, % | length, tokens | box against chain, % |",
        "|---|---|---|---|"]
    for context, row in found["teachers"].items():
        cells = f"{show_percent(row['accuracy'])} | {show(row['length'])} | {show_percent(row['contradictions'])}"
        lines.append(f"| {context} | {cells} |")
    return "\n".join(lines)


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
