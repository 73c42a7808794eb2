"""The course kit: what is blanked fails its tests, plausible mistakes too, and no solution is handed out."""

import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap

import adapters
import course
import pytest
import test_exercises
import weak_verifier

from verify import verify

ROOT = course.ROOT
COURSE = ROOT / course.COURSE
README, INSTRUCTOR = (COURSE / "README.md").read_text(), (COURSE / "INSTRUCTOR.md").read_text()

# ------------------------------------------------------------------------------------------------------------
# In this process: one function is replaced, and its exercise's tests are called


def calls(number):
    """Every test of an exercise with every row of its parameters -> (test, arguments)."""
    for name, test in vars(test_exercises).items():
        if name.startswith(f"test_exercise_{number}_"):
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            if not marks:
                yield test, {}
            for mark in marks:
                names = [word.strip() for word in mark.args[0].split(",")]
                for row in mark.args[1]:
                    yield test, dict(zip(names, row if len(names) > 1 else [row]))


def failures(number):
    """-> what each failing call of an exercise's tests raised, and how many calls there were."""
    raised, count = [], 0
    for test, arguments in calls(number):
        count += 1
        try:
            test(**arguments)
        except Exception as error:  # of any type: so a student's mistake may raise
            raised.append(error)
    return raised, count


@pytest.fixture
def write_body(monkeypatch):
    """write_body(file, function, body) gives the function this body, in its module, for this test."""

    def write(name, function, body):
        module = importlib.import_module(name.rpartition("/")[2].removesuffix(".py"))
        text = (ROOT / name).read_text()
        first, start, _ = course.find_function(text, function)
        head = "".join(text.splitlines(keepends=True)[first:start])
        monkeypatch.setattr(module, function, getattr(module, function))  # put back at the end
        exec(compile(head + body, name, "exec"), module.__dict__)

    return write


@pytest.mark.parametrize("number", course.EXERCISES)
def test_a_blank_fails_and_says_how_to_go_on(number, write_body):
    """Every test of the exercise fails, each because of the blank; with the solution back, each passes."""
    for _, name, function in course.functions_of([number]):
        write_body(name, function, course.BLANK.format(number))
    raised, count = failures(number)
    assert count and len(raised) == count
    assert {str(error) for error in raised} == {f"exercise {number}: {course.TESTS}{number}_"}
    for _, name, function in course.functions_of([number]):
        write_body(name, function, course.body_of(ROOT / name, function))
    assert failures(number) == ([], count)


MISTAKES = {  # exercise -> what goes wrong: a body that looks right
    1: {
        "the instruction before the solution": """
            shown = PRIVILEGED[context].format(privileged) if context else ""
            content = problem.problem + INSTRUCTION + shown
            return tokenizer.apply_chat_template([{"role": "user", "content": content}],
                add_generation_prompt=True, enable_thinking=thinking, return_dict=False)""",
        "the whole message is a format string": """
            content = problem.problem + (PRIVILEGED[context] if context else "") + INSTRUCTION
            return tokenizer.apply_chat_template([{"role": "user", "content": content.format(privileged)}],
                add_generation_prompt=True, enable_thinking=thinking, return_dict=False)""",
        "only the teacher thinks": """
            shown = PRIVILEGED[context].format(privileged) if context else ""
            content = problem.problem + shown + INSTRUCTION
            return tokenizer.apply_chat_template([{"role": "user", "content": content}],
                add_generation_prompt=True, enable_thinking=bool(context), return_dict=False)""",
        "no generation prompt": """
            shown = PRIVILEGED[context].format(privileged) if context else ""
            content = problem.problem + shown + INSTRUCTION
            return tokenizer.apply_chat_template([{"role": "user", "content": content}],
                enable_thinking=thinking, return_dict=False)""",
        "the solution is a message of its own": """
            texts = [problem.problem + INSTRUCTION]
            texts += [PRIVILEGED[context].format(privileged)] if context else []
            return tokenizer.apply_chat_template([{"role": "user", "content": text} for text in texts],
                add_generation_prompt=True, enable_thinking=thinking, return_dict=False)""",
    },
    2: {
        "reaches instead of exceeds": """
            cdf = log_probs.double().exp().cumsum(-1)
            return torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=False)[:, 0]""",
        "no total": """
            cdf = log_probs.double().exp().cumsum(-1)
            found = torch.searchsorted(cdf, uniforms[:, None], right=True)[:, 0]
            return found.clamp(max=log_probs.shape[1] - 1)""",
        "greedy": "return log_probs.argmax(-1)",
        "one number for all rows": """
            cdf = log_probs.double().exp().cumsum(-1)
            found = torch.searchsorted(cdf, (uniforms[:1] * cdf[:, -1])[:, None], right=True)[:, 0]
            return found.clamp(max=log_probs.shape[1] - 1)""",
        "log-probs are cumulated": """
            cdf = log_probs.double().cumsum(-1)
            return torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0]""",
    },
    3: {
        "a mask from pad ids": """
            width = max(len(p) + len(r) for p, r in zip(prompts, responses))
            ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in zip(prompts, responses)])
            mask = ids != 0
            for row, prompt in enumerate(prompts):
                mask[row, : len(prompt)] = False
            return ids, mask""",
        "padded left": """
            width = max(len(p) + len(r) for p, r in zip(prompts, responses))
            ids = torch.tensor([[0] * (width - len(p) - len(r)) + p + r for p, r in zip(prompts, responses)])
            from_end = width - torch.arange(width)
            return ids, from_end <= torch.tensor([[len(r)] for r in responses])""",
        "the prompt is trained too": """
            width = max(len(p) + len(r) for p, r in zip(prompts, responses))
            ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in zip(prompts, responses)])
            return ids, torch.arange(width) < torch.tensor([[len(p) + len(r)]
                for p, r in zip(prompts, responses)])""",
        "padding after the longest response is trained": """
            width = max(len(p) + len(r) for p, r in zip(prompts, responses))
            ids = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in zip(prompts, responses)])
            return ids, torch.arange(width) >= torch.tensor([[len(p)] for p in prompts])""",
    },
    4: {
        "no shift": """
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return hidden[response_mask]""",
        "the shift on the wrong side": """
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return hidden[:, 1:][response_mask[:, :-1]]""",
        "the last token is lost": """
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return hidden[:, :-1][response_mask[:, :-1]]""",
        "position after position, not row after row": """
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return hidden.transpose(0, 1)[:-1][response_mask.T[1:]]""",
        "no gradient": """
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state.detach()
            return hidden[:, :-1][response_mask[:, 1:]]""",
    },
    5: {
        "a mean over all tokens": "return -(policy_log_probs * response_mask).mean()",
        "a mean over this micro-batch": "return -policy_log_probs[response_mask].mean()",
        "the prompt counts": "return -policy_log_probs.sum() / num_tokens",
        "up instead of down": "return policy_log_probs[response_mask].sum() / num_tokens",
    },
    6: {
        "right answers": r'return dict.fromkeys(WEAK, r"\boxed{72}")',
        "wrong and refused": r'return dict.fromkeys(WEAK, r"\boxed{5}")',
        "no answer": 'return dict.fromkeys(WEAK, "72 <think> 72")',
    },
    7: {
        "the sample's std": """
            groups = rewards.view(-1, group_size)
            advantages = groups - groups.mean(1, keepdim=True)
            return (advantages / (groups.std(1, keepdim=True) + eps if use_std else 1)).view(-1)""",
        "the mean of the whole batch": """
            groups = rewards.view(-1, group_size)
            advantages = groups - groups.mean()
            spread = groups.std(1, keepdim=True, correction=0) + eps
            return (advantages / (spread if use_std else 1)).view(-1)""",
        "no eps": """
            groups = rewards.view(-1, group_size)
            advantages = groups - groups.mean(1, keepdim=True)
            return (advantages / (groups.std(1, keepdim=True, correction=0) if use_std else 1)).view(-1)""",
        "always the std": """
            groups = rewards.view(-1, group_size)
            advantages = groups - groups.mean(1, keepdim=True)
            return (advantages / (groups.std(1, keepdim=True, correction=0) + eps)).view(-1)""",
        "every P-th response is a group": """
            groups = rewards.view(group_size, -1)
            advantages = groups - groups.mean(0)
            return (advantages / (groups.std(0, correction=0) + eps if use_std else 1)).view(-1)""",
    },
    8: {
        "low and high exchanged": """
            ratio = torch.exp(policy_log_probs - old_log_probs).clamp(max=ratio_cap)
            free = ratio * advantages
            clipped = ratio.clamp(1 - clip_high, 1 + clip_low) * advantages
            return -torch.min(free, clipped), clipped < free""",
        "max instead of min": """
            ratio = torch.exp(policy_log_probs - old_log_probs).clamp(max=ratio_cap)
            free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
            return -torch.max(free, clipped), clipped < free""",
        "no min": """
            ratio = torch.exp(policy_log_probs - old_log_probs).clamp(max=ratio_cap)
            free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
            return -clipped, clipped < free""",
        "no cap": """
            ratio = torch.exp(policy_log_probs - old_log_probs)
            free, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
            return -torch.min(free, clipped), clipped < free""",
        "every ratio outside the range counts as clipped": """
            ratio = torch.exp(policy_log_probs - old_log_probs).clamp(max=ratio_cap)
            bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
            return -torch.min(ratio * advantages, bounded * advantages), bounded != ratio""",
    },
    9: {
        "sequence without the number of responses": """
            if normalization == "sequence":
                return 1 / lengths
            total = lengths.sum() if normalization == "token" else len(lengths) * max_new_tokens
            return torch.ones_like(lengths) / total""",
        "constant without the number of responses": """
            if normalization == "sequence":
                return 1 / (len(lengths) * lengths)
            total = lengths.sum() if normalization == "token" else max_new_tokens
            return torch.ones_like(lengths) / total""",
        "token and sequence exchanged": """
            if normalization == "token":
                return 1 / (len(lengths) * lengths)
            total = lengths.sum() if normalization == "sequence" else len(lengths) * max_new_tokens
            return torch.ones_like(lengths) / total""",
    },
    10: {
        "p and q exchanged": """
            log_ratio = p_log_probs - q_log_probs
            return log_ratio.exp() - 1 - log_ratio""",
        "k1": "return p_log_probs - q_log_probs",
        "k2": "return (p_log_probs - q_log_probs) ** 2 / 2",
        "the mean": """
            log_ratio = q_log_probs - p_log_probs
            return (log_ratio.exp() - 1 - log_ratio).mean()""",
    },
    11: {
        "forward and reverse exchanged": """
            s, t = F.log_softmax(student_logits.float(), -1), F.log_softmax(teacher_logits.float(), -1)
            m = torch.logaddexp(t + math.log(beta), s + math.log(1 - beta))
            kl = {(a, b): (p.exp() * (p - q)).sum(-1) for a, p, b, q in
                [("t", t, "s", s), ("s", s, "t", t), ("t", t, "m", m), ("s", s, "m", m)]}
            if kind == "split":
                return torch.where(is_correct, kl["t", "s"], kl["s", "t"])
            mixed = beta * kl["t", "m"] + (1 - beta) * kl["s", "m"]
            return {"reverse": kl["t", "s"], "forward": kl["s", "t"], "jsd": mixed}[kind]""",
        "logits are taken for log-probs": """
            s, t = student_logits.float(), teacher_logits.float()
            p, q = (s, t) if kind == "reverse" else (t, s)
            return (p.exp() * (p - q)).sum(-1)""",
        "beta on the student": """
            s, t = F.log_softmax(student_logits.float(), -1), F.log_softmax(teacher_logits.float(), -1)
            if kind in ("reverse", "split"):
                reverse, forward = (s.exp() * (s - t)).sum(-1), (t.exp() * (t - s)).sum(-1)
                return reverse if kind == "reverse" else torch.where(is_correct, reverse, forward)
            if kind == "forward":
                return (t.exp() * (t - s)).sum(-1)
            m = torch.logaddexp(s + math.log(beta), t + math.log(1 - beta))
            return beta * (s.exp() * (s - m)).sum(-1) + (1 - beta) * (t.exp() * (t - m)).sum(-1)""",
        "the mean over the vocabulary": """
            s, t = F.log_softmax(student_logits.float(), -1), F.log_softmax(teacher_logits.float(), -1)
            p, q = (s, t) if kind == "reverse" else (t, s)
            return (p.exp() * (p - q)).mean(-1)""",
    },
    12: {
        "--truncated is not read": """
            if args.only_correct:
                return rollout.label == "correct"
            return rollout.label != "correct" if args.only_incorrect else True""",
        "drop is not read": """
            label = args.truncated if rollout.label == "truncated" else rollout.label
            if args.only_correct:
                return label == "correct"
            return label == "incorrect" if args.only_incorrect else True""",
        "truncated ones are never incorrect": """
            if rollout.label == "truncated" and args.truncated != "correct":
                return False
            if args.only_correct:
                return rollout.label != "incorrect"
            return rollout.label == "incorrect" or not args.only_incorrect""",
        "without a filter only correct ones": """
            label = args.truncated if rollout.label == "truncated" else rollout.label
            return label == ("incorrect" if args.only_incorrect else "correct")""",
    },
    13: {
        "the decay on the student": """
            if args.teacher == "refresh" and step % args.refresh_every == 0:
                teacher.load_state_dict(student.state_dict())
            if args.teacher == "ema":
                for ours, theirs in zip(teacher.parameters(), student.parameters()):
                    ours.lerp_(theirs, args.ema_decay)""",
        "teacher and student share their tensors": """
            if args.teacher == "refresh" and step % args.refresh_every == 0:
                for ours, theirs in zip(teacher.parameters(), student.parameters()):
                    ours.data = theirs.data
            if args.teacher == "ema":
                for ours, theirs in zip(teacher.parameters(), student.parameters()):
                    ours.lerp_(theirs, 1 - args.ema_decay)""",
        "refreshed at every step": """
            if args.teacher == "refresh":
                teacher.load_state_dict(student.state_dict())
            if args.teacher == "ema":
                for ours, theirs in zip(teacher.parameters(), student.parameters()):
                    ours.lerp_(theirs, 1 - args.ema_decay)""",
        "frozen moves too": """
            if args.teacher != "ema" and step % args.refresh_every == 0:
                teacher.load_state_dict(student.state_dict())
            if args.teacher == "ema":
                for ours, theirs in zip(teacher.parameters(), student.parameters()):
                    ours.lerp_(theirs, 1 - args.ema_decay)""",
        "the student follows the teacher": """
            if args.teacher == "refresh" and step % args.refresh_every == 0:
                student.load_state_dict(teacher.state_dict())
            if args.teacher == "ema":
                for ours, theirs in zip(teacher.parameters(), student.parameters()):
                    theirs.lerp_(ours, args.ema_decay)""",
    },
}  # fmt: skip


@pytest.mark.parametrize("number, mistake", [(n, name) for n, bodies in MISTAKES.items() for name in bodies])
def test_a_plausible_mistake_fails(number, mistake, write_body):
    """A test that passes whatever is written teaches nobody. Each mistake is seen by at least one test: not
    by an error of ours (a name or a syntax that is not there), but by what the function does."""
    body = textwrap.indent(textwrap.dedent(MISTAKES[number][mistake]).strip(), "    ") + "\n"
    write_body(*course.EXERCISES[number], body)
    raised, _ = failures(number)
    assert raised
    ours = [error for error in raised if isinstance(error, (NameError, SyntaxError, NotImplementedError))]
    assert not ours


def test_every_exercise_has_mistakes_tests_and_an_adapter():
    """A listed function without a named test could be left blank, and nobody would see it."""
    assert MISTAKES.keys() == course.EXERCISES.keys() and list(MISTAKES) == list(range(1, len(MISTAKES) + 1))
    tests, between = (COURSE / "test_exercises.py").read_text(), (COURSE / "adapters.py").read_text()
    for number, (name, function) in course.EXERCISES.items():
        module = name.rpartition("/")[2].removesuffix(".py")
        assert f"def test_exercise_{number}_" in tests and f"run_{function}(" in tests
        assert f"def run_{function}(" in between and f"return {module}.{function}(" in between
        assert f"Exercise {number}, {name}." in inspect.getdoc(getattr(adapters, f"run_{function}"))


@pytest.mark.parametrize("number", course.EXERCISES)
def test_a_blank_keeps_its_specification(number):
    """The docstring that remains names every flag that the function must obey."""
    for _, name, function in course.functions_of([number]):
        nodes = ast.parse((ROOT / name).read_text()).body
        node = next(x for x in nodes if getattr(x, "name", "") == function)
        flags = set(re.findall(r"\bargs\.(\w+)", course.body_of(ROOT / name, function)))
        documented = (ast.get_docstring(node) or "").replace("-", "_")
        assert len(documented) > 60
        assert not {flag for flag in flags if flag not in documented}


@pytest.mark.parametrize("name", weak_verifier.WEAK)
def test_a_weak_verifier_is_no_strawman(name):
    """It accepts the right answer and refuses a wrong one, as anyone who wrote it would have tried."""
    for answer in "72", "71":
        response = rf"<think>29-5=24. 24-6=18. 18*4={answer}.</think>\boxed{{{answer}}}"
        expected = answer == weak_verifier.GOLD
        assert weak_verifier.WEAK[name](response, weak_verifier.GOLD) is expected
        assert verify(response, weak_verifier.GOLD) is expected


# ------------------------------------------------------------------------------------------------------------
# In copies of the repository


def run(folder, *command):
    process = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr


def copy_to(folder, checkpoints=()):
    """What the kit needs of the repository, in another folder; checkpoints in name only."""
    for name in [*course.HANDED_OUT, "tests/course/course.py", "tests/course/INSTRUCTOR.md"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in checkpoints:
        (folder / "ckpt" / name).mkdir(parents=True)
        for file in ("config.json", "args.json", "model.safetensors", "trainer_state.pt"):
            (folder / "ckpt" / name / file).write_text("{}")
    return folder


@pytest.fixture
def copy(tmp_path):
    return copy_to(tmp_path / "copy")


def test_blank_and_restore_to_the_byte(copy):
    """What was blanked is restored as it was; a second blank is harmless, and a student's work is kept."""
    everything = course.functions_of(course.EXERCISES)
    before = {path: path.read_bytes() for path in copy.rglob("*.py")}
    kit = "tests/course/course.py"
    for _ in range(2):
        status, out, err = run(copy, kit, "blank")
        assert status == 0 and out.count(": blank") == len(everything), err
    for number, name, function in everything:
        assert course.body_of(copy / name, function) == course.BLANK.format(number)
    course.replace_body(copy / "rlvr.py", "sequence_weights", "    return lengths\n")
    status, _, err = run(copy, kit, "blank", "9")
    assert status == 2 and "other work" in err
    assert run(copy, kit, "restore")[0] == 0
    assert {path: path.read_bytes() for path in copy.rglob("*.py")} == before
    assert "return lengths" in (copy / ".solutions" / "replaced.jsonl").read_text()
    assert run(copy, kit, "blank", "9", "12")[1].count(": blank") == 2
    assert run(copy, kit, "list")[1].count(": filled in") == len(everything) - 2


def test_bad_use_is_one_line(copy):
    """A student's file that does not parse must not end the instructor's command in a traceback."""
    (copy / "opsd.py").write_text("def divergence(:\n")
    (copy / "full").mkdir()
    (copy / "full" / "notes.txt").write_text("mine")
    uses = {"blank 11": "not valid Python (line 1)", "restore": "nothing to restore",
        "blank 14": "there are 1 to 13", "handout full": "not empty", "handout full/notes.txt": "not empty",
        "handout requirements.txt/x": "cannot be written", "references gone": "no such folder"}  # fmt: skip
    for command, says in uses.items():
        status, _, err = run(copy, "tests/course/course.py", *command.split())
        assert status == 2 and says in err and len(err.splitlines()) == 1, (command, err)
    assert [path.name for path in (copy / "full").iterdir()] == ["notes.txt"]


class AsMethods(ast.NodeTransformer):
    """torch.exp(x) -> x.exp(): two spellings of one call."""

    def visit_Call(self, node):
        self.generic_visit(node)
        if node.args and re.fullmatch(r"(torch|F)\.\w+", ast.unparse(node.func)):
            function = ast.Attribute(node.args[0], node.func.attr, ast.Load())
            return ast.copy_location(ast.Call(function, node.args[1:], node.keywords), node)
        return node


def shapes(code):
    """Every expression and statement of some size, with names replaced by their order: a copy under other
    names has the same shape."""
    found = {}
    for node in ast.walk(AsMethods().visit(ast.parse(code))):
        if isinstance(node, (ast.expr, ast.stmt)) and not isinstance(node, (ast.Constant, ast.FunctionDef)):
            order, parts = {}, []
            for part in ast.walk(node):
                if isinstance(part, ast.Name):
                    parts.append(f"name {order.setdefault(part.id, len(order))}")
                elif not isinstance(part, ast.expr_context):
                    labels = [getattr(part, field, None) for field in ("attr", "arg", "value")]
                    label = next((x for x in labels if isinstance(x, (str, int, float))), "")
                    parts.append(f"{type(part).__name__} {label}")
            if len(parts) >= 9:
                found[" ".join(parts)] = ast.unparse(node)
    return found


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    """What `handout` writes, from a copy with checkpoints, caches and an instructor's own files."""
    base = tmp_path_factory.mktemp("course")
    copy = copy_to(base / "copy", checkpoints=["sft", "rlvr"])
    for secret in ".git/config", ".solutions/blanked.json", "__pycache__/sft.pyc", "my_solutions.py":
        (copy / secret).parent.mkdir(exist_ok=True)
        (copy / secret).write_text("secret")
    status, out, err = run(copy, "tests/course/course.py", "handout", "../students")
    assert status == 0 and "without example.txt" in out and "without ckpt/" not in out, err
    return base / "students"


def test_handout_holds_what_it_should(handed_out):
    """The list is closed: a new file in the repository is handed out only when somebody says so."""
    files = {str(path.relative_to(handed_out)) for path in handed_out.rglob("*") if path.is_file()}
    kept = {
        f"ckpt/{name}/{file}"
        for name in ("sft", "rlvr")
        for file in ("config.json", "args.json", "model.safetensors")
    }
    assert files == {*course.HANDED_OUT, *kept}


@pytest.mark.parametrize("number", course.EXERCISES)
def test_handout_leaks_no_solution(number, handed_out):
    """No line of a solution stands in any file of the handout, and no piece of one, under other names, in
    its code."""
    lines, pieces = set(), {}
    for _, name, function in course.functions_of([number]):
        assert course.body_of(handed_out / name, function) == course.BLANK.format(number)
        body = course.body_of(ROOT / name, function)
        lines |= {line.split("  # ")[0].strip().rstrip(",") for line in body.splitlines()}
        pieces |= shapes(f"def f():\n{body}")
    lines = {line for line in lines if len(line) >= 24}
    for path in handed_out.rglob("*"):
        if path.suffix in (".py", ".md", ".txt"):
            text = path.read_text()
            assert not {line for line in lines if line in text}, path.name
            if path.suffix == ".py":
                leaked = pieces.keys() & shapes(text).keys()
                assert not leaked, f"{path.name}: {[pieces[x] for x in leaked]}"


def test_handout_links_lead_somewhere(handed_out):
    """A link to a file that the handout lacks would be the first thing that a student tries."""
    links = 0
    for page in course.PAGES:
        text = (handed_out / page).read_text()
        assert ".py#L" not in text  # lines have moved
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", text):
            if not target.startswith("http"):
                links += 1
                assert ((handed_out / page).parent / target).exists(), f"{page}: {target}"
    assert links


def test_handout_fails_for_students_as_it_should(handed_out, tmp_path):
    """`python -m pytest` there: every exercise's tests fail, by their blank, and nothing else fails; with the
    solutions written back, all pass."""
    folder = tmp_path / "students"
    shutil.copytree(handed_out, folder)
    flags = ["-m", "pytest", "-q", "-rN", "--tb=line", "-p", "no:cacheprovider", "--no-header"]
    _, out, _ = run(folder, *flags)
    counts = {number: len(list(calls(number))) for number in course.EXERCISES}
    total = sum(counts.values())
    assert f"{total} failed" in out.splitlines()[-1] and "passed" not in out.splitlines()[-1], out
    for number, count in counts.items():
        blank = f"NotImplementedError: exercise {number}: {course.TESTS}{number}_"
        assert len(re.findall(rf"(?m)^\S+\.py:\d+: {blank}$", out)) == count, out
    for _, name, function in course.functions_of(course.EXERCISES):
        course.replace_body(folder / name, function, course.body_of(ROOT / name, function))
    _, out, _ = run(folder, *flags)
    assert f"{total} passed" in out.splitlines()[-1] and "failed" not in out.splitlines()[-1], out


def test_handout_makes_the_example(tmp_path, monkeypatch, capsys):
    """With all three checkpoints exercise 0's files are made here, since eval.py does not run in a blanked
    folder; a run that fails is one line, and nothing is written."""
    copy = copy_to(tmp_path / "copy", checkpoints=["sft", "rlvr", "opsd"])
    (copy / "eval.py").write_text(  # a stand-in: it prints its flags, and writes the page
        "import pathlib, sys\nprint(*sys.argv[1:-1])\npathlib.Path(sys.argv[-1]).write_text('<html>')\n"
    )
    monkeypatch.setattr(course, "ROOT", copy)
    course.handout(tmp_path / "students", [3])
    assert (tmp_path / "students" / "example.html").read_text() == "<html>"
    assert (tmp_path / "students" / "example.txt").read_text() == course.LOOK.removeprefix("eval.py ") + "\n"
    assert "without" not in capsys.readouterr().out
    (copy / "eval.py").write_text("raise NotImplementedError('exercise 3')\n")
    with pytest.raises(SystemExit) as error:
        course.handout(tmp_path / "others", [3])
    assert error.value.code == 2 and not (tmp_path / "others").exists()
    assert "exercise 3" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# The pages


def commands(text):
    """Every python command on a page: of code blocks and of `inline code`."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", text)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()] + inline
    return [line for line in lines if re.match(r"(?:\w+=\S+ )?(?:\.venv/bin/)?python ", line)]


@pytest.mark.parametrize("page", ["README.md", "INSTRUCTOR.md"])
def test_commands_have_flags_that_exist(page):
    """A command with a flag that was renamed fails on the student's first try."""
    found = commands((COURSE / page).read_text())
    assert len(found) > 5
    for command in found:
        script = re.search(r"python (\S+\.py)", command)
        if script and script[1] != "my_file.py":
            texts = [(ROOT / name).read_text() for name in {script[1], "rollout.py"}]
            for flag in re.findall(r" (--[a-z][a-z-]*)", command):
                spelled = [f'"{flag}"', f'"{flag.replace("--no-", "--")}"']
                assert any(word in text for word in spelled for text in texts), f"{command}: {flag}"


def test_every_run_is_on_the_students_page():
    """Reference numbers for a command that no student is told to run would be numbers for nothing."""
    found = commands(README)
    for reference in course.RUNS.values():
        assert reference.command in found, reference.command


def test_the_times_add_up():
    """Totals that were typed once are wrong after the next change of a row."""
    rows = re.findall(r"(?m)^\| (\d+) \|.*?\| ([\d.]*) \| ([\d.]*) \|$", README)
    assert [int(number) for number, _, _ in rows] == list(range(len(course.EXERCISES) + 1))
    writing, running = (sum(float(row[k] or 0) for row in rows) for k in (1, 2))
    total = rf"(?m)^\| \| \*\*in all\*\* \|.*\| {writing:g} \| {running:g} \|$"
    assert re.search(total, README), (writing, running)


def test_every_exercise_has_its_section():
    """What to write, what it must do, its tests, what to predict, what to report: always in the same place."""
    sections = dict(re.findall(r"(?ms)^### (\d+)\. .*?\n(.*?)(?=^##)", README))
    for number, (name, function) in course.EXERCISES.items():
        text = sections[str(number)]
        module = name.rpartition("/")[2].removesuffix(".py")
        assert f"**Write** `{module}.{function}`" in text and f"-k exercise_{number}_`" in text
        assert "**Spec.**" in text and "**Report.**" in text
        assert ("**Predict.**" in text) == any(
            command.startswith(("python", "PYTHON"))
            and "pytest" not in command
            and "verify.py" not in command
            for command in commands(text)
        )


def test_the_instructor_has_an_answer_to_everything():
    """Fourteen exercises and the project, and every numbered question on the files."""
    questions = set(re.findall(r"(?m)^(Q\d+)\. ", README))
    assert len(questions) == 12 and questions == set(re.findall(r"(?m)^\*\*(Q\d+)\.\*\* ", INSTRUCTOR))
    for number in range(len(course.EXERCISES) + 2):
        assert re.search(rf"(?m)^\*\*{number}\.\*\* ", INSTRUCTOR), number
    answers = INSTRUCTOR.partition("## Answers to the questions")[2]
    code = "".join((ROOT / name).read_text() for name in course.CODE)
    named = re.findall(r"`(?:\w+\.)?([a-z_]+)`", answers)
    assert len(named) > 8 and not [name for name in named if f"def {name}(" not in code]


def test_the_reference_table_is_what_the_runs_gave():
    """A number typed into the page by hand is one that nobody can reproduce; a run without numbers cannot be
    graded."""
    reference = json.loads((COURSE / "reference.json").read_text())
    assert reference["seeds"] == course.SEEDS and reference["runs"].keys() == course.RUNS.keys()
    assert course.BEGIN + course.reference_table(reference["runs"]) + course.END in INSTRUCTOR


def test_the_commands_that_make_the_references(tmp_path, monkeypatch):
    """Each seed has its own models; what is there already is left out, and so are the experiments' arms."""
    (tmp_path / "s0" / "clip20").mkdir(parents=True)
    row = {"accuracy": 1, "length": 1, "truncated": 0}
    (tmp_path / "s0" / "clip20.json").write_text(json.dumps({"checkpoints": [row]}))
    (tmp_path / "s0" / "clip20" / "metrics.jsonl").write_text('{"entropy": 0.1, "ratio/clip_frac": 0.0}\n')
    for seed in course.SEEDS:
        (tmp_path / f"seed{seed}.json").write_text(json.dumps({"frozen-100": row}))
    monkeypatch.setattr(course, "ARMS", tmp_path)
    made = list(course.reference_commands(tmp_path))
    assert not [command for command in made if "s0/clip20" in command or "frozen-100" in command]
    assert made[0] == f"python sft.py --seed 0 --out {tmp_path}/s0/sft"
    one, two = f"{tmp_path}/s1", f"{tmp_path}/s2"
    assert f"python eval.py {two}/rlvr --temperature 0 --json {two}/temperature-0.json" in made
    assert (
        f"python rlvr.py --init {one}/sft --updates-per-batch 4 --steps 25 --clip-high 0.2 --seed 1 "
        f"--out {one}/clip20"
    ) in made


def test_references_from_runs(tmp_path, monkeypatch, capsys):
    """Accuracies .9 .8 1 and lengths 40 41 42: mean 90 (80 to 100), 41 (40 to 42). Of the losses 9 1 2 3 4 5
    the last five have the mean 3, in every seed; the steps took 6 x 10 s: 1 minute."""
    (tmp_path / course.COURSE).mkdir(parents=True)
    page = tmp_path / course.COURSE / "INSTRUCTOR.md"
    page.write_text(f"before\n{course.BEGIN}old\n{course.END}after\n")
    monkeypatch.setattr(course, "ROOT", tmp_path)
    monkeypatch.setattr(course, "ARMS", tmp_path)
    for seed, (accuracy, length) in enumerate([(0.9, 40), (0.8, 41), (1.0, 42)]):
        folder = tmp_path / "runs" / f"s{seed}"
        (folder / "sft").mkdir(parents=True)
        row = {"accuracy": accuracy, "length": length, "truncated": 0.0}
        (folder / "sft.json").write_text(json.dumps({"checkpoints": [row]}))
        rows = [{"step": i, "loss": loss, "time/train": 10} for i, loss in enumerate([9, 1, 2, 3, 4, 5], 1)]
        rows.insert(0, {"step": 0, "eval/accuracy": 0.0})
        (folder / "sft" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"seed{seed}.json").write_text(json.dumps({"frozen-100": row}))
    course.references(tmp_path / "runs")
    out = capsys.readouterr().out
    assert "left out: rlvr: no " in out and f"2 of {len(course.RUNS)} runs" in out
    lines = page.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    assert lines[4] == (
        "| 0 | `python sft.py` | 90.0 (80.0 to 100.0) | 41.0 (40.0 to 42.0) | 0.0 (0.0 to 0.0) | "
        "loss, last 5 steps 3.000 (3.000 to 3.000) | 1.0 |"
    )
    assert lines[5].startswith("| 13 | `python opsd.py --only-correct --steps 100 ")
    assert lines[5].endswith(" |  |  |")
    saved = json.loads((tmp_path / course.COURSE / "reference.json").read_text())
    assert saved["runs"]["sft"]["accuracy, %"] == [0.9, 0.8, 1.0]
