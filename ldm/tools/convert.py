"""Published weights from one layout to the other: `python -m ldm.tools.convert SRC DST --layout original|diffusers`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ldm.io.folders import appearing
from ldm.io.output import lasting_output
from ldm.utils.errors import ConfigError, LdmError, WeightsError
from ldm.weights.components import FOLDERS
from ldm.weights.formats import Config
from ldm.weights.formats_clip import ends_of
from ldm.weights.load import LAYOUTS, arguments_of, check_destination, load_source, write_folder, write_original
from ldm.weights.pipeline import (
    LATENT_SCALES,
    read_settings,
    read_tokenizer,
    read_vocabulary,
    vocabularies,
    write_pipeline,
)
from ldm.weights.places import NETWORKS, family_of, places_of
from ldm.weights.sources import Source, components_in, open_sources
from ldm.weights.systems import name_system

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT = ("scaling_factor", "shift_factor", "force_upcast", "latents_mean", "latents_std", "sample_size",
        "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
LEFT = ("safety_checker", "watermarker")  # not part of any system here


def convert(
    src: Path,
    dst: Path,
    layout: str,
    component: str | None = None,
    *,
    ema: bool | None = None,
    strict: bool = True,
    dtype: str | None = None,  # of the copy; without it no bit of a weight changes
    tokenizer: Path | None = None,  # a vocabulary for the pipeline, where SRC has none
    system: str | None = None,  # a file of configs/system, where SRC does not show that it is sd21_base
) -> list[str]:
    """Every component of SRC, or the one named, as DST: the names of those written.

    DST is a folder (diffusers) or a .safetensors file (original). Raises LdmError, and then leaves no DST.
    """
    if dtype and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: expected one of {', '.join(DTYPES)}")
    names = [name for name in components_in(src) if name not in LEFT]
    if component:
        names = [component]
    elif unknown := [name for name in names if name not in FOLDERS]:
        raise WeightsError(f"{src}: no conversion is known for {', '.join(unknown)}; choose one with --component")
    sources = open_sources(src, ema=ema, strict=strict)
    if not names or (lacking := [name for name in names if name not in sources]):
        what = f"no {lacking[0]}" if names else "nothing to convert"
        raise WeightsError(f"{src}: there is {what}; the components are {', '.join(sources) or 'none'}")
    job = Job(src, {name: sources[name] for name in names}, DTYPES.get(dtype), system)
    job.write_file(dst) if layout == "original" else job.write_folder(dst, tokenizer)
    return names


class Job:
    """The components of one conversion."""

    def __init__(self, src: Path, sources: Mapping[str, Source], dtype: torch.dtype | None, system: str | None):
        self.src, self.sources, self.dtype = src, sources, dtype
        network = next((sources[name] for name in NETWORKS if name in sources), None)
        has_others = network is not None and len(sources) > 1
        self.family = family_of(network.kind, arguments_of(network)) if has_others else None
        tells = has_others or (network is not None and network.kind == "pixart")  # how long its captions are
        self.settings = read_settings(src) if tells else {}
        is_whole = has_others and all(place.folder in sources for place in places_of(self.family))
        self.system = name_system(src, sources, self.settings, system) if is_whole else None

    def load(self, name: str) -> nn.Module:
        return load_source(self.sources[name], self.dtype, whole=True)

    def write_file(self, dst: Path) -> None:
        """One original file."""
        check_destination(dst)
        write_original({name: self.load(name) for name in self.sources}, dst, self.family, self.settings)

    def write_folder(self, dst: Path, tokenizer: Path | None) -> None:
        """A folder per component, and of a whole system the rest of its pipeline."""
        vocabulary = self.vocabulary(tokenizer)
        with appearing(dst) as folder:
            for name, source in self.sources.items():
                place = folder / name if len(self.sources) > 1 else folder
                place.mkdir(exist_ok=True)
                used = arguments_of(source)
                is_all = used == arguments_of(source, whole=True)
                config = self.config(name, vocabulary)
                write_folder(self.load(name), place, config, used=None if is_all else used)
            if self.system:
                write_pipeline(folder, self.system, self.settings, self.src, vocabulary)

    def vocabulary(self, tokenizer: Path | None) -> str | None:
        """Of a whole system: the one given, or that of SRC."""
        if self.system is None:
            return None
        if tokenizer:
            return read_vocabulary(tokenizer, self.system)
        return read_tokenizer(vocabularies(self.src), self.system)

    def config(self, name: str, vocabulary: str | None) -> Config:
        """What config.json says beyond the network: as the source had it, or as the family's publication did."""
        if self.sources[name].kind == "clip_text" and (ends := ends_of(arguments_of(self.sources[name]), vocabulary)):
            return ends
        if (config := self.sources[name].config) is not None:
            return {name: config[name] for name in KEPT if name in config}
        if self.family is None or name != "vae":
            return {}
        return {"scaling_factor": self.settings.get("scale", LATENT_SCALES[self.family])}


@lasting_output()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ldm.tools.convert", description="Convert published weights.")
    parser.add_argument("src", type=Path, metavar="SRC", help="a diffusers folder or a file: .safetensors .ckpt .pt")
    parser.add_argument("dst", type=Path, metavar="DST", help="a new folder, or with original a .safetensors file")
    parser.add_argument("--layout", choices=LAYOUTS, required=True, help="of DST")
    parser.add_argument("--component", help="convert this one only: " + ", ".join(FOLDERS))
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help="the averaged weights, where SRC has both")
    parser.add_argument("--no-strict", dest="strict", action="store_false", help="leave out tensors of no known part")
    parser.add_argument("--dtype", choices=DTYPES, help="of DST; by default as in SRC, bit for bit")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="a vocabulary, for a file, which has none")
    parser.add_argument("--system", metavar="NAME", help="sd21_base, where SRC is that and does not show it")
    chosen = vars(parser.parse_args(arguments))
    try:
        names = convert(**chosen)
    except LdmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return ConfigError.exit_code
    print(f"{chosen['dst']}: {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
