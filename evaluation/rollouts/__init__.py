"""Closed-loop rollouts: environments as adapters, a vectorised loop, control arms and the suite that pools them."""
