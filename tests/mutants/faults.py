"""The faults that can be planted in a source file: one small change each, found in its syntax tree."""

from __future__ import annotations

import ast
from dataclasses import dataclass

_OPERATORS = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div, ast.Add], ast.Div: [ast.Mult], ast.Pow: [ast.Mult],
    ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
    ast.LShift: [ast.RShift], ast.RShift: [ast.LShift], ast.And: [ast.Or], ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn], ast.NotIn: [ast.In],
}  # fmt: skip
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Place:
    """A piece of ``source``, at bytes ``start`` to ``end``, and the texts that may stand there instead."""

    source: str
    function: str  # its qualified name; "" for the module
    lines: range  # of the statement that it is in
    start: int
    end: int
    texts: tuple[str, ...]

    def planted(self, text: str) -> str:
        """``source`` with ``text`` here, every other line where it was."""
        whole = self.source.encode()
        lost = whole[self.start : self.end].count(b"\n") - text.count("\n")
        return (whole[: self.start] + text.encode() + b"\\\n" * lost + whole[self.end :]).decode()

    def is_fault(self, text: str) -> bool:
        """Whether ``text`` makes another program here. A broken line in a piece without brackets makes none."""
        try:
            return ast.dump(ast.parse(self.planted(text))) != ast.dump(ast.parse(self.source))
        except SyntaxError:
            return False

    def change(self, text: str) -> tuple[str, str]:
        """The text of the lines that change, before and after, on one line each."""
        before, after = self.source.splitlines(), self.planted(text).splitlines()
        first = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), 0)
        last = next((i for i in range(len(before) - 1, first, -1) if before[i] != after[i]), first)
        return tuple(
            " ".join(line.strip().rstrip("\\") for line in side[first : last + 1]).strip() for side in (before, after)
        )


def places(source: str) -> list[Place]:
    """Every place of ``source``, from top to bottom. Docstrings, annotations, f-strings, and what an exception or a
    warning says are left alone."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    return sorted(finder.found, key=lambda place: (place.start, place.end))


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str):
        self.source, self.found = source, []
        self.starts = [0]
        for line in source.encode().splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.names: list[str] = []
        self.bound: list[set[str]] = [set()]
        self.lines = range(0)

    def add(self, node, *texts: str):
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        if texts:
            self.found.append(Place(self.source, ".".join(self.names), self.lines, start, end, texts))

    def visit(self, node):
        around = self.lines
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno
            self.lines = range(node.lineno, max(node.lineno, last) + 1)
        super().visit(node)
        self.lines = around  # a decorator is visited after the body

    # What is looked into, and what is not.

    def generic_visit(self, node):
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self.visit(child)

    def visit_FunctionDef(self, node):
        self.names.append(node.name)
        every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        self.bound.append({argument.arg for argument in every} - {"self", "cls"})
        self.generic_visit(node)
        self.bound.pop()
        self.names.pop()

    def visit_ClassDef(self, node):
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()

    def visit_JoinedStr(self, node): ...

    def visit_Import(self, node): ...

    visit_ImportFrom = visit_Import

    # Statements.

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Call):
            self.add(node, "pass")
            if not ast.unparse(node.value.func).startswith("warnings."):
                self.generic_visit(node)
        elif not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Raise(self, node):
        self.add(node, "pass")

    def visit_Assign(self, node):
        target = node.targets[0]
        if ast.unparse(target) == "__all__":
            return
        if isinstance(target, ast.Attribute | ast.Subscript) or ast.unparse(target) in self.bound[-1]:
            self.add(node, "pass")
        self.bound[-1] |= {name.id for each in node.targets for name in ast.walk(each) if isinstance(name, ast.Name)}
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.add(node, "pass")
        for new in _OPERATORS.get(type(node.op), []):
            self.add(node, ast.unparse(ast.AugAssign(node.target, new(), node.value)))
        self.generic_visit(node)

    def visit_Continue(self, node):
        self.add(node, "pass")

    visit_Break = visit_Continue

    def visit_Return(self, node):
        if isinstance(node.value, ast.Name):
            self.add(node.value, *sorted(self.bound[-1] - {node.value.id}))
        elif node.value is not None:
            self.generic_visit(node)

    def visit_If(self, node):
        if ast.unparse(node.test) != "TYPE_CHECKING":
            self.add(node.test, f"(not ({ast.unparse(node.test)}))")
            self.generic_visit(node)

    visit_IfExp = visit_If

    # Expressions.

    def visit_BinOp(self, node):
        self.add(node, *(f"({ast.unparse(ast.BinOp(node.left, op(), node.right))})" for op in self.others(node.op)))
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        self.add(node, *(f"({ast.unparse(ast.BoolOp(op(), node.values))})" for op in self.others(node.op)))
        self.generic_visit(node)

    def visit_Compare(self, node):
        for i, op in enumerate(node.ops):
            swapped = ([*node.ops[:i], new(), *node.ops[i + 1 :]] for new in self.others(op))
            self.add(node, *(f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})" for ops in swapped))
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not | ast.USub):
            self.add(node, f"({ast.unparse(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node):
        if isinstance(node.value, bool):
            self.add(node, repr(not node.value))
        elif isinstance(node.value, int | float):
            value = node.value
            self.add(
                node,
                *(
                    f"({new})" if new < 0 else f"{new}"
                    for new in dict.fromkeys((value + 1, value - 1, value * 2, -value))
                    if new != value
                ),
            )

    def visit_Call(self, node):
        for i, (a, b) in enumerate(zip(node.args, node.args[1:])):
            if not isinstance(a, ast.Starred) and not isinstance(b, ast.Starred) and ast.dump(a) != ast.dump(b):
                self.add(node, self.call(node, [*node.args[:i], b, a, *node.args[i + 2 :]], node.keywords))
        for i, keyword in enumerate(node.keywords):
            if keyword.arg:
                self.add(node, self.call(node, node.args, [*node.keywords[:i], *node.keywords[i + 1 :]]))
        self.generic_visit(node)

    @staticmethod
    def call(node, arguments, keywords):
        return ast.unparse(ast.Call(node.func, arguments, keywords))

    @staticmethod
    def others(operator):
        return _OPERATORS.get(type(operator), [])
