"""The decoder, its shape, its initial weights and its flat binding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.small_models import KEYS, batches
from torch.nn import functional

from worldlm_ray.config.schema import ModelConfig
from worldlm_ray.model.decoder import Decoder, Rotary
from worldlm_ray.model.flat import bind, decayed
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import PRESETS, ModelShape, resolve_shape
from worldlm_ray.tensors.layout import Layout


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def layout(shape: ModelShape) -> Layout:
    return shape.layout(KEYS)


def bound(shape: ModelShape, layout: Layout, *, seed: int = 0) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    flat = torch.from_numpy(initial_parameters(shape, layout, seed=seed))
    gradient = torch.zeros_like(flat)
    model = Decoder(shape)
    bind(model, layout, flat, gradient)
    return model, flat, gradient


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1}, {"heads": 4, "kv_heads": 2}, {"layers": 1}])
def test_parameters_are_what_the_shape_says(shape: ModelShape, changes: dict[str, int]) -> None:
    shape = replace(shape, **changes)
    found = [(name, tuple(parameter.shape)) for name, parameter in Decoder(shape).named_parameters()]
    assert found == shape.parameters


def test_names_are_hugging_faces(shape: ModelShape) -> None:
    names = {name for name, _ in shape.parameters}
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    } <= names
    assert len(names) == 3 + 9 * shape.layers


@pytest.mark.parametrize("place", [1, 7, 15])
def test_a_later_token_does_not_change_earlier_logits(shape: ModelShape, layout: Layout, place: int) -> None:
    model, flat, _ = bound(shape, layout)
    flat *= 10  # at initial size a leak would hide below the tolerance
    [(tokens, _)] = batches(shape, 1, size=2)
    changed = tokens.copy()
    changed[:, place] = (changed[:, place] + 1) % shape.vocab_size
    with torch.no_grad():
        before, after = model(torch.from_numpy(tokens)), model(torch.from_numpy(changed))
    torch.testing.assert_close(before[:, :place], after[:, :place], rtol=0, atol=1e-5)
    assert (before[:, place] - after[:, place]).abs().max() > 1e-3


def test_a_shorter_text_gives_the_same_logits(shape: ModelShape, layout: Layout) -> None:
    model, _, _ = bound(shape, layout)
    [(tokens, _)] = batches(shape, 1)
    with torch.no_grad():
        whole, part = model(torch.from_numpy(tokens)), model(torch.from_numpy(tokens[:, :5]))
    torch.testing.assert_close(whole[:, :5], part, rtol=0, atol=1e-6)


def test_rotary_by_hand(shape: ModelShape) -> None:
    # Head width 4, theta 10000: the pairs (0, 2) and (1, 3) turn by t and t * 10000^-0.5 = t / 100.
    rotary = Rotary(replace(shape, hidden_size=8, heads=2))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 4, 4)
    turned = rotary(x)[0, 0]
    assert turned[0].tolist() == [1, 2, 3, 4]
    for t in range(1, 4):
        slow = t / 100
        expected = [
            math.cos(t) - 3 * math.sin(t),
            2 * math.cos(slow) - 4 * math.sin(slow),
            3 * math.cos(t) + math.sin(t),
            4 * math.cos(slow) + 2 * math.sin(slow),
        ]
        assert turned[t].tolist() == pytest.approx(expected, rel=1e-5)


def test_rotary_products_depend_on_the_distance_alone(shape: ModelShape) -> None:
    rng = torch.Generator().manual_seed(0)
    query, key = (torch.randn(shape.head_size, generator=rng).expand(1, 1, shape.context, -1) for _ in range(2))
    rotary = Rotary(shape)
    products = rotary(query)[0, 0] @ rotary(key)[0, 0].T
    for distance in range(-8, 9):
        diagonal = torch.diagonal(products, distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert (products[0] - products[0, 0]).abs().max() > 0.1  # it does depend on it


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_keys_equal_keys_repeated_for_every_head(shape: ModelShape, kv_heads: int) -> None:
    grouped = replace(shape, heads=4, kv_heads=kv_heads)
    plain = replace(shape, heads=4, kv_heads=4)
    torch.manual_seed(0)
    one, other = Decoder(grouped), Decoder(plain)
    weights = one.state_dict()
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weight.view(kv_heads, grouped.head_size, -1).repeat_interleave(4 // kv_heads, dim=0)
            weights[name] = heads.reshape(grouped.hidden_size, -1)
    other.load_state_dict(weights)
    tokens = torch.from_numpy(batches(shape, 1)[0][0])
    torch.testing.assert_close(one(tokens), other(tokens), rtol=0, atol=1e-5)


def test_loss_is_cross_entropy_in_nats(shape: ModelShape, layout: Layout) -> None:
    model, _, _ = bound(shape, layout)
    model.requires_grad_(False)
    tokens, targets = (torch.from_numpy(part) for part in batches(shape, 1)[0])
    chosen = functional.log_softmax(model(tokens), dim=-1).gather(-1, targets[..., None])
    torch.testing.assert_close(model.loss(tokens, targets), -chosen.mean())
    torch.testing.assert_close(model.loss(tokens, targets, reduction="sum"), -chosen.sum())
    assert float(model.loss(tokens, targets)) == pytest.approx(math.log(shape.vocab_size), abs=0.05)


def test_presets_resolve_and_numbers_replace_theirs() -> None:
    assert resolve_shape(ModelConfig(preset="nano"), vocab_size=256) == PRESETS["nano"]
    shape = resolve_shape(ModelConfig(preset="1b", heads=16, layers=3), vocab_size=7)
    assert (shape.heads, shape.kv_heads, shape.layers, shape.vocab_size) == (16, 16, 3, 7)
    assert shape.hidden_size == PRESETS["1b"].hidden_size


def test_initial_parameters_depend_on_the_seed_alone(shape: ModelShape, layout: Layout) -> None:
    first, again, other = (initial_parameters(shape, layout, seed=seed) for seed in (0, 0, 1))
    assert first.tobytes() == again.tobytes()
    matrices = [view for view in layout.views(first - other).values() if view.ndim > 1]
    assert all(np.all(view != 0) for view in matrices)


def test_initial_parameters_do_not_depend_on_the_choice_of_key_layers(shape: ModelShape) -> None:
    one, other = shape.layout(KEYS), shape.layout([])
    theirs = other.views(initial_parameters(shape, other, seed=3))
    for name, view in one.views(initial_parameters(shape, one, seed=3)).items():
        assert view.tobytes() == theirs[name].tobytes(), name


def test_no_two_matrices_begin_with_the_same_numbers(shape: ModelShape, layout: Layout) -> None:
    views = layout.views(initial_parameters(shape, layout, seed=0))
    # Divided by their spread, so that a scaled copy shows as well.
    starts = {tuple(np.round(view.ravel()[:4] / view.std(), 3)) for view in views.values() if view.ndim > 1}
    assert len(starts) == 2 + 7 * shape.layers


def test_initial_parameters_have_the_published_spread() -> None:
    shape = PRESETS["nano"]
    layout = shape.layout([])
    views = layout.views(initial_parameters(shape, layout, seed=0))
    assert np.all(views["model.norm.weight"] == 1)
    assert views["lm_head.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert views["model.layers.1.mlp.down_proj.weight"].std() == pytest.approx(0.02 / math.sqrt(6), rel=0.05)
    assert abs(views["lm_head.weight"].mean()) < 1e-3


def test_writing_the_flat_buffer_changes_the_output(shape: ModelShape, layout: Layout) -> None:
    model, flat, _ = bound(shape, layout)
    tokens = torch.from_numpy(batches(shape, 1)[0][0])
    before = model(tokens).detach()
    flat.copy_(torch.from_numpy(initial_parameters(shape, layout, seed=1)))
    assert not torch.allclose(before, model(tokens))
    flat.zero_()
    assert torch.count_nonzero(model(tokens)) == 0


def test_every_parameter_is_its_part_of_the_buffer(shape: ModelShape, layout: Layout) -> None:
    model, flat, gradient = bound(shape, layout)
    parameters = dict(model.named_parameters())
    for entry in layout.entries:
        assert parameters[entry.name].data_ptr() == flat[entry.offset :].data_ptr()
        grad = parameters[entry.name].grad
        assert grad is not None
        assert grad.data_ptr() == gradient[entry.offset :].data_ptr()
        assert tuple(parameters[entry.name].shape) == entry.shape


def test_gradients_land_in_the_flat_gradient(shape: ModelShape, layout: Layout) -> None:
    model, flat, gradient = bound(shape, layout)
    plain = Decoder(shape)
    plain.load_state_dict(model.state_dict())
    tokens, targets = (torch.from_numpy(part) for part in batches(shape, 1)[0])
    model.loss(tokens, targets).backward()
    plain.loss(tokens, targets).backward()
    expected = dict(plain.named_parameters())
    for entry in layout.entries:
        part = gradient[entry.offset : entry.offset + entry.size].view(entry.shape)
        torch.testing.assert_close(part, expected[entry.name].grad)
        assert torch.count_nonzero(part) > 0
    assert flat.shape == gradient.shape


def test_a_layout_that_lacks_a_parameter_is_an_error(shape: ModelShape) -> None:
    short = replace(shape, layers=1).layout([])
    with pytest.raises(KeyError, match=r"model\.layers\.1"):
        bind(Decoder(shape), short, torch.zeros(short.size))


def test_decay_is_for_matrices(shape: ModelShape, layout: Layout) -> None:
    model, _, _ = bound(shape, layout)
    assert [tuple(p.shape) for p in decayed(model)] == [s for _, s in shape.parameters if len(s) == 2]
