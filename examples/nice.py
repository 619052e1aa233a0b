"""NICE, a normalizing flow with an exact likelihood (Dinh et al. 2014, arXiv:1410.8516), on scikit-learn's digits.

The flow f maps an image x to h = f(x), whose entries are independent and logistic (section 3.4), so that (section 2)

    log p(x) = sum_d log p(h_d) + log |det df/dx|,        log p(h_d) = -softplus(h_d) - softplus(-h_d).

f consists of four additive couplings of the even and the odd pixels, (x1, x2) -> (x2, x1 + m(x2)) (section 3.2), and a diagonal
scaling, h = exp(s) x (section 3.3). A coupling's Jacobian has a determinant of 1 or -1, so the log-determinant is the sum of s.
A sample is f's inverse of logistic noise. As in the paper, uniform noise makes integers continuous. The network is smaller than
the paper's, with dropout, and on standardised pixels, because 1,437 digits are few.

    python examples/nice.py --out nice.png    # 34 seconds of one CPU core

It prints bits per dimension of held-out digits (less is better), compared with densities fitted without training, and draws
samples. It beats a Gaussian of all pixels, but not the histogram of each pixel. The histogram relies on integer pixels, many of
which are always 0. A smooth density fits the boxes of the uniform noise badly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

import revflow
from digits import LEVELS, Labeled, digits, draw, options

PIXELS = 64
STREAM = PIXELS // 2


class Scaling(revflow.Bijection):
    """h = exp(s) x: a block of one's own, with what a flow needs of it."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(2, STREAM))

    def forward(self, *streams: Tensor, **context: object) -> tuple[Tensor, ...]:
        return tuple(x * s.exp() for x, s in zip(streams, self.s, strict=True))

    def inverse(self, *streams: Tensor, **context: object) -> tuple[Tensor, ...]:
        return tuple(h * (-s).exp() for h, s in zip(streams, self.s, strict=True))

    def log_det(self, *streams: Tensor, **context: object) -> Tensor:
        return self.s.sum().expand(len(streams[0]))


class Nice(nn.Module):
    """A density of images with values in [0, 1], (N, 64), whose means and standard deviations are about these, (64,)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, hidden: int = 256) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.flow = revflow.ReversibleSequence(
            [*[revflow.AdditiveCoupling(conditioner(hidden)) for _ in range(4)], Scaling()]
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """The natural logarithm of the density at each image, (N,)."""
        z = (x - self.mean) / self.deviation
        streams, log_det = self.flow.forward_with_log_det((z[:, ::2], z[:, 1::2]))
        h = torch.cat(streams, 1)
        prior = -nn.functional.softplus(h) - nn.functional.softplus(-h)
        return prior.sum(1) + log_det - self.deviation.log().sum()

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """(count, 64): logistic noise, taken back through the flow."""
        even, odd = self.flow.inverse(tuple(torch.rand(2, count, STREAM).logit(eps=1e-6)))
        return self.mean + self.deviation * torch.stack((even, odd), 2).flatten(1)


def conditioner(hidden: int) -> nn.Sequential:
    """m of the couplings: the shift of one half of the pixels, of the other."""
    return nn.Sequential(
        nn.Linear(STREAM, hidden),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(hidden, STREAM),
    )


def dequantized(gray: Labeled) -> Tensor:
    """Images in [0, 1], (N, 64): each whole number v from 0 to 16 anywhere in [v, v + 1) / 17."""
    return (gray.images + torch.rand_like(gray.images)).flatten(1) / LEVELS


def many(gray: Labeled) -> Tensor:
    """Each image with several noises."""
    return torch.cat([dequantized(gray) for _ in range(20)])


def bits_per_dimension(log_prob: Tensor) -> float:
    """The mean of -log2 p a pixel of the whole numbers, which the density of dequantized images bounds from above."""
    return math.log2(LEVELS) - log_prob.mean().item() / math.log(2) / PIXELS


def train(net: Nice, training: Labeled, steps: int, batch: int = 200, learning_rate: float = 2e-3) -> None:
    """By maximum likelihood, with new noise at each step."""
    optimizer = torch.optim.Adam(net.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        loss = -net.log_prob(dequantized(training.batch(batch))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def histogram(training: Labeled, held_out: Labeled) -> float:
    """Bits per dimension of whole numbers, each pixel by its own counts and Laplace's rule."""
    counts = nn.functional.one_hot(training.images.flatten(1).long(), LEVELS).sum(0) + 1.0
    chances = (counts / counts.sum(1, keepdim=True)).gather(1, held_out.images.flatten(1).long().T)
    return -chances.log2().mean().item()


def baselines(training: Labeled, held_out: Labeled) -> dict[str, float]:
    """Bits per dimension of what is fitted without training."""
    x, y = many(training).double(), dequantized(held_out).double()
    return {
        "a uniform density": math.log2(LEVELS),
        "a Gaussian of each pixel": bits_per_dimension(Normal(x.mean(0), x.std(0)).log_prob(y).sum(1)),
        "a Gaussian of all pixels": bits_per_dimension(MultivariateNormal(x.mean(0), x.T.cov()).log_prob(y)),
        "a histogram of each pixel": histogram(training, held_out),
    }


def main() -> None:
    a = options(__doc__, steps=1500)
    training, held_out = digits()
    x = many(training)
    net = Nice(x.mean(0), x.std(0))
    train(net, training, a.steps)
    net.eval()
    with torch.no_grad():
        reached = bits_per_dimension(net.log_prob(dequantized(held_out)))
    print(f"bits per dimension of {len(held_out.labels)} held-out digits, after {a.steps} steps")
    for name, bits in {**baselines(training, held_out), "NICE": reached}.items():
        print(f"  {name:26s} {bits:.2f}")
    if a.out:
        draw({"digits": held_out.images[:16] / LEVELS, "samples": net.sample(16).view(16, 8, 8)}, a.out)


if __name__ == "__main__":
    main()
