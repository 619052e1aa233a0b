"""i-RevNet: a classifier that loses no information until its last pooling (Jacobsen et al. 2018, arXiv:1802.07088).

Its blocks are (x1, x2) -> (x2, x1 + F(x2)). Instead of pooling, an invertible downsampling moves pixels into channels (section
3.1). From the image to its last layer the network is a bijection, here of 3 x 32 x 32 values to two streams of 96 x 4 x 4. The
classes depend on the last layer's mean over positions, the only step that loses information. The image can therefore be
recovered from the last layer of the trained classifier.

The images are scikit-learn's digits, enlarged, each in a random bright color on a random dark background, with noise. Colors
and noise do not affect the class, but are recovered too. Of the paper's two networks this is the one without padding, smaller.

    python examples/irevnet.py --out irevnet.png    # 28 seconds of one CPU core

It prints the accuracy on held-out digits and the largest error of the recovered images. It draws the images, the recovered
images and their difference.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

import revflow
from digits import CLASSES, accuracy, colored, digits, draw, options, train


class Split(revflow.Bijection):
    """One stream -> two, the halves of its channels: a block of one's own."""

    def forward(self, *streams: Tensor, **context: object) -> tuple[Tensor, ...]:
        (x,) = streams
        return x.chunk(2, 1)

    def inverse(self, *streams: Tensor, **context: object) -> tuple[Tensor, ...]:
        return (torch.cat(streams, 1),)


class IRevNet(nn.Module):
    """Images (N, channels, H, W) -> logits (N, classes); H and W are multiples of 2^stages.

    Args:
        blocks: of each stage.
        stages: each begins by halving H and W.
        hidden: channels within a block of the first stage; each further stage has twice as many.
    """

    def __init__(
        self, blocks: int = 4, stages: int = 3, hidden: int = 16, channels: int = 3, classes: int = CLASSES
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in range(stages):
            layers.append(revflow.PixelUnshuffle(2))
            if stage == 0:
                layers.append(Split())
            stream = channels * 4 ** (stage + 1) // 2
            layers += [revflow.AdditiveCoupling(conditioner(stream, hidden * 2**stage)) for _ in range(blocks)]
        self.bijection = revflow.ReversibleSequence(layers)
        self.classifier = nn.Sequential(
            nn.BatchNorm2d(2 * stream), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * stream, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.cat(self.last_layer(x), 1))

    def last_layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two streams before the pooling."""
        return self.bijection((x,))

    def rebuild(self, streams: tuple[Tensor, Tensor]) -> Tensor:
        """The image of which `last_layer`, in eval mode, has made these."""
        return self.bijection.inverse(streams)[0]


def conditioner(channels: int, hidden: int) -> nn.Sequential:
    """Three pre-activated convolutions, as in the paper."""
    widths = (channels, hidden, hidden, channels)
    return nn.Sequential(
        *[
            layer
            for before, after in pairwise(widths)
            for layer in (nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, after, 3, padding=1, bias=False))
        ]
    )


def main() -> None:
    a = options(__doc__, steps=200)
    training, held_out = digits()
    held_out = colored(held_out)
    net = IRevNet()
    train(net, training, a.steps)
    reached = accuracy(net, held_out)
    with torch.no_grad():
        recovered = net.rebuild(net.last_layer(held_out.images))
    error = (recovered - held_out.images).abs()
    print(f"{reached:.1%} of {len(held_out.labels)} held-out digits correct after {a.steps} steps")
    print(f"recovered from the last layer: largest error {error.max():.1e}, of values from 0 to 1 and noise")
    if a.out:
        rows = {"image": held_out.images, "recovered": recovered, "difference\nx 100,000": 1e5 * error.amax(1)}
        draw({name: images[:5] for name, images in rows.items()}, a.out)


if __name__ == "__main__":
    main()
