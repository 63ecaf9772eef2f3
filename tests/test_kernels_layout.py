"""The flat vector's map: what is prunable, the round trips, and the findings about a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgmr_plugin.errors import ModelError
from fedgmr_plugin.kernels import ModelLayout, build_layout, validate
from fedgmr_plugin.runtimes import host


@pytest.fixture(scope="module")
def torchvision_models() -> Any:
    """torchvision's classification models, also where its compiled operators cannot load."""
    if not host.torchvision_usable():
        host.define_torchvision_schemas()
    return pytest.importorskip("torchvision.models")


def kinds(model: nn.Module, dense_layers: tuple[str, ...] = ()) -> dict[str, str]:
    return {e.name: e.kind for e in build_layout(model, dense_layers).entries}


def prunable(model: nn.Module, dense_layers: tuple[str, ...] = ()) -> set[str]:
    return {name for name, kind in kinds(model, dense_layers).items() if kind == "prunable"}


class Block(nn.Module):
    """A residual block whose shortcut is a 1x1 convolution of the given attribute name."""

    def __init__(self, shortcut: str = "downsample", kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.pointwise = nn.Conv2d(4, 4, 1)
        setattr(self, shortcut, nn.Sequential(nn.Conv2d(3, 4, kernel, bias=False), nn.BatchNorm2d(4)))
        self.fc = nn.Linear(4, 2)


class TiedLanguageModel(nn.Module):
    """An embedding tied to the last linear layer, the usual output of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = self.embedding.weight


class Transformer(nn.Module):
    def __init__(self, **attention: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.attention = nn.MultiheadAttention(8, 2, **attention)
        self.decoder = nn.Linear(8, 7)


# -- the prunable rule -----------------------------------------------------------------------------


def test_plain_networks_prune_hidden_weights_with_their_biases_and_keep_the_last_linear_layer() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert kinds(model) == {
        "0.weight": "prunable",
        "0.bias": "bias",
        "1.weight": "prunable",
        "1.bias": "bias",
        "2.weight": "dense",
        "2.bias": "dense",
        "3.weight": "dense",
        "3.bias": "dense",
        "2.running_mean": "buffer",
        "2.running_var": "buffer",
    }


def test_the_last_linear_layer_is_dense_even_if_convolutions_follow_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 2, 1))
    assert prunable(model) == {"0.weight", "2.weight"}


def test_a_fully_convolutional_network_has_no_dense_last_layer() -> None:
    assert prunable(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 5, 1))) == {"0.weight", "1.weight"}


@pytest.mark.parametrize(
    "name", ["downsample", "shortcut", "convShortcut", "skip_connection", "residual_conv"]
)
def test_one_by_one_shortcut_convolutions_are_dense_but_other_pointwise_ones_are_prunable(name: str) -> None:
    assert prunable(Block(name)) == {"conv.weight", "pointwise.weight"}


def test_a_larger_shortcut_convolution_is_prunable() -> None:
    assert prunable(Block("downsample", 3)) == {"conv.weight", "pointwise.weight", "downsample.0.weight"}


def test_resnet18_prunes_exactly_its_convolutions_but_the_shortcuts(torchvision_models: Any) -> None:
    layout = build_layout(torchvision_models.resnet18())
    for entry in layout.entries:
        if entry.name.endswith(("running_mean", "running_var")):
            expected = "buffer"
        else:
            expected = "prunable" if "conv" in entry.name else "dense"
        assert entry.kind == expected, entry.name
    assert layout.parameters == 11_689_512
    assert layout.prunable == 11_689_512 - 9_600 - 513_000 - (64 * 128 + 128 * 256 + 256 * 512)


def test_mobilenets_pointwise_and_depthwise_convolutions_are_prunable(torchvision_models: Any) -> None:
    model = torchvision_models.mobilenet_v2()
    wanted = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert prunable(model) == wanted
    assert any(m.kernel_size == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))


def test_vgg_prunes_all_but_its_last_linear_layer(torchvision_models: Any) -> None:
    with torch.device("meta"):
        layout = build_layout(torchvision_models.vgg11())
    assert {e.name for e in layout.entries if e.kind == "dense"} == {
        "classifier.6.weight",
        "classifier.6.bias",
    }


def test_attention_projections_and_embeddings_are_prunable() -> None:
    assert kinds(Transformer()) == {
        "embedding.weight": "prunable",
        "attention.in_proj_weight": "prunable",
        "attention.in_proj_bias": "bias",
        "attention.out_proj.weight": "prunable",
        "attention.out_proj.bias": "bias",
        "decoder.weight": "dense",
        "decoder.bias": "dense",
    }


def test_attention_with_its_own_key_and_value_sizes_has_three_prunable_projections() -> None:
    found = kinds(Transformer(kdim=5, vdim=3, add_bias_kv=True))
    assert {f"attention.{p}_proj_weight" for p in "qkv"} <= {n for n, k in found.items() if k == "prunable"}
    assert {found[f"attention.{b}"] for b in ("in_proj_bias", "bias_k", "bias_v")} == {"dense"}


def test_an_attention_at_the_end_does_not_count_as_the_last_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.MultiheadAttention(8, 1))
    assert prunable(model) == {"0.weight", "2.in_proj_weight", "2.out_proj.weight"}


def test_an_embedding_bag_is_prunable_and_recurrent_layers_are_dense() -> None:
    model = nn.ModuleDict(
        {"bag": nn.EmbeddingBag(5, 3), "rnn": nn.LSTM(3, 4), "head": nn.Linear(4, 2), "out": nn.Linear(2, 2)}
    )
    assert prunable(model) == {"bag.weight", "head.weight"}


def test_biases_of_transposed_convolutions_follow_the_second_axis_unless_grouped() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ConvTranspose2d(6, 8, 3, groups=2), nn.Linear(2, 2))
    layout = build_layout(model)
    first, second = layout.by_name["0.weight"], layout.by_name["1.weight"]
    assert (first.kind, first.output_axis, first.groups) == ("prunable", 1, 1)
    assert (second.kind, second.output_axis, second.groups) == ("prunable", 1, 2)
    assert layout.by_name["0.bias"].rows == "0.weight"
    assert layout.by_name["1.bias"].kind == "dense"


def test_grouped_convolutions_list_their_outputs_on_the_first_axis() -> None:
    layout = build_layout(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Linear(2, 2)))
    assert layout.by_name["0.weight"].output_axis == 0
    assert layout.by_name["0.weight"].shape[0] == layout.by_name["0.bias"].size == 6


def test_a_weight_tied_to_the_last_linear_layer_is_kept_once_and_dense() -> None:
    layout = build_layout(TiedLanguageModel())
    assert {e.name: e.kind for e in layout.entries} == {
        "embedding.weight": "dense",
        "hidden.weight": "prunable",
        "hidden.bias": "bias",
        "norm.weight": "dense",
        "norm.bias": "dense",
        "decoder.bias": "dense",
    }
    assert layout.aliases == (("decoder.weight", "embedding.weight"),)


def test_two_hidden_layers_with_one_weight_are_prunable_once_and_both_biases_follow_its_rows() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    layout = build_layout(model)
    assert layout.prunable == 16
    assert layout.by_name["0.bias"].rows == layout.by_name["1.bias"].rows == "0.weight"


def test_a_module_used_under_two_names_is_kept_once() -> None:
    shared = nn.Linear(4, 4)
    layout = build_layout(nn.ModuleDict({"a": shared, "b": shared, "out": nn.Linear(4, 2)}))
    assert layout.parameters == 20 + 10
    assert dict(layout.aliases) == {"b.weight": "a.weight", "b.bias": "a.bias"}


def test_dense_layers_are_shell_patterns_of_parameter_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    assert prunable(model, ("1.*",)) == {"0.weight", "2.weight"}
    assert prunable(model, ("[02].weight",)) == {"1.weight"}
    assert kinds(model, ("1.weight",))["1.bias"] == "dense"  # there are no rows for it to follow
    assert prunable(model, ("nothing*",)) == {"0.weight", "1.weight", "2.weight"}


def test_dense_layers_may_name_any_alias_of_a_tied_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    for pattern in ("0.weight", "1.weight"):
        found = validate(model, (pattern,))
        assert [f.code for f in found if f.severity == "error"] == ["GMR-201"], pattern


def test_dense_layers_may_name_a_bias() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert kinds(model, ("0.bias",)) == {
        "0.weight": "prunable",
        "0.bias": "dense",
        "1.weight": "dense",
        "1.bias": "dense",
    }


def test_layers_whose_weight_is_computed_stay_dense() -> None:
    for wrap in (nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm):
        model = nn.Sequential(nn.Linear(3, 4), wrap(nn.Linear(4, 5)), nn.Linear(5, 2))
        layout = build_layout(model)
        assert [e.name for e in layout.of_kind("prunable")] == ["0.weight"]
        assert layout.by_name["1.bias"].kind == "dense"


# -- the vector ------------------------------------------------------------------------------------


def test_parameters_come_first_in_registration_order_then_floating_point_buffers() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    layout = build_layout(model)
    names = [e.name for e in layout.entries]
    buffers = ["0.running_mean", "0.running_var", "2.running_mean", "2.running_var"]
    assert names == [n for n, _ in model.named_parameters()] + buffers
    assert layout.parameters == sum(p.numel() for p in model.parameters())
    offset = 0
    for entry in layout.entries:
        assert entry.offset == offset and entry.size == torch.Size(entry.shape).numel()
        offset += entry.size
    assert layout.size == offset == layout.parameters + 2 * 3 + 2 * 4


def test_integer_and_non_persistent_buffers_are_not_in_the_vector() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model.register_buffer("count", torch.zeros(4, dtype=torch.int64))
    model.register_buffer("table", torch.zeros(4), persistent=False)
    model.register_buffer("scale", torch.ones(2))
    assert [e.name for e in build_layout(model).of_kind("buffer")] == ["scale"]


def test_equal_architectures_have_equal_layouts() -> None:
    assert build_layout(TiedLanguageModel()) == build_layout(TiedLanguageModel())
    assert build_layout(Block()) != build_layout(Block("shortcut"))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "block": Block,
    "tied": TiedLanguageModel,
    "attention": Transformer,
    "float64": lambda: Block().double(),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.BatchNorm1d(3), nn.Linear(3, 2)),
}


@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0, 2**31))
def test_gather_undoes_scatter_bit_for_bit(name: str, seed: int) -> None:
    model = MODELS[name]()
    layout = build_layout(model)
    flat = torch.randn(layout.size, dtype=layout.dtype, generator=torch.Generator().manual_seed(seed))
    layout.scatter(model, flat)
    assert torch.equal(layout.gather(model), flat)
    out = torch.empty_like(flat)
    assert layout.gather(model, out=out) is out and torch.equal(out, flat)


@pytest.mark.parametrize("name", MODELS)
def test_the_state_dict_of_a_vector_loads_into_the_model_and_comes_back(name: str) -> None:
    model, other = MODELS[name](), MODELS[name]()
    layout = build_layout(model)
    flat = torch.randn(layout.size, dtype=layout.dtype)
    state = layout.state_dict(model, flat)
    assert set(state) == set(model.state_dict())
    other.load_state_dict(state)
    assert torch.equal(layout.gather(other), flat)
    assert torch.equal(layout.from_state_dict(state, torch.zeros_like(flat)), flat)
    for name_, tensor in state.items():
        assert tensor.dtype == model.state_dict()[name_].dtype


class Large(nn.Module):
    """A weight that is lent memory, tied to another name, between small ones; its place is aligned or not."""

    def __init__(self, before: int = 16) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(before))
        self.large = nn.Linear(512, 256, bias=False)
        self.same = self.large
        self.last = nn.Linear(256, 3)
        self.register_buffer("mean", torch.randn(5))


@pytest.mark.parametrize("before", [16, 15])
@pytest.mark.parametrize("moves", [False, True])
def test_a_placed_model_is_the_vector_meanwhile_and_itself_afterwards(before: int, moves: bool) -> None:
    model = Large(before)
    layout = build_layout(model)
    weight, memory = model.large.weight, model.large.weight.data_ptr()
    own = weight.detach().clone()
    flat_D = torch.randn(layout.size)
    wanted_D = flat_D.clone()
    with layout.placed(model, flat_D):
        assert torch.equal(layout.gather(model), wanted_D)
        is_lent = weight.data_ptr() != memory
        assert is_lent == (before == 16) and model.large.weight is weight
        if moves:  # as a user's trainer may: elsewhere and back, or another parameter
            weight.data = weight.data.clone()
            model.last.weight = nn.Parameter(model.last.weight.detach().clone())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        model.mean.add_(1)  # type: ignore[operator]
        wanted_D *= 2
        wanted_D[-5:] = layout.gather(model)[-5:]
    assert torch.equal(flat_D, wanted_D)
    assert model.large.weight is weight and weight.is_contiguous()
    flat_D.zero_()
    assert not torch.equal(weight, torch.zeros_like(weight)), "its memory is no part of the vector"
    if is_lent and not moves:
        assert weight.data_ptr() == memory and torch.equal(weight, own)


def test_a_placed_model_has_its_own_memory_after_an_error() -> None:
    model = Large()
    layout = build_layout(model)
    memory = model.large.weight.data_ptr()
    with pytest.raises(KeyError), layout.placed(model, torch.zeros(layout.size)):
        raise KeyError
    assert model.large.weight.data_ptr() == memory and model.large.weight.abs().sum() > 0


def test_tied_names_have_equal_values_in_the_state_dict() -> None:
    model = TiedLanguageModel()
    layout = build_layout(model)
    state = layout.state_dict(model, torch.randn(layout.size))
    assert torch.equal(state["decoder.weight"], state["embedding.weight"])


def test_a_state_dict_that_has_only_the_other_name_of_a_tied_weight_is_understood() -> None:
    model = TiedLanguageModel()
    layout = build_layout(model)
    flat = torch.randn(layout.size)
    state = layout.state_dict(model, flat)
    del state["embedding.weight"]  # files without duplicates keep one of the names
    assert torch.equal(layout.from_state_dict(state, torch.zeros_like(flat)), flat)


def test_a_state_dict_may_lack_tensors_and_then_the_given_vector_fills_them() -> None:
    model = Block()
    layout = build_layout(model)
    like = torch.randn(layout.size)
    state = {"fc.bias": torch.tensor([5.0, 6.0])}
    flat = layout.from_state_dict(state, like)
    where = layout.by_name["fc.bias"].slice
    assert flat[where].tolist() == [5.0, 6.0]
    flat[where] = like[where]
    assert torch.equal(flat, like)


def test_a_state_dict_may_hold_parameters_themselves() -> None:
    """As what a hook makes of ``named_parameters``: the vector has their values, and no gradient."""
    model = Block()
    layout = build_layout(model)
    flat = layout.from_state_dict(dict(model.named_parameters()), layout.gather(model))
    assert torch.equal(flat, layout.gather(model)) and not flat.requires_grad


def test_integer_buffers_of_a_state_dict_are_the_models() -> None:
    model = Block()
    model.bn.num_batches_tracked.fill_(7)
    layout = build_layout(model)
    assert int(layout.state_dict(model, layout.gather(model))["bn.num_batches_tracked"]) == 7


def test_views_share_the_vectors_memory_and_state_dicts_do_not() -> None:
    model = Block()
    layout = build_layout(model)
    flat = layout.gather(model)
    layout.views(flat)["fc.bias"].fill_(3.0)
    assert flat[layout.by_name["fc.bias"].slice].tolist() == [3.0, 3.0]
    layout.state_dict(model, flat)["fc.bias"].fill_(4.0)
    layout.gather(model).fill_(9.0)
    assert flat[layout.by_name["fc.bias"].slice].tolist() == [3.0, 3.0]
    assert not (layout.gather(model) == 9.0).any()


def test_a_model_of_another_structure_does_not_fit_a_layout() -> None:
    layout = build_layout(Block())
    with pytest.raises((ValueError, RuntimeError)):
        layout.gather(TiedLanguageModel())


def test_scatter_keeps_the_graph_out_of_the_parameters() -> None:
    model = Block()
    layout = build_layout(model)
    layout.scatter(model, layout.gather(model).requires_grad_())
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


# -- findings --------------------------------------------------------------------------------------


def mixed_types() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].double()
    return model


def uninitialised_buffers() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d(affine=False), nn.Linear(4, 2))


class Counting(nn.Linear):
    """Keeps a number that is no tensor."""

    def get_extra_state(self) -> int:
        return 1


def extra_state() -> nn.Module:
    return nn.Sequential(Counting(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))


def causal_mask() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model.register_buffer("mask", torch.triu(torch.full((3, 3), float("-inf")), 1))
    return model


def never_initialised() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.constant_(model[0].weight, float("nan"))
    return model


ERRORS: list[tuple[Callable[[], nn.Module], str, str]] = [
    (lambda: nn.Sequential(nn.Linear(3, 2)), "GMR-201", "no prunable"),
    (lambda: nn.Sequential(nn.LayerNorm(3), nn.ReLU()), "GMR-201", "no prunable"),
    (lambda: nn.Sequential(nn.ReLU()), "GMR-201", "no prunable"),
    (mixed_types, "GMR-202", "float32, float64"),
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).half(), "GMR-202", "float16"),
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).bfloat16(), "GMR-202", "bfloat16"),
    (lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), "GMR-204", "0.weight, 0.bias"),
    (lambda: nn.Sequential(nn.Linear(3, 0), nn.Linear(3, 2)), "GMR-204", "0.weight"),
    (uninitialised_buffers, "GMR-204", "1.running_mean"),
    (extra_state, "GMR-212", "0._extra_state"),
    (causal_mask, "GMR-213", "NaN or infinity in mask"),
    (never_initialised, "GMR-213", "NaN or infinity in 0.weight"),
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_constant_outside_the_state_may_be_infinite() -> None:
    model = causal_mask()
    model.register_buffer("mask", model.get_buffer("mask"), persistent=False)
    assert validate(model) == []
    assert validate(never_initialised().to("meta")) == []


@pytest.mark.parametrize(("make", "code", "text"), ERRORS)
def test_models_that_cannot_be_split_are_refused_with_a_code(
    make: Callable[[], nn.Module], code: str, text: str
) -> None:
    model = make()
    found = validate(model)
    assert (found[0].code, found[0].severity) == (code, "error")
    assert text in found[0].message
    with pytest.raises(ModelError) as caught:
        build_layout(model)
    assert caught.value.code == code and type(model).__name__ in str(caught.value)


def test_all_layers_dense_leaves_nothing_to_prune() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(ModelError, match="GMR-201"):
        build_layout(model, ("*",))


def test_remarkable_but_usable_models_give_notes() -> None:
    assert validate(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))) == []
    assert [f.code for f in validate(TiedLanguageModel())] == ["GMR-203"]
    assert [f.code for f in validate(Block())] == ["GMR-205", "GMR-206"]
    assert all(f.severity == "note" for f in validate(Block()))
    assert "decoder.weight = embedding.weight" in validate(TiedLanguageModel())[0].message
    assert "bn.num_batches_tracked" in validate(Block())[0].message


def test_errors_come_before_notes() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert [f.severity for f in validate(model)] == ["error", "note", "note"]


def test_validation_does_not_change_the_model() -> None:
    model = Block()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layout: ModelLayout = build_layout(model)
    assert isinstance(layout.gather(model), Tensor)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
