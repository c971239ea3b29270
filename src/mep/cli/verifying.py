"""`mep verify` as a whole: the model and the batch that its settings name, examined."""

from __future__ import annotations

import torch
from torch import nn

import mep
from mep.cli import models
from mep.cli.training import Batches, on_device, targets
from mep.cli.verify import Settings
from mep.data import DataSet, load
from mep.errors import ArgumentError
from mep.verification import Report


def verify_settings(settings: Settings, device: torch.device) -> Report:
    """Build the model, draw a batch, verify."""
    torch.manual_seed(settings.seed)
    data = load(settings.data, folder=settings.folder) if settings.shape is None else _random(settings)
    data = on_device(data, device)
    model: nn.Module = models.build(settings.model, data).to(device).train(not settings.evaluation)
    x, target = Batches(data.train_x, targets(data, settings.cost), settings.batch_size, settings.seed).next()
    return mep.verify(
        model,
        x,
        target,
        cost=settings.cost,
        betas=settings.betas,
        branches=settings.branches,
        leaves=settings.leaves,
        samples=settings.samples,
    )


def _random(settings: Settings) -> DataSet:
    """One batch of normal noise with random labels."""
    assert settings.shape is not None
    try:
        shape = tuple(int(size) for size in settings.shape.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise ArgumentError(f"--shape {settings.shape!r}: give positive integers with commas between, as 3,32,32.")
    x = torch.randn(settings.batch_size, *shape)
    y = torch.randint(settings.classes, (settings.batch_size,))
    return DataSet("random", x, y, x, y, settings.classes)
