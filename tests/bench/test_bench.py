"""The page of benchmarks: its computed tables are what their commands print; links, commands, lines."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import hours
import memory
import pages
import pytest
import torch
from live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3Config, Qwen3ForCausalLM

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


def test_memory_by_hand(monkeypatch, capsys):
    """Qwen3-0.6B, one token: 596,049,920 parameters (tied). At 4 bytes 2.38 GB, at 8 4.77, at 12 (on disk) 7.15,
    at 16 9.54, at 20 11.92. The head: 6 * 1024 * 151,936 bytes = 0.93 GB; 9.54 + 0.93 = 10.47, 11.92 + 0.93 =
    12.85. Keys, values: 1000 * 2 * 28 layers * 8 heads * 128 * 2 bytes = 0.11 GB."""
    monkeypatch.setattr(sys, "argv", ["memory.py", "--tokens", "1"])
    memory.main()
    row = "| 0.6B | 0.60 B | 2.4 | 2.4 | 4.8 | 0.0 | 0.9 (0.9) | 10 | 2.4 | 13 | 0.11 | 7 |"
    assert row in capsys.readouterr().out


def test_the_readmes_gigabytes_are_computed():
    """A figure typed into a sentence stays behind when the table moves on."""
    def gigabytes(size, second_model):
        return round(memory.total(memory.memory(memory.make_config(size), 9216, second_model)) / memory.GB)

    page = " ".join((PAGE.parents[2] / "README.md").read_text().split())
    assert f"{gigabytes('1.7B', False)} GB to train SFT and RLVR, {gigabytes('1.7B', True)} GB for OPSD" in page
    assert f"It takes {gigabytes('8B', True)} GB on one device" in page
    assert f"with the settings of the authors' scripts, takes {gigabytes('8B', False)} GB" in page


SHAPES = {  # what is largest: hidden, intermediate, layers, heads, vocabulary, tokens, tokens of a chunk
    "logits": (64, 128, 2, 4, 20_000, 512, 128),
    "gradient of the head": (256, 512, 2, 4, 20_000, 256, 16),
    "one layer": (256, 1024, 4, 8, 1000, 1024, 16),
}


def run_micro_batch(stage, model, teacher, tokens):
    """accumulate_gradients of one micro-batch of so many tokens, as two sequences, in bfloat16."""
    prompt, response = [1] * 8, [2] * (tokens // 2 - 8)
    batch = [rollout.Rollout(prompt, response, [-1.0] * len(response), True, label="correct", advantage=1.0,
        teacher_prompt_ids=prompt) for _ in range(2)]  # fmt: skip
    args = SimpleNamespace(micro_batch_size=2, temperature=1.0, divergence="reverse", beta=0.5, clip_low=0.2,
        clip_high=0.2, ratio_cap=3.0, loss_normalization="token", max_new_tokens=tokens)
    with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False):
        if stage is sft:
            sft.accumulate_gradients(model, batch, 2)
        elif stage is rlvr:
            rlvr.accumulate_gradients(model, None, batch, args)
        else:
            opsd.accumulate_gradients(model, teacher, batch, args)


def bytes_of_a_micro_batch(stage, model, tokens):
    """The most bytes alive in a second micro-batch: weights, and gradients of the first, are not counted."""
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
    """The page's arithmetic said "under 1 GB" of a head's backward pass that held three copies of it. Here every
    tensor that lives is counted: computed is up to a tenth more, and never less by more than a fiftieth."""
    hidden, inner, layers, heads, vocab, tokens, chunk_tokens = SHAPES[largest]
    monkeypatch.setattr(rollout, "MAX_LOGITS", chunk_tokens * vocab)
    config = Qwen3Config(vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, head_dim=64)  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    parts = memory.memory(config, tokens, stage is opsd, chunk_tokens * vocab)
    computed = parts["layer inputs"] + parts["one layer or head"]
    assert 0.98 < computed / bytes_of_a_micro_batch(stage, model, tokens) < 1.1


@pytest.mark.parametrize("device, rows", [("cpu", 10), ("cuda", 80)])
def test_a_gpu_takes_larger_chunks(device, rows, monkeypatch):
    """Each chunk reads, casts and adds to the whole head: for 110 tokens of Qwen3's vocabulary that takes a GPU
    several times as long as the products. Tensors without data stand in for a GPU's."""
    monkeypatch.setattr(rollout, "MAX_LOGITS", 10 * 24)
    seen = []

    def function(hidden):
        seen.append(len(hidden))
        return (hidden.sum(-1),)

    with FakeTensorMode(), torch.no_grad():
        rollout.in_chunks(function, 24, torch.empty(200, 4, device=device))
    assert seen == [rows] * (200 // rows) + [200 % rows] * (200 % rows > 0)


def test_links_commands_and_lines_of_the_page():
    assert pages.broken_links(PAGE) == []
    assert pages.unknown_commands(PAGE) == []
    assert pages.long_lines(PAGE) == []
