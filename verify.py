"""verify.py: is the answer in this response equal to the gold answer?

    python verify.py 'So it is \\boxed{\\frac{2}{4}}.' 0.5    # says why; exit status 0: equal

Find the answer's text (`extract_answer`), read it (`parse_math`), compare what was read with the
gold (`compare`). In doubt the verdict is False: a wrong answer that is rewarded gets learned.

What is equal. A number is exact: 0.333 is not 1/3, and 52_8 is 42. 20\\% is 1/5, and also 20 where
the gold is a bare number above 1. A unit may be left out, not exchanged. x = 5 answers 5, but not
y = 5. Lists and sets match in any order, tuples in theirs. An open interval is not a closed one.
Equations and inequalities may differ by a constant factor. Other formulas are equal if they agree
to 100 digits at points where the gold is real. \\log without a base is not \\ln.

An answer is a value, not the question again. Where the gold is a number, 3+4 and \\sqrt{49} are
False; a fraction, a decimal, one power, a factorial, 3*10^4, a percentage, degrees, a number in a
base, and a chain of equalities that ends in one of these are values. Where the gold is a formula,
such as \\sqrt{3} or x^2 - 1, a formula of the question that has its value is still accepted.

Not read, so equal to the same text only: sums, integrals, floors, absolute values, binomials, \\mp,
\\approx, hyperbolic functions, f(x) = 2x, f(0), n!, 0.\\overline{3}, \\mathbb{R}, {x | x > 3}, set
algebra other than unions of intervals, x < 5 as an interval, x = 1, y = 2 as a tuple, a factor
before a matrix, "Area = 5", (B) 42, 2 1/3, units to be converted. Rewrite such golds, or drop them.

The text is written by a model that is rewarded for fooling this file. So nothing in it is executed
(sympy's parsers run Python), and what is read is kept as numbers of 150 digits: nothing grows, and
no text makes `verify` raise or take 0.1 s. `verify_batch` adds a deadline all the same.
"""

import itertools
import json
import math
import operator
import random
import re
import subprocess
import sys
import threading
import time
from collections import namedtuple
from fractions import Fraction

import mpmath

MAX_RESPONSE, MAX_TAIL = 1_000_000, 20_000  # characters: more is no answer; where one is sought
MAX_ANSWER, MAX_TOKENS, MAX_DEPTH, MAX_ITEMS = 2_000, 300, 60, 30  # of one answer
MAX_DIGITS, MAX_STEPS = 400, 3_000  # of an exact number; to compute values in one verdict
MP = mpmath.MPContext()  # our own, so that its precision is never changed from elsewhere
MP.dps = 150
MAX_SIZE, NOISE = 10**40, MP.mpf(10) ** -100  # see `compute`


WORK = threading.local()  # .steps: how many this thread's verdict has taken, some microseconds each


def verify(response, gold):
    """True if the response's answer equals the gold answer. Never raises; not text: False."""
    return isinstance(response, str) and isinstance(gold, str) and judge(response, gold)[0]


def judge(response, gold):
    """-> (whether the response's answer equals the gold, what decided)"""
    if any(mark in gold for mark in ("\\boxed", "\\fbox", "#### ", "<answer>")):
        gold = find_answer(gold)[0] or ""
    answer, where = find_answer(response)
    if answer is None:
        return False, where
    try:
        return compare_texts(normalize(answer), normalize(gold))
    except Exception as error:  # a ValueError, what mpmath raises, a recursion too deep
        return False, f"no way to compare: {error}"


def compare_texts(text, gold):
    """The same text, a choice, words, or mathematics."""
    squeezed = [re.sub(r"(?<!\w) | (?!\w)", "", x) for x in (text, gold)]
    if squeezed[0] == squeezed[1]:
        return text != "", "the same text"
    letters = [CHOICE.fullmatch(x) for x in (text, gold)]
    if all(letters):
        return letters[0][1] == letters[1][1], "the choice letter"
    if is_words(gold):
        return text.lower() == gold.lower(), "the same words"
    (text, unit), (gold, gold_unit) = split_unit(text), split_unit(gold)
    if unit and gold_unit and unit != gold_unit:
        return False, f"{unit} is not {gold_unit}"
    answer, gold = parse_math(text), parse_math(gold)
    plain = ("", "degree")
    if answer.names and unit not in plain or gold.names and gold_unit not in plain:
        raise ValueError("a unit behind a formula: in 2x^3 ml it may be m times l")
    return compare(answer, gold, gold_unit)


CHOICE = re.compile(r"(?:[Oo]ption )?\(? ?([A-Z]) ?[).:]?")


def is_words(text):
    """Letters that are no product: two of them may be, as in xy."""
    words = re.fullmatch("[A-Za-z][A-Za-z '-]+[A-Za-z]|[A-Z]{2}|no|on", text)
    return bool(words) and text.lower() not in NAMES


# --------------------------------------------------------------------------------------------------
# 1. Where the answer stands. Linear scans only: a lazy regex, <answer>(.*?)</answer>, is quadratic.

BOX = re.compile(r"\\f?box(?:ed)?\s*(?:\{|(?P<bare>[^\s{}$\\]+))|\\.|[{}]", re.S)
PHRASE = re.compile(r"answers?\**\s*(?:is|are|:|=)(?:[\s:*$]|\\\[)*", re.I)


def extract_answer(response):
    """The answer's text, or None if there is none.

    It stands after the thinking, which has to end, in the last of \\boxed{}, \\fbox{}, <answer>,
    `#### `, "the answer is", "Answer:"; or else the response is nothing but an answer.
    """
    return find_answer(response)[0]


def find_answer(response):
    """-> (the answer's text or None, where it stood)"""
    WORK.steps = 0
    if len(response) > MAX_RESPONSE:
        return None, f"longer than {MAX_RESPONSE} characters"
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None, "thinking that does not end"
    text = text[-MAX_TAIL:]
    found = [(*find_box(text), "the last box")]  # (position, answer, where)
    for mark, end in ("<answer>", "</answer>"), ("#### ", "\n"):
        inside, ended, _ = text.rpartition(mark)[2].partition(end)
        answer = inside if ended or end == "\n" else None
        found.append((text.rfind(mark), answer, f"the last {mark}"))
    position, answer, where = max(found, key=operator.itemgetter(0))
    word_counts = position < 0
    for match in list(PHRASE.finditer(text))[-3:]:  # "the answer is correct" names none
        words = re.split(r"\n|</answer>|\.\s", text[match.end() :], maxsplit=1)[0]
        if match.start() > position and is_answer(words, word_counts):
            position, answer, where = match.start(), words, f"the last {match[0].strip(' *')!r}"
    if position < 0 and is_answer(text, True):
        position, answer, where = 0, text, "a response that is nothing else"
    return (answer or "").strip() or None, where if position >= 0 else "no answer that is marked"


def find_box(text):
    """-> (position, content) of the last outermost box; content None if it is never closed."""
    last, opened, boxes = (-1, None), [], []
    for match in BOX.finditer(text):
        if match["bare"]:  # \boxed 5
            last = last if boxes else (match.start(), match["bare"])
        elif match[0] == "{" or len(match[0]) > 2:
            opened.append(match)
            boxes += [match] * (match[0] != "{")
        elif match[0] == "}" and opened and (start := opened.pop())[0] != "{":
            boxes.pop()
            last = last if boxes else (start.start(), text[start.end() : match.start()])
    return (boxes[0].start(), None) if boxes else last


def is_answer(text, word_counts):
    """Whether this text, which stands in no box, is an answer and not prose."""
    try:
        normal = normalize(text)
        if "\n" in text.strip() or not word_counts and re.fullmatch("[A-Za-z]", normal):
            return False
        word = word_counts and re.fullmatch("[A-Za-z]+", normal)
        return bool(word or CHOICE.fullmatch(normal) or parse_math(split_unit(normal)[0]))
    except Exception:  # as in `judge`
        return False


# --------------------------------------------------------------------------------------------------
# 2. One spelling. Of the many ways to write one thing, one is left.

UNICODE = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "≤": "<=", "≥": ">=",
    "≠": "!=", "π": r"\pi ", "θ": r"\theta ", "√": r"\sqrt ", "∞": r"\infty ", "∪": r"\cup ",
    "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "°": r"\degree ", "²": "^2", "³": "^3",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "\u200b": "", "\xa0": " "})
LETTERS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "L": "liter"}


def unfont(match):
    """\\text{ cm} -> cm, and \\text{ m} -> meter: a letter in upright type is a unit."""
    words = match[2]
    if match[1] in ("text", "mbox", "mathrm", "textrm"):
        words = re.sub(r"^\s*[mgshL]\b|(?<=/)[sh]\b", lambda unit: LETTERS[unit[0].strip()], words)
    return f" {words} "


def in_base(match):
    """52_8 -> 42, if the digits fit the base"""
    digits, base = match[1] or match[2], int(match[3])
    fits = 2 <= base <= 36 and all(int(digit, 36) < base for digit in digits)
    return f" {int(digits, base)} " if fits and len(digits) < MAX_DIGITS else match[0]


def mixed(match):
    """2\\frac13 -> \\frac{7}{3}; 2\\frac32 stays: it may be a product, and is refused later"""
    whole, top, bottom = (int(x) for x in match.groups() if x)
    return rf"\frac{{{whole * bottom + top}}}{{{bottom}}}" if whole and top < bottom else match[0]


SPELLINGS = [(re.compile(pattern, re.A), new) for pattern, new in [
    (r"(?<=\d)(?:\{,\}|,\\! ?|\\[,!;: ]|~)(?=\d{3}(?!\d))", ""),  # 1{,}234, 1\,234
    (r"\\(?:left|right)(?![A-Za-z])\s*\.?|\\(?:displaystyle|q?quad|[bB]igg?[lr]?|rm|bf|f?box"
        r"(?:ed)?)(?![A-Za-z])|(?<!\\)\\[][,;:!() ]|[~`]|\\hspace\s*\{[^{}]*\}", " "),
    *[(r"\\((?:text|math)(?:bf|it|rm|sf|tt|normal)?|[mh]box|operatorname|boldsymbol)\*?"
        r"\s*\{([^{}]*)\}", unfont)] * 2,  # twice: text in text
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"), (r"\s+", " "),
    (r"\^ ?\{? ?\\circ ?\}?|(?<!\\)\bdegrees?\b", r"\\degree "),
    (r"\\begin ?\{(?:[pb]|small)?matrix\}|\\begin ?\{array\} ?\{[clr|]*\}", r"\\matrix "),
    (r"(?:\\\\ ?)?\\end ?\{(?:(?:[pb]|small)?matrix|array)\}", r"\\endmatrix "),
    (r"(?<![\w.^\\])(?:\( ?(\d[0-9A-F]*) ?\)|(\d[0-9A-F]*)) ?_ ?\{? ?(\d\d?) ?\}?", in_base),
    (r"(?<![\w.^}\\)])(\d+) ?\\frac ?(?:\{ ?(\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))(?! ?\^)",
        mixed),
    (r"(?<=\d) ?[xX] ?(?=10 ?\^)", "*"), (r"(?<=[\])]) ?U ?(?=[\[(])", r"\\cup "),  # 3 x 10^4
    (r"(?<=\d) thousand\b", "*10^{3}"), (r"(?<=\d) million\b", "*10^{6}"), (r", (?=and|or)", " "),
    (r"\\\{ ?\\\}", r"\\emptyset "),
    (r"\bmph\b", "miles per hour"), (r"\bsq\.?(?= [a-z])", "square")]]


def normalize(text):
    """One spelling for Unicode, fonts, spacing, math mode, and what stands around an answer."""
    if len(text) > MAX_ANSWER:
        raise ValueError(f"longer than {MAX_ANSWER} characters")
    text = text.translate(UNICODE).strip()
    if len(re.findall(r"(?<!\\)\$", text)) == 1 and text[0] in "$-":  # money, not math mode
        text = text.replace("$", r"\$")
    text = re.sub(r"(?<!\\)\$", " ", text).strip().removeprefix("**").removesuffix("**")
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    text = text.strip() if text.rstrip().endswith("..") else text.strip().rstrip(" .,;:")
    money = r"^((?:[^=]*= ?)?)(-?) ?\\\$ ?(-?[\d.,]*\d(?:\*10\^\{\d\})?)(?![\d.])"
    return re.sub(" +", " ", re.sub(money, r"\1\2\3 dollars ", text)).removeprefix("=").strip()


UNITS = {spelling: names.split("=")[0] for names in """
    meter=metre cm=centimeter=centimetre mm=millimeter=millimetre km=kilometer=kilometre inch=in
    foot=feet=ft yard=yd mile=mi gram kg=kilogram mg=milligram pound=lb ounce=oz ton second=sec
    minute=min hour=hr day week month year=yr liter=litre ml=milliliter gallon=gal dollar=usd cent
    radian=rad joule newton watt volt ohm unit person=people child=children=kid boy girl man=men
    woman=women student friend teacher customer guest player member worker team animal dog cat fish
    bird cow chicken egg apple orange banana tree flower rose plant cookie cupcake pizza sandwich
    meal candy=candie cup bottle can bag box jar basket pack book page card ticket sticker letter
    word pen pencil marble ball balloon toy coin point mark goal game step trip lap round row group
    car bus truck bike house room chair table shirt song movie piece slice item block way time vote
    question problem pint quart calorie serving acre night lesson solution""".split()
    for spelling in names.split("=")} | LETTERS
UNIT = re.compile(r"(.*?[\d}!)i]) ?(square |cubic |)([A-Za-z]{2,})(?: ?\^ ?\{?([23])\}?)?"
    r"(?:(?: ?/ ?| per )([A-Za-z]+))?")


def split_unit(text):
    """12 square inches -> ("12", "inch^2"); a unit ends the answer, and follows a number"""
    match = UNIT.fullmatch(text)
    if r"\degree" in text or not match:
        return text, "degree" if r"\degree" in text else ""
    value, power, *words = match.groups("")
    exponent = words.pop(1)
    exponent = {"square ": "^2", "cubic ": "^3"}.get(power, exponent and "^" + exponent)
    names = []
    for word in filter(None, words):
        word = word if word in UNITS else word.lower()
        stems = (word, word.removesuffix("s"), word.removesuffix("es"))
        names += [UNITS[stem] for stem in stems if stem in UNITS][:1] or [""]
    if "" in names or len(set(names)) < len(names) or power and match[4]:
        return text, ""
    return value, names[0] + "/".join([exponent, *names[1:]])


# --------------------------------------------------------------------------------------------------
# 3. Values. A formula is kept as what it is at 8 points, and where it is one, as an exact number.

Value = namedtuple("Value", "op at exact names ops")  # see `apply`
Group = namedtuple("Group", "op args names", defaults=[frozenset()])  # op: list, set, (), [),
# union, matrix, row; a relation; "and" or "or" between relations
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan ln log exp".split()
BASE = "the base of log"


def power(a, b):
    """a^b; of a negative number to p/q with an odd q the real one: (-8)^(1/3) is -2"""
    if a.imag == b.imag == 0 and a < 0:
        ratio = Fraction(float(b)).limit_denominator(10**4)
        if ratio.denominator % 2 and near(MP.mpf(ratio.numerator) / ratio.denominator, b):
            return (-a) ** b * (-1) ** ratio.numerator
    return a**b if a or b.real > 0 else MP.nan


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "^": power, "root": lambda x, index: power(x, 1 / index), "neg": operator.neg,
    "!": lambda x: MP.factorial(x) if x in range(35) else MP.nan, "%": lambda x: x / 100,
    r"\degree": lambda x: x * MP.pi / 180,
    **{name: getattr(MP, name.replace("arc", "a")) for name in FUNCTIONS}}


def apply(op, *values):
    """The Value of an operation: `at`, its numbers at the points (one if it has no names, else 8);
    `exact`, its Fraction if nothing is left to compute, else None; all its names and operations."""
    if not all(isinstance(value, Value) for value in values):
        raise ValueError("a collection or a relation where a number is needed")
    names = frozenset().union(*(value.names for value in values))
    count = 8 if names else 1
    cost = 1 if op in "+-*/" else 3 if op == "^" else 8
    WORK.steps = getattr(WORK, "steps", 0) + count * cost
    if WORK.steps > MAX_STEPS:
        raise ValueError("too much to compute")
    numbers = zip(*(value.at * (count // len(value.at)) for value in values))
    at = tuple(compute(op, *arguments) for arguments in numbers)
    ops = frozenset([op]).union(*(value.ops for value in values))
    return Value(op, at, find_exact(op, *values), names, ops)


def compute(op, *numbers):
    """A number of 150 digits, or nan where there is none.

    Numbers other than 0 stay between 10^-40 and 10^40. Two that differ then do so in their first
    100 digits, which are compared: cos(10^-40) is 1 - 5*10^-81.
    """
    try:
        value = OPERATIONS[op](*numbers)
    except (ValueError, ZeroDivisionError):
        return MP.nan
    size = abs(value)
    if size and not 1 < size * MAX_SIZE < MAX_SIZE**2:
        return MP.nan
    if abs(value.imag) <= NOISE * size:
        return value.real
    return MP.mpc(0, value.imag) if abs(value.real) <= NOISE * size else value


def find_exact(op, first, last=None):
    """Of a number, its negative, a percentage, degrees, a factorial, a fraction, a power, 3*10^4"""
    a, b = first.exact, last.exact if last else Fraction(1)
    if None in (a, b) or max(height(a), height(b)) > 10**MAX_DIGITS:
        return None
    if op in ("neg", "%", r"\degree"):
        return {"neg": -a, "%": a / 100, r"\degree": a}[op]
    if op == "!" and a in range(200):
        return Fraction(math.factorial(int(a)))
    if op == "/" and b:
        return a / b
    if op == "^" and a and first.ops <= {"number", "/"} and last.op == "number" and (
            b.denominator == 1 and abs(b) * math.log10(height(a)) <= MAX_DIGITS):
        return a ** int(b)
    ten = op == "*" and last.op == "^" and re.fullmatch("10+", str(height(b)))
    return a * b if ten and first.op == "number" else None


def height(fraction):
    return max(abs(fraction.numerator), fraction.denominator)


def number(fraction):
    """With over 40 digits it is exact only: to a formula such as \\pi it could come too near."""
    short = height(fraction) < MAX_SIZE
    at = MP.mpf(fraction.numerator) / fraction.denominator if short else MP.nan
    return Value("number", (at,), fraction, frozenset(), frozenset(["number"]))


def symbol(name):
    """A name has the same 8 numbers in every text; at the first 4 points they are positive. They
    have odd denominators, so that (-1)^(2n) is 1, see `power`."""
    rng, at = random.Random(name), []
    for i, below in enumerate((11, 13, 17, 19, 11, 13, 17, 19)):
        sign = -1 if i > 3 and name != BASE and rng.random() < 0.5 else 1
        at.append(sign * (rng.randint(0, i % 4) + MP.mpf(rng.randint(1, below - 1)) / below))
    return Value("symbol", tuple(at), None, frozenset([name]), frozenset(["symbol"]))


def negative(x):
    if x.op == "number":
        return number(-x.exact)
    return x._replace(at=(-x.at[0],)) if x.op == r"\infty" else apply("neg", x)


# --------------------------------------------------------------------------------------------------
# 4. Text -> values. Relations, commas and words such as `or` are operators too, which bind loosely.

NAMES = {name: "\\" + name for name in FUNCTIONS} | {"sqrt": r"\sqrt", "pi": r"\pi",
    "inf": r"\infty", "infinity": r"\infty", "percent": "%"}
STOP = set("an as at be by if is it no not odd of on one red six ten the to two was yes".split())
ALIASES = {r"\times": "*", r"\cdot": "*", r"\div": "/", "**": "^", r"\%": "%", r"\le": "<=",
    r"\leq": "<=", r"\lt": "<", r"\ge": ">=", r"\geq": ">=", r"\gt": ">", r"\ne": "!=",
    r"\neq": "!=", ";": ",", r"\varnothing": r"\emptyset"}
TOKEN = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?|(?!\\log)(?:\\[a-z]+|[A-Za-z])_"
    r"(?:\w|\{\w+\})|\\[A-Za-z]+|\\.|[A-Za-z]+|<=|>=|!=|\*\*|\S", re.A)  # 1.5, x_1, \pi, xy, <=
LETTER = re.compile(r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi"
    r"|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega)|[A-Za-z]")
RELATIONS = ("=", "!=", "<", "<=", ">", ">=", r"\in")
BINDING = {**dict.fromkeys(("", ")", "]", "}", r"\}", r"\endmatrix"), -9), r"\\": -2, "&": -1,
    ",": 0, "and": 0, "or": 0, **dict.fromkeys(RELATIONS, 1), r"\cup": 2, "+": 3, "-": 3, "*": 4,
    "/": 4, "^": 6, "!": 7, "%": 7, r"\degree": 7}  # 5: a sign before
CLOSING = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), r"\{": (r"\}",),
    r"\matrix": (r"\endmatrix",)}
CONSTANTS = {name: Value(name, (value,), None, frozenset(), frozenset([name])) for name, value in (
    (r"\pi", +MP.pi), ("e", +MP.e), ("i", MP.j), (r"\infty", MP.inf))} | {
    r"\emptyset": Group("set", ())}


def parse_math(text):
    """The text of an answer, as `normalize` returns it -> a Value, or a Group of them.

    A sign \\pm makes a list of all its values. Raises ValueError.
    """
    if is_words(text):
        raise ValueError("words")
    if not re.search(r"[(\[]|\\\{", text):  # in brackets a comma separates
        text = re.sub(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])",
            lambda match: match[0].replace(",", ""), text)
    tokens = []
    for token in TOKEN.findall(text):
        if len(token) == 1 or not token.isalpha() or token in ("and", "or"):
            tokens.append(ALIASES.get(token, token))
        elif token.lower() in NAMES:
            tokens.append(NAMES[token.lower()])
        elif len(token) > 3 or token.lower() in STOP:
            raise ValueError(f"the word {token!r}")
        else:
            tokens += token  # xy is x times y
    count, values = tokens.count(r"\pm"), []
    if len(tokens) > MAX_TOKENS or count > 2:
        raise ValueError(f"more than {MAX_TOKENS} tokens or 2 plus-minus signs")
    for choices in itertools.product("+-", repeat=count):
        signs = iter(choices)
        parser = Parser([next(signs) if token == r"\pm" else token for token in tokens])
        value = parser.parse(0)
        if parser.peek():
            raise ValueError(f"{parser.peek()!r} was not expected")
        values += value.args if count and value.op in ("list", "set") else [value]
    return Group("list", tuple(dict.fromkeys(values))) if count else value


class Parser:
    """Precedence climbing: `parse` reads what binds at least as tightly as it is told."""

    def __init__(self, tokens):
        self.tokens, self.at, self.depth = tokens, 0, 0

    def peek(self, ahead=0):
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ""

    def take(self, *expected):
        token = self.peek()
        if not token or expected and token not in expected:
            raise ValueError(f"{token!r} where {' or '.join(expected) or 'more'} was expected")
        self.at += 1
        return token

    def parse(self, binding):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        if self.peek() in ("+", "-"):  # it binds looser than a power: -2^2 is -4
            value = negative(self.parse(5)) if self.take() == "-" else self.parse(5)
        else:
            value = self.atom()
        factor = value  # the last one of a product
        while BINDING.get(self.peek(), 4) >= binding:
            if self.peek() not in BINDING:
                factor = self.next_factor(factor)
                value = apply("*", value, factor)
                continue
            before, sign = self.tokens[self.at - 1], self.take()
            level = BINDING[sign]
            if level > 5 and BINDING.get(value.op) == level and before != ")":
                raise ValueError(f"{sign} twice")  # x^2^3; 3!! is not (3!)!
            if level == 7:
                value = factor = apply(sign, value)
            elif level > 2:
                factor = self.parse(level + 1)
                value = apply(sign, value, factor)
                factor = value if sign == "^" else factor
            elif level == 1:
                parts, signs = [value, self.parse(2)], [sign]
                while self.peek() in RELATIONS:
                    signs.append(self.take())
                    parts.append(self.parse(2))
                value = relate(parts, signs)
            else:
                value = collect(sign, value, self.parse(level + 1))
        self.depth -= 1
        return value

    def next_factor(self, before):
        """A factor without a sign before it. What could be something else is refused."""
        token, token_before = self.peek(), self.tokens[self.at - 1]
        power_follows = before.op in ("^", "!", "symbol") and self.peek(1) in ("^", "!")  # 2^3 5^2
        factor = None if token[0].isdigit() and not power_follows else self.parse(5)
        if factor is None or token == "{" and factor.op == "number" or (
                token == r"\frac" and token_before[0].isdigit() and factor.exact is not None):
            raise ValueError("two numbers side by side")
        if token in ("(", "[") and token_before != ")" and before.op in ("symbol", "^") and (
                before.names & set("fghFGHP") or factor.op in ("number", "symbol", "^")):
            raise ValueError("a function of a number, or a product?")
        return factor

    def atom(self):
        token = self.take()
        if token[0] in ".0123456789":
            if len(token) > MAX_DIGITS or len(token.lower().partition("e")[2]) > 4:
                raise ValueError("a number too large")
            return number(Fraction(token))
        if token in CLOSING:
            return self.bracket(token)
        if token == r"\frac":
            return apply("/", self.argument(), self.argument())
        if token == r"\sqrt":
            index = self.atom() if self.peek() == "[" else number(Fraction(2))
            return apply("root", self.argument(), index)
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if token in CONSTANTS:
            return CONSTANTS[token]
        name = re.sub("[{}]", "", token)
        if not LETTER.fullmatch(name.partition("_")[0]):
            raise ValueError(f"{token!r} was not expected")
        return symbol(name)

    def argument(self):
        """What a TeX command takes: a group in braces, or one digit, letter or command."""
        if self.peek()[:1].isdigit() and len(self.peek()) > 1:
            self.tokens[self.at : self.at + 1] = [self.peek()[0], self.peek()[1:]]
        return self.atom()

    def bracket(self, opener):
        value = self.parse(-2 if opener == r"\matrix" else 0)
        brackets = opener + self.take(*CLOSING[opener])
        items = value.args if value.op == "list" else (value,)
        if brackets in ("(]", "[)") and len(items) != 2:
            raise ValueError("half an interval")
        if len(items) == 1 and brackets in ("()", "[]", "{}") or opener == r"\matrix":
            return value
        return Group("set" if brackets[-1] == "}" else brackets, items)

    def function(self, name):
        """\\sin^2 x, \\log_2 8, \\sin 2x; refused if its end is in doubt, as in \\sin x/2"""
        marks = {}
        while self.peek() in ("^", "_"):
            mark = self.take()
            marks[mark] = self.argument()
        bracketed = self.peek() in CLOSING
        value = self.atom() if bracketed else self.parse(5)
        while not bracketed and (LETTER.fullmatch(self.peek()) or self.peek() == r"\pi"):
            value = apply("*", value, self.parse(5))
        if not bracketed and (self.peek()[:1].isdigit() or self.peek() in ("/", *CLOSING)):
            raise ValueError(f"an argument of {name} that may end in two places")
        power = marks.get("^")
        if power and power.exact == -1 and "arc" + name in FUNCTIONS:
            name, power = "arc" + name, None
        value = apply(name, value)
        if name == "log":
            value = apply("/", value, apply("log", marks.get("_") or symbol(BASE)))
        return apply("^", value, power) if power else value


def collect(sign, left, right):
    """1, 2 and 3; sets with \\cup between; the rows and cells of a matrix; x < 1 or x > 2"""
    stated = any(x.op in (*RELATIONS[1:], "and", "or") for x in (left, right))
    op = {r"\cup": "union", "&": "row", r"\\": "matrix"}.get(sign, sign if stated else "list")
    items = (*left.args, right) if left.op == op else (left, right)
    if len(items) > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS} items")
    return Group(op, items)


def relate(parts, signs):
    """What a chain states: x = 1 + 1 = 2 is x = 2; 1 + 1 = 2 is 2; a < x < b is two relations"""
    first, last = parts[0], parts[-1]
    if set(signs) == {"="}:
        states = isinstance(first, Group) or first.names or len(parts) == 2 and last.names
        for part in parts[1:-1] if states else parts[:-1]:
            if Group in (type(part), type(last)) or not equal_values(part, last):
                raise ValueError("an equation that does not hold")
        return Group("=", (first, last)) if states else last
    if not set(signs) <= {"<", "<=", ">", ">="} and (
            len(signs) > 1 or signs == [r"\in"] and isinstance(last, Value)):
        raise ValueError("a chain of several kinds of relation, or x in what is no set")
    relations = []
    for sign, left, right in zip(signs, parts, parts[1:]):  # b > a is a < b
        sides = (right, left) if ">" in sign else (left, right)
        relations.append(Group(sign.replace(">", "<"), sides))
    return Group("and", tuple(relations)) if len(relations) > 1 else relations[0]


# --------------------------------------------------------------------------------------------------
# 5. Comparing


def compare(answer, gold, gold_unit=""):
    """-> (whether two values, groups or relations are equal, what decided)"""
    WORK.steps = getattr(WORK, "steps", 0) + 1
    (name, value), (gold_name, gold_value) = unname(answer), unname(gold)
    if answer.op in RELATIONS and gold.op in RELATIONS:
        if name and name == gold_name and compare(value, gold_value)[0]:
            return True, f"the values of {name}"
        return same_relation(answer, gold), "relations, up to a constant factor"
    if value.op in RELATIONS or gold_value.op in RELATIONS or type(value) is not type(gold_value):
        return False, "a value against several, or against a relation"
    if isinstance(value, Group):
        return same_items(value, gold_value), "item by item"
    if value.op == "%" and gold_value.op == "number" and gold_value.exact > 1 and not gold_unit:
        return value.exact in (gold_value.exact, gold_value.exact / 100), "a percentage"
    new = (value.ops - gold_value.ops) & {*FUNCTIONS, "root", "!"}
    if value.exact is None and (gold_value.exact is not None or new and not gold_value.names):
        return False, "an answer that still has to be computed"  # 3+4 for 7, \arctan 1 for pi/4
    return equal_values(value, gold_value), "values" if value.exact is None else "exact numbers"


def equal_values(answer, gold):
    if r"\infty" in (answer.op, gold.op):
        return answer.at == gold.at
    if answer.exact is not None and gold.exact is not None:
        return answer.exact == gold.exact
    pairs = pairs_of(answer, gold)
    return bool(pairs) and all(near(a, b) for a, b in pairs)


def pairs_of(answer, gold):
    """-> [(answer's, gold's number)] at points where the gold has one, if possible a real one"""
    count = max(len(answer.at), len(gold.at))
    numbers = zip(*(x.at * (count // len(x.at)) for x in (answer, gold)))
    pairs = [(a, b) for a, b in numbers if MP.isfinite(b)]
    real = [(a, b) for a, b in pairs if not b.imag]
    pairs = real if len(real) > 2 else pairs
    return pairs if len(pairs) > 2 or count == 1 else []


def near(a, b):
    return abs(a - b) <= NOISE * max(abs(a), abs(b))


def unname(x):
    """x = 5 -> ("x", 5);  x \\in S -> ("x", S);  (x, y) = (1, 2) -> ("x, y", (1, 2))"""
    if x.op not in ("=", r"\in"):
        return "", x
    left, right = x.args
    if right.op == "symbol" and not left.names:  # 5 = x
        left, right = right, left
    names = ["".join(item.names) if item.op == "symbol" else "" for item in (
        left.args if left.op == "()" else (left,))]
    if not all(names) or names != sorted(names) or right.names & set(names):
        return "", x
    return ", ".join(names), right


def same_items(answer, gold):
    loose = {answer.op, gold.op} <= {"list", "set"}
    if answer.op != gold.op and not loose or len(answer.args) != len(gold.args):
        return False
    names, gold_names = ({unname(x)[0].partition("_")[0] for x in y.args} for y in (answer, gold))
    if names != gold_names and len(names | gold_names) > 2:  # x = 1, y = 2 are not any 1 and 2
        return False
    left = list(gold.args)
    for item in answer.args:
        candidates = left if loose or gold.op in ("union", "and", "or") else left[:1]
        match = next((i for i, x in enumerate(candidates) if compare(item, x)[0]), None)
        if match is None:
            return False
        left.pop(match)
    return True


def same_relation(answer, gold):
    """2y = 4x + 2 is y = 2x + 1: the differences of the sides have one ratio at all points."""
    names = [left.names | right.names for left, right in (answer.args, gold.args)]
    if answer.op != gold.op or gold.op == r"\in" or names[0] != names[1]:
        return False
    solved = {x.op for x in gold.args} == {"symbol", "number"}
    if solved and any(x.ops & {"+", "-"} or not x.names and x.exact is None for x in answer.args):
        return False  # x + 2 = 7 is not x = 5, but the question
    pairs = pairs_of(apply("-", *answer.args), apply("-", *gold.args))
    pairs = [(x, y) for x, y in pairs if x or y]
    if len(pairs) < 3 or not all(x and y for x, y in pairs):
        return False
    ratios = [x / y for x, y in pairs]
    positive = not ratios[0].imag and ratios[0] > 0
    return all(near(ratio, ratios[0]) for ratio in ratios) and (gold.op in ("=", "!=") or positive)


# --------------------------------------------------------------------------------------------------
# 6. Many pairs, with a deadline, and the command line


class Worker:
    """A Python of its own that verifies pairs, a JSON line each; killed if late, then replaced."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def start(self):
        self.process = subprocess.Popen([sys.executable, __file__, "--worker"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)  # no Ctrl-C
        self.process.stdout.readline()  # it has imported all: from here on time counts

    def ask(self, pair, timeout):
        for _ in range(2):  # again, if it had died of something else
            if self.process is None:
                self.start()
            timer = threading.Timer(timeout, self.process.kill)
            timer.start()
            started = time.monotonic()
            try:
                print(json.dumps(pair), file=self.process.stdin, flush=True)
                reply = self.process.stdout.readline()
            except OSError:  # its end of the pipe is closed
                reply = ""
            timer.cancel()
            late = time.monotonic() - started >= timeout
            if reply and not late:
                return reply == "true\n"
            self.process.kill()
            self.process.wait()
            self.process = None
            if late:
                return False
        raise RuntimeError("verify.py's worker process does not run: try python verify.py 4 4")


WORKER = Worker()


def verify_batch(responses, golds, timeout=2.0):
    """[verify(response, gold), ...], and False where that takes over `timeout` seconds a pair.

    Any thread may call it. The one worker process serves them in turn, and ends with this process.
    """
    assert len(responses) == len(golds), f"{len(responses)} responses, {len(golds)} golds"
    with WORKER.lock:
        return [all(isinstance(text, str) for text in pair) and WORKER.ask(pair, timeout)
            for pair in zip(responses, golds)]


def show(x):
    """What parse_math returned, for people."""
    if isinstance(x, Group):
        items = [show(item) for item in x.args]
        if x.op in RELATIONS:
            return f" {x.op} ".join(items)
        inside = ", ".join(items) or "nothing"
        return x.op[0] + inside + x.op[1] if x.op[0] in "([" else f"{x.op}: {inside}"
    names = ", ".join(sorted(x.names))
    if x.exact is not None or x.op == "symbol":
        return names or str(x.exact)
    return f"a formula in {names}" if names else MP.nstr(x.at[0], 12)


def main():
    if sys.argv[1:] == ["--worker"]:
        print("ready", flush=True)
        for line in sys.stdin:
            print(json.dumps(verify(*json.loads(line))), flush=True)
        return
    if len(sys.argv) != 3:
        print("usage: python verify.py RESPONSE GOLD", file=sys.stderr)
        raise SystemExit(2)
    answer, where = find_answer(sys.argv[1])
    equal, why = judge(*sys.argv[1:])
    print(f"answer      {answer or 'none'}   ({where})")
    for line, text in ("", answer), (f"gold        {sys.argv[2]}\n", sys.argv[2]):
        try:
            value, unit = split_unit(normalize(text or ""))
            print(f"{line}  read as   {show(parse_math(value))} {unit}".rstrip())
        except Exception as error:  # as in `judge`
            print(f"{line}  read as   no mathematics: {error}")
    print(f"{'EQUAL' if equal else 'NOT EQUAL':11s} by: {why}")
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
