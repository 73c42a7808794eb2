"""Runs every arm of the experiments for each seed, judges it, and collects the figures.

    python tests/experiments/run.py 0 1 2 3 4                       # all of it
    python tests/experiments/run.py 0 1 2 3 4 --jobs 2              # on two cores, a thread each
    python tests/experiments/run.py 0 --only start rlvr-answer-all  # some groups or arms of arms.py

What is finished is not repeated, and a run that was interrupted goes on from its last save. An arm of seed 3 is
made in ckpt/seed3/ARM. All stages run in one process, which saves half a minute of imports an arm.
"""

import argparse
import fcntl
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import arms  # noqa: E402
import results  # noqa: E402


def for_seed(command, seed):
    """The command with this seed, in this seed's folder."""
    command = command.replace("ckpt/", f"ckpt/seed{seed}/")
    if "--out" not in command:
        command += f" --out ckpt/seed{seed}/{arms.arm_of(command)}"
    return f"{command} --seed {seed}"


def call(command):
    """Runs `python stage.py flags`, in this process."""
    print(f"$ {command}", flush=True)
    _, *sys.argv = shlex.split(command)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a stage sets its own
    importlib.import_module(Path(sys.argv[0]).stem).main()


def done(folder):
    return (folder / "eval.json").is_file()


def is_ready(command, seed):
    """Whether the checkpoints that a command starts from are there."""
    starts = re.findall(r"(?:--init|eval\.py) ckpt/(\S+)", command)
    return all(done(Path(f"ckpt/seed{seed}/{start}")) for start in starts)


def make(arm, command, seed):
    """Trains an arm, or goes on with it, and judges it."""
    out = Path(f"ckpt/seed{seed}/{arm}")
    if (out / "trainer_state.pt").is_file():
        call(f"python {arms.stage_of(command)}.py --resume --out {out}")
    else:
        for part in for_seed(command, seed).split(" && "):
            call(part + " --overwrite" * (" --out " in part))
    call(f"python eval.py {out} {'--data arithmetic ' * ('shortest' in command)}--json {out}/eval.new")
    (out / "eval.new").rename(out / "eval.json")


def work(seeds, names):
    """Arm after arm. Another process may do the same: a lock says who makes an arm. Ends with an error if what is
    left starts from checkpoints that nobody makes."""
    before = None  # what was left the last time that there was nothing to do
    while True:
        left = [(seed, arm, command) for arm, command in arms.commands(names).items() for seed in seeds
            if not done(Path(f"ckpt/seed{seed}/{arm}"))]
        if not left:
            return
        others_work = False
        for seed, arm, command in left:
            folder = Path(f"ckpt/seed{seed}")
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f".{arm}.lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    others_work = True
                    continue
                if is_ready(command, seed) and not done(folder / arm):
                    make(arm, command, seed)
                    break
        else:
            if left == before and not others_work:
                seed, arm, command = left[0]
                results.fail(f"seed {seed}: what {arm} starts from is not there: run all, or name it in --only, "
                    f"too: {command}")
            before = left
            time.sleep(5)  # until another process has made what the rest starts from


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("seeds", nargs="+", type=int)
    parser.add_argument("--only", nargs="+", choices=[*arms.GROUPS, *arms.commands()], default=list(arms.GROUPS),
        metavar="NAME", help="some groups or arms of arms.py")
    parser.add_argument("--jobs", type=int, default=1, help="processes, with one thread each if more than one")
    args = parser.parse_args()
    if args.jobs == 1:
        work(args.seeds, args.only)
    else:
        command = [sys.executable, __file__, *map(str, args.seeds), "--only", *args.only]
        running = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(args.jobs)]
        if any([process.wait() for process in running]):
            sys.exit(1)
    for seed in args.seeds:
        folder = Path(f"ckpt/seed{seed}")
        if done(folder / "only-correct") and not (folder / "anatomy.json").is_file():
            starts = " ".join(f"{folder}/{arm}" for arm in ("sft", "rlvr", "only-correct"))
            call(f"python anatomy.py {starts} --json {folder}/anatomy.json")
        results.collect(folder)


if __name__ == "__main__":
    main()
