"""The Jinja environment in which chat templates run: what they may use, and how much.

A template comes with a model file and is untrusted code. Jinja's sandbox keeps it from Python's internals; what is added
here keeps it from running or growing without end. Names and filters are those that transformers gives its templates.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateRuntimeError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # loop passes and macro calls of one rendering: seconds; templates that look back are quadratic in messages
MAX_BITS = 1 << 16  # of a whole number: arithmetic with larger ones takes long
MAX_TEXT = 1 << 26  # characters (or elements) of the output and of anything made on the way
BUDGET = "\0budget"  # a variable of the rendering; the NUL keeps templates from naming it
WIDE = re.compile(r"%[-+ #0.]*(\*|[0-9.]*[0-9]{6})|\{[^{}]*:[^{}]*([0-9]{6}|\{)")  # six digits, or a width from elsewhere
GROWING = frozenset(("ljust", "rjust", "center", "zfill", "expandtabs", "replace", "join"))  # methods and filters


class Refusal(TemplateRuntimeError):
    """The template itself raised: it does not accept this conversation."""


class Budget:
    """What one rendering may still spend."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS

    def spend(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps: an endless loop?")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits; `compile_template` is the way in."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
        self.filters["tojson"] = tojson
        self.filters["spend_step"] = spend_step
        self.filters["concatenate"] = concatenate
        for name in ("center", "indent", "replace", "join", "batch", "slice", "format"):
            self.filters[name] = _bounded_filter(name, self.filters[name])
        self.globals["raise_exception"] = refuse
        self.globals["strftime_now"] = strftime_now
        self.globals["dict"] = Dictionary()
        self.globals["namespace"] = PublicNamespace
        del self.globals["lipsum"]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _bound(len(left) + len(right))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            _bound(left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length(), MAX_BITS)
        elif operator == "*":
            _bound(_extent(left) * _extent(right))
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ in GROWING:
            _bound_result(__obj.__name__, owner, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Reaching for internals ends the rendering; Jinja alone would print nothing and go on."""
        if attribute.startswith("_"):
            raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which the sandbox forbids")
        return super().unsafe_undefined(obj, attribute)


class Generation(Extension):
    """The tag `{% generation %}…{% endgeneration %}` by which templates mark what the assistant said: here just its body."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller: Any) -> str:
        return caller()


class PublicNamespace(Namespace):
    """Jinja's `namespace`, without underscored names."""

    def __init__(*arguments: Any, **attributes: Any) -> None:  # no names of our own: `namespace(self=…)` is a template's right
        self, *values = arguments
        initial = dict(*values, **attributes)
        for name in initial:
            _check_name(name)
        Namespace.__init__(self, initial)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class Dictionary:
    """The global `dict`: makes dictionaries, without giving the type itself away."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class Metering(NodeTransformer):
    """Puts a step at the head of every loop and macro body, and takes `~` where its result can be measured."""

    def visit_For(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.Filter(nodes.Const(None), "spend_step", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "concatenate", [], [], None, None).set_lineno(node.lineno)


def compile_template(source: str) -> Any:
    """A template ready to `generate`; its variables must include BUDGET. Raises jinja2's TemplateSyntaxError."""
    environment = Sandbox()
    tree = Metering().visit(environment.parse(source))
    tree.set_environment(environment)
    return environment.template_class.from_code(environment, environment.compile(tree), environment.make_globals(None))


def refuse(message: str) -> None:
    """The global `raise_exception`."""
    raise Refusal(str(message))


def strftime_now(pattern: str) -> str:
    """The local time in the given format."""
    _check_widths(pattern)
    return datetime.now().strftime(pattern)


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """JSON as models have seen it in training: no HTML escapes, letters of all scripts as they are."""
    if isinstance(indent, int):
        _bound(indent * 1000)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context
def spend_step(context: Context, value: Any) -> None:
    """One pass through a loop or macro."""
    context.parent[BUDGET].spend()


def concatenate(values: list) -> str:
    """What `~` means."""
    texts = [str(value) for value in values]
    _bound(sum(map(len, texts)))
    return "".join(texts)


def _bounded_filter(name: str, filter: Any) -> Any:
    def bounded(*args: Any, **kwargs: Any) -> Any:
        value, *others = args[1:] if hasattr(filter, "jinja_pass_arg") else args
        _bound_result(name, value, others, kwargs)
        return filter(*args, **kwargs)

    if hasattr(filter, "jinja_pass_arg"):  # Jinja's evaluation context comes first
        bounded.jinja_pass_arg = filter.jinja_pass_arg
    return bounded


def _bound_result(name: str, value: Any, args: Sequence, kwargs: dict) -> None:
    """Bounds what a text operation may make: an argument multiplies the value at most once."""
    if name == "format":
        _check_widths(str(value))
    factors = [*(args[1:2] if name == "replace" else args), *kwargs.values()]  # what is replaced does not count, what by does
    _bound(_extent(value) * max([1, *map(_extent, factors)]))


def _extent(value: Any) -> int:
    """How much of something there is: elements of a sequence, the number itself."""
    if isinstance(value, int):
        return abs(value)
    return max(len(value), 1) if hasattr(value, "__len__") else 1


def _bound(size: int, limit: int = MAX_TEXT) -> None:
    if size > limit:
        raise SecurityError(f"it makes a value of more than {limit:,} {'bits' if limit == MAX_BITS else 'characters'}")


def _check_widths(pattern: str) -> None:
    """A format such as "%999999999d" makes text from nothing; a width taken from an argument may."""
    if WIDE.search(pattern):
        raise SecurityError(f"the format {pattern[:40]!r} is too wide")


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace, and names with an underscore are forbidden there")
