"""Whether the Hugging Face hub can be reached: asked once, before anything of it is loaded.

Its own libraries try again and again, for minutes and with a message each. If it cannot be reached they are told to use
nothing but their cache, so that what is cached still loads, and anything else fails at once.
"""

import sys
from functools import cache

from bridge.exchange.errors import innermost, one_line
from bridge.exchange.printable import say
from huggingface_hub import constants, get_session

SECONDS = 5.0  # to connect, and to answer


@cache
def why_unreachable() -> str | None:
    """Why the hub cannot be reached, or None; from here on this process is offline if there is a reason."""
    if constants.HF_HUB_OFFLINE:
        return "offline mode is set (HF_HUB_OFFLINE)"
    reason = _answer()
    if reason is None:
        return None
    constants.HF_HUB_OFFLINE = True  # what transformers asks too
    datasets_config = sys.modules.get("datasets.config")
    if datasets_config is not None:  # has a copy, from when it was imported
        datasets_config.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    message = f"the hub cannot be reached at {constants.ENDPOINT} ({reason})"
    say(f"warning: {message}; only what is in the cache can be loaded", stream=sys.stderr)
    return message


def _answer() -> str | None:
    """One request; None if the hub answers it, or refuses it for a reason of its own."""
    try:
        status = get_session().head(constants.ENDPOINT, timeout=SECONDS).status_code
    except Exception as error:  # each release of the hub's library may have exceptions of another HTTP library
        return one_line(innermost(error))
    return f"it answers with status {status}" if status >= 500 else None
