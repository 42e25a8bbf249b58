"""The flat layout and the arithmetic on flat buffers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from worldlm_ray.errors import ConfigError
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.tensors import buffers
from worldlm_ray.tensors.buffers import BLOCK, add_scaled, blocks, frozen, inner, lerp, params_sha256, squared_norm
from worldlm_ray.tensors.layout import Layout, make_layout

SHAPES = [
    ("embed.weight", (4, 2)),
    ("layers.0.mlp.weight", (2, 2)),
    ("layers.0.norm.weight", (2,)),
    ("layers.1.mlp.weight", (2, 2)),
    ("layers.1.norm.weight", (2,)),
    ("head.weight", (4, 2)),
]


def lay(*patterns: str) -> Layout:
    return make_layout(SHAPES, patterns, layers=2)


# ---- layout ------------------------------------------------------------------------------------------------


def test_backbone_comes_first_and_both_parts_keep_the_models_order() -> None:
    layout = lay("head.*", "embed.*")
    assert [entry.name for entry in layout.entries] == [
        "layers.0.mlp.weight",
        "layers.0.norm.weight",
        "layers.1.mlp.weight",
        "layers.1.norm.weight",
        "embed.weight",
        "head.weight",
    ]
    assert [entry.offset for entry in layout.entries] == [0, 4, 6, 10, 12, 20]
    assert (layout.backbone_size, layout.key_size, layout.size, layout.nbytes) == (12, 16, 28, 112)


def test_key_parameters_of_one_block_are_one_key_layer() -> None:
    layout = lay("embed.*", "layers.1.*")
    assert [(k.name, k.start, k.stop) for k in layout.key_layers] == [("embed", 0, 8), ("layers.1", 8, 14)]


def test_layers_minus_one_is_the_last_block() -> None:
    assert lay("layers.-1.*") == lay("layers.1.*")
    assert lay("layers.-2.*") == lay("layers.0.*")
    assert lay("layers.-1.*") != lay("layers.-2.*")


def test_part_of_a_block_may_be_key() -> None:
    layout = lay("*.norm.*")
    assert [(k.name, k.start, k.stop) for k in layout.key_layers] == [("layers.0", 0, 2), ("layers.1", 2, 4)]


def test_no_patterns_make_everything_backbone() -> None:
    layout = lay()
    assert layout.backbone_size == layout.size == 28
    assert layout.key_layers == ()
    assert [entry.name for entry in layout.entries] == [name for name, _ in SHAPES]


def test_every_parameter_may_be_key() -> None:
    layout = lay("*")
    assert layout.backbone_size == 0
    assert [(k.start, k.stop) for k in layout.key_layers] == [(0, 8), (8, 14), (14, 20), (20, 28)]


@pytest.mark.parametrize("pattern", ["layer.0.*", "layers.-3.*", "layers.7.*", ""])
def test_a_pattern_that_matches_nothing_names_its_place(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.key_layers\[1\]: ") as caught:
        lay("embed.*", pattern)
    assert repr(pattern) in str(caught.value)
    assert "layers.1.*" in caught.value.cure


def test_the_hash_stays_for_the_same_layout_and_changes_with_shape_and_key_choice() -> None:
    hashes = {
        lay("embed.*").hash,
        lay("head.*").hash,
        lay().hash,
        lay("*").hash,
        make_layout([*SHAPES[:-1], ("head.weight", (2, 4))], ["embed.*"], layers=2).hash,
        make_layout([*SHAPES[:-1], ("tail.weight", (4, 2))], ["embed.*"], layers=2).hash,
    }
    assert len(hashes) == 6
    assert lay("embed.*").hash == lay("embed.weight").hash


def test_views_are_the_buffer_itself() -> None:
    layout = lay("embed.*")
    flat = np.arange(layout.size, dtype=np.float32)
    views = layout.views(flat)
    assert views["layers.0.mlp.weight"].tolist() == [[0, 1], [2, 3]]
    views["embed.weight"][0, 0] = -1
    assert flat[layout.backbone_size] == -1


def test_the_decoder_splits_as_the_default_patterns_say(shape: ModelShape) -> None:
    layout = shape.layout(["model.embed_tokens.*", "model.layers.-1.*", "model.norm.*", "lm_head.*"])
    assert [k.name for k in layout.key_layers] == [
        "model.embed_tokens",
        "model.layers.1",
        "model.norm",
        "lm_head",
    ]
    assert all(
        entry.name.startswith("model.layers.0.") for entry in layout.entries if entry.offset < layout.backbone_size
    )


# ---- arithmetic --------------------------------------------------------------------------------------------


def test_blocks_cover_everything_once() -> None:
    assert [(b.start, b.stop) for b in blocks(2 * BLOCK + 3)] == [
        (0, BLOCK),
        (BLOCK, 2 * BLOCK),
        (2 * BLOCK, 2 * BLOCK + 3),
    ]
    assert list(blocks(0)) == []


def test_lerp_copies_exactly_at_zero_and_one(rng: np.random.Generator) -> None:
    own, other = (rng.standard_normal(9).astype(np.float32) for _ in range(2))
    poison = np.full(9, np.nan, np.float32)
    out = np.empty(9, np.float32)
    lerp(own, poison, 0.0, out=out)
    assert out.tobytes() == own.tobytes()
    lerp(poison, other, 1.0, out=out)
    assert out.tobytes() == other.tobytes()


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_lerp_by_hand_and_in_place(weight: float) -> None:
    own, other = np.array([8, 4], np.float32), np.array([16, -4], np.float32)
    expected = {0.0: [8, 4], 0.25: [10, 2], 1.0: [16, -4]}[weight]
    out = np.empty(2, np.float32)
    lerp(own, other, weight, out=out)
    assert out.tolist() == expected
    lerp(own, other, weight, out=own)
    assert own.tolist() == expected
    assert other.tolist() == [16, -4]


def test_add_scaled_adds_in_place_and_leaves_the_values() -> None:
    target, values = np.array([1, 2], np.float32), np.array([10, 20], np.float32)
    add_scaled(target, values, 0.5)
    assert target.tolist() == [6, 12]
    assert values.tolist() == [10, 20]


def test_arithmetic_is_the_same_whatever_the_block(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (rng.standard_normal(BLOCK + 3).astype(np.float32) for _ in range(2))

    def run() -> tuple[bytes, bytes]:
        summed, mixed = a.copy(), np.empty_like(a)
        add_scaled(summed, b, 1 / 3)
        lerp(a, b, 0.3, out=mixed)
        return summed.tobytes(), mixed.tobytes()

    whole = run()
    monkeypatch.setattr(buffers, "BLOCK", 1_001)
    assert run() == whole


def test_norms_and_products_are_summed_in_double_precision() -> None:
    # In fp32 the sum would stop growing at 2^24.
    ones = np.ones(2**24 + 16, np.float32)
    assert squared_norm(ones) == 2**24 + 16
    assert inner(ones, ones) == 2**24 + 16


def test_norms_and_products_of_displacements() -> None:
    a, b, origin = (np.array(v, np.float32) for v in ([4, 6], [1, 3], [1, 2]))
    assert squared_norm(a, origin) == 9 + 16
    assert inner(a, b, origin=origin) == 3 * 0 + 4 * 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_norm_shows_a_bad_value_in_any_block(bad: float) -> None:
    values = np.zeros(BLOCK + 3, np.float32)
    values[-1] = bad
    assert not np.isfinite(squared_norm(values))


def test_the_hash_of_parameters_is_of_their_bytes() -> None:
    values = np.array([1.0, -0.0], np.float32)
    assert params_sha256(values) == hashlib.sha256(bytes.fromhex("0000803f00000080")).hexdigest()
    assert params_sha256(values) != params_sha256(np.array([1.0, 0.0], np.float32))
    assert params_sha256(np.arange(6, dtype=np.float32)[::2]) == params_sha256(np.array([0, 2, 4], np.float32))


def test_frozen_is_a_view_that_cannot_be_written() -> None:
    values = np.zeros(2, np.float32)
    view = frozen(values)
    assert np.shares_memory(view, values)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    values[0] = 1  # the owner still can
    assert view[0] == 1
