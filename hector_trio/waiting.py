"""How long to wait before the same is asked of somebody again."""

from __future__ import annotations

import email.utils
import random
import re
from collections.abc import Mapping


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a ``Retry-After`` (seconds or an HTTP date) asks to wait from ``now`` (epoch seconds)."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def backoff(tries: int, first: float, most: float, asked: float | None = None) -> float:
    """Seconds to wait after ``tries`` failures (one or more): twice as long each time, from ``first`` to ``most``, and
    scattered, so that many that failed together do not come together again. What was ``asked`` for counts if it is
    longer, up to ``most``."""
    wait = random.uniform(0.5, 1.0) * min(most, first * 2.0 ** min(tries - 1, 32))
    return max(wait, min(most, asked or 0.0))
