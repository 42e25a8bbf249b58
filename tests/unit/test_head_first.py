"""FedRep's local round (arXiv 2102.07078, algorithm 1): the head with the body frozen, then the body with the head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from support.small_models import KEYS, batches

from worldlm_ray.client.client import Client
from worldlm_ray.config.schema import TrainingConfig
from worldlm_ray.exchange.messages import Model
from worldlm_ray.experiments.methods import configure
from worldlm_ray.model.decoder import Decoder
from worldlm_ray.model.initial import initial_parameters
from worldlm_ray.model.shape import ModelShape
from worldlm_ray.plan import build
from worldlm_ray.plan.plan import Plan, make_plan
from worldlm_ray.training.local import LocalTrainer

RATE = 1e-3


def test_each_part_takes_adamws_steps_while_the_other_is_frozen(shape: ModelShape) -> None:
    layout = shape.layout(KEYS)
    training = TrainingConfig(local_steps=5, head_first=0.4, weight_decay=0.0, grad_clip=0.05)
    ours = LocalTrainer(shape, layout, training, threads=1, device="cpu")
    ours.write(initial_parameters(shape, layout, seed=0))
    start, reference = layout.views(ours.read()), Decoder(shape)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(torch.from_numpy(start[name]))
    heads = {entry.name for entry in layout.entries if entry.offset >= layout.backbone_size}
    parts = [[p for n, p in reference.named_parameters() if (n in heads) == is_head] for is_head in (True, False)]
    optimizers = [torch.optim.AdamW(part, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0) for part in parts]
    drawn = batches(shape, 10)
    for step, (inputs, targets) in enumerate(drawn):
        which = 0 if step % 5 < 2 else 1
        reference.zero_grad()
        reference.loss(torch.from_numpy(inputs), torch.from_numpy(targets)).backward()
        torch.nn.utils.clip_grad_norm_(parts[which], 0.05)
        optimizers[which].step()
    for round_ in range(2):
        ours.run(drawn[5 * round_ : 5 * round_ + 5], lambda _: RATE)
    assert ours.optimizer_state()["step"].tolist() == [6.0, 4.0]
    found = layout.views(ours.read())
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(found[name], parameter.detach().numpy(), rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(found[name] - start[name]).max() > 1e-3, name


def of_fedrep(tiny: Callable[..., Plan]) -> Client:
    config = tiny(budget={"rounds": 4}, training={"local_steps": 6, "batch_size": 2}).config
    plan = make_plan(configure(config, "fedrep"))
    client = Client(plan, plan.root.clients[0])
    values = build.initial(plan)
    model = Model(version=0, progress=0.0, finished=False, tokens=1.0, last_seq=0, values=values)
    client.begin(model, now_s=0.0)
    return client


def test_the_first_two_thirds_of_a_round_leave_the_body_as_it_is_and_the_rest_the_head(
    tiny: Callable[..., Plan],
) -> None:
    client = of_fedrep(tiny)
    split, start = client.plan.layout.backbone_size, client.trainer.read()
    asked = iter([False] * 4 + [True])
    client.train(lambda: next(asked))
    middle = client.trainer.read()
    assert (middle[:split] == start[:split]).all()
    assert (middle[split:] != start[split:]).any()
    client.train()
    end = client.trainer.read()
    assert (end[:split] != middle[:split]).any()
    assert (end[split:] == middle[split:]).all()


def test_a_round_that_was_interrupted_goes_on_to_the_same_bits(tiny: Callable[..., Plan]) -> None:
    for steps in (2, 5):  # among the head's steps, and among the body's
        whole, parts = of_fedrep(tiny), of_fedrep(tiny)
        whole.train()
        asked = iter([False] * steps + [True])
        parts.train(lambda asked=asked: next(asked))
        again = Client(parts.plan, parts.spec)
        again.restore(*parts.state())
        again.train()
        assert again.trainer.read().tobytes() == whole.trainer.read().tobytes()
        ours, theirs = again.trainer.optimizer_state(), whole.trainer.optimizer_state()
        assert {name: values.tobytes() for name, values in ours.items()} == {
            name: values.tobytes() for name, values in theirs.items()
        }
