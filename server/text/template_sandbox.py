"""Where a chat template runs: it reaches nothing but its variables, and what it does is bounded.

A template is a program, and may loop for ever. Every turn of a loop and every start of a macro looks at the clock, and
what joins texts or lists looks at their length. Not bounded is what a single filter or method makes of its arguments.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_RENDER_SECONDS = 2.0
MAX_LENGTH = 2**24  # of a text or list that is made, in characters or items

# Names that no template can write, and no variable of a request can have.
DEADLINE = "the deadline"  # the variable that says when to give up, by `time.perf_counter`
_CHECK_TIME = "check the time"
_CONCATENATE = "concatenate texts"


class TemplateLimitError(Exception):
    """A template takes too long, or makes too much."""


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with bounds on time and length, set up as chat templates expect it."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters |= {_CHECK_TIME: _check_time, _CONCATENATE: self._concatenate}

    def compile_bounded(self, tree: nodes.Template) -> jinja2.Template:
        """Return the template that `tree` is, with the checks built in; it is rendered with a `DEADLINE`."""
        code = self.compile(_Bounds().visit(tree))
        return jinja2.Template.from_code(self, code, self.make_globals(None))

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a template, a macro or a block has written."""
        length, kept = 0, []
        for piece in pieces:
            length += len(piece)
            _check_length(length)
            kept.append(piece)
        return "".join(kept)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Do what an intercepted operator says."""
        if operator == "**":  # takes as long as it likes, and no template needs it
            raise TemplateLimitError("** is not supported")
        _check_length(_product_length(left, right) if operator == "*" else _length(left) + _length(right))
        return super().call_binop(context, operator, left, right)

    def _concatenate(self, values: Sequence[object]) -> str:
        return self.concat(map(str, values))


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (an instance attribute in jinja2's typing)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Bounds(NodeTransformer):
    """Puts checks into a template; the methods have the names of the nodes that they change."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_time_is_left(), lineno=node.lineno))
        if node.test is not None:  # turns that it skips never come to the body
            node.test = nodes.And(_time_is_left(), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_time_is_left(), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _CONCATENATE)


def _time_is_left() -> nodes.Expr:
    return _filter(nodes.Const(True), _CHECK_TIME)


def _filter(value: nodes.Expr, name: str) -> nodes.Expr:
    return nodes.Filter(value, name, [], [], None, None)


@jinja2.pass_context
def _check_time(context: Context, value: bool) -> bool:
    if time.perf_counter() > context.parent[DEADLINE]:
        raise TemplateLimitError(f"not done after {MAX_RENDER_SECONDS:g} seconds")
    return value


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise TemplateLimitError(f"makes a text or list longer than {MAX_LENGTH}")


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _product_length(left: Any, right: Any) -> int:
    if isinstance(right, int):
        return _length(left) * right
    return _length(right) * left if isinstance(left, int) else 0
