"""eval.py: checkpoints on the same problems with the same luck: accuracy, length, how sure we are.

    python eval.py ckpt/sft ckpt/rlvr ckpt/opsd
    python eval.py ckpt/rlvr ckpt/opsd --plot figure.svg --json result.json --samples samples.jsonl
    python eval.py ckpt/sft ckpt/rlvr ckpt/opsd --example           # one problem, word by word
    python eval.py ckpt/rlvr --train --shortest shortest.jsonl      # data for sft.py

n responses to each problem. Standard errors and intervals treat the *problem* as the unit: those
to one problem are not independent. From the second checkpoint on, the change against the one before
is paired: the same problems and random numbers for each response, so that what is common cancels.

    pass@k = 1 - C(n - c, k) / C(n, k), unbiased, from c correct of n    (arXiv 2107.03374, eq. 1)
    maj@n  = is the most frequent answer correct (ties: the first seen)         (arXiv 2203.11171)
"""

import argparse
import itertools
import json
import math
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from rollout import check_context, collate, evaluate, fail, load_model, load_problems
from rollout import make_sampler, read_problems, render_prompt, require_checkpoint, require_device
from rollout import response_hidden_states, sample_row, trained_with
from verify import extract_answer, verify_batch

DOUBT = re.compile(r"\b(wait|hmm|perhaps|maybe|alternatively|let me check|double[- ]check)\b",
    re.IGNORECASE)


def get_args():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", default=["ckpt/sft", "ckpt/rlvr", "ckpt/opsd"],
        help="checkpoint folders or Hugging Face names, in the order trained")
    add("--data", help="a .jsonl file or data set, as in the stages, used whole; without it the "
        "held-out problems of what the first checkpoint was trained on")
    add("--columns", default="", help="as in the stages")
    add("--thinking", action=argparse.BooleanOptionalAction, default=None,
        help="as in the stages; without it as the first checkpoint was trained")
    add("--train", action="store_true", help="problems of the training part, not held-out ones")
    add("--problems", type=int, help="how many at most; without it 400, or all of --data FILE")
    add("--n", type=int, default=4, help="responses to each problem")
    add("--k", type=int, help="of pass@k; default: --n")
    add("--max-new-tokens", type=int, default=192, help="a response is cut off (truncated) here")
    add("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy")
    add("--seed", type=int, default=0, help="of sampling and of the bootstrap")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--sampler", choices=["hf", "vllm"], default="hf", help="as in the stages")
    add("--vllm-memory", type=float, default=0.35, help="as in the stages")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of --sampler vllm")
    add("--json", metavar="FILE", help="write the figures as json")
    add("--plot", metavar="FILE", help="draw accuracy against length, .svg or .png")
    add("--samples", metavar="FILE", help="write every response and its verdict, a json line each")
    add("--shortest", metavar="FILE", help="write the last checkpoint's shortest correct response "
        "to each problem, as data for sft.py")
    add("--example", action="store_true", help="show the responses to one problem side by side, "
        "and where each model would say something else if it were shown the solution; another "
        "--seed shows another problem")
    args = parser.parse_args()
    args.k = args.k or args.n
    whole = args.data not in (None, "arithmetic")
    if args.problems is None:
        args.problems = 10**9 if whole else 400
    if args.example and (args.json or args.plot or args.samples or args.shortest):
        fail("--example writes no files: leave out --json, --plot, --samples, --shortest")
    if args.thinking is None:
        args.thinking = trained_with(args.checkpoints[0])["thinking"]
    for name in ("problems", "n", "k", "max_new_tokens"):
        if getattr(args, name) < 1:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.k > args.n:
        fail(f"--k {args.k}: pass@k needs at least k responses to each problem; raise --n "
            f"(now {args.n})")
    if args.plot and Path(args.plot).suffix not in (".svg", ".png"):
        fail(f"--plot {args.plot}: must end in .svg or .png")
    if args.train and whole:
        fail("--train goes with the data of the checkpoints; --data is used whole")
    for path in filter(None, (args.json, args.plot, args.samples, args.shortest)):
        if not Path(path).resolve().parent.is_dir():
            fail(f"{path}: its folder does not exist")
    require_device(args.device)
    for path in args.checkpoints:
        require_checkpoint(path)
    return args


# --------------------------------------------------------------------------------------------------
# Statistics


def pass_at_k(n, c, k):
    """The unbiased estimate of P(at least one of k is correct) from c correct of n >= k."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_correct(texts, gold):
    """1.0 if a problem's most frequent extracted answer is correct. Cut-off responses have none."""
    answers = Counter(filter(None, map(extract_answer, texts)))
    boxed = [f"\\boxed{{{answer}}}" for answer, _ in answers.most_common(1)]
    return float(any(verify_batch(boxed, [gold] * len(boxed))))


def mean_and_se(values):
    """Mean and standard error of one value a problem."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def bootstrap_interval(values, seed, resamples=2000):
    """95 % percentile interval of the mean of `values`, one a problem, by resampling problems."""
    values = torch.tensor(values, dtype=torch.float64)
    index = torch.randint(len(values), (resamples, len(values)),
        generator=torch.Generator().manual_seed(seed))
    return values[index].mean(1).quantile(
        torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


# --------------------------------------------------------------------------------------------------
# One checkpoint


def thinking_length(response_ids, tokenizer):
    """Tokens up to and including </think>; all if it is never closed, 0 if nothing was opened."""
    think, closed = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    if closed is not None and closed != tokenizer.unk_token_id and closed in response_ids:
        return response_ids.index(closed) + 1
    return len(response_ids) if think in response_ids[:2] else 0


def evaluate_checkpoint(path, sampler, problems, args):
    """-> the row of the table and of the json, and the same figures a problem, for pairing."""
    start = time.time()
    rollouts = evaluate(sampler, problems, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, n=args.n, seed=args.seed, thinking=args.thinking)
    seconds = time.time() - start
    groups = [rollouts[i : i + args.n] for i in range(0, len(rollouts), args.n)]
    mean = lambda of: [sum(map(of, group)) / args.n for group in groups]  # noqa: E731
    per_problem = {
        "accuracy": mean(lambda r: r.label == "correct"),
        "length": mean(lambda r: len(r.response_ids)),
        "think_length": mean(lambda r: thinking_length(r.response_ids, sampler.tokenizer)),
        "truncated": mean(lambda r: r.label == "truncated"),
        "doubt": mean(lambda r: len(DOUBT.findall(r.text))),
        "pass_at_k": [pass_at_k(args.n, sum(r.label == "correct" for r in group), args.k)
            for group in groups],
        "maj_at_k": [majority_correct([r.text for r in g if r.finished], g[0].problem.answer)
            for g in groups],
    }
    row = {"checkpoint": path}
    for name, values in per_problem.items():
        row[name], row[f"{name}_se"] = mean_and_se(values)
    row |= {"problems": len(problems), "n": args.n, "k": args.k,
        "tok_s": sum(len(r.response_ids) for r in rollouts) / seconds}
    return row, per_problem, rollouts


def paired_change(now, before, seed):
    """Change of accuracy (absolute) and length (relative to before); 95 % bootstrap intervals."""
    accuracy = [b - a for a, b in zip(before["accuracy"], now["accuracy"])]
    base = sum(before["length"]) / len(before["length"])
    length = [(b - a) / base for a, b in zip(before["length"], now["length"])]
    return {
        "accuracy_change": sum(accuracy) / len(accuracy),
        "accuracy_change_ci95": bootstrap_interval(accuracy, seed),
        "length_change": sum(length) / len(length),
        "length_change_ci95": bootstrap_interval(length, seed),
    }


# --------------------------------------------------------------------------------------------------
# Table and figure


def print_table(rows):
    width = max(10, *(len(row["checkpoint"]) for row in rows))
    k, n = rows[0]["k"], rows[0]["n"]
    print(f"\n{'checkpoint':{width}}  accuracy       length        think  truncated  doubt  "
        f"{f'pass@{k}':7}  {f'maj@{n}':6}")
    for row in rows:
        print(f"{row['checkpoint']:{width}}  {row['accuracy']:.3f} ± {row['accuracy_se']:.3f}  "
            f"{row['length']:6.1f} ± {row['length_se']:3.1f}  {row['think_length']:6.1f}  "
            f"{row['truncated']:9.3f}  {row['doubt']:5.2f}  {row['pass_at_k']:7.3f}  "
            f"{row['maj_at_k']:6.3f}")
    if len(rows) > 1:
        print(f"\n{'change against the one before':{width}}  accuracy, points (95 % interval)   "
            "length, % (95 % interval)")
    for row in rows[1:]:
        (a, b), (c, d) = row["accuracy_change_ci95"], row["length_change_ci95"]
        print(f"{row['checkpoint']:{max(width, 29)}}  {100 * row['accuracy_change']:+6.1f} "
            f"({100 * a:+.1f} to {100 * b:+.1f}){'':13}{100 * row['length_change']:+6.1f} "
            f"({100 * c:+.1f} to {100 * d:+.1f})")


def draw_figure(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    lengths, accuracies = [row["length"] for row in rows], [100 * row["accuracy"] for row in rows]
    axes.plot(lengths, accuracies, color="0.8", zorder=1)
    for row, x, y in zip(rows, lengths, accuracies):
        axes.errorbar(x, y, xerr=1.96 * row["length_se"], yerr=196 * row["accuracy_se"], fmt="o",
            capsize=3)
        axes.annotate(row["checkpoint"], (x, y), xytext=(6, 6), textcoords="offset points")
    axes.set(xlabel="response length (tokens)", ylabel="accuracy (%)")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path)


# --------------------------------------------------------------------------------------------------
# Responses: the shortest, and one problem's side by side


def write_shortest(rollouts, args):
    """Rejection sampling's data: the shortest correct response to each problem, rows for sft.py."""
    rows = []
    for start in range(0, len(rollouts), args.n):
        correct = [r for r in rollouts[start : start + args.n] if r.label == "correct"]
        if correct:
            best = min(correct, key=lambda r: len(r.response_ids))
            rows.append({"problem": best.problem.problem, "answer": best.problem.answer,
                "solution": best.text})
    Path(args.shortest).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tagged = all("</think>" in row["solution"] for row in rows)
    print(f"\n{args.shortest}: {len(rows)} of {len(rollouts) // args.n} problems have a correct "
        f"response; train on them with\n  python sft.py --init {args.checkpoints[-1]} --data "
        f"{args.shortest} --privileged-frac 0 --steps 40 --lr 2e-4 --min-lr-ratio 1 "
        "--warmup-steps 0 --weight-decay 0 --out ckpt/shortest" + " --no-thinking" * (not tagged))


@torch.no_grad()
def teacher_gap(model, tokenizer, rollout, thinking):
    """What a model thinks of its response without and with the solution in its prompt.

    -> log-probs (|y|, V) of the student and of the teacher, same weights, same response ids.
    """
    problem = rollout.problem
    shown = ("solution", problem.solution) if problem.solution else ("answer", problem.answer)
    told, log_probs = render_prompt(tokenizer, problem, *shown, thinking=thinking), []
    for prompt in (rollout.prompt_ids, told):
        check_context(model, len(prompt), len(rollout.response_ids))
        hidden = response_hidden_states(
            model, *collate([prompt], [rollout.response_ids], model.device))
        log_probs.append(model.get_output_embeddings()(hidden).float().log_softmax(-1).cpu())
    return log_probs


def wrap(pieces, width):
    """(text, colour) pieces, each cut where it must be -> lines of pieces, `width` columns each."""
    lines, room = [[]], width
    for text, colour in pieces:
        for k, part in enumerate(text.split("\n")):
            if k:
                lines, room = [*lines, []], width
            while len(part) > room:
                if room == width or not part[:room].strip():  # longer than a whole line: cut it
                    lines[-1].append((part[:room], colour))
                    part = part[room:]
                lines, room = [*lines, []], width
            lines[-1].append((part, colour))
            room -= len(part)
    return lines


def print_example(problem, args):
    """One problem's response by each checkpoint, side by side, and below, for each, the tokens on
    which student and teacher differ most. Colours, on a terminal: red, the teacher finds the token
    less likely than the student does (distillation would remove it); green, more likely."""
    colours = sys.stdout.isatty()
    columns, below, sampler = [], [], None
    for path in args.checkpoints:
        model, tokenizer = load_model(path, args.device)
        if sampler is None or args.sampler == "hf":
            sampler = make_sampler(model, tokenizer, [problem], args)
        sampler.sync(model)
        rollout = evaluate(sampler, [problem], max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=args.seed, thinking=args.thinking)[0]
        student, teacher = teacher_gap(model, tokenizer, rollout, args.thinking)
        ids = torch.tensor(rollout.response_ids)[:, None]
        gap = (teacher - student).gather(1, ids)[:, 0]  # log p_T(y_t) - log p_S(y_t)
        kl = (student.exp() * (student - teacher)).sum(-1)
        words = [tokenizer.decode([i]) for i in rollout.response_ids]
        paint = [(41 if g < 0 else 42) if abs(g) > math.log(2) else 0 for g in gap.tolist()]
        columns.append((f"{path}: {rollout.label}, {len(words)} tokens", list(zip(words, paint))))
        below.append(f"\n{path}: KL(student || teacher) {kl.mean():.3f} a token; most of it at\n"
            f"  {'token':>6}  {'':14}  student  teacher     KL   the teacher would say")
        for t in sorted(kl.topk(min(5, len(words))).indices.tolist()):
            best = teacher[t].argmax().item()
            below.append(f"  {t:6d}  {words[t]!r:14}  {student[t, ids[t]].exp().item():7.3f}  "
                f"{teacher[t, ids[t]].exp().item():7.3f}  {kl[t]:5.2f}   "
                f"{tokenizer.decode([best])!r} ({teacher[t, best].exp():.3f})")
    shown = f"solution: {problem.solution}\n" if problem.solution else ""  # none: the answer is
    print(f"problem:  {problem.problem}\n{shown}answer:   {problem.answer}\n")
    width = max(20, shutil.get_terminal_size().columns // len(columns) - 2)
    cells = [wrap([*((f"{word} ", 1) for word in head.split()), ("\n\n", 0)], width)[:-1]
        + wrap(pieces, width) for head, pieces in columns]
    for row in itertools.zip_longest(*cells, fillvalue=[]):
        print("  ".join("".join(f"\033[{c}m{text}\033[0m" if colours and c else text
            for text, c in line) + " " * (width - sum(len(text) for text, _ in line))
            for line in row).rstrip())
    print("\n".join(below))


def main():
    args = get_args()
    saved = trained_with(args.checkpoints[0])
    data, columns = (args.data, args.columns) if args.data else (saved["data"], saved["columns"])
    whole = args.data not in (None, "arithmetic")
    problems = (read_problems(data, columns) if whole
        else load_problems(data, columns)[0 if args.train else 1])
    if not problems:
        fail(f"--data {data}: holds no usable problem")
    if args.example:
        return print_example(problems[args.seed % len(problems)], args)
    problems = problems[: args.problems]
    which = "of all" if whole else "of the training part" if args.train else "held out"
    print(f"data: {data} ({len(problems)} problems, {which}; {args.n} responses to each)")
    rows, before, sampler = [], None, None
    if args.samples:
        Path(args.samples).write_text("")
    for path in args.checkpoints:
        print(f"evaluating {path} ...", file=sys.stderr, flush=True)
        model, tokenizer = load_model(path, args.device)
        if sampler is None or args.sampler == "hf":  # one engine of vLLM serves all checkpoints
            sampler = make_sampler(model, tokenizer, problems, args)
        sampler.sync(model)
        row, per_problem, rollouts = evaluate_checkpoint(path, sampler, problems, args)
        rows.append(row | (paired_change(per_problem, before, args.seed) if before else {}))
        before = per_problem
        if args.samples:
            with open(args.samples, "a", encoding="utf-8") as file:
                for r in rollouts:
                    row = {"checkpoint": path, **sample_row(r), "extracted": extract_answer(r.text)}
                    file.write(json.dumps(row) + "\n")
    print_table(rows)
    if args.shortest:
        write_shortest(rollouts, args)
    if args.json:
        Path(args.json).write_text(json.dumps({"checkpoints": rows}, indent=1) + "\n")
    if args.plot:
        draw_figure(rows, args.plot)


if __name__ == "__main__":
    main()
