"""Whether the hub can be reached, asked once: its own clients retry for half a minute where there is no network."""

import os
import urllib.error
import urllib.request

SECONDS = 1.5


def go_offline_if_unreachable() -> None:
    """Sets HF_HUB_OFFLINE where the hub does not answer, so that cached files are used and others fail at once.

    Must run before huggingface_hub is imported, which reads the variable then. Proxy settings are honoured.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"
