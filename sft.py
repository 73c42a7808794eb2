"""sft.py: supervised fine-tuning, the first of three stages: SFT -> RLVR -> OPSD.

    python sft.py                                           # the built-in world: 7-11 min on 2 cores
    python sft.py --data my.jsonl                           # your problems, from scratch
    python sft.py --data my.jsonl --init Qwen/Qwen3-0.6B    # your problems, a pretrained model

Maximum likelihood of demonstrations y given their prompts x, response tokens only:

    L = - 1/N * sum over the batch, sum_t log pi(y_t | x, y_<t)    N = the batch's response tokens

What is easy to get wrong, and where it is done: EOS is part of y, or the model never learns to stop
(`build_example`). N is counted before the split into micro-batches, or the gradient depends on it
(`accumulate_gradients`). The prompt is rendered as for sampling (`rollout.render_prompt`).

The built-in world has a writer who slips and checks (`demonstrate_arithmetic`). For a share of the
demonstrations, --privileged-frac, the writer is told something (CONTEXTS), in exactly the words
that opsd.py's teacher will read, and is brief. So a new model learns what a pretrained one knows
already: whoever holds the solution can follow it, and need not check.

Left out: packing examples into one row (batches of like length waste little), LoRA.
"""

import argparse
import math
import random
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rollout import APPLY, BUILT_IN, Formatter, INSTRUCTION, Interrupt, PRIVILEGED, add_run_flags
from rollout import answer_of, append_jsonl, check_context, clip_gradients, collate, draw, evaluate
from rollout import fail, fitting, fitting_prompts, load_model, load_problems, log_samples
from rollout import make_sampler, micro_batches, not_negative, number, opened_thinking, own_context
from rollout import parse_args, positive, render_prompt, require_solutions, run_in, save_checkpoint
from rollout import sequence_length, shard, share, start_run, sum_of, summarize, token_log_probs
from rollout import train_mode


def get_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Formatter)
    add = parser.add_argument
    add("--init", help="model to start from: a checkpoint folder or a Hugging Face name; without "
        "it a tiny one is made from scratch")
    add("--out", default="ckpt/sft", help="the folder of this run: checkpoint, flags, logs")
    add("--data", help="`arithmetic` or `arithmetic:parity` (built in), a .jsonl file, or a Hugging"
        " Face data set: name, name:config, name:config:split, or a folder; default: what --init "
        "was trained on")
    add("--privileged-frac", type=share, default=0.5,
        help="share of demonstrations whose prompt is that of opsd.py's teacher")
    add("--steps", type=positive, default=2200, help="optimizer steps")
    add("--batch-size", type=positive, default=32, help="demonstrations a step")
    add("--micro-batch-size", type=positive, default=32, help="sequences at a time; memory only")
    add("--lr", type=not_negative, default=5e-3, help="learning rate of AdamW, at its peak")
    add("--min-lr-ratio", type=share, default=0.05, help="the cosine's end, a share of --lr")
    add("--warmup-steps", type=number(0, kind=int), default=50, help="steps of linear warm-up")
    add("--weight-decay", type=not_negative, default=0.1, help="AdamW's, on weight matrices")
    add("--grad-clip", type=number(1e-6), default=1.0, help="largest norm of a gradient")
    add("--max-new-tokens", type=positive, default=192,
        help="where a response is cut off: truncated")
    add("--temperature", type=number(0.01), default=1.0, help="of sampling, and of its log-probs")
    add("--eval-every", type=positive, default=500, help="steps between two measurements")
    add("--save-every", type=positive, default=500, help="steps between two saves")
    add_run_flags(parser)
    return parse_args(parser)


# --------------------------------------------------------------------------------------------------
# The loss


def sft_loss(policy_log_probs, response_mask, num_tokens):
    """Negative log-likelihood of responses, divided by num_tokens, the whole batch's count.

    policy_log_probs (B, T), response_mask (B, T) bool, num_tokens int -> scalar.
    """
    return -(policy_log_probs * response_mask).sum() / num_tokens


def accumulate_gradients(model, examples, micro_batch_size):
    """Adds the gradient of the batch's loss to .grad, by micro-batches; returns the loss."""
    train_mode(model)  # --gradient-checkpointing asks for it; there is no dropout
    num_tokens = sum(len(example.response_ids) for example in examples)
    loss = 0.0
    for micro in micro_batches(examples, micro_batch_size):
        input_ids, response_mask = collate([example.prompt_ids for example in micro],
            [example.response_ids for example in micro], model.device)  # (B, T) each
        policy_log_probs, _ = token_log_probs(model, input_ids, response_mask)  # (B, T)
        micro_loss = sft_loss(policy_log_probs, response_mask, num_tokens)
        micro_loss.backward()
        loss += micro_loss.item()
    return sum_of(loss)


# --------------------------------------------------------------------------------------------------
# Demonstrations

SLIP, CHECK = 0.13, 0.5  # an ordinary writer: P(first result wrong), P(check it), P(check again)
TOLD_CHECK = 0.05  # a writer who is told something hardly ever checks
MISTOLD = 0.5  # P(a told answer is random): were it always right, a good chain need not look at it
CONTEXTS = {"solution": 2, "answer": 3, "concise": 1, "rollout": 1}  # told what: how often
WINDOW = 32  # batches that are drawn together, so that each can be of like length


@dataclass
class Example:
    prompt_ids: list[int]
    response_ids: list[int]  # EOS included


def demonstrate_arithmetic(problem, rng, context=None, think=True):
    """The built-in world's demonstration: the chain worked aloud. Returns response text.

    A first result is a slip (off by 1, 2 or 10; for parity by 1) with probability SLIP; the chain
    goes on from it. After each result the writer checks with probability CHECK, again and again. A
    check is right: it mends a slip. Without thinking nobody checks.

    context: one of CONTEXTS, what the writer is told; None: nothing. Who is told anything hardly
    ever checks. Who is told a solution, or what another wrote (rollout), makes no slips. Who is
    told the answer writes it in the box, whatever the chain gave. (`build_example` makes
    half of the told answers random.)
    """
    slip = 0.0 if context in ("solution", "rollout") else SLIP
    sizes = [-1, 1] if problem.answer in ("yes", "no") else [-10, -2, -1, 1, 2, 10]
    check = TOLD_CHECK if context else CHECK
    check = check if think else 0.0
    thinking, value = [], None
    for first, op, b in re.findall(r"(\d+)([-+*])(\d+)=", problem.solution):
        value = int(first) if value is None else value
        right = written = APPLY[op](value, int(b))
        if rng.random() < slip:
            written = max(0, right + rng.choice(sizes))
        thinking.append(f"{value}{op}{b}={written}.")
        while rng.random() < check:
            thinking.append(f"Wait, {value}{op}{b}={right} {'ok' if written == right else 'no'}.")
            written = right
        value = written
    boxed = problem.answer if context == "answer" else answer_of(problem.problem, value)
    return render_response(" ".join(thinking), boxed, think)


def render_response(steps, answer, think=True):
    """Steps and answer as a response. A solution that is a whole response stays as it is; without
    thinking, what it says after it."""
    if not think:
        steps = steps.rpartition("</think>")[2]
        return steps if "\\boxed{" in steps else f"{steps} \\boxed{{{answer}}}"
    return steps if "</think>" in steps else f"<think>{steps}</think>\\boxed{{{answer}}}"


def demonstration_prompt(tokenizer, problem, context, args):
    """The ids before a demonstration whose writer is told `context`: what opsd.py's teacher reads.
    Of what another wrote (rollout) it is told what follows the thinking, as there."""
    shown = own_context(problem, context)
    if context == "rollout":
        response = render_response(problem.solution, problem.answer, args.thinking)
        context, shown = "solution", response.rpartition("</think>")[2].strip()
    return render_prompt(tokenizer, problem, context, shown, args.thinking)


def build_example(tokenizer, problem, rng, args):
    """One demonstration. The response is encoded apart from its prompt, as it is when sampled, and
    ends in EOS. Where the chat template opens `<think>`, the response starts inside it. In the
    built-in world, half of the told answers are random; the chain is that of the problem."""
    told = rng.random() < args.privileged_frac
    context = rng.choices(list(CONTEXTS), CONTEXTS.values())[0] if told else None
    if args.data in BUILT_IN:
        if context == "answer" and rng.random() < MISTOLD:
            problem = replace(problem, answer=answer_of(problem.problem, rng.randrange(100)))
        response = demonstrate_arithmetic(problem, rng, context, args.thinking)
    else:
        response = render_response(problem.solution, problem.answer, args.thinking)
    prompt_ids = demonstration_prompt(tokenizer, problem, context, args)
    if opened := opened_thinking(tokenizer.decode(prompt_ids)):
        response = response.removeprefix(opened).removeprefix("<think>")
    response_ids = tokenizer.encode(response, add_special_tokens=False)
    return Example(prompt_ids, response_ids + [tokenizer.eos_token_id])


def demonstration_length(tokenizer, problem, args):
    """Tokens of the longest demonstration of this problem, prompt and response."""
    contexts = CONTEXTS if args.privileged_frac else [None]
    prompts = [demonstration_prompt(tokenizer, problem, context, args) for context in contexts]
    response = render_response(problem.solution, problem.answer, args.thinking)
    response_ids = tokenizer.encode(response, add_special_tokens=False)
    return max(map(len, prompts)) + len(response_ids) + 1


def draw_batches(window, model, tokenizer, problems, args):
    """The examples of steps WINDOW * window + 1 and on, WINDOW batches of them.

    Each batch is of like length, and the batches come in random order. The seed and `window` fix
    everything: a resumed run sees what it would have seen.
    """
    rng = random.Random(f"{args.seed} {window}")
    size = WINDOW * args.batch_size
    drawn = draw(problems, window * size, size, args.seed)
    examples = [build_example(tokenizer, problem, rng, args) for problem in drawn]
    examples.sort(key=sequence_length)
    prompt_tokens, new_tokens = len(examples[-1].prompt_ids), len(examples[-1].response_ids)
    check_context(model, prompt_tokens, new_tokens, "demonstration's prompt")
    batches = [examples[i : i + args.batch_size] for i in range(0, size, args.batch_size)]
    rng.shuffle(batches)
    return batches


# --------------------------------------------------------------------------------------------------
# A model from scratch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined"
    " and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def make_tokenizer(texts, vocab_size=2048):
    """Byte-level BPE of `texts`: single digits, <think> and </think> as tokens, pad not EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special,
        show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>",
        eos_token="<|end|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer, seed):
    """A tiny Qwen3 (about 0.4 M parameters) with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=2048,
        initializer_range=0.06,  # 1/sqrt(fan-in) or so; the usual 0.02 learns half as fast here
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def new_model(problems, args):
    """A tokenizer trained on the first problems, and a model with random weights."""
    texts = [told + INSTRUCTION for told in PRIVILEGED.values()] * 2  # twice: a word is a token
    for problem in problems[:5000]:
        texts += [problem.problem, render_response(problem.solution, problem.answer)]
        if args.data in BUILT_IN:
            texts += [demonstrate_arithmetic(problem, random.Random(0))]
    tokenizer = make_tokenizer(texts)
    return make_model(tokenizer, args.seed).to(args.device), tokenizer


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
    # Where to start: the model, and the problems that fit its context.
    train, heldout = load_problems(args.data, args.columns)
    require_solutions(train, args.data, "sft.py learns from")
    source = args.out if args.resume else args.init
    if source:
        model, tokenizer = load_model(
            source, args.device, args.attn_implementation, args.gradient_checkpointing)
    else:
        model, tokenizer = new_model(train, args)
    model = shard(model, args.device)

    def total_length(problem):
        return demonstration_length(tokenizer, problem, args)

    train = fitting(train, model, 0, total_length)
    heldout = fitting_prompts(heldout, model, tokenizer, args)
    print(f"data: {args.data} ({len(train)} problems to train on, {len(heldout)} held out)")
    heldout = heldout[: args.eval_problems]
    optimizer = make_optimizer(model, args)
    sampler = make_sampler(model, tokenizer, heldout, args)
    state = start_run(args, model, tokenizer, optimizer)
    interrupt = Interrupt(args, state["step"])
    if not args.resume:
        measure(0, sampler, heldout, args)

    batches = None
    for step in range(state["step"] + 1, args.steps + 1):
        # Examples are built a window at a time: sorted by length, little of a batch is padding.
        window, place = divmod(step - 1, WINDOW)
        if place == 0 or batches is None:  # a new window, or --resume in the middle of one
            batches = draw_batches(window, model, tokenizer, train, args)
        examples = batches[place]

        # One update: the gradient of the whole batch, then AdamW.
        start = time.time()
        loss = accumulate_gradients(model, examples, args.micro_batch_size)
        metrics = optimizer_step(step, model, optimizer, loss, args)

        # Log it.
        seconds = time.time() - start
        tokens = sum(sequence_length(example) for example in examples)
        metrics |= {"time/train": seconds, "perf/tok_s": tokens / seconds}
        append_jsonl(Path(args.out, "metrics.jsonl"), [{"step": step, **metrics}])
        print(f"sft   {step:5d}/{args.steps} | loss {loss:7.4f} | lr {metrics['lr']:.1e} | "
            f"grad {metrics['grad_norm']:7.3f} | {metrics['perf/tok_s']:7.0f} tok/s", flush=True)

        # The end of a step: measure, save and stop, each when it is time to.
        last = step == args.steps
        if last or step % args.eval_every == 0:
            sampler.sync(model)
            measure(step, sampler, heldout, args)
        stopping = interrupt.now(step) and not last
        if last or stopping or step % args.save_every == 0:
            save_checkpoint(args, model, tokenizer, optimizer, {"step": step})
        if stopping:
            interrupt.stop(step)

    print(f"next: python rlvr.py --init {args.out}")


def main():
    args = get_args()
    with run_in(args.out, args):
        run(args)


if __name__ == "__main__":
    main()
