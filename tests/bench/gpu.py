"""What gpu.sh saw, from its folder to one json, and from that to the pages' tables.

    python tests/bench/gpu.py --collect ckpt/gpu    # -> tests/bench/gpu.json; gpu.sh does it
    python tests/bench/gpu.py                       # prints the tables, as Markdown
    python tests/bench/gpu.py --write               # writes them into the two pages, between their marks

The pages are tests/bench/README.md and, for the pretrained model, tests/experiments/README.md.
"""

import argparse
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests" / "experiments")]

from results import write  # noqa: E402

JSON = HERE / "gpu.json"
NOT_RUN = "**Not run on a GPU yet.**"
STAGES = ("sft", "rlvr", "opsd")
RUN, SPEED, CHAIN = "GPU: the run", "GPU: speed and memory", "GPU: the tiny chain"
SMOLLM2, TRAINING = "SmolLM2 on GSM8K", "SmolLM2 on GSM8K, in training"


# ------------------------------------------------------------------------------------------------------------
# From gpu.sh's folder to one json


def read(path):
    return json.loads(path.read_text()) if path.is_file() else None


def mean(rows, key):
    """Of the rows that have it; None if none has."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else None


def collect_run(folder):
    """A training's metrics.jsonl -> its figures; None before its first step."""
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    steps = [row for row in rows if "time/train" in row]
    if not steps:
        return None
    return {
        "steps": steps[-1]["step"],
        "seconds": sum(row["time/train"] + row.get("time/rollout", 0) for row in steps),
        "tokens_per_second": mean(steps, "perf/tok_s"),
        "reward_first_5": mean(steps[:5], "reward/mean"),
        "reward_last_5": mean(steps[-5:], "reward/mean"),
        "groups_without_signal": mean(steps, "reward/frac_zero_std"),
        "kl_first_5": mean(steps[:5], "distill/kl"),
        "kl_last_5": mean(steps[-5:], "distill/kl"),
        "kept": mean(steps, "distill/kept_frac"),
        "kl_sample_train": mean(steps, "kl/sample_train"),
    }


def collect(folder):
    """gpu.sh's folder -> all that the tables need; None stands for what was not run."""
    import torch
    import transformers

    on_gpu = torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu"
    log = folder / "tests.log"
    lines = log.read_text().strip().splitlines() if log.is_file() else []
    seen = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "tests": lines[-1].strip("= ") if lines else None,
        "speed": [read(path) for path in sorted(folder.glob("speed-*.json"))],
    }
    for name in ("chain", "smollm2"):
        judged = read(folder / f"{name}-eval.json")
        seen[name] = {stage: collect_run(folder / f"{name}-{stage}") for stage in STAGES}
        seen[name]["checkpoints"] = judged["checkpoints"] if judged else None
    return seen


# ------------------------------------------------------------------------------------------------------------
# From the json to tables


def shown(value, form):
    return "" if value is None else format(value, form)


def run_table(seen):
    lines = ["| | |", "|---|---|", f"| device | {seen['device']} |", f"| versions | {seen['versions']} |",
        f"| tests marked `gpu` | {seen['tests'] or 'not run'} |"]  # fmt: skip
    return "\n".join(lines)


def speed_table(seen):
    lines = ["| Qwen3 | sampling, tokens/s | MFU | training, tokens/s | MFU | training, peak GB "
        "| computed, GB |", "|---" * 7 + "|"]
    for row in seen["speed"]:
        peak = row["training_peak_bytes"]
        cells = [row["size"], f"{row['sampling_tokens_per_second']:,.0f}", f"{row['sampling_mfu']:.1%}",
            f"{row['training_tokens_per_second']:,.0f}", f"{row['training_mfu']:.1%}",
            shown(peak and peak / 1e9, ".1f"), f"{row['training_computed_bytes'] / 1e9:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def judged_table(checkpoints):
    """What eval.py found: accuracy in %, length in tokens, changes against the row above."""
    if not checkpoints:
        return "Not judged yet."
    lines = ["| checkpoint | accuracy, % | change, points (95 %) | length | change, % (95 %) | truncated, % "
        "| pass@k, % |", "|---" * 7 + "|"]
    for row in checkpoints:
        accuracy, error = 100 * row["accuracy"], 100 * row["accuracy_se"]
        lines.append(f"| {Path(row['checkpoint']).name} | {accuracy:.1f} ± {error:.1f} "
            f"| {change(row, 'accuracy_change')} | {row['length']:.1f} | {change(row, 'length_change')} "
            f"| {100 * row['truncated']:.1f} | {100 * row['pass_at_k']:.1f} (k = {row['k']}) |")
    return "\n".join(lines)


def change(row, name):
    """A change in points or %, with its interval; "" in the first row, which has none."""
    if name not in row:
        return ""
    low, high = (100 * bound for bound in row[f"{name}_ci95"])
    return f"{100 * row[name]:+.1f} ({low:+.1f} to {high:+.1f})"


def training_table(runs):
    """How fast each stage was, and its own measure at both ends."""
    if not any(runs[stage] for stage in STAGES):
        return "Not trained yet."
    lines = ["| stage | steps | minutes | tokens/s | reward, first 5 steps | last 5 "
        "| groups without signal, % | KL, first 5 steps | last 5 | kept, % | kl/sample_train |", "|---" * 11 + "|"]
    for stage in STAGES:
        run = runs[stage]
        if run is None:
            continue
        uniform, kept = (run[key] and 100 * run[key] for key in ("groups_without_signal", "kept"))
        cells = [stage, run["steps"], f"{run['seconds'] / 60:.1f}", shown(run["tokens_per_second"], ",.0f"),
            shown(run["reward_first_5"], ".3f"), shown(run["reward_last_5"], ".3f"), shown(uniform, ".0f"),
            shown(run["kl_first_5"], ".4f"), shown(run["kl_last_5"], ".4f"), shown(kept, ".0f"),
            shown(run["kl_sample_train"], ".1e")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def bench_tables(seen):
    """{title: Markdown} of tests/bench/README.md."""
    if seen is None:
        return dict.fromkeys([RUN, SPEED, CHAIN], NOT_RUN)
    chain = f"{judged_table(seen['chain']['checkpoints'])}\n\n{training_table(seen['chain'])}"
    return {RUN: run_table(seen), SPEED: speed_table(seen), CHAIN: chain}


def experiment_tables(seen):
    """{title: Markdown} of tests/experiments/README.md."""
    smollm2 = seen["smollm2"] if seen else {}
    if not any(smollm2.values()):
        return dict.fromkeys([SMOLLM2, TRAINING], NOT_RUN)
    return {SMOLLM2: judged_table(smollm2["checkpoints"]), TRAINING: training_table(smollm2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collect", metavar="FOLDER", type=Path, help="gpu.sh's folder: read it into --json")
    parser.add_argument("--json", metavar="FILE", type=Path, default=JSON,
        help="default: tests/bench/gpu.json")
    parser.add_argument("--write", action="store_true", help="write the tables into the two pages")
    args = parser.parse_args()
    if args.collect:
        args.json.write_text(json.dumps(collect(args.collect), indent=1) + "\n")
        return
    seen = read(args.json)
    if args.write:
        write(HERE / "README.md", bench_tables(seen))
        write(ROOT / "tests" / "experiments" / "README.md", experiment_tables(seen))
        return
    for title, made in (bench_tables(seen) | experiment_tables(seen)).items():
        print(f"**{title}**\n\n{made}\n")


if __name__ == "__main__":
    main()
