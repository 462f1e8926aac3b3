"""Draw images of a trained run or of published weights.

python sample.py run=DIR prompts="[a red circle, a blue square]" seeds="[0,1]"
python sample.py weights=sd15.safetensors prompts="[a photo of a cat]" negative="blurry"
python sample.py weights=sd15.safetensors lora=style.safetensors controlnet="[{path: c.pth, image: c.png}]" prompts=...
python sample.py run=DIR num_images=1000 metrics=[frechet,kid]
python sample.py cascade="[runs/64,runs/256]" stages="[{},{steps:20,aug_level:0.2}]" prompts="[a cat]"   # or metrics=
"""

from contextlib import nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from ldm.tools.cli import entry


@entry("sample")
def main(cfg: dict, path: Path) -> None:
    from ldm.tools.gallery import check_writable, new_folder

    given = list(HydraConfig.get().overrides.task)
    out = Path(cfg["out"]) if path == Path.cwd() else path  # a sweep has a folder per job below `out`
    is_chosen = path != Path.cwd() or any(word.startswith("out=") for word in given)
    check_writable(out)
    with nullcontext(out) if is_chosen else new_folder(out) as folder:
        draw(cfg, given, folder)


def draw(cfg: dict, given: list[str], out: Path) -> None:
    """Pictures, or numbers of them, into the folder `out`. given: the command's own settings."""
    from ldm.generate import generate, sides
    from ldm.sampling import Sampling
    from ldm.tools.embed import Reader, share_text_encoder
    from ldm.tools.gallery import check_own, read_edit, read_pairs, texts_of, write_gallery
    from ldm.tools.measure import measure
    from ldm.tools.measure_cascade import measure_cascade
    from ldm.tools.stages import draw_cascade, enlarges
    from ldm.tools.subject import as_published, load_subject

    if cfg["cascade"] or enlarges(cfg := as_published(cfg, given)):
        return (measure_cascade if cfg["metrics"] else draw_cascade)(cfg, given, out)
    if cfg["metrics"]:
        return measure(cfg, out)
    pairs = read_pairs(cfg)
    check_own(out, len(pairs))
    [cfg] = share_text_encoder([cfg])
    sampling = Sampling.from_config(cfg)
    run, refiner = load_subject(cfg, Reader(texts_of(cfg))(cfg))
    image_size = sides(run.config["image_size"] if cfg["image_size"] is None else cfg["image_size"])
    images = generate(
        run.objective,
        [prompt for prompt, _ in pairs],
        [seed for _, seed in pairs],
        sampling,
        image_size=image_size,
        negative=cfg["negative"],
        edit=read_edit(cfg, image_size),
        refiner=refiner,
        attached=run.attached,
        batch_size=cfg["batch_size"],
        progress=None,
    )
    how = {**cfg, "step": run.step, "image_size": image_size}
    write_gallery(out, images, pairs, how, columns=len({seed for _, seed in pairs}))
    print(f"{len(images)} images in {out}/, all of them in {out / 'grid.png'}")


if __name__ == "__main__":
    main()
