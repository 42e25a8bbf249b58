"""What trains a client's model in this process, by the client's settings."""

from __future__ import annotations

from collections.abc import Callable

from worldlm_ray.config.schema import NodeSettings
from worldlm_ray.model.pretrained_shape import Architecture, PretrainedShape
from worldlm_ray.model.smaller_rank import smaller_rank
from worldlm_ray.tensors.layout import Layout
from worldlm_ray.training.common import CommonTrainer
from worldlm_ray.training.local import LocalTrainer, device_of, threads_of
from worldlm_ray.training.mixed import MixedTrainer
from worldlm_ray.training.smaller_rank import SmallerRankTrainer
from worldlm_ray.training.trainer import Trainer


def plain_trainer(shape: Architecture, layout: Layout, settings: NodeSettings) -> LocalTrainer:
    """A trainer of one model of the shape, without noise, on the device and the cores of the client."""
    device, threads = device_of(settings.resources), threads_of(settings.resources)
    if isinstance(shape, PretrainedShape) and shape.lora.experts != "none":
        from worldlm_ray.training.experts import ExpertTrainer

        return ExpertTrainer(shape, layout, settings.training, threads=threads, device=device)
    return LocalTrainer(shape, layout, settings.training, threads=threads, device=device)


def trainer_of(shape: Architecture, layout: Layout, settings: NodeSettings, *, noise: float | None) -> Trainer:
    """The trainer that a client's settings ask for.

    Args:
        shape: of the model.
        layout: the flat layout.
        settings: the client's.
        noise: noise multiplier of a client that promises privacy of records; None of one that does not.

    Raises:
        PrivacyError: per-record gradients of this model cannot be computed, or are computed wrongly.
    """
    own = trainer_of_one_model(shape, layout, settings, noise=noise)
    if noise is not None:
        return own
    return with_common(own, lambda: trainer_of_one_model(shape, layout, settings, noise=None), settings)


def trainer_of_one_model(
    shape: Architecture, layout: Layout, settings: NodeSettings, *, noise: float | None
) -> LocalTrainer | SmallerRankTrainer:
    """The same without the common model. Arguments and errors are those of `trainer_of`."""
    rank = smaller_rank(shape, layout, settings.training.lora_rank)
    if rank is None:
        return _of_whole_rank(shape, layout, settings, noise=noise)
    own = _of_whole_rank(rank.shape, rank.layout, settings, noise=noise)
    return SmallerRankTrainer(own, rank, lambda: plain_trainer(shape, layout, settings))


def _of_whole_rank(shape: Architecture, layout: Layout, settings: NodeSettings, *, noise: float | None) -> LocalTrainer:
    if noise is None:
        return plain_trainer(shape, layout, settings)
    from worldlm_ray.training.private import PrivateTrainer  # Opacus takes seconds to import

    return PrivateTrainer(
        shape,
        layout,
        settings.training,
        settings.privacy,
        noise=noise,
        threads=threads_of(settings.resources),
        device=device_of(settings.resources),
    )


def with_common(own: Trainer, make_common: Callable[[], Trainer], settings: NodeSettings) -> Trainer:
    """A trainer, and one of the common model beside it where the client has one: see MergeConfig.has_base."""
    if settings.merge.mixture is not None:
        return MixedTrainer(own, make_common, alpha=settings.merge.mixture)
    return CommonTrainer(own, make_common) if settings.merge.has_base else own
