"""How errors lead to errors in a graph: four implementations of one interface, see `network.py`."""
