"""What a step of a Hopfield network costs beside backpropagation on the same network: not a test, a measurement.

    OMP_NUM_THREADS=1 python tests/compare_hopfield.py [--compile] [784-512-10 784-256-256-10 conv]

Both steps are interleaved, with the same update, `torch.optim.SGD`. Medians of ratios of processor time on one thread,
as torch initialises the network and after some training; beside them the residual, certified by the step itself.
"""

import copy
import itertools
import statistics
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

import mep
from mep.runs.data import load


def layers(*sizes):
    found = []
    for m, n in itertools.pairwise(sizes):
        found += [nn.Linear(m, n), nn.Hardtanh(0.0, 1.0)]
    return nn.Sequential(nn.Flatten(), *found[:-1])


def convolutional():
    block = lambda m, n: (nn.Conv2d(m, n, 5, padding=2), nn.MaxPool2d(2), nn.Hardtanh(0.0, 1.0))  # noqa: E731
    return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 49, 10))


NETWORKS = {
    "784-512-10": (lambda: layers(784, 512, 10), 32, 0.4, 40),
    "784-256-256-10": (lambda: layers(784, 256, 256, 10), 32, 0.4, 40),
    "conv": (convolutional, 16, 0.03, 12),
}
"""How it is made, the size of a batch, a learning rate for training in between, and how many steps are measured."""


def timed(step, *batch):
    start = time.process_time()
    result = step(*batch)
    return time.process_time() - start, result


def measure(name, compile):
    make, batch, lr, count = NETWORKS[name]
    torch.manual_seed(0)
    data = load("mnist5k")
    model = make()
    twin = copy.deepcopy(model)
    ep = mep.EquilibriumPropagation(model, "one_hot_mse", energy="hopfield", compile=compile)
    ours, theirs = (torch.optim.SGD(net.parameters(), lr=1e-9) for net in (model, twin))

    def settle(x, y):
        ours.zero_grad()
        estimate = ep(x, y)
        ours.step()
        return estimate

    def backprop(x, target):
        theirs.zero_grad()
        F.mse_loss(twin(x), target).backward()
        theirs.step()

    def batches(number):
        for i in range(number):
            rows = torch.arange(i * batch, (i + 1) * batch) % len(data.train_x)
            yield data.train_x[rows], data.train_y[rows]

    for stage in ("at first", "trained"):
        if stage == "trained":
            ours.param_groups[0]["lr"] = lr
            for x, y in batches(60):
                settle(x, y)
            ours.param_groups[0]["lr"] = 1e-9
            twin.load_state_dict(model.state_dict())
        ratios, residuals, sweeps, settled = [], [], [], []
        for x, y in batches(count + 4):
            (ep_time, e), (backprop_time, _) = timed(settle, x, y), timed(backprop, x, F.one_hot(y, 10).float())
            ratios.append(ep_time / backprop_time)
            residuals.append(float(e.residual.max()))
            sweeps.append(e.iterations)
            settled.append(float(e.settled.float().mean()))
        print(
            f"{name:15} {'compiled' if compile else 'eager':8} {stage:9} "
            f"{statistics.median(ratios[4:]):5.2f} times backprop, residual "
            f"{statistics.median(residuals[4:]):.1e} at beta {e.beta:g}, {statistics.mean(sweeps[4:]):.1f} sweeps, "
            f"{statistics.mean(settled[4:]):.1%} settled, coupling {e.coupling:.2f}, inside {e.inside:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for chosen in [name for name in sys.argv[1:] if name != "--compile"] or NETWORKS:
        measure(chosen, "--compile" in sys.argv)
