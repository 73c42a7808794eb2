"""opsd.py: on-policy self-distillation, the third stage: SFT -> RLVR -> OPSD (arXiv 2605.06188).

    python opsd.py --only-correct --init ckpt/rlvr      # the built-in world: a minute
    python opsd.py --only-incorrect --init ckpt/rlvr    # the paper's counter-example; neither: all

The model is its own teacher. The student samples y given the problem x. The teacher, the same
weights at step 0, scores the same y given x and privileged context c (a reference solution).
Every position is pulled from what the student would say to what it would say if it knew c:

    L    = E_{x, y ~ pi_S(.|x)} [ 1/|y| * sum_t KL_t ]
    KL_t = KL( pi_S(.|x, y_<t) || pi_T(.|x, c, y_<t) )      over the full vocabulary, in fp32

a mean over each response, then over those that are kept, so that a long response counts no more
than a short one. The paper: trained on correct responses
this shortens and keeps accuracy; trained on incorrect ones it does harm.

The gradient. KL_t is differentiated through the student's logits, and nothing flows into pi_T. The
sampled y counts as a constant, as if it were data. The exact gradient has one more term, because
pi_S also decides which y is sampled: it would make a token less likely where the KL of the tokens
after it is large. The paper leaves it out, as GKD does (arXiv 2306.13649), and so does this file.

KL_t is a loss, not an advantage. Used as the advantage of y_t in a policy gradient, it does nothing
to that token: it is the same number whatever y_t is, so E[KL_t * grad log pi_S(y_t)] = KL_t * grad
sum_v pi_S(v) = KL_t * grad 1 = 0. (A filter on whole responses leaves a remainder, which is not the
gradient of L either.) What does depend on y_t is log pi_T(y_t) - log pi_S(y_t): as an advantage its
expected gradient is that of -KL_t, with more noise.

Logits of a batch would be the run's largest tensors; they exist a chunk of tokens at a time
(rollout.in_chunks). Left out: top-k or sampled-token divergences.
"""

import argparse
import math
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from rollout import Formatter, Head, Interrupt, Problem, add_run_flags, append_jsonl, check_context
from rollout import clip_gradients, collate, draw, evaluate, fail, fitting, fitting_prompts
from rollout import in_chunks, k3_kl, label_rollouts, load_initial, load_model, load_problems
from rollout import log_prob_and_entropy, log_samples, make_sampler, merge, micro_batches
from rollout import not_negative, number, once, own_context, parse_args, positive, render_prompt
from rollout import require_solutions, reshard, response_hidden_states, run_in, save_checkpoint
from rollout import shard, share, start_run, sum_of, summarize, train_mode
from verify import verify_batch


def get_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Formatter)
    add = parser.add_argument
    add("--init", default="ckpt/rlvr",
        help="model to start from: a checkpoint folder or a Hugging Face name")
    add("--out", default="ckpt/opsd", help="the folder of this run: checkpoint, flags, logs")
    add("--data", help="`arithmetic` or `arithmetic:parity` (built in), a .jsonl file, or a Hugging"
        " Face data set: name, name:config, name:config:split, or a folder; default: what --init "
        "was trained on")
    add("--only-correct", action="store_true", help="train on correct rollouts only: compresses")
    add("--only-incorrect", action="store_true",
        help="train on incorrect rollouts only: in the paper, harmful")
    add("--truncated", choices=["incorrect", "correct", "drop"], default="incorrect",
        help="what a rollout that was cut off counts as; the paper's code: incorrect")
    add("--context", choices=["solution", "answer", "concise", "rollout", "none", "other-solution",
        "wrong-answer"], default="solution", help="what the teacher is shown; rollout: a correct "
        "sibling's answer; other-solution and wrong-answer: those of another problem")
    add("--divergence", choices=["reverse", "forward", "jsd", "split"], default="reverse",
        help="reverse: KL(S||T), the paper's; forward: KL(T||S); split: reverse on correct only")
    add("--beta", type=float, default=0.5, help="of jsd: the teacher's weight, between 0 and 1")
    add("--token-clip", type=number(1e-6), help="a token's divergence counts no more than this, in "
        "nats, and a token above it has no gradient; default: no clip")
    add("--teacher", choices=["frozen", "refresh", "ema"], default="frozen",
        help="weights of --init; the student's, every --refresh-every steps; their moving average")
    add("--refresh-every", type=positive, default=50, help="steps between refreshes of the teacher")
    add("--ema-decay", type=share, default=0.999, help="of --teacher ema")
    add("--steps", type=positive, default=40, help="optimizer steps")
    add("--batch-size", type=positive, default=32, help="prompts a step")
    add("--group-size", type=positive, default=1, help="rollouts of each prompt")
    add("--match-budget", action="store_true", help="sample until --batch-size * --group-size are "
        "kept, to compare arms at equal budgets; the paper trains on what one batch gives")
    add("--max-refills", type=positive, default=40, help="batches --match-budget may add to a step")
    add("--micro-batch-size", type=positive, default=32, help="sequences at a time; memory only")
    add("--lr", type=not_negative, default=2e-4, help="learning rate of AdamW, at its peak")
    add("--min-lr-ratio", type=share, default=1.0, help="the cosine's end, a share of --lr")
    add("--warmup-steps", type=number(0, kind=int), default=0, help="steps of linear warm-up")
    add("--weight-decay", type=not_negative, default=0.0, help="AdamW's, on weight matrices")
    add("--grad-clip", type=number(1e-6), default=1.0, help="largest norm of a gradient")
    add("--max-new-tokens", type=positive, default=192,
        help="where a response is cut off: truncated")
    add("--temperature", type=number(0.01), default=1.0, help="of sampling, and of its log-probs")
    add("--eval-every", type=positive, default=20, help="steps between two measurements")
    add("--save-every", type=positive, default=20, help="steps between two saves")
    add_run_flags(parser)
    args = parse_args(parser)
    if args.only_correct and args.only_incorrect:
        fail("--only-correct and --only-incorrect exclude each other; neither: all rollouts")
    if not 0 < args.beta < 1:
        fail(f"--beta {args.beta} not in (0, 1); at its ends, use --divergence forward or reverse")
    if args.teacher == "refresh" and args.refresh_every > args.steps:
        fail(f"--refresh-every {args.refresh_every}: never, in {args.steps} steps; give fewer")
    if args.context == "rollout" and args.group_size < 2:
        fail("--context rollout shows the teacher a sibling rollout: give --group-size 2 or more")
    return args


FORK = 0.5  # nats of entropy: from here on a token is a fork, where responses part


# --------------------------------------------------------------------------------------------------
# The loss


def kl_divergence(p_log_probs, q_log_probs):
    """KL(p || q) = sum_v p(v) log(p(v) / q(v)), (N, V), (N, V) -> (N,)."""
    return (p_log_probs.exp() * (p_log_probs - q_log_probs)).sum(-1)


def divergence(student_logits, teacher_logits, kind="reverse", beta=0.5, is_correct=None):
    """Divergence of student S and teacher T at each position, in fp32: (N, V), (N, V) -> (N,).

    reverse: KL(S || T), the paper's.    forward: KL(T || S).
    split: reverse where is_correct (N,) bool, forward elsewhere.
    jsd: beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S (GKD, arXiv 2306.13649,
    eq. 1); it is 0 at both ends of beta. The teacher's logits must carry no gradient.
    """
    student = F.log_softmax(student_logits.float(), -1)
    teacher = F.log_softmax(teacher_logits.float(), -1)
    if kind == "reverse":
        return kl_divergence(student, teacher)
    if kind == "forward":
        return kl_divergence(teacher, student)
    if kind == "split":
        return torch.where(
            is_correct, kl_divergence(student, teacher), kl_divergence(teacher, student))
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)


def token_values(student, teacher, rollouts, args):
    """Of each token of some rollouts, response after response: divergence (with its gradient), the
    student's entropy, the student's log-prob: (N,) each, N all their tokens.

    Student and teacher read the same response ids after prompts of different width. Only hidden
    states of response tokens are kept, in the same order on both sides.
    """
    responses = [r.response_ids for r in rollouts]
    input_ids, response_mask = collate(
        [r.prompt_ids for r in rollouts], responses, student.device)  # (B, T) each
    student_hidden = response_hidden_states(student, input_ids, response_mask)  # (N, H)
    with torch.no_grad():
        teacher_hidden = response_hidden_states(teacher,
            *collate([r.teacher_prompt_ids for r in rollouts], responses, student.device))
    is_correct = torch.tensor([r.label == "correct" for r in rollouts for _ in r.response_ids],
        dtype=torch.bool, device=student.device)  # (N,)
    return chunked_values(student_hidden, teacher_hidden, Head(student), Head(teacher),
        input_ids[response_mask], is_correct, args.divergence, args.beta, args.temperature)


def chunked_values(student_hidden, teacher_hidden, student_head, teacher_head, ids, is_correct,
        kind, beta, temperature=1.0):
    """`token_values` from hidden states (N, H), a chunk of tokens at a time. The value and the
    gradient of the divergence are those of all tokens at once."""

    def of_chunk(student_chunk, teacher_chunk, ids_chunk, correct_chunk):
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_chunk) / temperature
        student_logits = student_head(student_chunk) / temperature
        with torch.no_grad():
            log_prob, entropy = log_prob_and_entropy(
                F.log_softmax(student_logits.float(), -1), ids_chunk)
        values = divergence(student_logits, teacher_logits, kind, beta, correct_chunk)
        return values, entropy, log_prob

    return in_chunks(of_chunk, student_head.out_features, student_hidden, teacher_hidden, ids,
        is_correct)


def teacher_length(rollout):
    """Tokens of what the teacher reads, the longer of the two."""
    return len(rollout.teacher_prompt_ids) + len(rollout.response_ids)


def accumulate_gradients(student, teacher, rollouts, args):
    """Adds the gradient of the batch's loss to .grad, by micro-batches; returns the loss. Fills in
    what each rollout's tokens measured. Under torch.no_grad it only measures."""
    train_mode(student)  # --gradient-checkpointing asks for it; there is no dropout
    loss = 0.0
    for micro in micro_batches(rollouts, args.micro_batch_size, teacher_length):
        lengths = [len(r.response_ids) for r in micro]
        values = token_values(student, teacher, micro, args)  # three (N,)
        counted = values[0] if args.token_clip is None else values[0].clamp(max=args.token_clip)
        # 1/|y| sum_t, then the mean over the whole batch, of which this is a part. (max: what fills
        # up a process's share, rollout.deal, has no response.)
        micro_loss = sum(v.sum() / max(1, len(v)) for v in counted.split(lengths)) / len(rollouts)
        if torch.is_grad_enabled():
            micro_loss.backward()
        loss += micro_loss.item()
        of_each = torch.stack([v.detach().float() for v in values]).cpu().split(lengths, 1)
        for rollout, measured in zip(micro, of_each):
            rollout.token_values = measured
    for rollout, measured in zip(rollouts, merge([r.token_values for r in rollouts])):
        rollout.token_values = measured
    return sum_of(loss)


# --------------------------------------------------------------------------------------------------
# Which rollouts, and what the teacher is shown


def is_kept(rollout, args):
    """Whether to train on a rollout: the filter that the paper is about. It looks at one rollout
    at a time, not at groups.

    rollout.label is correct, incorrect or truncated. A truncated one counts as --truncated says:
    as incorrect, as correct, or as neither (drop), and then it is never kept. --only-correct keeps
    what counts as correct, --only-incorrect what counts as incorrect, neither flag both.
    """
    label = args.truncated if rollout.label == "truncated" else rollout.label
    if args.only_correct:
        return label == "correct"
    if args.only_incorrect:
        return label == "incorrect"
    return label != "drop"


def other_problem(problem, batch):
    """For the controls: the next problem of the batch whose answer differs from this one's. If all
    are equal, one without a solution, whose answer is 0 or 1."""
    start = next(i for i, p in enumerate(batch) if p is problem)
    for other in batch[start + 1 :] + batch[:start] + [Problem("", "0"), Problem("", "1")]:
        if not once(verify_batch, [f"\\boxed{{{other.answer}}}"], [problem.answer])[0]:
            return other


def teacher_prompt(tokenizer, rollout, siblings, batch, args):
    """What the teacher reads in place of the student's prompt -> ids; None: nothing to show."""
    problem, context = rollout.problem, args.context
    shown = own_context(problem, context)
    if context == "wrong-answer":
        context, shown = "answer", other_problem(problem, batch).answer
    elif context == "other-solution":
        context, shown = "solution", other_problem(problem, batch).solution
    elif context == "rollout":  # SDPO's: what a correct sibling says after its thinking
        correct = [r for r in siblings if r is not rollout and r.label == "correct"]
        if not correct:
            return None
        context, shown = "solution", correct[0].text.rpartition("</think>")[2].strip()
    elif context == "none":  # the student's own prompt
        context = None
    return render_prompt(tokenizer, problem, context, shown, args.thinking)


def teacher_prompt_length(tokenizer, problem, args):
    """Tokens of the prompt that the teacher will read of this problem, or a little more."""
    context = "solution" if args.context in ("solution", "other-solution") else "answer"
    ids = render_prompt(tokenizer, problem, context, own_context(problem, context), args.thinking)
    room = args.max_new_tokens if args.context == "rollout" else 0  # a sibling is not known yet
    return len(ids) + room


def sample_rollouts(sampler, problems, state, args):
    """-> all rollouts, with what the teacher reads of each, and those that are kept.

    With --match-budget, batches are added until batch_size * group_size are kept. As many as that
    should take are sampled in one call: a sampler likes many rows. Moves state["cursor"], the
    position in the data, which seeds the sampler too, and state["kept_frac"].
    """
    rollouts, kept = [], []
    budget = args.batch_size * args.group_size
    left = 1 + (args.max_refills if args.match_budget else 0)  # batches that may be sampled
    at_once = min(left, math.ceil(1 / state["kept_frac"]))
    while left and len(kept) < budget:
        batch = draw(problems, state["cursor"], at_once * args.batch_size, args.seed)
        prompts = [render_prompt(sampler.tokenizer, p, thinking=args.thinking) for p in batch]
        sampled = sampler.generate(prompts, args.group_size, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=args.seed * 1_000_003 + state["cursor"])
        state["cursor"] += len(batch)
        left -= at_once
        rollouts += label_rollouts(sampled, batch, sampler.tokenizer)
        for i, rollout in enumerate(sampled):
            first = i - i % args.group_size
            siblings = sampled[first : first + args.group_size]
            rollout.teacher_prompt_ids = teacher_prompt(
                sampler.tokenizer, rollout, siblings, batch, args)
            if rollout.teacher_prompt_ids is not None and is_kept(rollout, args):
                kept.append(rollout)
        state["kept_frac"] = max(1, len(kept)) / len(rollouts)
        batches_needed = (budget - len(kept)) / state["kept_frac"] / budget
        at_once = min(left, math.ceil(batches_needed))
    return rollouts, kept[:budget]


@torch.no_grad()
def update_teacher(step, teacher, student, args):
    """The teacher's weights after `step` updates of the student, changed in place.

    --teacher frozen: they stay. refresh: they become a copy of the student's, at every
    args.refresh_every-th step. ema: at every step, with d = args.ema_decay,
    teacher <- d * teacher + (1 - d) * student.
    """
    reshard(teacher)  # what scored this step's rollouts
    if args.teacher == "refresh" and step % args.refresh_every == 0:
        teacher.load_state_dict(student.state_dict())
    if args.teacher == "ema":
        for teacher_weight, student_weight in zip(teacher.parameters(), student.parameters()):
            teacher_weight.lerp_(student_weight, 1 - args.ema_decay)


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


def sampler_mismatch(rollouts):
    """KL(sampler || student) a token: 0 up to rounding, if the two are one model."""
    sampler = torch.tensor([x for r in rollouts for x in r.log_probs])
    student = torch.cat([r.token_values[2] for r in rollouts])
    return k3_kl(sampler, student).mean().item()


def summarize_tokens(rollouts):
    """Means over the tokens of the rollouts that were measured: divergence by label and by third of
    the response; by label the student's entropy, and the share of forks: tokens above FORK nats."""
    values = defaultdict(list)
    for rollout in rollouts:
        if rollout.token_values is not None:
            divergences, entropies, _ = rollout.token_values
            values[f"kl_{rollout.label}"].append(divergences)
            values[f"entropy_{rollout.label}"].append(entropies)
            values[f"forks_{rollout.label}"].append((entropies > FORK).float())
            for third, part in zip(["first", "middle", "last"], divergences.tensor_split(3)):
                values[f"kl_{third}"].append(part)
    joined = {name: torch.cat(parts) for name, parts in values.items()}
    return {f"distill/{name}": x.mean().item() for name, x in joined.items() if len(x)}


# --------------------------------------------------------------------------------------------------
# The run


def run(args):
    # Where to start: the student, and the problems whose teacher's prompt fits the context.
    train, heldout = load_problems(args.data, args.columns)
    if args.context in ("solution", "other-solution"):
        require_solutions(train, args.data,
            "the teacher is shown (or choose another --context)")
    student, tokenizer = load_model(args.out if args.resume else args.init, args.device,
        args.attn_implementation, args.gradient_checkpointing)
    student = shard(student, args.device)

    def prompt_length(problem):
        return teacher_prompt_length(tokenizer, problem, args)

    train = fitting(train, student, args.max_new_tokens, prompt_length)
    heldout = fitting_prompts(heldout, student, tokenizer, args)
    print(f"data: {args.data} ({len(train)} problems to train on, {len(heldout)} held out)")
    heldout = heldout[: args.eval_problems]
    optimizer = make_optimizer(student, args)
    sampler = make_sampler(student, tokenizer, train + heldout, args)
    state = start_run(args, student, tokenizer, optimizer)
    state.setdefault("skipped", 0)  # steps in which nothing was kept
    state.setdefault("short", 0)  # steps in which --match-budget was not met
    state.setdefault("kept_frac", 1.0)  # of the rollouts of the step before

    # The teacher: the weights of step 0, which are those of --init. A teacher that moves is saved.
    teacher = load_initial(args, state)
    if "teacher" in state:
        teacher.load_state_dict(state["teacher"])
    teacher = shard(teacher.requires_grad_(False), args.device)
    interrupt = Interrupt(args, state["step"])
    if not args.resume:
        measure(0, sampler, heldout, args)

    budget = args.batch_size * args.group_size
    for step in range(state["step"] + 1, args.steps + 1):
        # Sample from the student as it is now, and keep what the filter lets through.
        start = time.time()
        rollouts, kept = sample_rollouts(sampler, train, state, args)
        sampled = time.time()
        metrics = summarize(rollouts)
        metrics["distill/accuracy"] = metrics.pop("accuracy")
        metrics["distill/kept_frac"] = len(kept) / len(rollouts)
        if args.match_budget and len(kept) < budget:
            state["short"] += 1

        # The loss and its gradient, on what is kept.
        for r in kept:
            check_context(
                student, len(r.teacher_prompt_ids), len(r.response_ids), "teacher's prompt")
        loss = accumulate_gradients(student, teacher, kept, args)

        # Now and then measure the KL of the first batch's other rollouts too, with the same weights
        # and without a gradient. KL by label tells most, but they can be ten times as many.
        last = step == args.steps
        if step == 1 or last or step % args.eval_every == 0:
            others = [r for r in rollouts[:budget]
                if r.token_values is None and r.teacher_prompt_ids is not None]
            with torch.no_grad():
                accumulate_gradients(student, teacher, others, args)
        metrics |= summarize_tokens(rollouts)

        # Update. The paper's code skips a step in which nothing is kept, and so does this.
        if kept:
            metrics |= {"distill/kl": loss, "kl/sample_train": sampler_mismatch(kept)}
            metrics |= optimizer_step(step, student, optimizer, loss, args)
            update_teacher(step, teacher, student, args)
        else:
            state["skipped"] += 1

        # The sampler gets the new weights before it is used again (vllm; hf shares them anyway).
        sampler.sync(student)

        # Log it.
        metrics |= {"time/rollout": sampled - start, "time/train": time.time() - sampled}
        tokens = sum(len(r.response_ids) for r in rollouts)
        metrics["perf/tok_s"] = tokens / metrics["time/rollout"]
        append_jsonl(Path(args.out, "metrics.jsonl"), [{"step": step, **metrics}])
        log_samples(args, step, "train", rollouts[:16])
        print(f"opsd  {step:5d}/{args.steps} | kl {loss:.4f} | kept {len(kept):3d}/"
            f"{len(rollouts):3d} | accuracy {metrics['distill/accuracy']:.3f} | length "
            f"{metrics['response/len_mean']:6.1f} | {time.time() - start:4.1f} s", flush=True)

        # The end of a step: measure, save and stop, each when it is time to.
        if last or step % args.eval_every == 0:
            measure(step, sampler, heldout, args)
        stopping = interrupt.now(step) and not last
        if last or stopping or step % args.save_every == 0:
            if args.teacher != "frozen":
                state["teacher"] = teacher.state_dict()
            save_checkpoint(args, student, tokenizer, optimizer, {**state, "step": step})
        if stopping:
            interrupt.stop(step)

    if state["skipped"]:
        print(f"{state['skipped']} of {args.steps} steps had no rollout to keep and were skipped")
    if state["short"]:
        print(f"{state['short']} of {args.steps} steps kept fewer than {budget} rollouts after "
            f"{args.max_refills} refills")
    print(f"next: python eval.py {args.init} {args.out}")


def main():
    args = get_args()
    with run_in(args.out, args):
        run(args)


if __name__ == "__main__":
    main()
