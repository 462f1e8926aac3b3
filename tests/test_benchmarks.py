"""The benchmarks run: every file with tiny sizes where its peer is installed. No times are asserted."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import harness  # noqa: E402


def test_order_rotates_and_every_round_has_every_case():
    calls = []
    timed = harness.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "abc" + "bca" + "cab"
    assert all(len(seconds) == 3 for seconds in timed.seconds.values())
    assert 0 <= timed.busy_elsewhere <= 1


def test_ratio_is_the_median_of_same_rounds_against_the_best_peer(capsys):
    seconds = {"ours": [1, 2, 3], "fast": [2, 4, 6], "slow": [9, 9, 9]}
    timed = harness.Times(seconds, dict.fromkeys(seconds, 0.0), 0.0)
    line = timed.report("bench", "ours", ["slow", "fast"], target=0.6)
    assert json.loads(capsys.readouterr().out) == line
    assert (line["peer"], line["ratio"], line["quartiles"]) == ("fast", 0.5, [0.5, 0.5])
    assert timed.report("bench", "ours", ["fast"], work=2.0)["ratio"] == 0.25


def test_unequal_outputs_are_not_timed():
    assert harness.assert_equal(torch.ones(2), torch.ones(2) + 1e-6, tol=1e-5) < 1e-5
    with pytest.raises(AssertionError, match="differ by 1.00e-01"):
        harness.assert_equal(torch.tensor([0.9, 0.0]), torch.tensor([1.0, 0.0]), tol=1e-5)


@pytest.mark.parametrize(
    "name, lines", [("optimizer", 2), ("sampling_loop", 4), ("clip_text", 4), ("stored_latents", 3)]
)
def test_benchmark_runs(name, lines):
    if find_spec("diffusers") is None:
        pytest.skip("diffusers, the peer, is not installed: pip install -e '.[parity]'")
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == lines and all(result["ratio"] > 0 for result in results)
