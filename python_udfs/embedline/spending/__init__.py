"""Account for requests to providers: the ledger, budgets and rate limits."""
