"""Context-modulated layers at nearly the price of ordinary ones."""
