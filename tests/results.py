"""The README's results table and figure from .github/results/seed*.json, which tests/run_seeds.sh writes.

    python tests/results.py                     # prints the table, as Markdown
    python tests/results.py --plot .github/results.svg

Means over seeds; the 95 % interval is Student's t over seeds, so it holds both sources of noise: training and evaluation.
"""

import argparse
import json
import math
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / ".github" / "results"
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def load_runs(folder=RESULTS):
    """-> {arm: [row of each seed]}, arms in the order in which they were evaluated."""
    runs = {}
    for path in sorted(folder.glob("seed*.json")):
        for row in json.loads(path.read_text())["checkpoints"]:
            runs.setdefault(Path(row["checkpoint"]).name, []).append(row)
    return runs


def mean_and_interval(values):
    """Mean and the half-width of its 95 % interval over seeds (nan for one seed)."""
    n, mean = len(values), sum(values) / len(values)
    if n == 1:
        return mean, math.nan
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, STUDENT_T[n] * sd / math.sqrt(n)


def table(runs):
    """Markdown: accuracy, length, and length against RLVR, with intervals over seeds."""
    lines = ["| arm | accuracy, % | length, tokens | length against RLVR | truncated, % | checks | seeds: accuracy |"]
    lines.append("|---|---|---|---|---|---|---|")
    for arm, rows in runs.items():
        accuracy, a = mean_and_interval([100 * row["accuracy"] for row in rows])
        length, b = mean_and_interval([row["length"] for row in rows])
        ratios = [100 * (row["length"] / base["length"] - 1) for row, base in zip(rows, runs["rlvr"])]
        change, c = mean_and_interval(ratios)
        truncated, doubt = (sum(row[key] for row in rows) / len(rows) for key in ("truncated", "doubt"))
        seeds = ", ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
        against = "" if arm in ("sft", "rlvr") else f"{change:+.0f} ± {c:.0f} %"
        lines.append(
            f"| {arm} | {accuracy:.1f} ± {a:.1f} | {length:.1f} ± {b:.1f} | {against} | {100 * truncated:.1f} "
            f"| {doubt:.2f} | {seeds} |"
        )
    return "\n".join(lines)


def plot(runs, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for arm, rows in runs.items():
        lengths, accuracies = [row["length"] for row in rows], [100 * row["accuracy"] for row in rows]
        (x, dx), (y, dy) = mean_and_interval(lengths), mean_and_interval(accuracies)
        bars = axes.errorbar(x, y, xerr=dx, yerr=dy, fmt="o", capsize=3, label=arm)
        axes.scatter(lengths, accuracies, s=10, alpha=0.5, color=bars[0].get_color())
    axes.set(xlabel="response length (tokens)", ylabel="accuracy at T = 1 (%)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", help="also draw the figure: .svg or .png")
    args = parser.parse_args()
    runs = load_runs()
    print(table(runs))
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
