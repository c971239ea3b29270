"""`mep` trains neural networks by equilibrium propagation, without backpropagating through the network.

    opt = mep.smep(model.parameters(), model=model)
    loss = opt.step(x=x, target=y)
    opt.last                                       # residual, sweeps, beta, converged or why not

The public names stand in `__init__.pyi`. Each is imported when it is first used, so that `mep --help` needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
