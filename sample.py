"""Draw images of a trained run: `python sample.py run=DIR prompts="[a red circle, a blue square]" seeds="[0,1]"`."""

from pathlib import Path

from ldm.tools.cli import entry


@entry("sample")
def main(cfg: dict, out: Path) -> None:
    from ldm.generate import Sampling, load_run
    from ldm.tools.gallery import edit_inputs, write_gallery
    from ldm.utils.errors import ConfigError
    from ldm.utils.devices import pick_device

    if not cfg["run"]:
        raise ConfigError("run is not set: give a run directory, e.g. run=runs/shapes/2026-01-01_12-00-00")
    run = load_run(cfg["run"], device=pick_device(cfg["device"]), ema=cfg["ema"])
    pairs = [(prompt, seed) for prompt in cfg["prompts"] for seed in cfg["seeds"]]
    images = run.sample(
        [prompt for prompt, _ in pairs],
        [seed for _, seed in pairs],
        Sampling.from_config(cfg),
        image_size=cfg["image_size"],
        negative=cfg["negative"],
        batch_size=cfg["batch_size"],
        progress=True,
    )
    write_gallery(out, images, pairs, cfg, columns=len(cfg["seeds"]))


if __name__ == "__main__":
    main()
