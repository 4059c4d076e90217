"""Our families from scratch against reference implementations: steps and images per second, as ratios.

    python benchmarks/bench_scratch.py [--rounds 3] [--only vae glow ddpm imagegpt pixelcnn++]

Above 1, ours is faster. References: pythae's VAE (model and loss only, with the same encoder and decoder; skipped if
`pythae` is not installed), normflows' Glow of the same widths, diffusers' unconditional training and DDIM with the
same UNet, transformers' `generate` with the same ImageGPT, and PixelCNN++ and ImageGPT sampled with a full pass per
pixel. A step is loss, gradients and AdamW on the same 32×32 images in a plain loop on both sides. A full pass per
pixel costs the same for every pixel, so a few are timed and multiplied.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune.models.base import SampleRequest
from finetune.models.scratch.base import PixelModel, Space, model_from_config
from finetune.models.scratch.flows.bijections import Chain
from finetune.rng import Draw

SPACE = Space(3, 32, 32, 256)
REQUEST = SampleRequest((), (), 1, 1.0)
NAIVE_PASSES = 8  # timed of those that an image takes
Contender = Callable[[], float]  # → seconds


def model_of(family: str, **keys: Any) -> Any:
    torch.manual_seed(0)
    return model_from_config({"family": family, "space": dataclasses.asdict(SPACE), "net": keys})


def seconds(work: Callable[[], Any]) -> float:
    """Of this process's one thread on the CPU: what else the machine does hardly counts."""
    start = time.process_time()
    work()
    return time.process_time() - start


def stepper(net: nn.Module, loss: Callable[[], Tensor]) -> Contender:
    """Seconds of a step of a plain loop."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda: seconds(step)


def images(count: int) -> Tensor:
    return torch.randint(
        SPACE.levels, (count, *SPACE.shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def ours(model: PixelModel, count: int) -> Contender:
    (train_step,) = model.train_steps()
    batch = {"pixels": images(count)}
    return stepper(train_step.net, lambda: train_step.loss(batch, Draw(0, 0, range(count))).mean())


def drawing(model: PixelModel, count: int) -> Contender:
    model.net.eval()

    @torch.no_grad()
    def draw() -> float:
        return seconds(lambda: model.generate(None, Draw(0, "sample", range(count)), REQUEST))

    return draw


def vae(count: int = 16) -> dict[str, tuple[Contender, Contender]]:
    try:
        from pythae.models import VAE, VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
    except ImportError:
        print("pythae is not installed: the VAE is left out")
        return {}
    model = model_of("beta-vae", latent=64, width=32, halvings=3, mixtures=1)
    net = copy.deepcopy(model.net).to(
        memory_format=torch.contiguous_format
    )  # as torch lays weights out, and pythae leaves them

    class Encoder(BaseEncoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.read = net.encoder, net.read

        def forward(self, scaled: Tensor) -> Any:
            mean, logvar = self.read(self.encoder(scaled)).chunk(2, 1)
            return ModelOutput(embedding=mean, log_covariance=logvar)

    class Decoder(BaseDecoder):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.write, self.decoder = net.write, net.decoder

        def forward(self, latent: Tensor) -> Any:
            return ModelOutput(reconstruction=self.decoder(self.write(latent).unflatten(1, (-1, 4, 4)))[:, :3])

    theirs = VAE(VAEConfig(input_dim=SPACE.shape, latent_dim=64), encoder=Encoder(), decoder=Decoder())
    scaled = SPACE.scaled(images(count))
    reference = stepper(theirs, lambda: theirs({"data": scaled}).loss)
    return {
        "VAE, steps, against pythae's model (which scores pixels by squared error)": (ours(model, count), reference)
    }


def glow(count: int = 8) -> dict[str, tuple[Contender, Contender]]:
    import normflows

    scales, steps, width = 3, 4, 64
    model = model_of("glow", scales=scales, steps=steps, width=width, blocks=0)
    model.net.flow.rests = nn.ModuleList(
        Chain([]) for _ in range(scales - 1)
    )  # normflows has no learned prior of what is let go
    flows, merges, priors = [], [], []
    for scale in range(scales):  # normflows counts from the last scale
        channels = 12 * 2 ** (scales - 1 - scale)
        flows.append(
            [normflows.flows.GlowBlock(channels, width, scale_map="exp") for _ in range(steps)]
            + [normflows.flows.Squeeze()]
        )
        shape = (channels if scale == 0 else channels // 2, 32 >> (scales - scale), 32 >> (scales - scale))
        priors.append(normflows.distributions.DiagGaussian(shape, trainable=False))
        if scale:
            merges.append(normflows.flows.Merge())
    theirs = normflows.MultiscaleFlow(priors, flows, merges, class_cond=False)
    values = (images(count).float() + torch.rand(count, *SPACE.shape)) / SPACE.levels - 0.5
    with torch.no_grad():
        theirs.log_prob(values, None)  # its ActNorm starts
    reference = stepper(theirs, lambda: -theirs.log_prob(values, None).mean())

    def sampled() -> float:
        with torch.no_grad():
            return seconds(lambda: theirs.sample(count))

    return {
        "Glow, steps, against normflows": (ours(model, count), reference),
        "Glow, images, against normflows": (drawing(model, count), sampled),
    }


def ddpm(count: int = 8) -> dict[str, tuple[Contender, Contender]]:
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

    steps = 5  # of an image: each costs the same
    model = model_of("ddpm", width=48)
    unet = UNet2DModel(**{key: value for key, value in model.net.unet.config.items() if not key.startswith("_")})
    noising, drawing_ = DDPMScheduler(), DDIMScheduler(timestep_spacing="trailing")
    drawing_.set_timesteps(steps)
    scaled = SPACE.scaled(images(count))

    def loss() -> Tensor:
        """As examples/unconditional_image_generation of diffusers takes a step."""
        noise, timesteps = torch.randn(scaled.shape), torch.randint(0, 1000, (count,)).long()
        found: Tensor = nn.functional.mse_loss(
            unet(noising.add_noise(scaled, noise, timesteps), timesteps).sample.float(), noise.float()
        )
        return found

    def drawn() -> None:
        values = torch.randn(scaled.shape)
        for timestep in drawing_.timesteps:
            values = drawing_.step(unet(values, timestep).sample, timestep, values).prev_sample
        SPACE.images(SPACE.quantized(values.clamp(-1, 1)))

    def reference() -> float:
        unet.eval()
        with torch.no_grad():
            return seconds(drawn)

    model.net.eval()
    request = SampleRequest((), tuple(range(count)), steps, 1.0)
    return {
        "DDPM, steps, against diffusers' training": (ours(model, count), stepper(unet, loss)),
        "DDPM, images, against diffusers' DDIM": (lambda: seconds(lambda: model.sample(request)), reference),
    }


def imagegpt(count: int = 4) -> dict[str, tuple[Contender, Contender]]:
    model = model_of("imagegpt", width=64, layers=4, heads=4, palette=64)
    transformer = model.net.transformer
    gpt: Any = transformer.gpt
    length: int = transformer.length
    gpt.generation_config.pad_token_id = transformer.vocabulary

    def generated() -> float:
        start = torch.full((count, 1), transformer.vocabulary)
        with torch.no_grad():
            wanted = {"do_sample": True, "top_k": 0, "max_new_tokens": length - 1, "min_new_tokens": length - 1}
            return seconds(lambda: gpt.generate(start, **wanted))

    def naive() -> float:
        """A whole pass of every length takes as one of the mean length, as far as attention's share is small."""
        before = torch.zeros(count, length // 2, dtype=torch.long)
        with torch.no_grad():
            return seconds(lambda: [gpt(before, use_cache=False) for _ in range(NAIVE_PASSES)]) * length / NAIVE_PASSES

    return {
        "ImageGPT, images, against transformers' generate": (drawing(model, count), generated),
        "ImageGPT, images, against a whole pass a token": (drawing(model, count), naive),
    }


def pixelcnnpp(count: int = 4) -> dict[str, tuple[Contender, Contender]]:
    model = model_of("pixelcnn++", width=32, blocks=4, dilation=4, mixtures=5)
    model.net.eval()

    def naive() -> float:
        levels, passes = images(count), SPACE.height * SPACE.width
        with torch.no_grad():
            return seconds(lambda: [model.net(levels, None) for _ in range(NAIVE_PASSES)]) * passes / NAIVE_PASSES

    return {"PixelCNN++, images, against a whole pass a pixel": (drawing(model, count), naive)}


PARTS = {"vae": vae, "glow": glow, "ddpm": ddpm, "imagegpt": imagegpt, "pixelcnn++": pixelcnnpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    for part in given.only:
        for what, (mine, theirs) in PARTS[part]().items():
            mine(), theirs()  # warm
            times = [(mine(), theirs()) for _ in range(given.rounds)]
            ratio = statistics.median(other / own for own, other in times)
            own = math.exp(statistics.mean(math.log(own) for own, _ in times))
            print(f"{what:75} {ratio:7.2f} ×   ({own:.3g} s ours)", flush=True)


if __name__ == "__main__":
    main()
