"""The README's results from tests/experiments/results/seed*.json, which tests/experiments/run_seeds.sh writes.

    python tests/experiments/results.py                          # prints the tables, as Markdown
    python tests/experiments/results.py --readme --plot tests/experiments/results.svg    # into the README; draws the figure

A cell is the mean over seeds and half its 95 % interval: t * s / sqrt(n), Student's t with n - 1 degrees of
freedom, the seed being the unit. Changes are taken within a seed, against its own start.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "experiments" / "results"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

TABLES = {  # title -> arms, and what their changes are against
    "The pipeline, and which rollouts": ("rlvr", ["sft", "rlvr", "all", "only-correct", "only-incorrect"]),
    "Equal budgets": ("rlvr", ["all", "correct-matched", "incorrect-matched", "forward-correct-matched",
        "forward-incorrect-matched"]),
    "Divergences": ("rlvr", ["only-correct", "only-incorrect", "forward-correct", "forward-incorrect",
        "jsd-correct", "jsd-incorrect", "split-all"]),
    "Controls": ("rlvr", ["only-correct", "context-none", "context-concise", "context-answer",
        "context-wrong-answer", "context-sibling", "shortest-sft"]),
    "Teachers, 100 steps": ("rlvr", ["frozen-100", "refresh-50", "refresh-1", "ema"]),
    "OPSD in place of RLVR, and before it": ("sft", ["rlvr", "sft-opsd", "sft-opsd-rlvr", "only-correct"]),
    "Without thinking": ("short-rlvr", ["short-sft", "short-rlvr", "short-all", "short-correct",
        "short-incorrect"]),
}

CONTRASTS, ANATOMY = "Against each other, seed by seed", "What OPSD takes away, and where"
PAIRS = [("only-incorrect", "only-correct"), ("incorrect-matched", "correct-matched"),
    ("forward-incorrect", "forward-correct"), ("forward-incorrect-matched", "forward-correct-matched"), 
    ("jsd-incorrect", "jsd-correct"), ("short-incorrect", "short-correct"), ("only-correct", "all"),
    ("only-correct", "shortest-sft"), ("refresh-1", "frozen-100"), ("only-correct", "sft-opsd-rlvr")]


def collect(folder):
    """ckpt/seedN -> tests/experiments/results/seedN.json: of each arm what eval.py found, its path and its KL. Arms that
    are not in the folder stay as they were."""
    saved = RESULTS / f"{Path(folder).name}.json"
    arms = json.loads(saved.read_text()) if saved.is_file() else {}
    for path in sorted(Path(folder).glob("*/eval.json")):
        row = json.loads(path.read_text())["checkpoints"][0]
        keys = ["accuracy", "length", "think_length", "truncated", "doubt", "pass_at_k", "maj_at_k"]
        arm = {key: round(row[key], 5) for key in keys}
        log = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        arm["path"] = [[row["step"], round(row["eval/len_mean"], 2), round(row["eval/accuracy"], 4)]
            for row in log if "eval/accuracy" in row]
        steps = [row for row in log if "distill/kept_frac" in row]
        for name, part in ("first", steps[:1]), ("last_10", steps[-10:]):
            keys = sorted({key for row in part for key in row if key.startswith("distill/k")})
            values = {key.removeprefix("distill/"): [row[key] for row in part if key in row] for key in keys}
            arm |= {name: {key: round(sum(v) / len(v), 5) for key, v in values.items()}} if part else {}
        arms[path.parent.name] = arm
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(arms[name])}" for name in sorted(arms))
    saved.write_text(f"{{\n{rows}\n}}\n")
    if Path(folder, "anatomy.json").is_file():
        shutil.copy(Path(folder, "anatomy.json"), RESULTS / f"anatomy-{Path(folder).name}.json")


def load_runs(folder=RESULTS):
    """-> [{arm: row}], one dict a seed."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("seed*.json"))]


def mean_and_half_width(values):
    """Mean and half the 95 % interval (Student's t); one value has none."""
    n, mean = len(values), sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / max(1, n - 1)) ** 0.5
    return mean, T95.get(n, 1.96) * deviation / n**0.5 if n > 1 else float("nan")


def cell(values, sign="", digits=1):
    mean, half = mean_and_half_width(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def commands():
    """{arm: the command of tests/experiments/run_seeds.sh, as one would type it}."""
    text = (ROOT / "tests" / "experiments" / "run_seeds.sh").read_text().replace("\\\n", " ")
    made = {}
    for kind, name, flags in re.findall(r"^  (opsd|run) (\S+) ?(.*)$", text, re.MULTILINE):
        if kind == "run":
            stage, _, flags = flags.partition(" ")
        else:
            stage, flags = "opsd", f"--init ckpt/rlvr {flags}"
        flags = flags.replace("$from", "--init ckpt/short-rlvr --no-thinking")
        flags = flags.replace("$dump", "shortest.jsonl")
        flags = re.sub(r'"?ckpt/seed\$seed/([\w-]+)"?', r"ckpt/\1", flags).replace("--eval-every 10", "")
        out = "" if name == stage else f"--out ckpt/{name}"
        made[name] = " ".join(f"python {stage}.py {flags} {out}".replace('"', "").split())
    dump = "python eval.py ckpt/rlvr --train --problems 1280 --n 8 --shortest shortest.jsonl"
    made["shortest-sft"] = f"{dump} && {made['shortest-sft']}"
    return made


def table(runs, base, arms):
    """Markdown: each arm's accuracy, length, truncation and doubt, its changes, its command."""
    how = commands()
    lines = [f"| arm | accuracy, % | against {base}, points | length, tokens | against {base}, % "
        "| truncated, % | doubt | command |", "|---|---|---|---|---|---|---|---|"]
    for arm in arms:
        pairs = [(run[arm], run[base]) for run in runs if arm in run and base in run]
        if not pairs:
            continue
        accuracy = cell([100 * row["accuracy"] for row, _ in pairs])
        length = cell([row["length"] for row, _ in pairs])
        points = percent = ""
        if arm != base:
            points = cell([100 * (row["accuracy"] - start["accuracy"]) for row, start in pairs], "+")
            percent = cell([100 * (row["length"] / start["length"] - 1) for row, start in pairs], "+")
        cut = cell([100 * row["truncated"] for row, _ in pairs])
        doubt = sum(row["doubt"] for row, _ in pairs) / len(pairs)
        seeds = "" if len(pairs) == len(runs) else f" ({len(pairs)} of {len(runs)} seeds)"
        lines.append(f"| {arm}{seeds} | {accuracy} | {points} | {length} | {percent} | {cut} | {doubt:.2f} "
            f"| `{how[arm]}` |")
    return "\n".join(lines)


def contrasts(runs):
    """Markdown: one arm minus another of the same seed, from the same start: what both share cancels."""
    lines = ["| arm | minus | accuracy, points | length, % | seeds |", "|---|---|---|---|---|"]
    for arm, other in PAIRS:
        pairs = [(run[arm], run[other]) for run in runs if arm in run and other in run]
        if pairs:
            points = cell([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs], "+")
            percent = cell([100 * (a["length"] / b["length"] - 1) for a, b in pairs], "+")
            lines.append(f"| {arm} | {other} | {points} | {percent} | {len(pairs)} |")
    return "\n".join(lines)


def all_tables(runs):
    """{title: Markdown}"""
    import anatomy  # here, since it needs torch

    tables = {title: table(runs, base, arms) for title, (base, arms) in TABLES.items()}
    return tables | {CONTRASTS: contrasts(runs), ANATOMY: anatomy.tables(anatomy.load())}


def write_readme(runs):
    """Each table goes between its own marks, <!-- table: Controls --> and <!-- end -->."""
    path = ROOT / "README.md"
    text = path.read_text()
    for title, made in all_tables(runs).items():
        mark = f"<!-- table: {title} -->\n"
        assert mark in text, f"README.md has no {mark}"
        before, after = text.split(mark)
        text = f"{before}{mark}\n{made}\n\n{after[after.index('<!-- end -->') :]}"
    path.write_text(text)


def plot(runs, path):
    """Accuracy against length, mean over seeds, as training measured it: a path an arm over its steps."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "results"  # the same figure gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for arm in ["rlvr", "sft-opsd", "all", "only-correct", "only-incorrect", "correct-matched",
            "incorrect-matched", "forward-correct", "forward-incorrect", "forward-correct-matched",
            "forward-incorrect-matched"]:
        paths = [run[arm]["path"] for run in runs if arm in run]
        if not paths:
            continue
        points = [[sum(values) / len(values) for values in zip(*at)] for at in zip(*paths)]
        _, lengths, accuracies = zip(*points)
        style = "--" if "incorrect" in arm else "-"
        line = axes.plot(lengths, [100 * a for a in accuracies], style, marker=".", label=arm)[0]
        axes.plot(lengths[-1], 100 * accuracies[-1], "o", ms=8, color=line.get_color())
    axes.set(xlabel="response length (tokens)", ylabel="accuracy at T = 1 (%)",
        title="Mean over seeds, 128 held-out problems, every 10 steps (rlvr: 25); large: the end")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--readme", action="store_true", help="also write the tables into the README")
    parser.add_argument("--plot", help="also draw the figure: .svg or .png")
    parser.add_argument("--collect", metavar="FOLDER", help="ckpt/seedN: read its arms into tests/experiments/results")
    args = parser.parse_args()
    if args.collect:
        return collect(args.collect)
    runs = load_runs()
    for title, made in all_tables(runs).items():
        print(f"**{title}**\n\n{made}\n")
    if args.readme:
        write_readme(runs)
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
