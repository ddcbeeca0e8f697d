"""The model under study, with its attention, credit assignment and optimizers."""
