"""Whatever is wrong: one line that says so, exit status 2, and no file of yours lost or changed."""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_chain import base_fixture, luck_fixture  # noqa: F401  (pytest fixtures: base, luck)
from test_chain import TINY, read_rows, run_stage, same_tensors, weights, word_problems, write_rows

import eval as eval_stage
import opsd
import rlvr
import rollout
import sft

TRAINERS = pytest.mark.parametrize("stage", [sft, rlvr, opsd], ids=lambda stage: stage.__name__)
ALL = [sft, rlvr, opsd, eval_stage]
EVERY_STAGE = pytest.mark.parametrize("stage", ALL, ids=lambda stage: stage.__name__)
GOOD = {"problem": "2+2?", "answer": "4", "solution": "2+2=4."}


def contents():
    """What every file below the current folder holds."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(stage, *flags, says):
    """The stage must end with status 2 and one line on stderr that holds every text of `says`, and
    leave every file as it was."""
    before = contents()
    status, _, err = run_stage(stage, *flags)
    lines = [line for line in err.splitlines() if not line.startswith("evaluating ")]  # of eval.py
    assert status == 2, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert not [text for text in says if text not in lines[0]], err
    after = contents()
    assert [path for path in before if before[path] != after.get(path)] == [], "lost or changed"


def small(base, stage, out="out", init=None, steps=2):
    """Flags of a tiny run of any stage that works as it is."""
    if stage is eval_stage:
        return [init or base / "sft", "--n 1 --problems 2 --max-new-tokens 8"]
    return ["--init", init or base / "sft", "--out", out, f"--steps {steps}", TINY]


# ---------------------------------------------------------------------------------------------------
# Checkpoints and folders


@EVERY_STAGE
@pytest.mark.parametrize("path", ["ckpt/nowhere", "./empty", "ckpt/ruin"])
def test_missing_checkpoint(base, stage, path):
    """The stage before has not run, or the folder holds something else."""
    Path("empty").mkdir()
    Path("ckpt/ruin").mkdir(parents=True)
    Path("ckpt/ruin/config.json").write_text("{}")
    refused(stage, *small(base, stage, init=path), "--data", base / "problems.jsonl", says=[path])
    assert not Path("out").exists()


def test_eval_looks_for_all_checkpoints_first(base, monkeypatch):
    """A typo in the last of three checkpoints must not cost the evaluation of the first two."""
    monkeypatch.setattr(rollout.HFSampler, "generate", None)  # would raise
    refused(eval_stage, base / "sft", base / "sft", "ckpt/nowhere --n 1", says=["ckpt/nowhere"])


@TRAINERS
def test_folder_in_use(base, stage):
    """Without --resume or --overwrite nothing is deleted; with --overwrite it is."""
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text('{"step": 0}\n')
    Path("out/args.json").write_text("{}")
    ways_out = ["--resume", "--overwrite", "--out"]
    refused(stage, *small(base, stage), says=["out is not empty", *ways_out])
    assert run_stage(stage, *small(base, stage, steps=1), "--overwrite")[0] == 0
    assert read_rows("out/metrics.jsonl")[-1]["step"] == 1


@TRAINERS
def test_overwrite_leaves_nothing_of_the_run_before(base, luck, stage):
    """The old run's lines before the new one's in the logs are a curve that no run ever had."""
    for _ in range(2):
        assert run_stage(stage, *small(base, stage, steps=1), "--overwrite")[0] == 0
        assert not Path("out/plot.svg").exists()
        assert [row["step"] for row in read_rows("out/metrics.jsonl")] == [0, 1, 1]
        Path("out/plot.svg").write_text("<svg/>")


def test_overwrite_of_the_data_in_it(base):
    """--data out/mine.jsonl --out out --overwrite would delete the only copy of the data, once it was read."""
    run_stage(sft, *small(base, sft, steps=1))
    write_rows(Path("out/mine.jsonl"), word_problems())
    refused(sft, *small(base, sft), "--data out/mine.jsonl --overwrite", says=["--data", "--out"])


def test_overwrite_of_a_run_without_a_checkpoint(base, monkeypatch):
    """Killed before its first save, a run can't be resumed; but --overwrite starts it anew."""

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "accumulate_gradients", killed)
        run_stage(sft, *small(base, sft))
    refused(sft, *small(base, sft), "--resume", says=["nothing to resume"])
    assert run_stage(sft, *small(base, sft, steps=1), "--overwrite")[0] == 0


def test_out_is_a_file(base):
    """--out names a file: the file stays."""
    Path("out").write_text("my thesis")
    refused(sft, *small(base, sft), says=["out"])
    refused(sft, *small(base, sft), "--overwrite", says=["out"])


@pytest.mark.parametrize("out", [".", "mine"])
def test_overwrite_deletes_runs_only(base, out):
    """--overwrite --out . would delete the folder one stands in. What holds no run is kept."""
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("the only copy")
    refused(sft, *small(base, sft, out=out), "--overwrite", says=["--overwrite", "--out"])


def test_overwrite_of_what_the_run_reads(base):
    """--out ckpt --init ckpt/sft --overwrite would delete the model that it starts from."""
    run_stage(sft, *small(base, sft, out="ckpt", steps=1))
    run_stage(sft, *small(base, sft, out="ckpt/sft", steps=1))
    flags = small(base, rlvr, out="ckpt", init="ckpt/sft")
    refused(rlvr, *flags, "--overwrite", says=["--init", "--out"])


@TRAINERS
def test_init_is_out(base, stage):
    """Starting from the folder that the run would overwrite, in whatever spelling."""
    run_stage(sft, *small(base, sft, out="run", steps=1))
    Path("sub").mkdir()
    Path("link").symlink_to("run")
    for spelling in ("run", "./run", "sub/../run", "link"):
        flags = small(base, stage, out=spelling, init="run")
        refused(stage, *flags, "--overwrite", says=["--init", "--out", "same folder"])


# ---------------------------------------------------------------------------------------------------
# Resume


@TRAINERS
def test_nothing_to_resume(base, stage):
    """No folder, an empty folder, or a run that was killed before its first save."""
    refused(stage, "--resume --out out", says=["--resume", "nothing to resume in out"])
    Path("out").mkdir()
    Path("out/metrics.jsonl").write_text('{"step": 0}\n')
    refused(stage, "--resume --out out", says=["--resume", "nothing to resume in out"])


@TRAINERS
def test_resume_with_another_flag(base, luck, stage):
    """A run that changes its learning rate half-way is neither of two runs; the flag is named."""
    assert run_stage(stage, *small(base, stage), "--stop-after 1")[0] == 0
    saved = json.loads(Path("out/args.json").read_text())
    for flag in ("--lr 0.5", "--steps 9", "--seed 3", "--data arithmetic", "--init elsewhere"):
        name = flag.split()[0]
        says = f"{name} (was {saved[name.removeprefix('--')]})"
        refused(stage, "--resume --out out", flag, says=[says])


def test_resume_with_a_flag_set_back_to_its_default(base):
    """A flag's default, where the run was started with another value: a change like any other."""
    assert run_stage(sft, *small(base, sft), "--grad-clip 0.5 --stop-after 1")[0] == 0
    refused(sft, "--resume --out out --grad-clip 1.0", says=["--grad-clip (was 0.5)"])


@TRAINERS
def test_resume_of_another_stage(base, stage):
    """rlvr.py --resume --out ckpt/sft would take SFT's steps and optimizer for its own."""
    made_by = {sft: opsd, rlvr: sft, opsd: rlvr}[stage]
    assert run_stage(made_by, *small(base, made_by), "--stop-after 1")[0] == 0
    refused(stage, "--resume --out out", says=["--resume", "out"])


# ---------------------------------------------------------------------------------------------------
# Data


@EVERY_STAGE
def test_unknown_data(base, stage):
    """A typo in --data must not mean the built-in world."""
    says = ["--data nowhere.jsonl", "no such file"]
    refused(stage, *small(base, stage), "--data nowhere.jsonl", says=says)
    assert not Path("out").exists()


BAD_LINES = {
    "not JSON": '{"problem": "2+2?", "answer": ',
    "two objects": json.dumps(GOOD) * 2,
    "a list": '["2+2?", "4"]',
    "a number": "4",
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line(base, line):
    """The message says which line, counting from 1, blank lines included."""
    Path("bad.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{line}\n{json.dumps(GOOD)}\n")
    for stage in (sft, eval_stage):
        refused(stage, *small(base, stage), "--data bad.jsonl", says=["bad.jsonl:3: "])


@EVERY_STAGE
@pytest.mark.parametrize("text", ["", "\n\n"], ids=["empty", "blank"])
def test_empty_data(base, stage, text):
    """No problem at all: said at once, no division by zero later."""
    Path("empty.jsonl").write_text(text)
    refused(stage, *small(base, stage), "--data empty.jsonl", says=["empty.jsonl"])
    assert not Path("out").exists()


def test_not_text(base):
    """A binary, or Latin-1, file as --data."""
    Path("latin.jsonl").write_bytes(b'{"problem": "caf\xe9?", "answer": "4"}\n')
    refused(sft, *small(base, sft), "--data latin.jsonl", says=["latin.jsonl"])


@pytest.mark.parametrize("stage", [sft, opsd], ids=["sft", "opsd"])
@pytest.mark.parametrize("missing", [{}, {"solution": ""}, {"solution": None}], ids=str)
def test_missing_solution(base, stage, missing):
    """sft.py would teach an empty thought; opsd.py's teacher would be shown one, or `None`."""
    rows = [{"problem": f"{i}+1?", "answer": str(i + 1), **missing} for i in range(30)]
    write_rows(Path("bare.jsonl"), rows)
    says = ["--data bare.jsonl", "solution"]
    refused(stage, *small(base, stage), "--data bare.jsonl", says=says)
    assert not Path("out").exists()


@pytest.mark.parametrize("stage, flags", [(rlvr, ""), (opsd, "--context answer"), (eval_stage, "")])
def test_solution_not_needed(base, luck, stage, flags):
    """Who reads no solution must not ask for one."""
    write_rows(Path("bare.jsonl"), [{"problem": f"{i}+1?", "answer": i + 1} for i in range(30)])
    assert run_stage(stage, *small(base, stage), "--data bare.jsonl", flags)[0] == 0


LONG = "apple " * 2500


@pytest.mark.parametrize("stage, where", [(sft, "question"), (rlvr, "question"), (opsd, "question"),
    (sft, "answer"), (opsd, "answer")])
def test_problems_longer_than_the_context(base, luck, stage, where):
    """Positions past the model's context are garbage, and a prompt that is cut is another problem. One that
    is too long is left out, and counted; so is one whose solution, which only the teacher reads, is."""
    rows = word_problems(20)
    rows[7][where] = LONG + rows[7][where]
    write_rows(Path("long.jsonl"), rows)
    status, out, err = run_stage(stage, *small(base, stage), "--data long.jsonl --batch-size 20")
    assert status == 0, err
    assert re.search("1 of 1[0-9] problems are left out", out) and "context of 2048" in out
    for row in rows:
        row[where] = LONG + row[where]
    write_rows(Path("long.jsonl"), rows)
    refused(stage, *small(base, stage, out="out2"), "--data long.jsonl", says=["context of 2048"])


def test_eval_leaves_out_what_does_not_fit(base):
    """Checkpoints are compared on the same problems: what does not fit one of them, here the second, is left
    out for all, and counted. The stages leave it out while they measure, too."""
    rows = word_problems(20)
    rows[7]["question"] = LONG
    rows[9]["question"] += " He likes them." * 100  # fits 2048 and not 512
    write_rows(Path("long.jsonl"), rows)
    shutil.copytree(base / "sft", "short")
    config = json.loads(Path("short/config.json").read_text())
    Path("short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    flags = ["--data long.jsonl --n 1 --max-new-tokens 8 --json r.json"]
    status, out, err = run_stage(eval_stage, base / "sft", "short", *flags)
    assert status == 0, err
    assert "1 of 20 problems are left out" in out and "context of 2048" in out
    assert "1 of 19 problems are left out" in out and "context of 512" in out
    assert [row["problems"] for row in json.loads(Path("r.json").read_text())["checkpoints"]] == [18, 18]
    write_rows(Path("all.jsonl"), [rows[7]])
    flags = [*small(base, eval_stage), "--data all.jsonl"]
    refused(eval_stage, *flags, says=["context of 2048", "--max-new-tokens"])


@TRAINERS
def test_who_is_measured_on_is_the_same_in_every_stage(base, luck, stage, monkeypatch):
    """A held-out problem that leaves no room for a response ended sft.py at its first evaluation; one whose
    solution is long, which nobody reads while measuring, was left out by opsd.py only: other problems than
    the stage before."""
    rows = word_problems(60)
    heldout = {p.problem for p in rollout.load_problems(str(write_rows(Path("all.jsonl"), rows)))[1]}
    long, wordy, *_ = [row for row in rows if row["question"] in heldout]
    long["question"] += " He likes them." * 110  # fits with its solution and not with 1500 tokens
    wordy["answer"] = LONG + wordy["answer"]
    data = str(write_rows(Path("long.jsonl"), rows))
    split = rollout.load_problems(data)  # the long one has another hash now: it is held out by hand
    moved = [p for p in split[0] + split[1] if p.problem == long["question"]]
    train = [p for p in split[0] if p not in moved]
    heldout = moved + [p for p in split[1] if p not in moved]
    monkeypatch.setattr(stage, "load_problems", lambda data, columns: (train, heldout))
    measured = []

    def note(step, sampler, problems, args):
        measured.append(problems)
        sys.exit("seen")  # that was enough

    monkeypatch.setattr(stage, "measure", note)
    flags = [*small(base, stage, steps=1), "--data", data, "--eval-problems 60 --max-new-tokens 1500"]
    status, out, err = run_stage(stage, *flags)
    assert status == "seen", err
    assert f"1 of {len(heldout)} problems are left out: with 1500 tokens for the response" in out
    assert measured[0] == heldout[1:] and wordy["question"] in {p.problem for p in measured[0]}


# ---------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--only-correct --only-incorrect", "--only-correct and --only-incorrect"),
        ("--divergence jsd --beta 1", "--beta"),
        ("--divergence jsd --beta 0", "--beta"),
        ("--context rollout", "--group-size"),
        ("--teacher refresh", "--refresh-every 50: never"),
    ],
)
def test_opsd_flags(base, flags, says):
    """Combinations without a meaning."""
    refused(opsd, *small(base, opsd), flags, says=[says])
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--n 2 --k 3", "--k 3"),
        ("--plot figure.pdf", "--plot figure.pdf"),
        ("--n 0", "--n: 0"),
        ("--problems -1", "--problems: -1"),
        ("--json nowhere/r.json", "nowhere/r.json"),
        ("--shortest nowhere/r.jsonl", "nowhere/r.jsonl"),
        ("--train --data more.jsonl", "--train"),
        ("--example --json r.json", "--example"),
    ],
)
def test_eval_flags(base, flags, says):
    """Said before the first checkpoint is evaluated, not after minutes of sampling."""
    refused(eval_stage, base / "sft", flags, says=[says])


ZERO_IS_ALLOWED = """--privileged-frac --lr --min-lr-ratio --warmup-steps --weight-decay --clip-low
    --clip-high --kl-coef --refill --ema-decay --seed""".split()
NO_NUMBERS = ["-1", "-0.5", "nan", "inf", "-inf", "1e400", "many", ""]


@EVERY_STAGE
def test_every_number_of_every_flag(base, stage, monkeypatch, capsys):
    """One line that says what is wrong with which flag; argparse would print the usage, too. Nothing is
    negative, nothing is infinite, nan least of all: it passes every comparison that asks for what is
    refused."""
    parsers = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: sys.exit(parsers.append(parser)))
        stage.get_args()
    numeric = [action for action in parsers[0]._actions if action.type]
    assert len(numeric) >= 7
    whole = [action.option_strings[0] for action in numeric if "whole" in action.type.__name__]
    assert {"--max-new-tokens", "--seed"} <= set(whole)
    command = ["stage.py", *[str(base / "sft")] * (stage is eval_stage)]
    for action in numeric:
        flag = action.option_strings[0]
        zero = flag in ZERO_IS_ALLOWED or stage is eval_stage and flag == "--temperature"
        for value in [*NO_NUMBERS, *["0"] * (not zero), *["2.5"] * (flag in whole)]:
            monkeypatch.setattr(sys, "argv", [*command, f"{flag}={value}"])
            with pytest.raises(SystemExit) as end:
                stage.get_args()
            err = capsys.readouterr().err
            assert end.value.code == 2, (flag, value)
            assert err.startswith("error: ") and err.count("\n") == 1, (flag, value, err)
            assert flag in err and (value in err or value == "1e400"), (flag, value, err)  # --beta: inf
        if zero:
            monkeypatch.setattr(sys, "argv", [*command, f"{flag}=0", "--device", "cpu"])
            assert vars(stage.get_args())[action.dest] == 0


def test_rollout_has_no_number_and_one_line(monkeypatch, fails_with):
    """The look at the data: a flag that it does not have is one line as well."""
    monkeypatch.setattr(sys, "argv", ["rollout.py", "--seed", "nan"])
    fails_with(rollout.main, "--seed nan")


@EVERY_STAGE
def test_columns_of_nothing(base, stage):
    """--columns without --data was dropped without a word: the data of --init has its own."""
    for data in ("", "--data arithmetic"):
        refused(stage, *small(base, stage), data, "--columns problem=Q", says=["--columns", "--data"])


BAD_REWARDS = {"no_such_module:f": "no_such_module", "bad_rewards:f": "'f'", "bad_rewards": "MODULE:FUNCTION",
    "bad_rewards:text": "returned 'much'", "bad_rewards:nan": "returned nan", "bad_rewards:none": "returned None"}


@pytest.mark.parametrize("reward, says", BAD_REWARDS.items())
def test_reward_that_is_none(base, reward, says):
    """A function that is not there, or returns no finite number."""
    Path("bad_rewards.py").write_text("text = lambda response, gold: 'much'\n"
        "nan = lambda response, gold: float('nan')\nnone = lambda response, gold: None\n")
    status, _, err = run_stage(rlvr, *small(base, rlvr), "--reward", reward)
    assert status == 2 and "--reward" in err.splitlines()[-1] and says in err.splitlines()[-1]


CANNOT_WORK = [(rlvr, "--temperature 0"), (opsd, "--temperature nan"), (rlvr, "--refill -1"), (sft, "--lr -1"),
    (sft, "--privileged-frac 1.5"), (opsd, "--ema-decay 2"), (rlvr, "--lr inf"), (opsd, "--seed -1"),
    (sft, "--seed 4294967296"), (rlvr, "--no-such-flag"), (rlvr, "--warmup-steps -3"),
    (opsd, "--token-clip 0"), (opsd, "--token-clip -1")]


@pytest.mark.parametrize("stage, flags", CANNOT_WORK)
def test_numbers_that_cannot_work(base, luck, stage, flags):
    """Logits divided by a temperature of 0 are NaN; fewer than no batches are a crash."""
    before = contents()
    status, _, err = run_stage(stage, *small(base, stage), flags)
    assert status == 2 and flags.split()[0] in err.splitlines()[-1] and contents() == before


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
@EVERY_STAGE
def test_unknown_device(base, stage, device, monkeypatch):
    """A device that this machine does not have."""
    monkeypatch.setattr("test_chain.DEVICE", device)
    refused(stage, *small(base, stage), says=["--device", device])


# ---------------------------------------------------------------------------------------------------
# A loss that is not finite


@TRAINERS
def test_out_of_memory(base, luck, stage, monkeypatch):
    """The line says what to lower, and the run goes on from its save with that lowered."""
    assert run_stage(stage, *small(base, stage, steps=3), "--stop-after 1")[0] == 0

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "accumulate_gradients", full)
        status, _, err = run_stage(stage, "--resume --out out")
    assert status == 2 and err.startswith("error: out of memory on cpu: --resume goes on") and "(now " in err
    assert "--gradient-checkpointing" in err and err.count("\n") == 1
    status, _, err = run_stage(stage, "--resume --out out --micro-batch-size 3 --gradient-checkpointing")
    assert status == 0, err


@TRAINERS
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_nan_in_the_loss(base, luck, stage, poison, monkeypatch):
    """A weight gone bad after step 2: the run ends, what was saved after step 1 is whole."""
    assert run_stage(stage, *small(base, stage, steps=3), "--stop-after 1")[0] == 0
    saved = weights("out")
    original, calls = stage.accumulate_gradients, []

    def poisoned(model, *rest):
        calls.append(1)
        if len(calls) == 2:
            with torch.no_grad():
                model.model.norm.weight[3] = poison
        return original(model, *rest)

    monkeypatch.setattr(stage, "accumulate_gradients", poisoned)
    before = contents()
    status, _, err = run_stage(stage, "--resume --out out")
    assert status == 2 and err.startswith("error: step 3: loss ") and err.count("\n") == 1
    assert "not finite" in err
    after = contents()
    logs = {Path("out/metrics.jsonl"), Path("out/samples.jsonl")}  # step 2 was logged
    assert all(after[path] == before[path] for path in before if path not in logs)
    assert same_tensors(saved, weights("out"))
