"""A token is renewed on the standing connection, before it expires."""

from __future__ import annotations

import asyncio
import logging
import time

from broker.amqp.session import Session
from broker.errors import BrokerError, ConfigError
from broker.settings import BrokerConfig
from broker.tokens import Token, read_token

__all__ = ["keep_token"]

log = logging.getLogger("fedmq.broker")

#: How long a new token may lie in its file; less if the old one does not live as long.
LONGEST_LOOK, SHORTEST_LOOK = 30.0, 0.2
#: The file is looked at so many times in what is left of a token's life.
LOOKS = 5
#: Whoever renews tokens does so before this is all that is left of them.
LATE_SECONDS = 10.0


async def keep_token(session: Session, config: BrokerConfig) -> None:
    """Give the broker each new token that ``broker.token_file`` holds, for as long as the connection stands.

    Returns at once where there is no token.
    """
    known = session.token
    is_told = False
    while config.token_file is not None and known is not None and not session.closed.done():
        await asyncio.sleep(look_after(known, time.time()))
        try:
            token = read_token(config.token_file)
            if token.text != known.text:
                await session.renew_token(token)
                known, is_told = token, False
        except ConfigError as error:
            # Its writer may just be at it.
            log.debug("%s", error)
        except BrokerError as error:
            log.warning("the broker does not take the new token: %s", error)
            return
        if not is_told and known.expires is not None and known.expires - time.time() < LATE_SECONDS:
            is_told = True
            log.warning(
                "the token in %s expires within %g s, and there is no new one yet", config.token_file, LATE_SECONDS
            )


def look_after(token: Token, now: float) -> float:
    """Seconds until the file is looked at again."""
    if token.expires is None:
        return LONGEST_LOOK
    return min(LONGEST_LOOK, max(SHORTEST_LOOK, (token.expires - now) / LOOKS))
