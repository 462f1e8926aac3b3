"""Image diffusion to read beside the papers. `import ldm` is free: torch loads when something of it is used."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load_run":
        from ldm.generate import load_run

        return load_run
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "load_run"]
