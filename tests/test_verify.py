"""What verify.py calls equal. A wrong checker trains a wrong model, and no loss curve shows it."""

import gc
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

import verify as verify_module
from verify import extract_answer, normalize, parse_math, show, verify, verify_batch

ROOT = Path(__file__).resolve().parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"

# By kind: what the kind guards against, and three tables of pairs, one a line, `what stands in the box == the
# gold answer`: equal in both directions; the first answers the second, but not the other way round, since a
# gold that is a number asks for a value; in no direction.
KINDS = {
    "integers": ("Digits compared as text, or as floats, which end at 2^53.", r"""
        42 == 42
        -7 == -7
        +7 == 7
        −7 == -7
        007 == 7
        10^{20} == 100000000000000000000
        2^{100} == 1267650600228229401496703205376
        2^10 == 1024
        -2^2 == -4
        """, "", r"""
        41 == 42
        -7 == 7
        2^{100} == 2^{100}+1
        1/2^99 == 1/2^98
        9007199254740993 == 9007199254740992
        1 2 == 12
        (-2)^2 == -4
        """),
    "fractions": ("One value has many spellings, and TeX takes single digits: \\frac112 is not 1/12.", r"""
        \frac{3}{4} == 3/4
        \dfrac{3}{4} == 0.75
        \frac34 == 0.75
        \frac{-3}{4} == -3/4
        -\frac{1}{2} == \frac{1}{-2}
        \frac1{72} == 1/72
        6/8 == 3/4
        2\frac12 == 5/2
        -2\frac12 == -5/2
        ½ == 0.5
        2½ == 5/2
        """, r"""
        8/3 == \frac{4}{\frac32}
        """, r"""
        \frac{3}{4} == \frac{4}{3}
        -2\frac12 == -3/2
        \frac112 == 1/12
        \frac112 == 11/2
        \frac{1}{2}1 == 1/2
        \frac{4}{\frac32} == \frac{\frac43}{2}
        2 1/3 == 21/3
        1/0 == 0
        """),
    "decimals": ("A rounded decimal is another number: through floats, 0.333... is 1/3.", r"""
        0.75 == 3/4
        .5 == 1/2
        2.0 == 2
        2.50 == 2.5
        """, "", r"""
        0.333 == 1/3
        0.33333333333333333333 == 1/3
        0.500000001 == 1/2
        0.6667 == 2/3
        3.14 == \pi
        22/7 == \pi
        1.4142135623730950488016887242096980785696718753769480731766797379907324784621 == \sqrt2
        """),
    "percent": ("A percent is a factor of 1/100; checkers that drop the sign reward a mistake of 100.", r"""
        5\% == 0.05
        5% == 1/20
        12.5\% == 1/8
        25 \text{ percent} == 25\%
        """, r"""
        20\% == 20
        12.5% == 12.5
        5\% == 5
        """, r"""
        0.5\% == 0.5
        45\% == 45^\circ
        20\% == 200
        0.5\% == 0.5
        1\% == 1
        2000\% == 2
        3!\% == 6
        20\% == 20 \text{ cm}
        """),
    "money and thousands": ("A comma separates thousands, or the items of a list.", r"""
        $18 == 18
        \$18.50 == 18.5
        18 \text{ dollars} == 18
        1,234 == 1234
        1{,}234 == 1234
        10,\!000 == 10000
        1\,234\,567 == 1234567
        11,\! 111,\! 111 == 11111111
        \$1,234.50 == 1234.5
        1.5 million == 1500000
        100,200 == 100, 200
        100,200 == 100200
        -\$5 == -5
        $1,234.50 == \$1234.50
        """, "", r"""
        12,34 == 1234
        1,23 == 123
        1,234 == 1.234
        (1,234) == 1234
        \$3,\$4 == 34
        \$5 and \$6 == 5
        1,2345 == 12345
        0,001 == 1
        01,234 == 1234
        12;500 == 12,500
        """),
    "scientific notation": ("3.2e-4 is a number here, not 3.2 times e minus 4.", r"""
        3.2e-4 == 0.00032
        3.2\times10^{-4} == 0.00032
        3.2 x 10^-4 == 3.2e-4
        6.02\cdot 10^{23} == 602000000000000000000000
        """, r"""
        100/3 == 1/3*10^2
        """, r"""
        3.2e-4 == 3.2e-5
        3.2\times10^{4} == 3.2\times10^{-4}
        1/3*10^2 == 1/300
        3*10^2^2 == 90000
        0.2 == 2e-1
        """),
    "units": ("A unit may be left out, not exchanged; a text that denies the number is no unit.", r"""
        5\text{ cm} == 5
        5 cm == 5 \text{ centimeters}
        5\text{ m} == 5
        12\text{ square inches} == 12 \text{ in}^2
        12\ \mathrm{cm}^2 == 12
        60\text{ km/h} == 60 km/h
        60 \text{ miles per hour} == 60 mph
        42 apples == 42
        3 \text{ hours} == 3
        1\text{ day} == 1
        5\text{ in} == 5
        25\pi\text{ in}^2 == 25\pi
        8 meals == 8
        8 meals == 8 \text{ meals}
        7 candies == 7
        25\pi \text{ cm}^2 == 25\pi
        x = 5 \text{ cm} == 5
        864 \mbox{ inches}^2 == 864
        5 dollars per hour == 5
        5\text{ m/s} == 5
        5\,\mathrm{m}/\mathrm{s} == 5
        5\text{ m}^2 == 5
        """, "", r"""
        5\text{ cm} == 5\text{ m}
        5\text{ cm}^2 == 5\text{ cm}
        5\text{ cm} == 6
        3\text{ is wrong} == 3
        3\text{ or so} == 3
        not 3 == 3
        1 hour 30 minutes == 30
        2 feet 3 inches == 6
        3 boys 4 girls == 12
        5 dollars 25 cents == 125
        cm == 1
        men == 1
        12 m^2 n == 12 n
        5\mathbf{g} == 5
        3\cup == 3
        2\min == 2
        3\sec == 3
        5m == 5
        5 m == 5
        5\cos(3 cm) == 5
        7/(cm+9) == 7
        5 cm^{99} == 5
        5 cm/cm == 5
        5+cm == 5
        5 per cent == 5 \text{ cents}
        8 cm == 8^\circ
        8 meals == 8 cm
        8 halves == 8
        2x^3 ml == 2x^3
        y=2x^3 ml == y=2x^3
        8 dozen == 8
        8 squared == 8
        8 km/h == 8 km
        """),
    "degrees": ("Degrees alone are a unit; in a sine they are a factor.", r"""
        30^\circ == 30
        30° == 30^{\circ}
        30 \text{ degrees} == 30^\circ
        """, r"""
        1/2 == \sin 30^\circ
        1 == \tan 45°
        """, r"""
        30^0 == 30
        \sin 30 == 1/2
        30^\circ == 60^\circ
        \frac{\pi}{2}^\circ == \frac{\pi}{2}
        (3,\frac{\pi}{2}^\circ) == (3,\frac{\pi}{2})
        """),
    "roots": ("Surds are compared to more digits than a float has.", r"""
        \sqrt2 == \sqrt{2}
        √2 == \sqrt{2}
        \sqrt{12} == 2\sqrt{3}
        \sqrt[3]{16} == 2\sqrt[3]{2}
        \frac{1}{\sqrt2} == \frac{\sqrt2}{2}
        \sqrt{3+2\sqrt2} == 1+\sqrt2
        """, r"""
        4 == 8^{2/3}
        """, r"""
        \sqrt{2} == 2
        \sqrt[3]{16} == \sqrt{16}
        \sqrt23 == \sqrt{23}
        2+\sqrt3 == 2-\sqrt3
        \sqrt{2}+\sqrt{3} == \sqrt{5}
        """),
    "constants": ("pi, e and i are numbers; a letter beside them is not.", r"""
        4*pi == 4\pi
        2π/3 == \frac{2\pi}{3}
        3+4i == 4i+3
        \frac{1}{i} == -i
        \infty == +\infty
        \infty == infinity
        """, r"""
        -1 == i^2
        -1 == e^{i\pi}
        """, r"""
        i == -i
        3+4i == 3-4i
        \pi == e
        \infty == -\infty
        """),
    "expressions": ("Equal as functions, not as texts, and not at one lucky point only.", r"""
        x^2+2x+1 == (x+1)^2
        x**2+1 == 1+x²
        xy+yx == 2xy
        2^{n+1} == 2\cdot 2^n
        n 2^{n-1} == 2^{n-1}n
        \frac{x^2-1}{x-1} == x+1
        \frac{1}{x+1}-\frac{1}{x+2} == \frac{1}{(x+1)(x+2)}
        e^{2x} == (e^x)^2
        (-1)^{n+1} == -(-1)^n
        a_1+a_2 == a_{2}+a_{1}
        \sqrt{(1-x)(1+x)} == \sqrt{1-x^2}
        """, "", r"""
        2^{n+1} == 2^n+1
        (x+1)^2 == x^2+1
        x^2+1 == x^2-1
        \sqrt{x^2} == x
        \sqrt{q^2} == q
        \sqrt{x^2z^2} == xz
        \sqrt{x^2y} == x\sqrt{y}
        \sqrt{(x-10)^2} == 10-x
        \sqrt{(x+5)^2} == x+5
        5-x == \sqrt{x^2-10x+25}
        x\cos(1e-99) == x
        x(x-1)(x-2) == 0
        x == y
        2x == x
        x^2y == xy^2
        x+5 == |x+5|
        (-1)^{m+n} == (-1)^m
        (-1)^{n}\binom{n}{k} == \binom{n}{k}
        e^{1000}+x == e^{1000}
        \pi+10^{-200} == \pi
        """),
    "equations": ("x = 5 answers a gold of 5; an equation that does not hold answers nothing.", r"""
        x=5 == 5
        5=x == 5
        x = \frac64=\frac32 == 1.5
        y=2x+1 == 2y=4x+2
        y=2x+1 == 2x+1
        x^2+y^2=25 == y^2=25-x^2
        \frac{x}{2}+\frac{y}{3}=1 == 3x+2y=6
        2+3=5 == 5
        x=y == y=x
        2x=10 == x=5
        10=2x == x=5
        \frac{x}{2}=\frac52 == x=5
        (x-1)(x-2)=0 == x^2-3x+2=0
        x^2-3x+2=0 == x^2=3x-2
        y=(x-1)^2+2 == y=x^2-2x+3
        80+150=230 == 230
        80+150=230 miles == 230
        \frac{1}{2}\cdot 6 = 3 \text{ cm} == 3
        """, "", r"""
        5=6 == 6
        x=5 == y=5
        x=5 == x=6
        y=2x+1 == y=2x-1
        x^2=4 == x=2
        x = 2 = 3 == 3
        x = x == y = 2x+1
        x = x == x = 5
        xyz = 6 == 6
        tan x = 1 == sin x = 1
        f(2)=5 == f(3)=5
        f(x)=2x == f^{-1}(x)=2x
        x_1=3 == x_2=3
        3 \approx 4 == 3
        3.14... == 3.14
        Maybe = 5 == 5
        x-x=0 == 0x=5
        0=0 == x=5
        x^2=25 == x=5
        x(x-5)=0 == x=5
        xy=0 == y=0
        x=y == x=-y
        5=x=6 == 6
        5=5 == x=5
        0=0 == x=0
        1=1,-3 == x=1,-3
        x≠5 == 5
        x\≠5 == 5
        """),
    "tuples and lists": ("Lists match in any order, tuples in theirs; a missing item is a wrong answer.", r"""
        (1,2) == (1, 2)
        \left( \frac12, 3 \right) == (0.5,3)
        1, 2, 3 == 3, 2, 1
        1 \text{ and } 2 == 2, 1
        x = 2 or x = 3 == \{2, 3\}
        x=2, x=3 == 2,3
        x_1=2, x_2=3 == 3, 2
        (x,y)=(1,2) == (1,2)
        (1,2),(3,4) == (3,4), (1,2)
        x_1=3, x_2=2 == x_2=2, x_1=3
        1, 2, \text{ and } 3 == 1, 2, 3
        """, "", r"""
        (1,2) == (2,1)
        (1,2,3) == (1,2)
        1, 2 == 1, 2, 3
        3, 4 == 3
        3 or 4 == 3
        x = 2 or x = 3 == 2
        (1,2) == \{1,2\}
        1, 1, 2 == 1, 2, 2
        x=1, y=2 == x=2, y=1
        m = 2, b = 3 == (3,2)
        y=1, x=2 == (1,2)
        y=1, x=2 == 1,2
        (y,x)=(1,2) == (1,2)
        x_1=3, x_2=2 == x_1=2, x_2=3
        (2 or 3) == (2,3)
        [2 \text{ or } 3] == [2,3]
        (1 or 2, 3 or 4) == (1,2,3,4)
        (a,b,c)=(1,2) == (1,2)
        (x,x)=(1,2) == (1,2)
        (x,y)=5 == 5
        (1=1,2) == (1,2)
        \begin{pmatrix}a=1\\a=2\end{pmatrix} == \begin{pmatrix}1\\2\end{pmatrix}
        ((1,2),3) == (1,2,3)
        5, 5 == 5
        """),
    "sets": ("Sets have no order; the empty set is not the set of 0.", r"""
        \{1,2\} == \{2,1\}
        \left\{\frac12, 3\right\} == \{3, 0.5\}
        \emptyset == \varnothing
        ∅ == \{\}
        \{(1,2),(3,4)\} == \{(3,4),(1,2)\}
        """, "", r"""
        \{1,2,3\} == \{1,2\}
        \{0\} == \emptyset
        0 == \emptyset
        """),
    "intervals and unions": ("Open is not closed; a union has no order.", r"""
        [0,1] == \left[0,1\right]
        [0,\infty) == [0, +\infty)
        (-\infty,1)\cup(2,\infty) == (2,\infty)\cup(-\infty,1)
        (-inf,1) U (2,inf) == (-∞,1)∪(2,∞)
        (0, \sqrt{3+2\sqrt2}]\cup\{9\} == (0, 1+\sqrt2]\cup\{9\}
        [a,b) == [a, b)
        """, "", r"""
        [0,1] == (0,1)
        [0,1) == (0,1]
        (0,1) == (0,2)
        (-\infty,1)\cup(2,\infty) == (-\infty,1]\cup(2,\infty)
        (-\infty,1)\cup(2,\infty) == (-\infty,2)
        [0,1)\cup(1,2] == [0,2]
        x<0 \text{ and } x>1 == (3,1)
        x<0 and x>1 == (5,5)
        1<x<0 == (1,0)
        1<x<2 == (1,3)
        \emptyset\cup\emptyset == (2,1)
        (1,0)\cup(1,0) == (5,5)
        \emptyset == (1,0)
        x \in \emptyset == (3,1)
        x \in A == A
        (0,1)\cup(2,3) == (0,1), (2,3)
        """),
    "inequalities": ("A direction turns when divided by a negative number; strict is not weak.", r"""
        2x>6 == x>3
        -2x<6 == x>-3
        5>x>-2 == -2<x<5
        x≥4 == 4 \leq x
        2x+2y>6 == x+y>3
        b \ge a == a \le b
        a<b<c == c>b>a
        x<1 \text{ or } x>2 == x>2 \text{ or } x<1
        x \neq 5 == 5 \neq x
        x>3, y>2 == y>2, x>3
        """, "", r"""
        x>3 == x<3
        x\ge3 == x>3
        x>3 == y>3
        -2x<6 == x<-3
        -2<x<5 == -2\le x<5
        x < 1 \text{ or } x > 2 == x > 2
        2x+2y>6 == x+y<3
        x<1 \text{ or } x>2 == x<1 \text{ and } x>2
        a<b == b<a
        a \le b == a < b
        x<x+1 == y<y+1
        -x<3 == x<-3
        """),
    "matrices": ("Item by item, and of one shape: a row is not a column.", r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{bmatrix}1 & 2\\ 3 & 4\end{bmatrix}
        \begin{pmatrix}1\\2\\\end{pmatrix} == \begin{pmatrix} 1 \\ 2 \end{pmatrix}
        \left(\begin{array}{cc}1&2\\3&4\end{array}\right) == \begin{pmatrix}1&2\\3&4\end{pmatrix}
        \begin{pmatrix}x&0\\0&1\end{pmatrix} == \begin{pmatrix}\frac{2x}{2}&0\\0&1\end{pmatrix}
        """, "", r"""
        \begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{pmatrix}1&3\\2&4\end{pmatrix}
        \begin{pmatrix}1\\2\end{pmatrix} == \begin{pmatrix}1&2\end{pmatrix}
        \begin{pmatrix}1&2&3&4\end{pmatrix} == \begin{pmatrix}1&2\\3&4\end{pmatrix}
        \begin{pmatrix}1&2&3\\4\end{pmatrix} == \begin{pmatrix}1&2\\3&4\end{pmatrix}
        """),
    "plus-minus": ("It stands for two values; one of them is half an answer. Only the same text is right.", r"""
        \pm 3 == \pm3
        ±3 == \pm 3
        """, "", r"""
        \pm3 == 3
        2\pm\sqrt3 == 2+\sqrt3
        1\pm\sqrt2 == 1\pm\sqrt3
        x \neq \pm 5 == x \neq 5
        x > \pm 5 == x > 5
        x \neq \pm 5 == \mathbb{R}
        \pm 3 == 3, -3
        x = \pm 3 == \{-3, 3\}
        """),
    "functions": ("Arguments without brackets, inverse functions, the base of a log.", r"""
        \ln 4 == 2\ln 2
        \ln 2+\ln 3 == \ln 6
        \sin 2x == 2\sin x\cos x
        -\frac{1}{2}\cos 2t + 1 == 1-\frac{\cos(2t)}{2}
        \log 6 == \log 2+\log 3
        \log_2 3 == \frac{\ln3}{\ln2}
        \log x^2 y == \log(x^2y)
        \ln\frac{x}{y} == \ln x-\ln y
        \sqrt{8x^3} == 2x\sqrt{2x}
        """, r"""
        3 == \log_2 8
        \log(x^2) == 2\log x
        2 == \log_{10} 100
        3 == \frac{\log 8}{\log 2}
        \frac12 == \sin\frac{\pi}{6}
        1 == \cos^2 x + \sin^2 x
        """, r"""
        \cos x == \sin x
        \sin^{-1}(1) == \frac{1}{\sin 1}
        \sec^{-1} x == \cos x
        \sin^{-1}(1) == \frac{\pi}{2}
        \ln 2 == \log_2 e
        \log 100 == \ln 100
        \sin 2x == 2\sin x
        \sin 2\sqrt{x} == \sqrt{x}\sin 2
        \ln _2 8 == \ln 8
        \sin _{2} x == \sin x
        """),
    "factorials and binomials": ("5! is 120, and not an excited 5.", r"""
        5! == 120
        """, "", r"""
        5! == 5
        \binom53 == 20
        \binom{n}{2} == \frac{n(n+1)}{2}
        3!! == 720
        3!! == 3
        """),
    "number bases": ("To convert is the question: 42 does not answer 52_8, nor the other way round.", r"""
        52_8 == 52_{8}
        2A_{16} == 2A_16
        (1010)_2 == 1010_2
        \text{52}_8 == 52_{8}
        """, "", r"""
        52_8 == 52_9
        52_8 == 52
        52_8 == 42
        1010_2 == 12_8
        \frac{1010_2}{10_2} == 5
        89_8 == 89
        0x1F == 0
        0x1F == 31
        """),
    "choices": ("A letter, in whatever dress; two letters are hedging.", r"""
        (B) == B
        B) == B
        \textbf{(B)} == Option B
        \text{B} == (B)
        B. == B
        Option B == B
        """, "", r"""
        (C) == B
        A, B == A
        A or B == A
        (A) or (B) == A
        (A) is wrong == A
        (A) B == A
        A. 5, B. 6 == A
        (A) maybe B == A
        \textbf{(B)} 43 == 42
        (B) 43 == (B) 42
        \textbf{(C)} 42 == B
        b+1 == B
        (B) but also A == B
        (B) or A == B
        B A == B
        B and C == B
        A/B == A
        A=B == B
        (A)=(B) == B
        ab == AB
        6 mp == 6 pm
        """),
    "words": ("Where the gold is a word, letters count, not their product: north is not thorn.", r"""
        Thursday == thursday
        \text{Yes} == yes
        \text{no solution} == No solution
        """, "", r"""
        Thursday == Tuesday
        north == thorn
        top == pot
        IV == VI
        BAC == ABC
        \text{dog} == \text{cat}
        \text{yes, or no} == yes
        \text{not odd} == odd
        """),
    "dress": ("What stands around an answer, and what Unicode offers, changes no value.", r"""
        6. == 6
        {6} == 6
        **42** == 42
        \boxed{6} == 6
        \left(\frac{1}{2}\right) == 1/2
        \displaystyle \frac{1}{2} == 1/2
        \mathbf{7} == 7
        3{x} == 3x
        2 m == 2m
        \dfrac{x}{2} == \frac x2
        """, "", r"""
        x₁ == x^1
        x2 == x²
        4\text{ }2 == 24
        ① == 1
        5' == 5
        \overline{5} == 5
        x²³ == x^{23}
        2^2^3 == 256
        5? == 5
        5 mod 3 == 5
        5:6 == 5
        """),
    "hedging": ("One answer must be given; nothing, or more, is wrong.", r"""
        12 == 12
        """, "", r"""
        not 12 == 12
        12 maybe == 12
        12 or 13 == 12
        12, 12.5 == 12
        12? == 12
        ? == 12
        \ldots == 12
        x == 12
        """),
    "functions of numbers": ("Application read as a product: f(0) is not 0.", "", "", r"""
        f(0) == 0
        f(0)+3 == 3
        I(0)e^t == 0
        x(0) == 0
        x(1) == x
        g(1) == g
        f(x) == fx
        f^{-1}(0) == 0
        """),
    "tiny and large numbers": ("A tolerance turns a tiny number into 0, an overflow a large one into anything.",
        "", "", r"""
        e^{-400} == 0
        e^{-90} == 0
        \frac{e^{400}-e^{-400}}{e^{400}+e^{-400}} == 1
        x+10^{-60} == x
        x+10^{-39} == x
        x+e^{-85} == x
        \pi+10^{-39} == \pi
        \sqrt2\cos(10^{-39}) == \sqrt2
        x\cos(10^{-60}) == x
        x^{1+10^{-39}} == x
        \sqrt{2+10^{-60}} == \sqrt2
        1e-1000+x == x
        \infty+1 == \infty
        3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798214808651 == \pi
        1.00000000000000000000000000000000000000000000000000000000001x == x
        \infty == 10^{40}
        1/0 == \infty
        """),
    "points where a value is complex": ("A formula that agrees only where it was looked at is another formula.",
        "", "", r"""
        x+(\sqrt{x^2}-x) == x
        \sqrt{-x}+x-\sqrt{-x}+1 == x
        (-1)^{2n} == (-1)^n
        \ln x^2 == (\ln x)^2
        (-1)^n == 1
        """),
    "mixed numbers": ("2\\frac12 is 5/2, however it is spaced; what could be a product is refused.",
        "", "", r"""
        2\frac{ 1 }{ 2 } == 1
        2\frac{\;1}{2} == 1
        2\frac{1}{2}\% == 2.005
        2\frac{1}{2}^2 == 2.25
        3\frac{3}{2} == \frac92
        3\frac12 == \frac32
        2\frac{3}{2}x == 3x
        x2 == 2x
        \sqrt{2}3 == 3\sqrt2
        """),
    "values, not the question again": ("Where the gold is a number, what still has to be computed is no answer: a policy would copy.",
        r"""
        \frac{14}{2} == 7
        14/2 == 7
        7.0 == 7
        2^{10} == 1024
        5! == 120
        3\times10^4 == 30000
        -\frac{6}{3} == -2
        3+4=7 == 7
        \frac{\frac{28}{2}}{2} == 7
        \frac{3}{2^{10}} == 3/1024
        2^{\frac{20}{2}} == 1024
        """, r"""
        7 == 3+4
        7 == \sqrt{49}
        12 == 3\cdot 4
        12 == 2(6)
        48 == 7^2-1
        7 == \frac{3+4}{1}
        20160 == \frac{8!}{2!}
        132 == 12!/10!
        4 == \frac{2^{10}}{2^8}
        \frac32 == \frac34/\frac12
        7 == \frac{1}{\frac17}
        \frac23 == \frac{1\frac12}{2\frac14}
        720 == (3!)!
        2000 == \frac{6\cdot10^{23}}{3\cdot10^{20}}
        500 == (1.5\times10^8)/(3\times10^5)
        1000 == \frac{1\cdot10^5}{10^2}
        36000000 == (6\cdot10^3)^2
        648 == \frac{36^2}{2}
        3 == \frac{24}{2^3}
        282475249 == \frac{7^{12}}{49}
        9 == (\frac{6}{2})^2
        720 == (12/2)!
        \frac{9}{16} == \frac{(3/2)^2}{4}
        5 == -(-5)
        5 == --5
        7 == \frac{14}{1+1}
        7 == \frac{2\cdot7}{2}
        7 == 49^{1/2}
        16 == 2^{2^2}
        7 == 7+0
        7 == 7\cdot1
        7 == x=3+4
        5 == x=2+3
        x=5 == x=2+3
        x=5 == x=\sqrt{25}
        (7,2) == (3+4, 2)
        \{7\} == \{3+4\}
        7, 2 == 7, 1+1
        \begin{pmatrix}7\\2\end{pmatrix} == \begin{pmatrix}3+4\\2\end{pmatrix}
        i == \sqrt{-1}
        1 == \ln e
        1 == \sin 90^\circ
        x=5 == x+2=7
        x=5 == 3x-15=0
        x>5 == x+1>6
        """, r"""
        x+2=7 == 5
        3x-15=0 == 5
        x+1>6 == (5,\infty)
        """),
    "not read": ("Equal, but of a kind that real data hardly needs: refused, as the docstring says.",
        "", "", r"""
        2 1/3 == 7/3
        {3 \over 4} == 3/4
        0.\overline{3} == \frac13
        0.1\overline{6} == \frac16
        \frac13 \approx 0.333 == 1/3
        10⁻⁴ == 0.0001
        √16 == 4
        ∛16 == 2\sqrt[3]{2}
        \alpha+\beta == β + α
        |x-1| == |1-x|
        f(x)=2x == 2x
        \text{Area} = 24 == 24
        P(A) = \frac{5}{36} == \frac{5}{36}
        y=2, x=1 == (x,y)=(1,2)
        m = 3, b = 2 == (3,2)
        \mathbb{R}\setminus\{1\} == (-\infty,1)\cup(1,\infty)
        [0,1]\cup[1,2] == [0,2]
        ]0,1[ == (0,1)
        -2 < x < 5 == (-2,5)
        x \in (-2,5) == -2<x<5
        x \le 4 == (-\infty, 4]
        x < 1 \text{ or } x > 2 == (-\infty,1)\cup(2,\infty)
        x \neq 1 == (-\infty,1)\cup(1,\infty)
        |x| < 2 == -2<x<2
        \{x \mid x > 3\} == x>3
        \begin{pmatrix}\frac12&0\\0&1\end{pmatrix} == \frac12\begin{pmatrix}1&0\\0&2\end{pmatrix}
        [[1,2],[3,4]] == \begin{pmatrix}1&2\\3&4\end{pmatrix}
        \frac{n!}{(n-1)!} == n
        \frac{10!}{3!\,7!} == \binom{10}{3}
        \binom52 == 10
        {6 \choose 3} == 20
        \binom{n}{2} == \frac{n(n-1)}{2}
        \textbf{(B)} 42 == B
        \textbf{(B)}\ 42 == 42
        １２３ == 123
        x₁ + 1 == x_1+1
        """),
}


def lines(text):
    some = [line for line in text.split("\n") if line.strip()]
    return [tuple(part.strip() for part in line.split(" == ")) for line in some]


PAIRS = []  # (kind, what stands in the box, gold, whether they are equal)
for kind, (_, both, one_way, neither) in KINDS.items():
    PAIRS += [(kind, *pair, True) for a, b in lines(both) for pair in ((a, b), (b, a))]
    PAIRS += [x for a, b in lines(one_way) for x in ((kind, a, b, True), (kind, b, a, False))]
    PAIRS += [(kind, *pair, False) for a, b in lines(neither) for pair in ((a, b), (b, a))]
GOLDS = sorted({gold for _, _, gold, _ in PAIRS})


IDS = [f"{kind}: {answer} | {gold}" for kind, answer, gold, _ in PAIRS]


@pytest.mark.parametrize("kind, answer, gold, equal", PAIRS, ids=IDS)
def test_pair(kind, answer, gold, equal):
    """Each family, as its sentence in KINDS says, in both directions."""
    assert verify(f"So \\boxed{{{answer}}}.", gold) is equal, f"{kind}: {KINDS[kind][0]}"


@pytest.mark.parametrize("gold", GOLDS)
def test_gold_is_equal_to_itself(gold):
    """A gold that does not equal itself makes its problem unsolvable, silently. And no constant answer
    is a key to all doors."""
    assert verify(f"\\boxed{{{gold}}}", gold)
    assert not verify("\\boxed{987654321}", gold)
    assert not verify("\\boxed{}", gold) and not verify("", gold)


# ---------------------------------------------------------------------------------------------------
# Where the answer stands

EXTRACTED = {
    "a box": (r"The answer is \boxed{4}.", "4"),
    "the last box": (r"\boxed{3}, no, \boxed{4}", "4"),
    "a box in a box": (r"\boxed{\boxed{4}}", r"\boxed{4}"),
    "nested braces": (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    "deeply nested": (r"\boxed{a{b{c}d}e} and {x}", "a{b{c}d}e"),
    "escaped braces": (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    "white space": (r"\boxed { 4 }", "4"),
    "a box without braces": (r"so \boxed 4$", "4"),
    "another box": (r"\fbox{4}", "4"),
    "a box never closed": (r"\boxed{4", None),
    "the last box never closed": (r"\boxed{3} and \boxed{4", None),
    "an answer tag": ("<answer> 4 </answer>", "4"),
    "an answer tag never closed": ("<answer> 4", None),
    "a box in a tag": (r"<answer>\boxed{4}</answer>", "4"),
    "GSM8K's form": ("She has 2+2 apples.\n#### 4", "4"),
    "the last mark": ("#### 3\n#### 4\n", "4"),
    "the last of several kinds": ("\\boxed{3}\n#### 4", "4"),
    "a phrase": ("The final answer is 4. I hope it is correct.", "4"),
    "a label": ("**Answer:** 4", "4"),
    "a label and a new line": ("The final answer is:\n\\[\n4\n\\]", "4"),
    "a phrase that names none": (r"\boxed{4}. The answer is correct.", "4"),
    "nothing but an answer": ("4", "4"),
    "nothing but an equation": ("$x = 4$", "$x = 4$"),
    "a word alone": ("Thursday", "Thursday"),
    "prose": ("I think it could be 4 but I am not sure", None),
    "short prose": ("It is 4", None),
    "two lines": ("2\n\n(2)", None),
    "a letter after a box": (r"\boxed{4}. The answer is a.", "4"),
    "after the thinking": (r"<think>\boxed{3}</think>\boxed{4}", "4"),
    "in the thinking only": (r"<think>\boxed{4}</think>I do not know.", None),
    "a mark in the thinking only": ("<think>#### 4</think>Well.\nFour, perhaps.", None),
    "thinking never closed": (r"<think>It is \boxed{4}", None),
    "thinking begun again": (r"<think>a</think>\boxed{4}<think>wait", None),
    "thinking opened by the prompt": (r"It is \boxed{3}.</think>\boxed{4}", "4"),
    "nothing": ("I do not know.", None),
    "empty": ("", None),
}


@pytest.mark.parametrize("response, answer", EXTRACTED.values(), ids=EXTRACTED)
def test_extract_answer(response, answer):
    """Where the answer stands: never in the thinking, and the last one counts."""
    assert extract_answer(response) == answer
    assert verify(response, "4") == (answer is not None and "4" in answer)


@pytest.mark.parametrize("gold", [r"\boxed{4}", "2 + 2 is 4\n#### 4", "$4$", "<answer>4</answer>"])
def test_a_gold_in_its_solution(gold):
    """Data sets store golds as they are, or inside of solutions."""
    assert verify("\\boxed{4}", gold) and not verify("\\boxed{5}", gold)


NOT_TEXT = [(None, "4"), (r"\boxed{4}", None), (r"\boxed{4}", 4), (4, "4"), (b"4", "4")]


@pytest.mark.parametrize("response, gold", NOT_TEXT)
def test_not_text(response, gold):
    """Anything but text is not equal to anything; a training run must not die of it."""
    assert verify(response, gold) is False
    assert verify_batch([response], [gold]) == [False]


def test_parse_math_says_what_it_cannot_read():
    """A parser that returns None for everything strange hides its own bugs."""
    assert show(parse_math(normalize(r"\dfrac{2}{4}"))) == "0.5"
    for text, reason in [(r"\int x", "int"), ("3 wrongs", "wrong"), ("(1", "end' was not"), ("x" + "^2" * 3, "twice"),
            ("1 2", "side by side"), ("x" * 2001, "longer"), ("1\u202e2", "not expected"), ("f(0)", "function"),
            ("9" * 401, "large"), ("1," * 40 + "1", "items"), (r"\sin " * 17 + "x", "16 powers"), ("52_8", "base")]:
        with pytest.raises(ValueError, match=reason):
            parse_math(normalize(text))


# ---------------------------------------------------------------------------------------------------
# What a model under reward writes

N = 10**6
HOSTILE = {
    "code": r"\boxed{__import__('os').system('touch pwned')}",
    "more code": "\\boxed{exec(\"open('pwned','w')\")}",
    "a tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "a tower of symbols": r"\boxed{x^{x^{x^{x^{x^x}}}}}",
    "a symbol on a tower": r"\boxed{9^{9^{9^{9^x}}}}",
    "powers of powers": r"\boxed{" + "(" * 20 + "x" + "+1)^{9999}" * 20 + "}",
    "carets": "\\boxed{2" + "^2" * 900 + "}",
    "digits": "\\boxed{" + "9" * 10**7 + "}",
    "digits after the point": "\\boxed{0." + "3" * N + "}",
    "thousands": "\\boxed{1" + ",000" * (N // 4) + "}",
    "a rounded exponential": r"\boxed{\lfloor \exp(10^{7}) \rfloor}",
    "a power of powers of digits": r"\boxed{((9^{9999})^{9999})^{99}}",
    "a root of something huge": r"\boxed{(3^{9999}+2)^{1/7}}",
    "logs of logs": r"\boxed{" + r"\ln " * 200 + "2}",
    "complex functions in phrases": ("answer: " + "+".join([r"\arcsin(3+x+iy)"] * 20) + "\n") * 3,
    "blanks and a sign": r"\boxed{" + "~" * 1900 + "1=}",
    "large factorials": r"\boxed{99999!}",
    "factorials of factorials": r"\boxed{((((x!)!)!)!)!}",
    "binomials": r"\boxed{\binom{10^9}{10^8}}",
    "symbolic binomials": r"\boxed{\binom{y}{100}}",
    "a sum of large fractions": r"\boxed{" + "+".join(rf"\frac1{{{p}^{{4000}}}}" for p in range(2, 60)) + "}",
    "the sine of something huge": r"\boxed{\sin((x+1)^{10000})}",
    "functions in functions": r"\boxed{" + r"\ln(1+" * 24 + "x" + ")" * 24 + "}",
    "functions of functions": r"\boxed{" + r"\sin" * 500 + " x}",
    "roots in roots": r"\boxed{" + r"\sqrt{1+" * 24 + "2" + "}" * 24 + "}",
    "bars in bars": r"\boxed{" + r"\left|x-" * 24 + "2" + r"\right|" * 24 + "}",
    "floors": r"\boxed{\lfloor \sqrt{3+2\sqrt2}-\sqrt2 \rfloor}",
    "plus-minus": r"\boxed{" + r"\pm1" * 100 + "}",
    "a long list": r"\boxed{" + ",".join(map(str, range(500))) + "}",
    "a long union": r"\boxed{" + r"\cup".join(rf"(\sqrt{{{2 * i}}},\sqrt{{{2 * i + 1}}})" for i in range(35)) + "}",
    "a giant matrix": r"\boxed{\begin{pmatrix}" + "&".join(["1"] * 10**5) + r"\end{pmatrix}}",
    "many symbols": r"\boxed{\sqrt{" + "+".join(f"x_{{{i}}}^2" for i in range(80)) + "}}",
    "boxes": "\\boxed{" * 10**5,
    "boxes in boxes": "\\boxed{" * 10**5 + "}" * 10**5,
    "open braces": "\\boxed{" + "{" * 10**5,
    "braces": "\\boxed{" + "{" * 10**5 + "}" * 10**5 + "}",
    "fractions": "\\boxed{" + "\\frac" * 300 + "12}",
    "thinking": "<think>" * (N // 7),
    "thinking closed": "</think>" * (N // 8),
    "answer tags": "<answer>" * (N // 8),
    "phrases": "answer is " * (N // 10),
    "a tower one level up": r"\boxed{x^{7^{x^6}}}",
    "an exponential of an exponential": r"\boxed{e^{e^{x^5}}}",
    "the sine of it": r"\boxed{\sin(e^{e^{9x}})}",
    "a hyperbolic function of itself": r"\boxed{\sinh(\sinh(99x^3))}",
    "its own definition": r"\boxed{\frac{e^{e^{99x^3}}-e^{-e^{99x^3}}}{2}}",
    "sines of sums": r"\boxed{" + "+".join([r"\sin\sqrt x"] * 70) + "}",
    "roots side by side": r"\boxed{" + r"\sqrt{-x}" * 55 + "}",
    "one exponential of many": r"\boxed{" + "+".join(f"e^{{{n}x}}" for n in range(45)) + "}",
    "large powers of fractions": r"\boxed{" + r"\frac{" * 20 + "7^{399}" + "}{3^{399}}" * 20 + "}",
    "equalities": r"\boxed{" + "=".join([r"\sqrt{x}"] * 50) + "}",
    "three phrases": ("The answer is " + "+".join([r"\sin\sqrt x"] * 70) + "\n") * 3,
    "lists of equal items": r"\boxed{" + ",".join([r"\sqrt{-x-1}"] * 30) + "}",
    "a unit and digits": "\\boxed{" + "1a" * 990 + "}",
    "mixed": "\\boxed{" + "1 " * 990 + "}",
    "braces and spaces": "\\boxed{" + "{ " * 900 + "}" * 900 + "}",
    "environments": "\\boxed{" + r"\begin{pmatrix}" * 120 + "}",
    "commas": "\\boxed{" + "1,000" * 390 + "}",
    "a box of 10 MB": "\\boxed{4}" + " " * 10**7,
    "a phrase and spaces": "answer" + " " * N,
    "marks": "#" * N,
    "white space": "\\boxed{" + " " * N + "}",
    "backslashes": "\\" * N,
    "signs": "\\boxed{" + "-" * 1989 + "4}",
    "percents": "\\boxed{4" + "%" * 1900 + "}",
    "texts": "\\boxed{" + "\\text{" * 280 + "}" * 280 + "}",
    "dollars": "\\boxed{" + "$" * 1990 + "}",
    "null bytes": "\\boxed{4\0}",
    "right to left": "\\boxed{\u202e4}",
    "a right-to-left mark": "\\boxed{4\u200f}",
    "half a character": "\\boxed{\ud800}",
    "accents": "\\boxed{" + "4\u0301" * 500 + "}",
    "a letter that is eighteen": "\\boxed{" + "\ufdfa" * 1990 + "}",
}
HOSTILE_GOLDS = ["4", "x+1", r"\sqrt2", "(0,1)", r"\{1,2\}", "x>3", "B"]


@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE)
def test_hostile_responses(response, tmp_path, monkeypatch):
    """All wrong, each in under 0.1 s (of CPU time: other work may share the machine), on the main
    thread and off it, where no signal could stop it; and nothing of it was run."""
    monkeypatch.chdir(tmp_path)

    def check():
        for gold in HOSTILE_GOLDS:
            start = time.thread_time()
            out.append(verify(response, gold))
            worst.append(time.thread_time() - start)

    out, worst = [], []
    gc.collect()
    gc.disable()  # what pytest has piled up is not ours to walk through
    check()
    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    gc.enable()
    assert out == [False] * 2 * len(HOSTILE_GOLDS) and max(worst) < 0.1 and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_responses_need_little_memory():
    """All of them in one process, their own 40 MB included: under 300 MB at the peak."""
    code = ("import re, sys; sys.path[:0] = sys.argv[1:]; from test_verify import HOSTILE, verify\n"
        "wrong = [verify(response, gold) for response in HOSTILE.values() for gold in ('4', 'x+1')]\n"
        "print(any(wrong), *re.findall(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read()))")
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests")]
    accepted, kilobytes = subprocess.run(command, capture_output=True, text=True).stdout.split()
    assert accepted == "False" and int(kilobytes) < 300_000


def random_expression(rng, depth):
    if depth == 0:
        return rng.choice(["x", "y", "n", "2", "3", "7", r"\pi"])
    a, b = random_expression(rng, depth - 1), random_expression(rng, rng.randrange(depth))
    return rng.choice([f"({a}+{b})", f"({a}-{b})", rf"{a}\cdot {b}", rf"\frac{{{a}}}{{{b}}}", f"({a})^{{2}}",
        rf"\sqrt{{{a}}}", f"({a})({b})", rf"\sin({a})", f"-({a})"])


def test_random_expressions():
    """Rewritten without a change of value, and changed by a little: against what is known by construction."""
    rng, checked = random.Random(0), 0
    for _ in range(300):
        e = random_expression(rng, rng.randrange(1, 4))
        value = parse_math(normalize(e))
        known = [x for x in value.at if verify_module.MP.isfinite(x)]
        if len(known) < 4 or value.plain:
            continue  # defined nowhere, or a number, of which no formula is an answer
        checked += 1
        same = rng.choice([f"({e})+1-1", rf"\frac{{2({e})}}{{2}}", f"-(-({e}))", f"(({e})+y)-y", f"3({e})-2({e})"])
        other = rng.choice([f"({e})+1", rf"({e})+\frac{{1}}{{1000}}", f"({e})+x", f"({e})-10^{{-20}}"])
        assert verify(f"\\boxed{{{same}}}", e), (same, e)
        assert not verify(f"\\boxed{{{other}}}", e), (other, e)
    assert checked > 150


def test_numbers_in_fractions():
    """Fractions and powers of integers, at random, against Python's own: no digit is lost."""
    rng = random.Random(0)
    for _ in range(300):
        a, b, n = rng.randint(1, 9**9) * rng.choice((-1, 1)), rng.randint(1, 9**9), rng.randint(-4, 4)
        value = Fraction(a, b) ** n
        answer = rf"\boxed{{(\frac{{{a}}}{{{b}}})^{{{n}}}}}"
        assert verify(answer, str(value))
        assert not verify(answer, f"{value.numerator + 1}/{value.denominator}")


def test_random_text():
    """Bytes, and pieces of LaTeX in any order: no error, no wait, and no lucky hit."""
    rng, slowest = random.Random(0), 0
    pieces = r"\frac { } 1 2 x ^ _ \sqrt ( ) [ ] , \pm + - = < \cup \infty \{ \} | ! % e i \text{cm} \ln \sin".split()
    pieces += r"\binom & \\ \begin{pmatrix} \end{pmatrix} or 9 \pi \boxed{ $ . \log_ ^{-1} \in ° ² ½ √".split()
    for _ in range(1500):
        latex = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 30)))
        noise = "".join(chr(rng.randrange(0x110000)) for _ in range(30))
        for text in (latex, noise, rng.randbytes(60).decode("latin1")):
            start = time.thread_time()
            assert verify(f"\\boxed{{{text}}}", "8675309") is False
            slowest = max(slowest, time.thread_time() - start)
    assert slowest < 0.1


# ---------------------------------------------------------------------------------------------------
# Real problems


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not in ../shared/data/gsm8k")
@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_gsm8k(name):
    """Each gold is found in the solution that ends in it; the next problem's gold, if another, is not."""
    rows = [json.loads(line) for line in (GSM8K / name).read_text().splitlines()]
    solutions = [row["answer"] for row in rows]
    golds = [solution.rpartition("#### ")[2] for solution in solutions]
    for solution, gold, other in zip(solutions, golds, golds[1:]):
        assert verify(solution, gold)
        if gold.replace(",", "") != other.replace(",", ""):
            assert not verify(solution, other)


# ---------------------------------------------------------------------------------------------------
# The worker


def test_verify_batch():
    """In order, one verdict a pair, the same as without it."""
    pairs = [(f"\\boxed{{{a}}}", b) for _, a, b, _ in PAIRS]
    assert verify_batch(*zip(*pairs)) == [equal for *_, equal in PAIRS]
    assert verify_batch([], []) == []
    with pytest.raises(AssertionError, match="2 responses, 1 golds"):
        verify_batch(["4", "5"], ["4"])


def test_a_killed_worker_is_replaced():
    """The kernel kills what takes too much memory. One reward may be lost to that, not the run."""
    assert verify_batch(["\\boxed{4}"], ["4"]) == [True]
    first = verify_module.WORKER.process
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert verify_batch(["\\boxed{4}", "\\boxed{5}"], ["4", "4"]) == [True, False]
    assert verify_module.WORKER.process is not first


def test_the_deadline(tmp_path, monkeypatch):
    """A pair that takes too long is wrong, and costs its deadline, not the batch."""
    slow = tmp_path / "verify.py"  # the same, but for one response that sleeps
    slow.write_text((ROOT / "verify.py").read_text().replace("def verify(response, gold):",
        "def verify(response, gold):\n    time.sleep(60 * (response == 'slow'))"))
    spec = importlib.util.spec_from_file_location("slow_verify", slow)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    start = time.monotonic()
    assert module.verify_batch(["4", "slow", "4"], ["4", "4", "4"], timeout=1) == [True, False, True]
    assert 1 <= time.monotonic() - start < 40
    module.WORKER.process.kill()


def test_many_threads():
    """Each call gets its own verdicts, not those of another thread's pairs."""

    def check(n):
        golds = [str(i) for i in range(20)]
        responses = [f"\\boxed{{{i if i != n else 99}}}" for i in range(20)]
        wrong[n] = [i for i, right in enumerate(verify_batch(responses, golds)) if not right]

    wrong = {}
    threads = [threading.Thread(target=check, args=[n]) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == {n: [n] for n in range(8)}


def test_the_worker_ends_with_its_process():
    """A process that is gone, however it ended, leaves no worker behind."""
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import verify\n"
        "assert verify.verify_batch(['4'], ['4']) == [True]\n"
        "print(verify.WORKER.process.pid, flush=True); os._exit(1)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    for _ in range(100):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


# ---------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "words, status, says",
    [
        ([r"<think>so</think>\boxed{\frac34}", "0.75"], 0, ["0.75", "EQUAL", "numbers", "last box"]),
        ([r"\boxed{\{1, x\}}", r"\{1,2\}"], 1, ["set: 1.0, a formula in x", "set: 1.0, 2.0", "NOT EQUAL", "item by item"]),
        ([r"\boxed{[0,1)\cup(2,3)}", "x>1"], 1, ["union: [0.0, 1.0), (2.0, 3.0)", "<: 1.0, a formula in x", "several"]),
        ([r"\boxed{3+4}", "7"], 1, ["7.0", "NOT EQUAL", "still has to be computed"]),
        ([r"\boxed{5 cm}", "5 m"], 1, ["5 cm", "NOT EQUAL"]),
        ([r"\boxed{\int x}", "4"], 1, ["'\\\\int' was not expected", "no mathematics"]),
        (["It is hard to say.", "4"], 1, ["none", "no answer"]),
        ([r"\boxed{3/4}"], 2, ["usage"]),
        ([], 2, ["usage"]),
    ],
)
def test_command_line(words, status, says, monkeypatch, capsys):
    """0: equal, 1: not equal, 2: called wrongly; and it says what it has read, and what decided."""
    monkeypatch.setattr(sys, "argv", ["verify.py", *words])
    with pytest.raises(SystemExit) as end:
        verify_module.main()
    assert end.value.code == status
    printed = capsys.readouterr()
    for text in says:
        assert text in (printed.err if status == 2 else printed.out)


def test_command():
    """python verify.py, as the README has it."""
    command = [sys.executable, ROOT / "verify.py", r"\boxed{50\%}", "1/2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
