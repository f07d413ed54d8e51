"""The user's folder for what can be made again: statistics of references, indexes of shards."""

import os
from pathlib import Path


def user_cache(kind: str) -> Path:
    """Folder of one kind of content, there or not: below `$GENVISION_CACHE`, else below `genvision` in the user's cache folder."""
    if os.environ.get("GENVISION_CACHE"):
        return Path(os.environ["GENVISION_CACHE"]).expanduser() / kind
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "genvision" / kind
