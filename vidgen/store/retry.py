"""The one retry loop of the store, and what the answers of object stores mean.

Retriable: 5xx, throttling, conflicts of two writers, a lost connection. They are tried again with jittered, doubling
pauses, and become an InfrastructureError when patience ends. Final: permission, credentials, a missing bucket, a clock
that is off; they become a Refused at once. Refuses to know which request is tried.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from vidgen.errors import ConfigError, GenerationError, InfrastructureError, UserError
from vidgen.store.kind import Trouble

T = TypeVar("T")

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 10.0
PATIENCE = 120.0
"""Seconds that a store which has answered before may be in trouble."""
FIRST_PATIENCE = 15.0
"""Seconds for one that never answered: more likely its address is wrong."""
LEAST_TRIES = 3
"""However long each takes."""


class Refused(ConfigError, InfrastructureError):
    """The store will not do it however often it is asked, and only a person can mend that. It ends a driver as a
    mistake of the configuration (exit 2), and says nothing about the item whose video a replica could not store."""


class Unsettled(Exception):
    """A request met another one at the same object and must be made again."""


def tried(
    act: Callable[[], T],
    diagnose: Callable[[Exception], Trouble | None],
    name: str,
    *,
    patience: float,
    clean: Callable[[str], str] = str,
) -> T:
    """Does `act` until it succeeds, its error is final, or `patience` seconds are over.

    `act` must be safe to do again after a try whose outcome is unknown: an overwrite by the same bytes, or a create
    that looks at what is there. `diagnose` tells what an error means (None: raised as it is), `name` is how messages
    call the object, and `clean` takes secrets out of what a library said.
    """
    begun, pause, tries = time.monotonic(), FIRST_PAUSE, 0
    while True:
        tries += 1
        try:
            return act()
        except (GenerationError, UserError, NotImplementedError):
            raise
        except Exception as error:  # told apart by `diagnose`; what it does not know is raised
            last = error
            unsettled = Trouble(str(error), again=True) if isinstance(error, Unsettled) else None
            trouble = unsettled or diagnose(error)
            if trouble is None:
                raise
        said = clean(trouble.words)
        if not trouble.again:
            raise Refused(f"{name}: {said}") from _harmless(last, clean)
        seconds = time.monotonic() - begun
        if tries >= LEAST_TRIES and seconds + pause > patience:
            raise InfrastructureError(f"{name}: {said}; gave up after {tries} tries in {seconds:.0f} s") from _harmless(
                last, clean
            )
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, LONGEST_PAUSE)


def answered(status: int, code: str, message: str) -> Trouble | None:
    """What an answer of an object store means; None for a missing object and for success."""
    said = f"{status} {code}".strip() + (f": {message}" if message and message != code else "")
    for codes, words in _FINAL:
        if code in codes:
            return Trouble(f"{words} ({said})", again=False)
    if code in _THROTTLED or status in (429, 503):
        return Trouble(f"the store asks for fewer requests ({said})", again=True)
    if code in _SLOW or status == 408:
        return Trouble(f"the store waited too long for us ({said})", again=True)
    if code in _DAMAGED:
        return Trouble(f"what we sent was damaged on its way ({said})", again=True)
    if status == 409:
        return Trouble(f"another writer was at the same object at the same moment ({said})", again=True)
    if status == 501:
        return Trouble(f"the store does not know this kind of request ({said})", again=False)
    if status >= 500:
        return Trouble(f"the store is in trouble ({said})", again=True)
    if status == 401:
        return Trouble(f"{_CREDENTIALS} ({said})", again=False)
    if status == 403:
        return Trouble(
            f"permission is missing; reading, writing, listing and deleting below the output are needed ({said})",
            again=False,
        )
    if status in (301, 307, 308):
        return Trouble(f"{_REGION} ({said})", again=False)
    if status in (404, 412) or status < 400:
        return None
    return Trouble(f"the store does not accept the request ({said})", again=False)


def unreachable(error: Exception) -> Trouble:
    """What a lost or refused connection means."""
    text = " ".join(str(error).split())
    return Trouble(f"the store cannot be reached ({type(error).__name__}{': ' if text else ''}{text})", again=True)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _harmless(error: Exception, clean: Callable[[str], str]) -> Exception | None:
    """The cause to show in a traceback: none if any text in its chain holds what must not be shown."""
    return None if any(clean(str(one)) != str(one) for one in causes(error)) else error


_CREDENTIALS = "the credentials are missing, wrong or expired"
_REGION = "the bucket lies in another region; AWS_REGION names it"
_NO_BUCKET = "there is no such bucket or container; it must be made first"
_CLOCK = "this machine's clock and the store's are too far apart; set the clock"
_THROTTLED = (
    *("SlowDown", "Throttling", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded", "ServerBusy"),
    "rateLimitExceeded",
)
_SLOW = ("RequestTimeout", "OperationTimedOut")
_DAMAGED = ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "Md5Mismatch")
_FINAL = (
    (("NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"), _NO_BUCKET),
    (("RequestTimeTooSkewed",), _CLOCK),
    (
        (
            *("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken", "InvalidAccessKeyId"),
            *("SignatureDoesNotMatch", "AuthenticationFailed", "InvalidAuthenticationInfo"),
            "NoAuthenticationInformation",
        ),
        _CREDENTIALS,
    ),
    (
        (
            *("PermanentRedirect", "TemporaryRedirect", "Redirect", "AuthorizationHeaderMalformed"),
            "IllegalLocationConstraintException",
        ),
        _REGION,
    ),
)
