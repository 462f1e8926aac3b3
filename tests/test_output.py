"""Output that nobody reads: the work goes on, and nothing is said of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.io.output import lasting_output

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys
from tqdm import tqdm
from ldm.io.output import lasting_output

@lasting_output()
def main():
    for line in tqdm(range(3000), disable=False):
        print("a line that is long enough to fill what a pipe holds", line)
        print("and a warning", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write("done")
    return 5

sys.exit(main())
"""


def start(tmp_path: Path, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "out")], cwd=ROOT, **streams)


def ended(program: subprocess.Popen, tmp_path: Path) -> bool:
    return program.wait(60) == 5 and (tmp_path / "out").read_text() == "done"


def test_a_reader_that_leaves(tmp_path):
    program = start(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    os.read(program.stdout.fileno(), 10)
    program.stdout.close()
    assert ended(program, tmp_path)


def test_a_terminal_that_is_closed(tmp_path):
    ours, theirs = os.openpty()
    program = start(tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 10)
    os.close(ours)
    assert ended(program, tmp_path)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        assert ended(start(tmp_path, stdout=full, stderr=full), tmp_path)


def test_streams_that_were_closed_from_the_start(tmp_path):
    command = f"exec {sys.executable} -c '{PROGRAM}' {tmp_path / 'out'} >&- 2>&-"
    assert ended(subprocess.Popen(["sh", "-c", command], cwd=ROOT), tmp_path)


def test_only_the_last_words_meet_a_closed_pipe(tmp_path):
    """What is short waits in the buffer until the very end, where the interpreter would complain."""
    program = "from ldm.io.output import lasting_output\n\n@lasting_output()\ndef main(): print('short')\n\nmain()"
    shell = f'{{ {sys.executable} -c "$PROGRAM"; echo $? >&2; }} | true'
    result = subprocess.run(["sh", "-c", shell], cwd=ROOT, env={**os.environ, "PROGRAM": program}, capture_output=True)
    assert result.stderr.decode().split() == ["0"]


def test_streams_come_back(capsys):
    before = sys.stdout, sys.stderr
    with lasting_output():
        print("heard")
        print("heard too", file=sys.stderr)
        assert not sys.stdout.isatty() and sys.stdout.encoding == before[0].encoding
    assert (sys.stdout, sys.stderr) == before
    assert tuple(capsys.readouterr()) == ("heard\n", "heard too\n")
