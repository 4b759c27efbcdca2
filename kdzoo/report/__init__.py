"""The report of a comparison, from its ledger alone: Markdown, one HTML file, figures."""
