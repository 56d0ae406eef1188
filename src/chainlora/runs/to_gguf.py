"""A chain for llama.cpp and Ollama: one GGUF file, or a LoRA beside its base, and a Modelfile.

Ollama (https://docs.ollama.com/modelfile) renders chats by a Go template. It guesses that from the
chat template in the GGUF file, by the distance of texts, and gives the bare prompt where it knows
none. So the Modelfile says it: pieces cut out of what the chat template renders, checked against it
on another chat, or the bare prompt where the rows were no chats.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from chainlora import files
from chainlora.chain.adapters import Factors
from chainlora.chain.link import Link, switched_on
from chainlora.data.templates import ends_of_turn, render_chat
from chainlora.errors import ModelError
from chainlora.models.gguf_writing import (
    check_convertible,
    context_of,
    name_for,
    write_gguf,
    write_lora_gguf,
)
from chainlora.models.loading import open_folder
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.apart import taken_apart, write_sheet
from chainlora.runs.cards import UNNAMED, Card, Naming, public_name, story_of, write_card
from chainlora.runs.compression import adapter_factors
from chainlora.runs.export import (
    check_compression,
    copy_licences,
    empty_folder,
    export_merged,
    filled_folder,
)
from chainlora.runs.lineage import Target, lineage_of
from chainlora.runs.opening import tokenizer_of
from chainlora.runs.state import OpenState

logger = logging.getLogger(__name__)

_CONTEXT = 4096  # tokens that Ollama makes room for by itself


def export_gguf(
    run: Address,
    output: str | Path,
    *,
    kind: str | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    tolerance: float | None = None,
    num_links: int | None = None,
    naming: Naming = UNNAMED,
    each: bool = False,
) -> dict[str, Any]:
    """Write a run's model as ``model.gguf``, links merged, with a ``Modelfile`` for Ollama.

    With `as_adapter`, its base as ``base.gguf`` and the links as a LoRA, ``adapter.gguf``, of which
    `rank` and `tolerance` are those of `export_adapter`; with `each` too, a LoRA for each stage, as
    `export_adapter` names and weighs them, with a Modelfile each, and ``SERVING.md``. `kind` is
    what weights are stored as, one of `gguf_writing.KINDS`; by default nothing is rounded but
    float64.

    Raises ModelError for models that are not written as GGUF here, and for what a LoRA of llama.cpp
    cannot hold.
    """
    check_compression(rank, tolerance)
    output = empty_folder(output)
    state, parts = taken_apart(run, num_links) if each else (open_run(run), [])
    as_adapter = as_adapter or each
    folder, config, _ = open_folder(state.base.model)
    tokenizer = tokenizer_of(state, folder)
    check_convertible(config, tokenizer)
    links = switched_on(state.links(num_links))
    stage = _last_stage(state, num_links)
    loras = [_lora(part.name, part.stage, part.state.links(), rank, tolerance) for part in parts]
    as_lora = ", each stage as a LoRA" if each else ""
    if as_adapter and not each:
        loras = [_lora("adapter", stage, links, rank, tolerance)]
        as_lora = f", as a LoRA of rank {loras[0].rank} (relative error {loras[0].error:.2e})"
    wide = None if each or not loras else loras[0].rank
    name = name_for(naming.base or public_name(state.base.model), tokenizer)
    with filled_folder(output) as made:
        model = made / ("base.gguf" if as_adapter else "model.gguf")
        kind = _write_model(model, state, 0 if as_adapter else num_links, tokenizer, kind, name)
        modelfiles = {"Modelfile": ([f"FROM ./{model.name}"], stage)} if not loras else {}
        for lora in loras:
            pairs = {module: (pair.a, pair.b) for module, pair in lora.factors.items()}
            write_lora_gguf(pairs, config, made / f"{lora.name}.gguf", name)
            lines = [f"FROM ./{model.name}", f"ADAPTER ./{lora.name}.gguf"]
            modelfiles[f"{lora.name}.Modelfile" if each else "Modelfile"] = lines, lora.stage
        for file, (lines, of) in modelfiles.items():
            _write_modelfile(made / file, lines, state, of, tokenizer, config)
        told = zip(parts, loras, strict=False)  # no parts without `each`
        adapters = [part.told(lora.rank, lora.error) for part, lora in told]
        sheet = write_sheet(made, state, adapters, naming, as_gguf=True) if each else None
        what = f"with a chain of {len(links)} LoRA link(s) in GGUF ({kind}){as_lora}."
        base = state.base.model
        story = story_of(state, num_links)
        keys = {"kind": kind, "rank": rank, "tolerance": tolerance, "num_links": num_links}
        to: Target = "gguf-adapter" if as_adapter else "gguf"
        lineage = lineage_of(state, folder, naming, to, **keys, each=each)
        card = Card(what, base, "gguf", links, wide, naming=naming, story=story, sheet=sheet)
        write_card(made, card, lineage)
    sizes = {path.name: path.stat().st_size for path in sorted(output.glob("*.gguf"))}
    done = {"to": to, "output": str(output), "links": len(links), "type": kind, "bytes": sizes}
    if each:
        return done | {"adapters": adapters}
    return done | {"rank": wide, "error": loras[0].error} if as_adapter else done


def _last_stage(state: OpenState, num_links: int | None) -> str:
    """Return the stage of the last link that is exported and switched on, and of no rehearsal."""
    terms = state.history.in_order(state.terms(num_links))
    on = [state.history.links[term.link].stage for term in terms if term.strength]
    return next((name for name in reversed(on) if name in state.columns), state.with_rows.stage)


def _write_model(
    file: Path, state: OpenState, num_links: int | None, tokenizer: Any, kind: str | None, name: str
) -> str:
    """Write a model as GGUF and its base's licences; return how its weights are stored."""
    merged = file.with_name("merged")
    done = export_merged(state, merged, num_links=num_links)
    kind = kind or {"float16": "f16", "bfloat16": "bf16"}.get(done["dtype"], "f32")
    ends = [end for end in ends_of_turn(tokenizer) if end != tokenizer.eos_token_id]
    write_gguf(merged, tokenizer, file, kind, name, ends)
    copy_licences(merged, file.parent)
    files.remove(merged)
    return kind


class _Lora(NamedTuple):
    """Links as one adapter: its name, the stage whose rows its Modelfile is for, and its factors,
    with their rank and relative error."""

    name: str
    stage: str
    factors: Mapping[str, Factors]
    rank: int
    error: float


def _lora(
    name: str, stage: str, links: Sequence[Link], rank: int | None, tolerance: float | None
) -> _Lora:
    factors, error = adapter_factors(links, rank=rank, tolerance=tolerance)
    _check_factors(factors)
    return _Lora(name, stage, factors, max(len(pair.a) for pair in factors.values()), error)


def _check_factors(factors: Mapping[str, Factors]) -> None:
    """Raise ModelError for what llama.cpp does not add to a model from a LoRA."""
    wrong = []
    for name, pair in factors.items():
        if pair.bias is not None:
            wrong.append(f"{name}, with a bias")
        if ".layers." not in name:
            wrong.append(f"{name}, a head")
    if wrong:
        raise ModelError(
            "a LoRA of llama.cpp must be on linear maps of layers alone", wrong[0], "use --to gguf"
        )


# --- Ollama ---


def _write_modelfile(
    file: Path, lines: list[str], state: OpenState, stage: str, tokenizer: Any, config: Any
) -> None:
    """Write a Modelfile that begins with these lines, for the rows of a stage."""
    longest = (state.with_rows.config().data.max_length if state.has_run else None) or 0
    room = min(context_of(config), max(_CONTEXT, longest))
    chat = cut_template(tokenizer) if tokenizer.chat_template else None
    if not tokenizer.chat_template or not _is_chat(state, stage, tokenizer):
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif chat is None:
        logger.warning("the Modelfile has no TEMPLATE: Ollama guesses this chat template")
    else:
        lines.append(f'TEMPLATE """{chat.in_go()}"""')
        if chat.stop:  # an empty one would stop at once
            lines.append(f'PARAMETER stop "{chat.stop}"')
    file.write_text("\n".join([*lines, f"PARAMETER num_ctx {room}"]) + "\n", encoding="utf-8")


def _is_chat(state: OpenState, stage: str, tokenizer: Any) -> bool:
    """Say whether a chat template wrote the rows; where no rows are kept, that is assumed."""
    kept = state.kept().get(stage)
    if kept is None or not len(kept.train):
        return True
    messages = [{"role": "user", "content": "a"}]
    try:
        said = [_rendered(tokenizer, messages, add_generation_prompt=add) for add in (False, True)]
    except ValueError as error:  # then `cut_template` cuts nothing
        logger.warning("the chat template fails on a question: %s", error)
        return True
    opening = said[1].removeprefix(said[0]).strip()
    return opening in tokenizer.decode(list(kept.train[0].sequences[0]))


class ChatPieces(NamedTuple):
    """What a chat template writes around contents; `start` where there is no system message."""

    system: tuple[str, str] | None  # before and after one; None where the template refuses it
    start: str
    user: str
    assistant: str
    answered: str
    end: str
    stop: str

    def text(self, contents: Sequence[str], system: str | None = None) -> str:
        """Return what a chat of user and assistant in turn becomes."""
        said = self.start if system is None or not self.system else system.join(self.system)
        for user, answer in zip_longest(contents[::2], contents[1::2]):
            said += self.user + user
            said += "" if answer is None else self.assistant + answer + self.answered
        return said + self.end

    def in_go(self) -> str:
        """Return it as a template of Ollama."""
        start = self.start
        if self.system:
            said = "{{ .System }}".join(self.system)
            start = f"{{{{ if .System }}}}{said}{{{{ else }}}}{start}{{{{ end }}}}"
        turn = f'{{{{ if eq .Role "user" }}}}{self.user}{{{{ .Content }}}}'
        turn += f'{{{{ else if eq .Role "assistant" }}}}{self.assistant}{{{{ .Content }}}}'
        turn += f"{self.answered}{{{{ end }}}}"
        return f"{start}{{{{ range .Messages }}}}{turn}{{{{ end }}}}{self.end}"


def cut_template(tokenizer: Any) -> ChatPieces | None:
    """Cut a tokenizer's chat template into pieces; None where pieces cannot say what it does.

    BOS, which llama.cpp puts before a text, is left out where the tokenizer puts it there too.
    """
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    bos = tokenizer.bos_token if begins else ""

    def said(contents: Sequence[str], system: str | None = None) -> str:
        roles = ["user", "assistant"] * len(contents)
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        first = [] if system is None else [{"role": "system", "content": system}]
        text = _rendered(tokenizer, first + messages, add_generation_prompt=True)
        return text.removeprefix(bos)

    marks = ("§1§", "§2§", "§3§")
    try:
        bare = _split(said(marks), marks)
    except ValueError:
        return None
    system: list[str] | None
    try:
        system = _split(said(marks, "§0§"), ("§0§", *marks))
    except ValueError:
        system = None  # Gemma's refuses one
    befores = [bare[0], bare[2]] + ([system[1]] if system else [])
    endings = (bare[0][i:] for i in range(len(bare[0]) + 1))
    user = next(end for end in endings if all(text.endswith(end) for text in befores))
    words = re.search(r"<[^<>]+>|\S+", bare[2])
    pieces = ChatPieces(
        system=(system[0], system[1].removesuffix(user)) if system else None,
        start=bare[0].removesuffix(user),
        user=user,
        assistant=bare[1],
        answered=bare[2].removesuffix(user),
        end=bare[3],
        stop=words[0] if words else "",
    )
    chat = ("one  two", "three", "four\nfive", "six", "seven")
    same = pieces.text(chat) == said(chat)
    if system:
        same = same and pieces.text(chat, "eight") == said(chat, "eight")
    literal = "".join(bare + (system or []))
    return pieces if same and not re.search(r'\{\{|"""', literal) else None


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], **keys: bool) -> str:
    """Render a chat. Raises ValueError where the template fails."""
    reply = render_chat(tokenizer, {"messages": messages, **keys})
    if reply.error:
        raise ValueError(reply.error)
    return str(reply.value[0])


def _split(text: str, marks: Sequence[str]) -> list[str]:
    """Cut a text at marks, each there once and in this order. Raises ValueError."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(mark)
        pieces.append(before)
    return [*pieces, text]
