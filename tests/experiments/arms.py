"""The arms of the experiments: every command, as one would type it for a single seed.

An arm is one variant of training. Its name is the folder that it makes. run.py runs all of them for each seed,
results.py shows the commands beside its tables.
"""

import re

# The hypothesis: hindsight corrects short outputs, and only finds redundancy in long thinking.
CONTEXTS = ["solution", "answer", "concise", "other-solution"]
FILTERS = {"all": "", "correct": "--only-correct --match-budget", "incorrect": "--only-incorrect --match-budget"}
BOTH = ["correct", "incorrect"]
# 32 kept rollouts a step, reverse KL. 20 steps at 4e-4 shorten as much as the default's 40 at 2e-4.
BRIEF = "--steps 20 --lr 4e-4 --eval-every 10"
# A quarter of BRIEF's learning rate: that alone costs accuracy where products were learned by heart.
GENTLE = "--steps 40 --lr 1e-4 --eval-every 20"
# A student that is nearly certain of what it reads off its chain has small gradients there.
LONG = "--steps 150 --lr 5e-4 --batch-size 16 --eval-every 30"


def grid(name, flags, contexts, filters):
    """The commands of some contexts, each with some filters."""
    return "\n".join(f"python opsd.py {flags} --context {context} {FILTERS[kept]} --out ckpt/{name}-{context}-{kept}"
        for context in contexts for kept in filters)


def contexts_from(start):
    """The commands of all contexts and filters from one start. With --context none the loss is 0, whatever is
    kept: one arm."""
    flags = f"--init ckpt/{start}{' --no-thinking' if start.startswith('short') else ''} {BRIEF}"
    return "\n".join([grid(start, flags, ["none"], ["all"]), grid(start, flags, CONTEXTS, FILTERS)])


def variants(start, changes, filters):
    """The commands that change one thing each, with some filters. changes: name -> flags."""
    return "\n".join(f"python opsd.py --init ckpt/{start} {flags} {FILTERS[kept]} --out ckpt/{name}-{kept}"
        for name, flags in changes.items() for kept in filters)


DIVERGENCES = {"forward": f"{BRIEF} --divergence forward", "jsd": f"{BRIEF} --divergence jsd"}
CONTROLS = {
    "wrong-answer": f"{BRIEF} --context wrong-answer",
    "sibling": f"{BRIEF} --context rollout --group-size 4 --batch-size 8",
    "token-clip": f"{BRIEF} --token-clip 0.2",
}
SEARCH = {  # where else might incorrect rollouts do harm?
    "hot": f"{BRIEF} --temperature 1.5",
    "cut-off": f"{BRIEF} --max-new-tokens 48",  # most incorrect rollouts are truncated ones
    "long": f"{LONG} --context answer",
}
SHORTEST = "python eval.py ckpt/rlvr --train --problems 640 --n 8 --shortest ckpt/shortest.jsonl"
GROUPS = {  # name -> commands, in the order in which they are run
    "start": """
        python sft.py
        python rlvr.py --init ckpt/sft
        python rlvr.py --init ckpt/sft --steps 15 --out ckpt/rlvr-15""",
    # The paper's filters, with the defaults: the budget is what a batch of 32 gives.
    "paper": """
        python opsd.py --init ckpt/rlvr --out ckpt/all
        python opsd.py --init ckpt/rlvr --only-correct --out ckpt/only-correct
        python opsd.py --init ckpt/rlvr --only-incorrect --out ckpt/only-incorrect""",
    "parity-start": """
        python sft.py --init ckpt/sft --data arithmetic:parity --steps 400 --lr 1e-3 --out ckpt/parity-sft
        python rlvr.py --init ckpt/parity-sft --steps 15 --out ckpt/parity-rlvr""",
    "parity": grid("parity", f"--init ckpt/parity-rlvr {LONG}", ["answer", "solution"], BOTH),
    "products-start": """
        python tests/experiments/products.py ckpt/products.jsonl && python sft.py --init ckpt/sft --data ckpt/products.jsonl --steps 1800 --lr 1e-3 --out ckpt/products-sft
        python rlvr.py --init ckpt/products-sft --steps 15 --out ckpt/products-rlvr""",
    "products": f"""
        {grid("products", f"--init ckpt/products-rlvr {BRIEF}", ["none"], ["all"])}
        {grid("products", f"--init ckpt/products-rlvr {BRIEF}", ["answer", "solution"], BOTH)}
        {grid("gentle", f"--init ckpt/products-rlvr {GENTLE}", ["none"], ["all"])}
        {grid("gentle", f"--init ckpt/products-rlvr {GENTLE}", ["answer", "solution"], BOTH)}""",
    "careful-start": """
        python tests/experiments/careful.py --init ckpt/sft --steps 500 --lr 1e-3 --out ckpt/careful-sft
        python rlvr.py --init ckpt/careful-sft --steps 15 --out ckpt/careful-rlvr""",
    "careful": grid("careful", f"--init ckpt/careful-rlvr {BRIEF}", ["concise", "solution"], BOTH),
    "thinking": contexts_from("rlvr"),
    "thinking-early": contexts_from("rlvr-15"),
    "no-thinking-start": """
        python sft.py --init ckpt/sft --no-thinking --steps 400 --lr 1e-3 --out ckpt/short-sft
        python rlvr.py --init ckpt/short-sft --no-thinking --out ckpt/short-rlvr
        python rlvr.py --init ckpt/short-sft --no-thinking --steps 15 --out ckpt/short-rlvr-15""",
    "no-thinking": contexts_from("short-rlvr"),
    "no-thinking-early": contexts_from("short-rlvr-15"),
    "divergences": f"""
        {variants("rlvr", DIVERGENCES, BOTH)}
        python opsd.py --init ckpt/rlvr {BRIEF} --divergence split --out ckpt/split-all""",
    "controls": f"""
        {variants("rlvr", CONTROLS, ["correct"])}
        {SHORTEST} && python sft.py --init ckpt/rlvr --data ckpt/shortest.jsonl --privileged-frac 0 --steps 20 --lr 4e-4 --min-lr-ratio 1 --warmup-steps 0 --weight-decay 0 --out ckpt/shortest-sft""",
    "search": variants("rlvr-15", SEARCH, BOTH),
    "teachers": """
        python opsd.py --init ckpt/rlvr --only-correct --steps 100 --out ckpt/frozen-100
        python opsd.py --init ckpt/rlvr --only-correct --steps 100 --teacher refresh --refresh-every 1 --out ckpt/refresh-1
        python opsd.py --init ckpt/rlvr --only-correct --steps 100 --teacher ema --ema-decay 0.95 --out ckpt/ema""",
    "order": """
        python opsd.py --init ckpt/sft --only-correct --out ckpt/sft-opsd""",
}


def stage_of(command):
    """The script that a command trains with; before it, another may make its data."""
    return re.findall(r"python (\S+)\.py", command)[-1]


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
