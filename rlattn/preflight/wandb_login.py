"""Whether W&B would let a run in, before a model loads. Standard library only: importing wandb takes seconds."""

from collections.abc import Mapping
from configparser import ConfigParser, Error
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.parse import urlsplit

from rlattn.errors import UserError, did_you_mean

MODES = ("online", "offline", "disabled", "shared")
LOCAL = ("offline", "disabled", "dryrun")  # nothing is sent
HOST = "https://api.wandb.ai"


def check_wandb(environment: Mapping[str, str], home: Path) -> None:
    """Raises UserError where wandb would end the run for want of a key. A key that the server refuses shows later."""
    mode = environment.get("WANDB_MODE") or _settings(home).get("mode") or "online"
    if mode in LOCAL:
        return
    if mode not in MODES:
        raise UserError("WANDB_MODE", f"'{mode}' is no mode of wandb's.", did_you_mean(mode, MODES))
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    server = environment.get("WANDB_BASE_URL") or _settings(home).get("base_url") or HOST
    if not _has_password(urlsplit(server).hostname or "", environment, home):
        fix = "Run `wandb login`, or set WANDB_MODE=offline: `wandb sync` uploads the run later."
        raise UserError("tracking.report_to", f"wandb has no API key for {server}.", fix)


def _settings(home: Path) -> dict[str, str]:
    """What `wandb offline` and `wandb login --host` have written."""
    found: dict[str, str] = {}
    for file in (home / ".config/wandb/settings", Path("wandb/settings")):
        parser = ConfigParser(interpolation=None)
        try:
            parser.read(file, encoding="utf-8")
        except (Error, OSError, UnicodeDecodeError):
            continue
        found |= dict(parser["default"]) if parser.has_section("default") else {}
    return found


def _has_password(host: str, environment: Mapping[str, str], home: Path) -> bool:
    places = [Path(environment["NETRC"])] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in places:
        try:
            if file.is_file() and netrc(str(file)).authenticators(host):
                return True
        except (NetrcParseError, OSError, UnicodeDecodeError):
            return True  # wandb reads it in its own way
    return False
