"""Command lines from typed dataclasses: flags with dashes or underscores, YAML files, near matches for typos."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from dino_xcit.config import PretrainConfig
from dino_xcit.errors import InputError, near_matches
from dino_xcit.recipes import recipe_settings

Config = TypeVar("Config")

_TRUE, _FALSE = ("true", "on", "1", "yes"), ("false", "off", "0", "no")
_IGNORED = {"dist_url": "torchrun sets it", "local_rank": "torchrun sets it", "local-rank": "torchrun sets it"}
Flags = dict[str, list[str]]
"""Field name to the words that followed it."""


def parse_flags(config: type, argv: Sequence[str]) -> Flags:
    """Split a command line into flags and their words, without reading the words yet.

    ``--global-crops-scale 0.4 1`` and ``--global_crops_scale=0.4 1`` are the same; ``--flag`` alone and ``--no-flag``
    set a yes-or-no field, as ``--flag true`` does.

    Raises:
        InputError: an unknown flag (near matches are given), one that is given twice, a word that belongs to no flag,
            or that cannot be the flag's.
    """
    hints = get_type_hints(config)
    known = [field.name for field in dataclasses.fields(config)]
    booleans = {name for name, hint in hints.items() if hint is bool}
    flags: Flags = {}
    words: list[str] | None = None
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            name = name.replace("-", "_")
            words = [value] if equals else []
            if name.startswith("no_") and name[3:] in booleans and name not in known:
                name, words = name[3:], ["False"]
            if name in _IGNORED:
                print(f"--{name} is ignored: {_IGNORED[name]}", file=sys.stderr)
            elif name not in (*known, *_besides(known)):
                raise InputError(f"unknown flag --{name}{near_matches(name, known, prefix='--')} (--help lists all)")
            else:
                refuse_again(name, flags, several=_takes(hints.get(name, str)) is None)
                flags[name] = words
        elif words is None:
            raise InputError(f"cannot place the word {token!r}: every setting is given as --name value (see --help)")
        else:
            words.append(token)
    return fitting(config, flags)


def _besides(known: Collection[str]) -> tuple[str, ...]:
    """Flags that are no field: the file of settings, and DINO's name for a precision where there is one to choose."""
    return ("config", "use_fp16") if "precision" in known else ("config",)


def refuse_again(name: str, flags: Flags, several: bool = False) -> None:
    """Raise InputError where a flag was given before: which of the two was meant, nobody knows.

    ``several``: it takes any number of values.
    """
    if name in flags:
        at_once = f", with all its values: --{name} FIRST SECOND ..." if several else ""
        raise InputError(f"--{name} is given twice: give it once{at_once}")


def fitting(config: type, flags: Flags) -> Flags:
    """The flags, each with as many words as its field takes and of the field's type; true and false as Python has them.

    Raises:
        InputError: a word too many or too few, or one that is no value of the field.
    """
    hints = get_type_hints(config)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    out: Flags = {}
    for name, words in flags.items():
        hint = hints.get(name, bool if name == "use_fp16" else str)
        if hint is bool:
            word = (words or ["true"])[0].lower()
            if word not in _TRUE + _FALSE or len(words) > 1:
                raise InputError(f"--{name} is {' '.join(words)!r}, expected true or false")
            words = [str(word in _TRUE)]
        wanted = _takes(hint)
        if wanted is not None and len(words) != wanted:
            default = defaults.get(name, "FILE.yaml")
            example = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            found = f"is {' '.join(words)!r}" if words else "has no value"
            count = "one value" if wanted == 1 else f"{wanted} values"
            quoted = " (in quotes where it has spaces or stars)" if words and hint is str else ""
            raise InputError(f"--{name} {found}, expected {count}, as in --{name} {example or '...'}{quoted}")
        for word in words:
            _refuse_another_type(name, word, hint)
        out[name] = words
    return out


def _takes(hint: object) -> int | None:
    """How many words are a value of this type; None: any number."""
    if get_origin(hint) is not tuple:
        return 1
    return None if Ellipsis in get_args(hint) else len(get_args(hint))


def _refuse_another_type(name: str, word: str, hint: object) -> None:
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        if word not in choices:
            raise InputError(f"--{name} is {word!r}, expected {', '.join(filter(None, choices[:-1]))} or {choices[-1]}")
    for kind, said in ((int, "a whole number"), (float, "a number")):
        if hint is kind:
            try:
                kind(word)
            except ValueError:
                raise InputError(f"--{name} is {word!r}, expected {said}") from None


def read_yaml(path: str, config: type) -> Flags:
    """The settings of a YAML file (``name: value`` a line), as flags.

    Raises:
        InputError: no such file, no mapping, an unknown setting, one that is there twice, or with a value that cannot
            be its.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"cannot read the config file {path}: {error.strerror}; check --config") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the config file {path} is no text: expected YAML, a line 'name: value' a setting") from error
    except yaml.YAMLError as error:
        raise InputError(f"the config file {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping) or node is None:
        raise InputError(f"the config file {path} holds {type(values).__name__}, expected lines of 'name: value'")
    known = [field.name for field in dataclasses.fields(config)]
    lines = [str(key.value).replace("-", "_") for key, _ in node.value]  # of equal ones the mapping has the last
    flags: Flags = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name == "config" or name not in (*known, *_besides(known)):
            raise InputError(f"unknown setting {name!r} in {path}{near_matches(name, known)}")
        if lines.count(name) > 1:
            raise InputError(f"{name} is given twice in {path}: leave one of the lines out")
        if value is None:
            raise InputError(f"{name} has no value in {path}: give it one, or leave the line out")
        parts = value if isinstance(value, list) else [value]
        if any(isinstance(part, (Mapping, list)) for part in parts):
            raise InputError(
                f"{name} has settings of its own in {path}, expected 'name: value' or 'name: [value, value]'"
            )
        flags[name] = [str(part) for part in parts]
    try:
        return fitting(config, flags)
    except InputError as error:
        raise InputError(f"in the config file {path}: {error}") from None


def replace_flags(argv: Sequence[str], by: Sequence[str]) -> list[str]:
    """A command line with other words for some of its flags: ``argv`` without those that ``by`` gives, then ``by``."""

    def name_of(token: str) -> str:
        return token.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")

    theirs = {name_of(token) for token in by if token.startswith("--")}
    kept: list[str] = []
    keeping = True
    for token in argv:
        if token.startswith("--"):
            keeping = name_of(token) not in theirs
        if keeping:
            kept.append(token)
    return [*kept, *by]


def build(config: type[Config], flags: Flags, defaults: Config, prog: str) -> Config:
    """The dataclass with ``defaults`` replaced by ``flags``.

    Raises:
        InputError: a word that is no value of its setting, or a value that cannot be.
    """
    argv = [word for name, words in flags.items() for word in (f"--{name}", *words)]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                config,
                args=argv,
                default=defaults,
                prog=prog,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit:
        raise InputError(_first_paragraph(printed.getvalue())) from None


def _first_paragraph(box: str) -> str:
    """What tyro found wrong, without the frame that it draws around it and the help that follows."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    found = list(itertools.takewhile(lambda line: not line.startswith("──"), lines[1:]))
    sentence = re.sub(r"^Error parsing \w+Config: ", "", " ".join(" ".join(found).split()))
    return sentence or "the command line cannot be read (see --help)"


def parse(config: type[Config], argv: Sequence[str], prog: str) -> Config:
    """A runner's settings from its command line: flags, then ``--config FILE.yaml``, then the class's defaults."""
    if "-h" in argv or "--help" in argv:
        return tyro.cli(config, args=["--help"], prog=prog, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    flags = parse_flags(config, argv)
    if "config" in flags:
        flags = read_yaml(flags.pop("config")[0], config) | flags
    return build(config, flags, config(), prog)


def _with_precision(flags: Flags, where: str = "") -> Flags:
    """DINO's ``use_fp16`` as the precision that it means; false, where a precision is given too, means not fp16.

    Raises:
        InputError: both are given, and one says fp16, the other not.
    """
    if "use_fp16" not in flags:
        return flags
    fp16 = flags["use_fp16"] == ["True"]
    if "precision" in flags and fp16 is not (flags["precision"] == ["fp16"]):
        given = f"--use_fp16 {str(fp16).lower()} with --precision {flags['precision'][0]}"
        raise InputError(f"{where}{given}: expected one of the two; leave --use_fp16 out")
    meant = {"precision": ["fp16" if fp16 else "fp32"]}
    return meant | {name: words for name, words in flags.items() if name != "use_fp16"}


def parse_pretrain(argv: Sequence[str]) -> tuple[PretrainConfig, str]:
    """run_pretrain.py's settings, and a sentence that says which recipe applies and why.

    Precedence: flags, ``--config``, the recipe, defaults. Without data the recipe is ``sample``.
    """
    prog = "run_pretrain.py"
    if "-h" in argv or "--help" in argv:
        parse(PretrainConfig, ["--help"], prog)
    flags = _with_precision(parse_flags(PretrainConfig, argv))
    if "config" in flags:
        file = flags.pop("config")[0]
        flags = _with_precision(read_yaml(file, PretrainConfig), f"in the config file {file}: ") | flags
    data, arch, named = (flags.get(name, [""])[0] for name in ("data_path", "arch", "recipe"))
    recipe = named or ("dino" if data else "sample")
    why = "" if "recipe" in flags else (" (--data-path is given)" if data else " (no --data-path)")
    settings = recipe_settings(recipe, arch or None)
    if not data and "data_path" not in settings:
        raise InputError(f"recipe {recipe} needs --data-path: a folder of images, such as /data/imagenet/train")
    defaults = PretrainConfig(**{"recipe": recipe, **settings})  # type: ignore[arg-type]
    config = build(PretrainConfig, flags | {"recipe": [recipe]}, defaults, prog)
    if not config.output_dir:
        name = f"{recipe}-{config.arch.replace('timm:', 'timm-').replace('/', '-')}"
        config = dataclasses.replace(config, output_dir=f"runs/{name}")
    embedded = not data and config.data_path == "sample:fashion-mnist"
    source = f"the images that come with this package ({config.data_path})" if embedded else f"data {config.data_path}"
    return config, f"recipe {recipe}{why}: {config.arch} on {source}, explicit flags win"
