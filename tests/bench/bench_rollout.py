"""How much faster than transformers' model.generate is HFSampler? Same model, prompts, batch, end.

    python tests/bench/bench_rollout.py       # ckpt/sft, or an untrained model with the world's lengths
    python tests/bench/bench_rollout.py ckpt/rlvr

256 sequences as rlvr.py samples them: 32 prompts of the built-in world, 8 responses to each, T = 1,
at most 192 new tokens. Only tokens of responses are counted, EOS included and nothing after it. One
run to warm up, then the two take turns. Nothing else should run meanwhile.
"""

import os
import random
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import rollout  # noqa: E402
import sft  # noqa: E402

PROMPTS, GROUP, NEW_TOKENS, ROUNDS = 32, 8, 192, 3


def make_untrained(problems):
    """Random weights never stop, and a benchmark without early ends is none: so ends are drawn as
    the demonstrations have them.

    At each position P(EOS) becomes the share of demonstrations (prompt and response together) that
    end there, among those that got so far. A hook on the model's output does it, so that both
    samplers meet the same model.
    """
    rng = random.Random(0)
    texts = [sft.demonstrate_arithmetic(p, rng) for p in problems]
    asked = [p.problem + rollout.INSTRUCTION for p in problems]
    tokenizer = sft.make_tokenizer([*texts, *asked])
    model = sft.make_model(tokenizer, seed=0).eval()

    prompts = [rollout.render_prompt(tokenizer, p) for p in problems]
    totals = [len(p) + len(tokenizer.encode(t)) + 1 for p, t in zip(prompts, texts)]  # + 1: EOS
    longest = model.config.max_position_embeddings
    ends = torch.bincount(torch.tensor(totals), minlength=longest + 2).double()
    reached = ends.flip(0).cumsum(0).flip(0)
    hazard = (ends / reached.clamp(min=1)).clamp(1e-6, 1 - 1e-6)

    def set_eos(module, args, kwargs, output):
        total = kwargs["position_ids"][:, -1] + 2  # tokens there are, were the next one EOS
        share = hazard.to(total.device)[total].to(output.logits)
        others = output.logits[:, -1].clone()
        others[:, tokenizer.eos_token_id] = -torch.inf
        output.logits[:, -1, tokenizer.eos_token_id] = others.logsumexp(-1) + share.logit()
        return output

    model.register_forward_hook(set_eos, with_kwargs=True)
    return model, tokenizer


def ours(model, tokenizer, prompts, seed):
    """-> lengths of the responses."""
    sampler = rollout.HFSampler(model, tokenizer)
    rollouts = sampler.generate(prompts, GROUP, max_new_tokens=NEW_TOKENS, seed=seed)
    return [len(r.response_ids) for r in rollouts]


@torch.inference_mode()
def theirs(model, tokenizer, prompts, seed):
    """All 256 rows at once, padded on the left. -> lengths of the responses."""
    torch.manual_seed(seed)
    width, device = max(map(len, prompts)), model.device
    rows = [(p, width - len(p)) for p in prompts for _ in range(GROUP)]
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    input_ids = torch.tensor([[pad] * n + p for p, n in rows], device=device)
    mask = torch.tensor([[0] * n + [1] * len(p) for p, n in rows], device=device)
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    stop = {"max_new_tokens": NEW_TOKENS, "eos_token_id": eos, "pad_token_id": pad}
    out = model.generate(input_ids=input_ids, attention_mask=mask, **sampling, **stop)
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
    default = "ckpt/sft" if Path("ckpt/sft/config.json").is_file() else None
    path = sys.argv[1] if len(sys.argv) > 1 else default
    model, tokenizer = rollout.load_model(path) if path else make_untrained(problems)
    model = model.to(device)
    prompts = [rollout.render_prompt(tokenizer, p) for p in problems[:PROMPTS]]
    print(f"{path or 'untrained model'}, {PROMPTS} prompts x {GROUP}, {device}, "
        f"{torch.get_num_threads()} CPU thread(s)")
    speeds = {ours: [], theirs: []}
    for seed in range(1 + ROUNDS):
        for sample, name in [(ours, "HFSampler.generate"), (theirs, "model.generate")]:
            speed, length = timed(sample, model, tokenizer, prompts, seed)
            speeds[sample] += [speed] if seed else []
            print(f"{f'round {seed}' if seed else 'warm-up'}  {name:18}  {speed:8.0f} tokens/s   "
                f"mean length {length:5.1f}")
    fast, slow = statistics.median(speeds[ours]), statistics.median(speeds[theirs])
    print(f"median   HFSampler {fast:.0f} tokens/s, model.generate {slow:.0f} tokens/s: "
        f"{fast / slow:.2f} times as fast")


if __name__ == "__main__":
    main()
