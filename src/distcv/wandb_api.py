"""Questions to W&B's server in GraphQL, as its own client asks them."""

import base64
import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from distcv.config import InputError
from distcv.environment import wandb_key, wandb_server

ANSWER_SECONDS = 20.0  # for a server to answer
USER_QUERY = "query Viewer { viewer { entity } }"


class KeyRefused(InputError):
    """The server is in reach, and doesn't know the key."""

    def __init__(self, host: str | None) -> None:
        super().__init__(
            f"W&B at {host} refuses the key: see WANDB_API_KEY, or call wandb login --relogin"
        )


def send_query(query: str, *, seconds: float, **variables: str | None) -> dict[str, Any]:
    """The server's whole answer to a query, sent with the key if one is set.

    Raises whatever a request raises, ValueError or TypeError for an answer that is no JSON object.
    """
    request = Request(
        f"{wandb_server()}/graphql",
        json.dumps({"query": query, "variables": variables}).encode(),
        {"Content-Type": "application/json"},
    )
    if key := wandb_key():  # not for where the server redirects to
        word = base64.b64encode(f"api:{key}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {word}")
    try:
        with urlopen(request, timeout=seconds) as answer:
            return dict(json.load(answer))
    except HTTPError as error:
        error.close()  # it holds the connection
        raise


def ask_user(seconds: float = ANSWER_SECONDS) -> str:
    """The user or team that the key is of; raises as :func:`ask_wandb`.

    A server may answer a key that it doesn't know, too: that it is nobody's.
    """
    user = ask_wandb(USER_QUERY, seconds).get("viewer")
    if not user:
        raise KeyRefused(urlsplit(wandb_server()).hostname)
    return str(user["entity"])


def ask_wandb(
    query: str, seconds: float = ANSWER_SECONDS, /, **variables: str | None
) -> dict[str, Any]:
    """The data of the server's answer to a query.

    Raises:
        KeyRefused: the server doesn't know the key.
        InputError: there is no key, or the server is out of reach.
    """
    host = urlsplit(wandb_server()).hostname
    if not wandb_key():
        raise InputError(f"no key for W&B at {host}: set WANDB_API_KEY, or call wandb login")
    try:
        return dict(send_query(query, seconds=seconds, **variables)["data"])
    except HTTPError as error:
        if error.code in (401, 403):
            raise KeyRefused(host) from None
        problem = f"answers {error.code}"
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        problem = f"is out of reach ({type(error).__name__})"
    raise InputError(f"W&B at {host} {problem}: try again later, or see WANDB_BASE_URL")
