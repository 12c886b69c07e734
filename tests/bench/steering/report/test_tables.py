"""How figures are written in tables."""

import math

from bench.steering.report.tables import markdown, number, percent, points, span, tenths


def test_a_table_has_a_rule_below_its_head() -> None:
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_what_is_not_a_number_is_a_dash() -> None:
    assert (percent(math.nan), number(math.nan)) == ("-", "-")
    assert (percent(0.456), number(0.456), tenths(0.456)) == ("46 %", "0.46", "45.6 %")
    assert span((-0.1, 0.2), points) == "(-10 to +20)"
