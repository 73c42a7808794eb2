"""A run that is stopped, interrupted or killed goes on as the run that was left alone would have.

The commonest complaint about neighbouring projects is a resume that restores the weights only.
"""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_chain import TINY, read_rows, run_stage, same_tensors, start_command, weights
from test_chain import base_fixture, luck_fixture  # noqa: F401  (pytest fixtures: base, luck)

import eval as eval_stage
import opsd
import rlvr
import rollout
import sft

STAGES = {
    "sft": (sft, ""),
    "rlvr": (rlvr, "--group-size 4"),
    "rlvr-kl": (rlvr, "--group-size 4 --kl-coef 0.1"),  # the reference is --init, before and after
    "opsd": (opsd, ""),
    "opsd-ema": (opsd, "--teacher ema --ema-decay 0.8"),
    "opsd-refresh": (opsd, "--teacher refresh --refresh-every 2"),
}


def flags_of(base, name, out, steps=6):
    """Evaluation and saves fall on odd places: a resumed run can't be right by landing on them."""
    flags = "--warmup-steps 4 --eval-every 4 --save-every 100 --lr 1e-3 --max-new-tokens 23"
    paths = ["--init", base / "sft", "--out", out]
    return [*paths, f"--steps {steps}", TINY, flags, STAGES[name][1]]


def metrics_but_time(path):
    """metrics.jsonl without what a clock decides."""
    timed = lambda key: key.startswith(("time/", "perf/"))  # noqa: E731
    return [{k: v for k, v in row.items() if not timed(k)} for row in read_rows(path)]


def equal(a, b):
    """Bit for bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_run(ours, theirs):
    """Weights, optimizer, position in the data, teacher, logs."""
    metrics = [metrics_but_time(Path(out, "metrics.jsonl")) for out in (ours, theirs)]
    assert metrics[0] == metrics[1]
    assert same_tensors(weights(ours), weights(theirs)), "the weights differ"
    states = [torch.load(Path(out, "trainer_state.pt")) for out in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert not [key for key in states[0] if not equal(states[0][key], states[1][key])]
    assert read_rows(Path(ours, "samples.jsonl")) == read_rows(Path(theirs, "samples.jsonl"))


@pytest.mark.parametrize("name", STAGES)
def test_stopped_and_resumed_is_the_run_left_alone(base, luck, name):
    """3 steps, --resume, 3 more == 6 steps, bit for bit. Any state that is not saved shows: AdamW's
    moments, the step (learning rate), the position in the data, the sampler's seed, a teacher that
    moves, the counts of skipped steps."""
    stage = STAGES[name][0]
    assert run_stage(stage, *flags_of(base, name, "whole"))[0] == 0
    status, out, _ = run_stage(stage, *flags_of(base, name, "parts"), "--stop-after 3")
    command = f"python {stage.__name__}.py --resume --out parts"
    assert status == 0 and out.endswith(f"stopped after step 3; go on with: {command}\n")
    assert torch.load("parts/trainer_state.pt")["step"] == 3
    assert not same_tensors(weights("parts"), weights("whole"))
    status, out, err = run_stage(stage, "--resume --out parts")
    assert status == 0, err
    assert "next: python" in out
    assert_same_run("parts", "whole")


@pytest.mark.parametrize("name", ["sft", "rlvr", "opsd"])
def test_a_stop_at_the_last_step_is_the_end(base, luck, name):
    """There is nothing to go on with: the last line is the next command, and a script goes on."""
    status, out, _ = run_stage(STAGES[name][0], *flags_of(base, name, "out", steps=2), "--stop-after 2")
    assert status == 0 and "next: python" in out.splitlines()[-1] and "stopped" not in out


@pytest.mark.parametrize("name", ["rlvr-kl", "opsd"])
def test_init_is_another_model_on_resume(base, luck, name):
    """The frozen teacher and the reference are loaded from --init again. If another run has written there
    since, the rest of this run would learn from another teacher, without a word."""
    stage = STAGES[name][0]
    shutil.copytree(base / "sft", "init")
    flags = ["--init", "init", *flags_of(base, name, "out")[2:]]
    assert run_stage(stage, *flags, "--stop-after 2")[0] == 0
    one_step = flags_of(base, "sft", "init", steps=1)
    assert run_stage(sft, *one_step, "--overwrite")[0] == 0
    status, _, err = run_stage(stage, "--resume --out out")
    assert status == 2 and err.startswith("error: --resume: init is not the model that"), err
    assert err.count("\n") == 1, err
    shutil.rmtree("init")
    shutil.copytree(base / "sft", "init")
    assert run_stage(stage, "--resume --out out")[0] == 0


def test_flags_may_be_repeated_on_resume(base):
    """--resume with the flags of the first call, all of them, is no contradiction."""
    flags = flags_of(base, "sft", "out", steps=2)
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    status, _, err = run_stage(sft, *flags, "--resume")
    assert status == 0, err
    assert torch.load("out/trainer_state.pt")["step"] == 2


def test_resume_of_a_finished_run_changes_nothing(base):
    """A shell script that always says --resume must not train a finished run further."""
    assert run_stage(sft, *flags_of(base, "sft", "out", steps=2))[0] == 0
    shutil.copytree("out", "before")
    status, out, _ = run_stage(sft, "--resume --out out")
    assert status == 0 and "next: python" in out
    assert_same_run("out", "before")


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_every_batch_of_every_window(base, monkeypatch, stop):
    """sft.py draws its batches a window at a time. One that is skipped at a window's edge, a window that is drawn once
    and for ever, one that starts anew on --resume: the loss falls all the same. Windows of 2, stopped at each place."""
    monkeypatch.setattr(sft, "WINDOW", 2)
    drawn, trained, accumulate = [], [], sft.accumulate_gradients

    def reading(model, examples, size):
        trained.append([(e.prompt_ids, e.response_ids) for e in examples])
        return accumulate(model, examples, size)

    def drawing(window, *rest, draw_batches=sft.draw_batches):
        drawn[:] = [[(e.prompt_ids, e.response_ids) for e in batch] for w in range(3) for batch in draw_batches(w, *rest)]
        return draw_batches(window, *rest)

    monkeypatch.setattr(sft, "accumulate_gradients", reading)
    monkeypatch.setattr(sft, "draw_batches", drawing)
    assert run_stage(sft, *flags_of(base, "sft", "out"), f"--stop-after {stop}")[0] == 0
    assert run_stage(sft, "--resume --out out")[0] == 0
    assert trained == drawn and len(trained) == 6


def test_what_may_change_on_resume(base, monkeypatch):
    """Memory and the machine, and no result: a run goes on with another device or less memory. What is not given again
    stays as it was: after the default, that is, the run would be out of memory once more."""
    flags = "--micro-batch-size 3 --gradient-checkpointing --vllm-memory 0.5 --stop-after 1"
    assert run_stage(sft, *flags_of(base, "sft", "out"), flags)[0] == 0
    monkeypatch.setattr("test_chain.DEVICE", "cpu:0")
    assert run_stage(sft, "--resume --out out --stop-after 1")[0] == 0
    saved = json.loads(Path("out/args.json").read_text())
    assert (saved["device"], saved["micro_batch_size"], saved["vllm_memory"]) == ("cpu:0", 3, 0.5)
    assert saved["gradient_checkpointing"]
    flags = "--micro-batch-size 1 --vllm-memory 0.2 --stop-after 1"
    status, _, err = run_stage(sft, "--resume --out out", flags)
    assert status == 0, err
    saved = json.loads(Path("out/args.json").read_text())
    assert (saved["micro_batch_size"], saved["vllm_memory"]) == (1, 0.2)


def test_skipped_steps_are_counted_over_a_resume(base, monkeypatch):
    """The last line counts the run's steps without a rollout to keep, not those since the last --resume."""
    monkeypatch.setattr(rollout, "verify_batch", lambda texts, golds: [False] * len(texts))
    arm = "--only-correct --match-budget --max-refills 1"
    assert run_stage(opsd, *flags_of(base, "opsd", "out", steps=3), arm, "--stop-after 2")[0] == 0
    status, out, _ = run_stage(opsd, "--resume --out out")
    assert status == 0 and "3 of 3 steps had no rollout to keep" in out and "3 of 3 steps kept fewer than 4" in out


@pytest.mark.parametrize("name", ["sft", "rlvr", "opsd"])
def test_killed_between_saves(base, luck, monkeypatch, name):
    """Saved at step 2, killed after step 3 was logged: the resumed run logs step 3 once."""
    stage = STAGES[name][0]
    flags = flags_of(base, name, "parts", steps=4)
    assert run_stage(stage, *flags_of(base, name, "whole", steps=4))[0] == 0

    def die_after_the_line_of_step_3(path, rows, append_jsonl=rollout.append_jsonl):
        append_jsonl(path, rows)
        if path.name == "metrics.jsonl" and rows[0]["step"] == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stage, "append_jsonl", die_after_the_line_of_step_3)
        with pytest.raises(Killed):
            run_stage(stage, *flags, "--save-every 2")
    assert [row["step"] for row in read_rows("parts/metrics.jsonl")] == [0, 1, 2, 3]
    assert run_stage(stage, "--resume --out parts")[0] == 0
    assert_same_run("parts", "whole")


def test_half_a_line_in_a_log(base):
    """A kill, or a full disk, can cut a log's last line short: that line goes, the run goes on. So does, from both logs,
    what came after the save: each sample of that step would be there twice."""
    assert run_stage(sft, *flags_of(base, "sft", "whole", steps=2))[0] == 0
    assert run_stage(sft, *flags_of(base, "sft", "parts", steps=2), "--stop-after 1")[0] == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(Path("parts", name), "a") as log:
            log.write('{"step": 2, "of": "a step that was not saved"}\n{"step": 2, "lo')
    assert run_stage(sft, "--resume --out parts")[0] == 0
    assert_same_run("parts", "whole")


# ---------------------------------------------------------------------------------------------------
# Ctrl-C


def test_ctrl_c(base):
    """A real SIGINT: the step is finished and saved, status 130, the last line says what to do."""
    process = start_command("sft.py", *flags_of(base, "sft", "out", steps=100_000))
    try:
        for line in process.stdout:
            if line.startswith("sft"):  # the first step is done
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and err == ""
    step = torch.load("out/trainer_state.pt")["step"]
    assert step >= 1 and read_rows("out/metrics.jsonl")[-1]["step"] == step
    assert out.splitlines()[-1].startswith(f"stopped after step {step}; go on with: python ")
    assert out.endswith("sft.py --resume --out out\n")
    assert run_stage(sft, "--resume --out out --stop-after 1")[0] == 0
    assert torch.load("out/trainer_state.pt")["step"] == step + 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_second_signal_stops_at_once(number, capsys):
    """A cluster's SIGTERM is asked for as Ctrl-C is. And whoever presses Ctrl-C twice does not want to wait for a step
    of minutes: the second one is the system's own."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupt = rollout.Interrupt(SimpleNamespace(out="out", stop_after=None), 0)
        assert not interrupt.now(1) and signal.getsignal(number) == interrupt.ask
        signal.raise_signal(number)
        assert interrupt.now(1) and signal.getsignal(number) is signal.SIG_DFL
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert "once more to stop at once" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------
# kill -9 during a save


class Killed(BaseException):
    """Stands for kill -9: nothing in the stages catches it."""


def die_at(patch, point):
    """From now on the point-th operation on files is the last: half done, and the process is gone.
    Returns a counter of operations."""
    count = SimpleNamespace(operations=0)

    def deadly(original, half):
        def operation(*args, **kwargs):
            count.operations += 1
            if count.operations == point:
                half(*args)
                raise Killed
            return original(*args, **kwargs)

        return operation

    def nothing(*args):
        pass

    def write_half(path, text):
        Path(path).open("w").write(text[: len(text) // 2])

    def delete_half(folder, *rest):
        for path in sorted(Path(folder).glob("*"))[::2]:
            path.unlink()

    def save_half(state, path):
        Path(path).write_bytes(b"PK\3\4 half a state")

    def save_no_weights(model, folder):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "config.json").write_text("{}")

    for owner, name, half in [
        (transformers.PreTrainedModel, "save_pretrained", save_no_weights),
        (transformers.PreTrainedTokenizerFast, "save_pretrained", nothing),
        (Path, "write_text", write_half),
        (torch, "save", save_half),
        (shutil, "rmtree", delete_half),
        (Path, "rename", nothing),
        (Path, "replace", nothing),
        (Path, "rmdir", nothing),
    ]:
        patch.setattr(owner, name, deadly(getattr(owner, name), half))
    return count


def test_kill_at_every_point_of_a_save(base, monkeypatch):
    """Wherever a save is cut short, there is a checkpoint, the last or the new one, of one piece;
    the resumed run ends as the run that was left alone."""
    assert run_stage(sft, *flags_of(base, "sft", "before", steps=2), "--stop-after 1")[0] == 0
    shutil.copytree("before", "after")
    assert run_stage(sft, "--resume --out after")[0] == 0
    model, tokenizer = rollout.load_model("after")
    args = SimpleNamespace(**json.loads(Path("after/args.json").read_text()) | {"out": "out"})
    optimizer = sft.make_optimizer(model, args)
    state = torch.load("after/trainer_state.pt")
    optimizer.load_state_dict(state.pop("optimizer"))

    steps_found = []
    for point in range(1, 100):
        for path in Path().glob("out*"):
            shutil.rmtree(path)
        shutil.copytree("before", "out")
        for log in ("metrics.jsonl", "samples.jsonl"):
            shutil.copy2(Path("after", log), "out")
        Path("out/notes.txt").write_text("mine")
        with monkeypatch.context() as patch:
            count = die_at(patch, point)
            try:
                rollout.save_checkpoint(args, model, tokenizer, optimizer, state)
                break
            except Killed:
                pass
        rollout.load_model("out")  # as eval.py and the next stage load it
        step = torch.load("out/trainer_state.pt")["step"]
        steps_found.append(step)
        assert same_tensors(weights("out"), weights("before" if step == 1 else "after")), point
        assert read_rows("out/metrics.jsonl") == read_rows("after/metrics.jsonl")
        assert Path("out/notes.txt").read_text() == "mine"
        if point % 4 == 0 or step != steps_found[0]:
            status, _, err = run_stage(sft, "--resume --out out")
            assert status == 0, err
            assert_same_run("out", "after")
    assert count.operations >= 15 and set(steps_found) == {1, 2}, "no kill came in the save's middle"
    assert steps_found == sorted(steps_found), "what was whole is lost by a later kill"
    assert_same_run("out", "after")
    left = [path.name for path in [*Path().glob("out*"), *Path("out").iterdir()]]
    assert sorted(left) == sorted(["out", "notes.txt", *os.listdir("after")])  # nothing is left lying about


def kill_at_the_end_of_a_save(folder):
    """What was saved before, and in save.whole what was not yet moved."""
    Path(folder, "save.whole").mkdir()
    for name in ("model.safetensors", "args.json", "config.json", "tokenizer.json", "trainer_state.pt"):
        Path(folder, name).rename(Path(folder, "save.whole", name))
        if name != "args.json":
            Path(folder, name).write_bytes(b"of the save before")


@pytest.mark.parametrize("stage", [rlvr, opsd, eval_stage], ids=lambda stage: stage.__name__)
def test_next_stage_after_a_kill_at_the_end_of_a_save(base, stage):
    """Half of the checkpoint lies in PATH/save.whole then. The next stage finds it, and its data with it."""
    shutil.copytree(base / "sft", "sft")
    kill_at_the_end_of_a_save("sft")
    train = f"--init sft --out out --steps 1 {TINY}"
    flags = "sft --n 1 --problems 2" if stage is eval_stage else train
    status, out, err = run_stage(stage, flags, "--max-new-tokens 8")
    assert status == 0, err
    assert f"data: {base / 'problems.jsonl'}" in out


@pytest.mark.parametrize("how", ["--resume", "", "--overwrite"])
def test_the_run_itself_after_a_kill_at_the_end_of_a_save(base, how):
    """--resume goes on from the save that was whole; a new run does not take OUT for free, and --overwrite
    does."""
    flags = flags_of(base, "sft", "out", steps=2)
    assert run_stage(sft, *flags, "--stop-after 1")[0] == 0
    kill_at_the_end_of_a_save("out")
    status, _, err = run_stage(sft, *flags, how)
    if how:
        assert status == 0, err
        steps = [row["step"] for row in read_rows("out/metrics.jsonl") if "loss" in row]
        assert steps == [1, 2] and [path.name for path in Path().glob("out*")] == ["out"]
    else:
        assert status == 2 and "out is not empty" in err and torch.load("out/trainer_state.pt")["step"] == 1
