"""Where simexplain is not yet as a row says: network and check, and why. Each must still fail."""

from __future__ import annotations

KNOWN: dict[tuple[str, str], str] = {}
