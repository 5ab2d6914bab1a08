"""Make mutants: small changes of meaning, as a typing error could cause them, which a test should detect."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NEIGHBOURS = {
    left: right
    for pair in (("min", "max"), ("any", "all"), ("mean", "sum"), ("amin", "amax"), ("argmin", "argmax"))
    for left, right in (pair, pair[::-1])
} | {"floor": "ceil", "ceil": "floor", "sorted": "list", "reversed": "list", "cumsum": "clone"}
SYMMETRIC = {
    "isinstance",
    "issubclass",
    "getattr",
    "setattr",
    "hasattr",
    "min",
    "max",
    "zip",
    "print",
    "equal",
    "field",
}
SPEECH = {"print", "warn", "warning", "info", "debug", "message", "notice", "log", "say", "write_line", "__init__"}
"""Calls whose arguments are texts for users; as statements they are not removed."""
HARMLESS_KEYWORDS = {
    "encoding", "errors", "timeout", "stacklevel", "indent", "flush", "buffering", "non_blocking", "pin_memory",
    "exist_ok", "daemon", "help", "strict", "ensure_ascii", "name", "repr", "compare", "slots", "frozen",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        path: the path of the file, relative to the root of the repository.
        function: the function or class that contains it; "" at the top of the file.
        operator: the kind of change.
        before: the piece of source that is replaced.
        after: its replacement.
        start: the first byte of the piece in the file.
        end: the end of the piece in the file, in bytes.
        lines: the first and last line of the piece.
        number: the number of equal changes earlier in the function.
    """

    path: str
    function: str
    operator: str
    before: str
    after: str
    start: int
    end: int
    lines: tuple[int, int]
    number: int = 0

    @property
    def id(self) -> str:
        """Return an id that stays the same when the function is edited elsewhere."""
        parts = (self.path, self.function, self.operator, self.before, self.after, str(self.number))
        return hashlib.sha1("\0".join(parts).encode()).hexdigest()[:10]

    def apply(self, source: bytes) -> bytes:
        """Return the file with the change."""
        return source[: self.start] + self.after.encode() + source[self.end :]

    def compiles(self, source: bytes) -> bool:
        """Return whether the file with the change is Python."""
        try:
            compile(self.apply(source), self.path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return False
        return True


def mutants_of(path: str, source: bytes) -> list[Mutant]:
    """Return all changes of a file, except those that cannot be detected. Some may not be valid Python."""
    finder = _Finder(path, source)
    finder.visit(ast.parse(source))
    seen: Counter[tuple[str, ...]] = Counter()
    found = []
    for mutant in finder.found:
        key = (mutant.function, mutant.operator, mutant.before, mutant.after)
        number = seen[key]
        seen[key] += 1
        found.append(Mutant(**{**vars(mutant), "number": number}))
    return found


class _Finder:
    """A visitor of a file that skips texts for users, code for type checkers, and code without an effect."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.found: list[Mutant] = []
        self._function: list[str] = []
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def visit(self, node: ast.AST) -> None:
        """Mutate a node, then its parts."""
        if _is_for_people(node):
            return
        if isinstance(node, ast.expr | ast.stmt | ast.comprehension):
            for operator, new in _changes(node):
                self._add(operator, node, new)
        if isinstance(node, ast.If) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
            self._add("negated condition", node.test, ast.UnaryOp(ast.Not(), node.test))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            self._visit_definition(node)
        else:
            for part in _parts(node):
                self.visit(part)

    def _visit_definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        if node.name in ("__repr__", "__str__"):
            return
        self._function.append(node.name)
        if not isinstance(node, ast.ClassDef):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                if default:
                    self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self._function.pop()

    def _add(self, operator: str, node: ast.AST, new: ast.AST | str) -> None:
        if isinstance(node, ast.comprehension):
            first, last = node.ifs[0], node.ifs[-1]
        else:
            first = last = node  # type: ignore[assignment]
        start = self._starts[first.lineno - 1] + first.col_offset
        end = self._starts[(last.end_lineno or 0) - 1] + (last.end_col_offset or 0)
        text = new if isinstance(new, str) else ast.unparse(new)
        if isinstance(new, ast.expr) and not isinstance(new, ast.Constant | ast.Name | ast.Call | ast.Attribute):
            text = f"({text})"
        before = self.source[start:end].decode()
        function, lines = ".".join(self._function), (first.lineno, last.end_lineno or 0)
        self.found.append(Mutant(self.path, function, operator, before, text, start, end, lines))


def _parts(node: ast.AST) -> Iterable[ast.AST]:
    """Return the parts of a node that affect the program."""
    match node:
        case ast.AnnAssign():
            return [node.value] if node.value and not _is_quiet(node.target) else []
        case ast.Assign():
            return [] if any(map(_is_quiet, node.targets)) else [node.value]
        case ast.Call():
            values = [keyword.value for keyword in node.keywords if keyword.arg not in HARMLESS_KEYWORDS]
            return [node.func, *node.args, *values]
    return ast.iter_child_nodes(node)


def _is_for_people(node: ast.AST) -> bool:
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.Import() | ast.ImportFrom():
            return True
        case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Compare(left=ast.Name("__name__"))):
            return True
        case ast.Call() if _name(node.func) in SPEECH or _name(node.func).endswith("Error"):
            return True
    return False


def _is_quiet(target: ast.expr) -> bool:
    """Return whether no test should fix the value of a variable: a list of names, a waiting time."""
    name = _name(target)
    return name == "__all__" or name.upper().endswith(("_SECONDS", "TIMEOUT"))


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST | str]]:
    """Yield the names of operators with the replacement of the node."""
    match node:
        case ast.Compare() | ast.BoolOp():
            yield from _of_logic(node)
        case ast.BinOp(left, operator, right):
            yield from _of_arithmetic(left, operator, right)
        case ast.UnaryOp():
            yield from _of_sign(node)
        case ast.Constant(value):
            yield from _of_constant(value)
        case ast.Slice():
            yield from _of_slice(node)
        case ast.IfExp(test, body, orelse):
            yield "swapped branches", ast.IfExp(test, orelse, body)
        case ast.comprehension(ifs=[_, *_]):
            yield "dropped filter", ast.Constant(True)
        case ast.Call():
            yield from _of_call(node)
        case ast.stmt():
            yield from _of_statement(node)


def _of_logic(node: ast.Compare | ast.BoolOp) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            new = copy.deepcopy(node)
            new.ops[place] = COMPARISONS[type(operator)]()
            yield "comparison", new
        return
    for place in range(len(node.values)):
        rest = node.values[:place] + node.values[place + 1 :]
        yield "dropped term", rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    yield "and/or", ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)


def _of_arithmetic(left: ast.expr, operator: ast.operator, right: ast.expr) -> Iterator[tuple[str, ast.AST]]:
    if any(isinstance(side, ast.JoinedStr) or isinstance(getattr(side, "value", None), str) for side in (left, right)):
        return
    if other := ARITHMETIC.get(type(operator)):
        yield "arithmetic", ast.BinOp(left, other(), right)
    if isinstance(operator, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.BitOr | ast.BitAnd):
        yield "dropped term", left
    if isinstance(operator, ast.Add | ast.Mult | ast.BitOr | ast.BitAnd):
        yield "dropped term", right


def _of_sign(node: ast.UnaryOp) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node.op, ast.Not):
        yield "dropped not", ast.Call(ast.Name("bool"), [node.operand], [])
    elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield "dropped minus", node.operand


def _of_slice(node: ast.Slice) -> Iterator[tuple[str, str]]:
    one = ast.Constant(1)
    if node.upper:
        yield "slice end", ast.unparse(ast.Slice(node.lower, ast.BinOp(node.upper, ast.Sub(), one), node.step))
    if node.lower:
        yield "slice start", ast.unparse(ast.Slice(ast.BinOp(node.lower, ast.Add(), one), node.upper, node.step))


def _of_constant(value: object) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "constant", ast.Constant(value + 1)
        if value == 1:
            yield "constant", ast.Constant(0)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value + 1.0)


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = _name(node.func)
    if other := NEIGHBOURS.get(name):
        new = copy.deepcopy(node)
        if isinstance(new.func, ast.Name):
            new.func.id = other
        elif isinstance(new.func, ast.Attribute):
            new.func.attr = other
        if name == "sorted":
            new.keywords = []
        yield "neighbour", new
    if len(node.args) >= 2 and name not in SYMMETRIC and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
        first, second, *rest = node.args
        if ast.dump(first) != ast.dump(second):
            yield "swapped arguments", ast.Call(node.func, [second, first, *rest], node.keywords)
    for place, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg not in HARMLESS_KEYWORDS:
            rest_of = node.keywords[:place] + node.keywords[place + 1 :]
            yield "dropped keyword", ast.Call(node.func, node.args, rest_of)


def _of_statement(node: ast.stmt) -> Iterator[tuple[str, ast.AST | str]]:
    match node:
        case ast.Expr(ast.Call(func)) if _name(func) not in SPEECH:
            yield "removed call", "pass"
        case ast.AugAssign():
            yield "removed assignment", "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "removed assignment", "pass"
        case ast.Raise(exc=ast.expr()):
            yield "removed raise", "pass"
        case ast.Continue():
            yield "continue/break", "break"
        case ast.Return(ast.Tuple(elts=[first, second, *rest])):
            yield "swapped results", f"return {ast.unparse(ast.Tuple([second, first, *rest], ast.Load()))}"
