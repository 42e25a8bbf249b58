"""The decoder, its flat binding, and local training, held against plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from worldlm_ray.config.schema import ModelConfig, TrainingConfig
from worldlm_ray.model.decoder import Decoder, Rotary
from worldlm_ray.model.flat import bind, decayed
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import PRESETS, ModelShape, resolve_shape
from worldlm_ray.records import perplexity
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.local import Batch, LocalTrainer
from worldlm_ray.training.schedule import learning_rate

KEYS = ["model.embed_tokens.*", "model.layers.-1.*", "model.norm.*", "lm_head.*"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def layout(shape: ModelShape) -> Layout:
    return shape.layout(KEYS)


def batches(shape: ModelShape, count: int, *, seed: int = 0, size: int = 4) -> list[Batch]:
    rng = np.random.Generator(np.random.PCG64(seed))
    windows = rng.integers(0, shape.vocab_size, (count, size, shape.context + 1))
    return [(np.ascontiguousarray(w[:, :-1]), np.ascontiguousarray(w[:, 1:])) for w in windows]


def bound(shape: ModelShape, layout: Layout, *, seed: int = 0) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    flat = torch.from_numpy(initial_parameters(shape, layout, seed=seed))
    gradient = torch.zeros_like(flat)
    model = Decoder(shape)
    bind(model, layout, flat, gradient)
    return model, flat, gradient


def trainer(shape: ModelShape, layout: Layout, *, seed: int = 0, **settings: Any) -> LocalTrainer:
    made = LocalTrainer(shape, layout, TrainingConfig(**settings), threads=1, device="cpu")
    made.write(initial_parameters(shape, layout, seed=seed))
    return made


# ---- the decoder -------------------------------------------------------------------------------------------


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


# ---- shapes and initial weights ----------------------------------------------------------------------------


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


# ---- the flat binding --------------------------------------------------------------------------------------


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


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e3])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_five_steps_equal_torchs_adamw(shape: ModelShape, layout: Layout, clip: float, decay: float) -> None:
    ours = trainer(shape, layout, grad_clip=clip, weight_decay=decay, betas=[0.9, 0.95])
    reference = Decoder(shape)
    start = layout.views(ours.read())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.from_numpy(start[name]))
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=1.0,
        betas=(0.9, 0.95),
    )
    for step, (inputs, targets) in enumerate(batches(shape, 5)):
        rate = 1e-3 * (step + 1)
        optimizer.zero_grad()
        loss = reference.loss(torch.from_numpy(inputs), torch.from_numpy(targets))
        loss.backward()
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
            assert (float(norm) > clip) == (clip < 1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        assert float(ours.step(inputs, targets, rate)) == pytest.approx(float(loss.detach()), abs=1e-6)
    found = layout.views(ours.read())
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(found[name] - start[name]).max() > 1e-3, name


def test_decay_alone_shrinks_matrices_and_not_norms(shape: ModelShape, layout: Layout) -> None:
    ours = trainer(shape, layout, weight_decay=0.5)
    before = layout.views(ours.read())
    without = trainer(shape, layout, weight_decay=0.0)
    [(inputs, targets)] = batches(shape, 1)
    for one in (ours, without):
        one.step(inputs, targets, 0.1)
    with_decay, plain = layout.views(ours.read()), layout.views(without.read())
    for name, view in before.items():
        expected = plain[name] - (0.1 * 0.5 * view if view.ndim > 1 else 0.0)
        np.testing.assert_allclose(with_decay[name], expected, rtol=0, atol=1e-6, err_msg=name)


def test_a_run_counts_its_steps_tokens_and_losses(shape: ModelShape, layout: Layout) -> None:
    one, other = trainer(shape, layout), trainer(shape, layout)
    data = batches(shape, 3)
    result = one.run(data, lambda step: 1e-3 * (step + 1))
    losses = [float(other.step(*batch, 1e-3 * (step + 1))) for step, batch in enumerate(data)]
    assert (result.steps, result.tokens) == (3, 3 * 4 * shape.context)
    assert result.loss_sum == pytest.approx(sum(losses))
    assert result.learning_rate == pytest.approx(3e-3)
    assert one.read().tobytes() == other.read().tobytes()


def test_a_run_can_be_stopped_before_any_step(shape: ModelShape, layout: Layout) -> None:
    answers = iter([False, False, True])
    result = trainer(shape, layout).run(batches(shape, 5), lambda _: 1e-3, should_stop=lambda: next(answers))
    assert result.steps == 2


def test_training_on_a_repeated_text_lowers_the_loss(shape: ModelShape, layout: Layout) -> None:
    window = np.arange(shape.context + 1, dtype=np.int64) % 5
    batch = (np.tile(window[:-1], (4, 1)), np.tile(window[1:], (4, 1)))
    ours = trainer(shape, layout)
    first = ours.run([batch], lambda _: 1e-2).loss_sum
    ours.run([batch] * 40, lambda _: 1e-2)
    last = ours.run([batch], lambda _: 1e-2).loss_sum
    assert first == pytest.approx(math.log(shape.vocab_size), abs=0.1)
    assert last < 0.5


def test_equal_seeds_and_batches_give_equal_bits(shape: ModelShape, layout: Layout) -> None:
    one, other = trainer(shape, layout), trainer(shape, layout)
    for ours in (one, other):
        ours.run(batches(shape, 3), lambda _: 1e-3)
    assert one.read().tobytes() == other.read().tobytes()


def test_read_and_write_copy(shape: ModelShape, layout: Layout) -> None:
    ours = trainer(shape, layout)
    values = ours.read()
    ours.write(values)
    values += 1
    assert not np.array_equal(ours.read(), values)
    out = np.empty_like(values)
    assert ours.read(out) is out
    assert out.tobytes() == ours.read().tobytes()


def test_evaluating_another_model_leaves_ones_own_untouched(shape: ModelShape, layout: Layout) -> None:
    ours, theirs = trainer(shape, layout, seed=0), trainer(shape, layout, seed=1)
    ours.run(batches(shape, 2), lambda _: 1e-3)
    before, data = ours.read().tobytes(), batches(shape, 2, seed=9)
    nats, tokens = ours.evaluate(data, parameters=theirs.read())
    assert (nats, tokens) == theirs.evaluate(data)
    assert nats != ours.evaluate(data)[0]
    assert tokens == 2 * 4 * shape.context
    assert ours.read().tobytes() == before


def test_ones_own_model_comes_back_when_evaluating_another_fails(shape: ModelShape, layout: Layout) -> None:
    ours = trainer(shape, layout)
    before = ours.read().tobytes()
    wrong = np.full((1, 4), shape.vocab_size + 5, np.int64)
    with pytest.raises(IndexError):
        ours.evaluate([(wrong, wrong)], parameters=np.zeros(layout.size, np.float32))
    assert ours.read().tobytes() == before


def test_evaluation_does_not_train(shape: ModelShape, layout: Layout) -> None:
    one, other = trainer(shape, layout), trainer(shape, layout)
    data = batches(shape, 4)
    one.run(data[:2], lambda _: 1e-3)
    one.evaluate(data)
    one.run(data[2:], lambda _: 1e-3)
    other.run(data, lambda _: 1e-3)
    assert one.read().tobytes() == other.read().tobytes()


def test_training_continues_to_the_same_bits_after_a_restart(shape: ModelShape, layout: Layout) -> None:
    whole, first, second = (trainer(shape, layout) for _ in range(3))
    data = batches(shape, 6)
    whole.run(data, lambda _: 1e-3)
    first.run(data[:3], lambda _: 1e-3)
    saved = {name: values.copy() for name, values in first.optimizer_state().items()}
    second.write(first.read())
    second.load_optimizer_state(saved)
    first.run(data[:1], lambda _: 1.0)  # what is saved does not follow
    second.run(data[3:], lambda _: 1e-3)
    assert second.read().tobytes() == whole.read().tobytes()


def test_optimizer_state_is_flat_fp32_and_empty_before_the_first_step(shape: ModelShape, layout: Layout) -> None:
    ours = trainer(shape, layout)
    assert ours.optimizer_state() == {}
    ours.load_optimizer_state({})
    ours.run(batches(shape, 1), lambda _: 1e-3)
    state = ours.optimizer_state()
    assert {name: values.shape for name, values in state.items()} == {
        "exp_avg": (layout.size,),
        "exp_avg_sq": (layout.size,),
        "step": (1,),
    }
    assert all(values.dtype == np.float32 for values in state.values())


def test_perplexity_too_large_for_a_float_is_infinite() -> None:
    assert perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert perplexity(1e9) == math.inf


# ---- the schedule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (-1.0, 0.0),
        (0.0, 0.0),
        (0.05, 0.5),  # half of the warm-up
        (0.1, 1.0),  # its end
        (0.325, 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))),  # a quarter of the decay
        (0.55, 0.6),  # its middle: half way from 1 to 0.2
        (1.0, 0.2),
        (2.0, 0.2),
    ],
)
def test_learning_rate_by_hand(progress: float, expected: float) -> None:
    training = TrainingConfig(lr=1.0, warmup_fraction=0.1, min_lr_ratio=0.2)
    assert learning_rate(training, progress) == pytest.approx(expected, abs=1e-12)


def test_learning_rate_without_a_warm_up_and_with_nothing_else() -> None:
    assert learning_rate(TrainingConfig(lr=2.0, warmup_fraction=0.0), 0.0) == 2.0
    whole = TrainingConfig(lr=2.0, warmup_fraction=1.0, min_lr_ratio=0.5)
    assert learning_rate(whole, 0.5) == 1.0
    assert learning_rate(whole, 1.0) == pytest.approx(1.0)


def test_learning_rate_never_jumps() -> None:
    training = TrainingConfig(lr=1.0)
    rates = [learning_rate(training, i / 1_000) for i in range(1_001)]
    assert max(abs(b - a) for a, b in zip(rates, rates[1:], strict=False)) < 0.021
