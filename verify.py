"""verify.py: is the answer in this response equal to the gold answer?

    python verify.py 'So it is \\boxed{\\frac{2}{4}}.' 0.5    # says why; exit status 0: equal

Find the answer's text (`extract_answer`), read it as a sympy object (`parse_math`), compare it with
what the gold answer reads as (`compare`). The first rung of this ladder that fits decides:

    same text or choice letter -> exact rational numbers -> other numbers, to 150 digits ->
    expressions, at random points -> relations, up to a constant factor -> collections, by items

What is equal. A number is exact: 0.333 is not 1/3; 5% is 1/20, not 5; 52_8 is 42. Lists and sets of
values match in any order, tuples in theirs, and a tuple is no set. An open interval is not a closed
one. x = 5 answers a gold of 5, but not one of y = 5. A unit may be left out, not exchanged. A \\log
without a base is no \\ln. One answer has to be given: "3 or 4" is not 3. If in doubt it is wrong: a
wrong answer that is rewarded gets learned. Not read: sums, integrals, conversion of units.

The text is written by a model that is rewarded for fooling this file. So nothing in it is executed
(sympy's own sympify and parse_expr run Python), limits hold while a value is built, not after, and
no text makes `verify` raise. `verify_batch` adds what code cannot promise of itself: a deadline,
kept by killing the process that missed it.
"""

import functools
import itertools
import json
import operator
import random
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections import namedtuple

import mpmath
import sympy
from sympy import Expr, Integer, Rational, Symbol, oo

MAX_RESPONSE, MAX_ANSWER, MAX_TOKENS = 20_000, 2_000, 600  # the last so many characters; characters
MAX_DEPTH, MAX_ITEMS, MAX_SIGNS = 25, 40, 3  # brackets in brackets; of a list; signs such as \pm
MAX_DIGITS, MAX_EXPONENT, MAX_BITS, MAX_FACTORIAL = 400, 10_000, 60_000, 500  # of one number

MP = mpmath.MPContext()  # our own, so that its precision is never changed from elsewhere
MP.dps = 200
DIGITS = ".0123456789"

Group = namedtuple("Group", "kind items")  # kind: list, set, "matrix of 2 rows", () [] (] [)
Region = namedtuple("Region", "ends inside")  # of real numbers: its ends; whether one is inside
Relation = namedtuple("Relation", "sign left right")  # = != < <= > >= \\in


class Unreadable(ValueError):
    """The text is no mathematics that this file knows, or it breaks a limit."""


# --------------------------------------------------------------------------------------------------
# 1. Where the answer stands. Linear scans only: a lazy regex, <answer>(.*?)</answer>, is quadratic.

BOX = re.compile(r"\\f?box(?:ed)?\s*(?:\{|(?P<bare>[^\s{}$\\]+))|\\.|[{}]", re.S)
PHRASE = re.compile(r"answers?\**\s*(?:is|are|:|=)(?:[\s:*$]|\\\[)*", re.I)


def find_box(text):
    """-> (position, content) of the last outermost box; content None if it is never closed."""
    last, stack, boxes = None, [], []
    for match in BOX.finditer(text):
        if match["bare"]:  # \boxed 5
            last = last if boxes else (match.start(), match["bare"])
        elif match[0] == "{" or len(match[0]) > 2:
            stack.append(match)
            boxes += [match] * (match[0] != "{")
        elif match[0] == "}" and stack and (opened := stack.pop())[0] != "{":
            boxes.pop()
            last = last if boxes else (opened.start(), text[opened.end() : match.start()])
    return (boxes[0].start(), None) if boxes else last


def find_answer(response):
    """-> (the answer's text or None, where it stood)."""
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None, "thinking that does not end"
    text = text[-MAX_RESPONSE:]
    found = [(*box, "the last box")] if (box := find_box(text)) else []  # (position, answer, where)
    for mark, end in ("<answer>", "</answer>"), ("#### ", "\n"):
        if (start := text.rfind(mark)) >= 0:
            inside, ended, _ = text[start + len(mark) :].partition(end)
            found.append((start, inside if ended or end == "\n" else None, f"the last {mark}"))
    marked = bool(found)
    for match in list(PHRASE.finditer(text))[-3:]:  # "the answer is correct" names none
        words = re.split(r"\n|</answer>|\.\s", text[match.end() :], maxsplit=1)[0]
        later = any(position > match.start() for position, *_ in found)
        if not later and is_answer(words, not marked):
            found.append((match.start(), words, f"the last {match[0].strip(' *')!r}"))
    if not found and is_answer(text, True):
        found.append((0, text, "a response that is nothing else"))
    _, answer, where = max(found, key=lambda x: x[0], default=(0, None, "no answer that is marked"))
    return (answer or "").strip() or None, where


def is_answer(text, word_counts):
    """Whether this text, which stands in no box, is an answer and not prose."""
    try:
        normal = normalize(text)
        if "\n" in text.strip() or not word_counts and re.fullmatch("[A-Za-z]", normal):
            return False
        word = word_counts and re.fullmatch("[A-Za-z]+", normal)
        return bool(word or choice(normal)[0] or parse_math(text) is not None)
    except Exception:  # as in `judge`
        return False


def extract_answer(response):
    """The answer's text, or None if there is none.

    It stands after the thinking, which has to end, in the last of \\boxed{}, \\fbox{}, <answer>,
    `#### `, "the answer is", "Answer:"; or else the response is nothing but an answer.
    """
    return find_answer(response)[0]


# --------------------------------------------------------------------------------------------------
# 2. Text -> tokens. Of the many ways to write one thing, one is left.

ALIASES = dict(pair.split() for pair in re.split(",|\n", r"""
    × *,· *,⋅ *,∗ *,\times *,\cdot *,÷ /,∕ /,⁄ /,\div /,\per /,– -,** ^,\% %,\percent %,√ \Sqrt
    ≤ <=,⩽ <=,\le <=,\leq <=,\leqslant <=,\lt <,≥ >=,⩾ >=,\ge >=,\geq >=,\geqslant >=,\gt >,≠ !=
    \ne !=,\neq !=,≈ \approx,∈ \in,∪ \cup,∩ \cap,\backslash \setminus,± \pm,∓ \mp,∅ \emptyset
    \varnothing \emptyset,∞ \infty,\infinity \infty,\inf \infty,\oo \infty,\lbrace \{,\rbrace \}
    \lvert |,\rvert |,\lbrack [,\rbrack ],⟨ \langle,⟩ \rangle,\asin \arcsin
    \acos \arccos,\atan \arctan""".strip()))
NAMES = set("""sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan asin acos atan ln log lg
    exp abs sqrt pi in infinity infty inf oo percent per alpha beta gamma lambda theta sigma omega
    phi""".split())
UNITS = {spelling: Symbol(names.split("=")[0] + " (unit)", positive=True) for names in """
    meter=metre cm=centimeter=centimetre mm=millimeter=millimetre km=kilometer=kilometre inch=inche
    foot=feet=ft yard=yd mile=mi gram kg=kilogram mg=milligram pound=lb ounce=oz ton second=sec
    minute=min hour=hr day week month year=yr liter=litre ml=milliliter gallon=gal dollar=usd cent
    degree radian=rad kelvin joule newton watt volt ohm""".split() for spelling in names.split("=")}
ALL_UNITS = set(UNITS.values())
UNITS |= {"thousand": Integer(10**3), "million": Integer(10**6), "billion": Integer(10**9)}
UNITS |= dict.fromkeys("""unit people person student child children girl boy man men woman women
    apple orange book car dog cat egg way page point mark ball marble coin step time piece game
    ticket card player team cookie flower tree bag box boxe cup item toy pen pencil solution
    """.split(), Integer(1))  # counted things: 42 apples is 42
STOP = set("""yes odd one two six ten red is it the not so of to no are was an as at by if be we do
    for""".split())  # short words, not products of variables


def rewrite(match):
    """½ -> \\frac{1}{2}, x² -> x^{2}, x₁ -> x_{1} (NFKC makes x2 of both), α -> \\alpha,
    0.1\\overline{6} -> \\frac{15}{90}, 52_8 -> 42."""
    if match.lastindex == 3:
        whole, tail, period = match.groups()
        top = int(f"0{whole}{tail}{period}") - int(f"0{whole}{tail}")
        return r"\frac{%d}{%d}" % (top, 10 ** len(tail) * (10 ** len(period) - 1))
    if match.lastindex:
        digits, base = match[1], int(match[2])
        fits = 2 <= base <= 36 and all(int(digit, 36) < base for digit in digits)
        return str(int(digits[:MAX_DIGITS], base)) if fits else match[0]
    *_, last = name = unicodedata.name(match[0][0]).split()
    text = unicodedata.normalize("NFKC", match[0])
    if "GREEK" in name:
        return "\\" + (last.lower() if "SMALL" in name else last.title()) + " "
    if "FRACTION" in name:
        return r"\frac{%s}{%s}" % tuple(text.split("⁄"))
    return ("_{" if "SUBSCRIPT" in name else "^{") + text + "}"


def name_word(match):
    """A run of letters: sin -> \\sin, kilograms -> \\kg; xy stays as it is, x times y."""
    word = match[0].lower()
    if word in NAMES:
        return f"\\{word} "
    unit = word if word in UNITS else word.removesuffix("s")
    if unit not in UNITS and (len(word) > 3 or word in STOP):
        raise Unreadable(f"the word {word!r}")
    return f"\\{unit} " if unit in UNITS else match[0]


def unfont(match):
    """\\text{ cm} -> cm, and \\text{m} -> meter: a letter in upright type is a unit."""
    letter, rest = re.fullmatch(r"\s*([mgshL]\b)?(.*)", match[1], re.S).groups()
    return f" {LETTER_UNITS.get(letter, '')}{rest} "


LETTER_UNITS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "L": "liter"}
UNICODE = [(re.compile(pattern), new) for pattern, new in [
    ("[\u200b-\u200d\u2060\ufeff]", ""), ("[\u202f\u2009\xa0]", r"\\ "), ("[£€]", r"\\$"),
    ("∛", r"\\Sqrt[3]"), ("ℝ", r"\\Reals "), ("[¼-¾⅐-⅞Α-Ωα-ω]|[⁰¹²³⁴-⁾ⁿⁱ]+|[₀-₎]+", rewrite)]]
LATEX = [(needle, re.compile(pattern, re.A), new) for needle, pattern, new in [  # tried on a needle
    ("", r"(?<=\d)(?:\{,\}|,?\\! ?|\\[,;: ]|~)(?=\d{3}(?!\d))", ""),  # 1{,}234, 1\,234
    ("\\", r"\\(?:left|right)(?![A-Za-z])\s*\.?|(?<!\\)\\[,;:! ]|\\[hv]space\*?\s*\{[^}]*\}|\\(?:rm"
        r"|bf|it|[Ll]arge|(?:text)?color\s*\{\w+\}|underline|[bB]igg?[lrm]?|q?quad|displaystyle"
        r"|textstyle|(?:no)?limits|f?box(?:ed)?)(?![A-Za-z])|\\(?:begin|end)\s*\{cases\}", " "),
    ("~", "~", " "), ("frac", r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    ("binom", r"\\[dtc]binom(?![A-Za-z])", r"\\binom"),
    ("mathbb", r"\\mathbb\s*\{?\s*R\s*\}?", r"\\Reals "),
    (" ", r"(?<=\d) +([mgsLh](?:/[sh])?)(?=\s*(?:\^|$))", r"\\text{\1}"),  # 5 m
    *[("{", r"\\(?:text|math|mbox|hbox|operatorname|ensuremath|bold|bm)[a-z]*\*?\s*\{([^{}]*)\}",
        unfont)] * 2,  # twice: text in text
    ("/", r"(?<=[a-z]{2})\s*/\s*([hs])\b", r"/\\text{\1}"), ("/\\text", r"\\text\{(.)\}", unfont),
    ("mph", r"\bmph\b", "miles per hour"),
    ("", r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|°", " degree "),
    ("sq", r"\bsq(?:uare|\.)?\s+([a-z]+)|\b([a-z]+) squared\b", r"\1\2^2 "),
    ("cub", r"\bcubic\s+([a-z]+)|\b([a-z]+) cubed\b", r"\1\2^3 "),
    ("in", r"\bin\s*(?=\^)|(?<=\d) *in *$", " inch"), ("sec", r"(?<=\d) *secs?\b", " second"),
    (" ", r"\s+", " "), ("\\angle", r"^ ?(?:m ?)?\\angle ?[A-Z]+ ?=", ""),
    ("=", r"^ ?(?!arc|sinh|cosh|tanh|sqrt|alpha|beta|gamma|lambda|theta|sigma|omega)[A-Za-z]{4,}"
        r"(?: (?!not|or|and|no)[A-Za-z]+)* ?=", ""),  # Area = 24
    ("10", r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),  # 3.2 x 10^-4
    ("U", r"(?<=[\])])\s*U\s*(?=[\[(])", r"\\cup "),  # (0,1) U (2,3)
    ("]", r"^\s*\](.*?)\s*\[\s*$", r"(\1)"),  # ]0,1[
    ("\\{", r"^\\\{\s*[a-z]\s*(?:\\in\s*\\Reals)?\s*(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # {x | x > 3}
    ("/", r"(?<![\w.^}\\])(\d+) +(\d+)\s*/\s*(\d+)(?!\.?\d)", r"(\1+\\frac{\2}{\3})"),  # 2 1/3
    ("\\frac", r"(?<![\w.^}\\])(\d+) *\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))",
        r"(\1+\\frac{\2\3}{\4\5})"),  # 2\frac13
    (".", r"(\d{0,99})\.(\d{0,99})\\(?:overline|dot)\s*\{(\d{1,99})\}", rewrite),  # 0.1\overline{6}
    ("_", r"\(\s*(\w+)\s*\)\s*_", r"\1_"),  # (52)_8
    ("_", r"(?<![\w.])(\d[0-9A-F]*|[A-F][0-9A-F]+)\s*_\{?\s*(\d{1,2})\s*\}?", rewrite),  # 52_8
    ("\\choose", r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}"),
    ("\\over", r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    ("\\\\", r"\\\\\s*\[[^\]]*\]", r"\\\\ "),  # \\[4pt]
    ("\\begin", r"\\begin\s*\{(?:(?:[pbB]|small)?matrix|array\}\s*\{[clr|]*)\}", r"\\matrix "),
    ("\\end", r"\\end\s*\{(?:(?:[pbB]|small)?matrix|array)\}", r"\\endmatrix "),
    ("\\matrix", r"^\s*[A-Z](?:\^\{-1\})?\s*=\s*(?=\\matrix)", ""),  # A = ...
    ("=", r"^\s*\$?\s*([fghpqFGHPQ])\s*\(\s*([A-Za-z])\s*\)\s*=(?!=)", r"\1_\2 ="),  # f(x) =
    ("=", r"^\s*\$?\s*([fghpqFGHPQ])\^\{-1\}\s*\(\s*[a-z]\s*\)\s*=(?!=)", r"\1_0 ="),
    ("\\", r"(?<!\\)\\$", ""), ("{.}", r"\{\.\}", "."), ("\\colon", r"\\colon(?![A-Za-z])", ":"),
    ("$", r"-\s*\\?\$", r"\\$-"), ("$", r"\$\$|^\s*\$(?=[^$]+\$\s*$)", " "),
    ("", r"\\[()\[\]]|\*\*(?!\s*[\w({\\-])|^\s*\*\*|`", " ")]]
TOKEN = re.compile(r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?|\\[A-Za-z]+|\\.|and|or|<=|>=|!=|\*\*"
    r"|\S", re.S | re.A)


@functools.lru_cache(maxsize=1024)
def normalize(text):
    """One spelling for Unicode, fonts, spacing, math mode, and what stands around an answer."""
    if len(text) > MAX_ANSWER:
        raise Unreadable(f"longer than {MAX_ANSWER} characters")
    if not text.isascii():
        for pattern, new in UNICODE:
            text = pattern.sub(new, text)
        text = unicodedata.normalize("NFKC", text).replace("−", "-")
    if not all(c.isprintable() or c in "\t\r\n" for c in text):
        raise Unreadable("control characters")
    text = text.strip()
    for needle, pattern, new in LATEX:
        if needle in text:
            text = pattern.sub(new, text)
    if not re.search(r"[(\[]|\\\{", text):  # in brackets a comma separates
        text = re.sub(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])",
            lambda match: match[0].replace(",", ""), text)
    text = re.sub(r"^\s*\$(?=[^$]*$)", r"\\$", text)  # money; signs in pairs mean math mode
    text = re.sub(r"\s+", " ", re.sub(r"(?<!\\)\$", " ", text))
    text = text.strip() if text.rstrip().endswith("..") else text.strip().rstrip(" .,;:")
    return text.removeprefix("=").strip()


# --------------------------------------------------------------------------------------------------
# 3. Tokens -> sympy objects. What would be too large is refused before it is built.


def number(x, point=()):
    """The value of an expression at a point, to 200 digits. It visits each node once; sympy's evalf
    takes exponential time on ln(1 + ln(1 + ...))."""
    if x.is_Rational:
        return MP.mpf(x.p) / x.q
    if x in point or x in EXACT:
        return point[x] if x in point else EXACT[x]
    args = [number(arg, point) for arg in x.args]
    if x.is_Add:
        sizes = [abs(arg) for arg in args if arg]
        if sizes and max(sizes) > 10**140 * min(sizes):
            raise OverflowError("a term that would vanish in rounding")
        return MP.fsum(args)
    if x.is_Mul:
        return MP.fprod(args)
    name = x.func.__name__
    return getattr(MP, {"Abs": "fabs", "ceiling": "ceil", "Pow": "power"}.get(name, name))(*args)


def bits(value):
    return max((max(abs(n.p), n.q).bit_length() for n in value.atoms(Rational)), default=0)


def tame(value, limit):
    """The argument of a function that grows: refused if over `limit`, or a tower of powers."""
    if value.has(oo, -oo) or value.is_number and abs(number(value)) > limit:
        raise Unreadable("a number too large for where it stands")
    if not value.is_number and (len(value.atoms(*GROWING)) > 2 or bits(value) > 20 or any(
            p.exp.is_number and abs(p.exp) > 100 for p in value.atoms(sympy.Pow))):
        raise Unreadable("a tower of powers")
    return value


def power(base, exponent):
    if tame(exponent, MAX_EXPONENT).is_number and abs(exponent) * bits(base) > MAX_BITS:
        raise Unreadable("a power too large")
    if not exponent.is_Integer and bits(base) > 4 * MAX_DIGITS:
        raise Unreadable("a root of a number too large")
    if base.has(oo, -oo) or base == 0 and not exponent.is_positive:
        raise Unreadable("a power that is not defined")
    if base.is_Rational and base < 0 and exponent.is_Rational and exponent.q % 2 and exponent.q > 1:
        return (-1) ** exponent.p * (-base) ** exponent  # the real root: (-8)^(1/3) is -2
    return base**exponent


def factorial(n):
    return sympy.factorial(tame(n, MAX_FACTORIAL))


def binomial(n, k):
    if n.is_Integer and k.is_Integer:
        return sympy.binomial(tame(n, MAX_FACTORIAL), tame(k, MAX_FACTORIAL))
    return factorial(n) / (factorial(k) * factorial(n - k))


EXACT = {sympy.pi: MP.pi, sympy.E: MP.e, sympy.I: MP.j, oo: MP.inf, -oo: -MP.inf}
GROWING = (sympy.Pow, sympy.exp, sympy.factorial, sympy.binomial, sympy.sinh, sympy.cosh)
CONSTANTS = {r"\pi": sympy.pi, r"\infty": oo, "e": sympy.E, "i": sympy.I, r"\$": UNITS["dollar"],
    r"\emptyset": Group("set", ()), r"\Reals": Group("()", (-oo, oo)),
    **{"\\" + unit: UNITS[unit] for unit in UNITS}}
FUNCTIONS = {r"\exp": sympy.exp, r"\abs": sympy.Abs, **{"\\" + name: getattr(sympy, name.replace(
    "arc", "a")) for name in "sin cos tan cot sec csc sinh cosh tanh arcsin arccos arctan".split()}}
LOGS = {r"\log": Symbol("the base of log", positive=True), r"\lg": Integer(10), r"\ln": sympy.E}
OPERATORS = {  # how tightly it binds, and what it does
    r"\cup": (1, operator.or_), r"\cap": (1, operator.and_), r"\setminus": (1, operator.gt),
    "+": (2, operator.add), "-": (2, operator.sub), "*": (3, operator.mul),
    "/": (3, operator.truediv), "^": (5, power), "!": (6, factorial), "%": (6, lambda x: x / 100)}
CLOSING = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), r"\{": (r"\}",), "|": ("|",),
    r"\langle": (r"\rangle",), r"\lfloor": (r"\rfloor",), r"\lceil": (r"\rceil",),
    r"\matrix": (r"\endmatrix",)}
AROUND = {"|": sympy.Abs, r"\lfloor": lambda x: sympy.floor(tame(x, 10**100)),
    r"\lceil": lambda x: sympy.ceiling(tame(x, 10**100))}
RELATIONS = {"<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge,
    "!=": operator.ne, "=": operator.eq, r"\in": None, r"\approx": None}
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
SEPARATORS = (",", ";", "and", "or", "&", r"\\")
ENDS = {"", "_", ":", *OPERATORS, *SEPARATORS, *RELATIONS, *sum(CLOSING.values(), ())} - {"|"}


class Parser:
    """Recursive descent over items, relations and, by how tightly signs bind, expressions."""

    def __init__(self, tokens):
        self.tokens, self.at, self.used, self.open = tokens, 0, 0, []

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *expected):
        token = self.peek()
        if not token or expected and token not in expected:
            raise Unreadable(f"{token!r} instead of {' or '.join(expected) or 'more'}")
        self.at += 1
        return token

    def apply(self, function, *values):
        """function(*values) of numbers, expressions or sets, within the limits."""
        if function in (operator.or_, operator.and_, operator.gt):
            a, b = map(region, values)
            return Region(a.ends + b.ends, lambda x: function(a.inside(x), b.inside(x)))
        if function is operator.mul and isinstance(values[1], Group) and "matrix" in values[1].kind:
            factor, (kind, items) = values
            return Group(kind, tuple(self.apply(function, factor, item) for item in items))
        if not all(isinstance(value, Expr) for value in values):
            raise Unreadable("a collection or a relation where a number is needed")
        value = function(*values)
        self.used += bits(value)
        if self.used > 4 * MAX_BITS or value.has(sympy.nan, sympy.zoo):
            raise Unreadable("a number too large, or not defined")
        return value

    def items(self):
        """-> the items of a list, each an expression or a relation, and the separators between."""
        items, separators = [], []
        while True:
            parts, signs = [self.expression()], []
            while self.peek() in RELATIONS:
                signs.append(self.take())
                parts.append(self.expression())
            items.append(relate(parts, signs))
            start = len(separators)
            while self.peek() in SEPARATORS:  # `, and`
                separators.append(self.take())
            if start == len(separators) or self.peek() == r"\endmatrix":
                return items, separators[: len(separators) if start == len(separators) else start]
            if len(items) == MAX_ITEMS:
                raise Unreadable(f"more than {MAX_ITEMS} items")

    def expression(self, binding=0):
        """What binds at least so tightly. A sign binds looser than a power: -2^2 is -4."""
        if self.peek() in ("+", "-"):
            sign = Integer(1 if self.take() == "+" else -1)
            value = self.apply(operator.mul, sign, self.expression(4))
        else:
            value = self.atom()
        while (token := self.peek()) in OPERATORS or self.more():
            level, function = OPERATORS.get(token, OPERATORS["*"])  # side by side is multiplied
            if level < binding:
                break
            before = self.tokens[self.at - 1]
            if token in OPERATORS:
                self.take()
            elif token[0] in DIGITS and (before[0] in DIGITS or before == "}" and (
                    self.tokens[self.at + 1 : self.at + 2] != ["^"])):  # 2^{n} 3^{m} is a product
                raise Unreadable("two numbers side by side")
            elif before[1:] in UNITS and (token[0] in DIGITS or token == "(") or (
                    before[0] in DIGITS and token == "{"):
                raise Unreadable("a number behind a unit, or in a group behind a number")
            right = () if level == 6 else (self.expression(level + (level < 5)),)
            value = self.apply(function, value, *right)
        return value

    def more(self):
        """Whether the next token begins another factor."""
        return self.peek() not in ENDS and not (self.peek() == "|" and "|" in self.open)

    def atom(self):
        token = self.take()
        if token[0] in DIGITS:
            if len(token) > MAX_DIGITS or len(token.lower().partition("e")[2]) > 5:
                raise Unreadable("a number too large")
            return Rational(token)
        if token in CLOSING:
            return self.bracket(token)
        if token in (r"\frac", r"\binom"):
            function = operator.truediv if token == r"\frac" else binomial
            return self.apply(function, self.argument(), self.argument())
        if token in (r"\sqrt", r"\Sqrt"):
            index = self.bracket(self.take()) if self.peek() == "[" else Integer(2)
            base = self.argument() if token == r"\sqrt" else self.atom()
            return self.apply(power, base, self.apply(operator.truediv, Integer(1), index))
        if token in FUNCTIONS or token in LOGS:
            return self.function(token)
        if token in CONSTANTS:
            return CONSTANTS[token]
        name = token.removeprefix("\\").removeprefix("var").replace("lambda", "lamda")  # Unicode's
        try:
            unicodedata.lookup(f"{'LATIN' if len(token) == 1 else 'GREEK'} SMALL LETTER {name}")
        except KeyError:
            raise Unreadable(f"{token!r} was not expected") from None
        if self.peek() == "_" and self.take():
            name += f"_{self.atom()}"
        return Symbol(name, real=True)

    def argument(self):
        """What a TeX command takes: a group in braces, or one digit, letter or command."""
        if len(self.peek()) > 1 and self.peek()[0].isdigit():
            self.tokens[self.at : self.at + 1] = [self.peek()[0], self.peek()[1:]]
        return self.atom()

    def enter(self, opener):
        self.open.append(opener)
        if len(self.open) > MAX_DEPTH:
            raise Unreadable(f"nested more than {MAX_DEPTH} deep")

    def bracket(self, opener):
        self.enter(opener)
        items, separators = ([], []) if self.peek() == r"\}" else self.items()
        kind = self.open.pop() + self.take(*CLOSING[opener])
        if opener in AROUND:
            return self.apply(AROUND[opener], *items)
        if kind == "[]" and all(isinstance(item, Group) and item.kind == "[]" for item in items):
            kind, separators = "", [r"\\"] * (len(items) - 1)  # [[1, 2], [3, 4]] is a matrix too
            items = [x for item in items for x in item.items]
        if kind in ("", r"\matrix\endmatrix"):
            widths = {row.count("&") for row in " ".join(separators).split(r"\\")}
            if len(widths) > 1:
                raise Unreadable("a matrix with rows of several lengths")
            kind = f"matrix of {1 + separators.count(chr(92) * 2)} rows"
        elif len(items) == 1 and kind in ("()", "[]", "{}"):
            return items[0]
        kind = {"{}": "set", r"\{\}": "set", r"\langle\rangle": "()"}.get(kind, kind)
        return Group(kind, tuple(items))

    def function(self, name):
        self.enter(name)
        marks = {}
        while (mark := self.peek()) in ("^", "_"):
            self.take()
            marks[mark] = self.expression(5)
        bracketed = self.peek() in CLOSING
        value = self.atom() if bracketed else self.expression(4)
        while not bracketed and self.more() and self.peek() not in (*FUNCTIONS, *LOGS, *CLOSING):
            value = self.apply(operator.mul, value, self.expression(4))  # \sin 2x
        self.open.pop()
        value = self.apply(lambda x: x.subs(UNITS["degree"], sympy.pi / 180), value)
        if marks.get("^") == -1 and name.replace("\\", "\\arc") in FUNCTIONS:
            name, marks = name.replace("\\", "\\arc"), {}
        if name in LOGS:
            base = marks.get("_", LOGS[name])
            value = self.apply(lambda x, b: sympy.log(x) / sympy.log(b), value, base)
        else:
            value = self.apply(lambda x: FUNCTIONS[name](tame(x, 10**100)), value)
        return self.apply(power, value, marks["^"]) if "^" in marks else value


def parse_math(text):
    """The text of an answer, in LaTeX, Unicode or plain writing -> a sympy object.

    Numbers and expressions are sympy Exprs; what sympy has no class for that is safe is a Group, a
    Region or a Relation of them. Raises Unreadable, or what sympy raises, on anything else.
    """
    text = normalize(text)
    unit = text.lower().removesuffix("s") in UNITS or text == r"\$"
    if unit or re.fullmatch("[A-Za-z '-]{3,}|[A-Z]{2}", text) and text.lower() not in NAMES:
        raise Unreadable("words")
    text = re.sub(r"(?<![\\A-Za-z])(?!(?:and|or)\b)[A-Za-z]{2,}", name_word, text)
    tokens = [ALIASES.get(token, token) for token in TOKEN.findall(text)]
    choices = tokens.count(r"\pm") or min(1, tokens.count(r"\mp"))
    if len(tokens) > MAX_TOKENS or choices > MAX_SIGNS:
        raise Unreadable(f"more than {MAX_TOKENS} tokens, or {MAX_SIGNS} plus-minus signs")
    values = []
    for signs in itertools.product("+-", repeat=choices):  # \mp is against the first \pm
        signs = iter(["-" if signs[:1] == ("+",) else "+", *signs])
        opposite = next(signs)
        parser = Parser([{r"\pm": next(signs), r"\mp": opposite}[t] if t in (r"\pm", r"\mp") else t
            for t in tokens])
        value = combine(*parser.items())
        if parser.peek():
            raise Unreadable(f"{parser.peek()!r} was not expected")
        several = choices and isinstance(value, Group) and value.kind in ("list", "set")
        values += value.items if several else [value]
    return combine(list(dict.fromkeys(values)), ["or"]) if choices else values[0]


# --------------------------------------------------------------------------------------------------
# 4. Relations and sets of real numbers


def end(x):
    """The end of an interval as a number, rounded so that two forms of it are the same."""
    if not isinstance(x, Expr) or x.free_symbols or MP.im(number(x)):
        raise Unreadable("a set whose ends are no real numbers")
    return number(x) if x.has(oo) else MP.mpf(MP.nstr(number(x), 150))


def region(value):
    """A set of real numbers: (0, 1), where it stands beside a union sign, is an interval."""
    if isinstance(value, Region):
        return value
    if not isinstance(value, Group) or "matrix" in value.kind:
        raise Unreadable("no set of real numbers where one is needed")
    ends = [end(x) for x in value.items]
    if value.kind in ("list", "set"):
        return Region(ends, lambda x: x in ends)
    low, high = ends
    return Region(ends, lambda x: low < x < high or x == low and value.kind[0] == "[" or (
        x == high and value.kind[1] == "]"))


def relate(parts, signs):
    """The value, relation or relations that a chain such as x = 1 + 1 = 2 or a < x < b states."""
    if r"\approx" in signs:  # 1/3, which is about 0.33: the exact one counts
        signs = signs[: signs.index(r"\approx")]
        exact, *about = map(number, parts[len(signs) :])
        if any(abs(x - exact) > abs(exact) / 20 for x in about):
            raise Unreadable("what is said to be about equal is not")
        parts = parts[: len(signs) + 1]
    if set(signs) - {"="}:
        return combine([Relation(*x) for x in zip(signs, parts, parts[1:])], ["and"])
    if len(parts) == 2 and all(isinstance(x, Group) and x.kind == "()" for x in parts):
        return combine([Relation("=", *x) for x in zip(*(x.items for x in parts))], ["and"])
    free = signs and any(getattr(x, "free_symbols", 1) for x in (parts[0], parts[-1]))
    if not all(compare(part, parts[-1])[0] for part in (parts[1:-1] if free else parts[:-1])):
        raise Unreadable("an equation that does not hold")
    return Relation("=", parts[0], parts[-1]) if free else parts[-1]


def solution(item):
    """x = 5 -> (x, 5);  2x > 6 -> (x, (3, oo));  a bare value -> (None, value);  else None."""
    if not isinstance(item, Relation):
        return None, item
    sign, left, right = item
    if sign in ("=", r"\in"):
        if isinstance(right, Symbol) and not isinstance(left, Symbol):
            left, right = right, left
        names = left.items if isinstance(left, Group) else [left]
        inside = right.free_symbols if isinstance(right, Expr) else ()
        if all(isinstance(x, Symbol) and x not in inside for x in names):
            return ", ".join(x.name for x in names), right
    elif isinstance(left, Expr) and isinstance(right, Expr):
        difference, symbols = left - right, list((left - right).free_symbols)
        if isinstance(left, sympy.Abs) and sign in ("<", "<=", ">", ">="):  # |x| < 2
            both = Relation(sign, *left.args, right), Relation(FLIPPED[sign], *left.args, -right)
            return solution(combine(both, ["and" if "<" in sign else "or"]))
        slope = difference.diff(symbols[0])
        if len(symbols) == 1 and slope.is_number and slope != 0:
            bound = end(-difference.subs(symbols[0], 0) / slope)
            holds = RELATIONS[FLIPPED[sign] if number(slope) < 0 else sign]
            return symbols[0].name, Region([bound, -MP.inf, MP.inf],
                lambda x: holds(x, bound) and MP.isfinite(x))
    return None


def combine(items, separators):
    """The items of a list as one value: x = 2 or x = 3 is x in {2, 3}; x > 1, x < 3 an interval."""
    if len(items) == 1:
        return items[0]
    solved = [solution(item) for item in items]
    if None in solved or not solved[0][0]:
        return Group("list", tuple(items))
    names, values = zip(*solved)
    if {name and name.split("_")[0] for name in names} <= {names[0].split("_")[0], None}:  # x_1 too
        value = Group("list", values)
        if all(isinstance(value, Region) for value in values):
            join = any if "or" in separators else all
            value = Region(sum((region.ends for region in values), []),
                lambda x: join(region.inside(x) for region in values))
        return Relation(r"\in", Symbol(names[0].split("_")[0], real=True), value)
    if None in names or len(set(names)) < len(names):
        return Group("list", tuple(items))
    symbols = tuple(Symbol(name, real=True) for name in names)  # x = 1, y = 2 is (x, y) = (1, 2)
    return Relation("=", Group("()", symbols), Group("()", values))


# --------------------------------------------------------------------------------------------------
# 5. Comparing


RANGES = (1, 12, 1), (-97, 97, 97), (-60, -7, 1), (50, 900, 97), (-900, -50, 97)  # from, to; over


def samples(*expressions):
    """Their values at random points where all are defined (and real, unless i is among them)."""
    symbols = sorted(set().union(*(x.free_symbols for x in expressions)), key=str)
    randint = random.Random(0).randint
    real = symbols and not any(x.has(sympy.I) for x in expressions)
    for trial in range(20 if symbols else 1):
        low, high, below = RANGES[trial % 5]
        point = {s: MP.mpf(randint(1 if s.is_positive else low, high)) / below for s in symbols}
        try:
            values = [number(x, point) for x in expressions]
        except (ValueError, ZeroDivisionError, OverflowError):  # not defined here
            continue
        if all(MP.isfinite(v) and not (real and MP.im(v)) for v in values):
            yield values


def near(a, b):
    """Equal to 150 of 200 digits. Against a 0, what rounding leaves of 2 - sqrt(2)^2 is 0."""
    larger = max(abs(a), abs(b))
    return abs(a - b) <= larger / MP.mpf(10) ** 150 or not (a and b) and larger < MP.mpf(10) ** -150


def compare(a, b):
    """-> (whether two values that parse_math returned are equal, the rung that decided)."""
    if isinstance(a, Relation) and isinstance(b, Relation):
        a, b = by_name(a), by_name(b)
    if isinstance(a, Relation) or isinstance(b, Relation):
        known = [solution(a), solution(b)]
        if None not in known and (known[0][0] == known[1][0] or None in (known[0][0], known[1][0])):
            equal, rung = compare(known[0][1], known[1][1])
            if equal or not isinstance(a, type(b)):
                return equal, rung
        return same_relation(a, b), "relations, up to a constant factor"
    if isinstance(a, Region) or isinstance(b, Region):
        try:
            a, b = region(a), region(b)
        except Unreadable:
            return False, "a set of real numbers against something else"
        ends = sorted({*a.ends, *b.ends} - {-MP.inf, MP.inf}) or [MP.mpf(0)]
        probes = [ends[0] - 1, *ends, *((x + y) / 2 for x, y in zip(ends, ends[1:])), ends[-1] + 1]
        return all(a.inside(x) == b.inside(x) for x in probes), "sets, at and between their ends"
    if isinstance(a, Group) or isinstance(b, Group):
        loose = [isinstance(x, Group) and x.kind in ("list", "set") for x in (a, b)]
        if not isinstance(a, type(b)) or not all(loose) and a.kind != b.kind:
            return False, "collections of another kind"
        left = list(b.items)
        for item in a.items:
            candidates = left if all(loose) else left[:1]
            match = next((i for i, x in enumerate(candidates) if compare(item, x)[0]), None)
            if match is None:
                return False, "item by item"
            left.pop(match)
        return not left, "item by item"
    if not isinstance(a, Expr) or not isinstance(b, Expr):
        return False, "one value against several"
    if a == b or a.is_Rational and b.is_Rational:
        return a == b, "exact rational numbers" if a.is_Rational else "the same expression"
    if bool(a.free_symbols & ALL_UNITS) != bool(b.free_symbols & ALL_UNITS):
        bare = [x.as_independent(*ALL_UNITS, as_Add=False)[0] if x.is_Mul or x.is_Symbol else x
            for x in (a, b)]
        if not (bare[0].free_symbols | bare[1].free_symbols) & ALL_UNITS:
            return compare(*bare)
    symbols, count = a.free_symbols | b.free_symbols, 0
    for count, pair in enumerate(samples(a, b), 1):
        if not near(*pair):
            break
    else:
        if count >= (3 if symbols else 1):
            return True, f"expressions, at {count} points" if symbols else "numbers, to 150 digits"
    return False, f"expressions, at point {count}" if symbols else "numbers, to 150 digits"


def by_name(relation):
    """(y, x) = (2, 1) -> (x, y) = (1, 2)"""
    _, left, right = relation
    if not all(isinstance(x, Group) and x.kind == "()" and x.items for x in (left, right)):
        return relation
    names, values = zip(*sorted(zip(left.items, right.items), key=str))
    return Relation("=", Group("()", names), Group("()", values))


def same_relation(a, b):
    """2y = 4x + 2 is y = 2x + 1, -x < y is y > -x: the sides' difference, up to a factor."""
    if type(a) is not type(b) or not all(isinstance(x, Expr) for x in (*a[1:], *b[1:])):
        return False
    signs = [FLIPPED[x.sign] if ">" in x.sign else x.sign for x in (a, b)]
    pairs = list(samples(*((x.right - x.left) * (1 if ">" in x.sign else -1) for x in (a, b))))
    return signs[0] == signs[1] and len(pairs) > 2 and all(
        x != 0 != y and near(x * pairs[0][1], y * pairs[0][0]) and (
            signs[0] in ("=", "!=") or x / y > 0) for x, y in pairs)


def choice(text):
    """(B), B., Option B, (B) 42 -> ("B", what follows it); no choice: ("", text)."""
    match = re.fullmatch(r"(?:option |choice )?(\()? ?([A-Z])(?(1) ?\)|[.:)]?)"
        r"(?:(?<=[.:)]) ([\w\\$-].*))?", text, re.I)
    hedge = match and re.search(r"\([A-Z]\)|\b(?:and|or|not|is|wrong|no|maybe|perhaps|probably"
        r"|[B-H])\b", match[3] or "")
    return (match[2], match[3] or "") if match and match[2].isupper() and not hedge else ("", text)


def judge(response, gold):
    """-> (whether the response's answer equals the gold, the rung of the ladder that decided)"""
    answer, where = find_answer(response)
    if any(mark in gold for mark in ("\\boxed", "\\fbox", "#### ", "<answer>")):
        gold = find_answer(gold)[0] or ""
    if answer is None:
        return False, where
    try:
        text, gold = normalize(answer), normalize(gold)
        squeezed = [re.sub(r"(?<!\w) | (?!\w)|(?<=\d) (?=[a-z])", "", x) for x in (text, gold)]
        if squeezed[0] == squeezed[1]:
            return text != "", "the same text"
        (letter, value), (gold_letter, gold_value) = choice(text), choice(gold)
        if letter and gold_letter:
            same_value = not value or not gold_value or judge(value, gold_value)[0]
            return letter == gold_letter and same_value, "the choice letter"
        if gold.lower() in STOP or gold not in NAMES and re.fullmatch("[A-Za-z '-]{4,}", gold):
            return text.lower() == gold.lower(), "the same words"
        return compare(parse_math(value or text), parse_math(gold_value or gold))
    except Exception as error:  # sympy raises errors of many types, and model text finds them all
        return False, f"no way to compare: {error}"


def verify(response, gold):
    """True if the response's answer equals the gold answer. Never raises; not text: False."""
    return isinstance(response, str) and isinstance(gold, str) and judge(response, gold)[0]


# --------------------------------------------------------------------------------------------------
# 6. Many pairs, with a deadline, and the command line


class Worker:
    """A Python of its own that verifies pairs, a JSON line each; killed if late, then replaced."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def start(self):
        self.process = subprocess.Popen([sys.executable, __file__, "--worker"], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)  # no Ctrl-C
        self.process.stdout.readline()  # it has imported sympy: from here on time counts

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
            if late or not reply:
                self.process.kill()
                self.process.wait()
                self.process = None
            if late or reply:
                return reply == "true\n" and not late
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


def show(value):
    """What parse_math returned, for people."""
    if isinstance(value, Group):
        items = ", ".join(map(show, value.items))
        return f"{value.kind[0]}{items}{value.kind[1]}" if value.kind[0] in "([" else (
            f"{value.kind}: {items or 'nothing'}")
    if isinstance(value, Relation):
        return f"{show(value.left)} {value.sign} {show(value.right)}"
    if isinstance(value, Region):
        ends = sorted({*value.ends} - {MP.inf, -MP.inf})
        return "real numbers, with ends at " + ", ".join(MP.nstr(x, 8) for x in ends)
    return f"{value}"


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
    equal, rung = judge(*sys.argv[1:])
    print(f"answer      {answer or 'none'}   ({where})")
    for line, text in ("", answer), (f"gold        {sys.argv[2]}\n", sys.argv[2]):
        try:
            print(f"{line}  read as   {show(parse_math(text or ''))}")
        except Exception as error:  # as in `judge`
            print(f"{line}  read as   no mathematics: {error}")
    print(f"{'EQUAL' if equal else 'NOT EQUAL':11s} by: {rung}")
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
