"""The configuration: its schema, Hydra's composing, a run's identity."""
