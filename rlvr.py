"""rlvr.py: reinforcement learning with verifiable rewards, the second stage: SFT -> RLVR -> OPSD.

    python rlvr.py --init ckpt/sft                       # the built-in world: 2-5 min on 2 cores
    python rlvr.py --init ckpt/sft --data my.jsonl       # your problems

GRPO (arXiv 2402.03300) as run today. Sample G responses to each of P prompts from the policy.
verify.py gives each a reward r of 1 or 0. A response's advantage is how far it stands out in its
group, and the loss makes its tokens more likely (A > 0) or less likely (A < 0):

    A_i = (r_i - mean(r)) / std(r)                               compute_group_normalized_rewards
    L   = - 1/N sum_i sum_t min(rho A_i, clip(rho, 1 - low, 1 + high) A_i)         grpo_clip_loss
    rho = min(pi(y_t) / pi_old(y_t), cap)

pi_old is the policy that sampled, its log-probs as the sampler gave them. N is the number of tokens
of all kept responses. The cap (--ratio-cap) is on by default: for A < 0 nothing else bounds rho.

What differs from the 2024 form, and who proposed it: a higher upper clip, token mean, groups
without variance dropped (DAPO, arXiv 2503.14476); --no-std and --loss-normalization constant
(Dr. GRPO, arXiv 2503.20783); no KL term unless asked for.

With one update per batch rho is about 1. Then the loss is the mean of -A, near 0 (within 0.1 or so,
as responses differ in length), and its gradient is -1/N sum A grad log pi(y_t), which is not. So
the loss says nothing: watch the reward.

Left out: value network, reward model, soft length penalties, asynchronous sampling.
"""

import argparse
import importlib
import math
import sys
import time
from pathlib import Path

import torch

from rollout import Formatter, Interrupt, add_run_flags, append_jsonl, clip_gradients, collate, draw
from rollout import evaluate, fail, fitting_prompts, k3_kl, label_rollouts, load_initial, load_model
from rollout import load_problems, log_samples, make_sampler, micro_batches, not_negative, number
from rollout import once, parse_args, positive, render_prompt, run_in, sampler_log_probs
from rollout import save_checkpoint, shard, share, start_run, sum_of, summarize, token_log_probs
from rollout import train_mode


def get_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Formatter)
    add = parser.add_argument
    add("--init", default="ckpt/sft",
        help="model to start from: a checkpoint folder or a Hugging Face name")
    add("--out", default="ckpt/rlvr", help="the folder of this run: checkpoint, flags, logs")
    add("--data", help="`arithmetic` or `arithmetic:parity` (built in), a .jsonl file, or a Hugging"
        " Face data set: name, name:config, name:config:split, or a folder; default: what --init "
        "was trained on")
    add("--reward", metavar="MODULE:FUNCTION", default="",
        help="your (response, gold) -> float, not verify.py's 0 or 1; what is cut off still gets 0")
    add("--steps", type=positive, default=50, help="optimizer steps")
    add("--batch-size", type=positive, default=32, help="prompts a step")
    add("--group-size", type=positive, default=8, help="responses to each prompt, to be compared")
    add("--refill", type=number(0, kind=int), default=0,
        help="up to so many fresh batches a step to replace groups without variance")
    add("--truncated", choices=["penalize", "mask"], default="penalize",
        help="a response that is cut off gets reward 0; mask: its tokens get no gradient either, "
        "while its 0 still counts in its group's mean")
    add("--std", action=argparse.BooleanOptionalAction, default=True,
        help="divide advantages by the group's std, so very easy and very hard prompts weigh more")
    add("--clip-low", type=not_negative, default=0.2,
        help="with A < 0, a token whose ratio is under 1 - this gets no gradient")
    add("--clip-high", type=not_negative, default=0.28,
        help="with A > 0, a token whose ratio is over 1 + this gets no gradient; above --clip-low "
        "it lets unlikely tokens grow, so the policy goes on exploring")
    add("--ratio-cap", type=number(1), default=3.0,
        help="cap on policy/sampler ratios, which clipping leaves unbounded at negative advantage")
    add("--loss-normalization", choices=["token", "sequence", "constant"], default="token",
        help="mean over all tokens; of each response's mean; or sum over --max-new-tokens")
    add("--kl-coef", type=not_negative, default=0.0,
        help="weight of the KL to --init (needs two models)")
    add("--updates-per-batch", type=positive, default=1,
        help="updates on a batch, each on the whole of it; 1 is on-policy")
    add("--micro-batch-size", type=positive, default=64, help="sequences at a time; memory only")
    add("--lr", type=not_negative, default=1e-4, help="learning rate of AdamW, at its peak")
    add("--min-lr-ratio", type=share, default=1.0, help="the cosine's end, a share of --lr")
    add("--warmup-steps", type=number(0, kind=int), default=5, help="steps of linear warm-up")
    add("--weight-decay", type=not_negative, default=0.0, help="AdamW's, on weight matrices")
    add("--grad-clip", type=number(1e-6), default=1.0, help="largest norm of a gradient")
    add("--max-new-tokens", type=positive, default=192,
        help="where a response is cut off: truncated")
    add("--temperature", type=number(0.01), default=1.0, help="of sampling, and of its log-probs")
    add("--eval-every", type=positive, default=25, help="steps between two measurements")
    add("--save-every", type=positive, default=25, help="steps between two saves")
    add_run_flags(parser)
    return parse_args(parser)


# --------------------------------------------------------------------------------------------------
# The loss


def compute_group_normalized_rewards(rewards, group_size, use_std=True, eps=1e-6):
    """Advantages (P * G,) of rewards (P * G,), by group; population std. Equal rewards: zeros."""
    groups = rewards.view(-1, group_size)  # (P, G)
    advantages = groups - groups.mean(1, keepdim=True)
    if use_std:  # Dr. GRPO leaves it out
        advantages = advantages / (groups.std(1, keepdim=True, correction=0) + eps)
    return advantages.view(-1)


def grpo_clip_loss(policy_log_probs, old_log_probs, advantages, clip_low, clip_high,
        ratio_cap=math.inf):
    """Per-token loss (B, T), and whether the clip took the token's gradient (B, T) bool.

    policy_log_probs, old_log_probs (B, T), advantages (B, 1). PPO's clipped objective (arXiv
    1707.06347, eq. 7) with a clip for each side, and a cap on the ratio, which counts for A < 0, as
    in dual-clip PPO (arXiv 1912.09729): above the cap the gradient is 0, too.
    """
    ratio = torch.exp(policy_log_probs - old_log_probs).clamp(max=ratio_cap)  # rho
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    unclipped_objective, clipped_objective = ratio * advantages, clipped * advantages
    return (-torch.min(unclipped_objective, clipped_objective),
        clipped_objective < unclipped_objective)


def sequence_weights(lengths, normalization, max_new_tokens):
    """What each token of a response weighs in the loss, (B,) from the WHOLE batch's lengths (B,).

    token: 1 / all tokens. sequence: 1 / (responses * this response's tokens). constant: 1 /
    (responses * max_new_tokens), which is neutral to length (Dr. GRPO).
    """
    if normalization == "token":
        return torch.ones_like(lengths) / lengths.sum()
    if normalization == "sequence":
        return 1 / (len(lengths) * lengths)
    return torch.ones_like(lengths) / (len(lengths) * max_new_tokens)


def accumulate_gradients(model, reference, rollouts, args):
    """Adds the gradient of the batch's loss to .grad, by micro-batches; returns token-mean metrics.

    rollouts: those kept, each with its advantage. The loss is one weighted sum over all tokens. Its
    weights are fixed before the split, so the micro-batch size changes no gradient.
    """
    train_mode(model)  # --gradient-checkpointing asks for it; there is no dropout
    lengths = torch.tensor([float(len(r.response_ids)) for r in rollouts])
    weights = sequence_weights(lengths, args.loss_normalization, args.max_new_tokens)
    for rollout, weight in zip(rollouts, weights.tolist()):
        rollout.weight = weight
    sums = dict.fromkeys(["loss", "entropy", "ratio/clip_frac", "kl/sample_train", "kl/ref"], 0.0)
    for micro in micro_batches(rollouts, args.micro_batch_size):
        input_ids, response_mask = collate([r.prompt_ids for r in micro],
            [r.response_ids for r in micro], model.device)  # (B, T) each
        advantages = torch.tensor([[r.advantage] for r in micro], device=model.device)  # (B, 1)
        weights = torch.tensor([[r.weight] for r in micro], device=model.device)  # (B, 1)
        old_log_probs = sampler_log_probs(micro, response_mask)  # (B, T)
        policy_log_probs, entropy = token_log_probs(
            model, input_ids, response_mask, args.temperature)  # (B, T) each
        token_loss, clipped = grpo_clip_loss(policy_log_probs, old_log_probs, advantages,
            args.clip_low, args.clip_high, args.ratio_cap)
        if reference is not None:
            with torch.no_grad():
                ref_log_probs, _ = token_log_probs(
                    reference, input_ids, response_mask, args.temperature)
            # Its value estimates KL(policy || reference). Its gradient, as in GRPO, is that of
            # KL(reference || policy): k3 is unbiased as a value, not as a loss.
            kl_ref = k3_kl(policy_log_probs, ref_log_probs)
            token_loss = token_loss + args.kl_coef * kl_ref
            sums["kl/ref"] += kl_ref[response_mask].sum().item()
        loss = (token_loss * response_mask * weights).sum()
        loss.backward()
        sums["loss"] += loss.item()
        sums["entropy"] += entropy[response_mask].sum().item()
        sums["ratio/clip_frac"] += clipped[response_mask].sum().item()
        # KL(sampler || trainer): 0 up to rounding, if the two are the same policy.
        kl_train = k3_kl(old_log_probs, policy_log_probs.detach())
        sums["kl/sample_train"] += kl_train[response_mask].sum().item()
    num_tokens = lengths.sum().item()
    sums = {name: sum_of(value) for name, value in sums.items()}
    return {name: value if name == "loss" else value / num_tokens for name, value in sums.items()}


# --------------------------------------------------------------------------------------------------
# Rewards and groups


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


def rewards_of(rollouts, function):
    return [reward_of(rollout, function) for rollout in rollouts]


def sample_groups(sampler, problems, state, args, reward_function=None):
    """batch_size prompts x group_size -> all rollouts, those kept, the share of uniform groups.

    A uniform group, one whose rewards are all equal, has no signal and is dropped. With --refill,
    fresh batches replace such groups, until batch_size groups are kept. Moves state["cursor"], the
    position in the data, which seeds the sampler too.
    """
    rollouts, kept = [], []
    groups = groups_kept = groups_uniform = 0
    for _ in range(1 + args.refill):
        batch = draw(problems, state["cursor"], args.batch_size, args.seed)
        prompts = [render_prompt(sampler.tokenizer, p, thinking=args.thinking) for p in batch]
        sampled = sampler.generate(prompts, args.group_size, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=args.seed * 1_000_003 + state["cursor"])
        state["cursor"] += args.batch_size
        rollouts += label_rollouts(sampled, batch, sampler.tokenizer)
        rewards = once(rewards_of, sampled, reward_function)
        for rollout, reward in zip(sampled, rewards):
            rollout.reward = reward
        advantages = compute_group_normalized_rewards(
            torch.tensor([r.reward for r in sampled]), args.group_size, args.std)
        for rollout, advantage in zip(sampled, advantages.tolist()):
            rollout.advantage = advantage
        for start in range(0, len(sampled), args.group_size):
            group = sampled[start : start + args.group_size]
            groups += 1
            if len({r.reward for r in group}) == 1:
                groups_uniform += 1
            elif groups_kept < args.batch_size:
                groups_kept += 1
                kept += [r for r in group if args.truncated == "penalize" or r.finished]
        if groups_kept == args.batch_size:
            break
    return rollouts, kept, groups_uniform / groups


# --------------------------------------------------------------------------------------------------
# The optimizer, and measuring: the same in all three stages


def make_optimizer(model, args):
    """AdamW. Weight decay is for matrices: on the gain of a norm it would pull 1 towards 0. On a
    GPU it is fused: otherwise the step itself takes 4 more bytes a parameter."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
        {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=matrices[0].is_cuda)


def optimizer_step(step, model, optimizer, loss, args):
    """One update -> metrics. Linear warm-up, then a cosine down to --min-lr-ratio (1: constant). A
    loss or gradient that is not finite ends the run, and nothing of this step is saved."""
    decay = (1 + math.cos(math.pi * step / args.steps)) / 2  # from 1 down to 0
    lr = args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * decay)
    lr *= min(1.0, step / max(1, args.warmup_steps))
    for group in optimizer.param_groups:
        group["lr"] = lr
    grad_norm = clip_gradients(model, args.grad_clip)
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        fail(f"step {step}: loss {loss}, gradient norm {grad_norm}: not finite, so nothing was "
            f"updated or saved; what {args.out} holds is whole. "
            "Try a lower --lr or --dtype float32")
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, "lr": lr, "grad_norm": grad_norm}


def measure(step, sampler, heldout, args):
    """Accuracy and length on the held-out problems, printed and logged. Every time they are sampled
    with the same random numbers, so that what changes is the model."""
    rollouts = evaluate(sampler, heldout, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, thinking=args.thinking)
    row = {f"eval/{name.removeprefix('response/')}": value
        for name, value in summarize(rollouts).items()}
    append_jsonl(Path(args.out, "metrics.jsonl"), [{"step": step, **row}])
    log_samples(args, step, "eval", rollouts[:16])
    print(f"eval  {step:5d} | accuracy {row['eval/accuracy']:.3f} | "
        f"length {row['eval/len_mean']:6.1f} | truncated {row['eval/truncated']:.3f}", flush=True)


# --------------------------------------------------------------------------------------------------
# The run


def run(args):
    # Where to start: the policy, the problems that fit its context, perhaps a frozen reference.
    reward_function = load_reward(args.reward)
    train, heldout = load_problems(args.data, args.columns)
    model, tokenizer = load_model(args.out if args.resume else args.init, args.device,
        args.attn_implementation, args.gradient_checkpointing)
    model = shard(model, args.device)
    train = fitting_prompts(train, model, tokenizer, args)
    heldout = fitting_prompts(heldout, model, tokenizer, args)
    print(f"data: {args.data} ({len(train)} problems to train on, {len(heldout)} held out)")
    heldout = heldout[: args.eval_problems]
    optimizer = make_optimizer(model, args)
    sampler = make_sampler(model, tokenizer, train + heldout, args)
    state = start_run(args, model, tokenizer, optimizer)
    reference = shard(load_initial(args, state), args.device) if args.kl_coef else None
    interrupt = Interrupt(args, state["step"])
    if not args.resume:
        measure(0, sampler, heldout, args)

    for step in range(state["step"] + 1, args.steps + 1):
        # Sample from the policy as it is now: what it learns from are its own responses.
        start = time.time()
        rollouts, kept, frac_zero_std = sample_groups(
            sampler, train, state, args, reward_function)
        sampled = time.time()
        metrics = summarize(rollouts)
        metrics["reward/mean"] = sum(r.reward for r in rollouts) / len(rollouts)
        metrics["reward/frac_zero_std"] = frac_zero_std

        # Update. Where every group is uniform, nothing is kept and the weights stay as they are.
        if kept:
            metrics |= accumulate_gradients(model, reference, kept, args)
            metrics |= optimizer_step(step, model, optimizer, metrics["loss"], args)
            # More updates on the same rollouts are off policy. Only their clipping is logged.
            for _ in range(args.updates_per_batch - 1):
                more = accumulate_gradients(model, reference, kept, args)
                optimizer_step(step, model, optimizer, more["loss"], args)
                metrics["ratio/clip_frac"] = more["ratio/clip_frac"]

        # The sampler gets the new weights before it is used again (vllm; hf shares them anyway).
        sampler.sync(model)

        # Log it.
        metrics |= {"time/rollout": sampled - start, "time/train": time.time() - sampled}
        tokens = sum(len(r.response_ids) for r in rollouts)
        metrics["perf/tok_s"] = tokens / metrics["time/rollout"]
        append_jsonl(Path(args.out, "metrics.jsonl"), [{"step": step, **metrics}])
        log_samples(args, step, "train", rollouts[:16])
        print(f"rlvr  {step:5d}/{args.steps} | reward {metrics['reward/mean']:.3f} | "
            f"length {metrics['response/len_mean']:6.1f} | "
            f"truncated {metrics['response/truncated']:.3f} | "
            f"zero-std {metrics['reward/frac_zero_std']:.2f} | "
            f"entropy {metrics.get('entropy', math.nan):.3f} | "
            f"grad {metrics.get('grad_norm', 0):6.3f} | {time.time() - start:5.1f} s", flush=True)

        # The end of a step: measure, save and stop, each when it is time to.
        last = step == args.steps
        if last or step % args.eval_every == 0:
            measure(step, sampler, heldout, args)
        stopping = interrupt.now(step) and not last
        if last or stopping or step % args.save_every == 0:
            save_checkpoint(args, model, tokenizer, optimizer, {**state, "step": step})
        if stopping:
            interrupt.stop(step)

    print(f"next: python opsd.py --only-correct --init {args.out}")


def main():
    args = get_args()
    with run_in(args.out, args):
        run(args)


if __name__ == "__main__":
    main()
