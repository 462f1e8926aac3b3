"""The files of a config group as plain nodes, without composing the whole config."""

from pathlib import Path

from omegaconf import OmegaConf

from ldm.build import config_dir


def group(name: str) -> list[Path]:
    return sorted((config_dir() / name).glob("*.yaml"))


def load(path: Path) -> dict:
    """A group file over the ones it builds on, its interpolations left as they are."""
    node = OmegaConf.to_container(OmegaConf.create(OmegaConf.load(path) or {}), resolve=False)
    for base in node.pop("defaults", []):
        node = {**load(path.with_name(f"{base}.yaml")), **node}
    return node
