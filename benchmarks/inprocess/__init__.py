"""The product's loop with a small model in one process, every cost counted. May import: the product."""
