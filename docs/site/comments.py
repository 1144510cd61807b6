"""Fields are described by the comments behind them, and options by their help texts: both become docstrings."""

import ast
import re
from typing import Any

import griffe

_COMMENT = re.compile(r"^[^#]*#\s+(?P<text>.*)$")


class Comments(griffe.Extension):
    """Give each attribute without a docstring the one that stands in its source."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:  # noqa: ARG002
        """Read the comment, or the call of `option`, of an attribute's line."""
        if attr.docstring is not None or not isinstance(attr.parent, griffe.Class):
            return
        text = ""
        option = getattr(node, "value", None)
        if isinstance(option, ast.Call) and isinstance(option.func, ast.Name) and option.func.id == "option":
            text = ast.literal_eval(option.args[1])
            attr.value = ast.unparse(option.args[0])
        elif comment := _COMMENT.match(attr.source.splitlines()[-1]):
            text = comment["text"]
        if text:
            attr.docstring = griffe.Docstring(text[:1].upper() + text[1:].rstrip(".") + ".", parent=attr)
