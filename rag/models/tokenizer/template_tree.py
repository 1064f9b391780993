"""Check the syntax tree of a chat template against limits, and insert metering into it.

The inserted filters `_each`, `_weighed` and `_copied` are those of rag.models.tokenizer.template_limits.
"""

from typing import Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from rag.types import UserError

MAX_LENGTH = 200_000  # characters of a template
MAX_DEPTH = 100  # levels of its syntax tree, and of data
MAX_NODES = 10_000
MAX_COPIES = 1_000_000  # names times branches and scopes: jinja2's compiler copies the names for each

_EQUALITY = ("eq", "ne", "gt", "gteq", "lt", "lteq")


class Metering(NodeTransformer):
    """Inserts metering into a template's syntax tree, and counts its nodes. Raises UserError beyond the limits."""

    def __init__(self) -> None:
        self.count = 0
        self._names: set[str] = set()
        self._scopes = 0
        self.bodies: dict[str, int] = {}  # the nodes of macros by name; the most if several share a name
        self._depth = 0

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        self.count += 1
        self._depth += 1
        require(self.count <= MAX_NODES, f"it has more than {MAX_NODES:,} parts")
        require(self._depth <= MAX_DEPTH, "it is nested too deep")
        self._names |= {node.name} if isinstance(node, nodes.Name) else set()
        self._scopes += isinstance(node, nodes.Stmt) and not isinstance(node, nodes.Output | nodes.Assign)
        require(len(self._names) * self._scopes <= MAX_COPIES, "it has too many branches and variables")
        super().generic_visit(node, *args, **kwargs)
        self._depth -= 1
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        before = self.count
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_each", nodes.Const(self.count - before))
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        before, name = self.count, getattr(node, "name", "caller")
        self.generic_visit(node)
        self.bodies[name] = max(self.bodies.get(name, 0), self.count - before)
        return node

    visit_CallBlock = visit_Macro

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if any(map(_is_small, sides)) and all(operand.op in _EQUALITY for operand in node.ops):
            return node  # this comparison is fast
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_weighed(child) for child in node.nodes]
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _weighed(node.key)  # it is hashed
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_copied") if isinstance(node.arg, nodes.Slice) else node

    def _other_files(self, node: nodes.Node) -> nodes.Node:
        raise refused("it is made of several files or blocks")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_Block = _other_files


def _filtered(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if _is_small(node) else _filtered(node, "_weighed")


def _is_small(node: nodes.Expr) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(map(_is_small, node.items))
    return isinstance(node, nodes.Const | nodes.TemplateData)


def require(holds: bool, otherwise: str) -> None:
    """Raise UserError with the reason `otherwise` unless a condition holds."""
    if not holds:
        raise refused(otherwise)


def refused(reason: str) -> UserError:
    """Return the error for a template beyond the limits."""
    return UserError(
        f"the checkpoint's chat template goes beyond what such templates may do ({reason}); take another"
    )
