"""What is sent to providers: the ledger, budgets and rate limits."""
