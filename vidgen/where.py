"""The small SQL of `where`: a text becomes a pyarrow expression. It is parsed by hand and never evaluated as code.

    condition  = either ("or" either)*
    either     = factor ("and" factor)*
    factor     = "not" factor | "(" condition ")" | predicate
    predicate  = operand (= | != | <> | < | <= | > | >=) operand
               | operand ["not"] "in" "(" literal ("," literal)* ")"
               | operand ["not"] "like" string          % any text, _ any character
               | operand "is" ["not"] "null"
               | boolean column
    operand    = column | "quoted column" | literal;    literal = 'text' | number | true | false

Keywords in any case, 'it''s' for a quote inside a text, null is neither equal nor unequal to anything (SQL's logic).
Refuses to know whose rows it selects.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from vidgen.errors import ConfigError

DEEPEST = 100
"""Most parentheses and `not` within each other."""
MOST_DIGITS = 76
"""Of a whole number that is compared exactly: no column has more."""
KEYWORDS = frozenset({"and", "or", "not", "in", "like", "is", "null", "true", "false"})
_TOKEN = re.compile(
    r"""\s*(?:
      (?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?![\w.]))
    | (?P<text>'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")+")
    | (?P<word>[^\W\d]\w*)
    | (?P<symbol><=|>=|!=|<>|[=<>(),])
    )""",
    re.VERBOSE,
)
_COMPARE: dict[str, Callable[[Any, Any], pc.Expression]] = {
    "=": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


class WhereError(ConfigError):
    """A condition that cannot be read, or that does not fit the columns; the message points at the position."""


def compile(text: str, schema: pa.Schema) -> pc.Expression:
    """The condition as an expression over `schema`; a row is selected where it is true (not where it is null).

    Raises WhereError with the position for syntax, unknown columns and types that do not compare.
    """
    parser = _Parser(text, schema)
    expression = parser.condition(0)
    if parser.token.kind != "end":
        raise parser.error(f"{parser.token.shown} is not expected here")
    try:
        schema.empty_table().filter(expression)
    except (pa.ArrowException, TypeError) as error:  # a combination of types that the checks below let through
        raise WhereError(f"{text}: {str(error).splitlines()[0]}") from error
    return expression


def columns(text: str, schema: pa.Schema) -> list[str]:
    """Names of the columns that the condition reads, each once; WhereError as in `compile`."""
    parser = _Parser(text, schema)
    parser.condition(0)
    return list(dict.fromkeys(parser.read))


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    value: Any
    position: int
    shown: str


@dataclass(frozen=True, slots=True)
class _Operand:
    """`expression` of a column; a literal keeps its `value`. `family` is text, number, boolean, time or other."""

    expression: pc.Expression | None
    value: Any
    type: pa.DataType
    family: str
    token: _Token

    @property
    def scalar(self) -> pa.Scalar:
        return _scalar(self.value)


class _Parser:
    """Recursive descent over one text."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self.text, self.schema = text, schema
        self.read: list[str] = []
        self.tokens = self._tokens()
        self.index = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.index]

    def error(self, message: str, token: _Token | None = None) -> WhereError:
        position = (token or self.token).position
        return WhereError(f"{message}, at position {position + 1}:\n  {self.text}\n  {' ' * position}^")

    def condition(self, depth: int) -> pc.Expression:
        result = self._either(depth)
        while self._accept("or"):
            result = result | self._either(depth)
        return result

    def _either(self, depth: int) -> pc.Expression:
        result = self._factor(depth)
        while self._accept("and"):
            result = result & self._factor(depth)
        return result

    def _factor(self, depth: int) -> pc.Expression:
        if depth > DEEPEST:
            raise self.error(f"more than {DEEPEST} parentheses or `not` within each other")
        if self._accept("not"):
            return ~self._factor(depth + 1)
        if self._accept("("):
            result = self.condition(depth + 1)
            self._expect(")")
            return result
        return self._predicate()

    def _predicate(self) -> pc.Expression:
        left = self._operand()
        operator = self.token
        if operator.kind == "symbol" and operator.value in _COMPARE:
            self.index += 1
            return self._comparison(left, operator, self._operand())
        if self._accept("is"):
            negated = self._accept("not")
            self._expect("null")
            column = self._column(left)
            return column.is_valid() if negated else column.is_null()
        negated = self._accept("not")
        if self._accept("in"):
            return self._in(left, negated)
        if self._accept("like"):
            return self._like(left, negated)
        if not negated and left.family == "boolean":
            return left.expression if left.expression is not None else pc.scalar(left.value)
        raise self.error(f"a comparison, in, like or is is expected instead of {self.token.shown}")

    def _comparison(self, left: _Operand, operator: _Token, right: _Operand) -> pc.Expression:
        if left.expression is None and right.expression is None:
            raise self.error("two literals are compared; one side must be a column", left.token)
        return _COMPARE[operator.value](self._side(left, right), self._side(right, left))

    def _side(self, operand: _Operand, other: _Operand) -> pc.Expression:
        if operand.expression is not None:
            if other.expression is not None and operand.family != other.family:
                raise self.error(f"{operand.type} does not compare with {other.type}", operand.token)
            whole = pt.is_integer(operand.type) and pt.is_floating(other.type)
            return operand.expression.cast(pa.float64(), safe=False) if whole else operand.expression
        literal = self._literal(operand, other)
        return pc.scalar(_comparable(literal.as_py(), other.type) if other.family == "number" else literal)

    def _literal(self, literal: _Operand, column: _Operand) -> pa.Scalar:
        """The literal in a type that compares with the column: dates and times are written as text."""
        if column.family == "time" and literal.family == "text":
            try:
                return pa.array([literal.value]).cast(column.type)[0]
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise self.error(f"{literal.token.shown} is not a {column.type}", literal.token) from error
        if column.family != literal.family:
            raise self.error(
                f"{column.token.shown} is {column.type} and does not compare with {literal.token.shown}", literal.token
            )
        return literal.scalar

    def _in(self, left: _Operand, negated: bool) -> pc.Expression:
        column = self._column(left)
        self._expect("(")
        values = [self._literal(self._literal_operand(), left)]
        while self._accept(","):
            values.append(self._literal(self._literal_operand(), left))
        self._expect(")")
        python = [value.as_py() for value in values]
        kind = pa.float64() if pt.is_floating(left.type) else left.type
        fitting = pa.array(_held(python, kind) if left.family == "number" else python, kind)
        cast = column.cast(kind) if pt.is_floating(left.type) else column
        # is_in says false for null where SQL says null; the difference shows under `not`.
        found = pc.if_else(column.is_valid(), cast.isin(fitting), pa.scalar(None, pa.bool_()))
        return ~found if negated else found

    def _like(self, left: _Operand, negated: bool) -> pc.Expression:
        column = self._column(left)
        if left.family != "text":
            raise self.error(f"like needs text; {left.token.shown} is {left.type}", left.token)
        pattern = self._take("text", "a pattern in single quotes")
        found = pc.match_like(column, pattern.value)
        return ~found if negated else found

    def _operand(self) -> _Operand:
        token = self.token
        if token.kind == "column":
            self.index += 1
            if token.value not in self.schema.names:
                near = difflib.get_close_matches(token.value, self.schema.names, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"columns: {', '.join(self.schema.names)}"
                raise self.error(f"unknown column {token.shown} ({hint})", token)
            self.read.append(token.value)
            kind = self.schema.field(token.value).type
            return _Operand(pc.field(token.value), None, kind, _family(kind), token)
        return self._literal_operand()

    def _literal_operand(self) -> _Operand:
        token = self.token
        if token.kind not in ("text", "number", "boolean"):
            raise self.error(f"a value is expected instead of {token.shown}")
        self.index += 1
        return _Operand(None, token.value, _scalar(token.value).type, token.kind, token)

    def _column(self, operand: _Operand) -> pc.Expression:
        if operand.expression is None:
            raise self.error(f"a column is expected instead of {operand.token.shown}", operand.token)
        return operand.expression

    def _accept(self, value: str) -> bool:
        if self.token.kind in ("symbol", "keyword") and self.token.value == value:
            self.index += 1
            return True
        return False

    def _expect(self, value: str) -> None:
        if not self._accept(value):
            raise self.error(f"{value!r} is expected instead of {self.token.shown}")

    def _take(self, kind: str, what: str) -> _Token:
        token = self.token
        if token.kind != kind:
            raise self.error(f"{what} is expected instead of {token.shown}")
        self.index += 1
        return token

    def _tokens(self) -> list[_Token]:
        found, position = [], 0
        end = len(self.text.rstrip())
        while position < end:
            match = _TOKEN.match(self.text, position)
            if match is None:
                start = position + len(self.text[position:]) - len(self.text[position:].lstrip())
                raise self.error(f"{self.text[start]!r} cannot be read", _Token("", None, start, ""))
            kind = str(match.lastgroup)
            found.append(_token(kind, match.group(kind), match.start(kind)))
            position = match.end()
        found.append(_Token("end", None, end, "the end"))
        return found


def _token(kind: str, raw: str, position: int) -> _Token:
    if kind == "number":
        whole = re.fullmatch(r"[+-]?\d+", raw) is not None and len(raw) <= MOST_DIGITS
        return _Token("number", int(raw) if whole else float(raw), position, raw)
    if kind == "text":
        return _Token("text", raw[1:-1].replace("''", "'"), position, raw)
    if kind == "quoted":
        return _Token("column", raw[1:-1].replace('""', '"'), position, raw)
    if kind == "word" and raw.lower() in ("true", "false"):
        return _Token("boolean", raw.lower() == "true", position, raw)
    if kind == "word" and raw.lower() in KEYWORDS:
        return _Token("keyword", raw.lower(), position, raw)
    if kind == "word":
        return _Token("column", raw, position, raw)
    return _Token("symbol", raw, position, repr(raw))


def _scalar(value: Any) -> pa.Scalar:
    """A literal as pyarrow has it; a whole number beyond 64 bits as a decimal."""
    wide = isinstance(value, int) and not -(2**63) <= value < 2**63
    return pa.scalar(Decimal(value) if wide else value)


def _comparable(value: int | float | Decimal, kind: pa.DataType) -> pa.Scalar:
    """A number in a type that compares with columns of `kind`, exactly where it can: left to itself pyarrow refuses a
    decimal beside a whole number of 64 bits, and a cell of uint64 beyond 63."""
    if isinstance(value, float) or pt.is_floating(kind):
        return pa.scalar(float(value))
    if pt.is_integer(kind) and not pt.is_uint64(kind):
        return _scalar(int(value))
    exact = pa.scalar(Decimal(value))
    if pt.is_decimal(kind):
        try:
            pa.table({"": pa.nulls(0, kind)}).filter(pc.field("") == pc.scalar(exact))
        except pa.ArrowInvalid:  # more digits before and behind the point than a decimal may have
            return pa.scalar(float(value))
    return exact


def _held(values: Sequence[int | float | Decimal], kind: pa.DataType) -> list[Any]:
    """Those of the numbers that a column of `kind` can hold: no other is ever equal to a cell."""
    if pt.is_floating(kind):
        return [float(value) for value in values]
    found = []
    for value in (value for value in values if math.isfinite(value)):
        try:
            found.append(pa.scalar(Decimal(str(value))).cast(kind).as_py())
        except pa.ArrowInvalid:
            continue
    return found


def _family(kind: pa.DataType) -> str:
    if pt.is_string(kind) or pt.is_large_string(kind):
        return "text"
    if pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind):
        return "number"
    if pt.is_boolean(kind):
        return "boolean"
    return "time" if pt.is_temporal(kind) else "other"
