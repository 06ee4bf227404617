"""`where`: the grammar selects what SQL would, and every mistake points at its position."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.where import WhereError, columns, compile

TABLE = pa.table(
    {
        "n": pa.array([1, 2, None, 4, -5]),
        "x": pa.array([0.5, None, 2.0, 4.0, -1.5]),
        "text": pa.array(["red", "it's", None, "", "red fox"]),
        "flag": pa.array([True, False, None, True, False]),
        "day": pa.array([0, 1, None, 3, 4], pa.date32()),
        "odd name": pa.array([1, 2, 3, 4, 5]),
    }
)
ROWS = TABLE.to_pylist()


def selected(condition: str) -> list[int]:
    numbered = TABLE.append_column("row", pa.array(range(TABLE.num_rows)))
    return numbered.filter(compile(condition, TABLE.schema)).column("row").to_pylist()


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("n = 2", [1]),
        ("2 = n", [1]),
        ("n = 2.0", [1]),
        ("n > -6 and n<2", [0, 4]),
        ("n <> 1", [1, 3, 4]),
        ("n in (1, 4)", [0, 3]),
        ("n not in (1, 4)", [1, 4]),
        ("not n in (1, 4)", [1, 4]),
        ("x in (2, 0.5)", [0, 2]),
        ("text like 'red%'", [0, 4]),
        ("text not like 'red%'", [1, 3]),
        ("text like '_ed'", [0]),
        ("text = 'it''s'", [1]),
        ("text is null or flag", [0, 2, 3]),
        ("NOT flag", [1, 4]),
        ("flag = true", [0, 3]),
        ("n Is Not Null", [0, 1, 3, 4]),
        ('"odd name" >= 4', [3, 4]),
        ("day >= '1970-01-04'", [3, 4]),
        ("n = x", [3]),
        ("n > 99999999999999999999", []),
        ("n = 1 or n = 2 and flag", [0]),
        ("(n = 1 or n = 2) and flag", [0]),
    ],
)
def test_a_condition_selects_what_sql_would(condition: str, rows: list[int]) -> None:
    assert selected(condition) == rows


@pytest.mark.parametrize(
    ("condition", "position", "words"),
    [
        ("n = ", 4, "the end"),
        ("n == 1", 4, "'='"),
        ("m = 1", 1, "unknown column m"),
        ("txet = 'a'", 1, "did you mean text"),
        ("n = 'a'", 5, "int64"),
        ("text > 3", 8, "string"),
        ("x = n and text = n", 11, "string does not compare with int64"),
        ("n in ()", 7, "')'"),
        ("n in (1, 'a')", 10, "'a'"),
        ("n in (null)", 7, "null"),
        ("(n = 1", 7, "')'"),
        ("n = 1)", 6, "')'"),
        ("n = 1 n", 7, "n is not expected"),
        ("n", 2, "a comparison"),
        ("n like '1%'", 1, "like needs text"),
        ("n = 1; drop", 6, "';'"),
        ("__import__('os')", 1, "unknown column"),
        ("1 = 1", 1, "two literals"),
        ("text = 'open", 8, '"\'"'),
        ("n = 1.2.3", 5, "'1'"),
        ("day > 'soon'", 7, "date32"),
        ("'a' is null", 1, "a column is expected"),
    ],
)
def test_a_mistake_points_at_its_position(condition: str, position: int, words: str) -> None:
    with pytest.raises(WhereError) as caught:
        compile(condition, TABLE.schema)
    message = str(caught.value)
    assert f"at position {position}:" in message and words in message, message
    assert message.splitlines()[-1].index("^") == 2 + position - 1


def test_deep_nesting_is_refused_and_does_not_exhaust_the_stack() -> None:
    with pytest.raises(WhereError, match="within each other"):
        compile("(" * 5000 + "n = 1" + ")" * 5000, TABLE.schema)
    assert selected("(" * 50 + "n = 1" + ")" * 50) == [0]


WIDE = pa.table(
    {
        "price": pa.array(["0.5", "2.0", None], pa.string()).cast(pa.decimal128(2, 1)),
        "id": pa.array([str(10**30), str(10**30 + 1), "7"], pa.string()).cast(pa.decimal128(38, 0)),
        "tiny": pa.array([1, 2, 0], pa.decimal256(76, 0)).cast(pa.decimal256(76, 75), safe=True),
        "hash": pa.array([2**64 - 1, 2**63, 1], pa.uint64()),
        "n": pa.array([2**63 - 1, -(2**63), 1]),
        "x": pa.array([0.5, 0.5, 3.5]),
    }
)


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("price = 2", [1]),
        ("price < 1", [0]),
        ("price in (2, 0.5, 0.25)", [0, 1]),
        ("price not in (2)", [0]),
        (f"id = {10**30}", [0]),
        (f"id in ({10**30 + 1}, 7, {10**60}, 7.5)", [1, 2]),
        (f"tiny < {10**70}", [0, 1, 2]),
        ("tiny = 2", [1]),
        ("hash > 1", [0, 1]),
        ("hash > -1", [0, 1, 2]),
        (f"hash = {2**64 - 1}", [0]),
        (f"hash in (1, -1, {2**64 - 1}, {2**64})", [0, 2]),
        (f"n < {2**63}", [0, 1, 2]),
        (f"n = {2**63}", []),
        (f"n in ({2**63}, {-(2**63)}, 1.0)", [1, 2]),
        (f"n > {'9' * 5_000}", []),
        (f"n > -{'9' * 5_000}", [0, 1, 2]),
        (f"price in ({'9' * 5_000}, 2)", [1]),
        ("n > 0.5 and n > x", [0]),
        ("hash < 1e30 and hash != x", [0, 1, 2]),
    ],
)
def test_numbers_of_any_width_are_compared_exactly(condition: str, rows: list[int]) -> None:
    """Decimals of databases beside whole numbers, and hashes of 64 bits, which pyarrow refuses when it is asked."""
    numbered = WIDE.append_column("row", pa.array(range(3)))
    assert numbered.filter(compile(condition, WIDE.schema)).column("row").to_pylist() == rows


def test_the_columns_that_a_condition_reads_are_known_before_it_runs() -> None:
    assert columns("n = 1 or (text like 'a' and n > 3)", TABLE.schema) == ["n", "text"]


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=40))
def test_no_text_does_anything_but_select_or_be_refused(text: str) -> None:
    with contextlib.suppress(WhereError):
        assert set(selected(text)) <= set(range(len(ROWS)))


# ---------------------------------------------------------------- against a three-valued interpreter

Truth = bool | None
Node = tuple[str, Callable[[dict[str, Any]], Truth]]
OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def literal(value: int | str) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def compared(column: str, sign: str, value: int | str) -> Node:
    def truth(row: dict[str, Any]) -> Truth:
        return None if row[column] is None else OPERATORS[sign](row[column], value)

    return f"{column} {sign} {literal(value)}", truth


def contained(column: str, values: list, negated: bool) -> Node:
    def truth(row: dict[str, Any]) -> Truth:
        return None if row[column] is None else (row[column] in values) != negated

    return f"{column} {'not ' if negated else ''}in ({', '.join(map(literal, values))})", truth


def alike(pattern: str, negated: bool) -> Node:
    parts = [{"%": ".*", "_": "."}.get(mark, re.escape(mark)) for mark in pattern]

    def truth(row: dict[str, Any]) -> Truth:
        found = row["text"] is not None and re.fullmatch("".join(parts), row["text"], re.DOTALL) is not None
        return None if row["text"] is None else found != negated

    return f"text {'not ' if negated else ''}like {literal(pattern)}", truth


def nothing(column: str, negated: bool) -> Node:
    return f"{column} is {'not ' if negated else ''}null", lambda row: (row[column] is None) != negated


def negation(node: Node) -> Node:
    def truth(row: dict[str, Any]) -> Truth:
        value = node[1](row)
        return None if value is None else not value

    return f"not ({node[0]})", truth


def joined(word: str, left: Node, right: Node) -> Node:
    decides = word == "or"

    def truth(row: dict[str, Any]) -> Truth:
        values = (left[1](row), right[1](row))
        if decides in values:
            return decides
        return None if None in values else not decides

    return f"({left[0]}) {word} ({right[0]})", truth


words = st.text("redfox' ", max_size=4)
leaf = st.one_of(
    st.builds(compared, st.sampled_from(["n", "x"]), st.sampled_from(list(OPERATORS)), st.integers(-6, 6)),
    st.builds(compared, st.just("text"), st.sampled_from(list(OPERATORS)), words),
    st.builds(contained, st.just("n"), st.lists(st.integers(-6, 6), min_size=1, max_size=3), st.booleans()),
    st.builds(contained, st.just("text"), st.lists(words, min_size=1, max_size=3), st.booleans()),
    st.builds(alike, st.text("redfox%_", max_size=4), st.booleans()),
    st.builds(nothing, st.sampled_from(["n", "x", "text", "flag"]), st.booleans()),
)
tree = st.recursive(
    leaf,
    lambda inner: st.builds(negation, inner) | st.builds(joined, st.sampled_from(["and", "or"]), inner, inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(tree)
def test_any_condition_agrees_with_three_valued_logic(node: Node) -> None:
    text, truth = node
    assert selected(text) == [number for number, row in enumerate(ROWS) if truth(row) is True]
