"""Worlds of stochastic gradient descent whose answer is known: where theory can be tested without a neural network."""
