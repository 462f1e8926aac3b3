"""Answers in one line to words of a command that cannot be used: the nearest name, and what to type instead."""

import difflib
import re
from collections.abc import Callable, Iterable

SWITCHED_OFF = ("null", "none", "false", "off", "no", "")
INDIRECT = ("scale", "claim", "sampling", "first_stage")  # read by other settings, or by an ablation
ONLY_WITH = {  # of train.py: what one objective alone reads
    "masks": "InpaintingObjective",
    "hint": "ControlObjective",
    "reconstruction": "AutoencoderObjective",
    "discriminator": "AutoencoderObjective",
    "perceptual": "AutoencoderObjective",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or nothing. A bare name that a group has too is meant before one that is spelt alike."""
    known = list(known)
    last = {k.rpartition(".")[2]: k for k in sorted(reversed(known), key=lambda k: -k.count("."))}
    own = name.rpartition(".")[2]
    same = [last[own]] if own in last and last[own] != name else []
    alike = difflib.get_close_matches(name, known, 1, 0.6)
    close = alike or same if "." in name else same or alike
    close = close or [last[k] for k in difflib.get_close_matches(own, last, 1, 0.6)]
    return f"; did you mean '{close[0]}'?" if close else ""


def effective(cfg: dict, name: str = "") -> list[str]:
    """Dotted names of the settings of a config, without those that do nothing as it stands.

    Those are of groups that another objective reads, of published weights where there are none, and numbers that act
    through others. What `name` itself begins with is kept.
    """
    objective = str(cfg.get("objective", {}).get("_target_", "")).rpartition(".")[2]
    hidden = {group for group, owner in ONLY_WITH.items() if owner != objective} | set(INDIRECT)
    hidden |= set() if cfg.get("weights") else {"published"}
    hidden |= set() if any("features" in node for node in cfg.get("metrics", {}).values()) else {"features"}
    hidden -= {name.partition(".")[0]}
    return [key for key in _keys(cfg) if key.partition(".")[0] not in hidden]


def _keys(cfg: dict, prefix: str = "") -> list[str]:
    keys = []
    for name, value in cfg.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += _keys(value, f"{prefix}{name}.")
    return keys


def unknown_setting(name: str, cfg: dict) -> str:
    """The line for a name that is no setting of a config."""
    if name == "data.path":
        return "this data has no path; for a folder of your own: data=folder data.path=FOLDER"
    return f"there is no setting '{name}'" + nearest(name, effective(cfg, name))


def unknown_option(group: str, name: str, options: Iterable[str], cfg: dict) -> str:
    """The line for a value that is no option of a group: a number is meant for a knob of it, a path for its data."""
    options, wrong = sorted(options), f"there is no {group}={name}"
    choose = f"choose from: {', '.join(options)}" if options else "it has no options"
    if name.lower() in SWITCHED_OFF and "none" in options:
        return f"{wrong}; to switch it off: {group}=none"
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", name):
        knob = _knob(group, cfg, whole=name.lstrip("+-").isdecimal())
        return f"{wrong}, which is a group of settings; " + (f"type {knob}={name}" if knob else choose)
    if "/" in name and "folder" in options:
        return f"{wrong}; for a folder of your own: {group}=folder {group}.path={name}"
    return f"{wrong}{nearest(name, options)}; {choose}"


def _knob(group: str, cfg: dict, whole: bool) -> str | None:
    """The first setting of a group that holds a number, or that of the root which sets it (times.steps: ${steps})."""
    node = cfg.get(group)
    numbers = {k: v for k, v in node.items() if type(v) in (int, float)} if isinstance(node, dict) else {}
    fitting = [name for name, value in numbers.items() if isinstance(value, int) == whole] or list(numbers)
    if not fitting:
        return None
    return fitting[0] if cfg.get(fitting[0]) == numbers[fitting[0]] else f"{group}.{fitting[0]}"


def explain(error: Exception, known: Callable[[], dict]) -> str:
    """One line for an error of Hydra or OmegaConf; known() composes the config that the command is about."""
    text = " ".join(str(error).split())
    if match := re.search(r"Could not override '([^']+)'|[Kk]ey '([^']+)' is not in struct", text):
        return unknown_setting(match.group(1) or match.group(2), known())
    if match := re.search(r"[Cc]ould not find '([^']+)'", text):
        parts = match.group(1).split("/", 2 if match.group(1).startswith("hydra/") else 1)
        listed = re.search(r"Available options in '[^']*':\n((?:\t[^\n]*\n?)*)", str(error))
        return unknown_option("/".join(parts[:-1]), parts[-1], listed.group(1).split() if listed else (), known())
    if match := re.search(r"Ambiguous value for argument '(([^=]+)=(.*?))' 1\.", text):
        word, key, value = match.groups()
        return f'{word} has several values: for a sweep over them type -m {word}, for a list {key}="[{value}]"'
    if match := re.search(r"Sweep parameters '(.+?)' requires --multirun", text):
        return f"{match.group(1)} has several values: for a sweep over them type -m {match.group(1)}"
    return text
