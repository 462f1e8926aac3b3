"""Train what a config describes: `python train.py [experiment=NAME] [group=option] [key=value] [-m a=1,2]`.

Read `train` and `assemble` from top to bottom: the whole system, each part built from those above it.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ldm.tools.cli import entry


@entry("train")
def main(cfg: dict, path: Path) -> float | None:
    from ldm.tools.jobs import reached
    from ldm.training.distributed import init, local_device
    from ldm.utils.devices import pick_device

    device, goal = local_device(pick_device(cfg["device"])), cfg.pop("goal")
    world = init(device, timeout=cfg["trainer"]["timeout"])
    try:
        return reached(goal, train(cfg, world.first(lambda: path), device, world))
    finally:
        world.close()


def train(cfg: dict, path: Path, device, world) -> dict:
    """Train in the run directory `path` until trainer.steps, from its newest checkpoint; returns its summary."""
    from ldm.training.run import RunDirectory

    resume = cfg.pop("resume", None)
    run = RunDirectory(path, resume=resume and Path(resume))
    with ExitStack() as stack:
        world.first(lambda: stack.enter_context(run.lock()))
        return train_in(run, cfg, device, world)


def train_in(run, cfg: dict, device, world) -> dict:
    """Train in a run directory that is ours."""
    from ldm.adapters.training import export
    from ldm.build import build_held_out, make
    from ldm.data.loader import batches
    from ldm.tools.class_images import check_reads_text, with_class_images
    from ldm.tools.previews import Previews
    from ldm.tools.profile import profiled
    from ldm.training.distill import DistillationObjective
    from ldm.training.loop import fit, prepare
    from ldm.training.report import Hooks

    path, resume = run.path, run.resume and str(run.resume)
    trainer, data = make(cfg["trainer"], "trainer"), make(cfg["data"], "data")
    data = with_class_images(cfg, data, path, device, world) if cfg["dreambooth"] else data
    objective, adapters, network, images, run.files = assemble(cfg, data, path, resume, device, world)
    if cfg["dreambooth"]:
        check_reads_text(objective)
    prepare(objective, network, trainer, device)
    optimizer = make(cfg["optimizer"], "optimizer")(objective)
    ema = make(cfg["ema"], "ema", batch_size=trainer.batch_size)(objective) if cfg["ema"] else None
    if isinstance(objective, DistillationObjective):
        objective.follow(ema)

    feed = partial(batches, images, trainer.batch_size, seed=cfg["seed"], flip=cfg["flip"], rank=world.rank,
                   world_size=world.size, workers=0 if cfg["cache"] else trainer.workers)  # fmt: skip
    previews = Previews(cfg, path, data if cfg["dreambooth"] else build_held_out(cfg["data"], data), objective, ema)
    logger = make(cfg["logger"], "logger", run_dir=path, config=cfg) if cfg["logger"] else None
    hooks = Hooks(previews.sample, previews.evaluate, logger, lambda step: describe(cfg, data, path))
    run.config = cfg
    with profiled(path, cfg["profile"]):
        summary = fit(objective, lambda step: feed(start_step=step), optimizer, trainer, run, ema=ema, hooks=hooks,
                      lr_schedule=make(cfg["lr_schedule"], "lr_schedule"), world=world, seed=cfg["seed"])  # fmt: skip
    if adapters and world.is_main:
        export(ema.applied(objective) if ema else objective, adapters, path / "adapter")
    return summary


def describe(cfg: dict, data, path: Path) -> None:
    """Leave in a run directory, for people, what it is trained with: the resolved config, and what the data hold."""
    from ldm.build import write_config
    from ldm.tools.dataset import write_data

    write_config(path / "config.yaml", cfg)
    write_data(data, path)


def assemble(cfg: dict, data, path: Path, resume: str | None, device, world) -> tuple:
    """(objective, adapters, network, images, files for checkpoints): what `cfg` describes, completed on the way.

    From nothing, from published weights, from another run, or as the checkpoint that training continues says.
    """
    import torch

    from ldm.build import build_adapters, build_conditioner, build_objective
    from ldm.tools.begin import begin_run
    from ldm.tools.dataset import check_conditions, show_data
    from ldm.tools.precompute import precompute
    from ldm.utils.seeding import key

    start = begin_run(cfg, path, resume)
    cfg.update(start.config)
    if world.is_main:
        show_data(data)
    if not cfg["dreambooth"]:  # whose data have captions
        check_conditions(data, cfg["conditioner"], start.stored.get("conditioner", {}), loose=bool(cfg["weights"]))
    codec, cfg["codec"] = build_first_stage(cfg, start.stored, path, data, device, world, start.networks)
    torch.manual_seed(key(cfg["seed"], "init"))
    conditioner, cfg["conditioner"], files = build_conditioner(
        cfg["conditioner"], data, start.vocabulary, start.networks
    )
    images = torch.utils.data.Subset(data, range(min(cfg["limit"], len(data)))) if cfg["limit"] else data
    if cfg["cache"]:
        images, conditioner = precompute(images, codec, conditioner, cfg["cache"], key=files, device=device,
                                         workers=cfg["trainer"]["workers"])  # fmt: skip
    objective, network, cfg["network"] = build_objective(cfg, codec, conditioner, start.networks)
    if start.state:
        objective.load_state_dict(start.state)
    if cfg["teacher"]:
        objective.conditioner.requires_grad_(False)
    adapters = build_adapters(cfg["adapters"], objective)
    return objective, adapters, network, images, files


def build_first_stage(cfg: dict, stored: dict, path: Path, data, device, world, networks):
    """The codec and its completed node; an autoencoder that is asked for and not there yet is trained first.

    A run that continues (from a checkpoint whose config is `stored`) has its codec in the checkpoint.
    """
    from ldm.build import build_codec, compose
    from ldm.generate import codec_of_run
    from ldm.utils.errors import ConfigError

    node = cfg["codec"]
    if "experiment" not in node:
        return build_codec(node, networks), node
    if "autoencoder" in stored.get("codec", {}):
        return build_codec(stored["codec"], networks), stored["codec"]
    source = Path(node["run"] or path / "autoencoder")
    if not (source / "summary.json").exists():
        if node["run"]:
            raise ConfigError(
                f"codec.run={source} holds no finished autoencoder; leave it out and one is trained, or train it: "
                f"python train.py experiment={node['experiment']} hydra.run.dir={source}"
            )
        if world.is_main:
            print(f"first stage: the autoencoder, experiment={node['experiment']}, in {source}")
        stage = compose("train", [f"experiment={node['experiment']}", *cfg['first_stage']])
        stage |= {name: cfg[name] for name in ("data", "image_size", "seed", "flip", "device", "logger")}
        stage["trainer"] |= {name: cfg["trainer"][name] for name in ("precision", "compile", "workers")}
        train(stage, source, device, world)
    return codec_of_run(node, source, data)


if __name__ == "__main__":
    main()
