"""Recipes: several models, trained one from the other. The settings alone are imported here, which need no Lightning."""

from crevnet.recipe.folders import base_run as base_run
from crevnet.recipe.folders import is_recipe as is_recipe
from crevnet.recipe.settings import FineTuning as FineTuning
from crevnet.recipe.settings import RecipeSettings as RecipeSettings
from crevnet.recipe.settings import add_recipe as add_recipe
from crevnet.recipe.settings import load_recipe as load_recipe
