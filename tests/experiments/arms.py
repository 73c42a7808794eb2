"""The arms of the experiments: every command, as one would type it for a single seed.

An arm is one variant of training. Its name is the folder that it makes. run.py runs all of them for each seed,
results.py shows the commands beside its tables.
"""

import re

# The hypothesis: hindsight corrects short outputs, and only finds redundancy in long thinking. Every arm trains
# on 32 kept rollouts a step, under reverse KL.
CONTEXTS = ["solution", "answer", "concise", "other-solution"]
FILTERS = {"all": "", "correct": "--only-correct --match-budget", "incorrect": "--only-incorrect --match-budget"}


def grid(name, flags, contexts):
    """The commands of some contexts, each with all filters."""
    return "\n".join(f"python opsd.py {flags} --context {context} {kept_flags} --out ckpt/{name}-{context}-{kept}"
        for context in contexts for kept, kept_flags in FILTERS.items())


def contexts_from(start):
    """The commands of all contexts and filters from one start. With --context none the loss is 0, whatever is
    kept: one arm."""
    flags = f"--init ckpt/{start}{' --no-thinking' if start.startswith('short') else ''} --eval-every 40"
    none = f"python opsd.py {flags} --context none --out ckpt/{start}-none-all"
    return "\n".join([none, grid(start, flags, CONTEXTS)])


def search_arms():
    """Where else might incorrect rollouts do harm? From RLVR stopped early, where slips are left."""
    made = []
    for name, change in SEARCH.items():
        for kept in ["correct", "incorrect"]:
            made.append(f"python opsd.py --init ckpt/rlvr-15 --eval-every 50 {FILTERS[kept]} {change} "
                f"--out ckpt/{name}-{kept}")
    return "\n".join(made)


SEARCH = {  # one change each
    "hot": "--temperature 1.5",
    "cut-off": "--max-new-tokens 48",  # most incorrect rollouts are truncated ones
    "long": "--steps 100 --lr 5e-4",
    "long-answer": "--steps 100 --lr 5e-4 --context answer",
}
SHORTEST = "python eval.py ckpt/rlvr --train --problems 1280 --n 8 --shortest ckpt/shortest.jsonl"
GROUPS = {  # name -> commands, in the order in which they are run
    "start": """
        python sft.py
        python rlvr.py --init ckpt/sft
        python rlvr.py --init ckpt/sft --steps 15 --out ckpt/rlvr-15""",
    # Which rollouts. The budget is what a batch of 32 gives; `all` is rlvr-solution-all.
    "paper": """
        python opsd.py --init ckpt/rlvr --only-correct --out ckpt/only-correct
        python opsd.py --init ckpt/rlvr --only-incorrect --out ckpt/only-incorrect""",
    "thinking": contexts_from("rlvr"),
    "thinking-early": contexts_from("rlvr-15"),
    "no-thinking-start": """
        python sft.py --init ckpt/sft --no-thinking --steps 400 --lr 1e-3 --out ckpt/short-sft
        python rlvr.py --init ckpt/short-sft --no-thinking --out ckpt/short-rlvr
        python rlvr.py --init ckpt/short-sft --no-thinking --steps 15 --out ckpt/short-rlvr-15""",
    "no-thinking": contexts_from("short-rlvr"),
    "no-thinking-early": contexts_from("short-rlvr-15"),
    "divergences": """
        python opsd.py --init ckpt/rlvr --only-correct --divergence forward --out ckpt/forward-correct
        python opsd.py --init ckpt/rlvr --only-incorrect --divergence forward --out ckpt/forward-incorrect
        python opsd.py --init ckpt/rlvr --only-correct --divergence forward --match-budget --out ckpt/forward-correct-matched
        python opsd.py --init ckpt/rlvr --only-incorrect --divergence forward --match-budget --out ckpt/forward-incorrect-matched
        python opsd.py --init ckpt/rlvr --only-correct --divergence jsd --out ckpt/jsd-correct
        python opsd.py --init ckpt/rlvr --only-incorrect --divergence jsd --out ckpt/jsd-incorrect
        python opsd.py --init ckpt/rlvr --divergence split --out ckpt/split-all""",
    "parity-start": """
        python sft.py --data arithmetic:parity --privileged-frac 0.4 --steps 1400 --out ckpt/parity-sft
        python rlvr.py --init ckpt/parity-sft --steps 15 --out ckpt/parity-rlvr""",
    # Longer than usual: a student that is nearly certain of what it reads off its chain has small gradients there.
    "parity": grid("parity", "--init ckpt/parity-rlvr --steps 60 --lr 5e-4 --eval-every 30", ["solution", "answer"]),
    "search": search_arms(),
    "controls": f"""
        python opsd.py --init ckpt/rlvr --only-correct --context wrong-answer --out ckpt/context-wrong-answer
        python opsd.py --init ckpt/rlvr --only-correct --context rollout --group-size 4 --batch-size 8 --out ckpt/context-rollout
        python opsd.py --init ckpt/rlvr --only-correct --token-clip 0.2 --out ckpt/token-clip
        {SHORTEST} && python sft.py --init ckpt/rlvr --data ckpt/shortest.jsonl --privileged-frac 0 --steps 40 --lr 2e-4 --min-lr-ratio 1 --warmup-steps 0 --weight-decay 0 --out ckpt/shortest-sft""",
    "order": """
        python opsd.py --init ckpt/sft --only-correct --out ckpt/sft-opsd
        python rlvr.py --init ckpt/sft-opsd --out ckpt/sft-opsd-rlvr""",
    "teachers": """
        python opsd.py --init ckpt/rlvr --only-correct --steps 100 --out ckpt/frozen-100
        python opsd.py --init ckpt/rlvr --only-correct --steps 100 --teacher refresh --refresh-every 50 --out ckpt/refresh-50
        python opsd.py --init ckpt/rlvr --only-correct --steps 100 --teacher refresh --refresh-every 1 --out ckpt/refresh-1
        python opsd.py --init ckpt/rlvr --only-correct --steps 100 --teacher ema --ema-decay 0.95 --out ckpt/ema""",
}


def stage_of(command):
    """The stage that a command trains with; before it, eval.py may make its data."""
    return re.findall(r"python (\w+)\.py", command)[-1]


def arm_of(command):
    """The folder that a command makes: its --out, or its stage's name."""
    out = re.search(r"--out ckpt/(\S+)", command)
    return out[1] if out else stage_of(command)


def commands(names=GROUPS):
    """{arm: its command}, of some groups, or of single arms."""
    made = {}
    for group, text in GROUPS.items():
        for command in filter(None, map(str.strip, text.splitlines())):
            made[group, arm_of(command)] = " ".join(command.split())
    return {arm: command for name in names for (group, arm), command in made.items() if name in (group, arm)}
