"""Flags are fields of dataclasses: here they become what cyclopts reads and explains."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from inspect import Parameter, Signature, signature
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import cyclopts
from cyclopts import App, CycloptsError, Group
from docstring_parser import parse, parse_from_object

from cure_fast.config import Config
from cure_fast.config.checks import (
    NONE,
    alternatives,
    as_word,
    field_types,
    flag_of,
    nearest,
    parse_fraction,
    shown,
)
from cure_fast.config.values import sections
from cure_fast.errors import InputError

T = TypeVar("T")

# Digits enough for any setting, and few enough for Python to convert.
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,40}")
# What each cyclopts.App here is made with.
PLAIN = {"help_format": "plaintext", "print_error": False, "exit_on_error": False}
# Groups of flags in help: the first, and those of a configuration's sections in their order.
MOST_USED = ("data", "model", "method", "policies", "epochs", "eps", "seed", "out")
# Flags of a run that some commands give each of theirs, and what --out is there.
OF_EACH = {
    **dict.fromkeys(("compare", "study"), ("method", "policies", "seed")),
    "sweep": ("seed",),
}
OF_ALL = "Folder for the runs and their tables; None takes one in runs/, after command and recipe."
TITLES = {
    "data": "Data",
    "model": "Model",
    "attack": "Attack in training",
    "optim": "Optimiser and schedule",
    "pretrain": "Natural start",
    "eval": "Validation, and attacks on the finished model",
    "run": "Where and how it runs",
}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag: its type, its value without it, and where and what help says of it.

    The type is bool, int, float, str, a Literal of strings, a tuple of one of them of any length,
    or a union of these and None.
    """

    hint: Any
    default: Any = None
    group: Group | None = None
    help: str = ""


def flags_of(*kinds: type) -> dict[str, Any]:
    """Return the type of each field of the dataclasses by its name."""
    return {field.name: field_types(kind)[field.name] for kind in kinds for field in fields(kind)}


def parameters(function: Callable[..., None]) -> dict[str, Any]:
    """Return the type of each parameter of a function by its name."""
    return {k: v for k, v in get_type_hints(function).items() if k != "return"}


def explained(documented: Any) -> dict[str, str]:
    """Return what a docstring, or those under fields of a dataclass, say of each name."""
    if isinstance(documented, type):
        own = (base for base in reversed(documented.__mro__) if is_dataclass(base))
        told = [each for base in own for each in parse_from_object(base).params]
    else:
        told = parse(documented.__doc__ or "").params
    return {each.arg_name: " ".join((each.description or "").split()) for each in told}


def application(
    name: str,
    function: Callable[..., None],
    *,
    config: Config | None = None,
    about: str = "",
    titles: Mapping[str, str] = MappingProxyType({}),
) -> App:
    """Return the command line of a function, which returns the function with what was read.

    Args:
        name: the command as it is written.
        function: of which text without a name before it is a word, and a dataclass its fields.
        config: whose fields are flags too.
        about: what help says before the function's docstring.
        titles: of the groups of flags that dataclasses are, by the function's names for them.
    """
    kinds, usual = parameters(function), signature(function).parameters
    help_of = explained(function)
    made: dict[str, Any] = {field: kind for field, kind in kinds.items() if is_dataclass(kind)}
    groups = {field: Group.create_ordered(title) for field, title in titles.items()}
    words: dict[str, Flag] = {}
    flags: dict[str, Flag] = {}
    many = ""
    for field, kind in kinds.items():
        if field in made:
            flags |= fields_of(kind(), groups.get(field))
            continue
        one = usual[field]
        default = None if one.default is Parameter.empty else one.default
        flag = Flag(hint=kind, default=default, help=help_of[field])
        (flags if one.kind is Parameter.KEYWORD_ONLY else words)[field] = flag
        many = field if one.kind is Parameter.VAR_POSITIONAL else many

    def prepare(*words: str, **values: Any) -> Callable[[], None]:
        own = {name: values.pop(name) for name in usual if name in values}
        for field, kind in made.items():
            own[field] = kind(**{name: values[name] for name in flags_of(kind) if name in values})
        return partial(function, *words, **own)

    if config is not None:
        flags = configured(config, flags)
        for command in OF_EACH.keys() & set(name.split()):
            flags = {k: flag for k, flag in flags.items() if k not in OF_EACH[command]}
            flags["out"] = replace(flags["out"], help=OF_ALL)
    told = "\n\n".join(filter(None, (parse(function.__doc__ or "").description, about)))
    # Lines of a paragraph are as long as the terminal is wide.
    paragraphs = (" ".join(paragraph.split()) for paragraph in told.split("\n\n"))
    return app_of(name, prepare, "\n\n".join(paragraphs), words, flags, many=many)


def fields_of(part: Any, group: Group | None = None) -> dict[str, Flag]:
    """Return the fields of a dataclass as flags, with its values as what they have without."""
    help_of = explained(type(part))
    return {
        name: Flag(hint=hint, default=getattr(part, name), group=group, help=help_of.get(name, ""))
        for name, hint in flags_of(type(part)).items()
    }


def configured(config: Config, switches: Mapping[str, Flag]) -> dict[str, Flag]:
    """Return the flags of a configuration, those first that most people look for.

    ``switches``, a command's own, come behind these. Of a method's settings those that its papers
    compare come with the method, and last what only somebody looks for who takes it apart.
    """
    first = Group.create_ordered("Most used")
    method = Group.create_ordered(f"Method {config.method}")
    policies = {name: Group.create_ordered(f"Policy {name}") for name in config.policies}
    groups = {name: Group.create_ordered(title) for name, title in TITLES.items()}
    rest = Group.create_ordered(f"Method {config.method}: variants and ablations")
    found: dict[str, Flag] = {}
    parts = sections(config)
    for name in ("settings", *policies, *groups):
        group = {"settings": method, **policies, **groups}[name]
        found |= fields_of(parts[name], group)
    main = config.settings.main or vars(config.settings)
    for name in vars(config.settings).keys() - set(main):
        found[name] = replace(found[name], group=rest)
    own = fields_of(config, first)
    found |= {name: own[name] for name in ("name", "method")}
    found["name"] = replace(found["name"], group=groups["run"])
    found["policies"] = Flag(
        hint=tuple[str, ...],
        default=tuple(config.policies) or None,
        help="Policies that go with the method, A,B in that order; none takes all away. Their own "
        "flags are in this help once they are named.",
    )
    found["regime"] = Flag(
        hint=Literal["recipe", "published"],
        default="recipe",
        group=groups["optim"],
        help="Whose schedule, optimiser and attack: the recipe's, or those of the method's authors "
        "for the data and model (published); other flags come after it.",
    )
    return {
        **{name: replace(found[name], group=first) for name in MOST_USED},
        **{name: replace(flag, group=first) for name, flag in switches.items()},
        **{name: flag for name, flag in found.items() if name not in MOST_USED},
    }


def app_of(
    name: str,
    call: Callable[..., Any],
    about: str,
    words: Mapping[str, Flag],
    flags: Mapping[str, Flag],
    many: str = "",
    **more: Any,
) -> App:
    """Return what reads words and flags, for a function that takes those that are given.

    Of the word ``many``, the last one, there may be any number.
    """

    def read(*words: str, **values: Any) -> Any:
        return call(*words, **values)

    positional = [
        Parameter(
            word,
            Parameter.VAR_POSITIONAL if word == many else Parameter.POSITIONAL_ONLY,
            default=Parameter.empty if told.default is None else told.default,
            annotation=Annotated[
                str,
                cyclopts.Parameter(help=told.help, converter=converter(str), show_default=False),
            ],
        )
        for word, told in words.items()
    ]
    named = [
        Parameter(
            field,
            Parameter.KEYWORD_ONLY,
            default=flag.default,
            annotation=Annotated[flag.hint, options(field, flag)],
        )
        for field, flag in flags.items()
    ]
    read.__signature__ = Signature([*positional, *named])  # pyright: ignore[reportFunctionMemberAccess]
    app = App(name=name, help=about, version_flags=[], **{**PLAIN, **more})
    app.default(read)
    if "--help" in app:
        app["--help"].show = False
    return app


def options(field: str, flag: Flag) -> cyclopts.Parameter:
    """Return how cyclopts reads and shows a flag."""
    name = flag_of(field)
    told: dict[str, Any] = {"name": name, "help": flag.help, "allow_repeating": True}
    if flag.group is not None:
        # Without a group given help has a panel of its own; with None it leaves the flag out.
        told["group"] = flag.group
    if flag.hint is bool:
        return cyclopts.Parameter(negative=f"--no-{name[2:]}", **told)
    return cyclopts.Parameter(
        converter=converter(flag.hint),
        n_tokens=1,
        negative="",
        show_default=as_word if flag.default is not None else False,
        **told,
    )


def converter(hint: Any) -> Callable[[Any, Sequence[cyclopts.Token]], Any]:
    """Return what makes a value of the type ``hint`` of a word."""

    def convert(_: Any, tokens: Sequence[cyclopts.Token]) -> Any:
        # Lists of a flag that is given twice come together.
        token = tokens[-1]
        kinds, why = alternatives(hint), ""
        # A choice may be called none too.
        for kind in sorted(kinds, key=lambda kind: get_origin(kind) is not Literal):
            try:
                return read_value(kind, token.value)
            except ValueError as error:
                why = f" ({error})" if str(error) else ""
        choices = [c for kind in kinds if get_origin(kind) is Literal for c in get_args(kind)]
        near = nearest(token.value, choices)
        told = f"expected {expected(hint)}, got {shown(token.value)}{why}.{near}"
        raise cyclopts.CoercionError(msg=f"{token.keyword}: {told}" if token.keyword else told)

    return convert


def read_flags(
    words: Sequence[str],
    flags: Mapping[str, Any],
    of_others: Callable[[str], str] = lambda name: "",
) -> dict[str, Any]:
    """Return the values of the flags that ``words`` are, by field.

    Of a flag given twice the last counts. ``of_others`` says what is wrong with another field, or
    nothing where it is unknown.

    Raises:
        InputError: for a word that is none, or a value that is wrong.
    """
    with in_a_line(of_others):
        _, bound, _ = _reader(named(words, flags)).parse_args(words)
    return bound.arguments


def split_flags(words: Sequence[str], flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of these flags, and the words that belong to none of them."""
    with in_a_line():
        _, bound, rest, _ = _reader(flags).parse_known_args(words)
    return bound.arguments, rest


def _reader(flags: Mapping[str, Any]) -> App:
    told = {name: Flag(hint=hint) for name, hint in flags.items()}
    return app_of("", lambda **values: None, "", {}, told, help_flags=[])


def named(words: Iterable[str], flags: Mapping[str, T]) -> Mapping[str, T]:
    """Return those of the flags that ``words`` name, or all where one of them names another.

    cyclopts takes half a millisecond for each flag that it knows; all of them are needed to say
    which one an unknown one is like.
    """
    written = {word.partition("=")[0] for word in words if word.startswith("-")}
    found = {}
    for name, flag in flags.items():
        word = flag_of(name)
        both = {word, f"--no-{word[2:]}"}
        if both & written:
            found[name] = flag
            written -= both
    return flags if written else found


@contextmanager
def in_a_line(of_others: Callable[[str], str] = lambda name: "") -> Iterator[None]:
    """Answer what cyclopts finds wrong by an ``InputError`` of one line."""
    try:
        yield
    except cyclopts.UnknownOptionError as error:
        flag = error.token.keyword or error.token.value
        name = flag.removeprefix("--").replace("-", "_")
        told = of_others(name) or of_others(name.removeprefix("no_"))
        known = [name for argument in error.argument_collection or () for name in argument.names]
        raise InputError(told or f"unknown flag {shown(flag)}.{nearest(flag, known)}") from error
    except cyclopts.MissingArgumentError as error:
        assert error.argument is not None
        name, told = error.argument.name, error.argument.parameter.help
        # Of a word its help says what it is to be, of a flag its type.
        wanted = expected(error.argument.hint) if name.startswith("-") or not told else told
        wanted = wanted[0].lower() + wanted[1:].rstrip(".")
        raise InputError(f"{name}: expected {wanted}, got nothing.") from error
    except cyclopts.UnusedCliTokensError as error:
        came = ", ".join(map(shown, error.unused_tokens or ()))
        raise InputError(f"expected flags, each with its value, got {came}.") from error
    except CycloptsError as error:
        raise InputError(" ".join(str(error).split())) from error


@contextmanager
def pointing_to(prog: str, what: str) -> Iterator[None]:
    """Add the command that explains ``what`` to an ``InputError`` of the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{error} `{prog} --help` explains {what}.") from error


def read_value(kind: Any, word: str) -> Any:
    """Return the value of one plain type that ``word`` writes, or raise ``ValueError`` with why."""
    if kind is type(None) and word in NONE:
        return None
    if get_origin(kind) is Literal and word in get_args(kind):
        return word
    if kind is int and WHOLE_NUMBER.fullmatch(word):
        return int(word)
    if kind is float:
        return parse_fraction(word)
    if kind is str and word.strip():
        if word.startswith("~") and os.path.expanduser(word).startswith("~"):
            raise ValueError("there is no such home folder; write the path from /")
        return word
    if get_origin(kind) is tuple and word == "none":
        return ()
    if get_origin(kind) is tuple:
        items = [item for item in word.replace(" ", "").split(",") if item]
        if items:
            return tuple(read_value(get_args(kind)[0], item) for item in items)
    raise ValueError


def expected(hint: Any) -> str:
    """Return what a value of the type looks like, in words."""
    kinds = [kind for kind in alternatives(hint) if kind is not type(None)]
    # Of a text whatever is not empty is one.
    without = ["none"] if len(kinds) < len(alternatives(hint)) and str not in kinds else []
    return " or ".join([*map(expected_of, kinds), *without])


def expected_of(kind: Any) -> str:
    """Return the same for one plain type."""
    if get_origin(kind) is Literal:
        words = ", ".join(get_args(kind))
        return f"one of {words}" if ", " in words else f"the word {words}"
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        items = {float: "numbers", str: "names"}.get(item) or f"any of {', '.join(get_args(item))},"
        return f"{items} with commas between"
    plain = {int: "a whole number", float: "a number such as 0.03 or 8/255"}
    return plain.get(kind, "a text that is not empty")
