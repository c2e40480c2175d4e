"""A pipeline's source as a value."""

from __future__ import annotations

from dataclasses import dataclass

from embedline.database import quote_ident


@dataclass(frozen=True)
class Source:
    """A watched table."""

    oid: int
    schema: str
    name: str
    owner: str
    partitioned: bool
    subscribed: bool
    # A partition, or a child that inherits: what is written through its parent fires its row triggers alone.
    is_child: bool = False

    @property
    def qualified(self) -> str:
        """Schema and name, quoted."""
        return f"{quote_ident(self.schema)}.{quote_ident(self.name)}"
