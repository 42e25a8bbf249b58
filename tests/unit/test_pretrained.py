"""Pre-trained models of transformers: in, trained one round, out, and the logits are equal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from support import worlds
from support.pretrained import KINDS, computed_here, logits, save_pretrained, world

from worldlm_ray.config.loading import to_mapping
from worldlm_ray.errors import ConfigError
from worldlm_ray.experiments.comparison_run import run_one
from worldlm_ray.experiments.evaluate import sound_theta
from worldlm_ray.experiments.export import export
from worldlm_ray.experiments.methods import configure
from worldlm_ray.model.pretrained_shape import PretrainedShape
from worldlm_ray.plan import build, rundir
from worldlm_ray.plan.plan import make_plan
from worldlm_ray.simulation.simulator import simulate

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_model_comes_in_is_trained_and_goes_out(tmp_path: Path, kind: str, trainable: str) -> None:
    base = save_pretrained(tmp_path / "base", kind)
    plan = world(tmp_path, base, trainable=trainable)
    before = logits(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    np.testing.assert_allclose(computed_here(plan, build.initial(plan)), before, atol=1e-5)

    plan = rundir.create(plan)
    simulate(plan)
    theta = sound_theta(plan, plan.root)
    trained = computed_here(plan, theta)
    assert np.abs(trained - before).max() > 1e-3
    if trainable == "lora":
        export(str(plan.run_dir), "world", tmp_path / "adapter")
        whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = peft.PeftModel.from_pretrained(whole, tmp_path / "adapter")
        np.testing.assert_allclose(logits(adapted), trained, atol=1e-5)
    export(str(plan.run_dir), "world", tmp_path / "whole", merge=trainable == "lora")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    np.testing.assert_allclose(logits(whole), trained, atol=1e-5)


def test_patterns_choose_what_is_trained_and_nothing_else_changes(tmp_path: Path) -> None:
    base = save_pretrained(tmp_path / "base")
    plan = rundir.create(world(tmp_path, base, trainable=["model.layers.1.*"]))
    names = {entry.name for entry in plan.layout.entries}
    assert names
    assert all(name.startswith("model.layers.1.") for name in names)
    assert isinstance(plan.shape, PretrainedShape)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert plan.shape.frozen + plan.layout.size == sum(p.numel() for p in whole.parameters())

    simulate(plan)
    export(str(plan.run_dir), "world", tmp_path / "out")
    before = dict(whole.named_parameters())
    after = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == names


def test_an_inner_node_begins_without_the_base_model(tmp_path: Path) -> None:
    base = save_pretrained(tmp_path / "base")
    plan = world(tmp_path, base, trainable="lora")
    for file in base.iterdir():
        file.unlink()
    first, second = build.initial(plan), build.initial(plan)
    np.testing.assert_array_equal(first, second)
    views = plan.layout.views(first)
    assert all(not view.any() for name, view in views.items() if ".lora_B." in name)
    assert all(view.any() for name, view in views.items() if ".lora_A." in name)


def test_two_clients_of_a_process_map_the_same_frozen_weights(tmp_path: Path) -> None:
    from worldlm_ray.training.making import plain_trainer

    plan = world(tmp_path, save_pretrained(tmp_path / "base"), trainable="lora")
    settings = plan.root.clients[0].settings
    first, second = (plain_trainer(plan.shape, plan.layout, settings) for _ in range(2))
    frozen = [
        {n: p.data_ptr() for n, p in trainer.model.root.named_parameters() if not p.requires_grad}
        for trainer in (first, second)
    ]
    assert frozen[0]
    assert frozen[0] == frozen[1]
    assert first.flat.data_ptr() != second.flat.data_ptr()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM .* no causal language model"),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, "ViTModel .* no causal language model"),
        ({"model_type": "nonsense"}, "model_type nonsense"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"num_attention_heads": 5}, "makes no model of it|hidden_size"),
    ],
)
def test_another_model_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    base = save_pretrained(tmp_path / "base")
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ConfigError, match=words) as caught:
        world(tmp_path, base)
    assert "model.initial_from" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"trainable": "some"}, "model.trainable"),
        ({"trainable": []}, "model.trainable"),
        ({"trainable": ["nothing.*"]}, "model.trainable[0]"),
        ({"trainable": "lora", "lora": {"r": 0}}, "model.lora.r"),
        ({"trainable": "lora", "lora": {"dropout": 1.0}}, "model.lora.dropout"),
        ({"trainable": "lora", "lora": {"targets": ["q_prj"]}}, "model.lora.targets[0]"),
        ({"backend": "decoder", "trainable": "lora"}, "model.trainable"),
        ({"initial_from": None}, "model.initial_from"),
        ({"context": 128}, "model.context"),
        ({"layers": 3}, "model.layers"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_by_its_key(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        world(tmp_path, save_pretrained(tmp_path / "base"), **settings)
    assert str(caught.value).startswith(key)


def test_weights_that_are_missing_or_not_finite_are_refused(tmp_path: Path) -> None:
    base = save_pretrained(tmp_path / "base")
    plan = world(tmp_path, base)
    weights = base / "model.safetensors"

    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.norm\.weight holds a number that is not finite"):
        build.check_initial(plan)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing keys such as model\.norm\.weight"):
        build.check_initial(plan)
    weights.unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        world(tmp_path, base)


def test_adapters_under_record_privacy_clip_as_brute_force_does(tmp_path: Path) -> None:
    from worldlm_ray.config.schema import PrivacyConfig
    from worldlm_ray.training.private import PrivateTrainer

    plan = world(tmp_path, save_pretrained(tmp_path / "base", "llama_tied_gqa"), trainable="lora")
    settings, bound = plan.root.clients[0].settings, 0.05
    privacy = PrivacyConfig(unit="record", max_grad_norm=bound, grad_sample_mode="ghost")
    trainer = PrivateTrainer(plan.shape, plan.layout, settings.training, privacy, noise=0.0, threads=1, device="cpu")
    generator = torch.Generator().manual_seed(1)
    trainer.flat.normal_(std=0.3, generator=generator)
    records = torch.randint(256, (5, 17), generator=generator)
    inputs, targets = records[:, :-1].contiguous(), records[:, 1:].contiguous()
    trainer.gradient.zero_()
    trainer._records.add(inputs, targets)
    summed = trainer.gradient.clone()

    expected, clipped = torch.zeros_like(summed), 0
    for row in range(5):
        trainer.gradient.zero_()
        trainer.model.loss(inputs[row : row + 1], targets[row : row + 1]).backward()
        norm = float(trainer.gradient.norm())
        clipped += norm > bound
        expected += trainer.gradient * min(1.0, bound / (norm + 1e-6))
    assert clipped > 0
    torch.testing.assert_close(summed, expected, atol=1e-6, rtol=1e-5)


def test_a_frozen_a_never_travels_and_is_the_same_everywhere(tmp_path: Path) -> None:
    base = save_pretrained(tmp_path / "base")
    whole = world(tmp_path, base, trainable="lora")
    plan = rundir.create(world(tmp_path, base, trainable="lora", lora={"freeze_a": True}))
    assert all(".lora_B." in entry.name for entry in plan.layout.entries)
    assert plan.layout.size < whole.layout.size
    first = whole.layout.views(build.initial(whole))
    assert isinstance(plan.shape, PretrainedShape)
    assert plan.shape.frozen_a
    from worldlm_ray.training.making import plain_trainer

    trainer = plain_trainer(plan.shape, plan.layout, plan.root.clients[0].settings)
    for name, _ in plan.shape.frozen_a:
        np.testing.assert_array_equal(trainer.model.root.get_parameter(name).detach().numpy(), first[name])
    simulate(plan)
    trained = computed_here(plan, sound_theta(plan, plan.root))
    export(str(plan.run_dir), "world", tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    np.testing.assert_allclose(logits(adapted), trained, atol=1e-5)


def test_methods_for_adapters_are_published_rules(tmp_path: Path) -> None:
    """FedIT averages A and B, FFA-LoRA trains B alone, FedSA-LoRA shares A and keeps B at home."""
    base = save_pretrained(tmp_path / "base")
    config = world(tmp_path, base, trainable="lora").config
    fedit, ffa, fedsa = (make_plan(configure(config, name)) for name in ("fedit", "ffa_lora", "fedsa_lora"))
    assert {entry.name.split(".")[-3] for entry in fedit.layout.entries} == {"lora_A", "lora_B"}
    assert {entry.name.split(".")[-3] for entry in ffa.layout.entries} == {"lora_B"}
    split = fedsa.layout.backbone_size
    assert all((".lora_B." in entry.name) == (entry.offset >= split) for entry in fedsa.layout.entries)
    assert fedsa.root.settings.aggregation.attention.personal
    with pytest.raises(ConfigError, match="fedit trains adapters"):
        configure(world(tmp_path, base).config, "fedit")


@pytest.mark.parametrize("method", ["fedit", "local", "worldlm"])
def test_methods_read_text_by_the_tokenizer_of_the_model(tmp_path: Path, method: str) -> None:
    """A configuration names no tokenizer then. A method writes out what every client does."""
    base = save_pretrained(tmp_path / "base", vocab_size=512)
    own = worlds.tokenizer(base / "tokenizer.json")
    plan = world(tmp_path, base, trainable="lora")
    assert plan.tokenizer == str(own)
    assert make_plan(configure(plan.config, method)).tokenizer == str(own)


def test_a_comparison_measures_text_by_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    """The loss that the run has measured, and that which the comparison measures, are of the same model and text."""
    base = save_pretrained(tmp_path / "base", vocab_size=512)
    worlds.tokenizer(base / "tokenizer.json")
    config = world(tmp_path, base, trainable="lora").config
    [first, *_] = run_one(to_mapping(config), "local", 0, str(tmp_path / "out"))["clients"]
    assert first["by_model"][first["client"]] == pytest.approx(first["own"], rel=0.2)


def test_a_compiled_step_is_refused(tmp_path: Path) -> None:
    config = world(tmp_path, save_pretrained(tmp_path / "base")).config
    with pytest.raises(ConfigError, match=r"training\.compile: on"):
        make_plan(replace(config, training=replace(config.training, compile="on")))
