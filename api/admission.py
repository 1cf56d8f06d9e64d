"""Who may ask, and for what: everything that is refused before a job exists."""

import difflib
import hmac

from fastchat_q.errors import AuthenticationError, ModelNotFoundError, NoWorkerError
from fastchat_q.registry import ModelCard

from .catalog import Catalog


def check_key(authorization: str | None, api_key: str | None) -> None:
    """Compares a bearer header with the server's key; ``api_key`` None: authentication is off.

    Raises:
        AuthenticationError: no key, or not ours.
    """
    if api_key is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    given = given.strip()
    if scheme.lower() != "bearer" or not given:
        raise AuthenticationError(
            "You didn't provide an API key. Send it in the header: Authorization: Bearer YOUR_KEY. "
            "The server wrote its key to the file api_key in its state directory."
        )
    if not hmac.compare_digest(given.encode(), api_key.encode()):
        shown = f"{given[:6]}…{given[-4:]}" if len(given) > 16 else "…"
        raise AuthenticationError(f"Incorrect API key provided: {shown}")


async def admit(catalog: Catalog, model: str) -> ModelCard:
    """The card of a model that can be asked now.

    Raises:
        NoWorkerError: it was served lately, but no worker is alive.
        ModelNotFoundError: never heard of it; the message names near matches.
    """
    card = catalog.card(model)
    if card is None:
        await catalog.refresh()  # a worker may have come within the last second
        card = catalog.card(model)
    if card is not None:
        return card
    known = catalog.known()
    if model in known:
        raise NoWorkerError(
            f"No worker serves model {model!r} at the moment. Start one with: fastchat-q worker --model {model}",
            param="model",
        )
    near = difflib.get_close_matches(model, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ModelNotFoundError(
        f"The model {model!r} does not exist on this server.{hint} GET /v1/models lists the models.", param="model"
    )
