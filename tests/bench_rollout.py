"""How much faster than transformers' own model.generate is HFSampler? Same model, prompts, batch and end of a response.

    python tests/bench_rollout.py                # ckpt/sft where there is one, else an untrained model that knows when to stop
    python tests/bench_rollout.py ckpt/rlvr

256 sequences as rlvr.py samples them: 32 prompts of the built-in world, 8 responses to each, T = 1, at most 192 new tokens.
Only tokens of responses are counted, EOS included and nothing after it. One run to warm up, then the two take turns.
"""

import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import random  # noqa: E402

import torch  # noqa: E402

import rollout  # noqa: E402

PROMPTS, GROUP, NEW_TOKENS, ROUNDS = 32, 8, 192, 3


def stop_like_the_world(model, tokenizer, problems):
    """Random weights never stop, and a benchmark without early ends is none. This draws ends as the demonstrations have.

    At each position, P(EOS) becomes the share of demonstrations (prompt and response together) that end there among
    those that got so far. A hook on the model's output does it, so both samplers meet the same model.
    """
    rng = random.Random(0)
    totals = [len(rollout.render_prompt(tokenizer, p)) + response_length(tokenizer, p, rng) for p in problems]
    ends = torch.bincount(torch.tensor(totals), minlength=model.config.max_position_embeddings + 2).double()
    reached = ends.flip(0).cumsum(0).flip(0)
    hazard = (ends / reached.clamp(min=1)).clamp(1e-6, 1 - 1e-6)

    def set_eos(module, args, kwargs, output):
        total = kwargs["position_ids"][:, -1] + 2  # tokens so far, were the next one EOS
        share = hazard.to(total.device)[total].to(output.logits)
        rest = output.logits[:, -1].clone()
        rest[:, tokenizer.eos_token_id] = -torch.inf
        output.logits[:, -1, tokenizer.eos_token_id] = rest.logsumexp(-1) + share.logit()
        return output

    model.register_forward_hook(set_eos, with_kwargs=True)


def response_length(tokenizer, problem, rng):
    return len(tokenizer.encode(rollout.demonstrate_arithmetic(problem, rng, privileged=False))) + 1


def make_untrained(problems):
    texts = [problem.problem + rollout.demonstrate_arithmetic(problem, random.Random(0), False) for problem in problems]
    tokenizer = rollout.make_tokenizer([*texts, rollout.INSTRUCTION])
    model = rollout.make_model(tokenizer, seed=0).eval()
    stop_like_the_world(model, tokenizer, problems)
    return model, tokenizer


def ours(model, tokenizer, prompts, seed):
    rollouts = rollout.HFSampler(model, tokenizer).generate(prompts, GROUP, max_new_tokens=NEW_TOKENS, seed=seed)
    return [len(r.response_ids) for r in rollouts]


@torch.inference_mode()
def theirs(model, tokenizer, prompts, seed):
    """All 256 rows at once, padded on the left, as the documentation of transformers has it."""
    torch.manual_seed(seed)
    width = max(map(len, prompts))
    rows = [(p, width - len(p)) for p in prompts for _ in range(GROUP)]
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    out = model.generate(
        input_ids=torch.tensor([[pad] * n + p for p, n in rows], device=model.device),
        attention_mask=torch.tensor([[0] * n + [1] * len(p) for p, n in rows], device=model.device),
        max_new_tokens=NEW_TOKENS, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=pad,
    )  # fmt: skip
    return [ids.index(eos) + 1 if eos in ids else len(ids) for ids in out[:, width:].tolist()]


def timed(sample, *args):
    """-> tokens a second, mean length."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    lengths = sample(*args)
    synchronize()
    return sum(lengths) / (time.perf_counter() - start), sum(lengths) / len(lengths)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problems = rollout.load_problems("arithmetic")[0][:2000]
    path = sys.argv[1] if len(sys.argv) > 1 else "ckpt/sft" if Path("ckpt/sft/config.json").is_file() else None
    model, tokenizer = rollout.load_model(path) if path else make_untrained(problems)
    model = model.to(device)
    prompts = [rollout.render_prompt(tokenizer, p) for p in problems[:PROMPTS]]
    print(f"{path or 'untrained model, ends drawn as in the demonstrations'}; {PROMPTS} prompts x {GROUP}, {device}, "
          f"{torch.get_num_threads()} thread(s)")  # fmt: skip
    speeds = {ours: [], theirs: []}
    for seed in range(1 + ROUNDS):
        for sample, name in [(ours, "HFSampler.generate"), (theirs, "model.generate")]:
            speed, length = timed(sample, model, tokenizer, prompts, seed)
            speeds[sample] += [speed] if seed else []
            print(f"{'warm-up' if seed == 0 else f'round {seed}'}  {name:18}  {speed:8.0f} tokens/s   mean length {length:5.1f}")
    fast, slow = statistics.median(speeds[ours]), statistics.median(speeds[theirs])
    print(f"median   HFSampler {fast:.0f} tokens/s, model.generate {slow:.0f} tokens/s: {fast / slow:.2f} times as fast")


if __name__ == "__main__":
    main()
