"""How far two sets of images are apart, from their features (N D) alone; float64 throughout."""

import torch
from torch import Tensor

from ldm.utils.errors import DataError
from ldm.utils.seeding import keys

CHUNK = 1024  # rows of a table of distances


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D D), with N - 1. Raises DataError where N images cannot span D dimensions."""
    count, dims = features.shape
    if count <= dims:
        raise DataError(
            f"a Frechet distance of {count} images in {dims} features: their covariance has no full rank; "
            f"take more than {dims} images, or metrics=kid, which is unbiased for any number"
        )
    return features.double().mean(0), features.double().T.cov()


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """|m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians: Eq. (6), arXiv:1706.08500.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is symmetric.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap).item()


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """KID: unbiased squared MMD with the kernel (x.y / D + 1)^3, mean and deviation over subsets: arXiv:1801.01401."""
    size = min(size, len(x), len(y))
    if size < 2:
        raise DataError(f"a kernel distance of {len(x)} and {len(y)} images: expected at least 2 of each")
    subsets = 1 if size == len(x) == len(y) else subsets
    values = torch.tensor([_mmd(*_pick((x, y), size, seed, k)) for k in range(subsets)], dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def _pick(both: tuple[Tensor, Tensor], size: int, seed: int, number: int) -> list[Tensor]:
    orders = (keys(seed, f"kid/{side}/{number}", torch.arange(len(f))).argsort() for side, f in enumerate(both))
    return [f[order[:size]].double() for f, order in zip(both, orders, strict=True)]


def _mmd(x: Tensor, y: Tensor) -> float:
    """Eq. (4), arXiv:1801.01401."""
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    count = len(x)
    within = sum((k.sum() - k.trace()) / (count * (count - 1)) for k in (xx, yy))
    return (within - 2 * xy.mean()).item()


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))), mean and deviation over parts of the images, which are shuffled first.

    Eq. (1), arXiv:1801.01973: of arXiv:1606.03498.
    """
    if not 1 <= splits <= len(logits):
        raise DataError(f"an Inception score of {len(logits)} images in splits={splits}: expected an image in each")
    order = keys(0, "inception_score", torch.arange(len(logits))).argsort()
    scores = []
    for part in logits[order].double().log_softmax(1).tensor_split(splits):
        p, marginal = part.exp(), part.exp().mean(0).log()
        scores.append((torch.special.xlogy(p, p) - p * marginal.clamp(min=-1e4)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def precision_recall(real: Tensor, drawn: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares of drawn images near real ones, and of real ones near drawn ones: Eq. (1), arXiv:1904.06991.

    Near is within the distance of an image of the other set to its k-th neighbour in that set.
    """
    if (count := min(len(real), len(drawn))) <= neighbours:
        raise DataError(f"precision and recall of {count} images with neighbours={neighbours}: expected more images")
    return _covered(drawn, real, neighbours), _covered(real, drawn, neighbours)


def _covered(x: Tensor, by: Tensor, neighbours: int) -> float:
    """The share of x that lies in a ball round some point of `by`."""
    x, by = x.double(), by.double()
    radii = torch.cat([torch.cdist(part, by).kthvalue(neighbours + 1).values for part in by.split(CHUNK)])
    inside = [(torch.cdist(part, by) <= radii).any(1) for part in x.split(CHUNK)]
    return torch.cat(inside).double().mean().item()


def clip_similarity(images: Tensor, texts: Tensor) -> Tensor:
    """max(cos, 0) of each image's embedding (N P) and its text's: arXiv:2104.08718, whose score is 2.5 times that."""
    return torch.cosine_similarity(images.double(), texts.double()).clamp(min=0)
