"""Limit the time, memory and depth of chat templates, by a sandbox in which every operation costs units.

A rendering has a budget of units that depends on the length of its messages, and ends with an error when it is used up.
A unit is about a microsecond of work. An operation is paid for before it runs, so that none can take long or make
something large, and whether a template is refused does not depend on the machine.

- The cost of a loop's iteration or a macro's call is at most the number of nodes in its body. `Metering` inserts this
  cost into the syntax tree, and meters operations whose cost depends on their operands.
- Operators, filters, tests and methods are paid for by the sizes of their operands, and of their result if it may be
  larger. Only those are available that chat templates use and whose cost is known.
- Data are walked, and paid for, before all of their content is used (compared, printed, hashed): a list that contains
  another list twice, which contains another twice, and so on, is small in memory and enormous in print.
"""

import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import jinja2
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Namespace

from rag.models.tokenizer.template_tree import MAX_DEPTH, MAX_LENGTH, Metering, refused, require

UNITS = 1_000_000  # of any rendering ...
UNITS_A_CHARACTER = 4  # ... and for each character of the messages

MAX_CALLS = 40  # of macros inside one another

_MAX_NUMBER = 100_000  # as the argument of a filter, test, method or function
_MAX_BITS = 10_000  # of an integer that is computed
_CHARACTERS = 16  # copied or compared for one unit
_PAIRS = 1000  # of characters compared for one unit, where each may be compared with each of another text
_MAX_PADDING = 10_000  # characters to which printf-style formatting may pad a value
_MAX_INDENT = 16
_MAX_DIGITS = 100  # after the decimal point of a rounded number

_STR_METHODS = frozenset(
    "capitalize casefold center count endswith find index isalnum isalpha isascii isdecimal isdigit "
    "isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
    "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper zfill".split()
)
_METHODS = {
    str: _STR_METHODS,
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
}
_FILTERS = (
    "abs attr batch capitalize center count d default dictsort e escape first float format groupby "
    "indent int items join last length list lower map max min reject rejectattr replace reverse round "
    "safe select selectattr slice sort string sum title trim truncate unique upper wordcount"
).split()
_FREE_TESTS = (  # they use only a value's type or its first bytes
    "boolean callable defined escaped false filter float integer iterable mapping none number sameas "
    "sequence string test true undefined"
).split()
# Filters that do not use the content of items.
_SHALLOW = frozenset("batch count d default first items last length list reverse slice".split())
_LISTING = frozenset(  # filters that list a text's characters, or look up an attribute of each item
    "batch dictsort groupby list map max min reject rejectattr reverse select selectattr slice sort "
    "sum unique".split()
)
_ARITHMETIC_TESTS = ("divisibleby", "even", "odd")  # Python's %, which formats text


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with costs, for one rendering at a time: `allow` sets the budget of the next one.

    The class is long because jinja2 calls its methods, and all of them share one budget.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any):
        # jinja2's optimizer would compute without metering
        super().__init__(**options, optimized=False, finalize=self.weighed)
        self.filters = {name: self._paid(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {"_each": self._each, "_weighed": self.weighed, "_copied": self._copied}
        free = {name: self.tests[name] for name in _FREE_TESTS}
        self.tests = {name: self._paid(name, test) for name, test in self.tests.items()} | free
        del self.globals["lipsum"]
        self._left, self._calls = 0, 0
        self._bodies: dict[str, int] = {}
        self._nodes = 0

    def template(self, source: str) -> jinja2.Template:
        """Compile a template. Raises UserError if it is beyond the limits, and what jinja2 raises."""
        if len(source) > MAX_LENGTH:
            raise refused(f"it has {len(source):,} characters, and at most {MAX_LENGTH:,} are read")
        self.allow(0)
        try:
            tree = self.parse(source)
        except RecursionError as error:
            raise refused("it is nested too deep") from error
        metering = Metering()
        tree = metering.visit(tree)
        self._nodes, self._bodies = metering.count, metering.bodies
        return self.from_string(tree)

    def allow(self, characters: int) -> None:
        """Set the budget of the next rendering, for messages of so many characters."""
        self._left, self._calls = UNITS + UNITS_A_CHARACTER * characters - self._nodes, 0

    def pay(self, units: int) -> None:
        """Take units from the budget. Raises UserError once it is used up."""
        self._left -= units
        if self._left < 0:
            raise refused("it takes too long, or writes too much, for these messages")

    def add_filter(self, name: str, function: Callable) -> None:
        """Add a filter, which is paid for by the sizes of its arguments."""
        self.filters[name] = self._paid(name, function)

    # --- methods that jinja2 calls

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self._pay_format(left, right)
        elif operator == "*":
            self._pay_repetition(left, right)
            self._pay_repetition(right, left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            require(left.bit_length() * right <= _MAX_BITS, "it computes with huge numbers")
        return self._copied(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(argument) is tuple:
            self.weighed(argument)  # it is hashed
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, formatter = str(value.__self__), _Formatter(self)
        if value.__name__ == "format_map":
            return lambda values: formatter.vformat(text, (), values)
        return lambda *args, **kwargs: formatter.vformat(text, args, kwargs)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(__obj, Macro | BlockReference | LoopContext):
            return __self._call_body(__context, __obj, *args, **kwargs)
        given = [value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")]
        __self._pay_arguments([*args, *given])
        if isinstance(__obj, types.MethodType | types.BuiltinMethodType):
            __self._pay_method(__obj, args)
        return __self._copied(super().call(__context, __obj, *args, **kwargs))

    def _call_body(self, context: Any, body: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a macro, a block, or a recursive loop."""
        if isinstance(body, LoopContext):
            args = (self._each(args[0], self._nodes), *args[1:]) if args else args
        self.pay(self._bodies.get(getattr(body, "name", None) or "", self._nodes))
        require(self._calls < MAX_CALLS, "its macros call one another too deep")
        self._calls += 1
        try:
            return super().call(context, body, *args, **kwargs)
        finally:
            self._calls -= 1

    # --- costs

    def weighed(self, value: Any) -> Any:
        """Pay for all of a value's content, and return the value."""
        if isinstance(value, str):
            self.pay(1 + len(value) // _CHARACTERS)
        elif value is None or isinstance(value, int | float):
            self.pay(1)
        else:
            self._walk(value)
        return value

    def _walk(self, value: Any) -> None:
        left = [(value, 1)]
        while left:
            value, depth = left.pop()
            self.pay(1)
            if isinstance(value, str):
                self.pay(len(value) // _CHARACTERS)
                continue
            if isinstance(value, Namespace):
                value = object.__getattribute__(value, "_Namespace__attrs")
            if isinstance(value, range) or not isinstance(value, Sized) or not isinstance(value, Iterable):
                continue
            require(depth <= MAX_DEPTH, "its data are nested too deep")
            if isinstance(value, LoopContext | jinja2.Undefined):
                continue
            self.pay(len(value))
            inside = [*value, *value.values()] if isinstance(value, Mapping) else value
            left += [(item, depth + 1) for item in inside]

    def _copied(self, value: Any) -> Any:
        """Pay for a value's own memory, without that of its items, and return the value."""
        if isinstance(value, str):
            self.pay(1 + len(value) // _CHARACTERS)
        elif isinstance(value, list | tuple | dict):
            self.pay(1 + len(value))
        elif isinstance(value, int):
            require(value.bit_length() <= _MAX_BITS, "it computes with huge numbers")
        elif isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return list(self._counted(value))  # Python crashes on thousands of iterators inside one another
        return value

    def _each(self, items: Sized, nodes_inside: int) -> Sized:
        """Charge the cost of a loop with so many nodes in its body, and return the items."""
        self.pay(len(items) * (1 + nodes_inside))
        return items

    def _counted(self, items: Iterator) -> Iterator:
        for item in items:
            self.pay(1)
            yield item

    def concat(self, parts: Iterable[str]) -> str:
        """Pay for the parts of an output, and join them."""
        paid = []
        for part in parts:
            self.pay(1 + len(part) // _CHARACTERS)
            paid.append(part)
        return "".join(paid)

    def _paid(self, name: str, function: Any) -> Callable:
        """Return a filter or test that is paid for. It takes the context, so that jinja2 does not call it early."""
        return jinja2.pass_context(partial(self._call_paid, name, function))

    def _call_paid(
        self, name: str, function: Callable, context: Any, value: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        self._pay_filter(name, value, [*args, *kwargs.values()])
        wanted = getattr(function, "jinja_pass_arg", None)  # what jinja2 passes to the function first
        if wanted is None:
            return self._copied(function(value, *args, **kwargs))
        passed = {"context": context, "eval_context": context.eval_ctx, "environment": self}[wanted.name]
        return self._copied(function(passed, value, *args, **kwargs))

    def _pay_arguments(self, values: Iterable[Any]) -> None:
        for value in values:
            self.weighed(value)
            if isinstance(value, int):
                require(abs(value) <= _MAX_NUMBER, f"it calls something with a number above {_MAX_NUMBER:,}")
                self.pay(abs(value) // _CHARACTERS)

    def _pay_filter(self, name: str, value: Any, args: list[Any]) -> None:
        if name not in _SHALLOW:
            self.weighed(value)
        self._pay_arguments(args)
        texts = [arg for arg in args if isinstance(arg, str)]
        match name:
            case "replace":
                self._pay_replace(str(value), [str(arg) for arg in args])
            case "join":
                self._pay_join(len(value), *texts)
            case "format":
                self._pay_format(str(value), args)
            case "indent":
                widths = [
                    len(arg) if isinstance(arg, str) else abs(arg)
                    for arg in args
                    if isinstance(arg, str | int)
                ]
                self.pay((1 + len(str(value).splitlines())) * max([4, *widths]) // _CHARACTERS)
            case "round":
                require(
                    all(isinstance(arg, str) or arg <= _MAX_DIGITS for arg in args),
                    "it rounds to many digits",
                )
            case "sum":
                require(
                    all(arg is None or isinstance(arg, str | int | float) for arg in args), "it adds lists up"
                )
            case "tojson":
                require(all(arg is None or isinstance(arg, int) for arg in args), "it indents by text")
                require(
                    all(arg <= _MAX_INDENT for arg in args if arg), f"it indents by more than {_MAX_INDENT}"
                )
                self.pay(self._price_of(value) * (MAX_DEPTH if any(args) else 1))
            case "trim":
                self.pay(len(str(value)) * sum(map(len, texts)) // _PAIRS)
            case _ if name in _ARITHMETIC_TESTS:
                require(
                    isinstance(value, int | float), f"it asks whether something other than a number is {name}"
                )
        if name in _LISTING and isinstance(value, Sized):
            self.pay(
                len(value) if isinstance(value, str) else len(value) * sum(map(len, texts)) // _CHARACTERS
            )

    def _price_of(self, value: Any) -> int:
        before = self._left
        self.weighed(value)
        return before - self._left

    def _pay_method(self, method: Any, args: tuple) -> None:
        owner, name = method.__self__, method.__name__
        if isinstance(owner, types.ModuleType | Cycler | LoopContext):
            return
        kind = next((kind for kind in _METHODS if isinstance(owner, kind)), None)
        require(kind is not None and name in _METHODS[kind], f"it calls {type(owner).__name__}.{name}")
        if kind is dict:
            return
        self.weighed(owner)
        if kind is not str:
            return
        texts = [len(arg) for arg in args if isinstance(arg, str)]
        match name:
            case "replace":
                self._pay_replace(owner, args)
            case "join":
                for parts in args:
                    self._pay_join(len(parts) if isinstance(parts, Sized) else 0, owner)
            case "split" | "rsplit" | "splitlines":
                self.pay(owner.count(args[0]) if texts and args[0] else len(owner) // 2)
                self.pay(len(owner) * sum(texts) // _PAIRS)
            case _:
                self.pay(len(owner) * sum(texts) // _PAIRS)

    def _pay_replace(self, text: str, others: Iterable[Any]) -> None:
        """Pay for replacing one of two texts by the other, in either direction."""
        texts = [other for other in others if isinstance(other, str)]
        longest = max(map(len, texts), default=0)
        self.pay(sum(map(text.count, texts)) * (1 + longest // _CHARACTERS))

    def _pay_join(self, count: int, *separators: Any) -> None:
        self.pay(count * (1 + sum(len(str(text)) for text in separators) // _CHARACTERS))

    def _pay_repetition(self, value: Any, count: Any) -> None:
        if not isinstance(count, int):
            return
        if isinstance(value, str):
            self.pay(len(value) * max(count, 0) // _CHARACTERS)
        elif isinstance(value, list | tuple):
            self.pay(len(value) * max(count, 0))

    def _pay_format(self, form: str, values: Any) -> None:
        """Pay for printf-style formatting, where one value may be written many times and be padded."""
        require(not re.search(r"\*|\d{5}", form) or "%" not in form, "it pads text")
        padding = _MAX_PADDING // _CHARACTERS if re.search(r"\d", form) else 0
        self.pay(form.count("%") * (self._price_of(values) + padding))


class _Formatter(SandboxedFormatter):
    """str.format, where each field is paid for."""

    def __init__(self, environment: MeteredEnvironment):
        super().__init__(environment)
        self._metered = environment

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(self._metered.weighed(value), conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        require(not re.search(r"\d{5}", format_spec), "it pads text")
        return self._metered.weighed(super().format_field(self._metered.weighed(value), format_spec))
