"""Write the units whose requests have all been answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embedline.documents.values import Document, Vector
from embedline.models import learning
from embedline.worker.batch import Batch, Unit
from embedline.worker.meter import Stage
from embedline.worker.stages.embed import Embed
from embedline.worker.stages.failures import Failures

# Documents of one write: its transaction stays short.
_WRITE_DOCUMENTS = 2000


@dataclass(frozen=True)
class Write:
    """Turn answers into stored vectors."""

    embed: Embed
    failures: Failures

    def write_ready(self, batch: Batch) -> bool:
        """Write the units whose requests have all come back.

        Return False if there is none.
        """
        ready: list[Unit] = []
        count = 0
        for unit in batch.units:
            if unit.is_answered and (not ready or count + len(unit.documents) <= _WRITE_DOCUMENTS):
                ready.append(unit)
                count += len(unit.documents)
        if not ready:
            return False
        batch.units = [unit for unit in batch.units if unit not in ready]
        with batch.meter.stage(Stage.WRITE):
            self._write_units(batch, ready)
        return True

    def _write_units(self, batch: Batch, ready: Sequence[Unit]) -> None:
        known: dict[bytes, Vector] = {}
        sound: list[Document] = []
        # All first: an answer to one unit is evidence for the others.
        for unit in ready:
            self.embed.collect(batch, unit)
        for unit in ready:
            if unit.error is None:
                known |= unit.vectors
                sound += self.failures.without_faults(batch, unit)
            else:
                self.failures.judge(batch, unit, unit.error)
        self.embed.remember_sizes(batch, ready)
        self.embed.settle_reservations(batch)
        if sound:
            written = batch.source.write(batch.claim, sound, known)
            if written and learning.is_error(batch.pipeline.last_error):
                batch.source.forget_error()
            batch.embedded_count += sum(1 for i in written if sound[i].chunks)
            batch.meter.chunk_count += sum(len(sound[i].chunks) for i in written)
        self.embed.grant(batch)
