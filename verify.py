"""verify.py: is the answer in this response equal to the gold answer?

    python verify.py 'So it is \\boxed{\\frac{2}{4}}.' 0.5    # says why; exit status 0: equal

Find the answer's text (`extract_answer`), read it (`parse_math`), compare it with the gold
(`compare`). In doubt the verdict is False: what is rewarded gets learned, wrong answers too.

What is equal. A number is exact: 0.333 is not 1/3. 20\\% is 1/5, and also 20 where the gold is a
bare number above 1. A unit may be left out, not exchanged. x = 5 answers 5, but not y = 5. Lists
and sets match in any order, tuples in theirs. An open interval is not a closed one. Equations and
inequalities may differ by a constant factor. Formulas are equal if they agree to 120 digits at
points, random numbers for each letter, where the gold has one. \\log without a base is not \\ln.

An answer is a value, not the question again. Where the gold is a number such as 7 or 3/4, the
answers 3+4, \\sqrt{49} and 8!/4! are False: they may be copied from the question. A fraction, a
decimal, one power, 4!, 3*10^4, 5\\%, degrees, 2\\frac{1}{3} and a chain of equalities that ends in
one of them are values. Where the gold is a formula, such as 2\\sqrt{3}, a copy cannot be told.

Not read, so equal to the same text only: \\pm, \\approx, sums, integrals, floors, absolute values,
binomials, inverse and hyperbolic functions, n! of a letter, f(0), f(x) = 2x, 0.\\overline{3}, 52_8,
(-8)^{1/3} as -2, \\over, \\hspace, \\mathbb{R}, {x | x > 3}, set algebra other than unions of
intervals, x < 5 as an interval, "x = 1, y = 2" as a tuple, a factor before a matrix, "Area = 5",
(B) 42, 2 1/3, numbers from 10^40 on. Units are not converted; those that are known stand in UNITS.
Rewrite such golds, or drop them.

The text is written by a model that is rewarded for fooling this file. So nothing in it is executed
(sympy's parsers run Python). A formula is kept as its values at 20 points, of 150 digits each: it
cannot grow, and no text makes `verify` raise or take 0.1 s. `verify_batch` has a deadline as well.
"""

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

import mpmath

MAX_RESPONSE, MAX_TAIL = 1_000_000, 20_000  # characters: of a response; of its end, that is read
MAX_ANSWER = 2_000  # characters
MAX_TOKENS, MAX_COSTLY, MAX_ITEMS = 300, 16, 30  # of an answer; costly: powers, roots, functions
MAX_DIGITS, MAX_SIZE = 50, 10**40  # of a number written out; of any number in a formula
MP = mpmath.MPContext()  # our own, so that its precision is never changed from elsewhere
MP.dps = 150
NOISE = MP.mpf(10) ** -120  # numbers are equal if they differ by less, relatively; see `compute`


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
    """The same text, words, or mathematics; both texts as `normalize` returns them."""
    squeezed = [re.sub(r"(?<!\w) | (?!\w)", "", x) for x in (text, gold)]  # "1 2" is not "12"
    if squeezed[0] == squeezed[1]:
        return text != "", "the same text"
    if WORDS.fullmatch(gold):
        return text.lower() == gold.lower() and not gold.isupper(), "the same words"
    (text, unit), (gold_text, gold_unit) = split_unit(text), split_unit(gold)
    answer, gold = parse_math(text), parse_math(gold_text)
    if unit and gold_unit and unit != gold_unit:
        return False, f"{unit} is not {gold_unit}"
    if unit and unname(answer)[1].names or gold_unit and unname(gold)[1].names:
        return False, "a unit behind a formula: in 2x^3 ml it may be m times l"
    if "degree" in (unit, gold_unit) and unit != gold_unit and not answer.plain:
        return False, "degrees of what is no number"  # pi/2 degrees are not pi/2
    percent = text.endswith(" %") and answer.plain
    bare = gold.plain and gold.op == "constant" and gold.at[0] > 1 and not gold_unit
    if percent and bare and compare(parse_math(text[:-2]), gold)[0]:
        return True, "a percentage"
    words, gold_words = (set(x.replace(r"\ln", r"\log").split()) for x in (text, gold_text))
    if not gold.names and (FUNCTIONS | {r"\sqrt"}) & (words - gold_words):
        return False, "a function that still has to be computed"  # \sin 60 for \sqrt{3} / 2
    return compare(answer, gold)


# A choice, B, or words. Two small letters are a product, as xy is, except for "no" and "on".
WORDS = re.compile("(?=.*[A-Za-z]{3}|.*[A-Za-z]{2}.* [A-Za-z]{2})[A-Za-z '-]+|[A-Z]{1,2}|no|on")


# --------------------------------------------------------------------------------------------------
# 1. Where the answer stands. Linear scans only: a lazy regex, <a>(.*?)</a>, is quadratic

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
    may_be_word = position < 0
    for match in list(PHRASE.finditer(text))[:-3:-1]:  # "the answer is correct" names none
        words = re.split(r"\n|</answer>|\.\s", text[match.end() :], maxsplit=1)[0]
        if match.start() > position and is_answer(words, may_be_word):
            position, answer, where = match.start(), words, f"the last {match[0].strip(' *')!r}"
    if position < 0 and is_answer(text, may_be_word):
        position, answer, where = 0, text, "a response that is nothing else"
    if position < 0:
        return None, "no answer that is marked"
    return (answer or "").strip() or None, where


def find_box(text):
    """-> (position, content) of the last outermost box; content None if it is never closed."""
    last, opened, boxes = (-1, None), [], []
    for match in BOX.finditer(text):
        if match["bare"]:  # \boxed 5
            last = last if boxes else (match.start(), match["bare"])
        elif match[0] == "{" or len(match[0]) > 2:  # a brace, or \\boxed{
            opened.append(match)
            boxes += [match] * (match[0] != "{")
        elif match[0] == "}" and opened and (start := opened.pop())[0] != "{":
            boxes.pop()
            last = last if boxes else (start.start(), text[start.end() : match.start()])
    return (boxes[0].start(), None) if boxes else last


def is_answer(text, may_be_word):
    """Whether this text, which stands in no box, is an answer and not prose."""
    try:
        normal = normalize(text)
        if "\n" in text.strip() or not may_be_word and re.fullmatch("[a-z]", normal):
            return False
        if not (may_be_word and re.fullmatch("[A-Za-z]+", normal)):
            parse_math(split_unit(normal)[0])
        return True
    except Exception:  # as in `judge`
        return False


# --------------------------------------------------------------------------------------------------
# 2. One spelling: tokens with a space between them. Of the many ways to write one, one is left.

UNICODE = str.maketrans({"−": "-", "–": "-", "×": " * ", "·": " * ", "÷": "/", "≤": " <= ",
    "≥": " >= ", "≠": " != ", "π": r"\pi ", "θ": r"\theta ", "√": r"\sqrt ",
    "∞": r"\infty ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ",
    "°": r"\degree ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "\u200b": "", "\xa0": " "})
FUNCTIONS = set(r"\sin \cos \tan \cot \sec \csc \ln \log \exp".split())
NAMES = {name[1:]: name for name in {*FUNCTIONS, r"\sqrt", r"\pi", r"\degree"}} | {
    "inf": r"\infty", "infinity": r"\infty", "percent": "%", "degrees": r"\degree"}
ALIASES = NAMES | {r"\times": "*", r"\cdot": "*", r"\div": "/", "**": "^", r"\%": "%",
    r"\le": "<=", r"\leq": "<=", r"\lt": "<", r"\ge": ">=", r"\geq": ">=", r"\gt": ">",
    r"\ne": "!=", r"\neq": "!=", r"\varnothing": r"\emptyset", r"\dfrac": r"\frac",
    r"\tfrac": r"\frac", "mph": "miles per hour", **dict.fromkeys(r"""\left \right \displaystyle
    \quad \qquad \boxed \fbox \( \) \[ \] \, \; \: \! $ ~ `""".split(), ""), "\\ ": ""}
TOKEN = re.compile(r"""
    [1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?(?![\d,])  # 1,234.5
    | \d*\.\d+e-?\d+ | \d*\.?\d+(?:E-?\d+)?  # 3.2e-4, 12; but 2e-1 is 2 times e minus 1
    | (?!\\log)(?:\\[a-z]+|[A-Za-z])_(?:\w|\{\w+\})  # x_1
    | \\[A-Za-z]+ | \\. | [A-Za-z]+ | <= | >= | != | \*\* | \S""", re.A | re.X)
SPELLINGS = [(re.compile(pattern, re.A), new) for pattern, new in [
    (r"(\\(?:text|mbox|mathrm)\s*\{\s*)([mgshL])\b", r"\1\\\2 "),  # an upright m is a unit, \m
    (r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt)?|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,!;: ]) ?(?=\d{3}(?!\d))", ""),  # 1{,}234, 1\,234
    (r"(^|[-+=(,\[{])\s*(\d+\.?\d*)\s*(?:\\times|\\cdot|[*xX])\s*10\s*\^\s*(?:\{\s*(-?\d+)\s*\}"
        r"|(-?\d+))(?!\s*[\d^!.])", r"\1\2E\3\4"),  # 3.2 x 10^{-4}, which is a value
    (r"(?<=\d) million\b", "E6"), (r"\^\s*\{?\s*\\circ\s*\}?", r"\\degree "),
    (r"\\begin\s*\{(?:[pb]?matrix\}|array\}\s*\{[clr|]*\})", r"\\matrix "),
    (r"(?:\\\\)?\s*\\end\s*\{(?:[pb]?matrix|array)\}", r"\\endmatrix "),
    (r"\(\s*(\w+)\s*\)\s*_", r"\1_"), (r"(?<=[\dA-F])\s*_\{(\d+)\}", r"_\1"),  # 52_8
    (r"(?<=[\])])\s*U\s*(?=[\[(])", r"\\cup "), (r"\\\{\s*\\\}", r"\\emptyset "),
    (r"\bsq(?:uare|\.)? ([a-z]+)", r"\1^2"), (r"\bcubic ([a-z]+)", r"\1^3"),
    (r",\s*(?=and\b|or\b)", " ")]]


def normalize(text):
    """The text of an answer -> its tokens, with a space between them."""
    if len(text) > MAX_ANSWER:
        raise ValueError(f"longer than {MAX_ANSWER} characters")
    text = re.sub(r"^\s*\*\*(.*)\*\*\s*$", r"\1", text.translate(UNICODE)).strip()  # **42**
    if re.fullmatch(r"([^$]*=)?\s*-?\s*\$[^$]*", text):  # one dollar is money, two are math mode
        text = text.replace("\\$", "$").replace("$", "\\$")
    for pattern, new in SPELLINGS:
        text = pattern.sub(new, text)
    if re.search(r"[(\[]|\\\{", text):  # in brackets a comma separates
        text = text.replace(",", ", ")
    text = " ".join(ALIASES.get(x, x) for x in TOKEN.findall(text))
    text = re.sub(" [.,:]$", "", re.sub(" +", " ", text).strip())
    text = re.sub(r"^(.*= )?(- )?\\\$ (.*\d)$", r"\1\2\3 dollars", text.removeprefix("= "))
    return re.sub(r"^(?:[Oo]ption )?(?:\( )?([A-Z])(?: [):])?$", r"\1", text)  # a choice: (B)


UNITS = {spelling: names.split("=")[0] for names in r"""
    meter=metre=\m cm=centimeter=centimetre mm=millimeter=millimetre km=kilometer=kilometre inch=in
    foot=feet=ft yard=yd mile=mi gram=\g kg=kilogram mg=milligram pound=lb ounce=oz ton second=\s=s
    minute=min hour=hr=\h=h day week month year=yr liter=litre=\L ml=milliliter gallon=gal cent
    dollar=usd radian=rad unit person=people child=children=kid boy girl man=men woman=women student
    friend customer player animal dog cat fish bird chicken egg apple orange tree flower plant
    cookie cake pizza meal candy=candie cup bottle bag box basket book page card ticket sticker pen
    pencil word marble ball toy coin point step trip lap car truck bike room chair shirt song piece
    slice item block time vote question problem lesson solution
    """.split() for spelling in names.split("=")}
UNITS |= {name + ending: unit for name, unit in UNITS.items() for ending in ("s", "es")}
UNIT = re.compile(r"(.*[\d}!)i]) ([A-Za-z]{2,}|\\[mgshL])(?: \^ (?:\{ )?([23])(?: \})?)?"
    r"(?: (?:/|per) (\\?\w+))?")  # value, unit, exponent, unit below: 5 m/s, 12 inches^2


def split_unit(text):
    """12 inches ^ 2 -> ("12", "inch^2"); a unit ends the answer, and follows a number"""
    if r"\degree" in text:  # 30 degrees are 30, but in a sine pi / 6
        in_function = FUNCTIONS & set(text.split())
        return text if in_function else text.replace(r" \degree", ""), "degree"
    match = UNIT.fullmatch(text)
    if not match:
        return text, ""
    value, word, exponent, below = match.groups("")
    units = [UNITS.get(name, UNITS.get(name.lower())) for name in (word, below) if name]
    if None in units or len(set(units)) < len(units):
        return text, ""
    units[0] += "^" + exponent if exponent else ""
    return value, "/".join(units)


# --------------------------------------------------------------------------------------------------
# 3. Values. A formula is kept as what it is at 20 points, and whether anything is left to compute

Value = namedtuple("Value", "op at plain names")  # op: the last operation, "constant", "symbol"
POINTS, NO_NAMES = 20, frozenset()
Group = namedtuple("Group", "op args names plain", defaults=[NO_NAMES, False])  # op: list, set,
# union, matrix, row; brackets as written, () or [); a relation; "and" or "or" between relations
RELATIONS = ("=", "!=", "<", "<=", ">", ">=", r"\in")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "^": lambda a, b: a**b if a or b.real > 0 else MP.nan, "root": lambda a, n: a ** (1 / n),
    "%": lambda a: a / 100, r"\degree": lambda a: a * MP.pi / 180,
    "!": lambda a: MP.factorial(a) if a in range(35) else MP.nan,
    **{name: getattr(MP, name[1:]) for name in FUNCTIONS}}
PARTS = {"neg": {"constant", "E", "mixed", "/", "^", "!", "%"}, "/": {"constant", "neg", "^"},
    "^": {"constant", "neg", "/"}, "%": {"constant", "neg", "/"}, "!": {"constant"}}


def apply(op, *values):
    """The Value of an operation: its numbers at the points, if it is plain, the names in it."""
    if not all(isinstance(value, Value) for value in values):
        raise ValueError("a collection or a relation where a number is needed")
    at = tuple(compute(op, *numbers) for numbers in zip(*(value.at for value in values)))
    names = frozenset().union(*(value.names for value in values))
    return Value(op, at, is_plain(op, values), names)


def is_plain(op, values):
    """Whether nothing is left to compute, as in -3, 3/4, 5%, 4! and (3/4)^2, but not in a sum, a
    product, 4!/3!, 2^3/2^2 or 2^(1/2). PARTS says what each operation may be applied to."""
    if op not in PARTS or not all(value.plain for value in values):
        return False
    numbers = [value.at[0] for value in values]
    whole = [value.op == "/" and MP.isint(value.at[0]) for value in values]  # 6/2
    for value, is_whole in zip(values, whole):
        if value.op not in PARTS[op] and not (is_whole and op == "/"):
            return False
    if op == "^":
        return MP.isint(numbers[1]) and not whole[0]
    if op == "/" and "^" in [value.op for value in values]:  # 3/2^10, but not 24/2^3
        return all(map(MP.isint, numbers)) and math.gcd(*map(int, numbers)) == 1
    return True


def compute(op, *numbers):
    """A number of 150 digits, or nan where there is none.

    Numbers other than 0 stay between 10^-40 and 10^40. Two that differ then do so in their first
    120 digits, which are compared: cos(10^-40) is 1 - 5*10^-81.
    """
    if op == "neg":  # also of infinity, which is no result of other operations
        return -numbers[0]
    try:
        value = OPERATIONS[op](*numbers)
    except (ValueError, ZeroDivisionError):
        return MP.nan
    return value if not value or 1 < abs(value) * MAX_SIZE < MAX_SIZE**2 else MP.nan


def constant(number, plain=False):
    return Value("constant", (MP.convert(number),) * POINTS, plain, NO_NAMES)


def symbol(name):
    """A name has the same numbers in every text. The first 4 are positive. Of the others half are
    negative and half are above 5, at points that differ from name to name: there \\sqrt{x^2 y^2} is
    not xy, and \\sqrt{(x - 4)^2} is not 4 - x."""
    rng, code, at = random.Random(name), sum(name.encode()) % 14 + 1, []
    for i in range(POINTS):
        sign = -1 if i > 3 and odd_bits((i - 4) & code) else 1
        low, high = (5, 30) if odd_bits(i) else (0.1, 3)
        at.append(sign * MP.mpf(round(1009 * rng.uniform(low, high))) / 1009)
    return Value("symbol", tuple(at), False, frozenset([name]))


def odd_bits(number):
    return bin(number).count("1") % 2 == 1


CONSTANTS = {r"\pi": constant(+MP.pi), "e": constant(+MP.e), "i": constant(MP.j),
    r"\infty": constant(MP.inf), r"\emptyset": Group("set", ())}


# --------------------------------------------------------------------------------------------------
# 4. Text -> values. Relations, commas and words such as `or` are operators too, which bind loosely.

LETTER = re.compile(r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi"
    r"|omega|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega)|[A-Za-z]")
STOP = set("""am an as at be by if is it no not odd of on one pm red six ten the to two was
    yes""".split())  # words, though short
# How tightly a sign binds. PRODUCT: also without a sign, xy; SIGN: the minus of -x; AFTER: 5%, 4!
END, ROW, CELL, WORD, LIST, RELATION, UNION, SUM, PRODUCT, SIGN, POWER, AFTER = range(12)
BINDING = {**dict.fromkeys(("", ")", "]", "}", r"\}", r"\endmatrix"), END), r"\\": ROW, "&": CELL,
    "and": WORD, "or": WORD, ",": LIST, **dict.fromkeys(RELATIONS, RELATION), r"\cup": UNION,
    "+": SUM, "-": SUM, "*": PRODUCT, "/": PRODUCT, "^": POWER, "!": AFTER, "%": AFTER,
    r"\degree": AFTER}
CLOSING = {"(": ") ]", "[": "] )", "{": "}", r"\{": r"\}", r"\matrix": r"\endmatrix"}


def parse_math(text):
    """The text of an answer, as `normalize` returns it -> a Value or a Group. Raises ValueError."""
    if WORDS.fullmatch(text):
        raise ValueError("words")
    tokens = []
    for token in text.split():
        if len(token) == 1 or not token.isalpha() or token in ("and", "or"):
            tokens.append(token)
        elif len(token) > 3 or token.lower() in STOP:
            raise ValueError(f"the word {token!r}")
        else:
            tokens += token  # xy is x times y
    costly = sum(token in {"^", r"\sqrt", *FUNCTIONS} for token in tokens)
    if len(tokens) > MAX_TOKENS or costly > MAX_COSTLY:
        raise ValueError(f"over {MAX_TOKENS} tokens, or over {MAX_COSTLY} powers and functions")
    parser = Parser(tokens)
    value = parser.parse(WORD)
    parser.take("")
    return value


class Parser:
    """Precedence climbing: `parse` reads what binds at least as tightly as it is told."""

    def __init__(self, tokens):
        self.tokens = ["", *reversed(tokens)]  # the next one is the last

    def peek(self):
        return self.tokens[-1]

    def take(self, *expected):
        token = self.peek()
        if token not in expected and (expected or token == ""):
            raise ValueError(f"{token or 'the end'!r} was not expected")
        self.last = self.tokens.pop()
        return self.last

    def parse(self, binding):
        if self.peek() in ("+", "-"):  # it binds looser than a power: -2^2 is -4
            value = apply("neg", self.parse(SIGN)) if self.take() == "-" else self.parse(SIGN)
        else:
            value = self.atom()
        factor = value  # the last one of a product
        while (level := BINDING.get(self.peek(), PRODUCT)) >= binding:
            if self.peek() not in BINDING:
                value, factor = self.product(value, factor)
                continue
            sign = self.take()
            if level == AFTER:
                value = factor = apply(sign, value)
            elif level in (SUM, PRODUCT, POWER):
                factor = self.parse(level + 1)
                value = apply(sign, value, factor)
                factor = value if sign == "^" else factor
            elif level == RELATION:
                parts, signs = [value, self.parse(UNION)], [sign]
                while self.peek() in RELATIONS:
                    signs.append(self.take())
                    parts.append(self.parse(UNION))
                value = relate(parts, signs)
            else:
                value = collect(sign, value, self.parse(level + 1))
            if level >= POWER and self.peek() == sign:
                raise ValueError(f"{sign} twice")  # x^2^3; 3!! is not (3!)!
        return value

    def product(self, value, before):
        """A factor without a sign before it -> (value, factor); refused if it may be none."""
        token, last, factor = self.peek(), self.last, self.parse(SIGN)
        whole = value.plain and value.op in ("constant", "neg") and MP.isint(value.at[0])
        fraction = token == r"\frac" and factor.plain and factor.op == "/"
        if fraction and whole and 0 < factor.at[0] < 1:
            mixed = constant(abs(value.at[0]) + factor.at[0], plain=True)._replace(op="mixed")
            return (apply("neg", mixed) if value.at[0] < 0 else mixed), mixed  # 2\frac13
        power = factor.op == "^" and not before.plain  # n 2^{n-1}, but not 3 2^5
        braced = token == "{" or token == r"\frac" and before.plain
        if token[0].isdigit() and not power or braced and factor.plain:
            raise ValueError("two numbers side by side")
        called = token in ("(", "[") and last != ")" and before.op in ("symbol", "^")
        if called and (before.names & set("fghFGHP") or factor.op in ("constant", "symbol", "^")):
            raise ValueError("a function, or a product?")  # f(x+1), a(2); x(x+1) is a product
        return apply("*", value, factor), factor

    def atom(self):
        token = self.take()
        if token[0] in ".0123456789":
            return self.number(token)
        if token in CLOSING:
            return self.bracket(token)
        if token == r"\frac":
            return apply("/", self.argument(), self.argument())
        if token == r"\sqrt":
            index = self.atom() if self.peek() == "[" else constant(2)
            return apply("root", self.argument(), index)
        if token in FUNCTIONS:
            return self.function(token)
        if token in CONSTANTS:
            return CONSTANTS[token]
        name = re.sub("[{}]", "", token)
        if not LETTER.fullmatch(name.partition("_")[0]):
            raise ValueError(f"{token!r} was not expected")
        return symbol(name)

    def number(self, token):
        number = constant(token.replace(",", ""), plain=True)
        if len(token) > MAX_DIGITS or MP.isnan(compute("+", number.at[0], 0)) or self.peek() == "_":
            raise ValueError("a number too large or too small, or in another base")
        return number._replace(op="E") if "e" in token.lower() else number

    def argument(self):
        """What a TeX command takes: a group in braces, or one digit, letter or command."""
        if self.peek()[:1].isdigit():
            self.tokens += reversed(self.tokens.pop())
        return self.atom()

    def bracket(self, opener):
        value = self.parse(ROW if opener == r"\matrix" else LIST)
        brackets = opener + self.take(*CLOSING[opener].split())
        items = value.args if value.op == "list" else (value,)
        if brackets in ("(]", "[)") and len(items) != 2:
            raise ValueError("half an interval")
        if len(items) == 1 and brackets in ("()", "[]", "{}") or opener == r"\matrix":
            return value
        return Group("set" if brackets[-1] == "}" else brackets, items)

    def function(self, name):
        """\\sin^2 x, \\log_2 8, \\sin 2x; refused if its end is in doubt, as in \\sin x/2"""
        marks = {}
        while self.peek() == "^" or self.peek() == "_" and name == r"\log":
            mark = self.take()
            marks[mark] = self.argument()
        bracketed = self.peek() in CLOSING
        value = self.atom() if bracketed else self.parse(SIGN)
        while not bracketed and (LETTER.fullmatch(self.peek()) or self.peek() == r"\pi"):
            value = apply("*", value, self.parse(SIGN))
        ends = self.peek() in BINDING and self.peek() != "/" or self.peek() in FUNCTIONS
        if not bracketed and not ends:
            raise ValueError(f"an argument of {name} that may end in two places")
        power = marks.get("^")
        if power and not (power.plain and power.at[0] > 0):
            raise ValueError("an inverse function, or a power?")  # \\sin^{-1} x
        value = apply(name, value)
        if name == r"\log":
            value = apply("/", value, apply(name, marks.get("_") or symbol("the base of log")))
        return apply("^", value, power) if power else value


def collect(sign, left, right):
    """1, 2 and 3; sets with \\cup between; the rows and cells of a matrix; x < 1 or x > 2"""
    stated = any(x.op in (*RELATIONS[1:], "and", "or") for x in (left, right))
    stated = {",": "and"}.get(sign, sign) if stated else "list"
    op = {r"\cup": "union", "&": "row", r"\\": "matrix"}.get(sign, stated)
    items = (left.args if left.op == op else (left,)) + (
        right.args if right.op == op == "list" else (right,))
    if len(items) > MAX_ITEMS:
        raise ValueError(f"more than {MAX_ITEMS} items")
    return Group(op, items)


def relate(parts, signs):
    """What a chain states: x = 1 + 1 = 2 is x = 2; 1 + 1 = 2 is 2; a < x < b is two relations"""
    first, last = parts[0], parts[-1]
    if first == last:
        raise ValueError("a relation that says nothing")  # 0 = 0
    if set(signs) == {"="}:
        states = isinstance(first, Group) or first.names or len(parts) == 2 and last.names
        for part in parts[1:-1] if states else parts[:-1]:
            if Group in (type(part), type(last)) or find_ratio(part, last) != 1:
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


def compare(answer, gold):
    """-> (whether two values, groups or relations are equal, what decided)"""
    (name, value), (gold_name, gold_value) = unname(answer), unname(gold)
    if answer.op in RELATIONS and gold.op in RELATIONS:
        if name and name == gold_name and compare(value, gold_value)[0]:
            return True, f"the values of {name}"
        return same_relation(answer, gold), "relations, up to a constant factor"
    if value.op in RELATIONS or gold_value.op in RELATIONS or type(value) is not type(gold_value):
        return False, "a value against several, or against a relation"
    if isinstance(value, Group):
        return same_items(value, gold_value), "item by item"
    if gold_value.plain and not value.plain:
        return False, "an answer that still has to be computed"  # 3+4 for 7
    return find_ratio(value, gold_value) == 1, "numbers" if gold_value.plain else "formulas"


def find_ratio(answer, gold):
    """answer / gold if it is one number at all points where the gold is real, or else a number."""
    known = [(a, b) for a, b in zip(answer.at, gold.at) if b == b]  # not nan, which is not itself
    real = [(a, b) for a, b in known if not b.imag]
    numbers = real if len(real) > 2 else known
    ratios = [1 if a == b else a / b if b else MP.nan for a, b in numbers]
    for ratio in (1, *ratios[:1]):
        if len(ratios) > 2 and all(abs(x - ratio) <= NOISE * abs(ratio) for x in ratios):
            return ratio
    return None


def unname(x):
    """x = 5 -> ("x", 5);  x \\in S -> ("x", S);  (x, y) = (1, 2) -> ("x, y", (1, 2))"""
    if x.op in ("=", r"\in"):
        for left, right in (x.args, x.args[::-1]):  # 5 = x
            items = left.args if left.op == "()" else (left,)
            names = ["".join(item.names) for item in items if item.op == "symbol"]
            fits = left.op != "()" or right.op == "()" and len(right.args) == len(items)
            if names == sorted({*names}) and not right.names & set(names) and fits and (
                    len(names) == len(items)):
                return ", ".join(names), right
    return "", x


def same_items(answer, gold):
    loose = {answer.op, gold.op} <= {"list", "set"}
    if answer.op != gold.op and not loose or len(answer.args) != len(gold.args):
        return False
    names, gold_names = ({unname(x)[0].partition("_")[0] for x in y.args} for y in (answer, gold))
    if names != gold_names and not (loose and len(names | gold_names) <= 2):  # x = 1, y = 2
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
    (formula, number), (gold_formula, gold_number) = (
        sorted(x.args, key=lambda side: side.plain) for x in (answer, gold))
    if gold_number.plain and gold_formula.op == "symbol" and (
            not number.plain or find_ratio(formula, gold_formula) is None):
        return False  # x + 2 = 7 is not x = 5, but the question
    ratio = find_ratio(apply("-", *answer.args), apply("-", *gold.args))
    return bool(ratio) and (gold.op in ("=", "!=") or not ratio.imag and ratio > 0)


# --------------------------------------------------------------------------------------------------
# 6. Many pairs, with a deadline, and the command line


class Worker:
    """A Python of its own that verifies pairs, a JSON line each; killed if late, then replaced."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def start(self):
        self.process = subprocess.Popen([sys.executable, __file__, "--worker"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)  # no Ctrl-C
        if not self.process.stdout.readline():  # it has imported all: from here on time counts
            raise RuntimeError("verify.py's worker process does not run: try python verify.py 4 4")

    def ask(self, pair, timeout):
        if self.process is None or self.process.poll() is not None:
            self.start()
        timer = threading.Timer(timeout, self.process.kill)
        timer.start()
        deadline = time.monotonic() + timeout
        try:
            print(json.dumps(pair), file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
        except OSError:  # its end of the pipe is closed
            reply = ""
        timer.cancel()
        late = time.monotonic() >= deadline
        if late or not reply:
            self.process.kill()
            self.process.wait()
        return reply == "true\n" and not late


WORKER = Worker()


def verify_batch(responses, golds, timeout=2.0):
    """[verify(response, gold), ...], and False where that takes over `timeout` seconds a pair.

    Any thread may call it. The one worker process serves them in turn, and ends with this process.
    """
    assert len(responses) == len(golds), f"{len(responses)} responses, {len(golds)} golds"
    with WORKER.lock:
        return [all(isinstance(text, str) for text in pair) and WORKER.ask(pair, timeout)
            for pair in zip(responses, golds)]


def explain(text):
    """How it is read, for people."""
    try:
        text, unit = split_unit(normalize(text))
        return f"{show(parse_math(text))} {unit}".rstrip()
    except Exception as error:  # as in `judge`
        return f"no mathematics: {error}"


def show(x):
    if isinstance(x, Group):
        items = ", ".join(show(item) for item in x.args)
        return x.op[0] + items + x.op[1] if x.op[0] in "([" else f"{x.op}: {items or 'nothing'}"
    return f"a formula in {', '.join(sorted(x.names))}" if x.names else MP.nstr(x.at[0], 12)


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
    print(f"answer      {answer or 'none'}   ({where})\n  read as   {explain(answer or '')}")
    print(f"gold        {sys.argv[2]}\n  read as   {explain(sys.argv[2])}")
    print(f"{'EQUAL' if equal else 'NOT EQUAL':11s} by: {why}")
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
