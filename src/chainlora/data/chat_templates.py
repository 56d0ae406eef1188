"""The chat template that a config gives to a tokenizer."""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from chainlora.config.schema import DataConfig
from chainlora.config.template_names import ENDS, mentions, template_text, with_defaults
from chainlora.data.templates import render_chats
from chainlora.errors import ConfigError

_ANSWER = "§answer§"  # in no template
_log = logging.getLogger(__name__)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    """Give a tokenizer the chat template and its arguments of a config, if that has some.

    Raises ConfigError for arguments that no template reads.
    """
    template = tokenizer.chat_template
    if data.chat_template is not None:
        template = template_text(data.chat_template)
        _warn_of_end(tokenizer, data.chat_template)
    if data.template_arguments:
        _check_read(template, data)
    if isinstance(template, dict):  # one for chats, one for tools, …
        templates = template.items()
        template = {name: with_defaults(t, data.template_arguments) for name, t in templates}
    elif template:
        template = with_defaults(template, data.template_arguments)
    tokenizer.chat_template = template


def ends_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special token that the chat template writes after an answer, if it writes one.

    The model's own end of sequence is often another one, if it is a base model.
    """
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER}]
    (reply,) = render_chats(tokenizer, [{"messages": said}])
    text = "" if reply.error else str(reply.value[0])
    _, found, after = text.rpartition(_ANSWER)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    return [int(token) for token in ids if token in tokenizer.added_tokens_decoder][:1]


def _check_read(template: object, data: DataConfig) -> None:
    if not template:
        raise ConfigError(
            "`data.template_arguments` need a chat template (got a tokenizer without one); give "
            "data.chat_template, or leave them out"
        )
    for name in data.template_arguments:
        if not mentions(template, name):
            raise ConfigError(
                f"`data.template_arguments` must be read by the chat template (got {name:.40}, "
                "which it does not mention); correct or remove it"
            )


def _warn_of_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Say that a model will not stop by itself where a turn's end is no token of its own."""
    end = ENDS.get(name)
    if end is not None and len(tokenizer(end, add_special_tokens=False)["input_ids"]) > 1:
        _log.warning(
            "data.chat_template: %s ends turns with %s, which is several tokens to this "
            "tokenizer, so that chats do not stop there; zephyr and alpaca end them with its own "
            "%s",
            name,
            end,
            tokenizer.eos_token,
        )
