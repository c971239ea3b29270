"""A training run: everything that changes while a model trains, and one step of it."""

from __future__ import annotations

import time
import zlib
from typing import Any

import torch
from torch import Tensor

from mep.cli import models, optimizers
from mep.cli.checkpoints import CheckpointError
from mep.cli.settings import Settings
from mep.cli.training import Batches, Tally, accuracy, targets
from mep.data import DataSet

TRAIN_SAMPLE = 1000  # examples that the training accuracy is estimated on: right to about a point


class Run:
    """A model, its optimizer, its place in the data and its history."""

    def __init__(self, settings: Settings, data: DataSet) -> None:
        torch.manual_seed(settings.seed)
        self.device = data.train_x.device
        self.model = models.build(settings.model, data).to(self.device)
        self.optimizer = optimizers.build(settings.preset, self.model, settings.options)
        wanted = targets(data, settings.options.get("cost"))
        self.batches = Batches(data.train_x, wanted, settings.batch_size, settings.seed)
        self.test = data.test_x, data.test_y
        self.train_sample = data.train_x[:TRAIN_SAMPLE], data.train_y[:TRAIN_SAMPLE]
        self.tally = Tally()
        self.history: list[dict[str, Any]] = []
        self.steps = 0
        self.seconds = 0.0

    def step(self) -> None:
        """Train on the next batch; at the end of an epoch, measure and add a line to the history."""
        start = time.perf_counter()
        x, y = self.batches.next()
        self.optimizer.step(x=x, target=y)
        self.tally.add(self.optimizer.last, len(x))
        self.steps += 1
        ended = self.batches.position == 0
        if ended and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - start
        if ended:
            self._close_epoch()

    def result(self) -> dict[str, Any]:
        """Where the run is now: test accuracy, epochs, steps, seconds of training."""
        measured = self.history and self.batches.position == 0
        accuracy = self.history[-1]["test_accuracy"] if measured else self._accuracy(self.test)
        return {
            "test_accuracy": accuracy,
            "epochs": self.batches.epochs,
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def _accuracy(self, examples: tuple[Tensor, Tensor]) -> float:
        return accuracy(self.model, self.optimizer, *examples)

    def _close_epoch(self) -> None:
        self.history.append(
            {
                "epoch": self.batches.epoch,
                **self.tally.means(),
                "train_accuracy": self._accuracy(self.train_sample),
                "test_accuracy": self._accuracy(self.test),
                "seconds": self.seconds,
            }
        )
        self.tally = Tally()

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on from here, but the random state."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tally": self.tally.state_dict(),
            "epoch": self.batches.epoch,
            "position": self.batches.position,
            "history": self.history,
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.tally.load_state_dict(state["tally"])
            self.batches.epoch, self.batches.position = state["epoch"], state["position"]
            self.history, self.steps, self.seconds = state["history"], state["steps"], state["seconds"]
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"The checkpoint does not fit this model and optimizer: {error}") from error


def fingerprint(data: DataSet) -> str:
    """A line that tells a data set from another of the same name, by its shapes and labels."""
    labels = zlib.crc32(data.train_y.numpy().tobytes())
    shape = "x".join(str(n) for n in data.train_x.shape)
    return f"{data.name}, {shape} train, {len(data.test_x)} test, labels {labels:08x}"
