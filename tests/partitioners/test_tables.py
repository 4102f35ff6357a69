"""Tables and numbers for people."""
import pytest

from partitioners.tables import column_groups, format_table
from partitioners.units import format_bytes, format_count, format_number, format_seconds, format_share


def test_table_picture():
    rows = [(), ("a", "1.50", "4 kB", "small"), ("long one", "12.0", "", "")]
    text = format_table(("name", "s", "bytes", "kind"), rows,
                        left=(0, 3), groups=("", "what it takes", "what it takes", ""), indent=" ")
    assert text == """\
           what it takes
 name         s    bytes  kind
 --------  ----  -------  -----
 a         1.50     4 kB  small
 long one  12.0"""


def test_table_without_heads():
    assert format_table((), [("a", "1"), ("bc", "23")]) == "a    1\nbc  23"
    assert format_table((), []) == "" and format_table(("head",), []) == "head"
    with pytest.raises(ValueError):
        format_table(("one", "two"), [("alone",)])


def test_groups_are_neighbours_of_one_name():
    assert list(column_groups(("", "", "a", "a", "b", "a"))) == [
        ("", 0, 1), ("", 1, 2), ("a", 2, 4), ("b", 4, 5), ("a", 5, 6)]


@pytest.mark.parametrize("write, numbers", (
    (format_seconds, {0: "0 s", 1.5: "1.5 s", 0.25: "250 ms", 1.23456e-5: "12.35 us", 3e-9: "3 ns", -0.002: "-2 ms",
                      0.99999: "1 s", float("inf"): "inf s"}),
    (format_bytes, {0: "0 B", 999: "999 B", 4096: "4.096 kB", 2.1e9: "2.1 GB", 3e13: "30 TB", -5e6: "-5 MB",
                    999_990: "1 MB", 0.5: "0.5 B"}),
    (format_count, {7: "7", 1500: "1.5 k", 12.3e6: "12.3 M", 7e9: "7 G", 999_900: "1 M"}),
    (format_number, {0: "0.000", 0.00123: "0.00123", 0.5: "0.500", 12.34: "12.3", 1234: "1234", -0.5: "-0.500"}),
    (format_share, {0.1234: "12.3 %", 1: "100.0 %", -0.01: "-1.0 %"})))
def test_numbers_for_people(write, numbers):
    assert [write(number) for number in numbers] == list(numbers.values())
    assert format_share(0.025, 2, signed=True) == "+2.50 %"
