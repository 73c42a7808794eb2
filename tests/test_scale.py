"""Several processes give the numbers, the rollouts and the files of one: tests on CPUs, with gloo.

A process of a test is forked from a server that has imported everything already, so it starts at once. It
sees what torchrun would tell it. `torchrun` itself runs in the last tests.
"""

import itertools
import json
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import EOS, ROOT, VOCAB, make_tiny
from test_chain import read_rows, run_stage, same_tensors, small_world, weights, words
from test_resume import metrics_but_time
from torch.distributed.tensor import DTensor

import eval as eval_stage
import opsd
import rlvr
import rollout
import sft
from rollout import HFSampler, Problem, Rollout

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["test_scale"])


# ------------------------------------------------------------------------------------------------------------
# Processes


def child(function, args, rank, count, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    torch.set_num_threads(1)
    for descriptor, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(f"{folder}/{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    rollout.join_processes("cpu")
    try:
        result = function(*args)
    except Exception as error:  # else multiprocessing reports it in its own way
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1)
    torch.save(result, f"{folder}/result.{rank}")


@pytest.fixture(autouse=True, scope="module")
def server():
    """Python up to 3.12 does not tell the server where to find modules: it would import nothing, and say
    nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()


def start_processes(count, folder, function, *args):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # torchrun's part
    started = [SERVER.Process(target=child, args=(function, args, rank, count, store.port, str(folder)))
        for rank in range(count)]  # fmt: skip
    for process in started:
        process.start()
        process.store = store  # which lives as long as they do
    return started


def wait_for(processes):
    """A minute; those that wait for one another for longer are ended."""
    deadline = time.time() + 60
    for process in processes:
        process.join(max(0, deadline - time.time()))
    for process in processes:
        process.kill()
        process.join()


def in_processes(count, folder, function, *args):
    """function(*args) in each of so many processes -> what each returned. 0: here, without torchrun."""
    if count == 0:
        return [function(*args)]
    started = start_processes(count, folder, function, *args)
    wait_for(started)
    errors = [(folder / f"stderr.{rank}").read_text() for rank in range(count)]
    assert [process.exitcode for process in started] == [0] * count, "".join(errors)
    return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(count)]


# ------------------------------------------------------------------------------------------------------------
# Gradients


def make_rollouts(count=8):
    """Prompts of 1 to 9 tokens, responses of 1 to 7. Sorted and cut into threes: no two micro-batches
    alike."""
    rng, made = random.Random(7), []
    for i in range(count):
        response = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(7))] + [EOS]
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
        label = ["correct", "incorrect"][i % 2]
        made.append(Rollout(prompt, response, [rng.uniform(-4.5, -1.5) for _ in response], True,
            Problem(f"problem {i}", str(i)), label=label, advantage=rng.uniform(-1, 1),
            teacher_prompt_ids=prompt + [5] * rng.randint(1, 6)))  # fmt: skip
    return made


STAGES = ["sft", "rlvr", "opsd"]
KINDS = [("tied", "checkpointing"), ("untied", "")]
CASES = [(stage, *kind, size) for stage, kind, size in itertools.product(STAGES, KINDS, [3, 8])]


def gradient(stage, tied, checkpointing, micro_batch_size, average=False):
    """-> metrics, {weight: gradient}, the norm before clipping."""
    kinds = {"tied": "qwen3", "untied": "qwen3-untied"}
    models = [make_tiny(kinds[tied], seed) for seed in (0, 1)]
    if checkpointing:
        models[0].gradient_checkpointing_enable({"use_reentrant": False})
    model, other = [rollout.shard(model, "cpu") for model in models]
    other.requires_grad_(False)
    for part in rollout.sharded_parts(model) if average else []:  # FSDP2's default
        part.set_gradient_divide_factor(float(dist.get_world_size()))
    args = SimpleNamespace(micro_batch_size=micro_batch_size, loss_normalization="token", max_new_tokens=7,
        temperature=0.8, clip_low=0.2, clip_high=0.28, ratio_cap=3.0, kl_coef=0.1,
        divergence="reverse", beta=0.5, token_clip=None)  # fmt: skip
    rollouts, measured = make_rollouts(), []
    if stage == "sft":
        metrics = {"loss": sft.accumulate_gradients(model, rollouts, micro_batch_size)}
    elif stage == "rlvr":
        metrics = rlvr.accumulate_gradients(model, other, rollouts, args)
    else:
        metrics = {"loss": opsd.accumulate_gradients(model, other, rollouts, args)}
        measured = [r.token_values for r in rollouts]
    whole = lambda x: (x.full_tensor() if isinstance(x, DTensor) else x).clone()  # noqa: E731
    rollout.reshard(model)
    gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
    return metrics, gradients, rollout.clip_gradients(model, 0.1), measured


def all_gradients(chunk):
    rollout.MAX_LOGITS = VOCAB * chunk
    return {case: gradient(*case) for case in CASES} | {"chunks": chunks_of_a_step()}


def chunks_of_a_step():
    """How many chunks this process cuts a step of sft.py into."""
    count, plain = [], rollout.checkpoint
    rollout.checkpoint = lambda *args, **kwargs: count.append(1) or plain(*args, **kwargs)
    gradient("sft", "tied", "", 3)
    rollout.checkpoint = plain
    return len(count)


def in_chunks_of(chunk, count, folder):
    before = rollout.MAX_LOGITS
    results = in_processes(count, folder, all_gradients, chunk)
    rollout.MAX_LOGITS = before
    return results


@pytest.fixture(scope="module")
def expected():
    return in_chunks_of(3, 0, None)[0]


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_are_those_of_one_process(count, tmp_path, expected):
    """8 rollouts in micro-batches of 3 and 8: 3 and 1 of them, dealt to 1 and 3 processes. In chunks of 3
    tokens the processes call their heads a different number of times."""
    results = in_chunks_of(3, count, tmp_path)
    assert len({result["chunks"] for result in results}) == count
    for result in results:
        for case in CASES:
            metrics, gradients, norm, measured = result[case]
            metrics_of_one, gradients_of_one, norm_of_one, measured_of_one = expected[case]
            assert metrics == pytest.approx(metrics_of_one, abs=1e-6), case
            assert norm == pytest.approx(norm_of_one, rel=1e-6), case
            assert gradients.keys() == gradients_of_one.keys()
            largest = max(g.abs().max() for g in gradients_of_one.values())
            assert largest > 1e-3
            for name, of_one in gradients_of_one.items():
                assert (gradients[name] - of_one).abs().max() < 1e-6 * max(1, largest), (case, name)
            for ours, theirs in zip(measured, measured_of_one, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_summed_not_averaged(tmp_path):
    """FSDP2's default is the mean, which gloo silently sums: on CPUs the default passes the tests above, on
    GPUs it trains at 1/N of the rate. So no backend may be asked for anything but a sum, and nothing may be
    divided."""
    case = ("sft", "tied", "", 3)
    for metrics, gradients, _, operations in in_processes(2, tmp_path, gradient_and_operations, case):
        assert set(operations) == {"SUM"} and len(operations) >= 3, operations
        of_one = gradient(*case)[1]
        assert all((gradients[name] - of_one[name]).abs().max() < 1e-6 * VOCAB for name in of_one)


def gradient_and_operations(case):
    """`gradient`, and what each reduction was asked to do."""
    operations = []

    def noting(reduce_scatter):
        def note(*args, op=dist.ReduceOp.SUM, **kwargs):
            operations.append(str(op).rpartition(".")[2])
            return reduce_scatter(*args, op=op, **kwargs)
        return note

    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):  # torch up to 2.12, and from then on
        if hasattr(dist, name):
            setattr(dist, name, noting(getattr(dist, name)))
    metrics, gradients, norm, _ = gradient(*case)
    return metrics, gradients, norm, operations


# ------------------------------------------------------------------------------------------------------------
# Runs

BASE_FLAGS = "--steps 5 --batch-size 4 --micro-batch-size 3 --eval-problems 5 --max-new-tokens 23 --lr 1e-3"
RUNS = {
    "sft": (sft, ""),
    "rlvr": (rlvr, "--group-size 3 --kl-coef 0.1 --updates-per-batch 2 --refill 1 "
        "--reward test_scale:reward"),
    "opsd": (opsd, "--group-size 2 --teacher ema --ema-decay 0.8 --only-correct"),
    "refresh": (opsd, "--teacher refresh --refresh-every 2 --context wrong-answer --match-budget"),
}


def luck(texts, golds):
    """About half of the responses count as correct. Only process 0 may ask: two deadlines may end
    differently."""
    assert rollout.is_first()
    return [len(text) % 2 == 0 for text in texts]


def reward(response, gold):
    """The user's own, which may look at a clock or ask a server: asked once, too."""
    assert rollout.is_first()
    return len(response) % 3 / 2


def flags_of(name, base, folder, *more):
    paths = ["--init", base / "sft", "--out", folder / name]
    return [*paths, BASE_FLAGS, "--eval-every 4 --warmup-steps 2 --save-every 100", RUNS[name][1], *more]


def run_all(names, base, folder, verdicts, *more):
    """These runs, one after the other -> [(exit status, what was printed)]."""
    rollout.verify_batch = opsd.verify_batch = verdicts
    dist.destroy_process_group = lambda: None  # the next run needs it, too
    return [run_stage(RUNS[name][0], *flags_of(name, base, folder, *more)) for name in names]


def resume_all(names, folder):
    rollout.verify_batch = opsd.verify_batch = luck
    dist.destroy_process_group = lambda: None
    return [run_stage(RUNS[name][0], "--resume --out", folder / name) for name in names]


def tensors_of(value):
    """A saved state -> its tensors and numbers, in order, however deep."""
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [tensor for part in parts for tensor in tensors_of(part)]
    return [torch.as_tensor(value or 0) if value is None or isinstance(value, bool | int | float) else value]


def assert_close_rows(row, row_of_one, relative):
    """A metric may be None: the mean length of correct responses, of which there are none."""
    assert row.keys() == row_of_one.keys()
    for key, value in row_of_one.items():
        close = value if value is None else pytest.approx(value, rel=relative, abs=1e-5)
        assert row[key] == close, (key, row)


def assert_same_files(ours, theirs):
    """The logs to 1e-5, and a checkpoint of the same names, shapes and numbers."""
    metrics, metrics_of_one = (metrics_but_time(folder / "metrics.jsonl") for folder in (ours, theirs))
    for row, row_of_one in zip(metrics, metrics_of_one, strict=True):
        assert_close_rows(row, row_of_one, 1e-5)
    assert read_rows(ours / "samples.jsonl") == read_rows(theirs / "samples.jsonl")
    assert sorted(f.name for f in ours.iterdir()) == sorted(f.name for f in theirs.iterdir())
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (ours / name).read_text() == (theirs / name).read_text()
    tensors, tensors_of_one = weights(ours), weights(theirs)
    assert tensors.keys() == tensors_of_one.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, tensors_of_one[name], rtol=1e-4, atol=5e-5)
    state, state_of_one = (torch.load(folder / "trainer_state.pt") for folder in (ours, theirs))
    assert state.keys() == state_of_one.keys()
    for saved, saved_of_one in zip(tensors_of(state), tensors_of(state_of_one), strict=True):
        assert type(saved) is type(saved_of_one) is torch.Tensor
        torch.testing.assert_close(saved, saved_of_one, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a checkpoint whose responses end."""
    return small_world(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True, scope="module")
def kept_as_it_is():
    """What run_all changes is changed back."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (rollout, opsd):
            patch.setattr(module, "verify_batch", module.verify_batch)
        patch.setattr(dist, "destroy_process_group", dist.destroy_process_group)
        yield


@pytest.fixture(scope="module")
def runs_of_one(base, tmp_path_factory):
    """Every run without torchrun."""
    folder = tmp_path_factory.mktemp("one")
    for status, _, err in run_all(RUNS, base, folder, luck):
        assert status == 0, err
    return folder


def test_five_steps_are_those_of_one_process(base, runs_of_one, tmp_path):
    """The same rollouts, metrics, log and files, whatever the stage does between."""
    for runs in in_processes(2, tmp_path, run_all, list(RUNS), base, tmp_path, luck):
        for status, out, err in runs:
            assert (status, err) == (0, "") and "next: python" in out
    for name in RUNS:
        assert_same_files(tmp_path / name, runs_of_one / name)


@pytest.fixture(scope="module")
def saved_by_two(base, tmp_path_factory):
    """Every run, stopped after 2 of its steps on 2 processes."""
    folder = tmp_path_factory.mktemp("two")
    in_processes(2, folder, run_all, list(RUNS), base, folder, luck, "--stop-after 2")
    return folder


@pytest.mark.parametrize("count, names", [(0, list(RUNS)), (3, ["rlvr"])], ids=["none", "3"])
def test_saved_on_two_processes_resumed_on_others(saved_by_two, runs_of_one, count, names, tmp_path):
    """2 steps on 2 processes, 3 more on 1 without torchrun, on 3: the same run."""
    folder = shutil.copytree(saved_by_two, tmp_path / "copy")
    for status, out, err in in_processes(count, tmp_path, resume_all, names, folder)[0]:
        assert (status, err) == (0, "") and "next: python" in out
    for name in names:
        assert_same_files(folder / name, runs_of_one / name)


def save_slowly(folder):
    """-> whether the checkpoint is there when save_checkpoint returns, which process 0 takes its time to
    write."""
    write = rollout.write_checkpoint
    rollout.write_checkpoint = lambda *args: time.sleep(0.5) or write(*args)
    model = rollout.shard(make_tiny(), "cpu")
    args = SimpleNamespace(out=str(folder), weight_decay=0.0, lr=0.1)
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    rollout.save_checkpoint(args, model, tokenizer, sft.make_optimizer(model, args), {"step": 1})
    return (folder / "trainer_state.pt").exists()


def test_no_process_goes_on_before_a_save_is_whole(tmp_path):
    """A process that ended meanwhile would make torchrun end the one that writes."""
    assert in_processes(2, tmp_path, save_slowly, tmp_path) == [True, True]


def none(texts, golds):
    assert rollout.is_first()
    return [False] * len(texts)


def test_nothing_is_kept(base, tmp_path):
    """No response is correct: rlvr.py has no signal, opsd.py nothing to train on. No process waits for
    another."""
    for name, *more in ("rlvr", "--reward="), ("opsd",):
        for [(status, out, err)] in in_processes(2, tmp_path, run_all, [name], base, tmp_path, none, *more):
            assert (status, err) == (0, "") and "next: python" in out
        assert same_tensors(weights(tmp_path / name), weights(base / "sft"))
    assert "5 of 5 steps had no rollout to keep" in out


def test_fewer_prompts_than_processes(base, tmp_path):
    """One prompt a step, one to measure on, three processes: two of them sample nothing."""
    flags = "--batch-size 1 --eval-problems 1 --steps 2"
    (tmp_path / "one").mkdir()
    run_all(["sft", "opsd"], base, tmp_path / "one", luck, flags)
    for runs in in_processes(3, tmp_path, run_all, ["sft", "opsd"], base, tmp_path, luck, flags):
        assert [(status, err) for status, _, err in runs] == [(0, "")] * 2
    for name in ("sft", "opsd"):
        assert_same_files(tmp_path / name, tmp_path / "one" / name)


def compare(base, folder):
    """eval.py's exit status, what it printed, and its figures but for the speed."""
    rollout.verify_batch = luck
    flags = ["--data", base / "problems.jsonl", "--problems 3 --n 2 --max-new-tokens 20", "--json"]
    end = run_stage(eval_stage, base / "sft", base / "sft", *flags, folder / "result.json")
    rows = json.loads((folder / "result.json").read_text())["checkpoints"] if rollout.is_first() else []
    return *end, [{k: v for k, v in row.items() if k != "tok_s"} for row in rows]


def test_eval_of_three_problems_on_four_processes(base, tmp_path):
    """The same table and json, from process 0."""
    status, out, err, rows = compare(base, tmp_path)
    first, *others = in_processes(4, tmp_path, compare, base, tmp_path)
    assert first == (status, out, err, rows) and status == 0 and len(rows) == 2
    assert [(end[0], end[2], end[3]) for end in others] == [(0, "", [])] * 3


# ------------------------------------------------------------------------------------------------------------
# Ends


def run_until(step, rank, number, base, folder):
    """opsd.py, in which one process gets a signal in this step."""
    plain = opsd.optimizer_step

    def optimizer_step(now, *args):
        if now == step and dist.get_rank() == rank:
            os.kill(os.getpid(), number)
        return plain(now, *args)

    opsd.optimizer_step = optimizer_step
    rollout.verify_batch = luck
    sys.argv = ["opsd.py", *words(flags_of("opsd", base, folder)), "--device", "cpu"]
    opsd.main()


def ends_of(started, folder):
    """Exit statuses, and what was said on stdout and on stderr."""
    wait_for(started)
    said = [["".join((folder / f"{name}.{rank}").read_text()) for rank in range(len(started))]
        for name in ("stdout", "stderr")]  # fmt: skip
    return [process.exitcode for process in started], *said


def test_an_interrupt_that_one_process_sees_stops_all(base, runs_of_one, tmp_path):
    """The step is finished and saved, and a resumed run is the one that nobody stopped."""
    started = start_processes(2, tmp_path, run_until, 2, 1, signal.SIGINT, base, tmp_path)
    statuses, (out, other), errors = ends_of(started, tmp_path)
    assert statuses == [130, 130] and errors == ["", ""]
    go_on = "torchrun --nproc-per-node 2 opsd.py --resume"
    assert f"stopped after step 2; go on with: {go_on}" in out and not other
    assert in_processes(0, tmp_path, resume_all, ["opsd"], tmp_path)[0][0][0] == 0
    assert_same_files(tmp_path / "opsd", runs_of_one / "opsd")


def test_an_interrupt_while_processes_agree_is_not_lost(monkeypatch):
    """It came too late for this step, in which the others go on. The next step sees it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupt = rollout.Interrupt(SimpleNamespace(stop_after=None, out="out"), 0)

    def sum_of(value):
        interrupt.asked = True
        return float(value)

    monkeypatch.setattr(rollout, "sum_of", sum_of)
    assert [interrupt.now(step) for step in (1, 2)] == [False, True]
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_process_that_is_killed_ends_all(base, tmp_path):
    """As the kernel does where memory is short: at once, and with one line of those that are left."""
    started = start_processes(3, tmp_path, run_until, 2, 1, signal.SIGKILL, base, tmp_path)
    before = time.time()
    statuses, _, errors = ends_of(started, tmp_path)
    assert statuses[1] == -signal.SIGKILL and all(statuses) and time.time() - before < 40
    lines = "".join(errors).splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: another process has ended"), lines


def start_torchrun(script, *flags, cwd, count=2, device="cpu", **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen([*command, str(ROOT / script), *words(flags), "--device", device], cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_ctrl_c_to_torchrun(base, tmp_path):
    """It passes the signal on to all processes, and gives them 30 s: the step is finished and saved."""
    flags = flags_of("sft", base, tmp_path, "--steps 100000 --eval-every 100000")
    process = start_torchrun("sft.py", *flags, cwd=tmp_path)
    said = ""
    for said in process.stdout:
        if said.startswith("sft       2/"):
            process.send_signal(signal.SIGINT)
    process.wait(60)
    step = torch.load(tmp_path / "sft" / "trainer_state.pt")["step"]
    assert said.startswith(f"stopped after step {step}; go on with: torchrun"), said


def test_one_that_fails_ends_all_with_its_one_line(base, tmp_path):
    """A reward of the user's is asked in process 0 alone. Above torchrun's own report stands one line."""
    (tmp_path / "odd.py").write_text("def score(response, gold):\n    return 'good'\n")
    flags = flags_of("rlvr", base, tmp_path, "--reward odd:score")
    process = start_torchrun("rlvr.py", *flags, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(errors) == 1 and "--reward returned 'good'" in errors[0], err
    assert err.count("Traceback") == 1, "torchrun's own, and no other"


@pytest.mark.vllm
def test_an_engine_in_each_process(base, tmp_path):
    """Weights in pieces -> two engines, after every step. 3 and 5 prompts on the two; the log-probs of both
    agree with the trainer's."""
    flags = "--steps 3 --batch-size 5 --group-size 2 --eval-problems 3 --max-new-tokens 20 --lr 1e-3"
    on_cpu = {} if torch.cuda.device_count() > 1 else {"VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    process = start_torchrun("opsd.py", "--init", base / "sft", "--out", tmp_path / "out", flags,
        "--sampler vllm --vllm-memory 0.15", cwd=tmp_path, device="cpu" if on_cpu else "cuda",
        **on_cpu)  # fmt: skip
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    rows = [row for row in read_rows(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3 and all(row["kl/sample_train"] < 1e-6 and row["grad_norm"] > 0 for row in rows)


@pytest.mark.gpu
def test_nccl_gives_the_numbers_of_one_process(base, tmp_path):
    """As many processes as there are GPUs, 4 at most."""
    device = os.environ.get("TEST_DEVICE", "cuda")
    count = min(4, max(1, torch.cuda.device_count()))
    for name in ("sft", "opsd"):
        flags = flags_of(name, base, tmp_path)
        process = start_torchrun(f"{name}.py", *flags, cwd=tmp_path, count=count, device=device)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        out = tmp_path / "one" / name
        flags = words([*flags_of(name, base, tmp_path / "one"), "--device", device])
        subprocess.run([sys.executable, str(ROOT / f"{name}.py"), *flags], cwd=tmp_path, check=True)
        ours, theirs = (metrics_but_time(folder / "metrics.jsonl") for folder in (tmp_path / name, out))
        for row, row_of_one in zip(ours, theirs, strict=True):
            assert_close_rows(row, row_of_one, 1e-3)
