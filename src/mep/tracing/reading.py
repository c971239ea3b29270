"""What the fx graph of a model says: which operations need a state, and which merely feed them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from mep import activations
from mep.chain import make_node
from mep.errors import TraceError
from mep.graph import Graph
from mep.nodes import Node
from mep.ops import Op, Ref, has_hooks, references
from mep.recording import MADE, Leaves, place, record
from mep.tracing.rewriting import in_few_forms

Box = tuple[float, float]
_FREE: Box = (-math.inf, math.inf)
_SHAPE_METHODS = {"size", "dim", "numel", "ndimension", "stride"}
_SHAPE_ATTRIBUTES = {"shape", "dtype", "device", "ndim"}


class Reading:
    """What the fx graph of a model says: which operations need a state, and which merely feed them."""

    def __init__(self, module: nn.Module, leaves: Leaves, inputs: Sequence[str] | None):
        self.module = module
        self.fx, self.root, self.constants = record(module, leaves, inputs)
        in_few_forms(self.fx, self.root)
        self.read()

    def read(self) -> None:
        """Read `fx` as it stands now."""
        self.nodes = list(self.fx.nodes)
        self.names = _names(self.nodes)
        self.alias: dict[fx.Node, fx.Node] = {}
        self.ops = {n: self._op(n) for n in self.nodes if n.op not in ("placeholder", "output")}
        self.data = self._depends_on_data()
        self.output = self._output()
        self.junctions = {n for n in self.data_ops() if _is_dropout(self.ops[n])}  # noise is drawn in the model's order
        self.roots: dict[fx.Node, Box] = {self._tensor_of(n): _FREE for n in self.data_ops() if self._needs_state(n)}
        self.roots[self.alias.get(self.output, self.output)] = _FREE
        self.junctions -= self.roots.keys()

    def data_ops(self) -> list[fx.Node]:
        """The operations whose value depends on an input, not merely on its shape."""
        return [n for n in self.ops if self.data[n]]

    def graph(self) -> Graph:
        """Fold what feeds one node into it, make a junction of what feeds several, and connect."""
        self._find_junctions()
        made: dict[fx.Node, Node] = {}
        for n in self.nodes:
            if n in self.roots or n in self.junctions:
                made[n] = self._node(n, made)
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        return Graph(
            model=self.module,
            inputs=tuple(self.names[n] for n in placeholders),
            nodes=tuple(made.values()),
            output=self.names[self.alias.get(self.output, self.output)],
        )

    def move_states_behind_activations(self) -> None:
        """The input of every activation becomes a root whose box is the activation's; nothing else is one."""
        self.roots = {}
        for n in self.data_ops():
            activation = self.ops[n].activation
            if activation is None or activation.name == "identity":
                continue
            read = n.all_input_nodes[0]
            before = self.alias.get(read, read)
            if activation.box is None:
                raise TraceError(
                    f"The Hopfield energy has states in a box, and {place(n)} ({activation.name}) projects on none. "
                    "Use ReLU, ReLU6, Hardtanh or clamp, or the energy 'prediction'."
                )
            if len(before.users) > 1 or before.op == "placeholder":
                raise TraceError(
                    f"The Hopfield energy cannot read {place(before)} both before and behind {place(n)}. "
                    "Use the energy 'prediction'."
                )
            self.alias[n], self.roots[before] = before, activation.box
        self.roots.setdefault(self.alias.get(self.output, self.output), _FREE)
        self.ops = {n: self._op(n) for n in self.ops}

    def _op(self, n: fx.Node) -> Op:
        """The operation that fx recorded, with its closed form if it has one."""
        args, kwargs = (_plain(t, self._ref) for t in (n.args, n.kwargs))
        given = {"name": self.names[n], "args": args, "kwargs": kwargs}
        if n.op == "get_attr":
            path, _, attribute = str(n.target).rpartition(".")
            owner = self.constants if attribute.startswith(MADE) else self.root.get_submodule(path)
            return Op(kind="attribute", target=attribute, owner=owner, **given)
        if n.op == "call_module":
            module = self.root.get_submodule(str(n.target))
            if has_hooks(module) or not (args and isinstance(args[0], Ref)):
                return Op(kind="module", target=module, **given)
            activation, pool = activations.of_module(module), activations.pool_of_module(module)
            return Op(kind="module", target=module, activation=activation, pool=pool, **given)
        kind = "method" if n.op == "call_method" else "function"
        if not args or not isinstance(args[0], Ref) or any(references((args[1:], kwargs))):
            return Op(kind=kind, target=n.target, **given)
        activation = activations.of_call(n.target, args, kwargs)
        pool = activations.pool_of_call(n.target, args, kwargs)
        return Op(kind=kind, target=n.target, activation=activation, pool=pool, **given)

    def _ref(self, n: fx.Node) -> Ref:
        return Ref(self.names[self.alias.get(n, n)])

    def _depends_on_data(self) -> dict[fx.Node, bool]:
        data: dict[fx.Node, bool] = {}
        for n in self.nodes:
            asks_shape = (n.op == "call_method" and n.target in _SHAPE_METHODS) or (
                n.target is getattr and n.args[1] in _SHAPE_ATTRIBUTES
            )
            data[n] = n.op == "placeholder" or (not asks_shape and any(data[a] for a in n.all_input_nodes))
        return data

    def _output(self) -> fx.Node:
        result = self.nodes[-1].args[0]
        if not isinstance(result, fx.Node) or not self.data[result] or result.op == "placeholder":
            raise TraceError(
                f"Cannot trace {type(self.module).__name__}: its forward returns {result}; the output must be one "
                "tensor computed from the input. Way out: wrap the model in a module that returns that tensor; of "
                "several, torch.cat([a.flatten(1), b.flatten(1)], 1), and a cost function that splits it again."
            )
        return result

    def _needs_state(self, n: fx.Node) -> bool:
        return self._parametrised(n) or n.target is activations.own_state

    def _parametrised(self, n: fx.Node) -> bool:
        """Whether it reads parameters itself or through an expression that does not depend on the data."""
        read = self.ops[n].parameters() if n in self.ops else []
        return bool(read) or any(not self.data[a] and self._parametrised(a) for a in n.all_input_nodes)

    def _tensor_of(self, n: fx.Node) -> fx.Node:
        """`n`, or the one element of its result that the model reads, in tuples within it too."""
        while True:
            users = list(n.users)
            picks = list(dict.fromkeys(map(_picked, users)))
            if not users or None in picks:
                return n
            if len(picks) > 1:
                raise TraceError(
                    f"Cannot trace {type(self.module).__name__}: {place(n)} returns several values and the model "
                    f"reads elements {picks}. Way out: wrap it in a module that returns one tensor, and "
                    "keep that module whole with leaves=(ThatModule,)."
                )
            self.alias |= {u: users[0] for u in users[1:]}
            n = users[0]

    def _find_junctions(self) -> None:
        """Walk backwards, noting which roots each operation feeds. What carries parameters is repeated, not shared."""
        carries: dict[fx.Node, bool] = {}
        for n in self.nodes[:-1]:
            folded = [a for a in n.all_input_nodes if a not in self.roots and self.data[a]]
            carries[n] = self._parametrised(n) or any(carries[a] for a in folded)
        feeds: dict[fx.Node, set[fx.Node]] = {}
        for n in reversed(self.nodes[:-1]):
            users = [u for u in n.users if u.op != "output"]
            fed = {o for u in users for o in ({u} if u in self.roots else feeds.get(u, {u}))}
            unpacked = all(u.target is operator.getitem and isinstance(u.args[1], int) for u in users)
            shared = n in self.ops and self.data[n] and len(fed) > 1
            if shared and n not in self.roots and not carries[n] and not unpacked:
                self.junctions.add(n)
            feeds[n] = {n} if n in self.junctions else fed

    def _node(self, root: fx.Node, made: dict[fx.Node, Node]) -> Node:
        """A root or junction with everything that only feeds it."""
        program: list[fx.Node] = []
        parents: list[fx.Node] = []

        def visit(n: fx.Node) -> None:
            for a in (self.alias.get(a, a) for a in n.all_input_nodes):
                if a.op == "placeholder" or a in made:
                    if a not in parents:
                        parents.append(a)
                elif a not in program:
                    visit(a)
            program.append(n)

        visit(root)
        ops = [self.ops[n] for n in program]
        return make_node(
            ops,
            [self.names[p] for p in parents],
            name=self.names[root],
            flows=tuple(p in made and (made[p].owns_state or not made[p].clamped) for p in parents),
            owns_state=root in self.roots,
            parameters=tuple(dict.fromkeys(p for op in ops for p in op.parameters())),
            box=self.roots.get(root, _FREE),
        )


def _names(nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """A readable unique name each: the module's path where there is one, numbered from its second use on."""
    names: dict[fx.Node, str] = {}
    for n in nodes:
        wanted = str(n.target) if n.op in ("call_module", "placeholder") else n.name
        copies = sum(name.partition("#")[0] == wanted for name in names.values())
        names[n] = f"{wanted}#{copies + 1}" if copies else wanted
    return names


def _picked(n: fx.Node) -> int | str | None:
    """Which element of a tuple, dict or record a node reads, None if it does something else."""
    key = n.args[1] if len(n.args) == 2 else None
    if n.target is operator.getitem and isinstance(key, (int, str)):
        return key
    return key if n.target is getattr and isinstance(key, str) and not hasattr(Tensor, key) else None


def _is_dropout(op: Op) -> bool:
    name = type(op.target).__name__ if op.kind == "module" else getattr(op.target, "__name__", op.target)
    return "dropout" in str(name).lower()


def _plain(template: Any, ref: Callable[[fx.Node], Ref]) -> Any:
    """fx's immutable lists and dicts as ordinary ones, its nodes as references."""
    if isinstance(template, fx.Node):
        return ref(template)
    if isinstance(template, (tuple, list)):
        items = [_plain(t, ref) for t in template]
        return items if isinstance(template, list) else tuple(items)
    if isinstance(template, dict):
        return {k: _plain(v, ref) for k, v in template.items()}
    if isinstance(template, slice):
        return slice(*(_plain(t, ref) for t in (template.start, template.stop, template.step)))
    return template
