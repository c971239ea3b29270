"""`mep` trains neural networks by equilibrium propagation, without backpropagating through the network.

opt = mep.smep(model.parameters(), model=model)
loss = opt.step(x=x, target=y)
opt.last                                       # residual, sweeps, beta, converged or why not

help("mep.presets")                            # eqprop, smep and the other presets
help(mep.EquilibriumPropagation)               # fills p.grad in a loop of your own; its arguments
help(mep.EPOptimizer)                          # an estimator and any optimizer under one `step`
mep.Sweep, mep.Relaxation, mep.Descent, mep.Local       # how the states settle
mep.trace(model, x), mep.EquilibriumPropagation.settle  # look at the graph, and at the equilibria of a batch
mep.verify(model, x, y)                        # gradients against backpropagation and finite differences
mep.NodeEnergy, mep.GroupEnergy, mep.BatchCost, mep.Solver  # to extend
"""

# The public names stand in `__init__.pyi`. Each is imported when it is first used: `mep --help` needs no torch.
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.1.0"
