"""eval.py: checkpoints on the same problems: accuracy, length, and how sure we are.

    python eval.py ckpt/sft ckpt/rlvr ckpt/opsd                   # a table, and the changes
    python eval.py ckpt/rlvr ckpt/opsd --plot figure.svg --json result.json --samples samples.jsonl
    python eval.py ckpt/sft ckpt/rlvr ckpt/opsd --curves curves.svg # a figure of the stages' logs
    python eval.py ckpt/sft ckpt/rlvr ckpt/opsd --example           # one problem, token by token
    python eval.py ckpt/rlvr ckpt/opsd --example --html page.html   # and as a page for a browser
    python eval.py ckpt/rlvr --context solution                     # what it does as a teacher
    python eval.py ckpt/rlvr --train --shortest shortest.jsonl      # data for sft.py

n responses to each problem. Standard errors and intervals treat the *problem* as the unit: those
to one problem are not independent. From the second checkpoint on, the change against the one before
is paired: the same problems and random numbers for each response, so that what is common cancels.

    pass@k = 1 - C(n - c, k) / C(n, k), unbiased, from c correct of n    (arXiv 2107.03374, eq. 1)
    maj@n  = is the most frequent answer correct (ties: the first seen)         (arXiv 2203.11171)
    KL_t   = sum_v p_S(v) (log p_S(v) - log p_T(v)), student S and teacher T at response token t
"""

import argparse
import heapq
import html
import itertools
import json
import math
import re
import shutil
import sys
import textwrap
import time
from bisect import bisect_left
from collections import Counter
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from transformers import AutoConfig

from rollout import APPLY, BUILT_IN, Head, PRIVILEGED, answer_of, check_context, collate, evaluate
from rollout import fail, fitting_prompts, is_first, join_processes, load_model, load_problems
from rollout import load_tokenizer, make_sampler, not_negative, number, once, own_context, positive
from rollout import read_problems, reason, render_prompt, require_checkpoint, require_device
from rollout import require_solutions, response_hidden_states, sample_row, seed_number, shard
from rollout import trained_with
from verify import extract_answer, verify_batch

DOUBT = re.compile(r"\b(wait|hmm|perhaps|maybe|alternatively|let me check|double[- ]check)\b",
    re.IGNORECASE)
NUMBER = r"(-?\d{1,999})"  # int() refuses thousands of digits
STEP = re.compile(rf"(Wait, )?{NUMBER}([-+*]){NUMBER}={NUMBER}(?=\D)")  # not one that is cut off
FIGURE_STYLE = {"font.size": 12, "svg.hashsalt": "eval.py"}  # a fixed salt: same data, same file


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
    add("--context", choices=list(PRIVILEGED), help="judge each checkpoint as a teacher: show it "
        "the solution or the answer, or ask it to be concise, as opsd.py does")
    add("--train", action="store_true", help="problems of the training part, not held-out ones")
    add("--problems", type=positive, help="how many at most; without it 400, or all of --data FILE")
    add("--n", type=positive, default=4, help="responses to each problem")
    add("--k", type=positive, help="of pass@k; without it --n")
    add("--max-new-tokens", type=positive, default=192,
        help="where a response is cut off: truncated")
    add("--temperature", type=not_negative, default=1.0, help="of sampling; 0 is greedy")
    add("--seed", type=seed_number, default=0, help="of sampling and of the bootstrap")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ...")
    add("--sampler", choices=["hf", "vllm"], default="hf", help="as in the stages")
    add("--vllm-memory", type=number(0.01, 1), default=0.35, help="as in the stages")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of --sampler vllm")
    add("--json", metavar="FILE", help="write the figures as json")
    add("--plot", metavar="FILE", help="draw accuracy against length, .svg or .png")
    add("--samples", metavar="FILE", help="write every response and its verdict, a json line each")
    add("--shortest", metavar="FILE", help="write the last checkpoint's shortest correct response "
        "to each problem, as data for sft.py")
    add("--curves", metavar="FILE", help="draw accuracy and length over the steps of all stages, "
        ".svg or .png, from their metrics.jsonl; evaluate nothing")
    add("--example", action="store_true", help="show the responses to one problem, and where each "
        "model would say something else if it were shown the solution; another --seed shows "
        "another problem")
    add("--all-tokens", action="store_true", help="with --example: every token, not the top five")
    add("--html", metavar="FILE", help="with --example: write it as a page to point at")
    parser.error = fail  # one line, without the usage
    args = parser.parse_args()
    join_processes(args.device)
    args.k = args.n if args.k is None else args.k
    once(check_flags, args)
    if not is_first():  # of several processes, which only helps to sample
        args.json = args.plot = args.samples = args.shortest = args.html = None
    if not args.curves:  # which only reads logs
        require_device(args.device, args.sampler)
        for path in args.checkpoints:
            require_checkpoint(path)
    return args


def check_flags(args):
    """Refuses files that cannot be written, and flags that this run would not heed."""
    given = []  # the flags that name a file to write
    for name in ("json", "plot", "samples", "shortest", "curves", "html"):
        path = getattr(args, name)
        if path is None:
            continue
        try:  # now, and not after the evaluation
            is_new = not Path(path).exists()
            open(path, "a").close()
            if is_new:
                Path(path).unlink()
        except OSError as error:
            fail(f"--{name} {path}: must name a file that can be written ({error.strerror})")
        if name in ("plot", "curves") and Path(path).suffix not in (".svg", ".png"):
            fail(f"--{name} {path}: must end in .svg or .png")
        given.append(f"--{name}")
    if args.k > args.n:
        fail(f"--k {args.k}: pass@k needs k responses to each problem; raise --n (now {args.n})")
    if args.columns and args.data in (None, *BUILT_IN):
        fail("--columns are those of a --data: give that, too")
    if args.train and args.data not in (None, *BUILT_IN):
        fail("--train goes with the data of the checkpoints; --data is used whole")
    if args.example and args.context:
        fail("--example shows the solution to the teacher alone: leave out --context")
    if args.shortest and args.context:
        fail("--shortest is of what a model writes unaided: leave out --context")
    not_html = [flag for flag in given if flag != "--html"]
    if args.example and not_html:
        fail(f"--example writes no file but --html: leave out {', '.join(not_html)}")
    if not args.example and (args.html or args.all_tokens):
        fail("--html and --all-tokens show an example: add --example")
    not_curves = [flag for flag in given if flag != "--curves"] + ["--context"] * bool(args.context)
    if args.curves and not_curves:
        fail(f"--curves evaluates nothing: leave out {', '.join(not_curves)}")


# --------------------------------------------------------------------------------------------------
# Statistics


def pass_at_k(n, c, k):
    """The unbiased estimate of P(at least one of k is correct) from c correct of n >= k."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_correct(texts, gold):
    """1.0 if a problem's most frequent extracted answer is correct. Cut-off responses have none."""
    votes = Counter(filter(None, map(extract_answer, texts)))
    if not votes:
        return 0.0
    winner, _ = votes.most_common(1)[0]
    return float(verify_batch([f"\\boxed{{{winner}}}"], [gold])[0])


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


def network(model):
    """The part of a model's config that says what is computed: no name, no dtype, no token ids."""
    other = ("_name_or_path", "dtype", "transformers_version", "use_cache")
    return {name: value for name, value in model.config.to_dict().items()
        if name not in other and not name.endswith("_token_id")}


def load_each(args, problems):
    """One checkpoint after the other: its path, and a sampler with its model and its tokenizer."""
    sampler = None
    for path in args.checkpoints:
        if is_first():
            print(f"evaluating {path} ...", file=sys.stderr, flush=True)
        if sampler is not None:
            sampler.model = None  # freed before the next is loaded: one model at a time
        model, tokenizer = load_model(path, args.device)
        model = shard(model, args.device)
        if sampler is None or args.sampler == "hf":
            sampler = make_sampler(model, tokenizer, problems, args, args.context)
            first = network(model)
        elif network(model) == first:  # one engine of vLLM serves all checkpoints
            sampler.tokenizer = tokenizer
            sampler.sync(model)
        else:
            fail(f"{path}: not the network of {args.checkpoints[0]}, for which vLLM was started: "
                "evaluate it in a call of its own, or with --sampler hf")
        del model
        yield path, sampler


def those_that_fit(problems, args):
    """The problems that fit every checkpoint's context, so that all are measured on the same."""
    for path in args.checkpoints:
        tokenizer = load_tokenizer(path)
        try:
            config = AutoConfig.from_pretrained(path)
        except Exception as error:  # of many types
            fail(f"{path}: its config.json is not that of a model: {reason(error)}")
        problems = fitting_prompts(problems, SimpleNamespace(config=config), tokenizer, args,
            args.context)
    return problems


def length(rollout):
    return len(rollout.response_ids)


def thinking_length(rollout, tokenizer):
    """Tokens of a labelled rollout's thinking, up to and with the last </think>. All if it does not
    end, as verify.py reads it; 0 without any. A tag may be several tokens."""
    def closings(count):
        return tokenizer.decode(rollout.response_ids[:count]).count("</think>")

    if "<think>" in rollout.text.rpartition("</think>")[2]:
        return length(rollout)
    return bisect_left(range(length(rollout) + 1), closings(length(rollout)), key=closings)


def first_results(text, problem=""):
    """A response of the built-in world -> [(is it a slip, what became of it)] of all first results.

    A first result is that of a step that is no check. A slip is one that is wrong for the step's
    own operands, wherever they come from. What becomes of it:
    mended: a check gives the right result, and the chain goes on from that, or ends with it;
    checked: there is a check before the next step, but not so; neither: there is none.
    """
    found, checks = [], []  # from the end, so that what follows a step is known
    answer, follows = extract_answer(text), None  # follows: the next step's first operand
    for wait, a, op, b, result in reversed(STEP.findall(text)):
        if wait:
            checks.append(int(result))
            continue
        right = APPLY[op](int(a), int(b))
        slip = int(result) != right
        goes_on = follows == str(right) if follows else answer in (answer_of(problem, right), None)
        is_mended = slip and right in checks and goes_on
        found.append((slip, "mended" if is_mended else "checked" if checks else "neither"))
        follows, checks = a, []
    return found[::-1]


def box_contradicts(text, problem):
    """Whether a response's answer is not the one that its own last result gives."""
    results, answer = STEP.findall(text), extract_answer(text)
    return bool(results and answer) and answer != answer_of(problem, int(results[-1][-1]))


def count_slips(rollouts):
    """What became of the slips of all responses, how many right results were checked, and how many
    responses contradict themselves."""
    found = Counter(step for r in rollouts for step in first_results(r.text, r.problem.problem))
    fates = {fate: found[True, fate] for fate in ("mended", "checked", "neither")}
    return {"first_results": found.total(), "slips": sum(fates.values()), **fates,
        "right_checked": found[False, "checked"], "responses": len(rollouts),
        "contradictions": sum(box_contradicts(r.text, r.problem.problem) for r in rollouts)}


def evaluate_checkpoint(path, sampler, problems, args):
    """-> the row of the table and the json; the same figures a problem, for pairing; rollouts."""
    start = time.time()
    rollouts = evaluate(sampler, problems, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, n=args.n, seed=args.seed, thinking=args.thinking,
        context=args.context)
    seconds = time.time() - start
    measured = []  # a row for each problem: the mean over its n responses
    for first in range(0, len(rollouts), args.n):
        group = rollouts[first : first + args.n]
        correct = sum(r.label == "correct" for r in group)
        thinking = sum(thinking_length(r, sampler.tokenizer) for r in group)
        finished = [r.text for r in group if r.finished]
        measured.append({
            "accuracy": correct / args.n,
            "length": sum(map(length, group)) / args.n,
            "think_length": thinking / args.n,
            "truncated": sum(r.label == "truncated" for r in group) / args.n,
            "doubt": sum(len(DOUBT.findall(r.text)) for r in group) / args.n,
            "pass_at_k": pass_at_k(args.n, correct, args.k),
            "maj_at_k": once(majority_correct, finished, group[0].problem.answer),
        })
    per_problem = {name: [row[name] for row in measured] for name in measured[0]}
    row = {"checkpoint": path}
    for name, values in per_problem.items():
        row[name], row[f"{name}_se"] = mean_and_se(values)
    row |= {"problems": len(problems), "n": args.n, "k": args.k, "context": args.context,
        "tok_s": sum(map(length, rollouts)) / seconds}
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


def compare_checkpoints(problems, args, built_in):
    """The table and, where asked for, --json, --plot, --samples and --shortest."""
    rows, before = [], None
    if args.samples:
        Path(args.samples).write_text("")
    for path, sampler in load_each(args, problems):
        row, per_problem, rollouts = evaluate_checkpoint(path, sampler, problems, args)
        if before:  # problem by problem, so that what the two have in common cancels
            row |= paired_change(per_problem, before, args.seed)
        if built_in:
            row["slips"] = count_slips(rollouts)
        rows.append(row)
        before = per_problem
        if args.samples:  # now, so that a later checkpoint that fails does not lose them
            with open(args.samples, "a", encoding="utf-8") as file:
                for r in rollouts:
                    more = {"extracted": extract_answer(r.text)}
                    file.write(json.dumps({"checkpoint": path, **sample_row(r), **more}) + "\n")
    print_table(rows)
    if args.shortest:
        write_shortest(rollouts, args)
    if args.json:
        Path(args.json).write_text(json.dumps({"checkpoints": rows}, indent=1) + "\n")
    if args.plot:
        draw_figure(rows, args.plot)


# --------------------------------------------------------------------------------------------------
# Table and figures


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
        points, percent = 100 * row["accuracy_change"], 100 * row["length_change"]
        low, high = [100 * bound for bound in row["accuracy_change_ci95"]]
        shorter, longer = [100 * bound for bound in row["length_change_ci95"]]
        print(f"{row['checkpoint']:{max(width, 29)}}  {points:+6.1f} ({low:+.1f} to {high:+.1f})"
            f"{'':13}{percent:+6.1f} ({shorter:+.1f} to {longer:+.1f})")
    if "slips" in rows[0]:
        print(f"\n{'what became of slips':{width}}  first results    slips, %   mended, %  "
            "checked, %  neither, %  right ones checked, %  box against chain, %")
        for row in rows:
            found = row["slips"]
            slips, right = found["slips"], found["first_results"] - found["slips"]
            print(f"{row['checkpoint']:{max(width, 20)}}  {slips + right:13d}  "
                f"{share(slips, slips + right)}  {share(found['mended'], slips)}  "
                f"{share(found['checked'], slips)}  {share(found['neither'], slips)}  "
                f"{share(found['right_checked'], right):>21}  "
                f"{share(found['contradictions'], found['responses']):>20}")


def share(part, whole):
    return f"{100 * part / whole:10.1f}" if whole else f"{'-':>10}"


@matplotlib.rc_context(FIGURE_STYLE)
def draw_figure(rows, path):
    """Accuracy against length, a point a checkpoint, with 95 % intervals."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lengths, accuracies = [row["length"] for row in rows], [100 * row["accuracy"] for row in rows]
    axes.plot(lengths, accuracies, color="0.8", zorder=1)
    for row, x, y in zip(rows, lengths, accuracies):
        axes.errorbar(x, y, xerr=1.96 * row["length_se"], yerr=196 * row["accuracy_se"], fmt="o",
            capsize=3)
        axes.annotate(row["checkpoint"], (x, y), xytext=(6, 6), textcoords="offset points")
    axes.set(xlabel="response length (tokens)", ylabel="accuracy (%)")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def read_curve(path):
    """The lines of a run's metrics.jsonl that measure it on held-out problems."""
    log = Path(path, "metrics.jsonl")
    if not log.is_file():
        fail(f"{log}: no such file; --curves needs what sft.py, rlvr.py and opsd.py log")
    try:
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        fail(f"{log}: not a log of JSON lines ({error})")
    rows = [row for row in rows if "eval/accuracy" in row]
    if not rows:
        fail(f"{log}: no line has eval/accuracy; has the run measured anything yet?")
    return rows


@matplotlib.rc_context(FIGURE_STYLE)
def draw_curves(checkpoints, path):
    """A column a stage, with its own steps: accuracy above, length below. Only reads logs."""
    curves = [read_curve(checkpoint) for checkpoint in checkpoints]
    sizes = [str(trained_with(checkpoint).get("eval_problems", "?")) for checkpoint in checkpoints]
    figure = Figure(figsize=(2.5 * max(3, len(curves)), 5), layout="constrained")
    axes = figure.subplots(2, len(curves), sharex="col", sharey="row", squeeze=False)
    for checkpoint, rows, (above, below) in zip(checkpoints, curves, axes.T):
        steps = [row["step"] for row in rows]
        accuracies = [100 * row["eval/accuracy"] for row in rows]
        lengths = [row["eval/len_mean"] for row in rows]
        above.set_title(Path(checkpoint).name)
        for panel, values, colour in (above, accuracies, "#0072b2"), (below, lengths, "#d55e00"):
            panel.plot(steps, values, color=colour, marker="o", linewidth=2)
            panel.annotate(f"{values[-1]:.0f}", (steps[-1], values[-1]), ha="center",
                xytext=(0, 8), textcoords="offset points")
            panel.margins(x=0.12)
            panel.locator_params(axis="x", nbins=3, integer=True)
            panel.grid(alpha=0.3)
    longest = max(row["eval/len_mean"] for rows in curves for row in rows)
    axes[0, 0].set(ylabel="accuracy (%)", ylim=(0, 115))
    axes[1, 0].set(ylabel="response length (tokens)", ylim=(0, 1.15 * longest))
    count = sizes[0] if len(set(sizes)) == 1 else ", ".join(sizes)
    figure.supxlabel(f"training step, stage after stage ({count} held-out problems)")
    figure.savefig(path, metadata={"Date": None})


# --------------------------------------------------------------------------------------------------
# Responses: the shortest, and one problem's token by token


def write_shortest(rollouts, args):
    """Rejection sampling's data: the shortest correct response to each problem, rows for sft.py."""
    rows = []
    for first in range(0, len(rollouts), args.n):
        correct = [r for r in rollouts[first : first + args.n] if r.label == "correct"]
        if correct:
            best = min(correct, key=length)
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

    -> log-probs (|y|, V) of the student and of the teacher: same weights, same response ids, at
    temperature 1.
    """
    problem, response_ids = rollout.problem, rollout.response_ids
    context = "solution" if problem.solution else "answer"
    shown = own_context(problem, context)
    teacher_prompt = render_prompt(tokenizer, problem, context, shown, thinking)
    log_probs = []
    for prompt_ids in (rollout.prompt_ids, teacher_prompt):
        check_context(model, len(prompt_ids), len(response_ids))
        input_ids, response_mask = collate([prompt_ids], [response_ids], model.device)
        hidden = response_hidden_states(model, input_ids, response_mask)  # (|y|, H)
        logits = Head(model)(hidden).float()  # (|y|, V)
        log_probs.append(logits.log_softmax(-1).cpu())
    return log_probs


def likeliest(log_probs, tokenizer):
    """log-probs (V,) -> the five likeliest tokens: (text, probability), the likeliest first."""
    best = log_probs.exp().topk(5)
    texts = [tokenizer.decode([i]) for i in best.indices.tolist()]
    return list(zip(texts, best.values.tolist()))


def measure_tokens(model, tokenizer, rollout, thinking):
    """-> a dict for each response token: its text and position, its probability under student and
    teacher, the five likeliest tokens of each, and KL(student || teacher) there, in nats."""
    student, teacher = teacher_gap(model, tokenizer, rollout, thinking)  # (|y|, V) each
    kl = F.kl_div(teacher, student, log_target=True, reduction="none").sum(-1)  # (|y|,)
    return [{
        "position": t,
        "text": tokenizer.decode([token]),
        "kl": kl[t].item(),
        "student": student[t, token].exp().item(),
        "teacher": teacher[t, token].exp().item(),
        "student_top": likeliest(student[t], tokenizer),
        "teacher_top": likeliest(teacher[t], tokenizer),
    } for t, token in enumerate(rollout.response_ids)]


def show_example(problem, args):
    """One response by each checkpoint, measured token by token; then printed, and --html."""
    examples = []
    for path, sampler in load_each(args, [problem]):
        rollout = evaluate(sampler, [problem], max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=args.seed, thinking=args.thinking)[0]
        tokens = measure_tokens(sampler.model, sampler.tokenizer, rollout, args.thinking)
        mean_kl = sum(token["kl"] for token in tokens) / len(tokens)
        examples.append({"title": f"{path}: {rollout.label}, {len(tokens)} tokens",
            "path": path, "tokens": tokens, "mean_kl": mean_kl})
    print_responses(problem, examples)
    for example in examples:
        print_tokens(example, args.all_tokens)
    if args.html:
        Path(args.html).write_text(example_page(problem, examples), encoding="utf-8")


def print_responses(problem, examples):
    """The responses side by side, as wide as the terminal."""
    shown = f"solution: {problem.solution}\n" if problem.solution else ""  # none: the answer is
    print(f"problem:  {problem.problem}\n{shown}answer:   {problem.answer}\n")
    width = max(20, shutil.get_terminal_size().columns // len(examples) - 2)
    columns = []
    for example in examples:
        text = example["title"] + "\n\n" + "".join(token["text"] for token in example["tokens"])
        lines = [textwrap.wrap(line, width) or [""] for line in text.split("\n")]
        columns.append(itertools.chain.from_iterable(lines))
    for row in itertools.zip_longest(*columns, fillvalue=""):
        print("  ".join(line.ljust(width) for line in row).rstrip())


def print_tokens(example, all_tokens):
    """The tokens of most KL, or all. On a terminal a row is red where the teacher finds the token
    less than half as likely (distillation would remove it), green where more than twice."""
    print(f"\n{example['path']}: KL(student || teacher) {example['mean_kl']:.3f} a token"
        f"{'' if all_tokens else '; most of it at'}\n"
        f"  {'token':>6}  {'':14}  student  teacher     KL   the teacher would say")
    tokens = example["tokens"]
    if not all_tokens:
        tokens = heapq.nlargest(5, tokens, key=itemgetter("kl"))
        tokens.sort(key=itemgetter("position"))
    for token in tokens:
        best, probability = token["teacher_top"][0]
        row = (f"  {token['position']:6d}  {token['text']!r:14}  {token['student']:7.3f}  "
            f"{token['teacher']:7.3f}  {token['kl']:5.2f}   {best!r} ({probability:.3f})")
        if sys.stdout.isatty() and token["teacher"] < token["student"] / 2:
            row = f"\033[31m{row}\033[0m"
        elif sys.stdout.isatty() and token["teacher"] > token["student"] * 2:
            row = f"\033[32m{row}\033[0m"
        print(row)


STYLE = """
:root { color-scheme: light dark; --shade: 255 140 0; font: 1rem/1.5 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { :root { --shade: 190 80 0; } }
html { scroll-padding-bottom: 17rem; } h1, h2 { font-size: 1.2rem; }
body { max-width: 80rem; margin: auto; padding: 0 1rem 17rem; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); }
code { white-space: pre-wrap; overflow-wrap: anywhere; } section { margin-right: 2rem; }
th, td { text-align: left; padding-right: .8rem; }
pre, .response { font-family: ui-monospace, monospace; white-space: break-spaces; }
.response { line-height: 2; } .shade { background: rgb(var(--shade) / var(--kl)); }
.shade { display: inline; padding: .2em 0; margin-right: 2px; border-bottom: 1px solid gray; }
.shade:hover, .shade:focus { outline: 2px solid; }
.card { display: none; position: fixed; inset: auto 0 0; max-height: 45vh; overflow: auto; }
.card { padding: .5rem 1rem; background: Canvas; border-top: 2px solid; }
.card { font: 1rem/1.5 system-ui, sans-serif; white-space: normal; overflow-wrap: normal; }
.shade:hover > .card { display: block; z-index: 1; } .shade:focus > .card { display: block; }
"""
LEGEND = """The <b>student</b> is the checkpoint with the problem in its prompt. The <b>teacher</b>
is the same checkpoint with the solution (the answer, if there is none) in its prompt as well. Both
read the same response. A token's shade is KL(student || teacher) at its place, in nats: how far
apart the two are in what they would say there. Point at a token, tap it, or reach it with the Tab
key: a card shows the five tokens that each finds likeliest."""


def escaped(text):
    """A token as Python writes it, with quotes and \\n, safe in a page."""
    return f"<code>{html.escape(repr(text))}</code>"


def token_html(token):
    """A token, shaded by its KL, and its card, which STYLE shows on hover, focus or tap."""
    shade = min(1, max(0, token["kl"]))  # 1 nat and more: the darkest
    rows = ""
    for (ours, p_student), (theirs, p_teacher) in zip(token["student_top"], token["teacher_top"]):
        rows += (f"<tr><td>{p_student:.3f}<td>{escaped(ours)}"
            f"<td>{p_teacher:.3f}<td>{escaped(theirs)}")
    text = html.escape(token["text"].replace("\n", "↵\n"))
    return f"""<div class="shade" tabindex="0" style="--kl:{shade:.3f}">{text}<div class="card">
Token {token["position"]}, {escaped(token["text"])}: KL {token["kl"]:.3f}, student
{token["student"]:.3f}, teacher {token["teacher"]:.3f}
<table><tr><th colspan="2">student<th colspan="2">teacher{rows}</table></div></div>"""


def example_page(problem, examples):
    """A page that needs no network and no script. What a model or the data says is escaped."""
    scale = "".join(f'<span class="shade" style="--kl:{kl}"> {kl} </span>' for kl in (0, 0.5, 1))
    responses = ""
    for example in examples:
        tokens = "<wbr>".join(map(token_html, example["tokens"]))
        responses += f"""<section><h2>{html.escape(example["title"])}</h2>
<p>KL {example["mean_kl"]:.3f} a token</p><div class="response">{tokens}</div></section>"""
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Student and teacher</title>
<style>{STYLE}</style><h1>Student and teacher, token by token</h1>
<pre>problem:  {html.escape(problem.problem)}
solution: {html.escape(problem.solution)}
answer:   {html.escape(problem.answer)}</pre><p>{LEGEND}</p><p>KL {scale} or more</p>
<main>{responses}</main></html>
"""


def main():
    args = get_args()
    if args.curves:
        draw_curves(args.checkpoints, args.curves)
        return
    saved = trained_with(args.checkpoints[0])
    if args.thinking is None:
        args.thinking = saved["thinking"]
    data, columns = (args.data, args.columns) if args.data else (saved["data"], saved["columns"])
    if args.data in (None, *BUILT_IN):
        train, heldout = load_problems(data, columns)
        problems, which = (train, "of the training part") if args.train else (heldout, "held out")
        limit = args.problems or 400
    else:
        problems, which, limit = read_problems(data, columns), "of all", args.problems
    if not problems:
        fail(f"--data {data}: holds no usable problem")
    if args.context == "solution":
        require_solutions(problems, data, "--context solution shows (or choose another --context)")
    problems = those_that_fit(problems, args)
    if args.example:
        show_example(problems[args.seed % len(problems)], args)
        return
    problems = problems[:limit]
    shown = f"; --context {args.context}" if args.context else ""
    print(f"data: {data} ({len(problems)} problems, {which}; {args.n} responses to each{shown})")
    compare_checkpoints(problems, args, built_in=data in BUILT_IN)


if __name__ == "__main__":
    main()
