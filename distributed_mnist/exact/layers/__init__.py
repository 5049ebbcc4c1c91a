"""Layers of networks in exact arithmetic: what each torch function becomes, forward and backward."""
