"""The paper's models: architectures, sizes, prunable shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.models import (
    MODELS,
    PAPER_MEGABYTES,
    Transformer,
    build,
    char_transformer,
    conv2,
    mebibytes,
    megabytes,
    parameters,
    resnet18,
    sinusoids,
    small_cnn,
    small_cnn32,
    strided_cnn,
    strided_cnn32,
    tiny_cnn,
    vgg11,
)
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.kernels.layout import build_layout

GREY, COLOUR = (2, 1, 28, 28), (2, 3, 32, 32)

#: model, input shape, output shape, parameters, and prunable weights counted by hand.
SHAPES: list[tuple[Any, Any, Any, int, int]] = [
    (lambda: conv2(), GREY, (2, 62), 6_603_710, 25 * 32 + 25 * 32 * 64 + 3136 * 2048),
    (
        lambda: vgg11(),
        COLOUR,
        (2, 10),
        9_750_922,
        9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512) + 2 * 512 * 512,
    ),
    (lambda: resnet18(), (2, 3, 64, 64), (2, 100), 11_227_812, 11_166_912 - 172_032),
    (lambda: resnet18(statistics=False), (2, 3, 64, 64), (2, 100), 11_227_812, 11_166_912 - 172_032),
    (lambda: small_cnn(), GREY, (2, 10), 112_554, 9 * 16 + 9 * 16 * 64 + 1600 * 64),
    (lambda: tiny_cnn(), GREY, (2, 10), 18_378, 25 * 16 + 25 * 16 * 32),
    (lambda: strided_cnn(), GREY, (2, 10), 19_562, 25 * 16 + 25 * 16 * 16 + 784 * 16),
    (lambda: small_cnn32(), COLOUR, (2, 10), 89_834, 9 * (3 * 16 + 16 * 32 + 32 * 64) + 1024 * 64),
    (lambda: strided_cnn32(), COLOUR, (2, 10), 24_202, 25 * 3 * 16 + 25 * 16 * 16 + 1024 * 16),
]


@pytest.mark.parametrize(("make", "x", "y", "count", "prunable"), SHAPES)
def test_shapes_sizes_and_prunable_weights(make: Any, x: Any, y: Any, count: int, prunable: int) -> None:
    model: nn.Module = make().eval()
    with torch.no_grad():
        assert model(torch.zeros(x)).shape == y
    assert parameters(model) == count
    assert build_layout(model).prunable == prunable


def test_the_transformer() -> None:
    model = Transformer().eval()
    assert parameters(model) == 2_153_680
    layout = build_layout(model)
    assert layout.prunable == 960_000 + 2 * (4 * 96 * 96 + 2 * 96 * 384)
    tokens = torch.arange(2 * 12).view(2, 12)
    with torch.no_grad():
        scores = model(tokens)
        assert scores.shape == (2, 10_000, 12)
        changed = tokens.clone()
        changed[:, 7] = 9_999
        difference = (model(changed) - scores).abs().amax(dim=(0, 1))
    assert bool((difference[:7] < 1e-5).all()) and bool((difference[7:] > 1e-4).all())  # causal


def test_the_transformer_normalises_after_each_block() -> None:
    layer = Transformer(vocabulary=20).encoder.layers[0]
    assert not layer.norm_first and layer.self_attn.num_heads == 4
    with torch.no_grad():
        out = layer.eval()(torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(out.mean(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)


def test_sinusoids() -> None:
    code = sinusoids(50, 8)
    assert code.shape == (50, 8) and code[0].tolist() == [0, 1] * 4
    torch.testing.assert_close(code[:, 0], torch.arange(50.0).sin())
    torch.testing.assert_close((code[:, ::2] ** 2 + code[:, 1::2] ** 2), torch.ones(50, 4))


def test_the_papers_sizes_where_they_can_be_met() -> None:
    """VGG11's S is MiB; Conv2's is 10^6 bytes with 10 outputs; the other two are neither unit."""
    assert round(mebibytes(vgg11()), 2) == PAPER_MEGABYTES["vgg11"]
    assert megabytes(conv2(10)) == pytest.approx(PAPER_MEGABYTES["conv2"], abs=0.01)
    assert (round(megabytes(conv2()), 2), round(mebibytes(conv2()), 2)) == (26.41, 25.19)
    assert (round(megabytes(resnet18()), 2), round(mebibytes(resnet18()), 2)) == (44.91, 42.83)
    assert mebibytes(resnet18()) == pytest.approx(PAPER_MEGABYTES["resnet18"], rel=0.007)
    assert (round(megabytes(Transformer()), 2), round(mebibytes(Transformer()), 2)) == (8.61, 8.22)
    assert 2 * megabytes(Transformer()) == pytest.approx(PAPER_MEGABYTES["transformer"], rel=0.003)


def test_vgg11_passes_the_signal_through_at_its_start() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        out = vgg11()(torch.randn(64, 3, 32, 32))
    assert 0.05 < float(out.std(0).mean()) < 20


def test_the_character_transformer() -> None:
    model = char_transformer().eval()
    assert parameters(model) == 110_288
    assert build_layout(model).prunable == 80 * 64 + 2 * (4 * 64 * 64 + 2 * 64 * 256)
    with torch.no_grad():
        assert model(torch.zeros(3, 40, dtype=torch.int64)).shape == (3, 80, 40)


def test_built_models_follow_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        return nn.utils.parameters_to_vector(build("tiny_cnn", 10, seed).parameters())

    state = torch.get_rng_state()
    first = weights(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(weights(1), first) and not torch.equal(weights(2), first)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="GMR-103 model='VGG11'.*\n.*\n.*Did you mean `vgg11`"):
        build("VGG11", 10, 0)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_built_by_name(name: str) -> None:
    model = MODELS[name](17)
    assert 17 in {len(p) for p in model.parameters()}
    assert build_layout(model).prunable > 0.5 * parameters(model) or name in ("transformer",)
