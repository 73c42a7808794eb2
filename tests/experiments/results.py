"""The tables and the figure of the experiments, from results/seed*.json, which run.py writes.

    python tests/experiments/results.py                 # prints the tables, as Markdown
    python tests/experiments/results.py --write         # writes them into the two pages, between their marks
    python tests/experiments/results.py --plot tests/experiments/results.svg        # draws the figure

The pages are tests/experiments/README.md, with all tables, and README.md, with two small ones.

A cell is the mean over seeds and half its 95 % interval: t * s / sqrt(n), Student's t with n - 1 degrees of
freedom, the seed being the unit. Changes are taken within a seed, against that seed's own start.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from statistics import fmean, stdev

import arms

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}

PARITY = ["parity-sft", "parity-rlvr", "parity-answer-correct", "parity-answer-incorrect",
    "parity-solution-correct", "parity-solution-incorrect"]
PRODUCTS = ["products-sft", "products-rlvr", *[f"{steps}-{shown}" for steps in ("products", "gentle")
    for shown in ("none-all", "answer-correct", "answer-incorrect", "solution-correct", "solution-incorrect")]]
CAREFUL = ["careful-sft", "careful-rlvr", *[f"careful-{context}-{kept}" for context in ("concise", "solution")
    for kept in arms.BOTH]]
TABLES = {  # title -> the arm that changes are against, and the arms
    "The pipeline, and which rollouts": ("rlvr", ["sft", "rlvr", "all", "only-correct", "only-incorrect"]),
    "Divergences, at equal budgets": ("rlvr", ["rlvr-solution-correct", "rlvr-solution-incorrect", "jsd-correct",
        "jsd-incorrect", "forward-correct", "forward-incorrect", "rlvr-solution-all", "split-all"]),
    "Controls": ("rlvr", ["rlvr-solution-correct", "rlvr-none-all", "rlvr-other-solution-correct",
        *[f"{name}-correct" for name in arms.CONTROLS], "shortest-sft"]),
    "Teachers, 100 steps": ("rlvr", ["frozen-100", "refresh-1", "ema"]),
    "OPSD in place of RLVR": ("sft", ["rlvr", "sft-opsd", "only-correct"]),
    "A world with two answers": ("parity-rlvr", PARITY),
    "Where else might incorrect rollouts do harm": ("rlvr-15", [f"{name}-{kept}" for name in arms.SEARCH
        for kept in arms.BOTH]),
}

HYPOTHESIS = {  # title -> the checkpoint that its arms start from
    "Thinking, from the end of RLVR": "rlvr",
    "Thinking, from RLVR stopped early": "rlvr-15",
    "No thinking, from the end of RLVR": "short-rlvr",
    "No thinking, from RLVR stopped early": "short-rlvr-15",
}
HINDSIGHT = "Incorrect minus correct, by context"
NOT_RUN = "**Not run yet in this world.**"

CONTRASTS, ANATOMY = "Against each other, seed by seed", "What OPSD takes away, and where"
KEPT, EACH_SEED = "Rollouts kept in a step, of 32", "Teachers, the accuracy of each seed"
PAIRS = [("only-incorrect", "only-correct"), ("rlvr-solution-incorrect", "rlvr-solution-correct"),
    ("rlvr-solution-correct", "rlvr-answer-correct"), ("forward-correct", "rlvr-solution-correct"),
    *[(f"{name}-incorrect", f"{name}-correct") for name in [*arms.DIVERGENCES, "parity-answer", "parity-solution",
        "products-answer", "products-solution", "gentle-answer", "gentle-solution", "careful-concise",
        "careful-solution", *arms.SEARCH]],
    *[(name, "rlvr-solution-correct") for name in TABLES["Controls"][1][1:]],
    *[(f"products-{name}", "products-none-all") for name in ("answer-correct", "solution-correct",
        "answer-incorrect", "solution-incorrect")],
    ("refresh-1", "frozen-100"), ("ema", "frozen-100"), ("only-correct", "sft-opsd")]

NEED = "Checks that are needed, and checks that are not"
BY_HEART, EACH_BY_HEART = "Products learned by heart", "Products learned by heart, the accuracy of each seed"
EACH_PARITY = "A world with two answers, each seed: accuracy (box against chain)"
STAGES, ROLLOUTS = "Three stages", "Which rollouts"  # the tables of the top-level README.md
CHAIN = [("sft", "sft", None), ("rlvr", "rlvr", "sft"), ("opsd", "only-correct", "rlvr")]
WHICH = [  # arm, start, what is asked for, what the teacher is shown, what a step trains on; reverse KL
    ("only-correct", "rlvr", "a number", "solution", "the correct of 32"),
    ("only-incorrect", "rlvr", "a number", "solution", "the incorrect of 32"),
    ("rlvr-solution-correct", "rlvr", "a number", "solution", "32 correct"),
    ("rlvr-solution-incorrect", "rlvr", "a number", "solution", "32 incorrect"),
    ("rlvr-answer-correct", "rlvr", "a number", "answer", "32 correct"),
    ("rlvr-answer-incorrect", "rlvr", "a number", "answer", "32 incorrect"),
    ("parity-solution-incorrect", "parity-rlvr", "even or odd", "solution", "16 incorrect"),
    ("parity-answer-correct", "parity-rlvr", "even or odd", "answer", "16 correct"),
    ("parity-answer-incorrect", "parity-rlvr", "even or odd", "answer", "16 incorrect"),
]

PANELS = {  # the figure: title -> the start, and the arms in the order of STYLES
    "asked for a number": ("rlvr", ["rlvr-solution-correct", "rlvr-solution-incorrect", "rlvr-answer-correct",
        "rlvr-answer-incorrect"]),
    "asked whether it is even": ("parity-rlvr", ["parity-solution-correct", "parity-solution-incorrect",
        "parity-answer-correct", "parity-answer-incorrect"]),
}
STYLES = [  # label, colour, line, marker; blue and orange differ to colour-blind eyes too (Okabe and Ito)
    ("correct rollouts, solution shown", "#0072B2", "-", "o"),
    ("incorrect rollouts, solution shown", "#D55E00", "-", "s"),
    ("correct rollouts, answer shown", "#56B4E9", "--", "o"),
    ("incorrect rollouts, answer shown", "#E69F00", "--", "s"),
]
LENGTHS, ACCURACIES = (36, 74), (55, 100)  # the limits of both panels


# ------------------------------------------------------------------------------------------------------------
# From a seed's checkpoints to one json


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def collect(folder):
    """ckpt/seedN -> results/seedN.json: of each arm what eval.py found, its path over the steps and its KL.
    Arms that are not in the folder stay as they were."""
    judged = sorted(Path(folder).glob("*/eval.json"))
    if not judged:
        fail(f"{folder} has no ARM/eval.json: start run.py first")
    saved = RESULTS / f"{Path(folder).name}.json"
    found = json.loads(saved.read_text()) if saved.is_file() else {}
    for path in judged:
        found[path.parent.name] = collect_arm(path.parent)
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found))
    saved.write_text(f"{{\n{rows}\n}}\n")
    anatomy = Path(folder, "anatomy.json")
    if anatomy.is_file():
        shutil.copy(anatomy, RESULTS / f"anatomy-{Path(folder).name}.json")


def collect_arm(folder):
    found = json.loads((folder / "eval.json").read_text())["checkpoints"][0]
    keys = ["accuracy", "length", "think_length", "truncated", "doubt", "pass_at_k", "maj_at_k"]
    arm = {key: round(found[key], 5) for key in keys} | {"slips": found.get("slips")}
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    arm["path"] = []
    for row in log:
        if "eval/accuracy" in row:
            arm["path"].append([row["step"], round(row["eval/len_mean"], 2), round(row["eval/accuracy"], 4)])
    steps = [row for row in log if "distill/kept_frac" in row]  # none, unless the stage is opsd.py
    if steps:
        arm["first"] = mean_of_distill(steps[:1])
        arm["last_10"] = mean_of_distill(steps[-10:])
    return arm


def mean_of_distill(rows):
    """Rows of metrics.jsonl -> {"kl": ..., "kept_frac": ...}: a metric's mean over the rows that have it."""
    means = {}
    for key in sorted({key for row in rows for key in row if key.startswith("distill/")}):
        values = [row[key] for row in rows if key in row]
        means[key.removeprefix("distill/")] = round(sum(values) / len(values), 5)
    return means


def load_runs(folder=RESULTS):
    """-> [{arm: row}], one dict a seed. An arm that a seed lacks is left out: every row has all seeds."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed*.json"))]
    if not runs:
        fail(f"{folder} has no seedN.json: start run.py first, or take results/ from the repository")
    in_all = set.intersection(*map(set, runs))
    return [{arm: row for arm, row in run.items() if arm in in_all} for run in runs]


# ------------------------------------------------------------------------------------------------------------
# Cells


def mean_and_half_width(values):
    """Mean and half the 95 % interval (Student's t); one value has none."""
    n = len(values)
    return fmean(values), T95.get(n, 1.96) * stdev(values) / n**0.5 if n > 1 else float("nan")


def cell(values, sign=""):
    """Mean ± half the interval; sign "+" writes the sign of a change."""
    mean, half = mean_and_half_width(values)
    return f"{mean:{sign}.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def range_cell(values, sign=""):
    """Mean, and the least and the greatest of the seeds."""
    mean = sum(values) / len(values)
    return f"{mean:{sign}.1f} ({min(values):{sign}.1f} to {max(values):{sign}.1f})"


def pairs_of(runs, arm, other):
    """-> [(row of arm, row of other)] of the seeds that have both."""
    return [(run[arm], run[other]) for run in runs if arm in run and other in run]


def points(pairs, key="accuracy"):
    """Changes of accuracy, or of pass_at_k, in points."""
    return [100 * (row[key] - start[key]) for row, start in pairs]


def percents(pairs):
    """Changes of length, in percent."""
    return [100 * (row["length"] / start["length"] - 1) for row, start in pairs]


def changes(pairs):
    """The two cells: accuracy in points, length in percent."""
    return [cell(points(pairs), "+"), cell(percents(pairs), "+")]


# ------------------------------------------------------------------------------------------------------------
# Tables


def how_to_make(names):
    """Markdown: a block with the command of each arm, in the order of the table."""
    made = arms.commands()
    lines = [made[name].replace(" && ", " && \\\n  ") for name in names]
    return "\n".join(["How to make each arm:", "", "```bash", *lines, "```"])


def how_to_make_contexts(start):
    """Markdown: a block with the commands of all contexts and filters from one start."""
    made = arms.commands()
    lines = [made[f"{start}-none-all"], f"for context in {' '.join(arms.CONTEXTS)}; do"]
    for kept in arms.FILTERS:
        command = made[f"{start}-{arms.CONTEXTS[0]}-{kept}"].replace(arms.CONTEXTS[0], "$context")
        lines.append(f"  {command}")
    return "\n".join(["How to make each arm:", "", "```bash", *lines, "done", "```"])


def markdown(titles, rows):
    """A Markdown table. titles: one string, `a | b`; rows: lists of cells. Without rows, what says so."""
    if not rows:
        return NOT_RUN
    return "\n".join([f"| {titles} |", "|---" * len(rows[0]) + "|", *(f"| {' | '.join(row)} |" for row in rows)])


def table(runs, base, names):
    """Markdown: each arm's accuracy, length, truncation and doubt, and its changes against `base`."""
    made = []
    for arm in names:
        if pairs := pairs_of(runs, arm, base):
            rows = [row for row, _ in pairs]
            accuracy_change, length_change = changes(pairs) if arm != base else ["", ""]
            made.append([arm, cell([100 * row["accuracy"] for row in rows]), accuracy_change,
                cell([row["length"] for row in rows]), length_change, cell([100 * row["truncated"] for row in rows]),
                f"{fmean(row['doubt'] for row in rows):.2f}", against_chain(rows)])
    return markdown(f"arm | accuracy, % | against {base}, points | length, tokens | against {base}, % | truncated, % "
        "| doubt | box against chain, %", made)


def with_pass_at_4(runs, base, names):
    """Markdown: each arm's accuracy and pass@4, and their changes against `base`."""
    made = []
    for arm in names:
        if pairs := pairs_of(runs, arm, base):
            cells = [arm]
            for key in ["accuracy", "pass_at_k"]:
                cells += [cell([100 * row[key] for row, _ in pairs]), cell(points(pairs, key), "+") * (arm != base)]
            made.append(cells)
    return markdown(f"arm | accuracy, % | against {base}, points | pass@4, % | against {base}, points", made)


def against_chain(rows):
    """Percent of responses whose answer is not what their own chain gives."""
    return cell([100 * row["slips"]["contradictions"] / row["slips"]["responses"] for row in rows])


def slip_cells(rows):
    """Of some seeds: how many percent of first results are slips; how many percent of the slips are checked."""
    slips = [row["slips"] for row in rows]
    checked = [100 * (s["mended"] + s["checked"]) / s["slips"] for s in slips if s["slips"]]
    return [cell([100 * s["slips"] / s["first_results"] for s in slips]), cell(checked) if checked else "–"]


def by_need(runs, base, names):
    """Markdown: accuracy and length, slips, and how often a slip and a right result are checked."""
    made = []
    for arm in names:
        if pairs := pairs_of(runs, arm, base):
            rows = [row for row, _ in pairs]
            found = [row["slips"] for row in rows]
            right = [100 * s["right_checked"] / (s["first_results"] - s["slips"]) for s in found]
            made.append([arm, cell([100 * row["accuracy"] for row in rows]),
                *(changes(pairs) if arm != base else ["", ""]), *slip_cells(rows), cell(right)])
    return markdown(f"arm | accuracy, % | against {base}, points | against {base}, length, % | slips, % "
        "| of them checked, % | of the right ones, %", made)


def by_context(runs, start):
    """Markdown: all contexts and filters from one start, at equal budgets. Entropy and forks are those of the
    student's correct rollouts in training; the start's are those of the first step."""
    made = []
    first = f"{start}-solution-correct"  # any arm would do: what its first step measured is the start
    for context in ["", "none", *arms.CONTEXTS]:
        for kept in arms.FILTERS:
            arm = f"{start}-{context}-{kept}" if context else start
            some = [run for run in runs if arm in run and first in run]
            if not some or (not context and kept != "all"):
                continue
            rows = [run[arm] for run in some]
            measured = [run[arm]["last_10"] if context else run[first]["first"] for run in some]
            pairs = pairs_of(some, arm, start)
            made.append([context or "the start", kept if context else "", cell([100 * row["accuracy"] for row in rows]),
                *(changes(pairs) if context else ["", ""]), *slip_cells(rows),
                f"{fmean(m['entropy_correct'] for m in measured):.3f}",
                f"{100 * fmean(m['forks_correct'] for m in measured):.1f}"])
    return markdown(f"context | rollouts | accuracy, % | against {start}, points | length, % | slips, % "
        "| of them checked, % | entropy, nats | forks, %", made)


def contrasts(runs, compared):
    """Markdown: one arm minus another of the same seed. What both share, such as their start, cancels."""
    found = [(arm, other, pairs_of(runs, arm, other)) for arm, other in compared]
    return markdown("arm | minus | accuracy, points | length, %",
        [[arm, other, *changes(pairs)] for arm, other, pairs in found if pairs])


def rollouts_kept(runs):
    """Markdown: how many rollouts each filter keeps of a step's 32, at first and at the end."""
    lines = ["| arm | first step | mean of the last 10 steps |", "|---|---|---|"]
    for arm in ["only-correct", "only-incorrect"]:
        rows = [run[arm] for run in runs if arm in run]
        if not rows:
            continue
        first = cell([32 * row["first"]["kept_frac"] for row in rows])
        last = cell([32 * row["last_10"]["kept_frac"] for row in rows])
        lines.append(f"| {arm} | {first} | {last} |")
    return "\n".join(lines)


def each_seed(runs, names, show):
    """Markdown: where some seeds collapse and others do not, a mean says little. show: a row -> its cell."""
    titles = " | ".join(f"seed {seed}, %" for seed in range(len(runs)))
    lines = [f"| arm | {titles} |", "|---" * (len(runs) + 1) + "|"]
    for arm in names:
        if all(arm in run for run in runs):
            lines.append(f"| {arm} | " + " | ".join(show(run[arm]) for run in runs) + " |")
    return "\n".join(lines)


def accuracy_cell(row):
    return f"{100 * row['accuracy']:.1f}"


def faithful_cell(row):
    return f"{accuracy_cell(row)} ({against_chain([row])})"


def three_stages(runs):
    """Markdown: each stage's mean with the range of the seeds, and its change against the stage before."""
    lines = ["| stage | accuracy, % | change, points | length, tokens | change, % |", "|---|---|---|---|---|"]
    for stage, arm, before in CHAIN:
        accuracy = range_cell([100 * run[arm]["accuracy"] for run in runs])
        length = range_cell([run[arm]["length"] for run in runs])
        accuracy_change = length_change = ""
        if before:
            pairs = pairs_of(runs, arm, before)
            accuracy_change, length_change = range_cell(points(pairs), "+"), range_cell(percents(pairs), "+")
        lines.append(f"| {stage} | {accuracy} | {accuracy_change} | {length} | {length_change} |")
    return "\n".join(lines)


def which_rollouts(runs):
    """Markdown: the main arms, each against the checkpoint that it starts from."""
    lines = ["| asked for | teacher is shown | a step trains on | accuracy, points | length, % |",
        "|---|---|---|---|---|"]
    for arm, start, *cells in WHICH:
        pairs = pairs_of(runs, arm, start)
        if pairs:
            lines.append("| " + " | ".join([*cells, *changes(pairs)]) + " |")
    return "\n".join(lines)


def page_tables(runs):
    """{title: Markdown} of tests/experiments/README.md."""
    import anatomy  # here, since it needs torch

    tables = {}
    for title, (base, names) in TABLES.items():
        tables[title] = f"{table(runs, base, names)}\n\n{how_to_make(names)}"
    for title, start in HYPOTHESIS.items():
        tables[title] = f"{by_context(runs, start)}\n\n{how_to_make_contexts(start)}"
    tables[HINDSIGHT] = contrasts(runs, [(f"{start}-{context}-incorrect", f"{start}-{context}-correct")
        for start in HYPOTHESIS.values() for context in arms.CONTEXTS])
    tables[CONTRASTS] = contrasts(runs, PAIRS)
    tables[KEPT] = rollouts_kept(runs)
    tables[EACH_SEED] = each_seed(runs, ["rlvr", *TABLES["Teachers, 100 steps"][1]], accuracy_cell)
    tables[NEED] = f"{by_need(runs, 'careful-rlvr', CAREFUL)}\n\n{how_to_make(CAREFUL)}"
    tables[BY_HEART] = f"{with_pass_at_4(runs, 'products-rlvr', PRODUCTS)}\n\n{how_to_make(PRODUCTS)}"
    tables[EACH_BY_HEART] = each_seed(runs, PRODUCTS, accuracy_cell)
    tables[EACH_PARITY] = each_seed(runs, PARITY, faithful_cell)
    tables[ANATOMY] = anatomy.tables(anatomy.load())
    return tables


def readme_tables(runs):
    """{title: Markdown} of the top-level README.md."""
    return {STAGES: three_stages(runs), ROLLOUTS: which_rollouts(runs)}


def write(path, tables):
    """Each table goes between its own marks, <!-- table: Controls --> and <!-- end -->."""
    text = path.read_text()
    for title, made in tables.items():
        mark = f"<!-- table: {title} -->\n"
        if mark not in text:
            name = path.relative_to(ROOT)
            print(f"{name} has no {mark.strip()}: that table is not written", file=sys.stderr)
            continue
        before, after = text.split(mark)
        text = f"{before}{mark}\n{made}\n\n{after[after.index('<!-- end -->') :]}"
    path.write_text(text)


# ------------------------------------------------------------------------------------------------------------
# The figure


def mean_path(runs, arm):
    """-> [(length, accuracy in %)], one for each evaluation during training, mean over the seeds."""
    means = []
    for at_step in zip(*[run[arm]["path"] for run in runs if arm in run]):
        _, lengths, accuracies = zip(*at_step)
        means.append((sum(lengths) / len(lengths), 100 * sum(accuracies) / len(accuracies)))
    return means


def plot(runs, path):
    """Accuracy against length, a path for each arm over its steps, in both worlds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "results"  # the same figure gives the same file
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8.3, 5), sharex=True, sharey=True, layout="constrained")
    for axes, (title, (start, names)) in zip(panels, PANELS.items()):
        axes.patch.set_gid(f"panel-{start}")  # these names let a test find what is drawn
        for arm, (label, colour, line, marker) in zip(names, STYLES):
            if not any(arm in run for run in runs):
                continue
            lengths, accuracies = zip(*mean_path(runs, arm))
            axes.plot(lengths, accuracies, line, color=colour, lw=2, label=label, gid=arm)
            axes.plot(lengths[1:-1], accuracies[1:-1], marker, color=colour, ms=3.5)
            axes.plot(lengths[-1], accuracies[-1], marker, color=colour, ms=9, mec="black", mew=0.8)
        axes.plot(*mean_path(runs, names[-1])[0], "*", color="black", ms=15, label="RLVR, where all start")
        axes.set(title=title, xlabel="response length (tokens)", xlim=LENGTHS, ylim=ACCURACIES)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy at T = 1 (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9,
        title="the large mark is the end of training", title_fontsize=9)
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the two pages")
    parser.add_argument("--plot", metavar="FILE", help="draw the figure: .svg or .png")
    parser.add_argument("--collect", metavar="FOLDER", help="ckpt/seedN: read it into results/seedN.json")
    args = parser.parse_args()
    if args.collect:
        return collect(args.collect)
    runs = load_runs()
    if args.write:
        write(HERE / "README.md", page_tables(runs))
        write(ROOT / "README.md", readme_tables(runs))
    if args.plot:
        plot(runs, args.plot)
    if not args.write and not args.plot:
        for title, made in (page_tables(runs) | readme_tables(runs)).items():
            print(f"**{title}**\n\n{made}\n")


if __name__ == "__main__":
    main()
