"""Where the time of a step goes, and by how much settling steps reduce the gradient's error, for your own model.

`mep profile` does the same for the data sets by name, and writes a record and a picture.
"""

import torch
from torch import nn

import mep
from mep.lab.profile import show_rows
from mep.lab.profile_measure import profile
from mep.runs.data import load
from mep.runs.report import output


class Net(nn.Module):
    """Yours: any module that mep.trace can read."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        h = nn.functional.gelu(self.first(x.flatten(1)))
        return self.head(h + nn.functional.gelu(self.second(h)))


def main(rounds=2):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load("digits")
    batches = list(zip(data.train_x.split(32), data.train_y.split(32), strict=True))
    model = Net()
    opt = mep.eqprop(model.parameters(), model=model)
    for x, y in batches:
        opt.step(x=x, target=y)
    rows = profile(model, batches[:4], rounds=rounds)
    show_rows(rows, output())
    return rows


if __name__ == "__main__":
    main()
