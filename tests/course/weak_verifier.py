"""Seven verifiers, each with a rule that sounds good enough and can be fooled. Exercise 6 fools them.

A verifier decides a reward: a wrong response that it accepts is a response that training asks for more of.
Each takes (response, gold) and returns a bool, as verify.verify does. Each can also be a run's reward:

    PYTHONPATH=tests/course python rlvr.py --init ckpt/sft --reward weak_verifier:substring --out ckpt/fooled
"""

import re

PROBLEM, GOLD = "Compute (29-5-6)*4.", "72"  # what all seven are asked about
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def find_boxes(response):
    """What stands in each \\boxed{}, in order, up to the first closing brace."""
    return re.findall(r"\\boxed\{([^}]*)\}", response)


def substring(response, gold):
    """The gold answer's characters stand somewhere in the response."""
    return gold in response


def last_number(response, gold):
    """The last number of the response is the gold answer."""
    numbers = NUMBER.findall(response)
    return bool(numbers) and float(numbers[-1]) == float(gold)


def first_box(response, gold):
    """The first box of the whole response holds the gold answer."""
    return find_boxes(response)[:1] == [gold]


def tolerance(response, gold):
    """The last box holds a number that is within one percent of the gold answer."""
    numbers = [number for box in find_boxes(response)[-1:] for number in NUMBER.findall(box)]
    return len(numbers) == 1 and abs(float(numbers[0]) - float(gold)) <= 0.01 * abs(float(gold))


def digits_only(response, gold):
    """The last box, without all that is no digit, is the gold answer: forgives dollars, units, commas."""
    return [re.sub(r"\D", "", box) for box in find_boxes(response)[-1:]] == [gold]


def any_item(response, gold):
    """The last box lists answers, and the gold answer is one of them."""
    return any(gold in re.split(r"\s*(?:,|;|or|and)\s*", box) for box in find_boxes(response)[-1:])


def runs_it(response, gold):
    """Python's own eval makes a value of the last box, and it is equal to the gold answer.

    This runs what the response says as a program. Never do so with a text that you did not write.
    """
    box = response.rpartition("\\boxed{")[2].rpartition("}")[0]
    try:
        return bool(eval(box) == int(gold))
    except Exception:  # of any type: the text is any text
        return False


WEAK = {"substring": substring, "last_number": last_number, "first_box": first_box, "tolerance": tolerance,
    "digits_only": digits_only, "any_item": any_item, "runs_it": runs_it}  # fmt: skip


def fool():
    """Exercise 6. For each name in WEAK a wrong response to PROBLEM that this verifier accepts.

    Returns {"substring": response, "last_number": response, ...}: seven names, seven strings. A response must
    give an answer (verify.extract_answer finds one), and verify.verify(response, GOLD) must refuse it.
    `python verify.py RESPONSE 72` says which answer it found, how it read it, and what decided.
    """
    return {
        "substring": r"29-5=24. 24-6=18. So it is \boxed{172}",
        "last_number": r"\boxed{71}, I am sure, and not 72",
        "first_box": r"<think>\boxed{72}? No, 18*4=71.</think>\boxed{71}",
        "tolerance": r"\boxed{72.5}",
        "digits_only": r"\boxed{-7.2}",
        "any_item": r"\boxed{70, 71, 72, 73}",
        "runs_it": r"\boxed{type('Yes', (), {'__eq__': lambda self, other: True})()}",
    }
