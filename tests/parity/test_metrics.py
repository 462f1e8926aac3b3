"""Inception-v3, its resizing and all distances against torch-fidelity and torchmetrics, on random numbers."""

import pytest
import torch

from ldm.metrics import statistics
from ldm.metrics.pairs import ssim
from ldm.models.inception import Inception, clean, load_inception, tensorflow

torch_fidelity = pytest.importorskip("torch_fidelity", reason="the parity extra is not installed")
torchmetrics = pytest.importorskip("torchmetrics", reason="the metrics extra is not installed")


def apart(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in the published layout, no tensor of it zero or one."""
    torch.manual_seed(0)
    network = Inception()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif "bn" in name or name.endswith("bias"):
            tensor.copy_(1.0 * name.endswith("bn.weight") + 0.2 * torch.randn(tensor.shape))
        else:
            torch.nn.init.kaiming_normal_(tensor)  # what an image shows reaches the end
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save({n: t for n, t in network.state_dict().items() if not n.endswith("num_batches_tracked")}, path)
    return path


@pytest.fixture(scope="module")
def judge(weights):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased"]
    return FeatureExtractorInceptionV3("judge", names, feature_extractor_weights_path=str(weights)).eval()


@torch.no_grad()
def test_inception_is_the_published_one(weights, judge):
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    both = zip(judge.features_list, load_inception(weights)(tensorflow(images)), judge(images), strict=True)
    for name, ours, theirs in both:
        assert ours.shape == theirs.shape and apart(ours, theirs) <= 2e-5, name
        assert apart(theirs[0], theirs[1]) > 0.01, "the images differ in it"


@pytest.mark.parametrize("size", [(32, 48), (400, 512)])
def test_clean_resizes_as_pil_does(size):
    """clean-fid resizes each channel by PIL in float32 and clips."""
    import numpy as np
    from PIL import Image

    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in images[0]]
    theirs = torch.stack([torch.from_numpy(np.array(p.resize((299, 299), Image.BICUBIC))) for p in planes]).clamp(
        0, 255
    )
    assert (clean(images)[0] * 128 + 128 - theirs).abs().max() < 0.01  # of 255


@pytest.fixture(scope="module")
def features():
    """Two sets of features that are correlated and not Gaussian."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(24, 24, generator=generator)
    real, drawn = (torch.randn(count, 24, generator=generator) for count in (400, 300))
    return (real @ mix).relu(), (1.1 * drawn @ mix + 0.3).relu()


def test_frechet_distance(features):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    ours = statistics.frechet_distance(*map(statistics.gaussian, features))
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, features), verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_kernel_distance(features):
    from torchmetrics.image.kid import poly_mmd

    real, drawn = (f[:300] for f in features)  # of everything at once: no subset is drawn
    ours, spread = statistics.kernel_distance(real, drawn, size=300)
    assert ours == pytest.approx(poly_mmd(real.double(), drawn.double()).item(), rel=1e-6)
    assert spread == 0


def test_inception_score(features):
    from torch_fidelity.metric_isc import isc_features_to_metric

    ours, _ = statistics.inception_score(features[0], splits=1)  # with more, the shuffles differ
    theirs = isc_features_to_metric(features[0], splits=1, shuffle=False)
    assert ours == pytest.approx(theirs["inception_score_mean"], rel=1e-6)


def test_precision_and_recall(features):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, drawn = features[0], features[1] * 0.7
    theirs = prc_features_to_metric(drawn, real, prc_neighborhood=3, prc_batch_size=1000)
    assert statistics.precision_recall(real, drawn) == pytest.approx((theirs["precision"], theirs["recall"]))
    assert 0 < theirs["recall"] < 1


def test_ssim():
    from torchmetrics.functional.image import structural_similarity_index_measure

    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (3, 3, 24, 40), dtype=torch.uint8, generator=generator)
    noisy = (images + 40 * torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
    _, everywhere = structural_similarity_index_measure(noisy / 255, images / 255, **options)
    theirs = everywhere[:, :, 5:-5, 5:-5].mean((1, 2, 3))  # it also looks into windows that reach over the border
    assert apart(ssim(images, noisy), theirs) <= 2e-5


def test_clip_score_of_torchmetrics():
    """Its formula, 100 max(cos, 0), on embeddings of any network."""
    images, texts = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(5))
    cosine = torch.nn.functional.normalize(images, dim=1) * torch.nn.functional.normalize(texts, dim=1)
    assert torch.allclose(statistics.clip_similarity(images, texts).float(), cosine.sum(1).clamp(min=0), atol=1e-6)
