"""The four commands one after the other, every choice they offer, and what they leave behind.

`run_stage` and the small world at the top serve test_resume.py and test_bad_input.py too.
"""

import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

import eval as eval_stage
import opsd
import rlvr
import rollout
import sft

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cpu"  # bit-equal sums are asked for below, also where there is a GPU
TINY = "--batch-size 4 --eval-problems 4 --max-new-tokens 24"
COMMON_FLAGS = """--init --out --data --steps --batch-size --micro-batch-size --lr --warmup-steps
    --weight-decay --grad-clip --max-new-tokens --temperature --seed --device --dtype --eval-every
    --save-every --resume --stop-after"""
EVAL_FLAGS = "--data --problems --n --k --max-new-tokens --temperature --json --plot --samples"
SAMPLE_KEYS = {"prompt", "response", "gold", "label", "length", "finish"}
METRICS = {  # the keys of a training line of metrics.jsonl
    "sft": "step loss lr grad_norm time/train perf/tok_s",
    "rlvr": """step loss lr grad_norm reward/mean reward/frac_zero_std response/len_mean
        response/len_correct response/truncated entropy kl/ref ratio/clip_frac kl/sample_train
        time/rollout time/train perf/tok_s""",
    "opsd": """step loss lr grad_norm distill/kl distill/kept_frac distill/accuracy
        response/len_mean response/len_correct response/truncated time/rollout time/train
        perf/tok_s""",
}


# ---------------------------------------------------------------------------------------------------
# Helpers


def words(flags):
    """What a shell makes of it: a str is split at blanks, anything else, such as a Path, is not."""
    return [word for x in flags for word in (x.split() if isinstance(x, str) else [str(x)])]


def run_stage(stage, *flags, device=None):
    """Calls main() here as `python stage.py FLAGS` would -> exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, [f"{stage.__name__}.py", *words(flags), "--device", device or DEVICE]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            stage.main()
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def start_command(script, *flags, cwd="."):
    """`python SCRIPT FLAGS` in a process of its own, the script being one of ROOT's."""
    command, pipe = [sys.executable, str(ROOT / script), *words(flags)], subprocess.PIPE
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | offline
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def weights(checkpoint):
    return load_file(Path(checkpoint, "model.safetensors"))


def same_tensors(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def word_problems(count=60):
    """Rows in GSM8K's form: the answer is a solution with calculator marks, then #### gold."""
    rng, rows = random.Random(1), []
    for i in range(count):
        name, a, b = ["Ann", "Bob", "Eve"][i % 3], rng.randint(2, 40), rng.randint(2, 40)
        question = f"{name} has {a} apples and buys {b} more. How many apples has {name} now?"
        solution = f"{name} has {a}+{b}=<<{a}+{b}={a + b}>>{a + b} apples."
        rows.append({"question": question, "answer": f"{solution}\n#### {a + b}"})
    return rows


@functools.cache
def small_world(root):
    """-> the folder of problems.jsonl, and of sft, a checkpoint whose responses end."""
    folder = root / "small world"
    folder.mkdir()
    data = write_rows(folder / "problems.jsonl", word_problems())
    flags = "--steps 45 --warmup-steps 5 --batch-size 8 --eval-problems 2 --max-new-tokens 8"
    with pytest.MonkeyPatch.context() as patch:  # one layer does, and takes a third of the time
        patch.setattr(sft, "Qwen3Config", lambda **shape: Qwen3Config(**shape | {"num_hidden_layers": 1}))
        status, out, _ = run_stage(sft, "--data", data, "--out", folder / "sft", flags)
    assert status == 0, out
    return folder


@pytest.fixture(name="base")
def base_fixture(tmp_path_factory, tmp_path, monkeypatch):
    """The folder of the small world; the test itself runs in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return small_world(tmp_path_factory.getbasetemp())


@pytest.fixture(name="luck")
def luck_fixture(monkeypatch):
    """About half of the finished responses count as correct: earning that would take minutes."""
    monkeypatch.setattr(rollout, "verify_batch", lambda texts, golds: [len(text) % 2 == 0 for text in texts])


# ---------------------------------------------------------------------------------------------------
# The chain


def check_checkpoint(path):
    """What a stage leaves: a checkpoint that plain transformers loads, flags, logs. -> The training
    lines of metrics.jsonl."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert tokenizer.chat_template and tokenizer.eos_token_id != tokenizer.pad_token_id
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    flags = json.loads(Path(path, "args.json").read_text())
    assert torch.load(Path(path, "trainer_state.pt"))["step"] == flags["steps"]
    samples = read_rows(Path(path, "samples.jsonl"))
    assert not (SAMPLE_KEYS | {"step", "kind"}) - set.intersection(*map(set, samples))
    assert {row["label"] for row in samples} <= {"correct", "incorrect", "truncated"}
    assert all((row["finish"] == "length") == (row["label"] == "truncated") for row in samples)
    metrics = read_rows(Path(path, "metrics.jsonl"))
    evals = [row for row in metrics if "eval/accuracy" in row]
    assert evals[0]["step"] == 0 and evals[-1]["step"] == flags["steps"]
    assert {"eval/len_mean", "eval/len_correct", "eval/truncated"} <= evals[0].keys()
    return [row for row in metrics if "eval/accuracy" not in row]


def next_command(stdout):
    last = stdout.splitlines()[-1]
    assert last.startswith("next: python "), f"the closing line is not the next command: {last!r}"
    return last.removeprefix("next: python ").split()


def test_four_commands_on_the_built_in_world(tmp_path):
    """A fresh clone, each stage's last line typed as it stands, but for tiny sizes. Guards against
    a stage that needs what the stage before does not write, and default paths that disagree."""
    command = ["sft.py"]
    for name in ("sft", "rlvr", "opsd"):
        process = start_command(*command, TINY, "--steps 2", cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == "", err
        assert "data: arithmetic" in out and command[0] == f"{name}.py"
        check_checkpoint(tmp_path / "ckpt" / name)
        command = next_command(out)
    assert command == ["eval.py", "ckpt/rlvr", "ckpt/opsd"]
    small = "--problems 3 --n 2 --max-new-tokens 16 --plot f.svg --json r.json"
    process = start_command(*command, small, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "ckpt/rlvr" in out and "ckpt/opsd" in out
    assert len(json.loads((tmp_path / "r.json").read_text())["checkpoints"]) == 2
    assert "<svg" in (tmp_path / "f.svg").read_text()


def test_chain_on_your_own_problems(tmp_path, monkeypatch, luck):
    """GSM8K's form, model and tokenizer from scratch; --data is given once, followed to the end."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "mine.jsonl", word_problems())
    status, out, _ = run_stage(sft, TINY, "--data mine.jsonl --steps 40 --warmup-steps 3")
    assert status == 0 and next_command(out) == ["rlvr.py", "--init", "ckpt/sft"]
    for stage, flag in [(rlvr, "--kl-coef 0.1"), (opsd, "--match-budget --truncated correct")]:
        status, out, _ = run_stage(stage, *next_command(out)[1:], TINY, "--steps 2", flag)
        assert status == 0 and "data: mine.jsonl (" in out
    for name in ("sft", "rlvr", "opsd"):
        assert json.loads(Path("ckpt", name, "args.json").read_text())["data"] == "mine.jsonl"
        rows = check_checkpoint(Path("ckpt", name))
        assert not set(METRICS[name].split()) - rows[-1].keys()
        assert all(math.isfinite(row["loss"]) for row in rows)
    small = "--problems 3 --n 2 --max-new-tokens 24"
    status, out, _ = run_stage(eval_stage, *next_command(out)[1:], small)
    assert status == 0 and "data: mine.jsonl (3 problems, held out; 2 responses to each)" in out


def test_eval_files(base):
    """--json, --samples and --plot: other people's scripts read these keys, a sample a line."""
    flags = "--problems 3 --n 4 --k 2 --max-new-tokens 22"
    files = "--json r.json --samples s.jsonl --plot f.png"
    status, _, err = run_stage(eval_stage, base / "sft", base / "sft", flags, files)
    assert status == 0, err
    rows = json.loads(Path("r.json").read_text())["checkpoints"]
    keys = {"checkpoint", "problems", "n", "k"}
    for key in ("accuracy", "length", "think_length", "truncated", "pass_at_k", "maj_at_k"):
        keys |= {key, f"{key}_se"}
    assert len(rows) == 2 and all(keys <= row.keys() for row in rows), keys - rows[0].keys()
    assert rows[0]["checkpoint"] == str(base / "sft") and 0 <= rows[0]["truncated"] <= 1
    assert rows[1]["accuracy_change"] == 0 and rows[1]["length_change"] == 0
    samples = read_rows("s.jsonl")
    assert len(samples) == 2 * 3 * 4 and SAMPLE_KEYS <= samples[0].keys()
    lengths, cut = zip(*((s["length"], s["label"] == "truncated") for s in samples[:12]))
    assert sum(lengths) / 12 == pytest.approx(rows[0]["length"])
    assert sum(cut) / 12 == pytest.approx(rows[0]["truncated"])
    assert Path("f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags", ["--temperature 0 --n 1", "--n 2 --k 1", "--seed 7"])
def test_eval_options(base, flags):
    """Greedy decoding, pass@1 and another seed run through."""
    status, out, _ = run_stage(eval_stage, base / "sft", "--problems 2 --max-new-tokens 8", flags)
    assert status == 0 and "accuracy" in out


def test_eval_reads_a_data_file_whole(base):
    """--data FILE is a benchmark: all its problems count, not one in twenty."""
    flags = "--n 1 --max-new-tokens 4 --json r.json"
    data = ["--data", base / "problems.jsonl"]
    assert run_stage(eval_stage, base / "sft", *data, flags)[0] == 0
    assert json.loads(Path("r.json").read_text())["checkpoints"][0]["problems"] == 60


def test_an_example_side_by_side(base, monkeypatch):
    """Plain where the output is no terminal: no escape codes in a file; and each model against itself."""
    monkeypatch.setenv("COLUMNS", "90")
    flags = "--example --max-new-tokens 12 --data arithmetic --seed"
    status, out, err = run_stage(eval_stage, base / "sft", base / "sft", flags, 1)
    assert status == 0 and "\033" not in out, err
    assert "problem:  Compute " in out and "answer:   " in out and "the teacher would say" in out
    assert all(len(line) <= 90 for line in out.split("answer:")[1].split("KL(")[0].splitlines()[:-1])
    assert out != run_stage(eval_stage, base / "sft", base / "sft", flags, 2)[1]  # another problem


def test_thinking_is_remembered(base):
    """A model that was trained without thinking, then sampled with it, starts from a prompt that it never saw."""
    tiny = "--steps 1 --batch-size 2 --eval-problems 2 --max-new-tokens 8"
    assert run_stage(sft, "--init", base / "sft", tiny, "--no-thinking --out short")[0] == 0
    assert run_stage(rlvr, "--init short --out short-rlvr", tiny)[0] == 0
    assert run_stage(rlvr, "--init short-rlvr --thinking --out long-rlvr", tiny)[0] == 0
    thinks = [json.loads(Path(f, "args.json").read_text())["thinking"] for f in ("short-rlvr", "long-rlvr")]
    assert thinks == [False, True]
    flags = "--n 1 --problems 2 --max-new-tokens 8 --samples s.jsonl"
    for checkpoint, ending in ("short-rlvr", "<think></think>"), ("long-rlvr", "<|assistant|>"):
        assert run_stage(eval_stage, checkpoint, flags)[0] == 0
        assert read_rows("s.jsonl")[0]["prompt"].endswith(ending)


def test_the_shortest_of_n_goes_back_into_sft(base, luck):
    """Rejection sampling is two commands: eval.py writes what sft.py reads."""
    flags = "--train --problems 6 --n 8 --max-new-tokens 24 --shortest short.jsonl"
    status, out, err = run_stage(eval_stage, base / "sft", flags)
    assert status == 0 and "6 problems, of the training part" in out and len(read_rows("short.jsonl")) == 6, err
    command = next(line for line in out.splitlines() if "python sft.py" in line)
    flags = command.split(f"--init {base / 'sft'}")[1].split()
    assert "--warmup-steps 0 --weight-decay 0" in command  # with 50 steps of warm-up, 40 would teach little
    small = "--batch-size 2 --eval-problems 2 --steps 2"
    status, out, err = run_stage(sft, "--init", base / "sft", *flags, small)
    assert status == 0 and "(5 problems to train on, 1 held out)" in out, err


# ---------------------------------------------------------------------------------------------------
# Every flag


@pytest.mark.parametrize("stage", [sft, rlvr, opsd, eval_stage], ids=lambda stage: stage.__name__)
def test_help(stage, monkeypatch):
    """A stray % in a help text breaks --help and nothing else, so that nobody notices."""
    monkeypatch.setenv("COLUMNS", "120")
    status, out, _ = run_stage(stage, "--help")
    wanted = EVAL_FLAGS if stage is eval_stage else COMMON_FLAGS
    assert status == 0 and not set(wanted.split()) - set(re.findall(r"--[a-z-]+", out))


def train(stage, base, *flags, steps=2):
    """Some steps from base / sft, in ./out -> training lines of metrics.jsonl, stdout."""
    always = f"--out out --steps {steps} --warmup-steps 0 {TINY}"
    status, out, err = run_stage(stage, "--init", base / "sft", always, *flags)
    assert status == 0, err
    return [row for row in read_rows("out/metrics.jsonl") if "eval/accuracy" not in row], out


def check_that_it_trained(base, rows, steps=2):
    """Finite losses at every step, and weights that are finite, float32 and not what they were."""
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    before, after = weights(base / "sft"), weights("out")
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in after.values())
    assert not any(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("flags", ["--privileged-frac 0", "--privileged-frac 1"])
def test_sft_options(base, flags):
    """All, or none, of the demonstrations after the teacher's prompt."""
    check_that_it_trained(base, train(sft, base, flags)[0])


@pytest.mark.parametrize(
    "flags",
    [
        "--no-std",
        "--loss-normalization sequence",
        "--loss-normalization constant --truncated mask",
        "--kl-coef 0.1 --micro-batch-size 5",
        "--updates-per-batch 2 --clip-low 0.1 --clip-high 0.1 --ratio-cap 2",
        "--refill 2 --group-size 2 --temperature 0.7",
    ],
)
def test_rlvr_options(base, luck, flags):
    """Each way to run RLVR takes two steps that change the weights; at the first one, sampler and
    trainer compute the same policy; only --kl-coef gives a KL to the initial one."""
    rows, _ = train(rlvr, base, flags)
    check_that_it_trained(base, rows)
    assert abs(rows[0]["kl/sample_train"]) < 1e-6
    assert (rows[1]["kl/ref"] > 0) == ("--kl-coef" in flags)


def spy_on_rollouts(monkeypatch, stage):
    """-> a list that fills with the rollouts of each update, a list of them for each."""
    seen, original = [], stage.accumulate_gradients

    def spying(model, other, rollouts, *rest):
        if torch.is_grad_enabled():  # without, opsd.py only measures
            seen.append(rollouts)
        return original(model, other, rollouts, *rest)

    monkeypatch.setattr(stage, "accumulate_gradients", spying)
    return seen


@pytest.mark.parametrize("truncated", ["penalize", "mask"])
def test_rlvr_truncated(base, luck, monkeypatch, truncated):
    """penalize trains on responses that were cut off, mask does not."""
    seen = spy_on_rollouts(monkeypatch, rlvr)
    rows, _ = train(rlvr, base, "--max-new-tokens 22 --truncated", truncated)
    check_that_it_trained(base, rows)
    assert 0 < rows[0]["response/truncated"] < 1
    labels = {rollout.label for rollouts in seen for rollout in rollouts}
    assert labels - {"truncated"} == {"correct", "incorrect"}
    assert ("truncated" in labels) == (truncated == "penalize")


@pytest.mark.parametrize("stage", [sft, rlvr, opsd], ids=lambda stage: stage.__name__)
def test_gradient_checkpointing_changes_no_weight(base, luck, stage):
    """It works in train mode only, where a model has dropout, and without a cache, which sampling needs."""
    trained = []
    for flags in ("", "--gradient-checkpointing", "--attn-implementation eager"):
        shutil.rmtree("out", ignore_errors=True)
        rows, _ = train(stage, base, flags)
        check_that_it_trained(base, rows)
        trained.append(weights("out"))
    assert same_tensors(trained[0], trained[1])
    for key in trained[0]:
        assert torch.allclose(trained[0][key], trained[2][key], atol=1e-4)


def test_rlvr_with_a_reward_of_the_users(base):
    """--reward takes a function of a file in the user's folder; what is cut off still gets 0."""
    Path("my_rewards.py").write_text("def brevity(response, gold):\n    return 1 / (1 + len(response))\n")
    rows, _ = train(rlvr, base, "--reward my_rewards:brevity --max-new-tokens 22")
    check_that_it_trained(base, rows)
    assert all(0 < row["reward/mean"] < 1 and row["reward/mean"] != row["accuracy"] for row in rows)
    assert all(row["reward/mean"] <= 1 - row["response/truncated"] for row in rows)


@pytest.mark.parametrize("stage", [rlvr, opsd], ids=lambda stage: stage.__name__)
def test_step_with_nothing_to_learn_from(base, stage, monkeypatch):
    """No reward anywhere: no gradient, no NaN, no division by zero, weights as they were."""
    monkeypatch.setattr(rollout, "verify_batch", lambda texts, golds: [False] * len(texts))
    rows, out = train(stage, base, "--only-correct" if stage is opsd else "")
    assert [row["step"] for row in rows] == [1, 2] and not any("grad_norm" in row for row in rows)
    assert same_tensors(weights(base / "sft"), weights("out"))
    assert stage is rlvr or "2 of 2 steps had no rollout to keep and were skipped" in out


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--divergence forward",
        "--divergence jsd --beta 0.3",
        "--divergence split",
        "--context answer",
        "--context rollout --group-size 4",
        "--context concise",
        "--context wrong-answer",
        "--context other-solution",
        "--teacher refresh --refresh-every 1",
        "--teacher ema --ema-decay 0.5",
        "--micro-batch-size 1 --temperature 0.7",
        "--truncated drop --max-new-tokens 22",
        "--token-clip 0.01",
    ],
)
def test_opsd_options(base, luck, flags):
    """Each divergence, context and teacher takes two steps that change the weights."""
    rows, _ = train(opsd, base, flags)
    check_that_it_trained(base, rows)
    assert all(row["distill/kl"] > 0 for row in rows)


def test_what_is_not_kept_is_measured_now_and_then(base, luck, monkeypatch):
    """There can be ten times as many of them as are trained on. At step 1, every --eval-every steps and at the last
    one their KL is in the log; at other steps only that of the kept."""
    rows, _ = train(opsd, base, "--only-correct --eval-every 3 --batch-size 8", steps=5)
    measured = ["distill/kl_incorrect" in row or "distill/kl_truncated" in row for row in rows]
    assert measured == [True, False, True, False, True]
    assert all("distill/kl_correct" in row for row in rows)


def test_opsd_without_context_is_a_no_op(base, luck):
    """A teacher that sees what the student sees is the student: the first divergence is 0, unless
    the two sides disagree by a token, a mask or a chat template."""
    rows, _ = train(opsd, base, "--context none", steps=1)
    assert abs(rows[0]["distill/kl"]) < 1e-6


@pytest.mark.parametrize("flags", ["", "--truncated correct", "--truncated drop"])
@pytest.mark.parametrize("arm", ["--only-correct", "--only-incorrect", ""])
def test_opsd_arms(base, luck, monkeypatch, arm, flags):
    """An arm trains on what it says, and on truncated rollouts as --truncated counts them. With
    --match-budget each update has the batch size, so that the arms are compared fairly."""
    seen = spy_on_rollouts(monkeypatch, opsd)
    rows, _ = train(opsd, base, arm, "--match-budget --max-new-tokens 22", flags)
    check_that_it_trained(base, rows)
    assert [len(rollouts) for rollouts in seen] == [4, 4]
    labels = {rollout.label for rollouts in seen for rollout in rollouts}
    counts_as = flags.removeprefix("--truncated ") or "incorrect"
    kept = {arm.removeprefix("--only-")} if arm else {"correct", "incorrect"}
    assert labels == (kept | {"truncated"} if counts_as in kept else kept)


@pytest.mark.parametrize("stage", [rlvr, opsd], ids=lambda stage: stage.__name__)
def test_sampler_and_trainer_are_the_same_model(base, luck, monkeypatch, stage):
    """kl/sample_train is 0 but for rounding at every step; weights that were not synced show in it."""
    rows, _ = train(stage, base)
    assert all(abs(row["kl/sample_train"]) < 1e-6 for row in rows)
    shutil.rmtree("out")
    original = rollout.HFSampler.generate

    def stale(self, *args, **kwargs):
        if kwargs["max_new_tokens"] == 6:  # the check at start, which would refuse it
            return original(self, *args, **kwargs)
        for r in (rollouts := original(self, *args, **kwargs)):
            r.log_probs = [x - 0.1 for x in r.log_probs]
        return rollouts

    monkeypatch.setattr(rollout.HFSampler, "generate", stale)
    rows, _ = train(stage, base)
    assert all(row["kl/sample_train"] == pytest.approx(0.00517, abs=1e-4) for row in rows)  # e^.1 - 1 - .1


def test_opsd_rollout_context_without_a_correct_sibling(base, monkeypatch):
    """Where no sibling is correct there is nothing to show: the step is skipped, not a crash."""
    monkeypatch.setattr(rollout, "verify_batch", lambda texts, golds: [False] * len(texts))
    rows, out = train(opsd, base, "--context rollout --group-size 2")
    assert len(rows) == 2 and "2 of 2 steps had no rollout to keep" in out
    assert all(row["distill/accuracy"] == 0 for row in rows)


@pytest.mark.parametrize("stage", [sft, rlvr, opsd], ids=lambda stage: stage.__name__)
def test_bfloat16(base, luck, stage):
    """The dtype of the computation. Weights in bfloat16 would lose most updates to rounding."""
    rows, _ = train(stage, base, "--dtype bfloat16 --lr 1e-5")
    check_that_it_trained(base, rows)
    assert any(not torch.equal(x, x.bfloat16().float()) for x in weights("out").values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_that_of_the_computation_at_every_step(tmp_path, dtype):
    """Autocast keeps its bfloat16 copies of the weights until it ends, and here it ends with the run: each step would
    compute with the weights of the first. And a --dtype that is not passed on is seen in the speed only."""
    layer, x = torch.nn.Linear(4, 4), torch.ones(1, 4)
    with rollout.run_in(tmp_path / "out", SimpleNamespace(device="cpu", dtype=dtype, micro_batch_size=1)):
        before = layer(x)
        with torch.no_grad():
            layer.weight += 1  # an update
        after = layer(x)
    assert before.dtype == after.dtype == getattr(torch, dtype)
    assert torch.allclose(after - before, torch.full_like(after, 4.0), atol=0.1)


# ---------------------------------------------------------------------------------------------------
# What a flag says reaches every place that it is about

THREE = pytest.mark.parametrize("stage", [sft, rlvr, opsd], ids=lambda stage: stage.__name__)


@THREE
def test_measured_every_so_many_steps(base, luck, stage):
    """Before the first step, every --eval-every steps and after the last one: a curve of two points is none."""
    train(stage, base, "--eval-every 2", steps=5)
    measured = [row["step"] for row in read_rows("out/metrics.jsonl") if "eval/accuracy" in row]
    assert measured == [0, 2, 4, 5]


@THREE
def test_flags_of_prompts_and_sampling_hold_everywhere(base, luck, stage, monkeypatch):
    """One place that forgets --no-thinking trains on, or measures with, a prompt that the model meets nowhere else; one
    that forgets --temperature measures another policy. Whatever is sampled or trained on is looked at here."""
    calls, prompts, generate, collate = [], [], rollout.HFSampler.generate, stage.collate

    def sampling(self, asked, *rest, **options):
        if "temperature" not in options:  # the check at start
            return generate(self, asked, *rest, **options)
        calls.append((len(asked), options["temperature"]))
        prompts.extend(self.tokenizer.decode(ids) for ids in asked)
        return generate(self, asked, *rest, **options)

    def collating(read, *rest):  # opsd.py's teacher reads its own prompts
        prompts.extend(tokenizer.decode(ids) for ids in read)
        return collate(read, *rest)

    tokenizer = AutoTokenizer.from_pretrained(base / "sft")
    monkeypatch.setattr(rollout.HFSampler, "generate", sampling)
    monkeypatch.setattr(stage, "collate", collating)
    train(stage, base, "--no-thinking --temperature 0.7 --eval-problems 2")
    assert prompts and all(prompt.endswith("<|assistant|><think></think>") for prompt in prompts)
    assert {temperature for _, temperature in calls} == {0.7}
    assert calls[0][0] == calls[-1][0] == 2  # the two measurements


@THREE
def test_gradient_checkpointing_computes_each_layer_twice(base, luck, stage, monkeypatch):
    """It changes no weight, so that nobody sees when it is off: not passed on to the model, or asked of a model in eval
    mode. It is seen in the forward passes: each layer's is computed again on the way back."""
    forwards, forward = [], Qwen3DecoderLayer.forward

    def counting(*args, **kwargs):
        forwards[-1] += torch.is_grad_enabled()  # without: sampling, measuring, a teacher
        return forward(*args, **kwargs)

    monkeypatch.setattr(Qwen3DecoderLayer, "forward", counting)
    for flags in ("", "--gradient-checkpointing"):
        shutil.rmtree("out", ignore_errors=True)
        forwards.append(0)
        train(stage, base, flags, steps=1)
    assert forwards[1] == 2 * forwards[0] > 0


@THREE
def test_the_attention_that_was_asked_for(base, luck, stage, monkeypatch):
    """All of them compute the same: a flag that is lost shows in nothing but memory and time."""
    seen, make_sampler = [], stage.make_sampler

    def making(model, *rest):
        seen.append(model.config._attn_implementation)
        return make_sampler(model, *rest)

    monkeypatch.setattr(stage, "make_sampler", making)
    train(stage, base, "--attn-implementation eager", steps=1)
    assert seen == ["eager"]


@THREE
def test_a_sampler_with_weights_of_its_own(base, luck, stage, monkeypatch):
    """vLLM has a copy of the weights, HFSampler the trainer's own: a sync that is left out, or comes too late, is seen
    with vLLM alone, which few tests can run. A sampler that copies as vLLM does must leave the same run."""

    class Copying(rollout.HFSampler):
        def __init__(self, model, *rest):
            super().__init__(copy.deepcopy(model), *rest)

        def sync(self, model):
            self.model.load_state_dict(model.state_dict())

    logs = []
    for sampler in (rollout.HFSampler, Copying):
        shutil.rmtree("out", ignore_errors=True)
        monkeypatch.setattr(rollout, "HFSampler", sampler)
        train(stage, base, "--eval-every 1 --lr 0.1 --max-new-tokens 60", steps=3)
        logs.append([{key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))}
            for row in read_rows("out/metrics.jsonl")])  # fmt: skip
    assert logs[0] == logs[1]
    measured = [row for row in logs[0] if "eval/accuracy" in row]
    assert measured[0]["eval/len_mean"] != measured[-1]["eval/len_mean"], "nothing to see: the weights hardly moved"


def test_columns_are_remembered(base, luck):
    """--columns is said once: the next stage reads the same file by the same names."""
    rows = [{"Q": row["question"], "A": row["answer"], "answer": "0"} for row in word_problems(30)]
    data = write_rows(Path("mine.jsonl"), rows)
    flags = "--columns problem=Q,answer=A --steps 1 --out first"
    assert run_stage(sft, "--init", base / "sft", "--data", data, TINY, flags)[0] == 0
    for init, stage in [("first", rlvr), ("rlvr", opsd)]:
        status, out, err = run_stage(stage, "--init", init, "--out", stage.__name__, TINY, "--steps 1")
        assert status == 0, err
    golds = {row["gold"] for row in read_rows("opsd/samples.jsonl")}
    assert golds <= {row["A"].split("#### ")[1] for row in rows}


def test_the_mean_reward_is_that_of_all_that_was_sampled(base, luck):
    """Over the kept groups it hovers about a half, however well the policy does: a uniform group counts too."""
    rows, _ = train(rlvr, base, "--group-size 2 --batch-size 8")
    assert all(row["reward/frac_zero_std"] > 0 for row in rows)
    assert all(row["reward/mean"] == pytest.approx(row["accuracy"]) for row in rows)


def test_clip_frac_is_that_of_the_last_update(base, luck):
    """On the first update of a batch the ratio is 1, and nothing is clipped: logged from there it is 0 for ever."""
    rows, _ = train(rlvr, base, "--updates-per-batch 3 --lr 0.02 --clip-low 0.01 --clip-high 0.01")
    rows = [row for row in rows if "grad_norm" in row]  # where a group was kept
    assert rows and all(row["ratio/clip_frac"] > 0 and abs(row["kl/sample_train"]) < 1e-6 for row in rows)


def test_with_a_matched_budget_no_more_is_measured_than_trained_on(base, luck, monkeypatch):
    """Twenty refills of a bad arm are twenty batches, none of it trained on: to measure them all would be most of the
    run's time."""
    measured, accumulate = [], opsd.accumulate_gradients

    def spying(student, teacher, rollouts, args):
        if not torch.is_grad_enabled():
            measured.append(len(rollouts))
        return accumulate(student, teacher, rollouts, args)

    monkeypatch.setattr(rollout, "verify_batch", lambda texts, golds: [False] * len(texts))
    monkeypatch.setattr(opsd, "accumulate_gradients", spying)
    _, out = train(opsd, base, "--only-correct --match-budget --max-refills 3")
    assert measured == [4, 4]
    assert "2 of 2 steps kept fewer than 4 rollouts after 3 refills" in out
    shutil.rmtree("out")
    assert "refills" not in train(opsd, base, "--only-correct")[1]  # without the flag a batch has what it has
