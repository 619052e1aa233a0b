"""Recipes: several models, trained one from the other. Settings and folders need no Lightning, which takes long to import."""
