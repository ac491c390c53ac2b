"""Chats as a model is used to them: rendered by the tokenizer's own template."""

from typing import Any

from bridge.exchange.errors import RequestError
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase


def render(
    chats: list[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase, source: str, parse_special_tokens: bool
) -> list[str]:
    """The chats as strings, with the template's special tokens in them.

    Args:
        chats: each a list of messages with role and content.
        tokenizer: has the template.
        source: where the chats are from, for messages.
        parse_special_tokens: whether special tokens that a message contains are meant as such; once rendered they are
            no different from the template's own.

    Raises:
        RequestError: there is no template, it refuses a chat, or a message contains a special token.
    """
    if not tokenizer.chat_template:
        raise RequestError(f"{source} holds chats, and the model's tokenizer has no chat template to render them with")
    special = [] if parse_special_tokens else _special_tokens(tokenizer)
    texts = []
    for number, chat in enumerate(chats, start=1):
        for token in special:
            if any(token in message["content"] for message in chat):
                raise RequestError(
                    f"text {number} of {source} has the special token {token} inside a message, where it cannot be "
                    "told from one of the chat template; remove it, or take it for the token: --parse-special-tokens"
                )
        try:
            messages: list[dict[str, Any]] = [dict(message) for message in chat]
            texts.append(str(tokenizer.apply_chat_template(messages, tokenize=False)))
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise RequestError(f"the tokenizer's chat template refuses text {number} of {source}: {reason}") from None
    return texts


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))
