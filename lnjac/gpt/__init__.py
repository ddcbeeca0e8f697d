"""The model under study: a GPT, its attention, its credit assignment, its optimizers."""
