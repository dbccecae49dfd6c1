"""What a re-weighted step costs, in plain steps, beside everybody else's: see README.md."""
