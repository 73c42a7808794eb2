"""verify.py: is the answer in this response equal to the gold answer?

    python verify.py '<think>...</think>\\boxed{3/4}' 0.75

Three steps: extract the answer's text from the response, read both texts as exact rational numbers
where they are numbers, compare. Rational is compared with rational, never through a float: 0.3333
is not 1/3, and 1/2^99 is not 1/2^98. What is no number is compared as text, but for white space.
Nothing the model wrote is evaluated.

Understood so far: integers, decimals, fractions (1/2, \\frac{1}{2}, \\frac12), percent (a factor
1/100), a currency sign, thousands separators. No symbolic expressions yet: \\sqrt{4} is not 2 here.
"""

import re
import sys
from fractions import Fraction

MAX_ANSWER = 2000  # characters; a longer answer is wrong, whatever it says


def extract_answer(response):
    """The answer's text, or None: the last \\boxed{...} after the thinking, else what follows ####.

    An unclosed <think> has no answer yet. Linear in the response's length: no regex runs over it.
    """
    before, closed, rest = response.rpartition("</think>")
    if not closed and "<think>" in response:
        return None
    start = rest.rfind("\\boxed{")
    if start < 0:
        _, mark, answer = rest.rpartition("####")
        return answer.strip() if mark else None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(rest)):
        depth += {"{": 1, "}": -1}.get(rest[i], 0)
        if depth == 0:
            return rest[start:i].strip()
    return None  # the box is never closed


def read_number(text):
    """Text -> Fraction, or None if it is no number of the kinds listed above."""
    if len(text) > MAX_ANSWER:
        return None
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\$", "")
    text = text.replace("$", "").replace("\\%", "%").replace("{,}", ",").replace("−", "-").strip()
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?%?", text):
        text = text.replace(",", "")
    if match := re.fullmatch(r"([-+]?)\\frac(?:\{(-?\d+)\}\{(-?\d+)\}|(\d)(\d))", text):
        sign, *numbers = match.groups()
        top, bottom = [n for n in numbers if n is not None]
        text = f"{top}/{bottom}"
        factor = -1 if sign == "-" else 1
    else:
        factor = 1
    if text.endswith("%"):
        text, factor = text[:-1].strip(), Fraction(1, 100)
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)|[-+]?\d+/-?\d+", text):
        return None
    if "/" in text:
        top, bottom = map(int, text.split("/"))
        return factor * Fraction(top, bottom) if bottom else None
    return factor * Fraction(text)


def plain(text):
    """Text without the white space that means nothing: `x + 1` is `x+1`, but `1 1/2` not `11/2`."""
    return re.sub(r" ?([^\w ]) ?", r"\1", " ".join(text.split()))


def verify(response, gold):
    """True if the response's answer equals the bare gold. False if unreadable; never raises."""
    if not isinstance(response, str) or not isinstance(gold, str):
        return False
    answer = extract_answer(response)
    if not answer or max(len(answer), len(gold)) > MAX_ANSWER:
        return False
    ours, golds = read_number(answer), read_number(gold)
    if ours is not None and golds is not None:
        return ours == golds
    return plain(answer) == plain(gold)


def main():
    if len(sys.argv) != 3:
        print("usage: python verify.py RESPONSE GOLD", file=sys.stderr)
        raise SystemExit(2)
    response, gold = sys.argv[1:]
    answer = extract_answer(response)
    print(f"extracted  {answer!r}")
    print(f"read as    {None if answer is None else read_number(answer)}   "
        "(None: no number, compared as text)")
    print(f"gold as    {read_number(gold)}")
    equal = verify(response, gold)
    print(f"verdict    {'equal' if equal else 'not equal'}")
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
