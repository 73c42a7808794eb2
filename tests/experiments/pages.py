"""What the tests ask of a page: links that resolve, commands that exist, lines that are not too long.

Each function takes the path of a Markdown file and returns a list of complaints: [] is a page in order.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"--help", "--no-deps", "--index-url", "--shutdown-timeout"}  # of pip, of torchrun, of every script


def split_code(text):
    """-> the lines outside code blocks, with their numbers, and the code blocks' text."""
    prose, code, inside = [], [], False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif inside:
            code.append(line)
        else:
            prose.append((number, line))
    return prose, "\n".join(code)


def long_lines(page, limit=140):
    """Lines over the limit, outside code blocks and tables."""
    prose, _ = split_code(page.read_text())
    return [f"{page.name}:{number} has {len(line)} characters" for number, line in prose
        if len(line) > limit and not line.startswith("|")]


def anchors(page):
    """The names that GitHub gives a page's headings."""
    prose, _ = split_code(page.read_text())
    headings = [line.lstrip("#").strip() for _, line in prose if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    """Relative links, pictures too, to a file, a line or a heading that is not there."""
    prose, _ = split_code(page.read_text())
    text = "\n".join(line for _, line in prose)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            broken.append(f"{link}: no such file")
        elif target.suffix == ".md" and anchor and anchor not in anchors(target):
            broken.append(f"{link}: no such heading")
        elif re.fullmatch(r"L\d+", anchor) and int(anchor[1:]) > len(target.read_text().splitlines()):
            broken.append(f"{link}: no such line")
    return broken


def commands(page):
    """-> [(script, rest of the command)] of the page's code blocks and of code within its lines."""
    prose, code = split_code(page.read_text())
    text = "\n".join(line for _, line in prose)
    pieces = re.findall(r"`([^`]+)`", text) + code.replace("\\\n", " ").splitlines()
    found = []
    for piece in pieces:
        without_comment = re.sub(r"\s#.*", "", piece)
        for command in without_comment.split("&&"):
            match = re.search(r"\b(?:python|bash|torchrun --nproc-per-node \d+) ([\w./-]+\.(?:py|sh))\b(.*)", command)
            if match:
                found.append((match[1], match[2]))
    return found


def flags_in(*files):
    return set(re.findall(r'"(--[a-z][a-z-]*)"', "".join(file.read_text() for file in files)))


def unknown(flags, defined):
    """Those that no parser defines; --no-thinking comes with --thinking."""
    return sorted(flag for flag in flags if not {flag, flag.replace("--no-", "--")} & (defined | ELSEWHERE))


def unknown_commands(page):
    """Scripts that are not there, and flags that they do not have."""
    complaints = []
    for script, rest in commands(page):
        if not (ROOT / script).is_file():
            complaints.append(f"{script}: no such file")
            continue
        # A script that ends in sft.main() has sft.py's flags.
        wrapped = [ROOT / f"{stage}.py" for stage in re.findall(r"(\w+)\.main\(\)", (ROOT / script).read_text())]
        defined = flags_in(ROOT / script, ROOT / "rollout.py", *wrapped)
        flags = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
        complaints += [f"{script} has no {flag}" for flag in unknown(flags, defined)]
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("tests/*/*.py")]
    flags = set(re.findall(r"`(--[a-z][a-z-]*)", page.read_text()))
    return complaints + [f"no script has {flag}" for flag in unknown(flags, flags_in(*scripts))]
