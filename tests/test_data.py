"""From a data set's rows to prompts: what is read, what is left out, and what the model sees."""

import copy
import json
import re
import sys
import tracemalloc

import pytest
from conftest import make_tiny
from transformers import AutoTokenizer

import rollout
import sft
from rollout import Problem, read_problems, render_prompt

STEPS = "It is 1+1. So \\boxed{2}."
DAPO = ("Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".')
CHAT = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": STEPS}]
ROWS = {  # by data set whose form it is: a row, and what it says
    "GSM8K": ({"question": "1+1?", "answer": "She has 1+1 = <<1+1=2>>2,\nso 2000.\n#### 2,000"},
        Problem("1+1?", "2000", "She has 1+1 = 2,\nso 2000.")),
    "a list behind GSM8K's mark": ({"question": "Which?", "answer": "So.\n#### (1, 2,000)"},
        Problem("Which?", "(1, 2000)", "So.")),
    "a blank answer": ({"problem": "1+1?", "answer": " ", "solution": STEPS}, Problem("1+1?", "2", STEPS)),
    "MATH": ({"problem": "1+1?", "solution": STEPS, "level": "1", "type": "x"}, Problem("1+1?", "2", STEPS)),
    "MATH-500": ({"problem": "1+1?", "solution": STEPS, "answer": "2.0"}, Problem("1+1?", "2.0", STEPS)),
    "DAPO-Math, verl's": ({"prompt": [{"role": "user", "content": DAPO.format("1+1?")}], "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule"}}, Problem("1+1?", "2", "")),
    "DAPO-Math, as text": ({"prompt": DAPO.format("1+1?"), "solution": "2"}, Problem("1+1?", "2", "2")),
    "AIME 2024": ({"ID": "I-1", "Problem": "1+1?", "Solution": STEPS, "Answer": 2}, Problem("1+1?", "2", STEPS)),
    "AIME 2025": ({"id": "0", "problem": "1+1?", "answer": "002"}, Problem("1+1?", "002", "")),
    "OlympiadBench": ({"question": "1+1?", "final_answer": ["2", "3"], "solution": [STEPS]},
        Problem("1+1?", "2, 3", f"{[STEPS]}")),
    "chat": ({"messages": CHAT}, Problem("1+1?", "2", STEPS)),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": STEPS}]},
        Problem("1+1?", "2", STEPS)),
}  # fmt: skip


@pytest.mark.parametrize("row, problem", ROWS.values(), ids=ROWS)
def test_rows_of_known_data_sets(write_jsonl, row, problem):
    """GSM8K's `answer`, for one, is a solution with a gold at its end: taken as it is, nobody is ever right."""
    assert read_problems(write_jsonl([row])) == [problem]


def test_rows_without_an_answer_are_counted(write_jsonl, capsys):
    """A problem without a gold is one that nobody can solve: a reward of 0 for whatever is said."""
    good = {"problem": "1+1?", "answer": "2"}
    rows = [good, {"problem": "2+2?"}, {"answer": "4"}, {"problem": "2+2?", "answer": ""},
        {"problem": None, "answer": "4"}, {"problem": "2+2?", "answer": None, "solution": "Clearly it is."}, good,
        {"messages": [{"role": "user", "content": None}], "answer": "4"}]
    assert read_problems(write_jsonl(rows)) == [Problem("1+1?", "2", "")]  # the last repeats the first
    said = capsys.readouterr().out
    assert "6 of 8 rows are left out, 3 without a problem, 3 without an answer; the first is row 2" in said
    assert "1 of 8 rows repeat another row and are left out" in said


def test_a_number_that_python_does_not_read(write_jsonl, fails_with, tmp_path):
    """json.loads refuses integers of over 4,300 digits, with an error of its own."""
    path = tmp_path / "large.jsonl"
    path.write_text('{"problem": "p", "answer": %s}\n' % ("1" * 5000))
    fails_with(lambda: read_problems(str(path)), f"{path}:1: ")


def test_a_chat_of_several_turns(write_jsonl):
    """The last question is the one that the last answer answers; the first one's gold would be another's."""
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi, \\boxed{0}."}, *CHAT[1:]]
    assert read_problems(write_jsonl([{"messages": turns}])) == [Problem("1+1?", "2", STEPS)]


def test_the_first_column_that_is_filled_counts(write_jsonl):
    """Of several usual names the first one counts, unless the row leaves it empty: so says COLUMNS."""
    rows = [{"final_answer": "3", "answer": "2", "question": "no", "problem": "1+1?"},
        {"final_answer": "3", "answer": "", "question": "1+2?", "problem": None}]
    assert read_problems(write_jsonl(rows)) == [Problem("1+1?", "2", ""), Problem("1+2?", "3", "")]


def test_several_solutions_of_a_problem_are_kept(write_jsonl):
    """Eight demonstrations of each problem are eight times the data for sft.py: only a whole row repeats a row."""
    rows = [{"problem": "1+1?", "answer": "2", "solution": f"Way {i}."} for i in range(3)]
    assert [p.solution for p in read_problems(write_jsonl([*rows, rows[0]]))] == ["Way 0.", "Way 1.", "Way 2."]


@pytest.mark.parametrize("form", ["jsonl", "arrow"])
def test_rows_are_streamed_and_repeated_ones_are_not_kept(form, write_jsonl, tmp_path, capsys):
    """DAPO-Math-17k is 1.79 M rows of 17,000 problems: as a list of rows 6.4 GB and 110 s at each start. Here
    20,000 rows of 200 problems: as a list over 20 MB."""
    rows = []
    for i in range(20_000):
        n = i % 200
        rows.append({"prompt": [{"role": "user", "content": DAPO.format(f"{n}+1?")}], "extra": {"index": i},
            "reward_model": {"ground_truth": str(n + 1), "style": "rule"}})  # fmt: skip
    path = write_jsonl(rows)
    if form == "arrow":
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        path = str(tmp_path / "saved")
    del rows
    read_problems(path)  # what the first call of a library keeps is no row
    tracemalloc.start()
    problems = read_problems(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problems == [Problem(f"{i}+1?", str(i + 1)) for i in range(200)]
    assert "19800 of 20000 rows repeat another row" in capsys.readouterr().out
    assert peak < 2e6, peak


def test_columns_of_later_rows(write_jsonl, fails_with):
    """Rows are read one by one: a column that the first of them lack is found all the same."""
    rows = ["{}", {"level": 3}, {"problem": "1+1?", "answer": "2"}, {"A": "4", "Q": "2+2?", "answer": "5"},
        {"question": "3+3?", "final_answer": "6"}]  # fmt: skip
    assert read_problems(write_jsonl(rows)) == [Problem("1+1?", "2"), Problem("3+3?", "6")]
    assert read_problems(write_jsonl(rows), "problem=Q,answer=A") == [Problem("2+2?", "4")]
    fails_with(lambda: read_problems(write_jsonl(["{}"])), "no column for the problem in []")


def test_columns(write_jsonl, fails_with):
    """Named by the user; a name that is not there is refused, with those that are."""
    path = write_jsonl([{"Q": "1+1?", "A": "2", "S": STEPS, "answer": "wrong"}])
    assert read_problems(path, "problem=Q,answer=A,solution=S") == [Problem("1+1?", "2", STEPS)]
    fails_with(lambda: read_problems(path), "no column for the problem", "'A', 'Q', 'S', 'answer'", "--columns")
    fails_with(lambda: read_problems(path, "problem=q"), "--columns problem=q", "'Q'")
    fails_with(lambda: read_problems(path, "question=Q"), "--columns question=Q")
    path = write_jsonl([{"problem": "1+1?", "level": 1}])
    fails_with(lambda: read_problems(path), "no column for the answer", "'level', 'problem'")


def test_half_a_character(write_jsonl):
    """JSON can spell half of a surrogate pair, which no tokenizer takes: a traceback in the middle of a run."""
    path = write_jsonl([r'{"problem": "1+1? \ud83d", "answer": "2", "solution": "\ud83d\ude42"}'])
    assert read_problems(path) == [Problem("1+1? ?", "2", "\N{SLIGHTLY SMILING FACE}")]


@pytest.fixture
def folder(tmp_path):
    """A data set's folder as the hub has it: two configurations, two splits."""
    datasets = pytest.importorskip("datasets")
    lines = ["---", "configs:"]
    for config in ("main", "socratic"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("test", "train"):
            rows = [{"question": f"{config} {split} {i}?", "answer": f"So.\n#### {i}"} for i in range(4)]
            (tmp_path / "set" / config).mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / config / f"{split}.parquet")
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (tmp_path / "set" / "README.md").write_text("\n".join([*lines, "---"]))
    return str(tmp_path / "set")


def test_a_hugging_face_data_set(folder, tmp_path, fails_with):
    """By name, configuration and split; without them GSM8K's `main` and the split to train on."""
    first = lambda data: read_problems(data)[0].problem  # noqa: E731
    assert first(folder) == "main train 0?"
    assert first(f"{folder}:socratic") == "socratic train 0?"
    assert first(f"{folder}:main:test") == "main test 0?"
    assert len(read_problems(f"{folder}:main:test[:3]")) == 3
    fails_with(lambda: read_problems(f"{folder}:maine"), "maine", "socratic")
    fails_with(lambda: read_problems(f"{folder}:main:dev"), "dev")
    fails_with(lambda: read_problems(f"{folder}/not/here"), "no such file or folder")
    import datasets

    saved = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"problem": "1+1?", "answer": 2}])})
    saved.save_to_disk(tmp_path / "saved")
    assert read_problems(str(tmp_path / "saved")) == [Problem("1+1?", "2", "")]


def test_a_hub_out_of_reach(fails_with):
    """One line, and not the traceback of four libraries."""
    pytest.importorskip("datasets")
    fails_with(lambda: read_problems("openai/gsm8k"), "--data openai/gsm8k", "name:config")


def test_a_look_at_the_data(write_jsonl, monkeypatch, capsys, tokenizer, tmp_path):
    """python rollout.py --data X --init M: what the model will see, before hours are spent on it."""
    (tmp_path / "init").mkdir()
    (tmp_path / "init" / "config.json").write_text("{}")
    tokenizer.save_pretrained(tmp_path / "init")
    path = write_jsonl([
        {"problem": f"{i}+1?", "answer": str(i + 1), "solution": f"It is {i + 1}."} for i in range(9)]
        + [{"problem": "10+1?", "answer": "11", "solution": "It is 11."}])
    monkeypatch.setattr(sys, "argv", ["rollout.py", "--data", path, "--init", str(tmp_path / "init")])
    rollout.main()
    said = capsys.readouterr().out
    assert said.count("<|user|>") == 6 and "<|user|>2+1?\nReason" in said
    assert "A correct solution: It is 3." in said
    assert "--- gold: 3\n" in said and "10 usable problems" in said and "10 of 10 golds" in said
    assert f"student's prompt, {said.split('prompt, ')[1].split()[0]} tokens" in said
    (tmp_path / "init" / "args.json").write_text(json.dumps({"data": path, "thinking": False}))
    monkeypatch.setattr(sys, "argv", ["rollout.py", "--init", str(tmp_path / "init")])
    rollout.main()  # the data and the thinking of --init, as in the stages
    said = capsys.readouterr().out
    assert "<|assistant|><think></think>" in said and "10 usable problems" in said


# ------------------------------------------------------------------------------------------------------------
# Chat templates

def test_both_prompts_end_in_the_templates_suffix(thinker):
    """A template that opens <think> must open it for the teacher too, or the two never meet."""
    problem = Problem("1+1?", "2", "It is 2.")
    for shown in ((), ("solution", "It is 2."), ("answer", "2"), ("concise",)):
        prompt = thinker.decode(render_prompt(thinker, problem, *shown))
        assert prompt.endswith("<|assistant|>" + thinker.opens)
        assert rollout.opened_thinking(prompt) == thinker.opens


def test_no_thinking(thinker):
    """--no-thinking is said to the template, and both prompts show it. A template that opens <think> all the
    same would have the model think: there it is closed."""
    problem = Problem("1+1?", "2", "It is 2.")
    for shown in ((), ("solution", "It is 2.")):
        text = thinker.decode(render_prompt(thinker, problem, *shown, thinking=False))
        closed = "<think>\n\n</think>\n\n" if thinker.opens else "<think></think>"
        assert text.endswith("<|assistant|>" + closed) and rollout.opened_thinking(text) == ""


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_either_name_of_thinking_is_told(thinker, name):
    """Qwen3 and SmolLM3 ask for enable_thinking, DeepSeek V3.1 and Granite 3 for thinking."""
    template = "{{ messages[0].content }}{% if " + name + " %}<think>{% else %}</think>{% endif %}"
    other = copy.deepcopy(thinker)
    other.chat_template = template
    for thinking, ending in ((True, "<think>"), (False, "</think>")):
        prompt = other.decode(render_prompt(other, Problem("1+1?", "2"), thinking=thinking))
        assert prompt.endswith("." + ending)


STAMPED = {
    "SmolLM3": "{% set today = strftime_now('%d %B %Y') %}Today: {{ today }}",
    "Llama 3": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}Today Date: {{ date_string }}",
    "gpt-oss": "{% macro build() %}Current date: {{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ build() }}",
}  # fmt: skip


@pytest.mark.parametrize("template", STAMPED.values(), ids=STAMPED)
def test_a_template_that_stamps_the_date_gets_the_same_on_every_day(tokenizer, template):
    """Prompts of a run and of its --resume on the next day differed: another run than the one left alone."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = template + " {{ messages[0].content }}"
    text = other.decode(render_prompt(other, Problem("1+1?", "2")))
    assert re.search("(01 January 2025|01 Jan 2025|2025-01-01) 1[+]1[?]", text), text


def test_a_base_model_gets_a_template(tokenizer, tmp_path):
    """Without one, apply_chat_template raises; and a checkpoint of ours must know it later."""
    tokenizer.save_pretrained(tmp_path / "base")
    for path in (tmp_path / "base").glob("*"):
        if path.suffix == ".jinja":
            path.unlink()
        elif path.name == "tokenizer_config.json":
            config = json.loads(path.read_text())
            config.pop("chat_template", None)
            path.write_text(json.dumps(config))
    (tmp_path / "base" / "config.json").write_text("{}")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").chat_template is None
    base = rollout.load_tokenizer(str(tmp_path / "base"))
    text = base.decode(render_prompt(base, Problem("1+1?", "2")))
    assert text == "User: 1+1?\nReason step by step; put the answer in \\boxed{}.\n\nAssistant:"
    base.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == rollout.PLAIN_TEMPLATE


def test_a_demonstration_that_is_whole_stays_as_it_is():
    """Chat data holds the response as it is to be given; wrapped again, it would think twice."""
    whole = "<think>1+1 is 2.</think>So \\boxed{2}."
    assert sft.render_response(whole, "2") == whole
    assert sft.render_response("1+1 is 2.", "2") == "<think>1+1 is 2.</think>\\boxed{2}"
    assert sft.render_response("1+1 is 2.", "2", think=False) == "1+1 is 2. \\boxed{2}"
    assert sft.render_response("So \\boxed{2}.", "2", think=False) == "So \\boxed{2}."
    assert sft.render_response(whole, "2", think=False) == "So \\boxed{2}."  # what it says after its thinking
    assert sft.render_response("<think>Hm.</think>Two.", "2", think=False) == "Two. \\boxed{2}"


def test_fitting(capsys, fails_with):
    """Bytes are counted first, tokens only where bytes do not settle it; what does not fit is counted."""
    model = make_tiny(context=2000)
    problems = [Problem("x" * n, "2", "") for n in (10, 900, 1900)]
    asked = []

    def length(problem):
        asked.append(len(problem.problem))
        return len(problem.problem) + 50

    assert rollout.fitting(problems, model, 100, length) == problems[:2] and asked == [900, 1900]
    assert "1 of 3 problems are left out" in capsys.readouterr().out
    fails_with(lambda: rollout.fitting(problems, model, 1990, length), "context of 2000", "--max-new-tokens")
