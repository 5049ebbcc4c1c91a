"""Distributed training of digit classifiers whose weights depend on recipe, data and seed alone."""
