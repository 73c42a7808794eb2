"""The README's results table and figure from .github/results/seed*.json, which tests/run_seeds.sh writes.

    python tests/results.py                     # prints the table, as Markdown
    python tests/results.py --plot .github/results.svg

A cell is the mean over seeds and, in brackets, the lowest and the highest seed: with three seeds a
range says more than an interval. Changes are against the same seed's RLVR checkpoint.
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / ".github" / "results"


def load_runs(folder=RESULTS):
    """-> {arm: [row of each seed]}, arms in the order in which they were evaluated."""
    runs = {}
    for path in sorted(folder.glob("seed*.json")):
        for row in json.loads(path.read_text())["checkpoints"]:
            runs.setdefault(Path(row["checkpoint"]).name, []).append(row)
    return runs


def cell(values, sign=""):
    """Mean (lowest to highest), one digit after the point."""
    return f"{sum(values) / len(values):{sign}.1f} ({min(values):{sign}.1f} to {max(values):{sign}.1f})"


def table(runs):
    """Markdown: accuracy and length of each arm, and their changes against RLVR."""
    lines = ["| arm | accuracy, % | against RLVR, points | length, tokens | against RLVR, % | checks |",
        "|---|---|---|---|---|---|"]
    for arm, rows in runs.items():
        pairs = list(zip(rows, runs["rlvr"]))
        points = [100 * (row["accuracy"] - base["accuracy"]) for row, base in pairs]
        percent = [100 * (row["length"] / base["length"] - 1) for row, base in pairs]
        changes = ["", ""] if arm == "rlvr" else [cell(points, "+"), cell(percent, "+")]
        accuracy, length = cell([100 * row["accuracy"] for row in rows]), cell([r["length"] for r in rows])
        checks = sum(row["doubt"] for row in rows) / len(rows)
        lines.append(f"| {arm} | {accuracy} | {changes[0]} | {length} | {changes[1]} | {checks:.2f} |")
    return "\n".join(lines)


def plot(runs, path):
    """Accuracy against length: a small point a seed, a large one their mean."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "results"  # the same figure gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for arm, rows in runs.items():
        lengths, accuracies = [row["length"] for row in rows], [100 * row["accuracy"] for row in rows]
        mean = sum(lengths) / len(rows), sum(accuracies) / len(rows)
        large = axes.scatter(*mean, s=70, label=arm)
        axes.scatter(lengths, accuracies, s=12, alpha=0.6, color=large.get_facecolor())
    axes.set(xlabel="response length (tokens)", ylabel="accuracy at T = 1 (%)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


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
