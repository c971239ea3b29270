"""The study of branches in docs/concepts.md: `python -m mep.verification` prints its table.

Networks with He's initialisation and batches of random numbers, in float64, settled to 1e-6.
"""

from __future__ import annotations

import torch
from torch import nn

from mep.verification.branches import compare_branches

_COLUMNS = "| model | beta | beyond: held | exact | resting | states | cosine | gradient | to backprop: held | exact |"
_BETAS = (0.1, 0.01, 0.001)


def _mlp(depth: int) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(32, 10))


def _vgg(kernel: int, padding: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, width in ((1, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(kernel, 2, padding)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10))


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The rectified sum of a shortcut and two layers."""
        return torch.relu(x + self.second(torch.relu(self.first(x))))


_MODELS = {
    "ReLU, 2 layers": (lambda: _mlp(2), (32,)),
    "ReLU, 6 layers": (lambda: _mlp(6), (32,)),
    "residual, 3 blocks": (lambda: nn.Sequential(*(_Block(32) for _ in range(3)), nn.Linear(32, 10)), (32,)),
    "VGG, windows apart": (lambda: _vgg(2, 0), (1, 8, 8)),
    "VGG, windows overlap": (lambda: _vgg(3, 1), (1, 8, 8)),
}


def main() -> None:
    """Print the table."""
    print(_COLUMNS, "|---" * 10 + "|", sep="\n")
    for name, (make, shape) in _MODELS.items():
        torch.manual_seed(0)
        model = make()
        for p in model.parameters():
            nn.init.kaiming_normal_(p, nonlinearity="relu") if p.ndim > 1 else nn.init.zeros_(p)
        for row in compare_branches(model, torch.randn(16, *shape), torch.randint(10, (16,)), betas=_BETAS):
            numbers = (*row.beyond, row.resting, row.distance, row.difference, *row.error)
            cells = [f"{x:.2g}" for x in numbers]
            cells.insert(4, f"{row.cosine:.5f}")
            if not all(row.settled):
                failed = [kind for kind, ok in zip(("held", "exact"), row.settled, strict=True) if not ok]
                cells = [f"{' and '.join(failed)} did not settle", *[""] * 7]
            print("|", " | ".join([name, f"{row.beta:g}", *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
