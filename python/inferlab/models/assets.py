"""Names of the models that ship inside the package, and where a model name leads."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"

BUNDLED = {
    "inferlab/tiny": ASSETS / "tiny",
    "inferlab/tiny-draft": ASSETS / "tiny-draft",
    "inferlab/tiny-medusa": ASSETS / "tiny-medusa",
    "inferlab/tiny-eagle": ASSETS / "tiny-eagle",
}


def resolve_model_path(name_or_path: str | PathLike[str]) -> Path | str:
    """Where a model lies: a directory (Path), or a hub id (str).

    A local directory comes first, then bundled names, then the hub: anything of the form ``name``
    or ``organisation/name`` that is no directory.

    Raises:
        FileNotFoundError: it reads like a path and no such directory exists.
        ValueError: it is empty.
    """
    text = str(name_or_path)
    if not text.strip():
        raise ValueError("the model name is empty; give a directory, a hub id or 'inferlab/tiny'")
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if text in BUNDLED:
        return BUNDLED[text]
    if path.exists():
        raise FileNotFoundError(
            f"model {text!r} is a file; give the directory that holds config.json"
        )
    looks_like_path = (
        not isinstance(name_or_path, str)
        or text.startswith((".", "/", "~"))
        or text.endswith("/")
        or "\\" in text
        or text.count("/") > 1
    )
    if looks_like_path:
        raise FileNotFoundError(
            f"model directory {text!r} does not exist; give a directory with config.json and "
            "*.safetensors, a hub id such as 'facebook/opt-125m', or the bundled 'inferlab/tiny'"
        )
    return text
