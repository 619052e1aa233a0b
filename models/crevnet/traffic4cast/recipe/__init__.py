"""Recipes: several models, each fine-tuned from another. Settings and folders do not import Lightning, which imports slowly."""
