"""The number that a worked solution ends in, as a number: "18.00", "$18" and "18" are one, as strings they differ."""

import re
from fractions import Fraction

_NUMBER = re.compile(r"(?P<minus>(?<!\d)[-−])?\$?(?P<whole>\d[\d,]*)?(?P<rest>\.\d+)?(?:/(?P<below>[1-9]\d*))?")
# GSM8K ends in "#### 18", MetaMathQA in "The answer is: 18".
_MARKS = re.compile(r"####|the answer is:?", re.IGNORECASE)


def final_number(text: str) -> Fraction | None:
    """Returns the answer a solution states: the first number after its last "####" or "The answer is", else the last.

    Thousands may be parted by commas, and a dollar sign may precede; a fraction is one number.

    Examples:
      >>> final_number("She has 3 * 6 = 18.00 left. #### 1,018.50")
      Fraction(2037, 2)
      >>> final_number("So 2 and 3 make 5.") == final_number("The answer is: $5.00")
      True
      >>> final_number("No idea.") is None
      True
    """
    *before, tail = _MARKS.split(text)
    stated = _numbers(tail)
    if before and stated:
        return stated[0]
    everywhere = _numbers(text)
    return everywhere[-1] if everywhere else None


def exact_match(text: str, solution: str) -> bool:
    r"""Returns whether a text states the number that a worked solution states, however the two write it.

    Examples:
      >>> exact_match("So she makes $1,018.00.", "509 * 2 = 1018\n#### 1018")
      True
    """
    wanted = final_number(solution)
    return wanted is not None and final_number(text) == wanted


def _numbers(text: str) -> list[Fraction]:
    found = [match for match in _NUMBER.finditer(text) if match["whole"] or match["rest"]]
    return [_value(match) for match in found]


def _value(match: re.Match[str]) -> Fraction:
    digits = (match["whole"] or "0").replace(",", "") + (match["rest"] or "")
    return (-1 if match["minus"] else 1) * Fraction(digits) / int(match["below"] or 1)
