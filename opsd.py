"""opsd.py: on-policy self-distillation, the third stage: SFT -> RLVR -> OPSD (arXiv 2605.06188).

    python opsd.py --only-correct --init ckpt/rlvr      # the built-in world: half a minute
    python opsd.py --only-incorrect --init ckpt/rlvr    # the paper's counter-example; neither: all

The model is its own teacher. The student samples y given the problem x; the teacher, the same
weights at step 0, scores the same y given x and privileged context c (a reference solution).
Every position is pulled from what the student would say to what it would say if it knew c:

    L = E_{x, y ~ pi_S(.|x)} [ 1/|y| * sum_t KL( pi_S(.|x, y_<t) || pi_T(.|x, c, y_<t) ) ]

over the full vocabulary, in fp32, no gradient through pi_T; a mean over each response, then over
the kept. The paper: on correct ones this shortens and keeps accuracy, on incorrect ones it harms.

The divergence is the loss, differentiated through the student's logits. (As a policy-gradient
advantage it does nothing: the same for any sampled token, its expected gradient is zero.)

Memory: logits of a batch would be the run's largest tensors; they exist a chunk of tokens at a time
(rollout.in_chunks). Left out: top-k or sampled-token divergences, several GPUs.
"""

import argparse
import copy
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from rollout import check_context, collate, draw, evaluate, fail, fitting
from rollout import in_chunks, label_rollouts, load_model, load_problems, make_sampler
from rollout import micro_batches, recover_checkpoint, render_prompt, require_device
from rollout import require_solutions, response_hidden_states, sample_row, summarize
from rollout import token_log_probs, trained_with
from verify import verify_batch


def get_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Formatter)
    add_common_flags(parser)
    add = parser.add_argument_group("opsd").add_argument
    add("--only-correct", action="store_true", help="train on correct rollouts only: compresses")
    add("--only-incorrect", action="store_true",
        help="train on incorrect rollouts only: in the paper, harmful")
    add("--truncated", choices=["incorrect", "correct", "drop"], default="incorrect",
        help="what a rollout that was cut off counts as; the paper's code: incorrect")
    add("--divergence", choices=["reverse", "forward", "jsd", "split"], default="reverse",
        help="reverse: KL(S||T), the paper's; forward: KL(T||S); split: reverse on correct only")
    add("--beta", type=float, default=0.5, help="of jsd: the teacher's weight, between 0 and 1")
    add("--context", choices=["solution", "answer", "rollout", "concise", "none", "wrong-answer"],
        default="solution", help="what the teacher is shown; rollout: a correct sibling's answer")
    add("--teacher", choices=["frozen", "refresh", "ema"], default="frozen",
        help="weights of --init; the student's, every --refresh-every steps; their moving average")
    add("--refresh-every", type=positive, default=50, help="steps between refreshes of the teacher")
    add("--ema-decay", type=float, default=0.999, help="of --teacher ema")
    add("--group-size", type=positive, default=1, help="rollouts of each prompt")
    add("--match-budget", action="store_true", help="sample until --batch-size * --group-size are "
        "kept, to compare arms at equal budgets; the paper trains on what one batch gives")
    add("--max-refills", type=positive, default=20, help="batches --match-budget may add to a step")
    parser.set_defaults(init="ckpt/rlvr", out="ckpt/opsd", steps=40, batch_size=32,
        micro_batch_size=32, lr=2e-4, min_lr_ratio=1.0, warmup_steps=0, weight_decay=0.0,
        grad_clip=1.0, max_new_tokens=192, temperature=1.0, eval_every=20, save_every=20)
    args = parse_args(parser)
    if args.only_correct and args.only_incorrect:
        fail("--only-correct and --only-incorrect exclude each other; leave both out to train on "
            "all rollouts")
    if not 0 < args.beta < 1:
        fail(f"--beta {args.beta}: must lie between 0 and 1 (at the ends use --divergence forward "
            "or reverse)")
    if args.context == "rollout" and args.group_size < 2:
        fail("--context rollout shows the teacher another rollout of the same problem: give "
            "--group-size 2 or more")
    return args


# --------------------------------------------------------------------------------------------------
# The loss


def divergence(student_logits, teacher_logits, kind="reverse", beta=0.5, is_correct=None):
    """Divergence of student S and teacher T at each position, in fp32: (N, V), (N, V) -> (N,).
    jsd: beta * KL(T||M) + (1 - beta) * KL(S||M), M = beta * T + (1 - beta) * S (GKD, arXiv
    2306.13649, eq. 1), 0 at both ends of beta. split needs is_correct (N,) bool. The teacher's
    logits must carry no gradient."""
    student = F.log_softmax(student_logits.float(), -1)
    teacher = F.log_softmax(teacher_logits.float(), -1)
    kl = lambda p, q: (p.exp() * (p - q)).sum(-1)  # noqa: E731  KL(p || q) of log-probs
    if kind == "reverse":
        return kl(student, teacher)
    if kind == "forward":
        return kl(teacher, student)
    if kind == "split":
        return torch.where(is_correct, kl(student, teacher), kl(teacher, student))
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def chunked_divergence(student_hidden, teacher_hidden, student_head, teacher_head, is_correct,
        kind, beta, temperature=1.0):
    """`divergence` from hidden states (N, H), in chunks -> (N,). Same value, same gradient."""

    def of_chunk(student_chunk, teacher_chunk, correct_chunk):
        with torch.no_grad():
            teacher_logits = teacher_head(teacher_chunk) / temperature
        return (divergence(student_head(student_chunk) / temperature, teacher_logits, kind, beta,
            correct_chunk),)

    return in_chunks(of_chunk, student_head.out_features, student_hidden, teacher_hidden,
        is_correct)[0]


def token_divergence(student, teacher, rollouts, teacher_prompts, args):
    """Per-token divergence (N,) of some rollouts, response after response, N = all their tokens.
    Student and teacher read the same response ids after prompts of different width; only hidden
    states of response tokens are kept, in the same order on both sides."""
    responses = [r.response_ids for r in rollouts]
    student_hidden = response_hidden_states(student,
        *collate([r.prompt_ids for r in rollouts], responses, student.device))
    with torch.no_grad():
        teacher_hidden = response_hidden_states(teacher,
            *collate(teacher_prompts, responses, student.device))
    is_correct = torch.tensor([r.label == "correct" for r in rollouts for _ in r.response_ids],
        device=student.device)
    return chunked_divergence(student_hidden, teacher_hidden, student.get_output_embeddings(),
        teacher.get_output_embeddings(), is_correct, args.divergence, args.beta, args.temperature)


def accumulate_gradients(student, teacher, rollouts, teacher_prompts, args):
    """Adds the gradient of the batch's loss to .grad -> loss, [(rollout, divergences (|y|,))]."""
    loss, measured = 0.0, []
    items = list(zip(rollouts, teacher_prompts))
    for micro in micro_batches(items, args.micro_batch_size,
            lambda x: len(x[1]) + len(x[0].response_ids)):
        micro_rollouts, micro_prompts = zip(*micro)
        values = token_divergence(student, teacher, micro_rollouts, micro_prompts, args)  # (N,)
        per_response = values.split([len(r.response_ids) for r in micro_rollouts])
        micro_loss = sum(v.mean() for v in per_response) / len(rollouts)  # of the whole batch
        if micro_loss.requires_grad:
            micro_loss.backward()
        loss += micro_loss.item()
        measured += [(r, v.detach().cpu()) for r, v in zip(micro_rollouts, per_response)]
    return loss, measured


# --------------------------------------------------------------------------------------------------
# Which rollouts, and what the teacher is shown


def is_kept(rollout, args):
    """The filter the paper is about. It looks at single rollouts, not at groups."""
    label = rollout.label
    if label == "truncated":
        if args.truncated == "drop":
            return False
        label = args.truncated
    return (not (args.only_correct and label != "correct")
        and not (args.only_incorrect and label != "incorrect"))


def privileged_context(rollout, siblings, batch, context):
    """-> a key of rollout.PRIVILEGED and its text; () for no context; None: nothing to show."""
    problem = rollout.problem
    if context == "rollout":  # SDPO's: what a correct sibling says after its thinking
        texts = [r.text.rpartition("</think>")[2].strip() for r in siblings
            if r is not rollout and r.label == "correct"]
        return ("solution", texts[0]) if texts else None
    if context == "wrong-answer":  # a control: the answer of the next problem that has another
        start = next(i for i, p in enumerate(batch) if p is problem)
        others = [p.answer for p in batch[start:] + batch[:start]] + ["0", "1"]  # or else 0 or 1
        same = verify_batch([f"\\boxed{{{x}}}" for x in others], [problem.answer] * len(others))
        return ("answer", others[same.index(False)])
    return {"solution": ("solution", problem.solution), "answer": ("answer", problem.answer),
        "concise": ("concise",)}.get(context, ())


def teacher_prompt_length(tokenizer, problem, args):
    """Tokens of the prompt that the teacher will read of this problem, or a little more."""
    kind = {"rollout": "solution", "wrong-answer": "answer", "none": None}.get(
        args.context, args.context)
    shown = problem.solution if args.context == "solution" else problem.answer
    prompt = render_prompt(tokenizer, problem, kind, shown, thinking=args.thinking)
    return len(prompt) + (args.max_new_tokens if args.context == "rollout" else 0)


def sample_rollouts(sampler, problems, state, args):
    """-> all rollouts with their teacher prompts (None: nothing to show), and those that are kept.
    Moves state["cursor"], the position in the data, which also seeds the sampler."""
    everything, kept, budget = [], [], args.batch_size * args.group_size
    for _ in range(1 + (args.max_refills if args.match_budget else 0)):
        batch = draw(problems, state["cursor"], args.batch_size, args.seed)
        prompts = [render_prompt(sampler.tokenizer, p, thinking=args.thinking) for p in batch]
        rollouts = sampler.generate(prompts, args.group_size, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=args.seed * 1_000_003 + state["cursor"])
        state["cursor"] += args.batch_size
        label_rollouts(rollouts, batch, sampler.tokenizer)
        for i, rollout in enumerate(rollouts):
            first = i - i % args.group_size
            shown = privileged_context(
                rollout, rollouts[first : first + args.group_size], batch, args.context)
            prompt = None if shown is None else render_prompt(
                sampler.tokenizer, rollout.problem, *shown, thinking=args.thinking)
            everything.append((rollout, prompt))
            if prompt is not None and is_kept(rollout, args) and len(kept) < budget:
                kept.append((rollout, prompt))
        if len(kept) == budget:
            break
    return everything, kept


# --------------------------------------------------------------------------------------------------
# The run


def split_by_label_and_position(measured):
    """Mean divergence by label, and by first, middle and last third of the response."""
    parts = {f"distill/kl_{name}": []
        for name in ["correct", "incorrect", "truncated", "first", "middle", "last"]}
    for rollout, values in measured:
        parts[f"distill/kl_{rollout.label}"].append(values)
        for name, third in zip(["first", "middle", "last"], values.tensor_split(3)):
            parts[f"distill/kl_{name}"].append(third)
    return {key: torch.cat(values).mean().item() for key, values in parts.items()
        if sum(map(len, values))}


@torch.no_grad()
def sampler_mismatch(student, rollouts, args):
    """KL(sampler || student) a token of one micro-batch, the k3 estimate: 0 but for rounding."""
    some = rollouts[: args.micro_batch_size]
    input_ids, response_mask = collate([r.prompt_ids for r in some], [r.response_ids for r in some],
        student.device)
    log_probs, _ = token_log_probs(student, input_ids, response_mask, args.temperature)
    sampled = torch.tensor(sum((r.log_probs for r in some), []))
    log_ratio = log_probs[response_mask].cpu() - sampled
    return (log_ratio.exp() - 1 - log_ratio).mean().item()


@torch.no_grad()
def update_teacher(step, teacher, student, args):
    """--teacher: frozen does nothing here."""
    if args.teacher == "refresh" and step % args.refresh_every == 0:
        teacher.load_state_dict(student.state_dict())
    if args.teacher == "ema":
        for ours, theirs in zip(teacher.parameters(), student.parameters()):
            ours.lerp_(theirs, 1 - args.ema_decay)


def run(args):
    problems = load_problems(args.data, args.columns)
    if args.context == "solution":
        require_solutions(problems[0], args.data,
            "the teacher is shown (or choose another --context)")
    student, tokenizer = load_model(args.out if args.resume else args.init, args.device,
        args.attn_implementation, args.gradient_checkpointing)
    train, heldout = (fitting(part, student, args.max_new_tokens,
        lambda p: teacher_prompt_length(tokenizer, p, args)) for part in problems)
    print(f"data: {args.data} ({len(train)} problems to train on, {len(heldout)} held out)",
        flush=True)
    optimizer = make_optimizer(student, args)
    state = start_run(args, optimizer)
    teacher = (load_model(args.init, args.device, args.attn_implementation)[0]
        if args.resume else copy.deepcopy(student))
    teacher.requires_grad_(False)
    if "teacher" in state:
        teacher.load_state_dict(state["teacher"])
    heldout = heldout[: args.eval_problems]
    sampler = make_sampler(student, tokenizer, train + heldout, args)
    interrupt = Interrupt(args, state["step"])
    state, budget = {"skipped": 0, "short": 0, **state}, args.batch_size * args.group_size
    if not args.resume:
        measure(0, sampler, heldout, args)

    for step in range(state["step"] + 1, args.steps + 1):
        start = time.time()
        everything, kept = sample_rollouts(sampler, train, state, args)
        sampled = time.time()
        metrics = summarize([r for r, _ in everything])
        metrics |= {"distill/accuracy": metrics.pop("accuracy"),
            "distill/kept_frac": len(kept) / len(everything),
            "kl/sample_train": sampler_mismatch(student, [r for r, _ in everything], args)}
        state["short"] += args.match_budget and len(kept) < budget
        loss, measured = 0.0, []
        if kept:
            longest, prompt = max(kept, key=lambda x: len(x[1]) + len(x[0].response_ids))
            check_context(student, len(prompt), len(longest.response_ids), "teacher's prompt")
            loss, measured = accumulate_gradients(student, teacher, *zip(*kept), args)
            metrics |= {"distill/kl": loss} | optimizer_step(step, student, optimizer, loss, args)
            update_teacher(step, teacher, student, args)
        else:
            state["skipped"] += 1
        # What the first batch holds beyond the kept rollouts is measured too, without a gradient:
        # the KL by label tells most. Of what --match-budget adds, only the kept are measured.
        trained = {id(r) for r, _ in kept}
        others = [x for x in everything[:budget] if id(x[0]) not in trained and x[1] is not None]
        if others:
            with torch.no_grad():
                measured += accumulate_gradients(student, teacher, *zip(*others), args)[1]
        metrics |= split_by_label_and_position(measured)
        sampler.sync(student)
        tokens = sum(len(r.response_ids) for r, _ in everything)
        metrics |= {"time/rollout": sampled - start, "time/train": time.time() - sampled}
        metrics["perf/tok_s"] = tokens / metrics["time/rollout"]
        append_jsonl(Path(args.out, "metrics.jsonl"), [{"step": step, **metrics}])
        log_samples(args, step, "train", [r for r, _ in everything[:16]])
        print(f"opsd  {step:5d}/{args.steps} | kl {loss:.4f} "
            f"(correct {metrics.get('distill/kl_correct', math.nan):.4f}, "
            f"incorrect {metrics.get('distill/kl_incorrect', math.nan):.4f}) | kept {len(kept):3d}/"
            f"{len(everything):3d} | accuracy {metrics['distill/accuracy']:.3f} | length "
            f"{metrics['response/len_mean']:6.1f} | {time.time() - start:4.1f} s", flush=True)
        if args.teacher != "frozen":
            state["teacher"] = teacher.state_dict()
        finish_step(step, student, tokenizer, sampler, heldout, optimizer, state, interrupt, args)

    if state["skipped"]:
        print(f"{state['skipped']} of {args.steps} steps had no rollout to keep and were skipped")
    if state["short"]:
        print(f"{state['short']} of {args.steps} steps kept fewer than {budget} rollouts after "
            f"{args.max_refills} refills")
    print(f"next: python eval.py {args.init} {args.out}")


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
