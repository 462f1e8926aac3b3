"""A published system at its full size with random weights: memory of loading, seconds to two steps and pixels.

python benchmarks/full_size.py [--system sd15] [--image-size 512] [--steps 2] [--dtype fp32]

Prints one JSON line. Loading may take at most 1.2 times the weights in the dtype asked for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write(system: str, file: Path) -> None:
    """The networks of the system's YAML, initialised, in one original file."""
    import torch

    from ldm.build import compose, make
    from ldm.weights.load import write_original
    from ldm.weights.places import places_of

    cfg = compose("train", [f"system={system}"])
    nodes = {"network": {**cfg["network"], "in_channels": 9 if system.endswith("inpaint") else 4, "out_channels": 4}}
    nodes["autoencoder"] = cfg["codec"]["autoencoder"]
    nodes |= {name: node["network"] for name, node in cfg["conditioner"]["encoders"].items() if "network" in node}
    nodes = {slot: {k: None if v == "???" else v for k, v in node.items()} for slot, node in nodes.items()}
    torch.manual_seed(0)
    write_original({place.folder: make(nodes[place.slot], "network") for place in places_of(system)}, file, system)


def measure(file: Path, image_size: int, steps: int, dtype: str) -> None:
    """Load and draw in this process, and print what it took."""
    from ldm.published import load_published

    before, start = peak(), time.time()
    run = load_published(file, dtype=dtype, tokenizer=None)
    loaded, seconds = peak(), time.time() - start
    tensors = [*run.objective.parameters(), *run.objective.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    start = time.time()
    run.generate(["a photo of an astronaut"], steps=steps, guidance=7.5, image_size=image_size)
    print(json.dumps({
        "system": run.config["system"], "dtype": dtype, "weights_gb": round(size / 1e9, 3),
        "load_peak_ratio": round((loaded - before) / size, 3), "load_seconds": round(seconds, 1),
        "image_size": image_size, "steps": steps, "sample_seconds": round(time.time() - start, 1),
        "peak_gb": round(peak() / 1e9, 2),
    }))  # fmt: skip


def peak() -> int:
    """Bytes of memory this process has had at most, pages of mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--system", default="sd15")
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--part", choices=("write", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part == "write":
        return write(chosen.system, chosen.file)
    if chosen.part == "measure":
        return measure(chosen.file, chosen.image_size, chosen.steps, chosen.dtype)
    with tempfile.TemporaryDirectory() as folder:
        for part in ("write", "measure"):  # each in a process of its own: the memory of the first is not the second's
            command = [sys.executable, *sys.argv, "--part", part, "--file", f"{folder}/{chosen.system}.safetensors"]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
