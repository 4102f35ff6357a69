"""Run one stage: straight-line Python made from its part, forward and backward for one micro-batch."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pipeengine.autograd import Deferral, Replacement, Span, checkpoint_block, checkpoint_module
from pipeengine.rng import RngStreams, place_number
from pipeengine.stages.pieces import Pieces, find_pieces
from pipeengine.stages.splitting import Part, first_index
from pipeengine.tracing import Modes, Node, Rebuilt, Recording, Ref, leaves, node_refs, switch


@dataclass(frozen=True)
class Compiled:
    """A part as a Python function: ``run(*inputs, *received)`` returns the part's ``returns``, as a tuple.

    ``source`` is its text, ``random`` says whether it draws random numbers.
    """

    part: Part
    run: Callable
    source: str
    random: bool
    inputs: tuple[int, ...]                     # positions among the recording's inputs
    needs_gradient: tuple[bool, ...]            # of each received value
    deferral: Deferral | None


def compile_part(part: Part, recording: Recording, model: torch.nn.Module, rng: RngStreams, *,
                 deferrable: Mapping[int, Replacement] | None = None, recompute_spans: Sequence[Span] = (),
                 pieces: Pieces | None = None) -> Compiled:
    """Write and compile the function of one stage; modules are the user's own.

    With ``deferrable``, weight gradients can wait. Nodes in the spans ``recompute_spans`` keep no activations: they run
    again in backward. With ``pieces`` torch compiles what can be.
    """
    deferral = None if deferrable is None else Deferral()
    writer = _Writer(part, recording, model, rng, deferral, deferrable or {}, recompute_spans, pieces)
    source = writer.write()
    scope = writer.scope
    exec(compile(source, f"<stage {part.stage}>", "exec"), scope)
    returned = {v for boundary in part.receives for v in boundary.gradients}
    received = [(v, v in returned) for boundary in part.receives for v in boundary.values]
    position = {value: index for index, value in reversed(list(enumerate(recording.inputs)))}
    return Compiled(part, scope["run"], source, writer.random, tuple(position[v] for v in part.inputs),
                    tuple(wants for _, wants in received), deferral)


@dataclass(frozen=True)
class Block:
    """Nodes that are one function, with the values that they read and those that others read of them: their forward
    runs twice, or they are a ``piece`` that torch compiles."""

    nodes: tuple[Node, ...]
    reads: tuple[int, ...]
    results: tuple[int, ...]
    modes: Modes
    piece: bool = False


class _Writer:
    """Turns nodes into lines of Python."""

    def __init__(self, part: Part, recording: Recording, model: torch.nn.Module, rng: RngStreams,
                 deferral: Deferral | None, deferrable: Mapping[int, Replacement], recompute_spans: Sequence[Span],
                 pieces: Pieces | None = None):
        self._rng, self._pieces = rng, pieces
        self._part, self._recording, self._model = part, recording, model
        self._deferral, self._deferrable, self._recompute_spans = deferral, deferrable, recompute_spans
        self._blocks: list[str] = []
        self.scope: dict[str, object] = {"rng": rng, "leaves": leaves, "recomputed": checkpoint_module,
                                         "twice": checkpoint_block}
        self._globals: dict[int, str] = {}
        self._keep: list[object] = []
        self.random = any(node.random for node in part.nodes)

    def write(self) -> str:
        part = self._part
        arguments = [f"v{v}" for v in (*part.inputs, *(v for boundary in part.receives for v in boundary.values))]
        head, *body = self._function("run", arguments, self._steps(), part.returns)
        return "\n".join([*self._blocks, head, *self._copies(), *body]) + "\n"

    def _copies(self) -> list[str]:
        """Lines that copy the inputs which this part changes: the batch, and what others see, stay as they are."""
        written = {storage for node in self._part.nodes for storage in node.writes}
        return [f"    v{v} = v{v}.clone()" for v in self._part.inputs if self._recording.values[v].storage in written]

    def _steps(self) -> list[Node | Block]:
        """The part's nodes; those of a span that runs twice, or of a piece, together."""
        steps: list[Node | Block | Span] = []
        inside: dict[Span, list[Node]] = {}
        pieces = self._find_pieces()
        later = {id(node) for piece in pieces.values() for node in piece[1:]}
        for node in self._part.nodes:
            if id(node) in pieces:
                steps.append(self._block(pieces[id(node)], piece=True))
            if id(node) in pieces or id(node) in later:
                continue
            index = first_index(self._recording, node)
            span = next((span for span in self._recompute_spans if span[0] <= index < span[1]), None)
            if span is None:
                steps.append(node)
            elif span in inside:
                inside[span].append(node)
            else:
                inside[span] = [node]
                steps.append(span)
        return [self._block(inside[step]) if isinstance(step, tuple) else step for step in steps]

    def _find_pieces(self) -> dict[int, tuple[Node, ...]]:
        """The runs of nodes that torch compiles, by the ``id`` of the first."""
        if self._pieces is None:
            return {}
        places = [(first_index(self._recording, node), node) for node in self._part.nodes]
        twice = {id(node) for index, node in places for start, end in self._recompute_spans if start <= index < end}
        found = find_pieces(self._recording, places, self._model,
                            lambda node: id(node) in twice or bool(node.results) and
                            node.results[0] in self._deferrable)
        return {id(nodes[0]): nodes for nodes in found}

    def _block(self, nodes: Sequence[Node], piece: bool = False) -> Block:
        made = {v for node in nodes for v in node.results}
        own = set(map(id, nodes))
        outside = {v for node in self._part.nodes if id(node) not in own for v in node_refs(node)}
        outside |= set(self._part.returns)
        read = dict.fromkeys(v for node in nodes for v in node_refs(node)
                             if v not in made and self._recording.values[v].kind in ("result", "input"))
        results = dict.fromkeys(v for node in nodes for v in node.results)
        return Block(tuple(nodes), tuple(read), tuple(v for v in results if v in outside),
                     nodes[0].modes if piece else self._recording.modes, piece)

    def _function(self, name: str, arguments: Sequence[str], steps: Sequence[Node | Block],
                  returns: Sequence[int]) -> list[str]:
        lines = [f"def {name}({', '.join(dict.fromkeys(arguments))}):"]
        last = self._last_use(steps, set(arguments), set(returns))
        modes = None
        for index, step in enumerate(steps):
            wanted = step.modes
            if wanted != modes:
                modes = wanted
                if modes != self._recording.modes:
                    lines.append(f"    with {self._name(switch(modes), 'with')}:")
            indent = "    " if modes == self._recording.modes else "        "
            lines += [indent + line for line in (self._node(step) if isinstance(step, Node) else
                                                 self._piece(step) if step.piece else self._twice(step))]
            if last[index]:
                lines.append(f"{indent}del {', '.join(last[index])}")
        return [*lines, f"    return ({''.join(self._value(v) + ', ' for v in returns)})"]

    def _twice(self, block: Block) -> list[str]:
        """A function of its own for the block, and the line that calls it."""
        name, given = f"block{block.nodes[0].call}_{len(self._blocks)}", [f"v{v}" for v in block.reads]
        self._blocks += self._function(name, given, block.nodes, block.results)
        call = f"twice({', '.join([name, 'rng' if any(node.random for node in block.nodes) else 'None', *given])})"
        return [f"{', '.join(f'v{v}' for v in block.results)}, = {call}" if block.results else call]

    def _piece(self, block: Block) -> list[str]:
        """The line that calls the compiled function of a piece."""
        assert self._pieces is not None, "there are pieces where they were asked for"
        writer = _PieceWriter(self._part, self._recording, self._model, self._rng, None, {}, ())
        source, scope = writer.write_piece(block)
        name = self._name(self._pieces.compile(source, "piece", scope), "piece")
        given = [*(self._local(v) for v in block.reads), *map(self._value, writer.tensors),
                 *(self._name(module, "module") for module in writer.modules)]
        return [f"{', '.join(map(self._local, block.results))}, = {name}({', '.join(given)})"] if block.results else []

    def _last_use(self, steps: Sequence[Node | Block], kept: set[str], returned: set[int]) -> list[list[str]]:
        """For every step, the local names that nobody needs after it."""
        last: dict[int, int] = {}
        for index, step in enumerate(steps):
            for value in (*step.results, *(node_refs(step) if isinstance(step, Node) else step.reads)):
                if self._recording.values[value].kind == "result" and value not in returned \
                        and self._local(value) not in kept:
                    last[value] = index
        names: list[list[str]] = [[] for _ in steps]
        for value, index in last.items():
            names[index].append(self._local(value))
        return names

    def _node(self, node: Node) -> list[str]:
        lines = [f"rng({place_number(node.name)})"] if node.random else []
        call = self._call(node)
        if not node.results:
            return [*lines, call]
        if node.picks == ("",):
            return [*lines, f"{self._local(node.results[0])} = {call}"]
        lines.append(f"t = {call}")
        if any(pick.startswith("@") for pick in node.picks):
            lines.append("t = leaves(t)")
        lines += [f"{self._local(value)} = t[{pick.strip('@[]')}]" for value, pick in zip(node.results, node.picks)]
        return [*lines, "del t"]

    def _call(self, node: Node) -> str:
        if node.results and node.results[0] in self._deferrable:
            method, given = self._deferrable[node.results[0]]
            self.scope["deferral"] = self._deferral
            return f"deferral.{method}({', '.join(map(self._expression, given))})"
        if node.is_module:
            target = self._name(self._model.get_submodule(node.target), "module")
        else:
            target = self._name(node.target, "f")
        arguments = [self._expression(a) for a in node.args]
        plain = {k: v for k, v in node.kwargs.items() if k.isidentifier()}
        arguments += [f"{key}={self._expression(value)}" for key, value in plain.items()]
        if len(plain) != len(node.kwargs):
            rest = {k: v for k, v in node.kwargs.items() if k not in plain}
            arguments.append(f"**{self._expression(rest)}")
        if node.recompute:
            return f"recomputed({', '.join([target, *arguments])})"
        return f"{target}({', '.join(arguments)})"

    def _value(self, value: int) -> str:
        made = self._recording.values[value]
        if made.kind == "attribute":
            owner, _, name = made.name.rpartition(".")
            module = self._model.get_submodule(owner)
            table = "_parameters" if name in module._parameters else "_buffers"
            return f"{self._name(module, 'module')}.{table}[{name!r}]"
        if made.kind == "constant":
            return self._name(self._recording.constants[value], "constant")
        return self._local(value)

    def _local(self, value: int) -> str:
        return f"v{value}"

    def _expression(self, value: object) -> str:
        if isinstance(value, Ref):
            return self._value(value.value)
        if isinstance(value, Rebuilt):
            return f"{self._name(value.build, 'build')}([{', '.join(map(self._expression, value.parts))}])"
        if type(value) is tuple:
            return f"({''.join(self._expression(item) + ', ' for item in value)})"
        if type(value) is list:
            return f"[{', '.join(map(self._expression, value))}]"
        if type(value) is dict:
            return "{" + ", ".join(f"{self._expression(k)}: {self._expression(v)}" for k, v in value.items()) + "}"
        if type(value) is slice:
            return f"slice({', '.join(self._expression(x) for x in (value.start, value.stop, value.step))})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        return self._name(value, "c")

    def _name(self, thing: object, kind: str) -> str:
        name = self._globals.get(id(thing))
        if name is None:
            name = self._globals[id(thing)] = f"{kind}{len(self._globals)}"
            self.scope[name] = thing
        return name


class _PieceWriter(_Writer):
    """Writes a piece as a function whose text is the same for alike pieces: values are numbered as they come, tensors
    of the model (``tensors``, as values) and modules (``modules``) are arguments."""

    def write_piece(self, block: Block) -> tuple[str, dict[str, object]]:
        """The text of ``piece(*reads, *tensors, *modules)``, and the functions and constants in its scope."""
        self._numbers: dict[int, str] = {}
        self.tensors: list[int] = []
        self.modules: list[torch.nn.Module] = []
        self.scope = {}
        reads = [self._local(v) for v in block.reads]
        lines = [line for node in block.nodes for line in self._node(node)]
        results = "".join(f"{self._local(v)}, " for v in block.results)
        arguments = [*reads, *(f"p{i}" for i in range(len(self.tensors))), *(f"m{i}" for i in range(len(self.modules)))]
        text = "\n    ".join([f"def piece({', '.join(arguments)}):", *lines, f"return ({results})"])
        return text + "\n", self.scope

    def _local(self, value: int) -> str:
        return self._numbers.setdefault(value, f"v{len(self._numbers)}")

    def _value(self, value: int) -> str:
        if self._recording.values[value].kind not in ("attribute", "constant"):
            return self._local(value)
        if value not in self.tensors:
            self.tensors.append(value)
        return f"p{self.tensors.index(value)}"

    def _call(self, node: Node) -> str:
        call, name = super()._call(node), getattr(node.target, "__name__", "")
        if node.is_module or not name.isidentifier() or not node.args or not isinstance(node.args[0], Ref) \
                or getattr(torch.Tensor, name, None) is not node.target:
            return call
        # torch.compile follows methods that are called on a tensor, but not all when they are called as functions.
        first, _, rest = call.partition("(")[2].partition(", ")
        return f"{first}.{name}({rest}" if rest else f"{first.removesuffix(')')}.{name}()"

    def _name(self, thing: object, kind: str) -> str:
        if not isinstance(thing, torch.nn.Module):
            return super()._name(thing, kind)
        number = next((i for i, module in enumerate(self.modules) if module is thing), len(self.modules))
        if number == len(self.modules):
            self.modules.append(thing)
        return f"m{number}"
