"""Tensor-parallel layers and the collectives that gradients flow through."""
