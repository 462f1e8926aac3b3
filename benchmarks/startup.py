"""How long the commands take to answer, and the package to import: fresh processes, alternating with the peer's.

`--help` must not load torch; `import ldm` must not either, and `from ldm import load_run` little else than torch.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from harness import arguments, interleave

ROOT = Path(__file__).parents[1]
DIFFUSERS_CLI = [str(Path(sys.executable).with_name("diffusers-cli")), "--help"]


def run(*command: str) -> Callable[[], None]:
    """A case that starts the command once more; a command that fails is an error, not a fast command."""
    return lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def python(code: str) -> Callable[[], None]:
    return run(sys.executable, "-c", code)


def main() -> None:
    args = arguments(__doc__)
    rounds = 1 if args.small else args.rounds or 7
    commands = {
        "train.py --help": run(sys.executable, "train.py", "--help"),
        "sample.py --help": run(sys.executable, "sample.py", "--help"),
        "diffusers-cli --help": run(*DIFFUSERS_CLI),
    }
    timed = interleave(commands, rounds=rounds, warmup=0)
    for ours in list(commands)[:2]:
        timed.report("startup", ours, ["diffusers-cli --help"], target=0.10)

    imports = {
        "import ldm": python("import ldm"),
        "from ldm import load_run": python("from ldm import load_run"),
        "import torch": python("import torch"),
    }
    timed = interleave(imports, rounds=rounds, warmup=0)
    for ours in list(imports)[:2]:
        timed.report("startup", ours, ["import torch"], target=1.15)


if __name__ == "__main__":
    main()
