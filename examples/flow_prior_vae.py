"""A variational autoencoder whose prior is a flow: Pyro's own SVI, with and without, on handwritten digits.

    python examples/flow_prior_vae.py            about two minutes on two cores
    python examples/flow_prior_vae.py --smoke    seconds, to see that it runs

With the prior N(0, I) the encoder must fit the codes of ten kinds of digits into one round cloud. A flow trained with
the rest can adapt to the shape of the codes, and a prior that fits costs less in the ELBO.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from sklearn.datasets import load_digits
from torch import Tensor, nn

from pyro_affine import NormalizingFlow, real_nvp

NUM_PIXELS, NUM_LATENTS, NUM_HIDDEN = 64, 8, 128


def digits() -> tuple[Tensor, Tensor]:
    """Black and white images, 0 or 1, in rows of 64: 1400 for training and 397 for the test."""
    pixels = torch.tensor(load_digits().data > 7.5).float()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[:1400]], pixels[order[1400:]]


def network(num_inputs: int, num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(num_inputs, NUM_HIDDEN), nn.SiLU(), nn.Dropout(0.1), nn.Linear(NUM_HIDDEN, num_outputs)
    )


class VAE(nn.Module):
    """Decoder p(image | z), encoder q(z | image), and a prior p(z): a flow, or N(0, I) where that is None."""

    def __init__(self, prior: NormalizingFlow | None) -> None:
        super().__init__()
        self.prior = prior
        self.decoder = network(NUM_LATENTS, NUM_PIXELS)
        self.encoder = network(NUM_PIXELS, 2 * NUM_LATENTS)

    def latent(self) -> dist.TorchDistribution:
        # Calling the flow gives a Pyro distribution, usable wherever a Normal is.
        return dist.Normal(torch.zeros(NUM_LATENTS), 1.0).to_event(1) if self.prior is None else self.prior()

    def model(self, images: Tensor) -> None:
        pyro.module("vae", self)  # registers all weights with SVI, those of the prior too
        with pyro.plate("image", len(images)):
            z = pyro.sample("z", self.latent())
            pyro.sample("pixels", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=images)

    def guide(self, images: Tensor) -> None:
        with pyro.plate("image", len(images)):
            loc, raw = self.encoder(images).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw) + 1e-3).to_event(1))


def train(vae: VAE, images: Tensor, num_steps: int) -> None:
    """Plain SVI, as for any model; the learning rate falls to a tenth."""
    pyro.clear_param_store()
    optimizer = ClippedAdam({"lr": 3e-3, "lrd": 0.1 ** (1 / num_steps)})
    svi = SVI(vae.model, vae.guide, optimizer, Trace_ELBO())
    vae.train()
    for _ in range(num_steps):
        svi.step(images[torch.randint(len(images), (128,))])
    vae.eval()


@torch.no_grad()
def elbo(vae: VAE, images: Tensor, num_draws: int = 50) -> tuple[float, float]:
    """ELBO of an image, in nats, and the part of it that the prior sets, KL(q(z | image) | p(z))."""
    bounds, kls = [], []
    for _ in range(num_draws):
        posterior = pyro.poutine.trace(vae.guide).get_trace(images)
        joint = pyro.poutine.trace(pyro.poutine.replay(vae.model, posterior)).get_trace(images)
        bounds.append(joint.log_prob_sum() - posterior.log_prob_sum())
        kls.append(posterior.log_prob_sum() - joint.log_prob_sum(lambda name, site: name == "z"))
    return float(torch.stack(bounds).mean()) / len(images), float(torch.stack(kls).mean()) / len(images)


@torch.no_grad()
def picture(vaes: dict[str, VAE], path: Path) -> None:
    """Samples of each model: draws of its prior, decoded."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(vaes), figsize=(4.4 * len(vaes), 4.7), layout="constrained")
    for ax, (name, vae) in zip(axes, vaes.items(), strict=True):
        images = vae.decoder(vae.latent().sample((100,))).sigmoid().reshape(10, 10, 8, 8)
        padded = nn.functional.pad(images, (1, 1, 1, 1), value=0.5)
        ax.imshow(padded.permute(0, 2, 1, 3).reshape(100, 100), cmap="gray", vmin=0, vmax=1)
        ax.set_title(name)
        ax.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--output", type=Path, default=Path("output/flow_prior_vae"), help="folder for the files")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    train_images, test_images = digits()

    vaes = {}
    for name in ("prior N(0, I)", "flow prior"):
        for seed in range(1 if options.smoke else 2):  # two seeds, to see how much is chance
            pyro.set_rng_seed(seed)
            # The codes have no units to fit to data beforehand, so the flow has none.
            flow = NormalizingFlow(real_nvp(NUM_LATENTS, num_layers=6), NUM_LATENTS, curves=0, whiten=False)
            vaes[name] = VAE(flow if name == "flow prior" else None)
            train(vaes[name], train_images, num_steps=20 if options.smoke else 2500)
            (bound, kl), (seen, _) = elbo(vaes[name], test_images), elbo(vaes[name], train_images)
            print(f"{name:13s}, seed {seed}: ELBO in nats: test {bound:.2f} (KL {kl:.2f}), training {seen:.2f}")
    picture(vaes, options.output / "samples.png")
    print(f"written: {(options.output / 'samples.png').resolve()}")


if __name__ == "__main__":
    main()
