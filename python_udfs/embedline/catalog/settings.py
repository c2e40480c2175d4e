"""Read and write the settings of an administrator, rows of embedline.setting.

Each has a default and bounds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from embedline.errors import InvalidParameter
from embedline.postgres.entry import entry_point
from embedline.postgres.session import Session
from embedline.postgres.sqlstates import sqlstate_of

# SQLSTATE class of a text that is no interval.
_DATA_EXCEPTION = "22"


@dataclass(frozen=True)
class PacingLimits:
    """The limits of batches.

    The defaults stand in embedline.setting under the same names.
    """

    batch_seconds: float = 1.0
    commit_seconds: float = 0.5
    min_rows: int = 16
    max_rows: int = 4000


@dataclass(frozen=True)
class Settings(PacingLimits):
    """All settings; see the list in docs/reference/settings.md.

    - `live_share`: the largest part of batches for live changes while a backfill has work.
    - `max_replication_lag_seconds`, `max_xmin_age`: the limits at which workers slow down. They are the seconds that a replica
      lags, and the age of the oldest snapshot in transactions.
    - `rollback_window_hours`: how long the version that served before is kept after a cutover.
    - `index_recall_target`: the recall@10 for which hnsw.ef_search or ivfflat.probes is chosen.
    - `unknown_token_share`: the largest share of tokens unknown to the model with which a chunk is embedded.
    - `batch_retention_hours`: how long a finished batch is kept by itself; sums by the hour stay.
    - `alert_lag_seconds`, `alert_disk_percent`: limits at which `embedline.alert` warns: the age of the oldest change that
      waits, and the free share of the data directory's disk.
    - `quality_check_hours`: the time between two checks of quality by an idle worker; 0: none.
    - `max_provider_wait_seconds`: how long a model's circuit stays open at most, even if its provider asks for a longer wait.
    """

    live_share: float = 0.8
    max_replication_lag_seconds: float = 30.0
    max_xmin_age: int = 10_000_000
    rollback_window_hours: float = 48.0
    index_recall_target: float = 0.99
    unknown_token_share: float = 0.5
    max_provider_wait_seconds: float = 300.0
    batch_retention_hours: float = 24.0
    alert_lag_seconds: float = 60.0
    alert_disk_percent: float = 10.0
    quality_check_hours: float = 1.0


# Smallest and largest value of each setting.
_BOUNDS: dict[str, tuple[float, float]] = {
    "batch_seconds": (0.01, 600),
    "commit_seconds": (0.01, 60),
    "min_rows": (1, 100_000),
    "max_rows": (1, 100_000),
    "live_share": (0, 1),
    "max_replication_lag_seconds": (0, 86_400),
    "max_xmin_age": (1, 2_000_000_000),
    "rollback_window_hours": (0, 8760),
    "index_recall_target": (0.5, 1),
    "unknown_token_share": (0, 1),
    "max_provider_wait_seconds": (0.1, 86_400),
    "batch_retention_hours": (0, 8760),
    "alert_lag_seconds": (1, 604_800),
    "alert_disk_percent": (0, 100),
    "quality_check_hours": (0, 8760),
}
# Settings that are an interval, with their defaults.
_INTERVALS = {"dead_letter_retention": "90 days"}
_WHOLE_NUMBERS = ("min_rows", "max_rows", "max_xmin_age")


def load_settings(session: Session) -> Settings:
    """Return the current settings."""
    rows = session.query("SELECT name, value FROM embedline.setting WHERE name = ANY ($1)", ["text[]"], list(_BOUNDS))
    changed: dict[str, Any] = {row["name"]: float(row["value"]) for row in rows}
    changed |= {name: int(changed[name]) for name in _WHOLE_NUMBERS if name in changed}
    return dataclasses.replace(Settings(), **changed)


@entry_point
def configure(session: Session, name: str, value: float | None) -> float:
    """Set one setting, or reset it to its default with NULL; return its value."""
    return _set_number(session, name, value)


def _set_number(session: Session, name: str, value: float | None) -> float:
    if name in _INTERVALS:
        raise InvalidParameter(
            f"{name} is an interval, not a number",
            hint=f"SELECT embedline.configure('{name}', '{_INTERVALS[name]}'); or NULL sets the default.",
        )
    if name not in _BOUNDS:
        known = ", ".join(sorted([*_BOUNDS, *_INTERVALS]))
        raise InvalidParameter(f'there is no setting "{name}"', hint=f"Settings: {known}.")
    default = float(getattr(Settings(), name))
    if value is None:
        session.query("DELETE FROM embedline.setting WHERE name = $1", ["text"], name)
        return default
    low, high = _BOUNDS[name]
    if not low <= value <= high:
        raise InvalidParameter(
            f"{name} must be between {low:g} and {high:g}, not {value:g}",
            hint=f"SELECT embedline.configure('{name}', {default:g}); sets the default.",
        )
    _store(session, name, _as_text(name, value))
    return value


@entry_point
def configure_text(session: Session, name: str, value: str | None) -> str:
    """Set one setting that is given as text, or reset it with NULL; return its value.

    A number may be given as text, too.
    """
    if name not in _INTERVALS:
        # An unknown name is told before a value that is no number.
        number = _number(name, value) if name in _BOUNDS else None
        return _as_text(name, _set_number(session, name, number))
    value = _INTERVALS[name] if value is None else value
    try:
        is_negative = session.scalar("SELECT $1::interval < interval '0'", ["text"], value)
    except session.plpy.SPIError as error:
        if not sqlstate_of(error).startswith(_DATA_EXCEPTION):
            raise
        is_negative = None
    if is_negative is not False:
        raise InvalidParameter(
            f"{name} must be an interval that is not negative, not {value!r}",
            hint=f"SELECT embedline.configure('{name}', '{_INTERVALS[name]}'); sets the default.",
        )
    _store(session, name, value)
    return value


def _as_text(name: str, value: float) -> str:
    return repr(round(value) if name in _WHOLE_NUMBERS else value)


def _number(name: str, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        raise InvalidParameter(f"{name} must be a number, not {value!r}") from None


def _store(session: Session, name: str, value: str) -> None:
    session.query(
        "INSERT INTO embedline.setting (name, value) VALUES ($1, $2)"
        " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        ["text", "text"], name, value,
    )  # fmt: skip
