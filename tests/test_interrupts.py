"""An interrupt by the keyboard takes effect before an update or after it, never in between."""

import os
import signal
import threading

import pytest
import torch
from torch import nn

import mep
from mep.guards import uninterrupted


def press():
    os.kill(os.getpid(), signal.SIGINT)


class Pressed(torch.optim.SGD):
    """SGD in the middle of which Ctrl-C is pressed so many times."""

    times = 0

    def step(self, closure=None):
        first, second = self.param_groups[0]["params"]
        for p in (first, second):
            p.sub_(p.grad)
            if p is first:
                for _ in range(self.times):
                    press()


def interrupted(times):
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    update = Pressed(model.parameters(), lr=1.0)
    opt = mep.EPOptimizer(mep.EquilibriumPropagation(model), update)
    update.times = times
    with pytest.raises(KeyboardInterrupt):
        opt.step(x=torch.ones(4, 3), target=torch.tensor([0, 0, 0, 1]))
    return [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]


def test_an_update_is_finished_first():
    assert interrupted(times=1) == [True, True]


def test_a_second_press_goes_through():
    assert interrupted(times=2) == [True, False]


def test_handlers_are_as_before():
    seen = []

    def own(number, frame):
        seen.append(number)

    usual = signal.signal(signal.SIGINT, own)
    try:
        with uninterrupted():
            press()
            assert not seen
        assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is own
        with pytest.raises(ValueError, match="inside"), uninterrupted():
            raise ValueError("inside")
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, usual)


def test_other_threads_are_left_alone():
    found = []

    def run():
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
