"""Writes report.html from a run folder: one self-contained page. Needs no network and sends nothing anywhere.

The page is `page.html` with page.css, page.js and the data as JSON inside; a content-security policy lets only that
script and that style run, whatever a policy wrote into its completions.
"""

import base64
import hashlib
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from rlattn.formats.strict_json import to_json
from rlattn.report.data import read_run
from rlattn.run_folder.folder import write_text

HERE = Path(__file__).parent


def write_report(run: Path) -> Path:
    """Writes `report.html` into a run folder, finished or not, and returns its path."""
    write_text(run / "report.html", page(read_run(run)))
    return run / "report.html"


def page(data: dict[str, Any]) -> str:
    """The page that shows `data`. Its text is data only: script and style are ours."""
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    template = Environment(autoescape=True).from_string((HERE / "page.html").read_text(encoding="utf-8"))
    return template.render(
        name=_storable(data["name"]),
        data=Markup(embedded_json(data)),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def embedded_json(data: Any) -> str:
    """JSON that can stand in a script element: no text of it can end the element or open another."""
    text = to_json(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _storable(text: str) -> str:
    """For the title, which a browser shows as it is: characters that hide or turn text around as codes."""
    shown = (f"U+{ord(c):04X}" if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in text)
    return "".join(shown).encode("utf-8", "replace").decode()
