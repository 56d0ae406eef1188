"""Run the decoder layers of a model one at a time, and find out what runs inside each layer.

A copy of the model, with a `_Recorder` in place of each decoder layer, runs the embeddings, the
masks and the last norm. So this module needs no code per architecture. `Layers.check` rejects a
model whose layers, called one after the other, do not give the output of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import base_layer
from chainlora.errors import ChainError
from chainlora.models.quantizing import is_quantized
from chainlora.models.text_config import base_model, has_parameters, outermost_lists

# Relative to the largest value: rounding of float32 through all layers, or of quantised layers that
# compute in bfloat16.
_TOLERANCE = 1e-3


@dataclass
class Batch:
    """Token rows, padded on the right, between two layers."""

    tokens: Tensor  # [rows, length]
    mask: Tensor  # [rows, length], true for tokens, false for padding
    hidden: Tensor  # [rows, length, width], float32: the input of the next layer
    # further arguments of each layer
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False, default_factory=list)


class Layers:
    """The decoder layers of a causal model, run in float32; `blocks` are the layers by path.

    If the model has several lists of layers, for example for images and text, the list that
    contains most of `modules` is used. Raises ChainError if it has none.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str] = ()) -> None:
        body = base_model(model)
        blocks = _decoder_layers(body, {model.get_submodule(name) for name in modules})
        names = {module: name for name, module in model.named_modules()}
        self.blocks = {names[block]: block for block in blocks}
        self._recorders = [_Recorder(block) for block in blocks]
        memo: dict[int, Any] = {id(b): r for b, r in zip(blocks, self._recorders, strict=True)}
        # float32 parameters are shared with the model, not copied
        memo |= {id(p): p for p in body.parameters() if p.dtype == torch.float32}
        self._shell = deepcopy(body, memo).float().eval()
        self._body, self._device = body, next(model.parameters()).device

    def enter(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Return rows of token ids as a batch before the first layer."""
        longest = max(map(len, rows))
        tokens = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        tokens, mask = tokens.to(self._device), mask.to(self._device)
        for recorder in self._recorders:
            recorder.call = None
        self._run_shell(tokens, mask)
        calls = [recorder.call for recorder in self._recorders]
        if None in calls:
            raise _not_layered(self._body, "layers that are not called exactly once")
        hidden = self._recorders[0].input
        if hidden.shape[:-1] != tokens.shape:
            raise _not_layered(self._body, f"hidden states of sizes {[*hidden.shape]}")
        return Batch(tokens, mask, hidden, calls)  # type: ignore[arg-type]

    def leave(self, batch: Batch) -> Tensor:
        """Return the input of the head [tokens, width] for a batch behind the last layer."""
        last = self._recorders[-1]
        last.output = batch.hidden
        try:
            return self._run_shell(batch.tokens, batch.mask)[batch.mask]
        finally:
            last.output = None

    def _run_shell(self, tokens: Tensor, mask: Tensor) -> Tensor:
        attention_mask = None if bool(mask.all()) else mask.long()
        outputs = self._shell(input_ids=tokens, attention_mask=attention_mask, use_cache=False)
        hidden: Tensor = outputs[0]
        return hidden

    @torch.no_grad()
    def check(self, row: Sequence[int]) -> None:
        """Raise ChainError unless the layers, called in turn, give the output of the model."""
        if self._body.training:
            rule = "the model must be in evaluation mode to combine states"
            raise ChainError(rule, "training mode", "call model.eval()")
        try:
            expected = self._model_output(row)
            batch = self.enter([row])
            for index, block in enumerate(self.blocks.values()):
                with in_float32(block) as exact:
                    batch.hidden = run(exact, batch, index)
            output = self.leave(batch)
        except ChainError:
            raise
        except Exception as error:  # the code of a model may raise any kind of error
            got = f"{type(error).__name__} layer by layer"
            raise _not_layered(self._body, got) from error
        if float((output - expected).abs().max()) > _TOLERANCE * float(expected.abs().max()):
            raise _not_layered(self._body, "other outputs layer by layer")

    def _model_output(self, row: Sequence[int]) -> Tensor:
        """Return the input of the head, with the model's own calls of its layers.

        In float32, since routers may choose other experts in 16 bits.
        """
        tokens = torch.tensor([[*row]]).to(self._device)
        for recorder in self._recorders:
            recorder.runs_layer = True
        try:
            return self._run_shell(tokens, torch.ones_like(tokens).bool())[0]
        finally:
            for recorder in self._recorders:
                recorder.runs_layer = False


class _Recorder(nn.Module):
    """Replaces a decoder layer: records its arguments, and returns its input or a set `output`.

    With `runs_layer`, it returns what the layer returns, in float32.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # no submodule: never copied or cast
        self.tuple_size = 0  # length of the tuple that the layer returns; 0 if it returns a tensor
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.input: Tensor
        self.output: Tensor | None = None
        self.runs_layer = False

    def __getattr__(self, name: str) -> Any:  # some models read attributes of their layers
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden: Tensor, *args: Any, **keys: Any) -> Any:
        self.input, self.call = hidden, (args, keys)
        if self.runs_layer:
            with in_float32(self.block) as exact:
                outputs = exact(hidden, *args, **keys)
            self.tuple_size = len(outputs) if isinstance(outputs, tuple | list) else 0
            return outputs
        output = hidden if self.output is None else self.output
        return (output, *[None] * (self.tuple_size - 1)) if self.tuple_size else output


def run(block: nn.Module, batch: Batch, index: int) -> Tensor:
    """Return the hidden states [rows, length, width] behind layer number `index`."""
    args, keys = batch.calls[index]
    output = block(batch.hidden, *args, **keys)
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


@contextmanager
def in_float32(block: nn.Module) -> Iterator[nn.Module]:
    """Yield a layer with float32 weights: the layer itself, or a copy.

    A link changes outputs by some hundredths; in 16 bits the difference of two outputs would lose
    most of its digits. Quantised modules are not converted.
    """
    exact = deepcopy(block) if [*_other_floats(block)] else block
    for tensor in _other_floats(exact):
        tensor.data = tensor.data.float()
    yield exact


def _other_floats(block: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers of plain modules in another floating dtype than float32."""
    for module in block.modules():
        if not is_quantized(module):
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            yield from (t for t in tensors if t.is_floating_point() and t.dtype != torch.float32)


# --- inside one layer ---


@dataclass(frozen=True)
class LayerStructure:
    """The modules of a layer that run, by path in the layer."""

    groups: list[list[str]]  # modules that share an input, in the order of the forward pass
    # For each module that alone adds to the residual stream, where its output has been added: a
    # module whose input is the stream there, or "" for the output of the layer.
    points: dict[str, str]
    routed: frozenset[str]  # modules that get only some of the tokens, such as experts
    late: frozenset[str]  # modules that run before the point of a module that is solved earlier
    ends: dict[str, tuple[str, int]]  # of modules whose output leaves a submodule: `_ends`


class StopForward(Exception):
    """Ends a forward pass whose remaining part is not needed."""


OutputHook = Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""Computes the output of a linear module from its name, its input and its own forward."""


@contextmanager
def hooked_outputs(block: nn.Module, modules: Sequence[str], hook: OutputHook) -> Iterator[None]:
    """Replace the outputs of linear modules of a layer by those of `hook`."""

    def call(name: str, forward: Callable[[Tensor], Tensor], x: Tensor, *_: Any, **__: Any) -> Any:
        return hook(name, x, forward)

    layers = [(name, base_layer(block.get_submodule(name))) for name in modules]
    with _forwards([(layer, partial(call, name, layer.forward)) for name, layer in layers]):
        yield


@contextmanager
def known_outputs(block: nn.Module, known: Mapping[tuple[str, int], Tensor]) -> Iterator[None]:
    """Let submodules return known outputs; the keys are those of `LayerStructure.ends`."""

    def call(output: Tensor, size: int, *_: Any, **__: Any) -> Any:
        output = output.clone()  # Falcon adds to it in place
        return (output, *[None] * (size - 1)) if size else output

    items = known.items()
    with _forwards([(block.get_submodule(n), partial(call, x, size)) for (n, size), x in items]):
        yield


@contextmanager
def _forwards(forwards: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    before = [vars(module).get("forward") for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), own in zip(forwards, before, strict=True):
            del module.forward  # the method of the class is visible again
            if own is not None:  # accelerate sets a forward on instances
                module.forward = own


@contextmanager
def hooked_inputs(block: nn.Module, hook: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `hook` with the path and the first input of each module that the layer calls."""

    def call(name: str, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            hook(name, args[0])

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            if name:
                hooks.enter_context(module.register_forward_pre_hook(partial(call, name)))
        yield


@torch.no_grad()
def inspect_layer(
    block: nn.Module, modules: Sequence[str], batch: Batch, index: int
) -> LayerStructure:
    """Find out which modules run in a layer and where they write, from a batch of one short row.

    Raises ChainError if one of `modules` runs more than once, or is never called.
    """
    inputs: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        if name in inputs:
            raise ChainError("a combined module must run once", f"more than once: {name}")
        inputs[name] = x
        return forward(x)

    called = [""]
    see = hooked_inputs(block, lambda name, x: called.append(name))
    with hooked_outputs(block, modules, note), see:
        streams = _streams(block, batch, index)
    for name in (name for name in modules if name not in inputs):
        if name.rpartition(".")[0] in called:  # Mamba reads the weight directly
            raise ChainError("a combined module must be called", f"a module never called: {name}")
        inputs[name] = torch.empty(0)  # an expert without tokens of this row
    groups: dict[object, list[str]] = {}
    for name, x in inputs.items():
        key = (x.data_ptr(), x.shape, x.stride()) if x.numel() else name
        groups.setdefault(key, []).append(name)
    routed = _routed(inputs, batch.mask.numel())
    points = {}
    for name, *others in groups.values():
        if others or name in routed:
            continue
        if (point := _write_point(block, name, batch, index, streams)) is not None:
            points[name] = point
    order = [name for group in groups.values() for name in group]
    late = frozenset(_late(order, points, called) - routed)
    ends = _ends(block, [*points], batch, index)
    return LayerStructure([*groups.values()], points, routed, late, ends)


def _late(order: Sequence[str], points: Mapping[str, str], called: Sequence[str]) -> set[str]:
    late: set[str] = set()
    for name, point in points.items():
        before = called[: called.index(point)] if point else called
        late |= {*order[order.index(name) + 1 :]} & {*before}
    return late


def _routed(inputs: Mapping[str, Tensor], count: int) -> frozenset[str]:
    """Return the modules that get only some of the tokens, and all modules in a list with them."""
    partial = {name for name, x in inputs.items() if x.numel() != count * x.shape[-1]}
    lists = {_list_of(name) for name in partial} - {""}
    return frozenset(partial | {name for name in inputs if _list_of(name) in lists})


def _list_of(name: str) -> str:
    """Return the path of the module list that contains a module, or ""."""
    parts = name.split(".")
    index = next((n for n, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:index])


def _streams(block: nn.Module, batch: Batch, index: int) -> dict[str, Tensor]:
    """Return the inputs of modules that have the shape of the residual stream, by module, and the
    output of the layer as ""."""
    inputs: dict[str, list[Tensor]] = {}

    def record(name: str, x: Tensor) -> None:
        inputs.setdefault(name, []).append(x.clone())

    with hooked_inputs(block, record):
        end = run(block, batch, index)
    width, count = end.shape[-1], end.numel()
    once = {name: xs[0] for name, xs in inputs.items() if len(xs) == 1}
    streams = {n: x for n, x in once.items() if x.shape[-1] == width and x.numel() == count}
    return {name: x.view(end.shape) for name, x in streams.items()} | {"": end}


def _write_point(
    block: nn.Module, module: str, batch: Batch, index: int, streams: Mapping[str, Tensor]
) -> str | None:
    """Return the last point where the stream contains exactly the output of a module, else None.

    Runs the layer without that output: the stream must differ by it and by nothing else.
    """
    outputs: list[Tensor] = []

    def leave_out(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        outputs.append(forward(x))
        return torch.zeros_like(outputs[-1])

    with hooked_outputs(block, [module], leave_out):
        without = _streams(block, batch, index)
    if not outputs or outputs[0].numel() != streams[""].numel():
        return None
    added = outputs[0].reshape(streams[""].shape)
    # The sum with the stream was rounded: to 2⁻²⁴ of its largest entry in float32.
    near = [1e-4 * float(added.abs().max()) + 1e-6 * float(x.abs().max()) for x in streams.values()]
    points = [
        name
        for (name, x), tolerance in zip(streams.items(), near, strict=True)
        if name in without and float((x - without[name] - added).abs().max()) <= tolerance
    ]
    return points[-1] if points else None


def _ends(
    block: nn.Module, modules: Sequence[str], batch: Batch, index: int
) -> dict[str, tuple[str, int]]:
    """Return for modules the outermost submodule that returns exactly their output, and the length
    of the tuple that it returns, 0 for a tensor. The other items of the tuple are None."""
    outputs: dict[str, Any] = {}

    def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
        outputs[path] = output

    with ExitStack() as hooks:
        for path, module in block.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(note, path)))
        run(block, batch, index)
    ends: dict[str, tuple[str, int]] = {}
    for name in modules:
        steps = name.split(".")
        for path in (".".join(steps[: count + 1]) for count in range(len(steps))):
            output = outputs.get(path)
            size = len(output) if isinstance(output, tuple) else 0
            first, *others = output if isinstance(output, tuple) else (output,)
            is_alone = all(other is None for other in others)
            if isinstance(first, Tensor) and is_alone and torch.equal(first, outputs[name]):
                ends.setdefault(name, (path, size))
    return ends


def _decoder_layers(body: nn.Module, wanted: Set[nn.Module]) -> list[nn.Module]:
    """Return the decoder layers: the outermost module list with most of the `wanted` modules.

    Lists without weights do not count; of equal lists the longest is returned.
    """
    lists = [layers for layers in outermost_lists(body) if has_parameters(layers)]
    if not lists:
        raise _not_layered(body, "no list of layers")
    return [*max(lists, key=lambda layers: (len(wanted & {*layers.modules()}), len(layers)))]


def outside_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the modules that are in no decoder layer. Raises ChainError for a model without."""
    modules = {model.get_submodule(name): name for name in names}
    layers = _decoder_layers(base_model(model), {*modules})
    inside = {module for layer in layers for module in layer.modules()}
    return [name for module, name in modules.items() if module not in inside]


def _not_layered(body: nn.Module, got: str) -> ChainError:
    rule = "states can be combined only on models that call their decoder layers one by one"
    return ChainError(rule, f"{got}, {type(body).__name__}", "train the stages one after another")
