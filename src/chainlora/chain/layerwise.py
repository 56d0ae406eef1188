"""The decoder layers of a model one at a time: what each is called with, and what runs inside it.

Embeddings, masks and the norm at the end are the model's own: they run in a copy of it in which a
`_Recorder` stands for each decoder layer. So no architecture is written down here, and `Layers`
refuses a model whose layers, called one after the other, give anything but what the model gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chainlora.chain.adapters import base_layer
from chainlora.errors import ChainError
from chainlora.models.quantizing import is_quantized
from chainlora.models.text_config import base_model

_EQUAL = 1e-3  # of the largest value: float32 through all layers, and quantised layers in bfloat16


@dataclass
class Batch:
    """Token rows of one part, padded on the right, on their way through the layers.

    `inside` (rows × length) is true for tokens; `hidden` (rows × length × width, float32) enters
    the next layer, and `calls` are its further arguments, by layer.
    """

    tokens: Tensor
    inside: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False, default_factory=list)


class Layers:
    """The decoder layers of a causal model, whose weights are in float32 or become so in copies.

    `blocks` are their paths in the model. Of several lists of layers, as a model of images and text
    has, that one is taken which holds most of some modules. Raises ChainError for a model that is
    not made of layers that are called one after the other.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str] = ()) -> None:
        body = base_model(model)
        blocks = _decoder_layers(body, {model.get_submodule(name) for name in modules})
        names = {module: name for name, module in model.named_modules()}
        self.blocks = {names[block]: block for block in blocks}
        self._recorders = [_Recorder(block) for block in blocks]
        memo: dict[int, Any] = {id(b): r for b, r in zip(blocks, self._recorders, strict=True)}
        memo |= {id(p): p for p in body.parameters() if p.dtype == torch.float32}  # no second time
        self._shell = deepcopy(body, memo).float().eval()
        self._body, self._device = body, next(model.parameters()).device

    def enter(self, rows: Sequence[Sequence[int]]) -> Batch:
        """Return a batch of rows of tokens before the first layer."""
        longest = max(map(len, rows))
        tokens = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
        inside = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        tokens, inside = tokens.to(self._device), inside.to(self._device)
        for recorder in self._recorders:
            recorder.call = None
        self._through(tokens, inside)
        calls = [recorder.call for recorder in self._recorders]
        if None in calls:
            raise _not_layered(self._body, "layers that are not called once each")
        hidden = self._recorders[0].entered
        if hidden.shape[:-1] != tokens.shape:
            raise _not_layered(self._body, f"hidden states of sizes {[*hidden.shape]}")
        return Batch(tokens, inside, hidden, calls)  # type: ignore[arg-type]

    def leave(self, batch: Batch) -> Tensor:
        """Return the hidden states (tokens × width) that the model gives to its head."""
        last = self._recorders[-1]
        last.leaves = batch.hidden
        try:
            return self._through(batch.tokens, batch.inside)[batch.inside]
        finally:
            last.leaves = None

    def _through(self, tokens: Tensor, inside: Tensor) -> Tensor:
        mask = None if bool(inside.all()) else inside.long()
        found = self._shell(input_ids=tokens, attention_mask=mask, use_cache=False)
        hidden: Tensor = found[0]
        return hidden

    @torch.no_grad()
    def check(self, row: Sequence[int]) -> None:
        """Raise ChainError unless the layers one after the other give what the model gives."""
        if self._body.training:
            rule = "a model must be in evaluation mode to combine states on it"
            raise ChainError(rule, "training mode", "call model.eval()")
        wanted = self._whole(row)
        try:
            batch = self.enter([row])
            for place, block in enumerate(self.blocks.values()):
                with in_float32(block) as exact:
                    batch.hidden = run(exact, batch, place)
            found = self.leave(batch)
        except ChainError:
            raise
        except Exception as error:  # whatever a model does with what its layers give
            got = f"{type(error).__name__} layer by layer"
            raise _not_layered(self._body, got) from error
        # the model itself may compute in 16 bits, with 8 of them behind the point
        near = _EQUAL if next(self._body.parameters()).dtype == torch.float32 else 0.1
        if float((found - wanted).abs().max()) > near * float(wanted.abs().max()):
            raise _not_layered(self._body, "other outputs, layer by layer")

    def _whole(self, row: Sequence[int]) -> Tensor:
        """Return what the model itself gives to its head, and note the form of what layers give."""
        pairs = zip(self.blocks.values(), self._recorders, strict=True)
        hooks = [block.register_forward_hook(recorder.note) for block, recorder in pairs]
        try:
            tokens = torch.tensor([[*row]]).to(self._device)
            wanted: Tensor = self._body(input_ids=tokens, use_cache=False)[0][0]
            return wanted.float()
        finally:
            for hook in hooks:
                hook.remove()


class _Recorder(nn.Module):
    """Stands for a decoder layer: notes what it is called with, and returns what entered it, or
    what `leaves` it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # no part of this: it is not copied, nor converted
        self.gives = 0  # parts of the tuple that the layer gives; 0 if it gives no tuple
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.entered: Tensor
        self.leaves: Tensor | None = None

    def __getattr__(self, name: str) -> Any:  # models ask some layers for their kind
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, hidden: Tensor, *args: Any, **keys: Any) -> Any:
        self.entered, self.call = hidden, (args, keys)
        found = hidden if self.leaves is None else self.leaves
        return (found, *[None] * (self.gives - 1)) if self.gives else found

    def note(self, block: nn.Module, args: Any, output: Any) -> None:
        """Note the form of what the layer gives, as a hook of it."""
        self.gives = len(output) if isinstance(output, tuple | list) else 0


def run(block: nn.Module, batch: Batch, place: int) -> Tensor:
    """Return the hidden states behind the layer of a place."""
    args, keys = batch.calls[place]
    found = block(batch.hidden, *args, **keys)
    hidden: Tensor = found[0] if isinstance(found, tuple | list) else found
    return hidden


@contextmanager
def in_float32(block: nn.Module) -> Iterator[nn.Module]:
    """Give a layer whose weights are float32: itself, or a copy. Quantised ones stay as they are.

    So the difference of two outputs, of which a link is some hundredths, keeps its digits.
    """
    narrow = [
        module
        for module in block.modules()
        if not is_quantized(module)
        and any(t.is_floating_point() and t.dtype != torch.float32 for t in _own(module))
    ]
    if not narrow:
        yield block
        return
    copy = deepcopy(block)
    for module in copy.modules():
        if not is_quantized(module):
            for name, weight in [*module.named_parameters(recurse=False)]:
                if weight.is_floating_point():
                    setattr(module, name, nn.Parameter(weight.float(), requires_grad=False))
            for name, buffer in [*module.named_buffers(recurse=False)]:
                if buffer.is_floating_point():
                    setattr(module, name, buffer.float())
    yield copy


def _own(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


# --- inside one layer ---


@dataclass(frozen=True)
class Inside:
    """What runs in a layer: the modules in `groups` that share an input, in the order of the
    forward pass, and the point where each of some adds to the residual stream.

    A point is a module of the layer, into which the stream goes, or "" for what leaves the layer.
    Modules in `routed` get some of the tokens, as experts do.
    """

    groups: list[list[str]]
    points: dict[str, str]
    routed: frozenset[str]


class Reached(Exception):
    """All that was wanted of a forward pass is known."""


Acting = Callable[[str, Tensor, Callable[[Tensor], Tensor]], Tensor]
"""What a linear module of a name gives for an input; the last computes what it gives by itself."""


@contextmanager
def acting(block: nn.Module, modules: Sequence[str], act: Acting) -> Iterator[None]:
    """Let `act` say what linear modules of a layer give."""
    layers = {name: base_layer(block.get_submodule(name)) for name in modules}
    own = {name: vars(layer).get("forward") for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.forward = _calling(act, name, layer.forward)
    try:
        yield
    finally:
        for name, layer in layers.items():
            del layer.forward  # that of its class again
            if own[name] is not None:  # accelerate gives layers their own
                layer.forward = own[name]


def _calling(act: Acting, name: str, forward: Callable[[Tensor], Tensor]) -> Any:
    return lambda x, *args, **keys: act(name, x, forward)


@contextmanager
def watching(block: nn.Module, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see` with the path and the first input of each module in a layer that is called."""
    hooks = [
        module.register_forward_pre_hook(_seeing(see, name))
        for name, module in block.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _seeing(see: Callable[[str, Tensor], None], name: str) -> Any:
    return lambda module, args: see(name, args[0]) if args and isinstance(args[0], Tensor) else None


@torch.no_grad()
def look_inside(block: nn.Module, modules: Sequence[str], batch: Batch, place: int) -> Inside:
    """Find out what runs in a layer, by a batch of one short row.

    Raises ChainError for modules that do not run once.
    """
    inputs: dict[str, Tensor] = {}

    def note(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        if name in inputs:
            raise ChainError("a module that is combined runs once", f"more often, {name}")
        inputs[name] = x
        return forward(x)

    called = {""}
    with acting(block, modules, note), watching(block, lambda name, x: called.add(name)):
        whole = _streams(block, batch, place)
    for name in (name for name in modules if name not in inputs):
        if name.rpartition(".")[0] in called:  # Mamba's takes the weight of one of its modules
            raise ChainError("a module that is combined is called", f"never, {name}")
        inputs[name] = torch.empty(0)  # an expert that this row was not sent to
    groups: dict[object, list[str]] = {}
    for name, x in inputs.items():
        key = (x.data_ptr(), x.shape, x.stride()) if x.numel() else name
        groups.setdefault(key, []).append(name)
    routed = _routed(inputs, batch.inside.numel())
    points = {}
    for name, *others in groups.values():
        if others or name in routed:
            continue
        if (point := _point_of(block, name, batch, place, whole)) is not None:
            points[name] = point
    return Inside([*groups.values()], points, routed)


def _routed(inputs: Mapping[str, Tensor], count: int) -> frozenset[str]:
    """Return the modules that get some of the tokens, and those that stand in a list with one."""
    some = {name for name, x in inputs.items() if x.numel() != count * x.shape[-1]}
    lists = {_list_of(name) for name in some} - {""}
    return frozenset(some | {name for name in inputs if _list_of(name) in lists})


def _list_of(name: str) -> str:
    """Return the path of the list of modules that a module stands in, "" if in none."""
    parts = name.split(".")
    place = next((n for n, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:place])


def _streams(block: nn.Module, batch: Batch, place: int) -> dict[str, Tensor]:
    """Return what goes into each module of a layer that could be the stream, and what leaves it."""
    found: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        found.setdefault(name, []).append(x.clone())

    with watching(block, see):
        end = run(block, batch, place)
    width, count = end.shape[-1], end.numel()
    once = {name: xs[0] for name, xs in found.items() if len(xs) == 1}
    streams = {n: x for n, x in once.items() if x.shape[-1] == width and x.numel() == count}
    return {name: x.view(end.shape) for name, x in streams.items()} | {"": end}


def _point_of(
    block: nn.Module, module: str, batch: Batch, place: int, whole: Mapping[str, Tensor]
) -> str | None:
    """Return the last point at which all that a module gives is added, and nothing else follows
    from it."""
    given: list[Tensor] = []

    def leave_out(name: str, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        given.append(forward(x))
        return torch.zeros_like(given[-1])

    with acting(block, [module], leave_out):
        without = _streams(block, batch, place)
    if not given or given[0].numel() != whole[""].numel():
        return None
    own = given[0].reshape(whole[""].shape)
    # A sum with the stream is rounded: to 2⁻²⁴ of its largest entry in float32.
    near = [1e-4 * float(own.abs().max()) + 1e-6 * float(x.abs().max()) for x in whole.values()]
    found = [
        name
        for (name, x), tolerance in zip(whole.items(), near, strict=True)
        if name in without and float((x - without[name] - own).abs().max()) <= tolerance
    ]
    return found[-1] if found else None


def _decoder_layers(body: nn.Module, wanted: Set[nn.Module]) -> list[nn.Module]:
    """Return the modules of the list of layers: of the outermost ones with weights that with most
    wanted modules, else the longest."""
    found = [
        [*module]
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList)
        and any(True for _ in module.parameters())
        and not _is_inside(body, name)
    ]
    if not found:
        raise _not_layered(body, "no list of layers")
    return max(found, key=lambda own: (len(wanted & {*nn.ModuleList(own).modules()}), len(own)))


def _is_inside(body: nn.Module, name: str) -> bool:
    """Say whether a module lies in a list of modules."""
    parts = name.split(".")
    above = (".".join(parts[:n]) for n in range(1, len(parts)))
    return any(isinstance(body.get_submodule(path), nn.ModuleList) for path in above)


def _not_layered(body: nn.Module, got: str) -> ChainError:
    rule = "states are combined on models of decoder layers that are called one after the other"
    return ChainError(rule, f"{got}, {type(body).__name__}", "train the stages on top")
