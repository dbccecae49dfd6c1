"""What tests, benchmarks and `metakern.check` judge results with: oracles, error budgets, seeded inputs, small
models.
"""
