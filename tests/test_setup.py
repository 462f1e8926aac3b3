"""README's first commands work where the system's Python refuses installs (PEP 668), and nothing else is touched.

The registry is a folder with a `uv` that prints how it is called; the interpreter is a copy, marked as Debian's.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
START = (ROOT / "README.md").read_text().partition("## Start")[2].partition("## Use")[0]
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", START, re.DOTALL) for line in block.splitlines() if line]


@pytest.fixture(scope="module")
def managed(tmp_path_factory) -> Path:
    """The `bin` folder of an interpreter whose packages belong to the system."""
    root = tmp_path_factory.mktemp("managed")
    base, version = Path(sys.base_prefix), f"python{sys.version_info.major}.{sys.version_info.minor}"
    (root / "bin").mkdir()
    stdlib = root / "lib" / version
    stdlib.mkdir(parents=True)
    for source in (base / "lib").glob("lib*.so*"):
        (root / "lib" / source.name).symlink_to(source)
    for source in Path(sysconfig.get_path("stdlib", vars={"base": str(base), "installed_base": str(base)})).iterdir():
        if source.name not in ("EXTERNALLY-MANAGED", "site-packages"):
            (stdlib / source.name).symlink_to(source)
    shutil.copy(Path(sys._base_executable).resolve(), root / "bin" / "python3")
    (stdlib / "site-packages").mkdir()
    (stdlib / "EXTERNALLY-MANAGED").write_text("[externally-managed]\nError=belongs to the system\n")
    return root / "bin"


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    files = {
        "uv_stub.py": "import sys\n\ndef main():\n    print('uv', *sys.argv[1:])\n",
        "uv-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: uv\nVersion: 1.0\n",
        "uv-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "uv-1.0.dist-info/entry_points.txt": "[console_scripts]\nuv = uv_stub:main\n",
    }
    with zipfile.ZipFile(folder / "uv-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr("uv-1.0.dist-info/RECORD", "".join(f"{name},,\n" for name in files))
    return folder


def test_the_commands_install_into_the_clone_alone(managed, registry, tmp_path):
    environment = {"PATH": f"{managed}:{os.environ['PATH']}", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(registry),
                   "HOME": str(tmp_path), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}  # fmt: skip
    shell = {"shell": True, "cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    pip = subprocess.run("python3 -c 'import ensurepip, sys; print(ensurepip.version(), sys.prefix)'", **shell)
    if pip.returncode or str(managed.parent) not in pip.stdout:
        pytest.skip(f"no copy of this interpreter can be made: {pip.stdout}{pip.stderr}")
    start, tests = COMMANDS
    done = subprocess.run(start, **shell)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "uv run train.py", done.stderr
    assert tests.split(" && ")[:-1] == start.split(" && ")[:-1]
    done = subprocess.run(tests.split(" && ")[-1], **shell)
    assert done.stdout == "uv run --extra dev --extra parity --extra metrics --extra sweeps pytest\n", done.stderr
    assert list((managed.parent / "lib").glob("python*/site-packages/*")) == []


def test_the_marked_interpreter_refuses_what_the_commands_avoid(managed, registry, tmp_path):
    """Else the test above would show nothing."""
    wheels = list((managed.parent / "lib").glob("python*/ensurepip/_bundled/pip-*.whl"))
    if not wheels:
        pytest.skip("this Python brings no pip along")
    environment = {**os.environ, "PYTHONPATH": str(wheels[0]), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(registry)}
    command = [str(managed / "python3"), "-m", "pip", "install", "uv"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "externally-managed-environment" in done.stderr


def test_the_judge_of_commits_runs_the_same_command():
    judge, tests = (ROOT / ".ci" / "run").read_text(), COMMANDS[1].split(" && ")[-1]
    assert f"{tests} -q\n" in judge
    assert not re.search(r"python3 -m pip install", judge + START)
    assert ".uv/\n" in (ROOT / ".gitignore").read_text()
