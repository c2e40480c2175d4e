"""The queues: inbox, outbox, backfills, chunks of versions, dead letters.

These modules are the only writers of their tables.
"""
