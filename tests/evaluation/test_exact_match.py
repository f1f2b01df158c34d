"""Numbers at the end of worked solutions."""

from fractions import Fraction

import pytest

from stable_lora_jax.evaluation import final_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Half of 48 is <<48/2=24>>24.\n#### 72", 72),
        ("#### 72.00", 72),
        ("#### $1,234,567", 1234567),
        ("#### -3", -3),
        ("#### −3", -3),  # a minus sign that is no hyphen
        ("#### .5", Fraction(1, 2)),
        ("#### 3/4", Fraction(3, 4)),
        ("5 apples. The answer is: 7 of 10", 7),
        ("#### 5\nThe answer is: 6", 6),
        ("The answer is: unknown, perhaps 12", 12),
        ("12 men. The answer is: unknown", 12),
        ("First 3, then 4 and 5, so 12.", 12),
        ("He pays 2,400.50 dollars.", Fraction(4801, 2)),
        ("It takes 10-4 = 6", 6),
        ("nothing", None),
        ("", None),
        ("a, b. c / - $", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number
