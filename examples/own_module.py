"""Train your own module by equilibrium propagation: a residual convolutional net on scikit-learn's digits."""

import torch
import torch.nn.functional as F
from torch import nn

import mep
from mep.runs.data import load


class Net(nn.Module):
    """Any forward that torch.export can record: branches, functional calls, a residual sum."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        h = F.relu(self.first(x))
        h = h + F.relu(self.second(h))
        return self.head(h.mean((2, 3)))


def main(epochs=5):
    torch.manual_seed(0)
    data = load("digits")
    model = Net()
    opt = mep.smep(model.parameters(), model=model, lr=0.05)
    for epoch in range(epochs):
        for rows in torch.randperm(len(data.train_x)).split(64):
            loss = opt.step(x=data.train_x[rows], target=data.train_y[rows])
        accuracy = (model(data.test_x).argmax(1) == data.test_y).float().mean()
        print(
            f"epoch {epoch + 1}  loss {loss:.3f}  test accuracy {accuracy:.1%}  "
            f"residual {opt.last.residual.max():.0e}  sweeps {opt.last.iterations}"
        )
    return float(accuracy)


if __name__ == "__main__":
    main()
