"""rlvr.py: reinforcement learning with verifiable rewards, the second stage: SFT -> RLVR -> OPSD.

    python rlvr.py --init ckpt/sft                       # the built-in world: 2 minutes on 2 cores
    python rlvr.py --init ckpt/sft --data my.jsonl       # your problems

GRPO (arXiv 2402.03300) as run today. Sample G responses to each of P prompts from the policy;
verify.py gives each a reward r of 1 or 0; its advantage is how far it stands out in its group,

    A_i = (r_i - mean(r)) / std(r)                              compute_group_normalized_rewards
    L   = - 1/N sum_i sum_t min(rho A_i, clip(rho, 1 - low, 1 + high) A_i)        grpo_clip_loss

with rho = pi(y_t) / pi_old(y_t), log pi_old as the sampler gave it, N the tokens of all kept
responses. What differs from the 2024 form, and who proposed it: a higher upper clip, token mean,
groups without variance dropped (DAPO, arXiv 2503.14476); --no-std and --loss-normalization
constant (Dr. GRPO, arXiv 2503.20783); no KL term unless asked for.

With one update a batch rho is about 1, the loss near 0 and its gradient not: watch the reward.

Left out: value network, reward model, soft length penalties, asynchronous sampling, several GPUs.
"""

import argparse
import importlib
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from rollout import collate, draw, evaluate, fail, fitting, label_rollouts
from rollout import load_model, load_problems, make_sampler, micro_batches, recover_checkpoint
from rollout import render_prompt, require_device, sample_row, summarize, token_log_probs
from rollout import trained_with


def get_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Formatter)
    add_common_flags(parser)
    add = parser.add_argument_group("rlvr").add_argument
    add("--group-size", type=positive, default=8, help="responses to each prompt, to be compared")
    add("--std", action=argparse.BooleanOptionalAction, default=True,
        help="divide advantages by the group's std, so very easy and very hard prompts weigh more")
    add("--clip-low", type=float, default=0.2, help="a ratio under 1 - this is pushed down no more")
    add("--clip-high", type=float, default=0.28,
        help="a ratio over 1 + this is pushed up no more; above --clip-low it explores")
    add("--ratio-cap", type=float, default=3.0,
        help="cap on policy/sampler ratios, which clipping leaves unbounded at negative advantage")
    add("--updates-per-batch", type=positive, default=1, help="updates on a batch; 1 is on-policy")
    add("--loss-normalization", choices=["token", "sequence", "constant"], default="token",
        help="mean over all tokens; of each response's mean; or sum over --max-new-tokens")
    add("--kl-coef", type=float, default=0.0, help="weight of the KL to --init (needs two models)")
    add("--truncated", choices=["penalize", "mask"], default="penalize",
        help="a response that is cut off gets reward 0, or also no gradient")
    add("--reward", metavar="MODULE:FUNCTION", default="",
        help="your (response, gold) -> float, in place of verify.py's 0 or 1; cut off is 0 still")
    add("--refill", type=int, default=0,
        help="up to so many fresh batches a step to replace groups without variance")
    parser.set_defaults(init="ckpt/sft", out="ckpt/rlvr", steps=50, batch_size=32,
        micro_batch_size=64, lr=1e-4, min_lr_ratio=1.0, warmup_steps=5, weight_decay=0.0,
        grad_clip=1.0, max_new_tokens=192, temperature=1.0, eval_every=25, save_every=25)
    args = parse_args(parser)
    if args.refill < 0:
        fail(f"--refill {args.refill}: must be 0 or more batches")
    return args


# --------------------------------------------------------------------------------------------------
# The loss


def compute_group_normalized_rewards(rewards, group_size, use_std=True, eps=1e-6):
    """Advantages (P * G,) of rewards (P * G,), by group; population std. Equal rewards: zeros."""
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if use_std:
        advantages = advantages / (groups.std(1, keepdim=True, correction=0) + eps)
    return advantages.view(-1)


def grpo_clip_loss(policy_log_probs, old_log_probs, advantages, clip_low, clip_high,
        ratio_cap=math.inf):
    """Per-token loss and whether the clip took its gradient, from (B, T), (B, T), (B, 1).

    PPO's clipped objective (arXiv 1707.06347, eq. 7), with separate clips, and a cap for A < 0.
    """
    ratio = torch.exp(policy_log_probs - old_log_probs).clamp(max=ratio_cap)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    unclipped_objective, clipped_objective = ratio * advantages, clipped * advantages
    return (-torch.min(unclipped_objective, clipped_objective),
        clipped_objective < unclipped_objective)


def kl_to_reference(policy_log_probs, ref_log_probs):
    """Schulman's k3 estimate of KL(policy || ref) a token: r - 1 - log r >= 0, r = ref / policy."""
    log_ratio = ref_log_probs - policy_log_probs
    return torch.exp(log_ratio) - 1 - log_ratio


def sequence_weights(lengths, normalization, max_new_tokens):
    """What each token of a response weighs in the loss, (B,) from the WHOLE batch's lengths (B,).

    token: 1/N, N all tokens.  sequence: 1/(B |y|).  constant: 1/(B L), length-neutral (Dr. GRPO).
    """
    if normalization == "token":
        return torch.ones_like(lengths) / lengths.sum()
    if normalization == "sequence":
        return 1 / (len(lengths) * lengths)
    return torch.ones_like(lengths) / (len(lengths) * max_new_tokens)


def accumulate_gradients(model, reference, rollouts, advantages, args):
    """Adds the gradient of the batch's loss to .grad, by micro-batches; returns token-mean metrics.

    rollouts: those kept; advantages: a float each. A weighted sum, weights fixed before the split.
    """
    lengths = torch.tensor([float(len(r.response_ids)) for r in rollouts])
    weights = sequence_weights(lengths, args.loss_normalization, args.max_new_tokens)
    sums = dict.fromkeys(["loss", "entropy", "ratio/clip_frac", "kl/sample_train", "kl/ref"], 0.0)
    items = list(zip(rollouts, advantages, weights.tolist()))
    for micro in micro_batches(items, args.micro_batch_size,
            lambda x: len(x[0].prompt_ids) + len(x[0].response_ids)):
        micro_rollouts, micro_advantages, micro_weights = zip(*micro)
        input_ids, response_mask = collate([r.prompt_ids for r in micro_rollouts],
            [r.response_ids for r in micro_rollouts], model.device)
        column = lambda values: torch.tensor(values, device=model.device)[:, None]  # noqa: E731
        old_log_probs = torch.zeros(input_ids.shape, device=model.device)
        old_log_probs[response_mask] = torch.tensor(
            sum((r.log_probs for r in micro_rollouts), []), device=model.device)
        policy_log_probs, entropy = token_log_probs(
            model, input_ids, response_mask, args.temperature)
        token_loss, clipped = grpo_clip_loss(policy_log_probs, old_log_probs,
            column(micro_advantages), args.clip_low, args.clip_high, args.ratio_cap)
        if reference is not None:
            with torch.no_grad():
                ref_log_probs, _ = token_log_probs(
                    reference, input_ids, response_mask, args.temperature)
            kl_ref = kl_to_reference(policy_log_probs, ref_log_probs)
            token_loss = token_loss + args.kl_coef * kl_ref
            sums["kl/ref"] += kl_ref[response_mask].sum().item()
        loss = (token_loss * response_mask * column(micro_weights)).sum()
        loss.backward()
        sums["loss"] += loss.item()
        sums["entropy"] += entropy[response_mask].sum().item()
        sums["ratio/clip_frac"] += clipped[response_mask].sum().item()
        # KL(sampler || trainer), k3 from the sampler's side: 0 up to rounding if they are the same.
        kl_train = kl_to_reference(old_log_probs, policy_log_probs.detach())
        sums["kl/sample_train"] += kl_train[response_mask].sum().item()
    return {key: value if key == "loss" else value / lengths.sum().item()
        for key, value in sums.items()}


# --------------------------------------------------------------------------------------------------
# The run


def load_reward(name):
    """"my_rewards:score" -> the function score of my_rewards.py in this folder (or an installed
    package), which takes (response, gold) and returns a number; "" -> None."""
    if not name:
        return None
    sys.path.insert(0, "")
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        fail(f"--reward {name}: {error}; give MODULE:FUNCTION, as in my_rewards:score")


def reward_of(rollout, function):
    """1 for a correct response, or what --reward says of it; 0 for one that is cut off."""
    if function is None or not rollout.finished:
        return float(rollout.label == "correct")
    reward = function(rollout.text, rollout.problem.answer)
    try:
        finite = math.isfinite(reward)
    except TypeError:
        finite = False
    if not finite:
        fail(f"--reward returned {reward!r}, not a finite number, for {rollout.text[-200:]!r}")
    return float(reward)


def sample_groups(sampler, problems, state, args, reward=None):
    """batch_size prompts x group_size -> all rollouts, the kept, their advantages, groups kept.

    Moves state["cursor"], the position in the data, which also seeds the sampler. A group whose
    rewards are all equal teaches nothing and is dropped; with --refill, fresh groups replace it.
    """
    everything, kept, kept_advantages, groups = [], [], [], 0
    for _ in range(1 + args.refill):
        batch = draw(problems, state["cursor"], args.batch_size, args.seed)
        prompts = [render_prompt(sampler.tokenizer, p, thinking=args.thinking) for p in batch]
        rollouts = sampler.generate(prompts, args.group_size, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=args.seed * 1_000_003 + state["cursor"])
        state["cursor"] += args.batch_size
        everything += label_rollouts(rollouts, batch, sampler.tokenizer)
        for rollout in rollouts:
            rollout.reward = reward_of(rollout, reward)
        rewards = [rollout.reward for rollout in rollouts]
        advantages = compute_group_normalized_rewards(
            torch.tensor(rewards), args.group_size, args.std).tolist()
        for start in range(0, len(rollouts), args.group_size):
            group = range(start, start + args.group_size)
            if groups == args.batch_size or len({rewards[i] for i in group}) == 1:
                continue
            groups += 1
            for i in group:
                if args.truncated == "penalize" or rollouts[i].finished:
                    kept.append(rollouts[i])
                    kept_advantages.append(advantages[i])
        if groups == args.batch_size:
            break
    return everything, kept, kept_advantages, groups


def run(args):
    reward = load_reward(args.reward)
    problems = load_problems(args.data, args.columns)
    model, tokenizer = load_model(args.out if args.resume else args.init, args.device,
        args.attn_implementation, args.gradient_checkpointing)
    train, heldout = (fitting(part, model, args.max_new_tokens,
        lambda p: len(render_prompt(tokenizer, p, thinking=args.thinking))) for part in problems)
    print(f"data: {args.data} ({len(train)} problems to train on, {len(heldout)} held out)",
        flush=True)
    reference = (load_model(args.init, args.device, args.attn_implementation)[0]
        if args.kl_coef else None)
    optimizer = make_optimizer(model, args)
    state = start_run(args, optimizer)
    heldout = heldout[: args.eval_problems]
    sampler = make_sampler(model, tokenizer, train + heldout, args)
    interrupt = Interrupt(args, state["step"])
    if not args.resume:
        measure(0, sampler, heldout, args)

    for step in range(state["step"] + 1, args.steps + 1):
        start = time.time()
        rollouts, kept, advantages, groups = sample_groups(sampler, train, state, args, reward)
        sampled = time.time()
        metrics = summarize(rollouts)
        metrics["reward/mean"] = sum(rollout.reward for rollout in rollouts) / len(rollouts)
        metrics["reward/frac_zero_std"] = 1 - groups / (len(rollouts) / args.group_size)
        for update in range(args.updates_per_batch if kept else 0):
            of_update = accumulate_gradients(model, reference, kept, advantages, args)
            of_update |= optimizer_step(step, model, optimizer, of_update["loss"], args)
            metrics = (of_update | metrics if update == 0
                else metrics | {"ratio/clip_frac": of_update["ratio/clip_frac"]})
        sampler.sync(model)
        tokens = sum(len(r.response_ids) for r in rollouts)
        metrics |= {"time/rollout": sampled - start, "time/train": time.time() - sampled}
        metrics["perf/tok_s"] = tokens / metrics["time/rollout"]
        append_jsonl(Path(args.out, "metrics.jsonl"), [{"step": step, **metrics}])
        log_samples(args, step, "train", rollouts[:16])
        print(f"rlvr  {step:5d}/{args.steps} | reward {metrics['reward/mean']:.3f} | "
            f"length {metrics['response/len_mean']:6.1f} | "
            f"truncated {metrics['response/truncated']:.3f} | "
            f"zero-std {metrics['reward/frac_zero_std']:.2f} | "
            f"entropy {metrics.get('entropy', math.nan):.3f} | "
            f"grad {metrics.get('grad_norm', 0):6.3f} | {time.time() - start:5.1f} s", flush=True)
        finish_step(step, model, tokenizer, sampler, heldout, optimizer, state, interrupt, args)

    print(f"next: python opsd.py --only-correct --init {args.out}")


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
