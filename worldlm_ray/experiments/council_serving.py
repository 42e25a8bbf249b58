"""A council that generates text, from a run's checkpoints or from a folder that `worldlm export --council` has written.

from pathlib import Path
from worldlm_ray.experiments.council_serving import load

council = load(Path("council"))
print(council.text("The law of", tokens=200))
print(council.weights)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from worldlm_ray.data import Tokenizer, load_tokenizer
from worldlm_ray.errors import ConfigError, RunError
from worldlm_ray.experiments import council, council_folder
from worldlm_ray.experiments.council import CouncilRules, Floats, Weights
from worldlm_ray.experiments.council_members import KEY, Members, members_of
from worldlm_ray.model.flat import bind
from worldlm_ray.model.making import LanguageModel, make_model
from worldlm_ray.model.pretrained_shape import Architecture
from worldlm_ray.plan import rundir
from worldlm_ray.storage.filesystem import expanded
from worldlm_ray.tensors.buffers import Flat
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.sampling import draw, sample


class Council:
    """Models that answer together, on the CPU.

    Args:
        members: parameters [layout.size] by name of the model. They are not copied and must not change.
        shape: sizes of every model.
        layout: where each parameter lies.
        tokenizer: of all models.
        prior_K: log of the weights that a text begins with; uniform unless given.
        rules: how the members are weighed.
    """

    def __init__(
        self,
        members: Mapping[str, Flat],
        shape: Architecture,
        layout: Layout,
        tokenizer: Tokenizer,
        *,
        prior_K: Floats | None = None,
        rules: CouncilRules | None = None,
    ) -> None:
        self.names, self.shape, self.tokenizer = list(members), shape, tokenizer
        self.rules = rules or CouncilRules()
        self.prior_K = council.uniform(len(members)) if prior_K is None else prior_K
        self.models = [_bound(theta, shape, layout) for theta in members.values()]
        self.weights = self._by_name(council.begin(self.prior_K))
        """Weight of each model after the last text: its prompt and what was generated."""

    def text(self, prompt: str = "", *, tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
        """Continue a prompt. The models are weighed on the prompt, and on every token that follows.

        Args:
            prompt: text to continue; see `worldlm_ray.training.sampling.sample`.
            tokens: tokens to generate.
            temperature: of the mixture; 0 takes the likeliest token every time.
            seed: of the draws.

        Returns:
            The generated text, without the prompt.

        Raises:
            RunError: the prompt holds no token, or a model has diverged.
        """
        return sample(self, self.tokenizer, prompt, tokens=tokens, temperature=temperature, seed=seed)

    @torch.no_grad()
    def sample(self, prompt: npt.NDArray[np.int64], *, tokens: int, temperature: float, seed: int) -> list[int]:
        """Token ids that continue a prompt.

        Raises:
            RunError: a model has diverged.
        """
        generator = np.random.Generator(np.random.PCG64(seed))
        ids = [int(token) for token in prompt]
        weights = self._read(ids)
        for _ in range(tokens):
            log_p_KV = self._log_p(ids[-self.shape.context :], weights)[:, -1]
            token = draw(council.mixture(weights, log_p_KV), temperature=temperature, generator=generator)
            weights = council.follow(weights, log_p_KV[:, token], self.rules)
            ids.append(token)
        self.weights = self._by_name(weights)
        return ids[len(prompt) :]

    def _read(self, ids: list[int]) -> Weights:
        """The weights after a prompt, whose first token no model foretells. Windows of a long one do not overlap."""
        weights, context = council.begin(self.prior_K), self.shape.context
        for first in range(0, len(ids) - 1, context):
            targets = ids[first + 1 : first + 1 + context]
            log_p_KTV = self._log_p(ids[first : first + len(targets)], weights)
            for position, token in enumerate(targets):
                weights = council.follow(weights, log_p_KTV[:, position, token], self.rules)
        return weights

    def _log_p(self, ids: list[int], weights: Weights) -> Floats:
        """Log probabilities [K, T, V] of what follows each token; -inf under models that do not answer."""
        found = np.full((len(self.models), len(ids), self.shape.vocab_size), -np.inf)
        tokens_BT = torch.tensor([ids])
        for index in np.flatnonzero(weights.answers_K):
            logits_TV = self.models[index](tokens_BT)[0].double()
            if not bool(torch.isfinite(logits_TV).all()):
                raise RunError(
                    f"the model of {self.names[index]} has diverged: its logits are not finite; leave it out"
                )
            found[index] = torch.log_softmax(logits_TV, dim=-1).numpy()
        return found

    def _by_name(self, weights: Weights) -> dict[str, float]:
        return dict(zip(self.names, np.exp(weights.now_K).tolist(), strict=True))


def of_run(run: str, members: str | None = None, rules: CouncilRules | None = None) -> tuple[Council, Members]:
    """A council of a run's models, from its checkpoints.

    Args:
        run: the run's folder or name.
        members: nodes with commas between them; None for all whose models may serve.
        rules: how the members are weighed.

    Raises:
        RunError: there is no such run.
        ConfigError: a node is unknown or may not serve.
        CheckpointError: a node has no whole checkpoint, or no model can serve.
    """
    plan = rundir.reopen(run, check_data=False)
    found = members_of(plan, members)
    made = Council(found.thetas, plan.shape, plan.layout, load_tokenizer(plan.tokenizer), rules=rules)
    return made, found


def load(folder: Path) -> Council:
    """The council of an exported folder.

    Raises:
        DataError: a file is missing or damaged.
    """
    saved = council_folder.read(folder)
    return Council(
        saved.thetas,
        saved.shape,
        saved.layout,
        load_tokenizer(saved.tokenizer),
        prior_K=saved.prior_K,
        rules=saved.rules,
    )


def opened(place: str, members: str | None = None) -> tuple[Council, list[str]]:
    """The council of a run or of an exported folder, and lines for the user.

    Raises:
        ConfigError: members are named for an exported folder, whose members stand in council.json; or as `of_run`.
        RunError, CheckpointError, DataError: as `of_run` and `load`.
    """
    folder = expanded(place)
    if not council_folder.is_one(folder):
        made, found = of_run(place, members)
        return made, found.left_out
    if members is not None:
        raise ConfigError(KEY, f"{place} is an exported council, which has its members", "leave the option out")
    return load(folder), []


def _bound(theta: Flat, shape: Architecture, layout: Layout) -> LanguageModel:
    model = make_model(shape)
    model.requires_grad_(False)
    bind(model.root, layout, torch.from_numpy(np.require(theta, requirements=["W"])))
    return model.eval()
