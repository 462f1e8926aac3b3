"""Where the time of a run goes: a table of operators and a trace for chrome://tracing or Perfetto."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROWS = 25


@contextmanager
def profiled(path: Path, wanted: bool) -> Iterator[None]:
    """Write path/profile.txt and path/trace.json of what happens inside, if wanted."""
    if not wanted:
        yield
        return
    from torch.profiler import ProfilerActivity, profile, supported_activities

    with profile(activities=supported_activities()) as profiler:
        yield
    on_gpu = ProfilerActivity.CUDA in supported_activities()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=ROWS)
    (path / "profile.txt").write_text(table)
    profiler.export_chrome_trace(str(path / "trace.json"))
    print(table)
