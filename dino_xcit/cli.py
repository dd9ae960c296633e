"""Command lines from typed dataclasses: flags with dashes or underscores, YAML files, near matches for typos."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, get_type_hints

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
        InputError: an unknown flag (near matches are given), or a word that belongs to no flag.
    """
    known = [field.name for field in dataclasses.fields(config)]
    booleans = {name for name, hint in get_type_hints(config).items() if hint is bool}
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
            elif name not in (*known, "config", "use_fp16"):
                raise InputError(f"unknown flag --{name}{near_matches(name, known, prefix='--')} (--help lists all)")
            else:
                flags[name] = words
        elif words is None:
            raise InputError(f"cannot place the word {token!r}: every setting is given as --name value (see --help)")
        else:
            words.append(token)
    for name in booleans & flags.keys():
        word = (flags[name] or ["true"])[0].lower()
        if word not in _TRUE + _FALSE or len(flags[name]) > 1:
            raise InputError(f"--{name} is {' '.join(flags[name])!r}, expected true or false")
        flags[name] = [str(word in _TRUE)]
    return flags


def read_yaml(path: str, config: type) -> Flags:
    """The settings of a YAML file (``name: value`` a line), as flags.

    Raises:
        InputError: no such file, no mapping, or an unknown setting.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the config file {path} is no text: expected YAML, a line 'name: value' a setting") from error
    except yaml.YAMLError as error:
        raise InputError(f"the config file {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise InputError(f"the config file {path} holds {type(values).__name__}, expected lines of 'name: value'")
    known = [field.name for field in dataclasses.fields(config)]
    flags: Flags = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in (*known, "use_fp16"):
            raise InputError(f"unknown setting {name!r} in {path}{near_matches(name, known)}")
        if value is None:
            raise InputError(f"{name} has no value in {path}: give it one, or leave the line out")
        flags[name] = [str(part) for part in value] if isinstance(value, (list, tuple)) else [str(value)]
    return flags


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
        flags = read_yaml(" ".join(flags.pop("config")), config) | flags
    return build(config, flags, config(), prog)


def parse_pretrain(argv: Sequence[str]) -> tuple[PretrainConfig, str]:
    """run_pretrain.py's settings, and a sentence that says which recipe applies and why.

    Precedence: flags, ``--config``, the recipe, defaults. Without data the recipe is ``sample``.
    """
    prog = "run_pretrain.py"
    if "-h" in argv or "--help" in argv:
        parse(PretrainConfig, ["--help"], prog)
    flags = parse_flags(PretrainConfig, argv)
    if "config" in flags:
        flags = read_yaml(" ".join(flags.pop("config")), PretrainConfig) | flags
    if "use_fp16" in flags:  # DINO's name
        word = (flags.pop("use_fp16") or ["true"])[0].lower()
        if word not in _TRUE + _FALSE:
            raise InputError(f"--use_fp16 is {word!r}, expected true or false")
        flags.setdefault("precision", ["fp16" if word in _TRUE else "fp32"])
    data, arch = (" ".join(flags.get(name, [])) for name in ("data_path", "arch"))
    recipe = " ".join(flags.get("recipe", [])) or ("dino" if data else "sample")
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
