"""The networks in whose features sets of images are compared: configs/features."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.conditioning.clip import CLIPTextEncoder
from ldm.conditioning.clip_image import CLIPImageEncoder
from ldm.conditioning.clip_tokenizer import read_clip_tokenizer
from ldm.data.cache import digest
from ldm.generate import load_run
from ldm.metrics.features import Extractor
from ldm.models.codec import to_float
from ldm.models.inception import RESIZES, load_inception
from ldm.training.classifier import ClassifierObjective
from ldm.utils.devices import pick_device
from ldm.utils.errors import CheckpointError, ConfigError
from ldm.weights.load import load_model, load_source
from ldm.weights.sources import open_source


def classifier(run: str, device: str = "auto", batch_size: int = 256, cache: str | None = None) -> Extractor:
    """The last hidden layer of a classifier that train.py trained. Images are resized to what it was trained at.

    Raises ConfigError where there is no such run.
    """
    device = pick_device(device)
    try:
        found = load_run(run, device=device)
    except CheckpointError as error:
        name = str(run).rpartition("/")[2]
        raise ConfigError(
            f"features.run={run} holds no classifier ({error}); "
            f"train it: python train.py experiment={name} hydra.run.dir={run}"
        ) from None
    objective, size = found.objective, found.config["image_size"]
    if not isinstance(objective, ClassifierObjective):
        raise ConfigError(f"features.run={run} is a run of {type(objective).__name__}, expected a classifier's")
    exclusive = "labels" in objective.conditioner.encoders

    def see(images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = objective.classifier(objective.codec.encode(resized(images, size)))
        return features, logits if exclusive else None

    name = f"classifier {fingerprint(objective.classifier)} at {size} px, torch bilinear, antialiased"
    return Extractor(see, name, device=device, batch_size=batch_size, cache=cache)


def inception(
    path: str, resize: str = "clean", device: str = "auto", batch_size: int = 64, cache: str | None = None
) -> Extractor:
    """Inception-v3's pool3 and 1008 logits, from the published file; resize: clean, torch_bilinear or tensorflow."""
    if resize not in RESIZES:
        raise ConfigError(f"features.resize={resize} is not known; use {', '.join(RESIZES)}")
    device = pick_device(device)
    network = load_inception(path).to(device)
    name = f"Inception-v3 {fingerprint(network)}, resize={resize}"
    return Extractor(lambda images: network(RESIZES[resize](images)), name,
                     device=device, batch_size=batch_size, cache=cache)  # fmt: skip


def clip(
    images: str,
    texts: str | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    batch_size: int = 64,
    cache: str | None = None,
) -> Extractor:
    """CLIP's embeddings of images, and of texts where that tower is given too; OpenCLIP's file may be both.

    images, texts: files or folders as `load_model` takes them. tokenizer: as for published weights.
    """
    device = pick_device(device)
    seer = CLIPImageEncoder(load_model(images, "image_encoder", device=device))
    name, read = f"CLIP {fingerprint(seer.network)} of {Path(images).name}", None
    if texts:
        source = open_source(Path(texts), "text_encoder_2" if texts == images else None)
        network = load_source(source, torch.float32, device, whole=True)
        reader = CLIPTextEncoder(network, read_clip_tokenizer(tokenizer), pooled=True, chunks=1)
        read = lambda captions: reader(captions, device)["pooled"]  # noqa: E731
    return Extractor(lambda pixels: (seer(list(pixels), device)["pooled"], None), name, read=read,
                     device=device, batch_size=batch_size, cache=cache)  # fmt: skip


def resized(images: Tensor, size: int) -> Tensor:
    """uint8 (B 3 H W) -> float32 in [-1, 1] with sides of `size`."""
    x = to_float(images)
    if images.shape[2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def fingerprint(network: nn.Module) -> str:
    """Which weights these are."""
    tensors = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in network.state_dict().values())
    return digest(*(tensor.numpy().tobytes() for tensor in tensors))[:16]
