"""The words of a command as people type them -> as Hydra reads them, or one line that says what to type instead.

Hydra's grammar has a meaning of its own for ' # ( ~ and knows no accents. A value that it cannot read is text, and is
put in quotes for it. Prompts are always text, so that commas, weights (a cat:1.3) and numbers in them stay as they are;
so are paths that look like numbers.
"""

import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString, Sweep
from hydra.errors import HydraException

from ldm.build import compose, config_dir
from ldm.utils.errors import ConfigError
from ldm.utils.suggest import effective, nearest, unknown_option, unknown_setting

TEXTS = {"prompts", "negative"}  # settings that are texts, or lists of them
PATHS = {"run", "weights", "out", "image", "mask", "vae", "text_encoder", "text_encoder_2", "embeddings", "tokenizer",
         "refiner", "base", "teacher", "resume", "cache", "data.path", "codec.run", "name"}  # fmt: skip
ALONE = {"--hydra-help", "--version", "--resolve", "-r", "--run", "-m", "--multirun", "-sc", "--shell-completion"}
WITH_VALUE = {"-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir",
              "-i", "--info", "--experimental-rerun"}  # fmt: skip
SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
QUOTED = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")(?=\s*(?:[,:\])}]|$))""", re.DOTALL)
OPENING, CLOSING = "([{", ")]}"


def readable(argv: Sequence[str], config_name: str) -> list[str]:
    """The command's words for Hydra. Raises ConfigError, with what to type, for a word that means nothing."""
    settings, flags = sort_out(argv)
    several = bool({"-m", "--multirun"} & set(flags))
    settings = [quoted(word, several) for word in settings]
    for word in settings:
        check(word, config_name, lambda: base(settings, flags, config_name))
    return settings + flags


def sort_out(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings, and Hydra's own flags with their values."""
    settings, flags, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            settings.append(word)
        elif name in ALONE:
            flags.append(word)
        elif name in WITH_VALUE:
            flags += [name, *([os.path.expanduser(value)] if equals else map(os.path.expanduser, rest[:1]))]
            rest = rest if equals else rest[1:]
        else:
            value = value if equals else " ".join(rest[:1]) or "VALUE"
            key = name.lstrip("-").replace("-", "_")
            raise ConfigError(f"{word}: settings have no dashes; type {_typed(key, value)}")
    return settings, flags


def quoted(word: str, several: bool) -> str:
    """A setting whose value Hydra can read. In a sweep (`several`) commas part its values."""
    key, equals, value = word.partition("=")
    is_text = key.rpartition(".")[2] in TEXTS
    if key in PATHS and isinstance(_parsed(word) and _parsed(word).value(), int | float):
        return f"{key}={_quote(value)}"
    if not equals or (not is_text and _reads(value)) or (several and SWEEP.fullmatch(value)):
        return word
    parts = [part.strip() for part in (split(value) if several else [value])]
    read = [_value(part, is_text) for part in parts]
    return f"{key}={','.join(new if _reads(new) else _quote(old) for new, old in zip(read, parts, strict=True))}"


def _value(value: str, is_text: bool) -> str:
    if is_text:
        inner = _inside(value, "[]")
        return _text(value) if inner is None else f"[{','.join(map(_text, split(inner)))}]"
    if _reads(value):
        return value
    if (inner := _inside(value, "[]")) is not None:
        return f"[{','.join(_value(part, False) for part in split(inner))}]"
    if (inner := _inside(value, "{}")) is not None:
        pairs = (part.partition(":") for part in split(inner))
        return "{" + ",".join(f"{name.strip()}:{_value(part.strip(), False)}" for name, _, part in pairs) + "}"
    return _quote(os.path.expanduser(value))


def _text(value: str) -> str:
    return value if value in ("", "null") or QUOTED.fullmatch(value) else _quote(value.replace("${", r"\${"))


def _quote(text: str) -> str:
    return QuotedString(text, Quote.double if "'" in text and '"' not in text else Quote.single).with_quotes()


def _inside(value: str, brackets: str) -> str | None:
    """What stands between brackets that open at the beginning and close at the end."""
    if len(value) < 2 or value[0] + value[-1] != brackets:
        return None
    depth = 0
    for character in value[1:-1]:
        depth += (character == brackets[0]) - (character == brackets[1])
        if depth < 0:
            return None
    return value[1:-1].strip()


def split(text: str, opening: str = OPENING) -> list[str]:
    """Parts between commas that stand in no quotes and no brackets; brackets that never close are characters."""
    parts, depth, begins, position = [""], 0, True, 0
    while position < len(text):
        character = text[position]
        if begins and (match := QUOTED.match(text, position)):
            parts[-1] += match.group()
            position = match.end()
            continue
        depth += (character in opening) - (character in CLOSING and OPENING[CLOSING.index(character)] in opening)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
        begins = character in ",:([{" or (begins and character.isspace())
        position += 1
    if depth and opening:
        return split(text, opening[1:])
    return [part.strip() for part in parts] if text.strip() else []


@cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _parsed(word: str) -> Override | None:
    try:
        return _parser().parse_override(word)
    except HydraException:
        return None


def _reads(value: str) -> bool:
    return _parsed(f"key={value}") is not None


def _typed(key: str, value: str) -> str:
    """A setting as it is typed in a shell."""
    return f"{key}={value}" if re.fullmatch(r"[\w@%+:,./-]*", value) else f'{key}="{value}"'


def check(word: str, config_name: str, cfg: Callable[[], dict]) -> None:
    """ConfigError for a word that Hydra would answer with a riddle, or take although nothing reads it."""
    key, equals, value = word.lstrip("+").partition("=")
    if word.startswith("~"):
        return check_removed(key.lstrip("~"), config_name)
    if not equals:
        raise ConfigError(
            f"'{word}' is not a setting; those are typed key=value without spaces, "
            f'and a value with spaces in quotes, as in prompts="a red circle"'
        )
    override = _parsed(word)
    if override is None:
        raise ConfigError(f"'{word}' cannot be read: '{key}' is no name of a setting{nearest(key, effective(cfg()))}")
    if word.startswith("+"):
        check_added(word, key, value, config_name, cfg)
    if key in groups(config_name):
        for option in chosen(override):
            if not isinstance(option, str):
                name = "null" if option is None else str(option).lower()
                raise ConfigError(unknown_option(key, name, options(key), cfg()))
    elif (config_dir() / key).is_dir() and not key.startswith("hydra"):
        raise ConfigError(unknown_setting(key, cfg()))


def chosen(override: Override) -> list:
    """The options that a word chooses of its group, of a sweep all; what is no name of one as the value it is."""
    value = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [] if isinstance(value, Sweep | Glob) else [value]
    flat = [option for value in values for option in (value if isinstance(value, list) else [value])]
    return [option.text if isinstance(option, QuotedString) else option for option in flat]


def check_removed(key: str, config_name: str) -> None:
    """A whole group, or a setting at the root, is read by name: without it nothing works."""
    key = key.partition("=")[0]
    if "." in key:
        return
    instead = f"{key}=none" if "none" in options(key) else f"{key}=null"
    known = key in groups(config_name) and "none" not in options(key)
    instead = f"{key}=OPTION, of {', '.join(options(key))}" if known else instead
    raise ConfigError(f"~{key} would take away what the program reads; to do without it: {instead}")


def check_added(word: str, key: str, value: str, config_name: str, cfg: Callable[[], dict]) -> None:
    """A new setting is read where it is an argument of what a `_target_` builds; that it is one, `make` checks."""
    if key in groups(config_name):
        raise ConfigError(f"{word}: the group is there already; leave out the +: {_typed(key, value)}")
    if key.startswith("hydra.") or "@" in key or "/" in key:
        return
    *path, last = key.split(".")
    node, is_read = (settings := cfg()), False
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
        is_read |= isinstance(node, dict) and "_target_" in node  # and so is a table that it is given
    is_there = isinstance(node, dict) and last in node
    if is_there and not word.startswith("++"):
        raise ConfigError(f"{word}: '{key}' is there already; leave out the +: {_typed(key, value)}")
    if not is_there and not (is_read and isinstance(node, dict)):
        raise ConfigError(f"{word}: nothing reads '{key}'{nearest(key, effective(settings))}")


def groups(config_name: str) -> dict[str, str]:
    """The groups of a shipped root config, each with the option that it chooses."""
    path = config_dir() / f"{config_name}.yaml"
    _, _, rest = (path.read_text() if path.exists() else "").partition("defaults:\n")
    return dict(re.findall(r"^  - (\w+): (\w+)", rest.partition("\n\n")[0], re.MULTILINE))


def options(group: str) -> list[str]:
    """The shipped options of a group."""
    return sorted(path.stem for path in Path(config_dir(), group).glob("*.yaml"))


def base(settings: Sequence[str], flags: Sequence[str], config_name: str) -> dict:
    """The config with the options that a command chooses, without its other settings, which may be wrong."""
    folders = [flags[k + 1] for k, flag in enumerate(flags[:-1]) if flag in ("-cd", "--config-dir")]
    search = [f"hydra.searchpath=[{','.join(_quote(f'file://{Path(folder).absolute()}') for folder in folders)}]"]
    picked = []
    for word in settings:
        override = _parsed(word) if word.partition("=")[0] in groups(config_name) else None
        if override and not override.is_sweep_override() and all(isinstance(name, str) for name in chosen(override)):
            picked.append(word)
    try:
        return compose(config_name, picked + search * bool(folders))
    except ConfigError:
        return compose(config_name)
