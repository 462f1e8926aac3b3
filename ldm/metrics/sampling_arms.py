"""Ways of sampling one trained model, side by side: what a sampler or a scale is worth takes no training."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from ldm.utils.errors import ConfigError


class SamplingArms:
    """Metrics of every arm, as "arm/metric". In a config an arm is a list of settings as sample.py takes them.

    arms: name -> how to sample, for `draw(prompts, seeds, sampling=how)`.
    """

    def __init__(self, arms: Mapping[str, dict], metrics: Mapping[str, Callable]):
        if not arms:
            raise ConfigError("""sampling_arms has no arms; give some: '+metrics.sampling_arms.arms.few=["steps=5"]'""")
        self.arms, self.metrics = arms, metrics

    def __call__(self, draw: Callable, data, objective: nn.Module) -> dict[str, float]:
        table = {}
        for arm, sampling in self.arms.items():
            for metric in self.metrics.values():
                numbers = metric(partial(draw, sampling=sampling), data, objective)
                table |= {f"{arm}/{name}": value for name, value in numbers.items()}
        return table
