"""The grammar of an exported program: what each JSON object may hold, rebuilt from what passed.

Every rule takes a value and returns it anew, so that the result holds nothing that no rule named.
What only describes where a node came from is left out: loading looks some of it up by name.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from simexplain.errors import printable
from simexplain.models.expressions import BadExpressionError, arithmetic, check_guard
from simexplain.models.operators import is_known_operator

Rule = Callable[[Any], Any]

ADVICE = "export the network again"
WRAP = "export a wrapper whose forward returns the embedding as a tensor"
_DEEPEST_SPEC, _DEEPEST_GRAPH, _LONGEST_SPEC = 32, 8, 1_000_000
_WIDEST = 2**63
_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,499}", re.ASCII)
_PART = re.compile(r"-?\w[\w \-+/]{0,199}(@\d{1,4})?", re.ASCII)
_TAKEN = frozenset(dir(nn.Module()))
_TEXT = re.compile(r"[\w.,:+\-> ()=*/<]{0,500}", re.ASCII)
_KEY = re.compile(r"[\w@.\-+/ ]{0,500}", re.ASCII)
_TYPE = re.compile(r"[\w.<>]{0,500}", re.ASCII)
_SYMBOL = re.compile(r"[A-Za-z]\w{0,99}", re.ASCII)
_COUNTED = re.compile(r"(u|zuf)\d{1,5}", re.ASCII)
_DIALECTS = ("ATEN", "TRAINING")
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict")


class UnvettedError(ValueError):
    """Something that a program needs not hold.

    Attributes:
        what: The item, to follow "holds".
        advice: What to do about it.
    """

    def __init__(self, what: str, advice: str = ADVICE) -> None:
        super().__init__(what)
        self.what = what
        self.advice = advice


def shown(value: Any) -> str:
    """A value from the file in one short line."""
    text = printable(str(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_json(content: bytes) -> Any:
    """JSON without doubled keys, without NaN, with integers of at most 64 bits.

    Raises:
        UnvettedError: If it is anything else.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            raise UnvettedError("an object with one key twice")
        return made

    def constant(text: str) -> Any:
        raise UnvettedError(f"the number {text}")

    def whole(text: str) -> int:
        if len(text) > 20:
            raise UnvettedError("an integer of more than 64 bits")
        return int(text)

    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_int=whole,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UnvettedError("JSON that cannot be read") from error


# Rules for single values.


def boolean(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise UnvettedError(f"{shown(value)} for true or false")
    return value


def integer(low: int = -_WIDEST, high: int = _WIDEST) -> Rule:
    """An integer between two bounds, both included."""

    def rule(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise UnvettedError(f"{shown(value)} for an integer")
        return value

    return rule


def number(value: Any) -> float | str:
    """A number; those that JSON lacks are written as texts."""
    if value in ("Infinity", "-Infinity", "NaN"):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UnvettedError(f"{shown(value)} for a number")
    return value


def absent(value: Any) -> bool:
    """The value that stands for None: torch writes true, or nothing at all."""
    if value not in (True, False, None, [], ()):
        raise UnvettedError(f"{shown(value)} for nothing")
    return True


def text(pattern: re.Pattern[str], what: str) -> Rule:
    """A text that a pattern describes."""

    def rule(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise UnvettedError(f"{what} {shown(value)}")
        return value

    return rule


plain_text = text(_TEXT, "odd text:")


def plain(value: Any) -> str:
    """Any text, to be checked further."""
    if not isinstance(value, str):
        raise UnvettedError(f"{shown(value)} for a text")
    return value


def one_of(choices: tuple[str, ...], what: str) -> Rule:
    """One of some texts."""

    def rule(value: Any) -> str:
        if value not in choices:
            raise UnvettedError(f"{what} {shown(value)}")
        return str(value)

    return rule


def name(value: Any) -> str:
    """A name that may become a variable in the Python source that torch writes."""
    known = isinstance(value, str) and _IDENTIFIER.fullmatch(value)
    if not known or keyword.iskeyword(value) or value.startswith("__"):
        raise UnvettedError(f"the name {shown(value)}")
    return str(value)


def argument_name(value: Any) -> str:
    """The name of an operator's argument, some of which are keywords of Python; may be empty."""
    if value != "" and not (isinstance(value, str) and _IDENTIFIER.fullmatch(value)):
        raise UnvettedError(f"the name {shown(value)}")
    return name(value) if value and not keyword.iskeyword(value) else str(value)


def module_path(value: Any) -> str:
    """The dotted name of a module or a tensor, whose parts become attributes of modules."""
    for part in str(value).split(".") if isinstance(value, str) else [None]:
        good = part is not None and _PART.fullmatch(part) and not part.startswith("__")
        if not good or part in _TAKEN:
            raise UnvettedError(f"the name {shown(value)}")
    return str(value)


def operator(value: Any) -> str:
    """The full name of a known operator."""
    if not isinstance(value, str) or not is_known_operator(value):
        raise UnvettedError(f"the operator {shown(value)}")
    return value


def expression(value: Any) -> str:
    """Arithmetic on sizes."""
    try:
        return arithmetic(value)
    except (BadExpressionError, TypeError, AttributeError) as error:
        raise UnvettedError(f"the expression {shown(value)}") from error


def refused(what: str) -> Rule:
    """Nothing at all: the field is known, and what it holds could run code."""

    def rule(value: Any) -> Any:
        raise UnvettedError(f"{what} {shown(value)}")

    return rule


# Rules for compound values.


def optional(rule: Rule) -> Rule:
    """Null, or what the rule takes."""
    return lambda value: None if value is None else rule(value)


def listing(rule: Rule) -> Rule:
    """A list, each of whose parts the rule takes."""

    def each(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise UnvettedError(f"{shown(value)} for a list")
        return [rule(part) for part in value]

    return each


def mapping(key: Rule, rule: Rule) -> Rule:
    """An object with free keys."""

    def each(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise UnvettedError(f"{shown(value)} for an object")
        return {key(own): rule(part) for own, part in value.items()}

    return each


def record(what: str, /, **fields: Rule) -> Rule:
    """An object with these keys alone, any of which may be missing.

    Keys of a newer torch are dropped where they hold nothing.
    """

    def each(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise UnvettedError(f"{shown(value)} for {what}")
        for key, part in value.items():
            if key not in fields and part not in (None, [], {}):
                raise UnvettedError(f"the unknown key {shown(key)} in {what}")
        return {key: rule(value[key]) for key, rule in fields.items() if key in value}

    return each


def union(what: str, /, **fields: Rule) -> Rule:
    """An object with exactly one of these keys."""

    def each(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) != 1:
            raise UnvettedError(f"{shown(value)} for {what}")
        ((key, part),) = value.items()
        if key not in fields:
            raise UnvettedError(f"the unknown key {shown(key)} in {what}")
        return {key: fields[key](part)}

    return each


def left_out(value: Any) -> None:
    """What loading needs not see."""


def _without_nothing(rule: Rule) -> Rule:
    """A record without the keys that were left out."""
    return lambda value: {key: part for key, part in rule(value).items() if part is not None}


# Containers of inputs and outputs: JSON in a text, with further JSON in the texts inside it.


def container(value: Any) -> str:
    """The layout of inputs or outputs: plain tuples, lists and dictionaries with plain keys."""
    if not isinstance(value, str) or len(value) > _LONGEST_SPEC:
        raise UnvettedError("a layout of inputs or outputs that is not a short text")
    spec = read_json(value.encode("utf-8", "surrogatepass"))
    if not isinstance(spec, list) or len(spec) != 2 or spec[0] != 1 or spec[0] is True:
        raise UnvettedError(f"a layout of inputs or outputs of an unknown version: {shown(spec)}")
    return json.dumps([1, _container_node(spec[1], 0)])


def _container_node(node: Any, depth: int) -> dict[str, Any]:
    if depth > _DEEPEST_SPEC:
        raise UnvettedError("containers nested too deeply")
    if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
        raise UnvettedError(f"the container {shown(node)}")
    kind, context, children = node["type"], node["context"], node["children_spec"]
    if not isinstance(children, list):
        raise UnvettedError(f"the container {shown(node)}")
    if kind is None:
        if context is not None or children:
            raise UnvettedError(f"the container {shown(node)}")
        return {"type": None, "context": None, "children_spec": []}
    if kind not in _CONTAINERS:
        raise UnvettedError(f"the container {shown(kind)} as an input or output", WRAP)
    made = [_container_node(child, depth + 1) for child in children]
    return {"type": kind, "context": _context(kind, context, len(made)), "children_spec": made}


def _context(kind: str, context: Any, count: int) -> str:
    """The context written anew: null for sequences, the keys for a dictionary."""
    keys = read_json(context.encode("utf-8", "surrogatepass")) if isinstance(context, str) else None
    if kind != "builtins.dict":
        if keys is not None or not isinstance(context, (str, type(None))):
            raise UnvettedError(f"a container of its own: {shown(context)}", WRAP)
        return "null"
    if not isinstance(keys, list) or len(keys) != count:
        raise UnvettedError(f"a container of its own: {shown(context)}", WRAP)
    for key in keys:
        if not isinstance(key, str):
            integer()(key)
        else:
            name(key)
    return json.dumps(keys)


# Names of modules, which say in what order a program is unflattened.


def module_stack(value: Any) -> str:
    """``key,path,type`` of each module around a node, from the outside in."""
    made = []
    for item in value.split(";") if isinstance(value, str) else [""]:
        parts = item.split(",", 2)
        if len(parts) != 3 or not _KEY.fullmatch(parts[0]):
            raise UnvettedError(f"the module {shown(item)}")
        key, path, kind = parts
        after = key.rpartition("@")[2]
        if "@" in key and not re.fullmatch(r"\d{1,6}", after, re.ASCII):
            raise UnvettedError(f"the module {shown(item)}")
        # The type is a description only; a local or parametrised one may hold any sign.
        described = kind if _TYPE.fullmatch(kind) else "torch.nn.modules.module.Module"
        made.append(f"{key},{module_path(path) if path else ''},{described}")
    return ";".join(made)


def _node_metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UnvettedError(f"{shown(value)} for metadata")
    stack = value.get("nn_module_stack")
    return {"nn_module_stack": module_stack(stack)} if stack else {}


# The schema, from the inside out. Its keys are those of torch/_export/serde/schema.py.

_device = record("a device", type=one_of(_DEVICES, "the device"), index=optional(integer(0, 1024)))
_hint = union("a hint", as_int=integer(), as_bool=boolean, as_float=number)
_symbolic = record("an expression", expr_str=expression, hint=optional(_hint))
_size = union("a size", as_int=integer(), as_expr=_symbolic)
_kind = integer(0, 64)
_layout = integer(0, 16)


def tensor_description(size: Rule) -> Rule:
    """What is known of a tensor, with this rule for each of its sizes."""
    return record(
        "a tensor's description",
        dtype=_kind,
        sizes=listing(size),
        requires_grad=boolean,
        device=_device,
        strides=listing(size),
        storage_offset=size,
        layout=_layout,
    )


_tensor = record("a tensor", name=name)
_sym_int = union("a size", as_name=name, as_int=integer())
_sym_float = union("a number", as_name=name, as_float=number)
_sym_bool = union("a condition", as_name=name, as_bool=boolean)
_perhaps = union("a tensor", as_tensor=_tensor, as_none=absent)
_SIMPLE: dict[str, Rule] = {
    "as_none": absent,
    "as_tensor": _tensor,
    "as_tensors": listing(_tensor),
    "as_int": integer(),
    "as_ints": listing(integer()),
    "as_float": number,
    "as_floats": listing(number),
    "as_string": plain_text,
    "as_strings": listing(plain_text),
    "as_sym_int": _sym_int,
    "as_sym_ints": listing(_sym_int),
    "as_sym_float": _sym_float,
    "as_sym_floats": listing(_sym_float),
    "as_sym_bool": _sym_bool,
    "as_sym_bools": listing(_sym_bool),
    "as_scalar_type": _kind,
    "as_memory_format": _layout,
    "as_layout": _layout,
    "as_device": _device,
    "as_bool": boolean,
    "as_bools": listing(boolean),
    "as_optional_tensor": _perhaps,
    "as_optional_tensors": listing(_perhaps),
    "as_complex": record("a complex number", real=number, imag=number),
    "as_nested_tensors": listing(listing(_tensor)),
    "as_int_lists": listing(listing(integer())),
    "as_float_lists": listing(listing(number)),
    "as_custom_obj": refused("the object"),
    "as_operator": refused("the operator"),
    "as_string_to_argument": refused("named arguments"),
}


def _argument(depth: int) -> Rule:
    """An argument of a node; graphs of branches lie in graphs, to a limited depth."""

    def graph(value: Any) -> dict[str, Any]:
        if depth >= _DEEPEST_GRAPH:
            raise UnvettedError("graphs nested too deeply")
        made: dict[str, Any] = record("a graph", name=module_path, graph=_graph(depth + 1))(value)
        name(made.get("name"))
        return made

    return union("an argument", **_SIMPLE, as_graph=graph)


def _graph(depth: int) -> Rule:
    argument = _argument(depth)
    node = record(
        "a node",
        target=operator,
        inputs=listing(
            record(
                "a named argument",
                name=argument_name,
                arg=argument,
                kind=optional(integer(0, 2)),
            )
        ),
        outputs=listing(argument),
        metadata=_node_metadata,
        is_hop_single_tensor_return=optional(boolean),
        name=optional(name),
    )
    return record(
        "a graph",
        inputs=listing(argument),
        outputs=listing(argument),
        nodes=listing(node),
        tensor_values=mapping(name, tensor_description(_size)),
        sym_int_values=mapping(name, _size),
        sym_bool_values=mapping(name, union("a condition", as_bool=boolean, as_expr=_symbolic)),
        sym_float_values=mapping(name, union("a number", as_float=number, as_expr=_symbolic)),
        is_single_tensor_return=boolean,
        custom_obj_values=mapping(name, refused("the object")),
    )


_outer = _argument(_DEEPEST_GRAPH)  # outside a graph an argument holds none
_constant = union(
    "a constant",
    as_none=absent,
    as_int=integer(),
    as_float=number,
    as_string=plain_text,
    as_bool=boolean,
)
_input = union(
    "an input",
    user_input=record("an input", arg=_outer),
    parameter=record("a parameter", arg=_tensor, parameter_name=module_path),
    buffer=record("a buffer", arg=_tensor, buffer_name=module_path, persistent=boolean),
    tensor_constant=record("a constant", arg=_tensor, tensor_constant_name=module_path),
    constant_input=record("a constant", name=argument_name, value=_constant),
    custom_obj=refused("the object"),
    token=refused("the token"),
)
_output = union(
    "an output",
    user_output=record("an output", arg=_outer),
    buffer_mutation=record("a changed buffer", arg=_tensor, buffer_name=module_path),
    parameter_mutation=record("a changed parameter", arg=_tensor, parameter_name=module_path),
    user_input_mutation=record("a changed input", arg=_tensor, user_input_name=name),
    loss_output=refused("the training step"),
    gradient_to_parameter=refused("the training step"),
    gradient_to_user_input=refused("the training step"),
    token=refused("the token"),
)
_call = record(
    "a module's call",
    fqn=lambda value: module_path(value) if value else "",
    signature=optional(
        record(
            "a module's signature",
            inputs=listing(_outer),
            outputs=listing(_outer),
            in_spec=container,
            out_spec=container,
            forward_arg_names=optional(listing(name)),
        )
    ),
)


def _guards(value: Any) -> None:
    """Conditions on the input's sizes; checked so that a forged file is recognised, not kept."""
    listing(_guard)(value or [])


def _guard(value: Any) -> None:
    try:
        check_guard(plain(value))
    except BadExpressionError as error:
        raise UnvettedError(f"guards of its own: {shown(value)}") from error


def _ranges(value: Any) -> dict[str, Any]:
    """The limits of each symbol; those of whole expressions follow from them."""
    limits = record("a range", min_val=_bound, max_val=_bound)
    ranges = mapping(plain_text, limits)(value)
    for key in ranges:
        # Symbols without a hint are counted up to the largest number among their names.
        if key.startswith(("u", "zuf")) and not _COUNTED.fullmatch(key):
            raise UnvettedError(f"the symbol {shown(key)}")
    return {key: limits for key, limits in ranges.items() if _SYMBOL.fullmatch(key)}


def _bound(value: Any) -> int | None:
    return None if value in (None, "Infinity", "-Infinity") else int(integer()(value))


_graph_module = _without_nothing(
    record(
        "a program",
        graph=_graph(0),
        signature=record("a signature", input_specs=listing(_input), output_specs=listing(_output)),
        module_call_graph=listing(_call),
        metadata=left_out,
        treespec_namedtuple_fields=left_out,
    )
)
program: Rule = _without_nothing(
    record(
        "a program",
        graph_module=_graph_module,
        opset_version=mapping(text(_SYMBOL, "the operator set"), integer(0, 10**6)),
        range_constraints=_ranges,
        schema_version=record("a version", major=integer(0, 10**6), minor=integer(0, 10**6)),
        verifiers=listing(one_of(_DIALECTS, "the dialect")),
        torch_version=text(re.compile(r"[\w.+<=\-]{0,100}", re.ASCII), "the version"),
        guards_code=_guards,
        example_inputs=left_out,
        dialect=left_out,
    )
)
"""The whole of ``models/model.json``."""
