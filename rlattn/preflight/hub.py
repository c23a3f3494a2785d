"""Whether the hub can be reached, asked once: its own clients retry for half a minute where there is no network."""

import os
import ssl
import urllib.error
import urllib.request
from http.client import InvalidURL

from rlattn.rank import say

SECONDS = 1.5


def go_offline_if_unreachable() -> None:
    """Sets HF_HUB_OFFLINE, and says so, where no connection to the hub comes about: cached files are used, and others
    fail at once. A hub that is slow, or whose certificate is refused, is left to its clients.

    Must run before huggingface_hub is imported, which reads the variable then. Proxy settings are honoured.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered
    except (OSError, ValueError, InvalidURL) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError | ssl.SSLError):
            return
        os.environ["HF_HUB_OFFLINE"] = "1"
        say(f"warning: {address} cannot be reached ({cause}): only cached files are used (HF_HUB_OFFLINE=1).")
