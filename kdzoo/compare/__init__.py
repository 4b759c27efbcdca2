"""Recipes × training seeds on one pair: what is missing is run, what is there is kept, and a ledger holds it all."""
