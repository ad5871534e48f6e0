"""Options as frozen, typed models, and the command line that sets them: every mistake is one message that says what is allowed.

Imports no torch, so that `--help` and every mistake answer at once.
"""

import argparse
import difflib
import re
import reprlib
import shutil
import sys
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from mnist_dist.errors import UserError
from mnist_dist.files import expand_path, read_file

_FILE_BYTES_MAX = 1 << 16  # what takes about a second to parse
_DEPTH_MAX = 32  # levels of lists and mappings: a sweep has two
_TEXT_MAX = 4096  # characters of one value: no path may be longer


def option(
    group: str, default: Any, description: str, *, recipe: bool = False, folder: bool = False, command: bool = False, **limits: Any
) -> Any:
    """A field of an `Options` model, shown under `group` in --help. `recipe`: see `Config.recipe`. `folder`: see `expand_path`.

    `command`: the value is part of a command line, and may begin with a hyphen.
    """
    traits: dict[str, Any] = {"group": group, "recipe": recipe, "folder": folder, "command": command}
    return Field(default, description=description, json_schema_extra=traits, **limits)


def trait(field: FieldInfo, name: str) -> Any:
    """What `option` noted of a field: its group, recipe, folder or command. A bare field of a task is an option of its recipe."""
    noted = field.json_schema_extra
    return noted[name] if isinstance(noted, dict) else {"group": "The task", "recipe": True, "folder": False, "command": False}[name]


class Options(BaseModel):
    """A set of options. Immutable; raises `pydantic.ValidationError` on a value that is not allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _check_any(cls, value: Any, info: Any) -> Any:
        if info.field_name not in cls.model_fields:  # one that only a file has
            return value
        field = cls.model_fields[info.field_name]
        if trait(field, "folder") and isinstance(value, str) and len(value) <= _TEXT_MAX:
            value = expand_path(value)
        # Before anything looks at the value, or shows it in a message: Python refuses to write out a number of 5,000 digits.
        if (isinstance(value, str) and len(value) > _TEXT_MAX) or (isinstance(value, int) and abs(value) >= 2**64):
            raise PydanticCustomError("too_long", "a value of such a size is not allowed")
        # YAML's `yes`, `on` and `true` are booleans, and 1 to a lenient parser.
        if isinstance(value, bool) and bool not in (field.annotation, *get_args(field.annotation)):
            raise PydanticCustomError("is_bool", "true and false are not allowed here")
        if isinstance(value, int) and describe_kind(cls, info.field_name) == "text":  # YAML's `account: 123`
            return str(value)
        # As the command line and the tables of options write it.
        if value == "none" and NoneType in get_args(field.annotation) and "none" not in _literals(cls, info.field_name):
            return None
        if isinstance(value, str) and not value.isprintable():
            raise ValueError("expected printable characters")
        return value


def path_argument(text: str) -> str:
    """The type of a path on a command line, which `expand_path` expands. Raises `argparse.ArgumentTypeError`."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{reprlib.repr(text)}: {error}") from error


Model = TypeVar("Model", bound=Options)


def make_options(model: type[Model], values: dict[str, Any], source: str = "", known: Collection[str] = ()) -> Model:
    """Validate `values`. Raises `UserError` that names every wrong option, its value and what is allowed.

    `known`: options of other models, to say what was perhaps meant by one that is unknown.
    """
    try:
        return model(**values)
    except ValidationError as error:
        where = f" (in {source})" if source else ""
        raise UserError("\n".join(_explain(model, detail, known) + where for detail in error.errors())) from None


def _explain(model: type[Options], detail: Any, known: Collection[str]) -> str:
    """One line for one of pydantic's error details."""
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:  # a rule about several options: its message says it all
        return message
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return explain_unknown(name, name, [*model.model_fields, *known])
    if detail["type"] == "too_long":
        return f"{name} has a value of more than {_TEXT_MAX} characters or 64 bits; allowed: {_describe_allowed(model, name)}"
    if detail["type"] != "value_error":  # pydantic's own words; those of our validators stay
        message = f"allowed: {_describe_allowed(model, name)}"
    if isinstance(detail["input"], bool | float) and describe_kind(model, name) == "text":
        message += "; write it in quotes"  # for YAML
    several = "; several values are a sweep's (python -m launch.sweep)" if isinstance(detail["input"], list) else ""
    return f"{name} is {reprlib.repr(detail['input'])}; {message}{several}"


ADVICE: dict[str, str] = {}  # what a program has to say of names that are no options where they stand, and are elsewhere


def explain_unknown(shown: str, name: str, known: Collection[str]) -> str:
    """The message about an option that there is not, with what was perhaps meant."""
    if name in ADVICE and name not in known:
        return f"there is no option {shown[:80]!r} here: {ADVICE[name]}"
    short = find_by_initials(name, known)
    near = [short] if short else difflib.get_close_matches(name, known, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    return f"there is no option {shown[:80]!r}{meant}; --help lists all"


def spell(value: object) -> str:
    """A value as options are written."""
    return {None: "none", True: "true", False: "false"}[value] if isinstance(value, bool | None) else str(value)


def find_by_initials(name: str, known: Collection[str]) -> str | None:
    """The option whose words begin with the letters of `name`, as in lr; None where there is not exactly one."""
    found = [option for option in known if "_" in option and "".join(word[0] for word in option.split("_")) == name]
    return found[0] if len(found) == 1 else None


def _describe_allowed(model: type[Options], name: str) -> str:
    """What an option takes, such as `a whole number (minutes), at least 1` or `sgd, adamw`."""
    field = model.model_fields[name]
    unit = re.search(r" \((minutes|seconds|GB)\)", field.description or "")
    words = [", ".join(_literals(model, name)) or f"{describe_kind(model, name) or ''}{unit[0] if unit else ''}"]
    for limit in field.metadata:
        for attribute, word in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"), ("min_length", "not empty")):
            if hasattr(limit, attribute):
                value = getattr(limit, attribute)
                words.append(word if word == "not empty" else f"{word} {value:{',' if isinstance(value, int) else 'g'}}")
    return ", ".join([*words, "or none"] if type(None) in get_args(field.annotation) else words)


def describe_kind(model: type[Options], name: str) -> str | None:
    """What values an option takes, in words; None for a field that is no option."""
    annotation = model.model_fields[name].annotation
    kinds = {bool: "true, false", int: "a whole number", float: "a number", str: "text"}
    parts = [
        part for part in (get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)) if part is not NoneType
    ]
    if len(parts) != 1:
        return None
    if get_origin(parts[0]) is Literal and all(isinstance(word, str) for word in get_args(parts[0])):
        return ", ".join(get_args(parts[0]))
    return kinds.get(parts[0]) if isinstance(parts[0], type) else None


def _literals(model: type[Options], name: str) -> list[str]:
    annotation = model.model_fields[name].annotation
    values = [value for part in (annotation, *get_args(annotation)) for value in get_args(part)]
    return [value for value in values if isinstance(value, str)]


def _find_metavar(model: type[Options], name: str) -> str:
    kinds = {bool: "true|false", int: "N", float: "X"}
    annotation = model.model_fields[name].annotation
    return next((word for kind, word in kinds.items() if kind in (annotation, *get_args(annotation))), "DIR" if "dir" in name else "NAME")


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `UserError`s, for options that are written out in full."""

    def __init__(self, program: str, description: str, usage: str | None = None, *, add_help: bool = True) -> None:
        super().__init__(
            prog=f"python -m {program}",
            description=description,
            usage=usage and f"%(prog)s {usage}",
            allow_abbrev=False,
            add_help=add_help,
            formatter_class=lambda prog: argparse.HelpFormatter(
                prog, max_help_position=30, width=min(110, shutil.get_terminal_size((110, 24)).columns)
            ),
        )
        self._names: list[str] = []
        self._with_none: set[str] = set()  # those of which `none` is a word
        self._commands: set[str] = set()
        self._groups: dict[str, Any] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; `--batch-size` is `--batch_size`, and initials such as `--lr` do where they are clear."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        spelt: list[str] = []
        for word in words[:end]:
            if spelt and spelt[-1] in self._commands and word.startswith("-"):  # argparse would take it for an option
                spelt[-1] += f"={word}"
            else:
                spelt.append(self._spell_out(word))
        known, unknown = super().parse_known_args([*spelt, *words[end:]], namespace)
        for action in self._actions:
            if action.option_strings and getattr(known, action.dest, None) in ([], "--"):  # argparse's results for `--option=--`
                raise UserError(f"{action.dest} has no value: write --{action.dest} VALUE")
        return known, unknown

    def _spell_out(self, word: str) -> str:
        name, separator, value = word.partition("=")
        known = self._option_string_actions
        if not name.startswith("--") or name in known:
            return word
        name = name[2:].replace("-", "_")
        meant = name if f"--{name}" in known else find_by_initials(name, [option[2:] for option in known])
        return f"--{meant}{separator}{value}" if meant else word

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        usage = " ".join(self.format_usage().split()).removeprefix("usage: ")
        raise UserError(f"{message[:300]}; type {usage}; --help lists all options")

    def add_options(self, model: type[Options], own: Mapping[str, Any] | None = None, hidden: Collection[str] = ()) -> None:
        """Add `--name` for each option of `model`, with its default in the help.

        A program has `own` defaults of some options; of those that it refuses, which are `hidden`, the help says nothing.
        """
        groups = self._groups
        for name, field in model.model_fields.items():
            if describe_kind(model, name) is None:  # not an option: a config's task
                continue
            if f"--{name}" in self._option_string_actions:
                raise UserError(
                    f"the option {name} of a task has the name of one of {self.prog.removeprefix('python -m ')}; give it another"
                )
            title = str(trait(field, "group"))
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            words = f"{field.description or name.replace('_', ' ')} (default: {spell((own or {}).get(name, field.default))})"
            flag: dict[str, Any] = {"nargs": "?", "const": "true"} if field.annotation is bool else {}
            groups[title].add_argument(
                f"--{name}",
                default=argparse.SUPPRESS,
                metavar="|".join(_literals(model, name)) or _find_metavar(model, name),
                help=argparse.SUPPRESS if name in hidden else words.replace("%", "%%"),
                **flag,
            )
            self._names.append(name)
            if "none" in _literals(model, name):
                self._with_none.add(name)
            if trait(field, "command"):
                self._commands.add(f"--{name}")

    def parse(self, arguments: Sequence[str] | None = None) -> dict[str, Any]:
        """The values given, as text; `none` unsets an option, as null does in YAML. Raises `UserError`; exits 0 after --help."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            shown, _, value = unknown[0].partition("=")
            if shown in self._names:
                value = value or next(iter(unknown[1:]), "VALUE")
                raise UserError(f"{unknown[0][:80]!r} lacks its dashes: write --{shown} {value[:80]}")
            for ending, option_name in ((".py", "--task"), (".yaml", "--config"), (".yml", "--config")):
                if shown.endswith(ending) and not shown.startswith("-") and option_name in self._option_string_actions:
                    raise UserError(f"{shown[:80]!r} is not an option: write {option_name} {shown[:80]}")
            raise UserError(explain_unknown(shown, shown.lstrip("-"), self._names))
        return {name: None if value == "none" and name not in self._with_none else value for name, value in vars(known).items()}


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that takes no tags and no endless scalars, and refuses a key written twice, where YAML would silently keep the last.

    Options are plain text, numbers, lists and mappings. What a tag such as `!!timestamp x` would call fails in many ways on bad input.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if len(self.states) > _DEPTH_MAX:  # each level takes longer to parse than the one before
            raise yaml.YAMLError(f"lists and mappings are nested more than {_DEPTH_MAX} deep")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"tags such as {event.tag[:40]} are not allowed")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _TEXT_MAX:
            raise yaml.YAMLError(f"a value has more than {_TEXT_MAX} characters")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {reprlib.repr(key)} stands there twice", node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# Numbers are those of the command line. What else YAML 1.1 takes for one, such as 010 for 8 or 1:30 for 90, is a text.
_NUMBERS = {
    "int": r"[-+]?(0|[1-9]\d*)$",
    "float": r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$",
}
_StrictLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in patterns if tag.rpartition(":")[2] not in (*_NUMBERS, "timestamp")]
    for letter, patterns in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Puts quotes around each text that any loader of YAML, or this one, would take for something else."""


for _kind, _pattern in _NUMBERS.items():
    for _user in (_StrictLoader, _Dumper):
        _user.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list("-+.0123456789"))


def write_options(values: dict[str, Any]) -> str:
    """YAML text that `read_options_file` reads back to equal values. Raises `UserError` where it is longer than is read."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if (size := len(text.encode())) > _FILE_BYTES_MAX:
        raise UserError(f"the options take {size:,} bytes as a config file; allowed: {_FILE_BYTES_MAX:,}, the most that is read")
    return text


def read_options_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, not yet validated. Raises `UserError` on anything but a mapping of options."""
    try:
        values = yaml.load(read_file(path, _FILE_BYTES_MAX).decode(), Loader=_StrictLoader)  # noqa: S506  _StrictLoader is a SafeLoader
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "in ").split()) or type(error).__name__
        raise UserError(f"config file {path} is not valid YAML: {reason[:300]}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"config file {path} must hold lines of the form `option: value`")
    return values
