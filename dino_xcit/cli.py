"""Command lines from typed dataclasses: flags with dashes or underscores, YAML files, near matches for typos."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import math
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import tyro
import yaml

from dino_xcit.bounds import (
    Group,
    IsPath,
    Positional,
    Repeatable,
    ZeroIsAuto,
    annotations_of,
    check_bounds,
    marked,
    refusal,
)
from dino_xcit.errors import InputError, near_matches, run_main

Config = TypeVar("Config")
Flags = dict[str, list[str]]
"""Field names and the words that follow their flags."""

_LAST = ("optimisation", "crops", "machine", "checkpoints", "evaluation")
"""Groups of settings that ``--help`` shows last, in this order."""
_BOOLEANS = dict.fromkeys(("true", "on", "1", "yes"), "True") | dict.fromkeys(("false", "off", "0", "no"), "False")
_IGNORED = ("dist_url", "local_rank")
"""DINO's flags for settings that torchrun passes in the environment."""
_DINO_NAMES = {
    "pretrained_weights": "weights", "checkpoint_key": "network", "nb_knn": "ks", "temperature": "temperatures",
    "batch_size": "batch_size_per_gpu", "imsize": "image_size", "distractors_path": "distractors",
}  # fmt: skip
"""DINO's names of settings, and their names here."""
_DINO_HINTS = {
    "n_last_blocks": "give --features last4", "avgpool_patchtokens": "give --features cls+mean",
    "num_labels": "leave it out, the classes of the data are counted", "use_cuda": "give --device cuda",
}  # fmt: skip
"""Replacements for DINO's flags whose values have another meaning here."""


def parse(config: type[Config], argv: Sequence[str], prog: str) -> Config:
    """Parse and check a command line. Precedence: flags, ``--config FILE.yaml``, the defaults of the class.

    ``--global-crops-scale 0.4 1`` and ``--global_crops_scale=0.4 1`` are equivalent. ``--flag``, ``--no-flag`` and
    ``--flag true`` set a boolean field. If a flag is repeated, the last one wins, unless its field is marked
    Repeatable. Words without a flag go to the fields marked Positional. ``--help`` prints all settings and exits.

    Raises:
        InputError: an unknown flag (the message suggests near matches), an unexpected word, or an invalid value.
    """
    show_help(config, argv, prog)
    return build(config, with_file(config, read_flags(config, argv)), config())


def parse_known(
    config: type[Config], argv: Sequence[str], prog: str, others: Collection[str]
) -> tuple[Config, list[str]]:
    """Parse the flags of ``config`` only; also return the remaining words in order, for another command.

    Args:
        others: flags of the other command, which are never reported as misspelt flags of this one.
    """
    show_help(config, argv, prog)
    rest: list[str] = []
    flags = read_flags(config, argv, rest, others)
    return build(config, flags, config()), rest


def flags_of(settings: Mapping[str, object]) -> list[str]:
    """Return settings by name as words of a command line; an empty tuple gives none, because it is a default."""
    words: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [value]
        words += [f"--{name}={values[0]}", *map(str, values[1:])] if values else []
    return words


def show_help(config: type, argv: Sequence[str], prog: str) -> None:
    """Print help and exit if ``argv`` has ``--help``: one box per :class:`dino_xcit.bounds.Group` of settings."""
    if "-h" not in argv and "--help" not in argv:
        return
    texts, heading, groups = _texts_of(config), "command", dict[str, list[Any]]()
    for field in dataclasses.fields(config):
        kind, notes = annotations_of(config)[field.name]
        heading = next((note.heading for note in notes if isinstance(note, Group)), heading)
        hint = "" if field.default in ("", ()) else None  # None: tyro shows the default
        choices = get_args(kind)  # "" stands for the default
        shown_choices = f"{{{','.join(filter(None, choices))}}}" if "" in choices else None
        described: Any = Annotated[
            kind, tyro.conf.arg(help=texts[field.name], help_behavior_hint=hint, metavar=shown_choices)
        ]
        groups.setdefault(heading, []).append((field.name, described, field.default))
    ordered = sorted(groups.items(), key=lambda group: _LAST.index(group[0]) if group[0] in _LAST else -1)
    boxes = [(name, dataclasses.make_dataclass(name, fields)) for name, fields in ordered]
    shown = dataclasses.make_dataclass("Settings", boxes)
    about = "\n\n".join(  # tyro joins lines that begin with a letter
        textwrap.fill(text, 80, subsequent_indent=" ") for text in inspect.cleandoc(config.__doc__ or "").split("\n\n")
    )
    flat = (tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes)
    tyro.cli(shown, args=["--help"], description=about, prog=prog, config=flat)


def _texts_of(config: type) -> dict[str, str]:
    """Return the docstring below each field, without line breaks: tyro keeps some of them."""
    texts = {}
    for kind in filter(dataclasses.is_dataclass, reversed(config.__mro__)):
        (tree,) = ast.parse(inspect.getsource(kind)).body
        for field, below in itertools.pairwise(ast.iter_child_nodes(tree)):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return texts


def check_flags(config: type, prog: str) -> None:
    """Print help or reject unknown flags before a command imports PyTorch, which takes seconds."""

    def check() -> None:
        show_help(config, sys.argv[1:], prog)
        with contextlib.redirect_stderr(io.StringIO()):  # the command itself reports ignored flags
            read_flags(config, sys.argv[1:])

    run_main(check)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until run_main: no traceback from the middle of an import


def read_flags(config: type, argv: Sequence[str], rest: list[str] | None = None, others: Collection[str] = ()) -> Flags:
    """Split a command line into flags and their words; :func:`build` converts the words.

    Args:
        rest: receives unknown flags and the words after them; None: unknown flags are an error.
        others: as in :func:`parse_known`.

    Raises:
        InputError: as :func:`parse`, except for values.
    """
    kinds = {name: kind for name, (kind, _) in annotations_of(config).items()}
    if rest is None:
        kinds["config"] = str
    kinds |= {"use_fp16": bool} if "precision" in kinds else {}
    kinds |= {"patch_size": int} if "arch" in kinds else {}
    positional, repeatable = list(marked(config, Positional)), marked(config, Repeatable)
    flags: Flags = {}

    def words_of(name: str) -> list[str]:
        if name not in repeatable:
            flags[name] = []  # the last one wins
        return flags.setdefault(name, [])

    name, words, room = "", list[str](), 0.0  # the last flag, the list for its words, how many words it still takes
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            name, given = name.replace("-", "_"), [value] * bool(equals)
            if not equals and name not in kinds and _is_switch(kinds.get(name.removeprefix("no_"))):
                name, given = name.removeprefix("no_"), ["false"]
            if name not in kinds and _DINO_NAMES.get(name) in kinds:
                name = _DINO_NAMES[name]
            if name in kinds:
                words, room = words_of(name), _arity(kinds[name]) - len(given)
                words += given
            elif rest is None and name in _IGNORED:
                print(f"--{name} is ignored: torchrun sets it", file=sys.stderr)
                words, room = [], 1 - len(given)
            else:
                hint = _DINO_HINTS.get(name)
                close = f": {hint}" if hint else near_matches(name, kinds, prefix="--")
                if rest is None or (close and name not in others):
                    raise InputError(f"unknown flag --{name}{close} (--help lists all)")
                rest.append(token)
                words, room = rest, math.inf
        elif room > 0 and (not _is_switch(kinds.get(name)) or token.lower() in {*_BOOLEANS, *get_args(kinds[name])}):
            words.append(token)
            room -= 1
        elif positional:
            words_of(positional[0]).append(token)
            if positional[0] not in repeatable:
                positional.pop(0)
        elif rest is not None:
            rest.append(token)
        else:
            after = f" after --{name}" if name else ""
            raise InputError(f"unexpected word {token!r}{after}: expected settings as --name value (see --help)")
    return _normalised(flags, kinds, marked(config, IsPath))


def _is_switch(kind: Any) -> bool:
    """Whether a flag of this type needs no value: a boolean, or choices with "on"."""
    return kind is bool or "on" in get_args(kind)


def _arity(kind: Any) -> float:
    """Return the maximum number of words of a value of this type."""
    if get_origin(kind) is not tuple:
        return 1
    return math.inf if Ellipsis in get_args(kind) else len(get_args(kind))


def _normalised(flags: Flags, kinds: Mapping[str, Any], paths: Collection[str]) -> Flags:
    """Normalise booleans to True and False, expand ``~`` in paths, and translate DINO's use_fp16 and patch_size."""
    for name, words in flags.items():
        if _is_switch(kinds[name]):
            flags[name] = [_BOOLEANS.get(word.lower(), word) for word in words or ["true"]]
            if kinds[name] is not bool:
                flags[name] = [{"True": "on", "False": "off"}.get(word, word) for word in flags[name]]
        elif name in paths:
            flags[name] = [os.path.expanduser(word) for word in words]
    if "use_fp16" in flags:
        (given,) = flags.pop("use_fp16")
        meant = {"True": "fp16", "False": "fp32"}.get(given, "")
        precision = flags.setdefault("precision", [meant])
        if not meant or (precision == ["fp16"]) is not (meant == "fp16"):
            raise InputError(
                f"--use_fp16 is {given}, --precision is {' '.join(precision) or 'not given'}: expected true or false "
                "and a matching precision; or omit --use_fp16"
            )
    if "patch_size" in flags:
        patch, arch = " ".join(flags.pop("patch_size")), " ".join(flags.get("arch", ()))
        size = re.fullmatch(r"(?:vit|deit)_(tiny|small|base)|(xcit_[a-z]+_\d+)", arch)
        if size is None or not patch:
            raise InputError(f"--patch_size is {patch!r}, --arch is {arch!r}: give both in --arch: xcit_small_12_p16")
        flags["arch"] = [f"{size[2] or f'vit_{size[1]}_12'}_p{patch}"]
    return flags


def with_file(config: type, flags: Flags) -> Flags:
    """Add the settings of the YAML file ``--config`` to the flags; flags take precedence.

    Raises:
        InputError: the file is missing or has other content than ``name: value`` lines; or as :func:`read_flags`.
    """
    if "config" not in flags:
        return flags
    path = " ".join(flags.pop("config"))
    try:
        root = yaml.compose(Path(path).expanduser().read_text(encoding="utf-8"), yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot read the config file {path}: {error.strerror}; check --config") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"the config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(root, yaml.MappingNode):
        raise InputError(f"the config file {path} has no settings, expected lines of 'name: value'")
    argv: list[str] = []
    for key, value in root.value:
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if any(not isinstance(part, yaml.ScalarNode) or part.tag.endswith(":null") for part in parts):
            raise InputError(f"{key.value} in {path}: expected 'name: value' or 'name: [value, value]'")
        words = [part.value for part in parts] or [""]
        if flag := next((word for word in words if word.startswith("--")), ""):
            raise InputError(f"{key.value} in {path} has the flag {flag}: expected '{flag[2:]}: value' on its own line")
        argv += [f"--{key.value}={words[0]}", *words[1:]]
    try:
        settings = read_flags(config, argv)
        if "config" in settings:
            raise InputError("unknown setting config")
    except InputError as error:
        raise InputError(f"in the config file {path}: {error}") from None
    return settings | flags


def build(config: type[Config], flags: Flags, defaults: Config) -> Config:
    """Replace ``defaults`` by ``flags``; check the bounds and call ``check()`` if the class has it.

    Raises:
        InputError: a word cannot be converted, or a value is invalid.
    """
    values = {name: _value(config, name, words) for name, words in flags.items()}
    found = dataclasses.replace(defaults, **values)  # type: ignore[type-var]  # any dataclass
    check_bounds(found)
    if check := getattr(found, "check", None):
        check()
    return found


_READERS: dict[Any, Callable[[str], Any]] = {int: int, float: float, bool: {"True": True, "False": False}.__getitem__}


def _value(config: type, name: str, words: Sequence[str]) -> Any:
    """Convert words to the setting's type; :func:`dino_xcit.bounds.check_bounds` checks choices."""
    kind, notes = annotations_of(config)[name]
    if ZeroIsAuto in notes:
        words = ["0" if word == "auto" else word for word in words]
    is_tuple = get_origin(kind) is tuple
    parts = get_args(kind) if is_tuple else (kind,)
    noun = {int: "whole number", float: "number"}.get(parts[0], "value")
    expected = "true or false" if kind is bool else f"{len(parts)} {noun}s" if is_tuple else f"a {noun}"
    if Ellipsis in parts:
        words = [] if words == [""] else words
        parts, expected = parts[:1] * len(words), f"{noun}s"
    try:
        values = tuple(_READERS.get(part, str)(word) for part, word in zip(parts, words, strict=True))
    except (KeyError, ValueError):
        raise refusal(config, name, " ".join(words), expected) from None
    return values if is_tuple else values[0]
