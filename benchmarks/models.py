"""The models of the paper's experiments, and smaller ones for quick comparisons.

The paper states a size S per model (method page, section 8). With 4 bytes a parameter:

    model         parameters   10^6 bytes    MiB     S of the paper
    Conv2          6,603,710        26.41   25.19    25.98   neither; with 10 outputs 25.99 x 10^6 bytes
    VGG11          9,750,922        39.00   37.20    37.20   MiB
    ResNet18      11,227,812        44.91   42.83    43.10   neither (0.6 % above MiB)
    Transformer    2,153,680         8.61    8.22    17.26   neither (2.004 times 10^6 bytes)

Sizes of the virtual network are therefore taken from `PAPER_MEGABYTES`, not measured, where the paper's times
are to be matched.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.errors import ConfigError

#: S in the paper's MB, by model name.
PAPER_MEGABYTES = {"conv2": 25.98, "vgg11": 37.20, "resnet18": 43.10, "transformer": 17.26}


def conv2(classes: int = 62) -> nn.Sequential:
    """Two 5x5 convolutions and two linear layers, for 28 x 28 grey images: 6.6 million parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 2048),
        nn.ReLU(),
        nn.Linear(2048, classes),
    )


def vgg11(classes: int = 10) -> nn.Sequential:
    """VGG11 without batch normalisation for 32 x 32 colour images, linear layers 512-512-512-C.

    Without normalisation torch's default initialisation shrinks the signal layer by layer, so weights start
    from He's normal distribution and biases from 0.
    """
    layers: list[nn.Module] = []
    channels = 3
    for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    layers += [nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    layers.append(nn.Linear(512, classes))
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


def resnet18(classes: int = 100, *, statistics: bool = True) -> nn.Module:
    """torchvision's ResNet18, untrained; it has widths without `statistics` (HeteroFL's static norm)."""
    from fedgmr_plugin.runtimes.host import define_torchvision_schemas, torchvision_usable

    if not torchvision_usable():
        define_torchvision_schemas()
    from torchvision.models import resnet18 as build

    norm = partial(nn.BatchNorm2d, track_running_stats=statistics)
    model: nn.Module = build(num_classes=classes, norm_layer=norm)
    return model


class Transformer(nn.Module):
    """Next-word prediction: embedding, sinusoidal positions, post-LN encoder layers under a causal mask.

    Takes token numbers [b, length]; gives scores [b, vocabulary, length], as cross-entropy wants them.
    """

    def __init__(
        self,
        vocabulary: int = 10_000,
        width: int = 96,
        feed_forward: int = 384,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, feed_forward, dropout, batch_first=True, norm_first=False
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = nn.Linear(width, vocabulary)
        self._scale = math.sqrt(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores [b, vocabulary, length]; position i sees tokens 0..i only."""
        length = tokens.shape[1]
        x = self.embedding(tokens) * self._scale
        x = x + sinusoids(length, x.shape[-1]).to(x)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores: Tensor = self.output(self.encoder(x, mask=causal))
        return scores.movedim(-1, 1)


def sinusoids(length: int, width: int) -> Tensor:
    """Position codes [length, width]: sine and cosine at wavelengths from 2 pi to 20,000 pi."""
    rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angle = torch.arange(length)[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def small_cnn(classes: int = 10) -> nn.Sequential:
    """112,554 parameters (10 classes) for 28 x 28 grey images: 3x3 convolutions 1-16-64, linear 1600-64-C."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 5 * 5, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def tiny_cnn(classes: int = 10) -> nn.Sequential:
    """18,378 parameters (10 classes) for 28 x 28 grey images: 5x5 convolutions 1-16-32, linear 512-C.

    416 + 12,832 + 5,130. Small enough for exact gradients over whole data sets.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, classes),
    )


def strided_cnn(classes: int = 10) -> nn.Sequential:
    """19,562 parameters (10 classes) for 28 x 28 grey images: 5x5 convolutions of stride 2, linear 784-16-C.

    416 + 6,416 + 12,560 + 170. Cheap on a CPU (no pooling), and small enough that a sub-model of density
    0.05 has too little capacity for Fashion-MNIST.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 16),
        nn.ReLU(),
        nn.Linear(16, classes),
    )


def small_cnn32(classes: int = 10) -> nn.Sequential:
    """89,834 parameters (10 classes) for 32 x 32 colour images: three 3x3 convolutions, linear 1024-64-C.

    448 + 4,640 + 18,496 + 65,600 + 650.
    """
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def strided_cnn32(classes: int = 10) -> nn.Sequential:
    """24,202 parameters (10 classes) for 32 x 32 colour images: 5x5 strided convolutions, linear 1024-16-C.

    1,216 + 6,416 + 16,400 + 170; the colour sister of `strided_cnn`.
    """
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 8, 16),
        nn.ReLU(),
        nn.Linear(16, classes),
    )


def char_transformer(classes: int = 80) -> Transformer:
    """110,288 parameters (80 symbols), for next-character prediction: `Transformer` 64 wide, ffn 256."""
    return Transformer(classes, width=64, feed_forward=256)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "conv2": conv2,
    "vgg11": vgg11,
    "resnet18": resnet18,
    "resnet18_static": partial(resnet18, statistics=False),
    "transformer": Transformer,
    "small_cnn": small_cnn,
    "tiny_cnn": tiny_cnn,
    "strided_cnn": strided_cnn,
    "small_cnn32": small_cnn32,
    "strided_cnn32": strided_cnn32,
    "char_transformer": char_transformer,
}


def build(name: str, classes: int, seed: int) -> nn.Module:
    """A model by name, its weights drawn from `seed` alone.

    Args:
        classes: width of the output; for the transformers also the number of tokens.

    Raises:
        ConfigError: GMR-103 for an unknown name.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.6)
        hint = f"Did you mean `{near[0]}`?" if near else f"One of {', '.join(MODELS)}."
        raise ConfigError("GMR-103", f"model={name!r} is not known", where="model", hint=hint)
    with isolated_rng(seed):
        return MODELS[name](classes)


def parameters(model: nn.Module) -> int:
    """Number of parameters (no buffers)."""
    return sum(p.numel() for p in model.parameters())


def megabytes(model: nn.Module) -> float:
    """Size of the parameters in MB (10^6 bytes)."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6


def mebibytes(model: nn.Module) -> float:
    """Size of the parameters in MiB (2^20 bytes)."""
    return megabytes(model) * 1e6 / 2**20
