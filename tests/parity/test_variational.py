"""Learned variances and the bound against diffusers' scheduler, scipy, and the formulas as published in code."""

import math

import numpy as np
import pytest
import torch

from ldm.diffusion import process
from ldm.diffusion.variational import bound, log_likelihood, log_variance

diffusers = pytest.importorskip("diffusers")
norm = pytest.importorskip("scipy.stats").norm

LINEAR = process.linear()


def images(n=3, std=0.4, seed=0):
    return std * torch.randn(n, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_learned_range_is_that_of_diffusers():
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", beta_schedule="linear")
    v = images(1, std=1.0)
    for index in (1, 2, 300, 999):
        expected = scheduler._get_variance(torch.tensor(index), predicted_variance=v)  # of a table in float32
        t = torch.tensor([(index + 1) / 1000], dtype=torch.float64)
        torch.testing.assert_close(log_variance(LINEAR, t, v), expected.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("index", [0, 1, 40, 999])
def test_the_bound_is_that_of_the_published_code(index):
    """Written once more with numpy from the definitions: betas, the two posteriors, and a sum over every value."""
    betas = np.linspace(1e-4, 0.02, 1000)
    bars = np.cumprod(1 - betas)
    before = np.append(1.0, bars[:-1])
    posterior = betas * (1 - before) / (1 - bars)
    log_small, log_large = np.log(np.append(posterior[1], posterior[1:]))[index], np.log(betas[index])
    x0, x_t, x0_hat, v = (images(seed=seed).numpy() for seed in range(4))
    x0_hat, v = x0 + 0.02 * x0_hat, 2 * v
    mean, mean_hat = (
        np.sqrt(before[index]) * betas[index] / (1 - bars[index]) * x
        + np.sqrt(1 - betas[index]) * (1 - before[index]) / (1 - bars[index]) * x_t
        for x in (x0, x0_hat)
    )
    log_model = (v + 1) / 2 * log_large + (1 - v) / 2 * log_small
    if index:
        terms = (-1 + log_model - log_small + np.exp(log_small - log_model)
                 + (mean - mean_hat) ** 2 * np.exp(-log_model)) / 2  # fmt: skip
    else:
        std = np.exp(log_model / 2)
        inside = norm.cdf(x0 + 1 / 255, mean_hat, std) - norm.cdf(x0 - 1 / 255, mean_hat, std)
        terms = -np.log(np.where(x0 < -0.999, norm.cdf(x0 + 1 / 255, mean_hat, std),
                                 np.where(x0 > 0.999, norm.sf(x0 - 1 / 255, mean_hat, std), inside)))  # fmt: skip
    expected = terms.reshape(3, -1).mean(1) / math.log(2)
    t = torch.full((3,), (index + 1) / 1000, dtype=torch.float64)
    found = bound(LINEAR, t, *(torch.from_numpy(a) for a in (x0, x0_hat, v)))
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


def test_the_published_approximation_of_the_distribution_function_is_near():
    """A tanh stands for it there: what the deviation costs in bits, for errors as large as the model says they are."""

    def approximate(x):
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for std in (0.003, 0.01, 0.1):
        upper, lower = (approximate((side / 255 - std * z) / std) for side in (1, -1))
        expected = (upper - lower).clamp(min=1e-12).log().mean().item()
        found = log_likelihood(0 * z, std * z, torch.full_like(z, math.log(std))).mean().item()
        assert (found - expected) / math.log(2) == pytest.approx(0, abs=3e-4)
