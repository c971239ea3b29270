"""A model as a graph of nodes with free states."""

from mep.graph.graph import Graph as Graph
from mep.graph.graph import Point as Point
