"""No credential in a message, a log, a plan or a report.

A URL that carries credentials is refused wherever one is given (output, dataset, checkpoint, adapter, medium), since it
would be written into plans and manifests and shown; whatever a storage library says passes `Secrets.clean` (outputs)
or `clean` (inputs) before anybody sees it. Refuses to know any store.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import fsspec.config

from vidgen.errors import ConfigError

HIDDEN = "***"
SECRET_NAME = re.compile(
    r"secret|password|passwd|token|credential|connection_string|sas|(account|access|private|api)_?key|^key$", re.I
)
"""Names of options whose values are credentials."""
SECRET_VARIABLES = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_KEY", "AZURE_STORAGE_SAS_TOKEN"),
    *("AZURE_CLIENT_SECRET", "GOOGLE_API_KEY"),
)
_LOGIN = re.compile(r"(?<=://)[^/\s:@]*:(?!\d+(?:/|$))[^\s@]*@")
"""user:password@ after the scheme; a password may hold slashes, and host:8080/ is none."""
_FIELD = re.compile(
    r"(?i)\b(AccountKey|SharedAccessSignature|sig|signature|X-Amz-(?:Signature|Credential|Security-Token)"
    r"|AWSAccessKeyId|access_token|password|secret)=[^&;\s'\"]+"
)
SHORTEST = 6
"""Values with fewer letters are no secrets: hiding every "key" would hide the message."""


def shown(url: str) -> str:
    """A URL or text without the credentials that its own form gives away."""
    return _FIELD.sub(rf"\1={HIDDEN}", _LOGIN.sub(f"{HIDDEN}@", url))


def carried(url: str) -> str | None:
    """Why a URL that carries credentials cannot be taken, showing it without them; None for one that carries none."""
    if shown(url) == url:
        return None
    return (
        f"{shown(url)!r} carries credentials, which would end in plans, reports and logs; give them by the "
        "environment instead (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_CONNECTION_STRING, "
        "GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_<PROTOCOL>_<OPTION>), by a profile, or by the machine's own role"
    )


def refuse_credentials(url: str) -> None:
    """ConfigError for a URL that carries credentials."""
    if (why := carried(url)) is not None:
        raise ConfigError(why)


def clean(text: str) -> str:
    """A text without any secret that this process was given: by the environment, or by the configuration of fsspec.
    What a storage library said of a dataset, a checkpoint or a medium passes here before it is shown or kept."""
    return Secrets(fsspec.config.conf).clean(text)


class Secrets:
    """The secrets of one store: credentials in its options and in the environment."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        values = {os.environ[name] for name in SECRET_VARIABLES if name in os.environ} | set(_secrets(options))
        self._values = sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)

    def clean(self, text: str) -> str:
        """The text with every secret hidden."""
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return shown(text)


def _secrets(options: Any, secret: bool = False) -> list[str]:
    """Strings below secret names, at any depth."""
    if isinstance(options, Mapping):
        pairs = options.items()
        return [found for name, v in pairs for found in _secrets(v, secret or bool(SECRET_NAME.search(str(name))))]
    if isinstance(options, list | tuple):
        return [found for value in options for found in _secrets(value, secret)]
    return [options] if secret and isinstance(options, str) else []
