"""Pipeline-parallel training of unmodified PyTorch models."""
