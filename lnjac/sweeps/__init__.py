"""Many runs: Hydra's sweeper and launchers."""
