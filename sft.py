"""sft.py: supervised fine-tuning, the first of three stages: SFT -> RLVR -> OPSD.

    python sft.py                                           # the built-in world: 6 min on 2 cores
    python sft.py --data my.jsonl                           # your problems, from scratch
    python sft.py --data my.jsonl --init Qwen/Qwen3-0.6B    # your problems, a pretrained model

Maximum likelihood of demonstrations y given their prompts x, response tokens only:

    L = - 1/N * sum over the batch, sum_t log pi(y_t | x, y_<t)    N = the batch's response tokens

What is easy to get wrong, and where it is done: EOS is part of y, or the model never learns to stop
(`build_example`); N is counted before the split into micro-batches, or the gradient depends on it
(`accumulate_gradients`); the prompt is rendered as it is for sampling (`rollout.render_prompt`).

The built-in demonstrations are verbose and fallible (see rollout.py). A share, --privileged-frac,
is shown the solution, in exactly the words that opsd.py's teacher reads, and is concise. That
gives a new model what a pretrained one has: whoever holds the solution works more briefly.

Left out: packing examples into one row (batches of like length waste little), LoRA, several GPUs.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from rollout import INSTRUCTION, PRIVILEGED, check_context, collate
from rollout import demonstrate_arithmetic, draw, evaluate, fail, fitting, load_model, load_problems
from rollout import make_model, make_sampler, make_tokenizer, micro_batches, recover_checkpoint
from rollout import render_prompt, render_response, require_device, require_solutions, sample_row
from rollout import summarize, token_log_probs, trained_with


def get_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Formatter)
    add_common_flags(parser)
    add = parser.add_argument_group("sft").add_argument
    add("--privileged-frac", type=float, help="share of demonstrations with the solution shown")
    parser.set_defaults(out="ckpt/sft", steps=2000, batch_size=32, micro_batch_size=32, lr=5e-3,
        min_lr_ratio=0.05, warmup_steps=50, weight_decay=0.1, grad_clip=1.0, max_new_tokens=192,
        temperature=1.0, eval_every=500, save_every=500, privileged_frac=0.25)
    return parse_args(parser)


# --------------------------------------------------------------------------------------------------
# The loss


def sft_loss(policy_log_probs, response_mask, num_tokens):
    """Negative log-likelihood of responses. (B, T), (B, T) -> scalar; num_tokens: whole batch's."""
    return -(policy_log_probs * response_mask).sum() / num_tokens


def accumulate_gradients(model, examples, micro_batch_size):
    """Adds the gradient of the batch's loss to .grad, by micro-batches; returns the loss."""
    num_tokens = sum(len(response) for _, response in examples)
    loss = 0.0
    for micro in micro_batches(examples, micro_batch_size, length=lambda e: len(e[0]) + len(e[1])):
        input_ids, response_mask = collate(*zip(*micro), device=model.device)
        policy_log_probs, _ = token_log_probs(model, input_ids, response_mask)
        micro_loss = sft_loss(policy_log_probs, response_mask, num_tokens)
        micro_loss.backward()
        loss += micro_loss.item()
    return loss


# --------------------------------------------------------------------------------------------------
# The data

WINDOW = 32  # batches that are drawn together, so that each can be of like length


def build_example(tokenizer, problem, rng, args):
    """One demonstration -> prompt ids, response ids. The response is encoded apart from its prompt,
    as it will be when sampled, and ends in EOS."""
    privileged = rng.random() < args.privileged_frac
    if args.data == "arithmetic":
        response = demonstrate_arithmetic(problem, rng, privileged, args.thinking)
    else:
        response = render_response(problem.solution, problem.answer, args.thinking)
    prompt = render_prompt(tokenizer, problem,
        *(("solution", problem.solution) if privileged else ()), thinking=args.thinking)
    return prompt, tokenizer.encode(response, add_special_tokens=False) + [tokenizer.eos_token_id]


def demonstration_length(tokenizer, problem, args):
    """Tokens of the longest demonstration of this problem, prompt and response."""
    prompt = render_prompt(tokenizer, problem, *(("solution", problem.solution)
        if args.privileged_frac else ()), thinking=args.thinking)
    response = render_response(problem.solution, problem.answer, args.thinking)
    return len(prompt) + len(tokenizer.encode(response, add_special_tokens=False)) + 1


def batches(step, model, tokenizer, problems, args):
    """Yields the examples of step, step + 1, ...: each fixed by the seed and the step alone."""
    by_length = lambda example: len(example[0]) + len(example[1])  # noqa: E731
    for window in itertools.count(step // WINDOW):
        rng = random.Random(f"{args.seed} {window}")
        size = WINDOW * args.batch_size
        drawn = draw(problems, window * size, size, args.seed)
        examples = sorted((build_example(tokenizer, p, rng, args) for p in drawn), key=by_length)
        prompt, response = examples[-1]
        check_context(model, len(prompt), len(response), "demonstration's prompt")
        cut = [examples[i : i + args.batch_size] for i in range(0, size, args.batch_size)]
        rng.shuffle(cut)
        yield from cut[max(0, step - window * WINDOW) :]


def new_model(problems, args):
    """From scratch: a tokenizer trained on the first problems, a model with random weights."""
    texts = [PRIVILEGED["solution"] + INSTRUCTION]
    for problem in problems[:5000]:
        response = render_response(problem.solution, problem.answer)
        texts += [problem.problem, response]
        if args.data == "arithmetic":
            texts += [demonstrate_arithmetic(problem, random.Random(0), privileged=False)]
    tokenizer = make_tokenizer(texts)
    return make_model(tokenizer, args.seed).to(args.device), tokenizer


# --------------------------------------------------------------------------------------------------
# The run


def run(args):
    problems = load_problems(args.data, args.columns)
    require_solutions(problems[0], args.data, "sft.py learns from")
    source = args.out if args.resume else args.init
    model, tokenizer = (load_model(source, args.device, args.attn_implementation,
        args.gradient_checkpointing) if source else new_model(problems[0], args))
    train, heldout = (fitting(part, model, 0, lambda p: demonstration_length(tokenizer, p, args))
        for part in problems)
    print(f"data: {args.data} ({len(train)} problems to train on, {len(heldout)} held out)",
        flush=True)
    optimizer = make_optimizer(model, args)
    state = start_run(args, optimizer)
    heldout = heldout[: args.eval_problems]
    sampler = make_sampler(model, tokenizer, heldout, args)
    interrupt = Interrupt(args, state["step"])
    if not args.resume:
        measure(0, sampler, heldout, args)

    stream = batches(state["step"], model, tokenizer, train, args)
    for step, examples in enumerate(stream, state["step"] + 1):
        if step > args.steps:
            break
        start = time.time()
        loss = accumulate_gradients(model, examples, args.micro_batch_size)
        metrics = optimizer_step(step, model, optimizer, loss, args)
        seconds = time.time() - start
        metrics |= {"time/train": seconds,
            "perf/tok_s": sum(len(p) + len(r) for p, r in examples) / seconds}
        append_jsonl(Path(args.out, "metrics.jsonl"), [{"step": step, **metrics}])
        print(f"sft   {step:5d}/{args.steps} | loss {loss:7.4f} | lr {metrics['lr']:.1e} | "
            f"grad {metrics['grad_norm']:7.3f} | {metrics['perf/tok_s']:7.0f} tok/s", flush=True)
        finish_step(step, model, tokenizer, sampler, heldout, optimizer, {}, interrupt, args)

    print(f"next: python rlvr.py --init {args.out}")


# --------------------------------------------------------------------------------------------------
# The same, word for word, in sft.py, rlvr.py and opsd.py (a test compares): flags, run, optimizer


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default, where it has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_common_flags(parser):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument_group("the same in every stage").add_argument
    add("--init", help="model to start from: a checkpoint folder or a Hugging Face name")
    add("--out", help="folder of this run: checkpoint, args.json, metrics.jsonl, samples.jsonl")
    add("--data", help="`arithmetic` (built in), a .jsonl file, or a Hugging Face data set: name, "
        "name:config, name:config:split, or a folder; default: what --init was trained on")
    add("--columns", default="", help="names of its columns, if others than usual: "
        "problem=Question,answer=Gold,solution=Steps")
    add("--thinking", action=argparse.BooleanOptionalAction, help="what is asked of chat templates "
        "that know thinking and not thinking; default: as --init was trained, or thinking")
    add("--steps", type=positive, help="optimizer steps")
    add("--batch-size", type=positive, help="a step's examples (sft) or prompts (rlvr, opsd)")
    add("--micro-batch-size", type=positive, help="sequences a forward pass; changes no gradient")
    add("--lr", type=float, help="learning rate of AdamW, at its peak")
    add("--min-lr-ratio", type=float, help="a cosine ends at this share of --lr; 1: constant")
    add("--warmup-steps", type=int, help="steps of linear warm-up")
    add("--weight-decay", type=float, help="AdamW's, on weight matrices")
    add("--grad-clip", type=float, help="gradient norm above which it is scaled down")
    add("--max-new-tokens", type=positive, help="a sampled response is cut off (truncated) here")
    add("--temperature", type=above_zero, help="of sampling, and of log-probs that score it")
    add("--seed", type=int, default=0, help="of data order, sampling, and a new model's weights")
    add("--device", default=device, help="cpu, cuda, cuda:1, mps")
    add("--dtype", choices=["float32", "bfloat16"], default="float32",
        help="of the computation; weights stay float32")
    add("--attn-implementation", help="sdpa, flash_attention_2, eager; default: the model's choice")
    add("--gradient-checkpointing", action="store_true",
        help="keep no activations, compute them again in the backward pass: less memory, slower")
    add("--sampler", choices=["hf", "vllm"], default="hf",
        help="who samples: plain transformers, or vLLM (pip install vllm==0.32.0; a GPU)")
    add("--vllm-memory", type=float, default=0.35, help="share of the GPU's memory for vLLM")
    add("--eval-every", type=positive, help="steps between two measurements on held-out problems")
    add("--eval-problems", type=positive, default=128, help="how many held-out problems")
    add("--save-every", type=positive, help="steps between two saves; the last is always saved")
    add("--resume", action="store_true", help="go on from --out, with its own flags")
    add("--stop-after", type=positive, help="save and stop after so many steps, as Ctrl-C would")
    add("--overwrite", action="store_true", help="delete what --out holds and start anew")


def positive(text):
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def above_zero(text):
    if float(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def parse_args(parser):
    """The flags; with --resume the saved ones, any given must agree. Refuses a folder in use."""
    args = parser.parse_args()
    out = Path(args.out)
    recover_checkpoint(out)
    if args.resume:
        if not (out / "trainer_state.pt").is_file():
            fail(f"--resume: nothing to resume in {out} (start without --resume, or name the run's "
                "folder with --out)")
        saved = json.loads((out / "args.json").read_text())
        if saved.keys() != vars(args).keys():
            fail(f"--resume: {out} is a run of another stage")
        free = {"resume", "stop_after", "overwrite", "out", "device"}
        parser.set_defaults(**{k: v for k, v in saved.items() if k not in free})
        args = parser.parse_args()
        free |= {"micro_batch_size", "gradient_checkpointing", "vllm_memory"}  # of memory only
        changed = [k for k, v in vars(args).items() if k not in free and v != saved[k]]
        if changed:
            flags = ", ".join(f"--{k.replace('_', '-')} (was {saved[k]})" for k in changed)
            fail(f"--resume: {out} was started with other flags: {flags}; leave them out")
    elif out.is_file() or out.is_dir() and any(out.iterdir()):
        if not args.overwrite:
            fail(f"{out} is not empty: --resume goes on with it, --overwrite deletes it, --out "
                "names another folder")
        if not (out / "args.json").is_file():
            fail(f"--overwrite: {out} holds no run, so it is not deleted; name another with --out")
    for flag, path in (("--init", args.init), ("--data", args.data)):
        if path and out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            fail(f"{flag} and --out are the same folder, or {flag} {path} lies in --out {out}: the "
                "run would overwrite what it starts from")
    require_device(args.device)
    saved = trained_with(args.init)
    if not args.data:
        args.data, args.columns = saved["data"], saved["columns"]
    if args.thinking is None:
        args.thinking = saved["thinking"]
    return args


def make_optimizer(model, args):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))


def optimizer_step(step, model, optimizer, loss, args):
    """One update at this step's rate -> metrics. A non-finite loss or gradient ends it unsaved."""
    progress = step / args.steps
    decay = args.min_lr_ratio + (1 - args.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
    lr = args.lr * decay * min(1.0, step / max(1, args.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip).item()
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        fail(f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so nothing was "
            f"updated or saved; what {args.out} holds is whole. "
            "Try a lower --lr or --dtype float32")
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, "lr": lr, "grad_norm": grad_norm}


def start_run(args, optimizer):
    """Makes the folder, or reads back where it stood -> the state to go on from."""
    out = Path(args.out)
    if not args.resume:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        (out / "args.json").write_text(json.dumps(vars(args), indent=1))
        return {"step": 0, "cursor": 0}
    state = torch.load(out / "trainer_state.pt", map_location=args.device)
    optimizer.load_state_dict(state.pop("optimizer"))
    for log in (out / "metrics.jsonl", out / "samples.jsonl"):  # drop what came after the save
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
        log.write_text("".join(x for x in whole if json.loads(x)["step"] <= state["step"]))
    return state


def save_checkpoint(args, model, tokenizer, optimizer, state):
    """Written beside, then renamed: a kill leaves one whole checkpoint (recover_checkpoint)."""
    out, new, old = Path(args.out), Path(f"{args.out}.new"), Path(f"{args.out}.old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    (new / "args.json").write_text(json.dumps(vars(args), indent=1))
    torch.save({**state, "optimizer": optimizer.state_dict()}, new / "trainer_state.pt")
    for log in out.glob("*.jsonl"):
        shutil.copy2(log, new)
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    new.rename(out)
    shutil.rmtree(old)


def append_jsonl(path, rows):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def log_samples(args, step, kind, rollouts):
    rows = [{"step": step, "kind": kind, **sample_row(r)} for r in rollouts]
    append_jsonl(Path(args.out, "samples.jsonl"), rows)


def measure(step, sampler, heldout, args):
    """Accuracy and length on the same held-out problems with the same luck: printed and logged."""
    rollouts = evaluate(sampler, heldout, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, thinking=args.thinking)
    row = {f"eval/{key.removeprefix('response/')}": value
        for key, value in summarize(rollouts).items()}
    append_jsonl(Path(args.out, "metrics.jsonl"), [{"step": step, **row}])
    log_samples(args, step, "eval", rollouts[:16])
    print(f"eval  {step:5d} | accuracy {row['eval/accuracy']:.3f} | "
        f"length {row['eval/len_mean']:6.1f} | truncated {row['eval/truncated']:.3f}", flush=True)


class Interrupt:
    """Ctrl-C (or SIGTERM) finishes the step and saves; a second one stops at once."""

    def __init__(self, args, step):
        self.asked, self.stop_step = False, step + args.stop_after if args.stop_after else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        print("\nstopping after this step, saving; once more to stop at once and lose what "
            "is not saved", flush=True)
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def now(self, step):
        return self.asked or step == self.stop_step


def finish_step(step, model, tokenizer, sampler, heldout, optimizer, state, interrupt, args):
    """Measures and saves when it is time to, and ends the run when that was asked for."""
    last = step == args.steps
    if last or step % args.eval_every == 0:
        sampler.sync(model)
        measure(step, sampler, heldout, args)
    stopping = interrupt.now(step) and not last
    if last or stopping or step % args.save_every == 0:
        save_checkpoint(args, model, tokenizer, optimizer, {**state, "step": step})
    if stopping:
        print(f"stopped after step {step}; go on with: "
            f"python {sys.argv[0]} --resume --out {args.out}")
        raise SystemExit(130 if interrupt.asked else 0)


def main():
    args = get_args()
    # cache_enabled=False: autocast would keep bfloat16 copies of weights that are updated since.
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, args.dtype == "bfloat16",
            cache_enabled=False):
        try:
            run(args)
        except torch.OutOfMemoryError:
            fail(f"out of memory on {args.device}: --resume goes on from the last save, also with "
                f"a lower --micro-batch-size (now {args.micro_batch_size}) or with "
                "--gradient-checkpointing; a new run may lower --max-new-tokens or take bfloat16")


if __name__ == "__main__":
    main()
