"""Arithmetic on sizes as exported programs write it: parsed, checked and written anew.

``torch.export.load`` hands these texts to sympy, which evaluates them as Python.
"""

from __future__ import annotations

import ast
import math
import re
import warnings

_LONGEST, _DEEPEST, _MOST_ARGUMENTS = 100_000, 150, 200
_LARGEST, _MOST_POWER = 2**63, 64
_SYMBOL = re.compile(r"(s|u|zf|zuf)\d{1,6}", re.ASCII)
_NUMBER = re.compile(r"-?\d{1,40}(\.\d{1,80})?(e[+-]?\d{1,3})?", re.ASCII)
_CONSTANTS = {"true", "false", "oo"}
_POWERS = {"Pow", "PowByNatural", "FloatPow"}
_FUNCTIONS = _POWERS | {
    "Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "FloatTrueDiv",
    "FloorDiv", "FloorToInt", "Ge", "GreaterThan", "Gt", "Identity", "IntTrueDiv", "Integer", "Le",
    "LessThan", "Lt", "Max", "Min", "Mod", "ModularIndexing", "Mul", "Ne", "Not", "Or",
    "PythonMod", "Rational", "RoundDecimal", "RoundToInt", "StrictGreaterThan", "StrictLessThan",
    "ToFloat", "TruncToFloat", "TruncToInt", "Unequality", "Where", "ceiling", "floor",
}  # fmt: skip
_ASSUMPTIONS = {
    "commutative", "complex", "extended_real", "finite", "infinite", "integer", "negative",
    "nonnegative", "nonpositive", "nonzero", "positive", "rational", "real", "zero",
}  # fmt: skip
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


class BadExpressionError(ValueError):
    """A text that is not arithmetic on sizes."""


def arithmetic(text: str) -> str:
    """The same expression of sympy, written from its syntax tree.

    Args:
        text: ``Add(Symbol('s0', positive=True, integer=True), Integer(1))``, ``2*s0``.

    Raises:
        BadExpressionError: If anything in it is not a number, a symbol or a known function.
    """
    return ast.unparse(_sized(_tree(text), 0, 1))


def _tree(text: str) -> ast.expr:
    if len(text) > _LONGEST or not text.isascii():
        raise BadExpressionError(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python remarks on odd syntax, which is refused below
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadExpressionError(text) from error


def _sized(node: ast.expr, depth: int, power: int) -> ast.expr:
    """The node rebuilt; ``power`` is the product of the exponents around it."""
    if depth > _DEEPEST:
        raise BadExpressionError(ast.dump(node)[:80])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _call(node, node.func.id, depth, power)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return ast.UnaryOp(node.op, _sized(node.operand, depth + 1, power))
    if isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS):
        left, right = (_sized(side, depth + 1, power) for side in (node.left, node.right))
        return ast.BinOp(left, node.op, right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        exponent = _exponent(node.right)
        base = _sized(node.left, depth + 1, _raised(power, exponent))
        return ast.BinOp(base, node.op, node.right)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        if isinstance(node.ops[0], _COMPARISONS):
            left, right = (
                _sized(side, depth + 1, power) for side in (node.left, node.comparators[0])
            )
            return ast.Compare(left, node.ops, [right])
    elif isinstance(node, ast.Name):
        if node.id in _CONSTANTS or _SYMBOL.fullmatch(node.id):
            return ast.Name(node.id, ast.Load())
    elif isinstance(node, ast.Constant) and _is_number(node.value):
        return ast.Constant(node.value)
    raise BadExpressionError(ast.unparse(node)[:80])


def _call(node: ast.Call, name: str, depth: int, power: int) -> ast.expr:
    if name in ("Symbol", "Float"):
        return _leaf(node, name)
    if name not in _FUNCTIONS or node.keywords or len(node.args) > _MOST_ARGUMENTS:
        raise BadExpressionError(name)
    arguments = list(node.args)
    if name in _POWERS:
        if len(arguments) != 2:
            raise BadExpressionError(name)
        base = _sized(arguments[0], depth + 1, _raised(power, _exponent(arguments[1])))
        arguments = [base, _sized(arguments[1], depth + 1, 1)]
    else:
        arguments = [_sized(argument, depth + 1, power) for argument in arguments]
    return ast.Call(ast.Name(name, ast.Load()), arguments, [])


def _leaf(node: ast.Call, name: str) -> ast.expr:
    """``Symbol('s0', positive=True)`` or ``Float('0.5', precision=53)``."""
    text = node.args[0] if len(node.args) == 1 else None
    pattern = _SYMBOL if name == "Symbol" else _NUMBER
    if not isinstance(text, ast.Constant) or not pattern.fullmatch(str(text.value)):
        raise BadExpressionError(f"{name}({ast.unparse(text)[:40] if text else ''})")
    keywords = []
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if name == "Symbol":
            good = keyword.arg in _ASSUMPTIONS and isinstance(value, bool)
        else:
            good = keyword.arg in ("precision", "dps") and isinstance(value, int) and value < 1000
        if not good:
            raise BadExpressionError(f"{name} with {keyword.arg}")
        keywords.append(ast.keyword(keyword.arg, ast.Constant(value)))
    return ast.Call(ast.Name(name, ast.Load()), [ast.Constant(str(text.value))], keywords)


def _exponent(node: ast.expr) -> int:
    """The size of an exponent, which must be a literal, or numbers could grow without bound."""
    text = ast.unparse(node)
    match = re.fullmatch(
        r"(?:Integer\((-?\d+)\)|Rational\((-?\d+), (\d+)\)|\(?(-?\d+)\)?|Float\('(\d+\.\d+)'.*\))",
        text,
    )
    if match is None:
        raise BadExpressionError(f"the power {text[:40]}")
    whole, top, bottom, bare, decimal = match.groups()
    if bottom is not None and not int(bottom):
        raise BadExpressionError(f"the power {text[:40]}")
    value = int(top) / int(bottom) if bottom else float(decimal or whole or bare)
    if abs(value) > _MOST_POWER:
        raise BadExpressionError(f"the power {text[:40]}")
    return max(1, math.ceil(abs(value)))


def _raised(power: int, exponent: int) -> int:
    if power * exponent > _MOST_POWER:
        raise BadExpressionError(f"a power above {_MOST_POWER}")
    return power * exponent


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) <= _LARGEST


def check_guard(text: str) -> None:
    """Checks a condition on the input's sizes, such as ``L['x'].size()[0] % 2 == 0``.

    Raises:
        BadExpressionError: If anything in it is not a size of an input, a number or arithmetic.
    """
    _check_guard(_tree(text), 0)


_GUARD_CALLS = {
    "Abs", "CeilDiv", "Eq", "FloorDiv", "Max", "Min", "Mod", "Ne", "Not", "PythonMod", "abs",
    "float", "int", "math.ceil", "math.floor", "math.sqrt", "math.trunc", "max", "min", "round",
    "torch._sym_sqrt", "torch.sym_float", "torch.sym_int", "torch.sym_ite", "torch.sym_max",
    "torch.sym_min", "torch.sym_not", "torch.sym_sqrt", "torch.sym_sum",
}  # fmt: skip
_INPUT = re.compile(
    r"L(\['[A-Za-z_]\w{0,99}'\]|\[\d{1,3}\]){1,8}\.(size|stride|storage_offset)\(\)(\[\d{1,2}\])?",
    re.ASCII,
)


def _check_guard(node: ast.expr, depth: int) -> None:
    if depth > _DEEPEST:
        raise BadExpressionError("a condition nested too deeply")
    if isinstance(node, (ast.Subscript, ast.Call)) and _INPUT.fullmatch(ast.unparse(node)):
        return  # unparse has no bound of its own, but the parser refuses what is nested too deeply
    parts: list[ast.expr]
    if isinstance(node, ast.Call) and not node.keywords:
        good, parts = ast.unparse(node.func) in _GUARD_CALLS, node.args
    elif isinstance(node, ast.BinOp):
        good, parts = isinstance(node.op, (*_OPERATORS, ast.Pow)), [node.left, node.right]
    elif isinstance(node, ast.UnaryOp):
        good, parts = isinstance(node.op, (ast.USub, ast.Not)), [node.operand]
    elif isinstance(node, ast.BoolOp):
        good, parts = True, node.values
    elif isinstance(node, ast.Compare):
        good = all(isinstance(each, _COMPARISONS) for each in node.ops)
        parts = [node.left, *node.comparators]
    elif isinstance(node, ast.IfExp):
        good, parts = True, [node.test, node.body, node.orelse]
    else:
        good, parts = isinstance(node, ast.Constant) and _is_number(node.value), []
    if not good:
        raise BadExpressionError(ast.unparse(node)[:80])
    for part in parts:
        _check_guard(part, depth + 1)
