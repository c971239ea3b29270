"""What a recorded graph says: which operations need a state, and which merely feed them.

A **node** is an operation that reads parameters, together with the parameter-free operations that feed it; it owns a
state, and so does the output. A parameter-free value that several nodes read becomes a **junction**: computed once, no
state. Expressions of parameters alone belong to the nodes that use them.

    linear -> relu -> linear           nodes: (linear) (relu, linear)
    h = fc1(x);  fc2(h) + h            nodes: (fc1) (fc2) (add: the output)

A state has the examples as rows. What reads parameters and has none (a batch mean, weights that are computed from the
input, integers) is computed anew within every node that reads it.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from mep.capture.export import Exported
from mep.capture.functional import source_line
from mep.capture.rewriting import act_on_rows, in_few_forms, insert_state_on_rows, label, value
from mep.capture.whole import KeptModule, Whole
from mep.errors import TraceError
from mep.graph.closed_forms import FREE_STATE, Potential, activation_of, pool_of
from mep.graph.closed_forms.activations import own_state
from mep.graph.closed_forms.potentials import SOFTMAXES, softmax_of
from mep.graph.graph import CostProgram, Graph, Write
from mep.graph.inputs import flattened, input_names
from mep.graph.node import Node, make_node
from mep.graph.ops import Op, Program, Ref, Slot, leaves_of

_SHAPE_ONLY = {
    "ones_like", "zeros_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like", "new_zeros",
    "new_ones", "new_empty", "new_full", "sym_size", "sym_numel", "sym_stride",
}  # fmt: skip
"""Operations whose result does not depend on the numbers that they are given."""
_PRODUCTS = {"mul", "div", "matmul", "mm", "bmm", "baddbmm", "addbmm", "einsum", "dot", "mv", "addcmul", "linear"}
_WEIGHTED = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
"""Whole courses of recurrent layers, in one operation."""
_LINEAR = {"add", "sub", "rsub", "neg", "mul", "div", "positive", "where", "masked_fill", "sign", "sgn", *_SHAPE_ONLY}
"""Pointwise operations that are affine in one argument, or flat."""
_CURVED = {
    *SOFTMAXES, "log_softmax", "_log_softmax", "special_log_softmax", "scaled_dot_product_attention", "_attention",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "glu", "logsumexp", "log_sigmoid", "hardswish",
    *_RECURRENT,
}  # fmt: skip
"""Nonlinearities of several units, and others that are not marked as pointwise."""
_SHAPES = {"reshape", "transpose", "permute", "squeeze", "unsqueeze"}
"""Operations that only arrange numbers, each of them once."""


class Reading:
    """A recorded graph on its way to nodes: `roots` are the values with a state, and their energies by themselves."""

    def __init__(self, exported: Exported, model: nn.Module, x: Any):
        self.exported, self.model, self.fx, self.slots = exported, model, exported.graph, exported.slots
        leaves, self.structure = flattened(x)
        named = zip(input_names(model, x), leaves, strict=True)
        tensors = iter(exported.inputs)
        self.leaves = tuple(Ref(name) if isinstance(v, Tensor) else v for name, v in named)
        self.inputs = {next(tensors): ref.name for ref in self.leaves if isinstance(ref, Ref)}
        self.batch = _number(value(exported.inputs[0]).shape[0])
        in_few_forms(self.fx, exported.inputs)
        self.placed: set[fx.Node] = set()
        """Operations that read parameters, behind which a state was put, since their own value has none."""
        self.read()

    def read(self) -> None:
        """Read the graph as it stands now; states are put where operations that read parameters have none."""
        self.nodes = [n for n in self.fx.nodes if n.op == "call_function"]
        self.data: dict[fx.Node, bool] = dict.fromkeys(self.inputs, True)
        """Whether a value depends on an input."""
        self.parametrised = {n: isinstance(slot.value, nn.Parameter) for n, slot in self.slots.items()}
        """Whether an operation reads parameters, itself or by expressions of parameters alone."""
        self.needed: set[fx.Node] = set()
        self.output: fx.Node
        self.by_example: set[fx.Node] = set()
        self.roots: dict[fx.Node, Potential] = {}
        self.stateless: list[fx.Node] = []
        self.junctions: set[fx.Node] = set()
        in_cost: set[fx.Node] = set()
        for n in self.nodes:
            reads = [] if label(n) in _SHAPE_ONLY else n.all_input_nodes
            self.data[n] = isinstance(value(n), (Tensor, tuple, list, type(None))) and any(map(self._is_data, reads))
            self.parametrised[n] = any(self.parametrised.get(a, False) and not self._is_data(a) for a in reads)
            if n.target is operator.getitem:
                self.parametrised[n] = self.parametrised.get(n.args[0], False)
            if self._is_by_example(n):
                self.by_example.add(n)
            # The parameters of the cost have their gradient from it alone; noise is drawn in the model's order.
            if self._is_of_the_cost(n) or any(a in in_cost for a in n.all_input_nodes):
                in_cost.add(n)
            elif (self.data[n] and self.parametrised[n] and self._can_be_state(n)) or n.target is own_state:
                self.roots[n] = FREE_STATE
            elif self._is_random(n) and not isinstance(value(n), (tuple, list)):
                self.junctions.add(n)
        # Sequences first, [time, batch, features]: states stand where the examples are the rows.
        inside = [n for n in self.nodes if self._is_inside(n) and n not in in_cost]
        placed = [self._put_state_behind(n) for n in inside]
        if any(placed):
            self.read()
            return
        self.names = self._names()
        self._find_output()
        self.ops = {n: self._op(n) for n in self.nodes}
        inside += [n for n in self.nodes if label(n) in _RECURRENT and self.parametrised[n] and self.data[n]]
        self.inside = [n for n in inside if n in self.needed and n.target is not operator.getitem]
        """Operations whose parameters learn by backpropagation inside a node: no state is between them and others, or
        between the steps of a recurrent layer."""

    def _is_inside(self, n: fx.Node) -> bool:
        """Whether an operation reads parameters, and neither it nor what follows from it alone has a state."""
        results = list(n.users) if isinstance(value(n), (tuple, list)) else [n]
        has_state = n in self.placed or any(r in self.roots or r in self.placed for r in results)
        is_result = n.target is operator.getitem and not (isinstance(t := value(n), Tensor) and t.is_floating_point())
        return self.data[n] and self.parametrised[n] and not has_state and not is_result

    def _put_state_behind(self, n: fx.Node) -> bool:
        """Put a state on the first value behind an operation that has the examples in one of its dimensions.

        Between the two only numbers are arranged, or changed one by one.
        """
        if self._is_random(n):  # what reads other results of it would draw anew
            return False
        at = n
        while (dim := self._dim_of_examples(at)) is None:
            user = next(iter(at.users))
            is_pointwise = torch.Tag.pointwise in getattr(user.target, "tags", ()) and len(user.all_input_nodes) == 1
            if len(at.users) != 1 or not (is_pointwise or label(user) in _SHAPES):
                return False
            at = user
        self.placed.add(n)
        insert_state_on_rows(at, dim)
        return True

    def _dim_of_examples(self, n: fx.Node) -> int | None:
        """The only dimension of a value that has the symbol of the batch for its size."""
        t = value(n)
        if isinstance(self.batch, int) or not isinstance(t, Tensor) or not t.is_floating_point():
            return None
        dims = [dim for dim, size in enumerate(t.shape) if str(size) == str(self.batch)]
        return dims[0] if len(dims) == 1 else None

    def conditions(self) -> tuple[Any, ...]:
        """Relations between free sizes on which forward, torch or the reading has decided so far."""
        given = (*self.exported.inputs, *self.exported.targets)
        free = [size for n in given for size in value(n).shape if isinstance(size, torch.SymInt)]
        if not free:
            return ()
        env = free[0].node.shape_env  # of sizes that were found to be equal, one symbol stands for all
        return tuple(dict.fromkeys(env.replace(guard.expr) for guard in env.guards))

    def data_ops(self) -> list[fx.Node]:
        """The operations whose value depends on an input, not merely on its shape."""
        return [n for n in self.nodes if self.data[n] and n in self.needed]

    def graph(self) -> Graph:
        """Fold what feeds one node into it, make a junction of what feeds several, and connect."""
        # Where a node begins: at states, and at values that several nodes read.
        self._find_junctions()
        chosen = [n for n in self.nodes if (n in self.roots or n in self.junctions) and n in self.needed]
        # What it computes: everything between those before it and itself. What is in several is computed several times.
        folded = {n: self._closure([n], set(chosen) - {n}) for n in chosen}
        draws = Counter(n for program, _ in folded.values() for n in program if self._is_random(n))
        for n, times in draws.items():
            if times > 1:
                raise TraceError(
                    f"{self.place(n)} draws random numbers, and several nodes read it for which no state can stand. "
                    "Way out: keep the module that draws them and what reads it whole, leaves=(ThatModule,)."
                )
        attached, apart = self._writes(folded)
        made: dict[fx.Node, Node] = {}
        for n, (program, parents) in folded.items():
            writes = attached.get(n, [])
            extra = self._closure([v for v, _ in writes], {*parents, *program})[0] if writes else []
            # A force flows to what is read for its numbers, unless that never moves.
            read = {a for m in program if label(m) not in _SHAPE_ONLY for a in m.all_input_nodes}
            moving = [p in made and p in read and (made[p].owns_state or not made[p].clamped) for p in parents]
            made[n] = make_node(
                [self.ops[m] for m in (*program, *extra)],
                [self.names[p] for p in parents],
                op=self.names[n],
                name=self.names[n],
                flows=tuple(moving),
                owns_state=n in self.roots,
                parameters=self._parameters(program),
                writes=tuple((slot, self.names[v]) for v, slot in writes),
                potential=self.roots.get(n, FREE_STATE),
                shape=tuple(value(n).shape) if isinstance(value(n), Tensor) else (),
            )
        within, _ = self._closure(self.inside, {a for n in self.inside for a in n.all_input_nodes if self._is_data(a)})
        kept = dict.fromkeys(p for module in self.exported.kept for p in module.parameters())
        kept |= dict.fromkeys(self._parameters(within))
        return Graph(
            model=self.model,
            inputs=tuple(self.inputs.values()),
            nodes=tuple(made.values()),
            output=self.names[self.output],
            structure=self.structure,
            leaves=self.leaves,
            writes=tuple(apart),
            cost=self.cost,
            kept=tuple(kept),
            sizes=self.exported.sizes,
            conditions=self.conditions(),
            stateless=tuple(
                f"`{label(m)}` in node `{self.names[n]}`" + (f" ({line})" if (line := source_line(m)) else "")
                for n, (program, _) in folded.items()
                for m in program
                if m in self.stateless or m in self.inside
            ),
        )

    def move_states_behind_activations(self) -> None:
        """The input of every activation becomes a root with the activation's own energy; nothing else is one.

        The activation itself is gone: the state is what it returned. Nonlinear operations of which this does not hold
        are noted as `stateless`: the prediction of some node goes through them.
        """
        moved = [self._act_on_rows(n) for n in self.data_ops()]
        if any(moved):
            self.read()
        self.roots = {}
        for n in self.data_ops():
            potential = self._potential(n)
            if potential is None:
                self.stateless += [n] if self._is_curved(n) else []
                continue
            before = n.all_input_nodes[0]
            if before in self.roots and not (potential == self.roots[before] and potential.is_identity):
                raise TraceError(
                    f"The Hopfield energy has one state for {self.place(before)}, and two activations in a row, the "
                    f"second in {self.place(n)}, would be two. Leave one out, or use the energy 'prediction'."
                )
            if before.op == "placeholder":
                raise TraceError(
                    f"The Hopfield energy has no state before {self.place(n)}, which reads an input. Way out: apply it "
                    "to the data, before the model."
                )
            if len([u for u in before.users if u in self.needed]) > 1:
                raise TraceError(
                    f"The Hopfield energy cannot read {self.place(before)} both before and behind {self.place(n)}. "
                    "Use the energy 'prediction'."
                )
            self.roots[before] = potential
            self.output = before if n is self.output else self.output
            n.replace_all_uses_with(before)
            self.nodes.remove(n)
            self.fx.erase_node(n)
        self.roots.setdefault(self.output, FREE_STATE)
        self.ops = {n: self._op(n) for n in self.nodes}

    def _act_on_rows(self, n: fx.Node) -> bool:
        """Give an activation its input with the examples as rows, if they are in another dimension."""
        activation, before = self.ops[n].activation, n.all_input_nodes[0] if n.all_input_nodes else None
        if activation is None or activation.name == "identity":
            return False
        if before is None or before.op == "placeholder" or before in self.by_example:
            return False
        dim = self._dim_of_examples(before)
        if dim is None:
            raise TraceError(
                f"A Hopfield network has a state before {self.place(n)}, and there the rows are not the examples: a "
                f"value of shape {tuple(value(before).shape)}. Way out: several rows of one example one after another, "
                "torch.stack([a, b], 1).flatten(0, 1) and not torch.cat([a, b]); or the energy 'prediction'."
            )
        act_on_rows(n, dim)
        return True

    def _potential(self, n: fx.Node) -> Potential | None:
        """The energy of the state that an operation returns, if it is an activation with a state."""
        op = self.ops[n]
        if op.activation is None:
            softmax = softmax_of(op.label, op.args[1:], op.kwargs, value(n).ndim) if op.label in SOFTMAXES else None
            return None if softmax is None or self._is_multiplied(n) else softmax
        if op.activation.name == "identity":
            return None
        if op.activation.potential is None:
            raise TraceError(
                f"The Hopfield energy needs the inverse of an activation, and {self.place(n)} ({op.activation.name}) "
                "has none here. Use ReLU, ReLU6, Hardtanh, Hardsigmoid, clamp, Sigmoid, Tanh, Softplus (threshold 20 "
                "at least) or Softmax, or the energy 'prediction'."
            )
        return op.activation.potential

    def _is_multiplied(self, n: fx.Node) -> bool:
        """Whether a value is multiplied with another one, before it enters a layer: as the weights of attention are."""
        waiting = list(n.users)
        while waiting:
            u = waiting.pop()
            moving = [a for a in u.all_input_nodes if self._is_data(a)]
            if u not in self.needed:
                continue
            if label(u) in _PRODUCTS and len(moving) > 1:
                return True
            if label(u) not in _WEIGHTED and self.ops[u].activation is None:
                waiting += u.users
        return False

    def _is_curved(self, n: fx.Node) -> bool:
        """Whether an operation is a nonlinear one like activations, softmax, attention and recurrent layers."""
        is_pointwise = torch.Tag.pointwise in getattr(n.target, "tags", ())
        moving = [a for a in n.all_input_nodes if self._is_data(a)]
        t = value(n)
        is_alone = is_pointwise and len(moving) == 1 and isinstance(t, Tensor) and t.is_floating_point()
        return label(n) in _CURVED or (is_alone and label(n) not in _LINEAR and self.ops[n].activation is None)

    def place(self, n: fx.Node) -> str:
        """The name of a value and the innermost line of the user's that made it."""
        line = source_line(n)
        return f"node `{self.names.get(n, n.name)}`" + (f" ({line})" if line else "")

    def _is_of_the_cost(self, n: fx.Node) -> bool:
        paths = [path for path, _ in (n.meta.get("nn_module_stack") or {}).values()]
        paths = [path for path in paths if not path.startswith("_empty")]  # of sizes, torch does not say
        return bool(paths) and self.exported.cost is not None and not any(p.split(".")[0] == "model" for p in paths)

    def _is_data(self, n: fx.Node) -> bool:
        return self.data.get(n, False)

    def _is_random(self, n: fx.Node) -> bool:
        tags = getattr(n.target, "tags", ())
        if n.target is operator.getitem and isinstance(n.args[0], fx.Node):
            return self._is_random(n.args[0])
        if "scaled_dot_product" in label(n):
            return any(isinstance(a, float) and a > 0 for a in n.args[4:5]) or bool(n.kwargs.get("dropout_p"))
        if label(n) in _RECURRENT:
            return bool(n.args[5] and n.args[6])  # the probability of dropout, and whether it trains
        return torch.Tag.nondeterministic_seeded in tags and not (label(n) == "dropout" and not n.args[2])

    def _can_be_state(self, n: fx.Node) -> bool:
        """Whether a value has real numbers and the examples as rows, as far as sizes tell."""
        if n.target is operator.getitem and self._is_random(n):
            several: Any = n.args[0]
            if not all(map(self._has_examples, several.users)):
                return False  # whatever reads the other results would draw anew
        return n in self.by_example and self._has_examples(n)

    def _has_examples(self, n: fx.Node) -> bool:
        """Whether sizes allow that the rows are examples."""
        t = value(n)
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.ndim == 0:
            return False
        rows = _number(t.shape[0])
        if isinstance(self.batch, int):
            return isinstance(rows, int) and rows % self.batch == 0
        batch = self.batch.node.expr
        return isinstance(rows, torch.SymInt) and batch not in (rows.node.expr / batch).as_numer_denom()[1].free_symbols

    def _is_by_example(self, n: fx.Node) -> bool:
        """Whether the rows of an example are neighbours: they are the examples, or have come from such by a reshape."""
        t = value(n)
        if isinstance(t, (tuple, list)):
            return True
        if not isinstance(t, Tensor) or t.ndim == 0:
            return False
        rows = str(t.shape[0])
        if rows == str(self.batch):
            return True
        read = [a for a in n.all_input_nodes if isinstance(u := value(a), Tensor) and u.ndim and self._is_data(a)]
        kept = [a for a in read if str(value(a).shape[0]) == rows]
        if kept:
            return all(a in self.by_example for a in kept)
        is_reshape = label(n) in ("reshape", "flatten", "view", "_unsafe_view")
        return is_reshape and all(str(value(a).shape[0]) == str(self.batch) for a in read)

    def _find_output(self) -> None:
        """The value whose state is nudged, and the program of the cost where that reads more than output and target."""
        self.cost: CostProgram | None = None
        result = self._result()
        if self.exported.cost is not None:
            self._find_cost(self.exported.cost, result)
        else:
            assert result is not None
            self.output = result
        self.roots[self.output] = FREE_STATE
        self.junctions -= self.roots.keys()
        written = [n for n, _ in self.exported.writes if n.op == "call_function"]
        beside = self._closure(written, self.roots.keys() | self.junctions)[1]
        self.needed = set(self._closure([self.output, *beside], set())[0])

    def _find_cost(self, cost: fx.Node, result: fx.Node | None) -> None:
        """All states that the cost reads, side by side, are the output; what else it reads is given to its program."""
        if result is not None:
            self.roots[result] = FREE_STATE
        noise = {n for n in self.junctions if n in self.by_example and self._has_examples(n)}
        crossing = self.roots.keys() | noise
        program, reads = self._closure([cost], crossing)
        states, others = [n for n in reads if n in crossing], [n for n in reads if n not in crossing]
        if not states:
            name, read = type(self.model).__name__, [n for n in program if self.data[n] and self.parametrised[n]]
            if not read:
                raise TraceError(f"The cost does not depend on what {name} computes.")
            raise TraceError(
                f"Cannot read {name}: no value that reads parameters has the examples as rows, so that none can have a "
                f"state; the first is {self.place(read[0])}, of shape {tuple(value(read[0]).shape)}. Way out: several "
                "rows of one example one after another, torch.stack([a, b], 1).flatten(0, 1) and not torch.cat([a, b])."
            )
        for n in filter(self._is_random, program):
            raise TraceError(
                f"The cost draws random numbers: {self.place(n)}. Way out: draw them in the model, which returns "
                "them, or before the step, as part of the target."
            )
        self.output, join = states[0], None
        if len(states) > 1 or str(value(self.output).shape[0]) != str(self.batch):  # or several rows an example
            join = Join()
            with self.fx.inserting_before(self.fx.output_node()):
                given = (self.exported.inputs[0], *states)
                self.output = self.fx.create_node("call_function", join, given, name="joined")
            first = value(states[0])
            self.output.meta["val"] = first.flatten(1) if first.ndim > 1 else first
            self.nodes.append(self.output)
            self.names[self.output], self.data[self.output], self.parametrised[self.output] = "joined", True, False

        # One number for each example, from output and target alone, is what a cost function computes anyway.
        parameters = self._parameters(program)
        is_plain = self.output is result and not parameters and value(cost).ndim == 1
        if is_plain and not any(n in self.inputs or n in self.junctions for n in (*reads, *program)):
            return
        names = [self.names[n] for n in (*states, *others)]
        run = Program([self._op(n) for n in program], names, [self.names[cost]], "the cost")
        targets = self.exported.targets
        inputs = tuple(("target", targets.index(n)) if n in targets else self.inputs[n] for n in others)
        self.cost = CostProgram(run, join, inputs, parameters)

    def _result(self) -> fx.Node | None:
        """The one tensor that the model returns; None where the cost takes something else from it."""
        structure, are_tensors = self.exported.structure
        outputs = self.exported.outputs
        n: fx.Node | None = outputs[0] if structure.is_leaf() and outputs else None
        has_cost = self.exported.cost is not None
        if n is None and not has_cost:
            n = self._logits(structure, are_tensors)
        usable = n is not None and n.op == "call_function" and self._is_data(n) and self._can_be_state(n)
        if usable or has_cost:
            return n if usable else None
        kind = getattr(structure.type, "__name__", "structure")
        got = f"a {kind} of {sum(are_tensors)} tensors"
        if n is not None:
            got = f"a tensor of shape {tuple(value(n).shape)}, {value(n).dtype}"
        raise TraceError(
            f"Cannot read {type(self.model).__name__}: forward returns {got}; the output must be one tensor of real "
            "numbers, computed from the input, with the examples as rows, as the first tensor of the input has them. "
            "Way out: a cost that takes what it needs, cost=lambda out, y: ..., or a module around the model that "
            "returns that tensor; inputs by name, one with examples as rows first, x={'name': ..., 'other': ...}; "
            "several rows of one example side by side, torch.stack([a, b], 1).flatten(0, 1) and not torch.cat([a, b])."
        )

    def _logits(self, structure: Any, are_tensors: Sequence[bool]) -> fx.Node | None:
        """The entry "logits" of a dictionary or record."""
        keys = getattr(structure, "context", None)
        keys = keys[1] if isinstance(keys, (tuple, list)) and len(keys) == 2 and isinstance(keys[1], list) else keys
        if not isinstance(keys, (list, tuple)) or "logits" not in keys:
            return None
        before = sum(structure.child(i).num_leaves for i in range(list(keys).index("logits")))
        return self.exported.outputs[sum(are_tensors[:before])]

    def _closure(self, ends: Sequence[fx.Node], stops: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        """The operations from `stops` and inputs to the ends, in order, and which of those they read, in order."""
        program: set[fx.Node] = set()
        reads: set[fx.Node] = set()
        stack = list(ends)
        while stack:
            n = stack.pop()
            if n in program:
                continue
            if n in stops or n.op == "placeholder":
                reads.add(n)
            else:
                program.add(n)
                stack += n.all_input_nodes
        return sorted(program), sorted(n for n in reads if n not in self.slots)

    def _parameters(self, program: Iterable[fx.Node]) -> tuple[nn.Parameter, ...]:
        """Those that a program reads for their numbers."""
        read = [a for n in program if label(n) not in _SHAPE_ONLY for a in n.all_input_nodes]
        values = [self.slots[a].value for a in read if a in self.slots]
        return tuple(dict.fromkeys(p for p in values if isinstance(p, nn.Parameter)))

    def _find_junctions(self) -> None:
        """Walk backwards, noting which roots each operation feeds. What carries parameters is repeated, not shared."""
        # A value carries parameters if its node's own gradient flows through it.
        carries: dict[fx.Node, bool] = {}
        for n in self.nodes:
            folded = [a for a in n.all_input_nodes if a not in self.roots and self._is_data(a)]
            carries[n] = self.parametrised[n] or any(carries.get(a, False) for a in folded)
        self.junctions = {n for n in self.junctions if not carries.get(n, False)}
        # The roots, and junctions found by then, that read an operation, directly or through what is folded into them.
        feeds: dict[fx.Node, set[fx.Node]] = {}
        for n in reversed(self.nodes):
            if n not in self.needed:
                continue
            users = [u for u in n.users if u in self.needed]
            fed = {o for u in users for o in ({u} if u in self.roots else feeds.get(u, {u}))}
            unpacked = isinstance(value(n), (tuple, list))
            shared = self.data[n] and len(fed) > 1
            if shared and n not in self.roots and not carries[n] and not unpacked:
                self.junctions.add(n)
            feeds[n] = {n} if n in self.junctions else fed
        self.junctions &= self.needed

    def _writes(
        self, folded: dict[fx.Node, tuple[list[fx.Node], list[fx.Node]]]
    ) -> tuple[dict[fx.Node, list[tuple[fx.Node, Slot]]], list[Write]]:
        """New buffer values: by the node that computes them beside its own (batch normalisation), and those apart."""
        attached: dict[fx.Node, list[tuple[fx.Node, Slot]]] = {}
        apart: list[Write] = []
        for v, slot in self.exported.writes:
            program, reads = self._closure([v], set(folded))
            several = {n for n in program if isinstance(value(n), (tuple, list))}  # batch normalisation
            homes = [n for n, (own, _) in folded.items() if several & set(own)]
            beside = {*folded[homes[-1]][0], *folded[homes[-1]][1]} if homes else set()
            if homes and beside.issuperset(self._closure([v], beside)[1]):
                attached.setdefault(homes[-1], []).append((v, slot))
                continue
            names = [self.names[n] for n in reads]
            run = Program([self.ops[n] for n in program], names, [self.names[v]], "a buffer")
            apart.append(Write(run, tuple(names), (slot,)))
        return attached, apart

    def _names(self) -> dict[fx.Node, str]:
        """A readable unique name each: the path of torch's module where there is one, numbered from use 2 on."""
        names: dict[fx.Node, str] = {n: name for n, name in self.inputs.items()}
        names |= {n: f"target_{i}" for i, n in enumerate(self.exported.targets)}
        copies: Counter[str] = Counter(names.values())
        for n in sorted(self.nodes, key=lambda n: n not in self.roots):  # states first; the order stays else
            path, kind = self._module(n)
            is_result = self.data[n] and isinstance(value(n), (Tensor, type(None)))
            is_torchs = kind.startswith(("torch.nn.modules", KeptModule.__module__))
            wanted = path if path and is_result and is_torchs else n.name
            if copies[wanted] and n not in self.roots:
                wanted = f"{wanted}/{n.name}"
            copies[wanted] += 1
            names[n] = wanted if copies[wanted] == 1 else f"{wanted}#{copies[wanted]}"
        return names

    def _module(self, n: fx.Node) -> tuple[str, str]:
        """The path and the type of the innermost module that made a call."""
        stack = n.meta.get("nn_module_stack") or (
            n.args and isinstance(n.args[0], fx.Node) and n.args[0].meta.get("nn_module_stack")
        )
        if not stack:
            return "", ""
        path, kind = list(stack.values())[-1]
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        return path.removeprefix("model").removeprefix("."), name

    def _op(self, n: fx.Node) -> Op:
        """The operation that was recorded, with its closed form if it has one."""
        args, kwargs = self._plain(n.args), self._plain(dict(n.kwargs))
        op = Op(self.names[n], n.target, args, kwargs, module=self._module(n)[0], where=source_line(n))  # type: ignore[arg-type]
        if isinstance(n.target, Whole):
            return replace(op, whole=True)
        if not args or not isinstance(args[0], Ref) or [*leaves_of((args[1:], kwargs), (Ref, Slot))]:
            return op
        if not isinstance(value(n), Tensor) or not value(n).is_floating_point():
            return op
        given = op.label, args[1:], kwargs
        return replace(op, activation=activation_of(*given), pool=pool_of(*given))

    def _plain(self, template: Any) -> Any:
        """fx's immutable lists and dicts as ordinary ones, its nodes as references and slots."""
        if isinstance(template, fx.Node):
            return self.slots.get(template) or Ref(self.names[template])
        if isinstance(template, (tuple, list)):
            items = [self._plain(t) for t in template]
            return items if isinstance(template, list) else tuple(items)
        if isinstance(template, dict):
            return {k: self._plain(v) for k, v in template.items()}
        return template


def _number(size: Any) -> Any:
    """A size; a symbol that was found to be a number is that."""
    return int(size) if isinstance(size, torch.SymInt) and not size.node.expr.free_symbols else size


class Join:
    """Values of the model side by side, example by example, and how they are taken apart again."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        """Of the values when they were last joined: rows an example, and what a row is."""

    def __call__(self, x: Tensor, *values: Tensor) -> Tensor:
        """`[batch, numbers]`; x has the batch as its first dimension."""
        self.shapes = [(len(v) // len(x), *v.shape[1:]) for v in values]
        return torch.cat([v.reshape(len(x), -1) for v in values], 1)

    def split(self, joined: Tensor) -> list[Tensor]:
        """The values."""
        sizes = [math.prod(shape) for shape in self.shapes]
        parts = zip(joined.split(sizes, 1), self.shapes, strict=True)
        return [part.reshape(len(joined) * rows, *shape) for part, (rows, *shape) in parts]
