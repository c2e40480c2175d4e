"""Workers outside the database, which are handed texts to embed."""

from embedline.remote.worker import Totals, Worker

__all__ = ["Totals", "Worker"]
