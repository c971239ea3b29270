"""The loop of `mep train`: step until the goal is reached, and show, save and record on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mep.cli import checkpoints, records
from mep.cli.display import Display
from mep.cli.files import make_parent
from mep.cli.run import Run, fingerprint
from mep.cli.settings import Settings, decide
from mep.cli.stop import StopRequest
from mep.cli.training import on_device, pick_device
from mep.data import load
from mep.errors import ArgumentError

KIND = "mep train"


def train_and_save(
    given: Mapping[str, Any],
    *,
    checkpoint: Path | None,
    checkpoint_every: int | None,
    resume: Path | None,
    json: Path | None,
) -> int | None:
    """Start or resume a run and train it to its goal; returns the signal that stopped it, if one did."""
    saved = checkpoints.load(resume) if resume else None
    settings = decide(given, saved["settings"] if saved else None)
    save_to = _save_to(checkpoint, checkpoint_every, resume)
    for path in filter(None, (save_to, json)):
        make_parent(path)

    if settings.threads:
        torch.set_num_threads(settings.threads)
    data = load(settings.data, folder=settings.folder)
    mark = fingerprint(data)
    run = Run(settings, on_device(data, pick_device(settings.device)))
    if saved:
        if saved["data"] != mark:
            raise checkpoints.CheckpointError(f"{resume} was made with other data: {saved['data']}; these are {mark}.")
        run.load_state_dict(saved["run"])
        checkpoints.restore_random_state(saved["random"])

    def save() -> None:
        if save_to:
            checkpoints.save(save_to, settings=asdict(settings), data=mark, run=run.state_dict())

    with StopRequest() as stop, Display(settings.epochs, settings.seconds) as display:
        while not (stop.signal or _reached(run, settings)):
            run.step()
            display.update(run)
            if run.batches.position == 0:
                display.epoch(run.history[-1])
                save()
            elif checkpoint_every and run.steps % checkpoint_every == 0:
                save()
        if run.batches.position != 0:
            save()

    result = run.result()
    if json:
        record = records.header(KIND, run.device) | {
            "settings": asdict(settings),
            "data": mark,
            "result": result,
        }
        records.write(json, record | {"stopped_by_signal": stop.signal, "history": run.history})
    if stop.signal:
        print(f"Stopped.{f' Go on with: mep train --resume {save_to}' if save_to else ''}")
    print("test accuracy {test_accuracy:.2f}% after {epochs:.4g} epochs, {seconds:.1f} s of training".format(**result))
    return stop.signal


def _save_to(checkpoint: Path | None, every: int | None, resume: Path | None) -> Path | None:
    if checkpoint and checkpoint != resume and checkpoint.exists():
        raise ArgumentError(f"{checkpoint} exists. Go on from it with --resume {checkpoint}, or remove it first.")
    path = checkpoint or resume
    if every is not None and (every < 1 or not path):
        raise ArgumentError("--checkpoint-every needs a number of steps above 0, and --checkpoint to say where.")
    return path


def _reached(run: Run, settings: Settings) -> bool:
    if settings.seconds is not None:
        return run.seconds >= settings.seconds
    return run.batches.epoch >= (settings.epochs or 0)
