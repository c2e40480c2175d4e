"""What waits to be embedded: inbox, outbox, backfills, chunks of versions, dead letters. The only writers of these tables."""
