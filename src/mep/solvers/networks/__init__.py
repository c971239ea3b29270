"""How errors lead to errors in a graph: four answers to one question, see `network.py`."""
