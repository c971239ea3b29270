"""Train a Hopfield network by equilibrium propagation: dense or convolutional, on digits or on MNIST files of yours.

python examples/hopfield_mnist.py                                                    seconds
python examples/hopfield_mnist.py --data mnist --folder data --epochs 10             784-512-10, 97.8%: minutes
python examples/hopfield_mnist.py --data mnist --folder data --epochs 10 --conv      an hour
"""

import argparse

import torch
from torch import nn

import mep
from mep.runs.data import load


def dense(inputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 512), nn.Hardtanh(0, 1), nn.Linear(512, 10))


def convolutional(size):
    """Two layers of convolution and pooling. The nearer to the output, the smaller the learning rate."""
    side = ((size - 4) // 2 - 4) // 2
    block = lambda m, n: (nn.Conv2d(m, n, 5), nn.MaxPool2d(2), nn.Hardtanh(0, 1))  # noqa: E731
    net = nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * side**2, 10))
    rates = {net[0]: 0.1, net[3]: 0.07, net[7]: 0.03}
    return net, [{"params": layer.parameters(), "lr": lr} for layer, lr in rates.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist5k, mnist or fashion-mnist")
    parser.add_argument("--folder", help="where the files of mnist or fashion-mnist are")
    parser.add_argument("--conv", action="store_true", help="convolutions; for images of 28x28")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()

    torch.manual_seed(0)
    data = load(args.data, args.folder)
    if args.conv:
        net, groups = convolutional(data.train_x.shape[-1])
    else:
        net = dense(data.train_x[0].numel())
        groups = net.parameters()
    opt = mep.eqprop(groups, model=net, energy="hopfield")

    # The learning rate falls to zero: near the end weights come to rest, and the accuracy does not waver.
    batches = len(data.train_x) // args.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.epochs * batches)
    for epoch in range(args.epochs):
        order = torch.randperm(len(data.train_x))[: batches * args.batch]
        for rows in order.split(args.batch):
            opt.step(x=data.train_x[rows], target=data.train_y[rows])
            schedule.step()
        # Predictions are the output at rest, not the forward pass of the module.
        predicted = torch.cat([opt.predict(x).argmax(1) for x in data.test_x.split(500)])
        accuracy = (predicted == data.test_y).double().mean()
        said = f"test accuracy {accuracy:.2%}, coupling {opt.last.coupling:.2f}"
        print(f"epoch {epoch + 1}  {said}; last step: {opt.last}", flush=True)


if __name__ == "__main__":
    main()
