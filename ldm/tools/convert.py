"""Published weights from one layout to the other: `python -m ldm.tools.convert SRC DST --layout original|diffusers`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm.io.folders import appearing
from ldm.utils.errors import LdmError, WeightsError
from ldm.weights.components import COMPONENTS
from ldm.weights.formats import Config
from ldm.weights.load import LAYOUTS, load_source, write_folder, write_original
from ldm.weights.sources import Source, components_in, open_source

KEPT = ("scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std", "sample_size")
SCALING = {2048: 0.13025, 1280: 0.13025}  # of the latents of SDXL and its refiner, by text width; Stable Diffusion's:
SD_SCALING = 0.18215


def convert(src: Path, dst: Path, layout: str, component: str | None = None, *, ema: bool = True) -> list[str]:
    """Every component of SRC, or the one named, as DST: the names of those written. No bit of a weight changes.

    DST is a folder (diffusers) or a .safetensors file (original). Raises WeightsError, and then leaves no DST.
    """
    there = components_in(src) if src.exists() else []
    names = [component] if component else there or [None]
    if unknown := [name for name in names if name and name not in COMPONENTS]:
        raise WeightsError(f"{src}: no conversion is known for {', '.join(unknown)}; choose one with --component")
    sources = [open_source(src, name, ema=ema) for name in names]
    nets = {source.component: load_source(source, dtype=None) for source in sources}
    if layout == "original":
        write_original(nets, dst)
    else:
        with appearing(dst) as folder:
            for source in sources:
                place = folder / source.component if len(sources) > 1 else folder
                place.mkdir(exist_ok=True)
                write_folder(nets[source.component], place, _kept(source, nets))
    return list(nets)


def _kept(source: Source, nets: dict) -> Config:
    """What config.json says beyond the network: as the source had it, or as the family's publication did."""
    if source.config is not None:
        return {name: source.config[name] for name in KEPT if name in source.config}
    if source.component != "vae" or "unet" not in nets:
        return {}
    return {"scaling_factor": SCALING.get(nets["unet"].context_dim, SD_SCALING)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldm.tools.convert", description="Convert published weights.")
    parser.add_argument("src", type=Path, metavar="SRC", help="a diffusers folder or a file, .safetensors or .ckpt")
    parser.add_argument("dst", type=Path, metavar="DST", help="a new folder, or with original a .safetensors file")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="of DST")
    parser.add_argument("--component", help="convert this one only: " + ", ".join(COMPONENTS))
    parser.add_argument("--no-ema", action="store_true", help="of a training checkpoint, the weights not averaged")
    chosen = parser.parse_args(arguments)
    try:
        names = convert(chosen.src, chosen.dst, chosen.layout, chosen.component, ema=not chosen.no_ema)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{chosen.dst}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
