"""The training objective of every diffusion model here: a weighted squared error of what the network predicts."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ldm.diffusion.denoiser import Denoiser
from ldm.utils.seeding import BatchNoise, Noise, keys, normal, uniform
from ldm.utils.tensors import pad_dims

GOLDEN = (math.sqrt(5) - 1) / 2


class DiffusionObjective(nn.Module):
    """objective(batch) -> (loss, logs): Algorithm 1 of arXiv:2006.11239 for any process, prediction and weight.

    batch: "image" (B 3 H W uint8) for the codec, or "moments" (B 2C H W) that it made of one; "position" (B,) int64,
    the key of every draw; perhaps "weight" (B,), of the images; and what the conditioner's encoders read. logs are
    detached scalars.
    offset_noise adds one more normal number per image and channel to eps (0.05 in arXiv:2307.01952).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        codec: nn.Module,
        conditioner: nn.Module,
        density: Callable[..., Tensor],
        weighting: Callable[..., Tensor],
        *,
        seed: int = 0,
        stratified: bool = True,
        offset_noise: float = 0.0,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.codec = codec
        self.conditioner = conditioner
        self.density = density
        self.weighting = weighting
        self.seed = seed
        self.stratified = stratified
        self.offset_noise = offset_noise

    def forward(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = self.latents(batch)  # B C H W
        position = batch["position"].to(x0.device)
        process, prediction = self.denoiser.process, self.denoiser.prediction
        t = self.density(self.draws(position), process)  # B
        alpha, sigma = (a.to(x0.dtype) for a in process(t))
        snr, gain = (alpha / sigma) ** 2, prediction.gain(alpha, sigma)
        alpha, sigma = pad_dims(alpha, x0), pad_dims(sigma, x0)

        eps = self.noise(x0, position)
        x_t = alpha * x0 + sigma * eps  # Eq. (4), arXiv:2006.11239
        cond = self.conditioner(batch, key=self.seed)
        cond |= self.image_conditions(batch, x0.shape, BatchNoise(self.seed, "condition", position))
        F, v = self.denoiser.predict(x_t, process.net_time(t).float(), alpha, sigma, cond)
        error = (F.float() - prediction.target(x0, eps, alpha, sigma)).square().flatten(1).mean(1)  # B
        others = self.other_losses(x0, x_t, t, F, v)
        weight = self.weighting(snr, gain)
        if "weight" in batch:
            weight = weight * batch["weight"].to(weight)
        loss = (weight * error).mean() + sum(others.values())
        logs = {"loss": loss, "mse": error.mean(), **others}
        return loss, {name: value.detach() for name, value in logs.items()}

    def other_losses(self, x0: Tensor, x_t: Tensor, t: Tensor, F: Tensor, v: Tensor | None) -> dict[str, Tensor]:
        """Scalars by name that a subclass adds to the loss, of the two halves F and v of the network's output."""
        return {}

    def latents(self, batch: dict) -> Tensor:
        noise = BatchNoise(self.seed, "posterior", batch["position"])
        if "moments" in batch:
            return self.codec.draw(batch["moments"], noise)
        return self.codec.encode(batch["image"], noise)

    def image_conditions(self, batch: dict, shape: Sequence[int], generator: Noise) -> dict[str, Tensor]:
        """Conditions made of pictures, for x of this shape (B C H W); guidance never takes them away."""
        return {}

    @staticmethod
    def image_channels(codec: nn.Module) -> int:
        """Channels of the condition `image`, which the network gets concatenated to x."""
        return 0

    def draws(self, position: Tensor) -> Tensor:
        """u in [0, 1) per image: independent, or stratified: any images in a row spread evenly over [0, 1).

        Less variance of a batch's loss, as the equal spacing of §I.1, arXiv:2107.00630. Deviation: the spacing is the
        golden ratio's, by position, so however the batches are split every part of them is spread evenly too.
        """
        if not self.stratified:
            return uniform(keys(self.seed, "t", position))
        start = uniform(keys(self.seed, "t", position.new_zeros(1)))
        return (start + position.double() * GOLDEN) % 1

    def noise(self, x0: Tensor, position: Tensor) -> Tensor:
        eps = normal(keys(self.seed, "eps", position), x0.shape[1:], x0.dtype)
        if self.offset_noise > 0:
            per_channel = normal(keys(self.seed, "offset", position), (x0.shape[1],), x0.dtype)
            eps = eps + self.offset_noise * pad_dims(per_channel, x0)
        return eps

